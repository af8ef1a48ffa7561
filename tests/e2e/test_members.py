"""Members that are killed, told to leave, and out of time: the same bits as in peace, and every joule on the bill."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from members import Quiet, billed_over_true, differences, disturb, selected_run, undone

from wattier.departure import EXIT_NOT_FINISHED
from wattier.launch import InlineLauncher
from wattier.run import train
from wattier.rundir import LEAVE_NAME, RunDir


@pytest.mark.timeout(400)
def test_killed_told_to_leave_and_out_of_time(tmp_path: Path) -> None:
    run = selected_run(tmp_path / "run")
    straight = undone(run.path, tmp_path / "straight", launcher="inline")
    peaceful = RunDir.open(straight.run_dir)
    train(peaceful, peaceful.config(), InlineLauncher(), Quiet())
    disturbed = undone(run.path, tmp_path / "disturbed")
    disturbed.environment["REST_SECONDS"] = "0.1"

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
    assert all(row.attempts >= 2 for row in again.trials("full")), "one may have ended before the last command"
    for row in again.trials("full"):
        epochs = [record.epoch for record in again.epochs("full", row.trial_id)]
        assert epochs == list(range(1, row.epochs_done + 1))
    assert 1.0 <= billed_over_true(disturbed, 1 / (os.cpu_count() or 1)) <= 1.02
    assert not (again.path / LEAVE_NAME).exists()
