"""Checkpoint files: written whole, read without running what is in them, and not too often."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wattier_gnn import checkpoint, snapshot
from wattier_gnn.snapshot import CheckpointClock, Due
from wattier_gnn.structure import DataError

CPU = torch.device("cpu")


class Malicious:
    """Runs a command where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("state", [{"model": "M"}, "M"])
def test_a_checkpoint_that_runs_code_is_refused(tmp_path: Path, state: Any) -> None:
    path, trace = tmp_path / "last.pt", tmp_path / "trace"
    bad = Malicious(trace)
    torch.save({"model": bad} if isinstance(state, dict) else bad, path)
    with pytest.raises(DataError, match="not a readable checkpoint"):
        checkpoint.load(path)
    assert not trace.exists()


def test_a_checkpoint_must_be_a_dict(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "last.pt")
    with pytest.raises(DataError, match="holds a list"):
        checkpoint.load(tmp_path / "last.pt")


def test_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save_atomically({"epoch": 1}, path)

    def fail(_: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save_atomically({"epoch": 2}, path)
    assert checkpoint.load(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_seconds_between_checkpoints_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of our own: steps of 0.1 s, then of 2 s, then of 0.01 s; asked for every 10 s."""
    now = [0.0]
    monkeypatch.setattr(snapshot.time, "monotonic", lambda: now[0])
    clock = CheckpointClock(10.0, CPU)
    saved = []
    for seconds in [0.1] * 400 + [2.0] * 30 + [0.01] * 6000:
        now[0] += seconds
        if clock.after_step(0.0) is Due.SAVE:
            saved.append(now[0])
            clock.saved()
    gaps = np.diff([0.0, *saved])
    assert gaps.min() >= 10.0
    assert np.median(gaps) < 11.0
    assert len(saved) >= 11
