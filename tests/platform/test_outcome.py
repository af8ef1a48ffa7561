"""Reasons in words, and what a trial may report and leave behind."""

import json
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch

from wattier.outcome import (
    LONGEST_ERROR,
    checked_record,
    read_reason,
    read_result,
    reason_of,
    reason_of_death,
    write_error,
)
from wattier.records import EpochRecord, Fidelity, Proposal, TrialResult
from wattier.trial_output import OUT_OF_MEMORY_NOTE, being_written
from wattier_telemetry import EnergyReport

FIDELITY = Fidelity("only", None, 3, 1)
PROPOSAL = Proposal("only-000", {"n_layers": 2})
RESULT = TrialResult("x", "only-000", {"n_layers": 2}, FIDELITY, "complete", 0.5, {}, 3, 30, 1.0, EnergyReport.empty())
RECORD = EpochRecord(1, 0.5, 0.5, {}, 10, 1.0, 1e-3, 5.0)


def raised(function):
    """The exception that a function really raises."""
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("it raised nothing")


class TestReasons:
    @pytest.mark.parametrize(
        "failure",
        [
            lambda: bytearray(1 << 62),
            lambda: np.empty(1 << 58),
            lambda: torch.empty(1 << 58),
            lambda: exec("raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')"),
        ],
    )
    def test_no_memory_is_called_so(self, failure):
        assert "out of memory" in reason_of(raised(failure)).lower()

    def test_others_are_not(self):
        assert reason_of(ValueError("of memory cells\nthere are  7")) == "ValueError: of memory cells there are 7"
        assert reason_of(KeyError()) == "KeyError"

    def test_the_whole_traceback_is_kept_but_for_what_is_huge(self, tmp_path):
        reason = write_error(tmp_path, raised(lambda: 1 / 0))
        assert reason == read_reason(tmp_path) == "ZeroDivisionError: division by zero"
        assert "Traceback" in (tmp_path / "error.txt").read_text()
        reason = write_error(tmp_path, ValueError("x" * 10_000_000 + "\ud800"))
        assert len(reason) < 600
        assert (tmp_path / "error.txt").stat().st_size < 2 * LONGEST_ERROR
        assert read_reason(tmp_path)

    @pytest.mark.parametrize(
        ("message", "printed", "reason"),
        [
            ("The actor is dead because its node has died.", "", "its node was lost"),
            ("... on how to address the out of memory issue: https", "", "out of memory: Ray's memory monitor"),
            ("End of file.", f"x\n{OUT_OF_MEMORY_NOTE}\n", "out of memory: the kernel killed its process"),
            (
                "End of file.",
                "Fatal Python error: Bus error\n\nThread",
                "its process crashed (Bus error); see output.txt",
            ),
            ("End of file.", "all is well", "its process was killed (SIGKILL), most likely for memory"),
            ("", None, "its process was killed (SIGKILL), most likely for memory"),
        ],
    )
    def test_who_died_without_a_word(self, tmp_path, message, printed, reason):
        if printed is not None:
            (tmp_path / "output.txt").write_text("la " * 100_000 + printed)
        assert reason_of_death(tmp_path / "output.txt", message).startswith(reason)

    def test_a_crash_that_is_written_down_late_is_waited_for(self, tmp_path):
        output = tmp_path / "output.txt"
        output.write_text("epoch 1\n")
        being_written(output).touch()
        late = "sleep 2.5; echo 'Fatal Python error: Segmentation fault' >> output.txt; rm .output.txt.open"
        with subprocess.Popen(["sh", "-c", late], cwd=tmp_path):
            assert reason_of_death(output) == "its process crashed (Segmentation fault); see output.txt"


class TestRecords:
    def test_a_sound_one_passes(self):
        assert checked_record(RECORD) == RECORD
        for loss in (None, float("nan"), float("inf"), 3):
            known = 3 if loss == 3 else None  # a scheduler that sorts losses meets no NaN
            assert checked_record(replace(RECORD, val_loss=loss)).val_loss == known

    @pytest.mark.parametrize(
        "changes",
        [{"epoch": 0}, {"epoch": 1.5}, {"epoch": "1"}, {"epoch": None}, {"epoch": True}, {"epoch": float("nan")},
         {"val_loss": "low"}, {"val_loss": [1]}, {"energy_joules": "5 J"}, {"train_loss": object()}],
    )  # fmt: skip
    def test_others_are_refused(self, changes):
        with pytest.raises(TypeError):
            checked_record(replace(RECORD, **changes))

    @pytest.mark.parametrize("record", [None, 1, {"epoch": 1}, "epoch 1", EpochRecord])
    def test_what_is_no_record_is_refused(self, record):
        with pytest.raises(TypeError, match="must be given an EpochRecord"):
            checked_record(record)


class TestResults:
    def left(self, tmp_path, **changes):
        path = tmp_path / "result.json"
        path.write_text(json.dumps({**RESULT.to_dict(), **changes}))
        return path

    def test_a_sound_one_passes(self, tmp_path):
        assert read_result(self.left(tmp_path), PROPOSAL, FIDELITY) == RESULT

    @pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf"), None])
    def test_complete_without_a_finite_loss_is_diverged(self, tmp_path, loss):
        result = read_result(self.left(tmp_path, val_loss=loss), PROPOSAL, FIDELITY)
        assert (result.status, result.diverged, result.val_loss) == ("pruned", True, None)
        json.dumps(result.to_dict(), allow_nan=False)

    def test_params_are_those_that_were_proposed(self, tmp_path):
        assert read_result(self.left(tmp_path, params={"n_layers": 9}), PROPOSAL, FIDELITY).params == PROPOSAL.params

    @pytest.mark.parametrize(
        "changes",
        [{"status": "best"}, {"status": None}, {"epochs_done": -1}, {"epochs_done": "3"}, {"epochs_done": 10**400},
         {"wall_seconds": None}, {"wall_seconds": float("nan")}, {"val_loss": "0.5"}, {"val_loss": True},
         {"energy": {}}, {"energy": None}, {"fidelity": 1}, {"fidelity": {"stage": "only"}}, {"val_by_source": []},
         {"trial_id": "only-001"}, {"attempts": []}],
    )  # fmt: skip
    def test_others_are_no_results(self, tmp_path, changes):
        with pytest.raises(ValueError, match=r"result\.json"):
            read_result(self.left(tmp_path, **changes), PROPOSAL, FIDELITY)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", "[" * 100_000, "\xff", '{"status": "complete"}'])
    def test_nor_is_what_is_no_record(self, tmp_path, text):
        (tmp_path / "result.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=r"result\.json holds no result"):
            read_result(tmp_path / "result.json", PROPOSAL, FIDELITY)

    def test_nor_is_what_is_huge(self, tmp_path):
        path = self.left(tmp_path)
        with path.open("ab") as file:
            file.truncate(1 << 40)  # sparse
        with pytest.raises(ValueError, match="bytes, but may have"):
            read_result(path, PROPOSAL, FIDELITY)
