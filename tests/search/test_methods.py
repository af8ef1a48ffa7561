"""Baselines keep to the budget and are what they are called; curves are moocore's; who wins is counted rightly."""

import importlib.util
import warnings
from statistics import median

import moocore
import numpy as np
import pytest
from search import runs, show
from search.account import Account
from search.baselines import BASELINES, MULTI_FIDELITY, run_method
from search.compare import CENSORED, Run, Trace, duel, quartiles, trace
from search.functions import branin_currin
from search.problems import reference_point

HERE = [name for name in BASELINES if name != "gp"]  # slow, and driven by the same lines as tpe
if importlib.util.find_spec("syne_tune") is None:
    HERE = [name for name in HERE if not name.startswith("mo-asha")]
PROBLEM = branin_currin()


@pytest.fixture(scope="module", params=HERE)
def searched(request):
    """A short run of each baseline, and its name."""
    account = Account(PROBLEM, 20 * PROBLEM.median_joules, seed=3)
    _run(request.param, account)
    return account, request.param


def _run(name, account):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries, about themselves
        run_method(BASELINES[name], account, seed=3)


def test_a_baseline_spends_the_budget_and_no_more(searched):
    account, name = searched
    dearest = PROBLEM.outcomes(np.random.default_rng(0).random((2000, 2)))[:, 1].max()
    assert account.budget_joules - 1.1 * dearest < account.spent_joules <= account.budget_joules
    assert account.finished[-1][0] <= account.spent_joules
    if name not in MULTI_FIDELITY:
        assert account.spent_joules == pytest.approx(sum(joules for _, _, joules in account.finished))


def test_early_stopping_stops_most_and_finishes_some(searched):
    account, name = searched
    counts = [account.steps.get(epoch, 0) for epoch in PROBLEM.epochs]
    if name in MULTI_FIDELITY:
        factor = 1 if name == "mo-asha" else 2  # which stops by another trial's place
        assert counts == sorted(counts, reverse=True) and counts[0] > factor * counts[-1] > 0
    else:
        assert counts[:3] == [0, 0, 0] and counts[3] == len(account.finished)


def test_the_same_seed_gives_the_same_run(searched):
    account, name = searched
    again = Account(PROBLEM, account.budget_joules, seed=3)
    _run(name, again)
    assert again.finished == account.finished


def test_hypervolume_is_that_of_moocore():
    rng = np.random.default_rng(5)
    params = [{"x1": a, "x2": b} for a, b in rng.random((300, 2))]
    outcomes = [PROBLEM.truth(p) for p in params]
    run = Run("p", "m", 0, 300.0, 300.0, 0.0, [(i + 1.0, *outcome) for i, outcome in enumerate(outcomes)], {})
    found = trace(run, PROBLEM)
    corner = reference_point(PROBLEM.front)
    whole = moocore.hypervolume(PROBLEM.front, ref=corner)
    for n in (1, 10, 100, 300):
        expected = moocore.hypervolume(np.array(outcomes[:n]), ref=corner) / whole
        assert found.levels[n - 1] == pytest.approx(expected, rel=1e-9)
        assert found.at(n / 300) == found.levels[n - 1]
    assert found.at(0.5 / 300) == 0.0


def _trace(*steps):
    spent, levels = zip(*steps, strict=True)
    return Trace(np.array(spent), np.array(levels))


def test_a_duel_is_won_where_the_level_is_reached():
    others = [_trace((0.1, 0.2), (0.9, level)) for level in (0.5, 0.6, 0.7)]
    ours = [_trace((0.2, 0.4), (at, 0.65)) for at in (0.3, 0.4, 0.8)]
    found = duel("p", "ours", ours, "tpe", others)
    assert (found.level, found.fraction, found.ours_final) == (0.6, 0.4, 0.65)
    never = duel("p", "ours", [_trace((0.2, 0.4))] * 3, "tpe", others)
    assert never.fraction == CENSORED
    assert duel("p", "ours", ours, "random", [_trace((0.5, 0.0))]) is None
    late = duel("p", "ours", [_trace((0.5, 0.1), (1.2, 0.9))], "tpe", others)
    assert late.fraction == CENSORED and late.ours_final == 0.1


def test_quartiles_are_over_seeds():
    found = quartiles([_trace((0.5, level)) for level in (0.1, 0.2, 0.9)])
    assert found["median"][-1] == 0.2 and found["q75"][-1] == pytest.approx(0.55) and found["median"][0] == 0.0


def test_the_verdict_names_the_losses():
    made = [
        Run(name, method, seed, 100.0, 100.0, 0.0, [(at, 1.0, joules)], {})
        for name, method, at, joules in [
            ("branin_currin", "tpe", 90.0, 600.0), ("branin_currin", "ours", 30.0, 500.0),
            ("zdt1", "tpe", 90.0, 5000.0), ("zdt1", "ours", 30.0, 5300.0),
        ]
        for seed in range(3)
    ]  # fmt: skip
    problems = [runs.problem_named(name) for name in ("branin_currin", "zdt1")]
    found = [d for p in problems for d in show.duels(p, [run for run in made if run.problem == p.name])]
    text = "\n".join(show.verdict_lines(found))
    assert median(d.fraction for d in found) == pytest.approx((0.3 + CENSORED) / 2)
    losses = text.partition("where ours loses")[2]
    assert "zdt1: ours to tpe" in losses and "branin_currin" not in losses
    (verdict,) = show.verdicts(found)
    assert (verdict.group, verdict.is_met) == ("single-fidelity", False)


def test_kept_runs_are_the_runs(tmp_path):
    tasks = [runs.Task("branin_currin", "random", seed, 5.0) for seed in range(2)]
    first = runs.make_runs(tasks, 1, tmp_path, lambda _: None)
    lines = []
    assert runs.make_runs(tasks, 1, tmp_path, lines.append) == first
    assert lines == [f"2 runs from {tmp_path}"]
    runs.make_runs([runs.Task("branin_currin", "random", 0, 6.0)], 1, tmp_path, lines.append)
    assert "seed 0" in lines[-1]
