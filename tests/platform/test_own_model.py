"""A training function of your own: searched, measured or stated, stopped, resumed, and refused as nonsense."""

import functools
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import wattier
from wattier import cli, figure_style, plots
from wattier.config import load_config
from wattier.console import RunConsole
from wattier.errors import UserError
from wattier.own_model import OwnTrial, own_trial_of
from wattier.report import write_report
from wattier.rundir import RunDir, read_json_lines
from wattier.views import learning_curves_info
from wattier_telemetry import SourceUnavailable, bill

SPACE = {"width": {"low": 8, "high": 64}, "rate": {"low": 1e-4, "high": 1e-1, "log": True}}
STAGES = [{"name": "scout", "trials": 8, "epochs": 3}, {"name": "final", "trials": 4, "epochs": 9, "promote": 3}]
STATED = {"source": "stated"}


def loss_of(params, epoch):
    return (math.log10(params["rate"]) + 2) ** 2 + 30 / params["width"] + 1 / epoch


def table(trial):
    """A tabular benchmark: its joules and seconds are looked up, not measured."""
    for epoch in range(1, trial.epochs + 1):
        joules = 0.5 * trial.params["width"] * epoch
        if not trial.report(loss_of(trial.params, epoch), energy_joules=joules, seconds=2.0 * epoch):
            return


def search(run_dir, function=table, **settings):
    settings = {"stages": STAGES, "telemetry": STATED, "launcher": "inline", "quiet": True, "sampler": "tpe"} | settings
    return wattier.search(SPACE, function, run_dir=run_dir, **settings)


def one(run_dir, function, **settings):
    """One trial of three epochs."""
    stages = [{"name": "only", "trials": 1, "epochs": 3, "reduction_factor": None}]
    found = search(run_dir, function, stages=stages, resources={"retries": 0}, **settings)
    return found.trials[0]


def test_ten_lines_search_a_function_and_bill_what_it_states(tmp_path):
    found = search(tmp_path / "run")
    assert len(found.trials) == 12
    for trial in found.trials:
        last = trial.epochs_done
        assert trial.energy_joules == pytest.approx(0.5 * trial.params["width"] * last)
        assert trial.wall_seconds == pytest.approx(2.0 * last)
        assert trial.val_loss == pytest.approx(loss_of(trial.params, last))
        assert trial.status == ("complete" if last == trial.fidelity.epochs else "pruned")
    assert found.spent.joules == pytest.approx(math.fsum(trial.energy_joules for trial in found.trials))
    assert found.spent.trials == 12
    assert {trial.fidelity.stage for trial in found.front} == {"final"}
    final = [t for t in found.trials if t.fidelity.stage == "final" and t.status == "complete"]
    assert found.front[0].val_loss == min(trial.val_loss for trial in final)
    assert found.run_dir == tmp_path / "run"


def test_the_same_call_again_runs_nothing(tmp_path):
    first = search(tmp_path / "run")
    calls = []
    again = search(tmp_path / "run", table)
    assert [t.to_dict() for t in again.trials] == [t.to_dict() for t in first.trials]
    assert again.front == first.front
    assert not calls


def test_the_same_seed_finds_the_same(tmp_path):
    params = [[t.params for t in search(tmp_path / name).trials] for name in "ab"]
    assert params[0] == params[1]
    other = [t.params for t in search(tmp_path / "c", seed=1).trials]
    assert other != params[0]


def test_energy_is_measured_where_it_is_not_stated(tmp_path):
    trace = tmp_path / "watts.csv"
    trace.write_text("time_seconds,device,power_watts\n0,node,50\n")

    def work(trial):
        for epoch in range(1, trial.epochs + 1):
            deadline = time.perf_counter() + 0.06
            while time.perf_counter() < deadline:
                pass
            trial.report(1.0 / epoch)

    trial = one(tmp_path / "run", work, telemetry={"source": f"replay:{trace}", "interval_seconds": 0.02})
    assert trial.status == "complete"
    assert trial.energy_joules == pytest.approx(50 / os.cpu_count() * trial.wall_seconds, rel=0.01)
    assert trial.wall_seconds > 0.15
    assert trial.peak_memory_bytes > 10e6


def test_a_final_loss_may_be_returned_instead(tmp_path):
    assert one(tmp_path / "run", lambda _: 0.25).val_loss == 0.25


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_diverged_trial(tmp_path, loss):
    def diverge(trial):
        while trial.report(loss, energy_joules=1.0):
            pass

    trial = one(tmp_path / "run", diverge)
    assert (trial.status, trial.diverged, trial.val_loss, trial.epochs_done) == ("pruned", True, None, 1)
    assert trial.energy_joules == 1.0


def nothing(trial):
    pass


def a_text(trial):
    trial.report("low")


def a_tensor_of_two(trial):
    trial.report([1.0, 2.0])


def too_early(trial):
    trial.report(1.0)


def too_far(trial):
    for _ in range(9):
        trial.report(1.0, epoch=7)


def negative_joules(trial):
    trial.report(1.0, energy_joules=-5.0)


def infinite_seconds(trial):
    trial.report(1.0, energy_joules=5.0, seconds=math.inf)


def a_dict(trial):
    return {"loss": 3}


def an_endless_number(trial):
    trial.report(10**400)


def leaves(trial):
    trial.report(1.0)
    sys.exit(0)


def leaves_at_once(trial):
    sys.exit("bye")


class UnspeakableError(Exception):
    def __str__(self):
        raise ValueError("no words")


def raises_what_cannot_be_printed(trial):
    raise UnspeakableError


def removes_its_folder(trial):
    trial.report(1.0)
    shutil.rmtree(trial.folder)
    trial.report(1.0)


def shortens_itself(trial):
    trial.epochs = 1
    trial.report(1.0)


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (nothing, "run_trial ended without a report"),
        (a_text, "report: val_loss is 'low', but must be a number"),
        (a_tensor_of_two, r"report: val_loss is \[1.0, 2.0\], but must be a number"),
        (too_early, "run_trial returned after epoch 1 of 3"),
        (too_far, "report: epoch is 7, but must be 1 to 3"),
        (negative_joules, "report: energy_joules is -5.0, but must be finite and not negative"),
        (infinite_seconds, "report: seconds is inf"),
        (a_dict, "report: the returned loss is {'loss': 3}, but must be a number"),
        (an_endless_number, "report: val_loss is 1000.*, but must be a number"),
        (leaves, r"the trial called sys.exit\(0\)"),
        (leaves_at_once, r"the trial called sys.exit\(bye\)"),
        (raises_what_cannot_be_printed, r"UnspeakableError: its message cannot be read \(ValueError\)"),
        (removes_its_folder, "FileNotFoundError"),
        (shortens_itself, "AttributeError: property 'epochs'"),
    ],
)
def test_nonsense_is_a_failed_trial_that_says_why(tmp_path, function, error):
    trial = one(tmp_path / "run", function)
    assert trial.status == "failed"
    assert re.search(error, trial.error), trial.error


def test_numbers_of_other_libraries_are_numbers(tmp_path):
    losses = [np.float32(0.5), torch.tensor(0.5, requires_grad=True), np.array(0.5)]

    def work(trial):
        for loss in losses:
            trial.report(loss)

    trial = one(tmp_path / "run", work)
    assert (trial.status, trial.val_loss) == ("complete", 0.5), trial.error


def test_joules_a_structure_need_structures(tmp_path):
    trial = one(tmp_path / "run", a_table_of_three, objectives=("val_loss", "joules_per_structure"))
    assert "structures_seen is not given, but the objective joules_per_structure needs it" in trial.error


def a_table_of_three(trial):
    return 0.5


class TestFunctionsOfAnyKind:
    """What Python lets be called may be a trial."""

    class Scaled:
        def __init__(self, loss):
            self.loss = loss

        def __call__(self, trial):
            return self.loss

        def method(self, trial):
            return self.loss

    def größe_des_modells(self):
        return 0.5

    @pytest.mark.parametrize(
        ("function", "name"),
        [
            (Scaled(0.5), "Scaled"),
            (Scaled(0.5).method, "method"),
            (functools.partial(lambda loss, _: loss, 0.5), "partial"),
            (lambda _: 0.5, "lambda"),
            (größe_des_modells, "gre_des_modells"),
        ],
    )
    def test_it_runs_under_a_name(self, tmp_path, function, name):
        assert one(tmp_path / "run", function).val_loss == 0.5
        assert RunDir(tmp_path / "run").config().name == name

    @pytest.mark.parametrize("function", [None, "module:function", 3])
    def test_what_cannot_be_called_is_refused(self, tmp_path, function):
        with pytest.raises(UserError, match="but must be a function of one trial"):
            search(tmp_path / "run", function)
        assert not (tmp_path / "run").exists()


def test_numpy_may_describe_a_search(tmp_path):
    space = {
        "width": {"choices": np.array([8, 16])},
        "rate": {"low": np.float64(0.1), "high": 0.2},
        "n": {"choices": range(3)},
    }
    seen = []

    def work(trial):
        seen.append(trial.params)
        return 0.5

    stages = [{"name": "only", "trials": np.int64(3), "epochs": 1, "reduction_factor": None}]
    wattier.search(
        space, work, stages, "val_loss", {"trials": np.int64(9)}, run_dir=tmp_path / "run", launcher="inline",
        telemetry=STATED, sampler="random", quiet=True, seed=np.int64(3),
    )  # fmt: skip
    assert len(seen) == 3
    assert all(type(params["width"]) is int and type(params["n"]) is int for params in seen)


def test_joules_are_not_stated_where_they_are_measured(tmp_path):
    trial = one(tmp_path / "run", table, telemetry={"source": "estimated"})
    assert "energy_joules is stated, but this run measures it" in trial.error


def test_a_function_that_goes_on_after_false_is_ended(tmp_path):
    def stubborn(trial):
        while True:
            trial.report(1.0, energy_joules=1.0)

    assert one(tmp_path / "run", stubborn).status == "complete"


def test_an_attempt_goes_on_where_the_last_one_saved(tmp_path):
    def twice(trial):
        saved = trial.folder / "epoch.txt"
        start = int(saved.read_text()) if saved.exists() else 0
        assert trial.reported_epochs == start
        for epoch in range(start + 1, trial.epochs + 1):
            trial.report(1.0 / epoch, epoch=epoch, energy_joules=10.0 * (epoch - start), seconds=1.0)
            saved.write_text(str(epoch))
            if start == 0 and epoch == 2:
                raise RuntimeError("the node is gone")

    stages = [{"name": "only", "trials": 1, "epochs": 3, "reduction_factor": None}]
    found = search(tmp_path / "run", twice, stages=stages, resources={"retries": 1})
    trial = found.trials[0]
    assert (trial.status, trial.attempts, trial.epochs_done) == ("complete", 2, 3)
    assert trial.energy_joules == pytest.approx(30.0)  # 20 of the lost attempt, 10 of the second
    assert bill(trial_folder(found, trial)).joules == pytest.approx(30.0)


def trial_folder(found, trial):
    return RunDir(found.run_dir).trial_folder(trial.fidelity.stage, trial.trial_id)


def test_a_search_that_is_killed_goes_on(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import wattier
        from test_own_model import SPACE, STAGES, STATED, table

        def run_trial(trial):
            if sys.argv[1] == "die" and trial.folder.name == "scout-004":
                os.kill(os.getpid(), signal.SIGKILL)
            return table(trial)

        found = wattier.search(SPACE, run_trial, STAGES, run_dir={str(tmp_path / "run")!r}, launcher="inline",
                               telemetry=STATED, sampler="tpe", quiet=True)
        print(len(found.trials))
    """)
    )
    assert subprocess.run([sys.executable, script, "die"], check=False, timeout=120).returncode == -9
    rows = read_json_lines(tmp_path / "run" / "trials.jsonl")
    assert [row["trial_id"] for row in rows] == [f"scout-{i:03d}" for i in range(4)]
    done = subprocess.run([sys.executable, script, "go"], check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout.strip() == "12"
    after = read_json_lines(tmp_path / "run" / "trials.jsonl")
    assert after[:4] == rows
    assert after[4]["trial_id"] == "scout-004"


def test_a_budget_ends_a_search_cleanly_and_a_larger_one_goes_on(tmp_path):
    small = search(tmp_path / "run", budget={"joules": 300.0})
    assert 0 < len(small.trials) < 12
    worst = max(t.energy_joules - (t.projected_joules or 0.0) for t in small.trials)
    assert small.spent.joules <= 300.0 + max(0.0, worst)
    assert {t.fidelity.stage for t in small.trials} == {"scout", "final"}  # the last stage got its share
    notes = json.loads((tmp_path / "run" / "search.json").read_text())
    assert all("J of 300 J are spent" in note["reason"] for note in notes.values())
    again = search(tmp_path / "run", budget={"joules": 300.0})
    assert again.trials == small.trials
    large = search(tmp_path / "run", budget={"joules": 1e6})
    assert len(large.trials) == 12
    assert large.trials[: len(small.trials)] == small.trials
    assert json.loads((tmp_path / "run" / "search.json").read_text()) == {}


def test_a_constraint_keeps_trials_off_the_front(tmp_path):
    found = search(tmp_path / "run", constraints={"wall_seconds": 1e9, "mean_watts": 8.0})
    wide = [t for t in found.trials if t.mean_watts > 8.0]
    assert wide
    assert all(t.limit_ratios["mean_watts"] > 1 for t in wide)
    assert all(t.mean_watts <= 8.0 for t in found.front)
    promoted = [t.params for t in found.trials if t.trial_id in {"final-000", "final-001", "final-002"}]
    assert all(0.25 * params["width"] <= 8.0 for params in promoted[:1])


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"stages": []}, "search: search.stages: is []"),
        ({"stages": [{"name": "a", "trials": 3, "epoch": 3}]}, "unknown key 'epoch'. Did you mean 'epochs'?"),
        ({"objectives": ["loss"]}, "search.objectives[0]: is 'loss'"),
        ({"objectives": ["energy_joules"]}, "must name val_loss"),
        ({"objectives": ["val_loss", "projected_joules"]}, "search.objectives names projected_joules"),
        ({"sampler": "bayes"}, "search.sampler: is 'bayes'"),
        ({"sampler": "cmaes"}, "sampler is cmaes, which knows one objective only"),
        ({"weights": {"val_loss": 1.0}}, "weights are of val_loss, but must be of the objectives"),
        ({"budget": {"joules": -1.0}}, "search.budget.joules: is -1, but must be above 0"),
        ({"constraints": {"memory": 3.0}}, "unknown key 'memory'"),
        ({"telemetry": {"source": "magic"}}, "magic"),
        ({"budget": 3}, "search.budget: is 3, but should be a mapping"),
        ({"samplr": "tpe"}, "unknown key 'samplr'. Did you mean 'sampler'?"),
    ],
)
def test_wrong_settings_are_one_line_and_start_nothing(tmp_path, settings, what):
    with pytest.raises((UserError, SourceUnavailable)) as refusal:
        search(tmp_path / "run", **settings)
    assert what in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run" / "trials.jsonl").exists()


def test_two_searches_in_one_folder_are_refused(tmp_path):
    search(tmp_path / "run")
    with pytest.raises(UserError, match="holds a run of another config"):
        search(tmp_path / "run", seed=5)


class TestByName:
    """A function that a YAML names."""

    def test_it_is_imported(self, monkeypatch, tmp_path):
        (tmp_path / "own_function.py").write_text("def train(trial):\n    return 0.5\n")
        monkeypatch.syspath_prepend(tmp_path)
        assert isinstance(own_trial_of("own_function:train"), OwnTrial)

    @pytest.mark.parametrize(
        ("name", "what"),
        [
            ("no_such_module_here:train", "cannot be imported"),
            ("math:no_such_function", "cannot be imported"),
            ("math:pi", "is a float, but must be a function"),
            ("__main__:run_trial", "known only to the script that called wattier.search"),
            ("mine:search.<locals>.run_trial", "Start that script again"),
            ("own_syntax:f", r"fails at import \(SyntaxError"),
            ("own_exit:f", r"fails at import \(SystemExit"),
            ("own_raise:f", r"fails at import \(RuntimeError: at import\)"),
        ],
    )
    def test_what_cannot_be_called_is_refused(self, name, what, monkeypatch, tmp_path):
        (tmp_path / "own_syntax.py").write_text("def f(trial:\n")
        (tmp_path / "own_exit.py").write_text("import sys\nsys.exit(5)\n")
        (tmp_path / "own_raise.py").write_text("raise RuntimeError('at import')\n")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(UserError, match=what):
            own_trial_of(name)

    def test_the_command_runs_it(self, tmp_path):
        (tmp_path / "own_table.py").write_text(
            "def train(trial):\n"
            "    for epoch in range(1, trial.epochs + 1):\n"
            "        if not trial.report(trial.params['x'] ** 2 + 1 / epoch, energy_joules=float(epoch)):\n"
            "            return\n"
        )
        (tmp_path / "own.yaml").write_text(
            f"name: own\nrun_dir: {tmp_path / 'run'}\nlauncher: inline\ntrial: own_table:train\n"
            "telemetry: {source: stated}\n"
            "search:\n  sampler: random\n  space: {x: {low: -1.0, high: 1.0}}\n"
            "  stages: [{name: only, trials: 6, epochs: 2, reduction_factor: null}]\n"
        )
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-m", "wattier", "run", tmp_path / "own.yaml"],
            env=environment, capture_output=True, text=True, check=False, timeout=180, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "only 6/6" in done.stdout
        assert (tmp_path / "run" / "report.html").exists()
        assert json.loads((tmp_path / "run" / "selection.json").read_text())["stage"] == "only"
        assert "Release" not in done.stdout
        again = CliRunner().invoke(cli.app, ["run", str(tmp_path / "run")])
        assert "Nothing was left to do" in again.output
        status = CliRunner().invoke(cli.app, ["status", str(tmp_path / "run")]).output
        assert not re.search("full training|evaluation|release|trained to", status)
        for verb in ("train", "evaluate", "export"):
            with pytest.raises(UserError, match="searches a model of your own"):
                CliRunner().invoke(cli.app, [verb, str(tmp_path / "run")], catch_exceptions=False)

    @pytest.mark.parametrize(
        "section", ["data: {sources: {ani1x: sample}}", "model: {hidden_dim: 8}", "full_training: {epochs: 5}"]
    )
    def test_a_setting_that_it_would_not_see_is_refused(self, tmp_path, section):
        (tmp_path / "own.yaml").write_text(
            f"name: own\nrun_dir: {tmp_path / 'run'}\ntrial: math:sqrt\n{section}\n"
            "search: {space: {x: {low: 0.0, high: 1.0}}, stages: [{name: only, trials: 1, epochs: 1}]}\n"
        )
        with pytest.raises(UserError, match="is given, which is for Wattier's own models"):
            load_config(tmp_path / "own.yaml")


def test_the_report_tells_of_nothing_that_a_model_of_your_own_lacks(tmp_path):
    found = search(tmp_path / "run")
    run = RunDir(found.run_dir)
    text = write_report(run).read_text(encoding="utf-8")
    page = re.sub(r"<(script|style|pre)\b.*?</\1>", "", text, flags=re.DOTALL)
    assert "wattier select" in page
    assert "Trials" in page
    for words in ("Evaluation", "Calibration", "full training", "Full training", "cleaned", ">Parameters<"):
        assert words not in page


@pytest.mark.parametrize(
    ("joules", "words"),
    [(0.0, "2 energy unknown: its meter counted 0 J"), (None, "2 energy unknown: nothing could be measured")],
)
def test_an_empty_front_says_why(tmp_path, capsys, joules, words):
    def work(trial):
        trial.report(0.5, energy_joules=joules)

    stages = [{"name": "only", "trials": 2, "epochs": 1, "reduction_factor": None}]
    assert search(tmp_path / "both", work, stages=stages, quiet=False).front == []
    assert f"warning: no trial is on the front: {words}" in capsys.readouterr().out
    assert search(tmp_path / "loss", work, stages=stages, quiet=False, objectives="val_loss").front
    assert "warning" not in capsys.readouterr().out


def test_a_warm_start_takes_no_setting_of_wattiers_models_for_a_parameter(tmp_path):
    stages = [{"name": "only", "trials": 3, "epochs": 1, "reduction_factor": None}]
    settings = {"launcher": "inline", "telemetry": STATED, "sampler": "random", "quiet": True}
    narrow = {"x": {"low": 0.0, "high": 1.0}}
    wide = narrow | {"hidden_dim": {"low": 8, "high": 64}}
    wattier.search(narrow, lambda _: 0.5, stages, run_dir=tmp_path / "old", **settings)
    warm = [str(tmp_path / "old")]
    wattier.search(wide, table_free, stages, run_dir=tmp_path / "new", warm_start=warm, **settings)
    (source,) = json.loads((tmp_path / "new" / "warm_start.json").read_text())["sources"]
    assert source["left_out"] == {"without hidden_dim": 3}  # 64 is what Wattier's models have, not this one
    assert source["notes"] == ["its model and training differ from this run's"]


def table_free(trial):
    return 0.25


def test_losses_of_any_size_can_be_read(tmp_path):
    losses = iter([1e300, 1.7e308, 2e-9, 0.5])
    stages = [{"name": "only", "trials": 4, "epochs": 1, "reduction_factor": None}]
    found = search(tmp_path / "run", lambda _: next(losses), stages=stages, sampler="random")
    run, screen = RunDir(found.run_dir), Console(file=io.StringIO(), width=200)
    console = RunConsole(run, screen)
    for trial in found.trials:
        console.trial(trial, 1, 4)
    shown = screen.file.getvalue()
    for loss in ("loss 1e+300,", "loss 1.7e+308,", "loss 2e-09,", "loss 0.5000,"):
        assert loss in shown
    figure = plots.learning_curves_figure(learning_curves_info(run))
    assert len(figure.layout.yaxis.tickvals) <= figure_style.MOST_DECADES + 1
    write_report(run)
