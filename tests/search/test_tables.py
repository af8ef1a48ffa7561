"""Tables: what is refused, what is inferred, where a proposal lands; a table is the function it was made of."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from search.account import Account
from search.baselines import random_search, run_method, tpe
from search.compare import Run, trace
from search.csv_table import read_table
from search.functions import curves
from search.problems import reduction, reports
from search.tables import TableProblem, as_epochs, inferred_space

from wattier.errors import UserError

SOUND = """width,family,epoch,loss,joules
8,egnn,1,0.9,10
8,egnn,3,0.5,30
16,pna,1,0.8,20
16,pna,3,0.4,60
"""


def table(folder, text=SOUND, name="table.csv"):
    path = folder / name
    path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
    return path


REFUSED = {
    "no file": (None, "cannot be read"),
    "empty": ("", "is empty"),
    "header alone": (SOUND.splitlines()[0] + "\n", "no rows"),
    "binary": (b"\x89PNG\xff\xfe\x00", "not text"),
    "nul": (SOUND.replace("egnn", "eg\0nn"), "holds NUL"),
    "open quote": (SOUND + '8,"egnn,9,1,2\n', "not a CSV"),
    "huge cell": (SOUND + "8," + "x" * 200_000 + ",9,1,2\n", "not a CSV"),
    "no loss": (SOUND.replace("loss", "score"), "no column `loss` or `val_loss`"),
    "no joules": (SOUND.replace("joules", "watts"), "no column `joules`"),
    "no fidelity": (SOUND.replace("epoch", "step"), "no column `fidelity`"),
    "both losses": (SOUND.replace("family", "val_loss"), "must have one of them"),
    "twice a name": (SOUND.replace("family", "width"), "two of one name"),
    "no hyper-parameter": ("epoch,loss,joules\n1,1,1\n3,1,2\n", "no column of a hyper-parameter"),
    "words for a loss": (SOUND.replace("0.9", "good"), "'loss' is 'good'"),
    "nan": (SOUND.replace("0.9", "nan"), "must be a finite number"),
    "infinite": (SOUND.replace("60", "1e999"), "must be a finite number"),
    "empty loss": (SOUND.replace("0.9", ""), "must be a finite number"),
    "empty hyper-parameter": (SOUND.replace("pna", ""), "'family' is empty"),
    "nan hyper-parameter": (SOUND.replace("8,", "nan,"), "'width' is nan"),
    "short row": (SOUND + "8,egnn\n", "has 2 cells"),
    "lacks a fidelity": (SOUND.replace("8,egnn,1,0.9,10\n", ""), "no row of fidelity 1"),
    "lacks the highest": (SOUND.replace("16,pna,3,0.4,60\n", ""), "no row of the highest fidelity, 3"),
    "falling joules": (SOUND.replace("0.4,60", "0.4,10"), "joules fall from 20"),
    "no joules spent": (SOUND.replace(",10", ",0"), "must be above 0"),
    "fidelity 0": (SOUND.replace(",1,", ",0,"), "fidelity is 0"),
    "duplicate": (SOUND + "8,egnn,1,0.9,10\n", "repeats line 2"),
    "one row": ("width,epoch,loss,joules\n8,1,1,1\n", "one configuration"),
    "an outcome among hyper-parameters": (
        "width,accuracy,epoch,loss,joules\n"
        + "".join(f"{w},{w + e / 10},{e},1,{e}\n" for w in range(10) for e in (1, 2)),
        "'accuracy' differs in nearly every row",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_table_is_refused_in_a_line(case, tmp_path):
    text, why = REFUSED[case]
    path = tmp_path / "table.csv" if text is None else table(tmp_path, text)
    with pytest.raises(UserError, match=why) as refusal:
        read_table(path)
    message = str(refusal.value)
    assert "\n" not in message and len(message) < 400 and str(path) in message


def test_the_command_says_so_and_ends_with_2(tmp_path):
    bench = Path(__file__).parents[1] / "bench_search.py"
    path = table(tmp_path, SOUND.replace("0.9", "nan"))
    ran = subprocess.run([sys.executable, bench, "--table", path], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert (
        ran.stderr.strip()
        == f"{path}:2: column 'loss' is 'nan', but must be a finite number. Correct or remove the row."
    )


def test_a_sound_table_is_read(tmp_path):
    problem = read_table(table(tmp_path, "\ufeff" + SOUND.replace("epoch", "fidelity").replace(",loss", ", val_loss")))
    assert problem.name == "table" and problem.epochs == (1, 3)
    assert problem.space == {"width": {"choices": [8, 16]}, "family": {"choices": ["egnn", "pna"]}}
    assert problem.front.tolist() == [[0.4, 60.0], [0.5, 30.0]]
    assert problem.joules({"width": 8, "family": "egnn"}, 2) == pytest.approx(20.0)


def test_repeats_are_drawn_by_seed_and_scored_by_their_mean(tmp_path):
    text = "width,seed,epoch,loss,joules\n" + "".join(
        f"{w},{s},1,{w + s / 10},{w + s}\n" for w in (1, 2) for s in range(4)
    )
    problem = read_table(table(tmp_path, text + "3,0,1,3,3\n"))
    assert {problem.loss({"width": 1}, 1, seed) for seed in range(40)} == {1.0, 1.1, 1.2, 1.3}
    assert problem.truth({"width": 1}) == pytest.approx((1.15, 2.5))
    assert problem.loss({"width": 3}, 1, 5) == 3


def test_one_fidelity_will_do(tmp_path):
    problem = read_table(table(tmp_path, "x,epoch,loss,joules\n1,50,1,9\n2,50,2,3\n"))
    assert problem.epochs == (1,) and reports(problem) == [1] and reduction(problem) == 3


def test_inferred_spaces():
    few, many, wide = [1, 2, 4], list(range(1, 15)), [10.0**-k for k in range(14)]
    space = inferred_space({"few": few, "many": many, "wide": wide, "words": ["b", "a"], "constant": [7, 7]})
    assert space == {
        "few": {"choices": few},
        "many": {"low": 1, "high": 14},
        "wide": {"low": 1e-13, "high": 1.0, "log": True},
        "words": {"choices": ["a", "b"]},
    }


@pytest.mark.parametrize(
    ("fidelities", "epochs"),
    [((1, 3, 9), (1, 3, 9)), ((1000, 2000), (1, 2)), ((0.1, 0.2), (1, 2)), ((2, 5), (1, 2)), ((1, 1e6), (1, 2))],
)
def test_fidelities_become_epochs(fidelities, epochs):
    assert as_epochs(fidelities) == epochs


def test_a_proposal_lands_on_the_nearest_row():
    """Held against distances in the unit cube, computed here."""
    rng = np.random.default_rng(0)
    space = {
        "rate": {"low": 1e-4, "high": 1.0, "log": True}, "width": {"low": 1, "high": 101},
        "layers": {"choices": [2, 3, 8]}, "family": {"choices": ["a", "b", "c"]},
    }  # fmt: skip
    unit = np.column_stack([rng.random((60, 2)), rng.integers(3, size=(60, 2))])

    def params(u):
        rate, width = 10 ** (4 * u[0] - 4), round(1 + 100 * u[1])
        return {"rate": rate, "width": width, "layers": [2, 3, 8][int(u[2])], "family": "abc"[int(u[3])]}

    rows = [params(u) for u in unit[:40]]
    values = np.ones((40, 1, 1))
    problem = TableProblem("t", space, (1,), rows, values, values)
    assert [problem.snap(row) for row in rows] == rows
    scaled = np.column_stack([unit[:, 0], [(params(u)["width"] - 1) / 100 for u in unit], unit[:, 2] / 2])
    for place in range(40, 60):
        distance = ((scaled[:40] - scaled[place]) ** 2).sum(axis=1) + (unit[:40, 3] != unit[place, 3])
        assert problem.snap(params(unit[place])) == rows[int(np.argmin(distance))]


def test_a_table_gives_the_curve_of_the_function_it_was_made_of(tmp_path):
    """A grid of the learning curves as a CSV, searched as a table and as a function that snaps to the same grid."""
    function = curves()
    grid = [
        {"width": w, "depth": d, "learning_rate": r, "batch": b, "family": f}
        for w in (32, 64, 256) for d in (2, 6) for r in (1e-4, 1e-3, 1e-2) for b in (8, 128)
        for f in ("egnn", "pna", "schnet")
    ]  # fmt: skip
    path = tmp_path / "grid.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*grid[0], "epochs", "val_loss", "energy_joules"])
        writer.writeheader()
        for params in grid:
            for epoch in function.epochs:
                outcome = {"val_loss": function.loss(params, epoch, 0), "energy_joules": function.joules(params, epoch)}
                writer.writerow({**params, "epochs": epoch, **outcome})
    made = read_table(path)

    class Snapped(TableProblem):
        def loss(self, params, epoch, seed):
            return function.loss(self.snap(params), epoch, 0)

        def joules(self, params, epoch):
            return function.joules(self.snap(params), epoch)

        def truth(self, params):
            return self.loss(params, 27, 0), self.joules(params, 27)

    direct = Snapped(made.name, made.space, made.epochs, grid, made.losses, made.energies)
    for method in (random_search, tpe):
        found = []
        for problem in (made, direct):
            account = Account(problem, 15 * made.median_joules, seed=1)
            run_method(method, account, seed=1)
            run = Run(problem.name, "m", 1, account.budget_joules, account.spent_joules, 0.0, account.finished, {})
            found.append(trace(run, problem))
        assert len(found[0].levels) > 5 and found[0].levels[-1] > 0
        np.testing.assert_allclose(found[0].levels, found[1].levels, rtol=1e-12)
        np.testing.assert_allclose(found[0].spent, found[1].spent, rtol=1e-12)
