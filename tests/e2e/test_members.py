"""Members that are killed, told to leave, and out of time: the same bits as in peace, and every joule on the bill."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from members import billed_over_true, differences, disturb, undone

from wattier.config import RunConfig
from wattier.departure import EXIT_NOT_FINISHED
from wattier.launch import InlineLauncher
from wattier.prepare import prepare_data
from wattier.records import Fidelity, Pick, Selection, Tier, TrialResult
from wattier.run import train
from wattier.rundir import LEAVE_NAME, RunDir, append_json_line, write_json
from wattier_telemetry import EnergyReport

PICKS = {"deep-000": {"hidden_dim": 8}, "deep-001": {"hidden_dim": 16}}
CONFIG = {
    "name": "members",
    "data": {"sources": {"qm7x": "sample"}, "cutoff_angstrom": 3.0},
    "model": {"n_layers": 1, "n_radial": 4, "head_dim": 8, "n_head_layers": 1, "forces": "vector"},
    "training": {"batch_structures": 128},
    "search": {
        "space": {"hidden_dim": {"low": 8, "high": 16, "step": 8}},
        "stages": [{"name": "deep", "trials": 2, "structures": 100, "epochs": 1, "reduction_factor": None}],
    },
    "select": {"accurate": 2, "balanced": 0},
    "full_training": {"epochs": 45, "early_stop_patience": 45},
}  # fmt: skip


class Quiet:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def phase(self, name: str) -> None: ...

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(self, done: object) -> None: ...

    def trial(self, result: TrialResult, done: int, total: int) -> None: ...


def selected_run(folder: Path, **changes: object) -> RunDir:
    """A run whose search is over: its data are real, its two trials and their selection are written down."""
    config = RunConfig.model_validate(CONFIG | {"run_dir": str(folder)} | changes)
    run = RunDir.create(config)
    with run.lock():
        prepare_data(run, config, Quiet())
    for trial_id, params in PICKS.items():
        row = TrialResult(
            "members", trial_id, params, Fidelity("deep", 100, 1, 1), "complete", 1.0, {}, 1, 100, 1.0,
            EnergyReport.empty(),
        )  # fmt: skip
        append_json_line(run.trials_path, row.to_dict())
    tier = Tier("accurate", "by hand", tuple(Pick(trial_id, "by hand") for trial_id in PICKS))
    selection = Selection("deep", (tier,), (), None, None, tuple(PICKS), {}, None, None)
    write_json(run.selection_path, selection.to_dict())
    return run


@pytest.mark.timeout(240)
def test_killed_told_to_leave_and_out_of_time(tmp_path: Path) -> None:
    run = selected_run(tmp_path / "run")
    straight = undone(run.path, tmp_path / "straight", launcher="inline")
    peaceful = RunDir.open(straight.run_dir)
    train(peaceful, peaceful.config(), InlineLauncher(), Quiet())
    disturbed = undone(run.path, tmp_path / "disturbed")
    disturbed.environment["REST_SECONDS"] = "0.05"

    outcome = disturb(disturbed, walltime_seconds=20)

    left = EXIT_NOT_FINISHED
    assert outcome.codes == {"SIGKILL": -9, "SIGTERM": left, "walltime": left, "rest": 0}, outcome.said
    print({name: f"{seconds:.1f} s" for name, seconds in outcome.seconds.items()})  # no timed test gates
    for reason in ("SIGTERM", "walltime"):
        assert f"Not finished ({reason})." in outcome.said[reason]
    assert "time is up at" in outcome.said["walltime"]
    again = RunDir.open(disturbed.run_dir)
    assert differences(peaceful, again) == []
    assert {row.ended for row in again.trials("full")} == {"epochs"}
    assert all(row.attempts >= 3 for row in again.trials("full"))
    for row in again.trials("full"):
        epochs = [record.epoch for record in again.epochs("full", row.trial_id)]
        assert epochs == list(range(1, row.epochs_done + 1))
    assert 1.0 <= billed_over_true(disturbed, 1 / (os.cpu_count() or 1)) <= 1.02
    assert not (again.path / LEAVE_NAME).exists()
    shutil.rmtree(tmp_path)
