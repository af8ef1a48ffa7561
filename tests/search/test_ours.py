"""Ours in the bench: what the bench's own meter counts is what the run's ledger says, on a function and on a table."""

import pytest
from search.account import Account
from search.baselines import run_method
from search.csv_table import read_table
from search.functions import branin_currin
from search.ours import ours, ours_funnel

import wattier

TABLE = "net width,family,epoch,loss,joules\n" + "".join(
    f"{width},{family},{epoch},{1 / width + bias + 1 / epoch},{width * epoch}\n"
    for width in range(1, 41)
    for family, bias in (("a b", 0.0), ("c", 0.1))
    for epoch in (1, 3)
)


@pytest.fixture
def found(monkeypatch):
    """What `wattier.search` returns, whoever calls it."""
    kept, search = [], wattier.search

    def keep(*args, **kwargs):
        kept.append(search(*args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(wattier, "search", keep)
    return kept


def _problem(name, tmp_path):
    if name == "function":
        return branin_currin()
    path = tmp_path / "table.csv"
    path.write_text(TABLE)
    return read_table(path)


@pytest.mark.parametrize("name", ["function", "table"])
@pytest.mark.parametrize("method", [ours, ours_funnel])
def test_the_ledger_says_what_was_spent_and_keeps_to_the_budget(method, name, found, tmp_path):
    problem = _problem(name, tmp_path)
    account = Account(problem, 8 * problem.median_joules, seed=0, strict=False)
    run_method(method, account, seed=0)
    (result,) = found
    assert result.spent.joules == pytest.approx(account.spent_joules, rel=1e-9)
    assert account.spent_joules <= account.budget_joules * 1.25  # a projection's error, of the last trial
    full = [t for t in result.trials if t.status == "complete" and t.fidelity.epochs == problem.epochs[-1]]
    assert len(full) == len(account.finished) > 1
    assert [t.energy_joules for t in full] == pytest.approx([joules for _, _, joules in account.finished], rel=1e-9)
