"""The scheduler for anybody's Tune: in a real Tuner, and against what people report."""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).with_name("somebody_elses_tuner.py")


@pytest.fixture(scope="module")
def hidden():
    """Ray 2.60 dies wherever amdsmi is installed and finds no library of AMD's: a folder that hides it."""
    folder = Path(tempfile.mkdtemp(prefix="ws-", dir="/tmp"))
    (folder / "amdsmi.py").write_text("raise ImportError")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def halving(hidden):
    """The class, imported where Ray can be imported."""
    sys.path.insert(0, str(hidden))
    try:
        from wattier.ray_schedulers import EnergyAwareHalving
    finally:
        sys.path.remove(str(hidden))
    return EnergyAwareHalving


class Listening:
    """A judge that writes down what it is asked."""

    def __init__(self, answer=True):
        self.answer, self.asked = answer, []

    def go_on(self, trial_id, record):
        self.asked.append((trial_id, record.epoch, record.val_loss, record.energy_joules))
        return self.answer


def decide(scheduler, **result):
    return scheduler.on_trial_result(None, SimpleNamespace(trial_id="t"), result)


@pytest.mark.timeout(180)
def test_in_a_tuner_of_somebody_else(hidden, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "PYTHONPATH": str(hidden), "HOME": str(tmp_path), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, hidden / "r"], env=environment, capture_output=True, text=True, timeout=170,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["last"] == {"0": 6, "1": 2, "2": 6, "3": 6, "4": 2, "5": 4, "6": 6}
    assert said["stopped"] == {
        "1": "given up after epoch 2", "4": "given up after epoch 2", "5": "mae is not finite in epoch 4"
    }  # fmt: skip
    assert said["iterations"]["6"] == 4, "Tune counts the retried trial from 1 again"
    of_retried = [(epoch, joules) for index, epoch, _, joules in said["asked"] if index == 6]
    assert of_retried == [(epoch, 8.0 * epoch) for epoch in range(1, 7)], "the judge hears epochs, none twice"


def test_names_and_kinds_of_numbers_are_the_users(halving):
    judge = Listening()
    scheduler = halving(judge, loss="mae", energy="total_j", epoch="pass")
    assert decide(scheduler, **{"pass": np.int64(3), "mae": torch.tensor(0.5), "total_j": np.float32(8)}) == "CONTINUE"
    assert judge.asked == [("t", 3, 0.5, 8.0)]


def test_the_judge_decides(halving):
    scheduler = halving(Listening(answer=False))
    assert decide(scheduler, epoch=3, val_loss=0.5, energy_joules=8.0) == "STOP"
    assert scheduler.stopped == {"t": "given up after epoch 3"}
    assert "1 trials stopped early" in scheduler.debug_string()


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None, "low", 10**400])
def test_a_loss_that_is_no_number_ends_the_trial(halving, loss):
    judge = Listening()
    assert decide(halving(judge), epoch=3, val_loss=loss, energy_joules=8.0) == "STOP"
    assert judge.asked == [("t", 3, None, None)]


@pytest.mark.parametrize("missing", ["epoch", "val_loss", "energy_joules"])
def test_what_is_not_reported_is_said_once_and_stops_nobody(halving, missing, caplog):
    judge = Listening()
    scheduler = halving(judge)
    result = {"epoch": 2, "val_loss": 0.5, "energy_joules": 8.0, "training_iteration": 1}
    del result[missing]
    with caplog.at_level(logging.WARNING):
        assert [decide(scheduler, **result) for _ in range(3)] == ["CONTINUE"] * 3
    assert [record.getMessage().count(repr(missing)) for record in caplog.records] == [1]
    assert judge.asked == ([("t", 2, 0.5, None)] * 3 if missing == "energy_joules" else [])


@pytest.mark.parametrize("epoch", [0, -1, float("nan"), "one"])
def test_an_epoch_that_is_none_is_not_judged(halving, epoch, caplog):
    judge = Listening(answer=False)
    assert decide(halving(judge), epoch=epoch, val_loss=0.5, energy_joules=8.0) == "CONTINUE"
    assert not judge.asked


def test_rungs_are_filled_again_by_replay(halving):
    judge = Listening()
    rows = [{"epoch": 1, "val_loss": 0.5, "energy_joules": 1.0}, {"epoch": 2, "val_loss": 0.4, "energy_joules": 2.0}]
    halving(judge).replay("old", rows)
    assert judge.asked == [("old", 1, 0.5, 1.0), ("old", 2, 0.4, 2.0)]
