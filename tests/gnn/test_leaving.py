"""A training that is asked to leave saves within the epoch, and another one ends in the same bits."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from wattier_gnn import checkpoint, snapshot
from wattier_gnn.model import ModelConfig, build_model
from wattier_gnn.snapshot import SLOWEST_SAVE, CheckpointClock, Due
from wattier_gnn.splits import TRAIN, VAL
from wattier_gnn.store import Store
from wattier_gnn.train import EpochReport, TrainConfig, Trainer

CPU = torch.device("cpu")
EPOCHS = 3


@pytest.fixture
def make(emt_store: Store, tmp_path: Path) -> Callable[..., Trainer]:
    config = ModelConfig(
        emt_store.sources, tuple(emt_store.meta["energy_scale_ev"]), emt_store.meta["mean_neighbors"],
        emt_store.meta["cutoff_angstrom"], hidden_dim=8, n_layers=1, n_radial=4, head_dim=8, forces="vector",
    )  # fmt: skip

    def build(folder: str, leaves: Any = None, **changes: Any) -> Trainer:
        return Trainer(
            build_model(config, 0), emt_store, TrainConfig(epochs=EPOCHS, batch_structures=4, **changes),
            train_indices=emt_store.indices(TRAIN), val_indices=emt_store.indices(VAL), folder=tmp_path / folder,
            device=CPU, leaves=leaves,
        )  # fmt: skip

    return build


def keep(reports: list[EpochReport]) -> Callable[[EpochReport], bool]:
    def listen(report: EpochReport) -> bool:
        reports.append(dataclasses.replace(report, seconds=0.0, data_wait_seconds=0.0))
        return True

    return listen


@pytest.mark.parametrize("patience", [4, 5, 7, 1000])
def test_left_again_and_again_it_ends_in_the_same_bits(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, patience: int
) -> None:
    """Asked after every step, of training and of validation, and before every epoch; each attempt answers so often."""
    straight: list[EpochReport] = []
    make("straight").run(keep(straight))
    monkeypatch.setattr(snapshot, "LONGEST_UNASKED_SECONDS", 0.0)
    reports: list[EpochReport] = []
    ends = []
    for _ in range(100):
        asked = itertools.count(1)
        trainer = make("left", lambda _, asked=asked: next(asked) > patience)
        state = trainer.run(keep(reports))
        ends.append(state.ended)
        if state.ended != "left":
            break
        assert checkpoint.load(trainer.last_path)["state"]["ended"] == "", "what is left goes on"
    assert state.ended == "epochs"
    assert (len(ends) > 1) == (patience < 1000)
    assert reports == straight, "each epoch is reported once, whatever it was left in"
    best = [checkpoint.load(trainer.folder.with_name(name) / "best.pt")["model"] for name in ("straight", "left")]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])


def test_a_training_without_time_for_a_step_leaves_nothing_behind(make: Callable[..., Trainer]) -> None:
    trainer = make("none", lambda _: True)
    assert trainer.run(keep([])).ended == "left"
    assert not trainer.last_path.exists()
    assert trainer.state.steps == 0


def test_it_is_asked_every_second_and_told_how_long_a_save_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of our own: steps of 0.01 s, 0.3 s, 4 s; a save takes 2 s; the last moment to leave is at 100 s."""
    now, asked = [0.0], []
    monkeypatch.setattr(snapshot.time, "monotonic", lambda: now[0])

    def leaves(seconds: float) -> bool:
        asked.append(now[0])
        assert seconds >= SLOWEST_SAVE * 2.0
        return now[0] + seconds >= 100.0

    clock = CheckpointClock(1e9, CPU, leaves)
    for step in [0.01] * 2000 + [0.3] * 100 + [4.0] * 30:
        now[0] += step
        if clock.after_step(2.0) is Due.LEAVE:
            break
    gaps = [b - a for a, b in itertools.pairwise(asked)]
    assert max(gap for gap, at in zip(gaps, asked, strict=False) if at < 15) <= 1.5
    assert now[0] + 2.0 < 100.0, "the checkpoint is written in time"
    assert now[0] > 70.0, "and not much too early"


def test_small_improvements_add_up_to_a_significant_one(make: Callable[..., Trainer]) -> None:
    """A loss that falls by 0.06 % an epoch improves significantly (0.1 %) every other one; one that stands does not."""
    trainer = make("falling", early_stop_patience=5, min_improvement_ratio=1e-3)
    trainer.config = dataclasses.replace(trainer.config, epochs=1000)
    for epoch in range(1, 60):
        trainer.state.epoch = epoch
        trainer._note(0.0, 0.9994**epoch)
        assert not trainer.state.ended
        assert trainer.state.epochs_without_improvement <= 1
    level = 0.9994**59
    for epoch in range(60, 66):
        trainer.state.epoch = epoch
        trainer._note(0.0, level * (1 - 1e-5 * (epoch - 59)))
    assert trainer.state.ended == "early_stop"
    assert trainer.state.best_epoch == epoch, "the best epoch is the best one, significant or not"
