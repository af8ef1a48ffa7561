"""The training loop: it learns, it can be stopped and restarted, and it knows when it failed."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wattier_gnn import checkpoint
from wattier_gnn.batch import Batch
from wattier_gnn.loss import LossKind
from wattier_gnn.model import ForceMode, FoundationModel, ModelConfig, build_model, count_parameters
from wattier_gnn.snapshot import Due
from wattier_gnn.splits import TRAIN, VAL
from wattier_gnn.store import Store
from wattier_gnn.structure import DataError
from wattier_gnn.train import EpochReport, TrainConfig, Trainer

CPU = torch.device("cpu")


def model_config(store: Store, forces: ForceMode = "vector") -> ModelConfig:
    return ModelConfig(
        sources=store.sources,
        energy_scale_ev=tuple(store.meta["energy_scale_ev"]),
        mean_neighbors=store.meta["mean_neighbors"],
        cutoff_angstrom=store.meta["cutoff_angstrom"],
        hidden_dim=16,
        n_layers=2,
        n_radial=6,
        head_dim=16,
        forces=forces,
    )


@pytest.fixture
def make(emt_store: Store, tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer on the small store; keywords go to TrainConfig."""

    def build(
        *, store: Store = emt_store, forces: ForceMode = "vector", folder: str = "trial", **config: Any
    ) -> Trainer:
        return Trainer(
            build_model(model_config(store, forces), seed=0),
            store,
            TrainConfig(**{"epochs": 4, "batch_structures": 8, "learning_rate": 3e-3, **config}),
            train_indices=store.indices(TRAIN),
            val_indices=store.indices(VAL),
            folder=tmp_path / folder,
            device=CPU,
        )

    return build


def go_on(_: EpochReport) -> bool:
    return True


def keep(reports: list[EpochReport]) -> Callable[[EpochReport], bool]:
    def listener(report: EpochReport) -> bool:
        reports.append(report)
        return True

    return listener


def weights(trainer: Trainer) -> list[Any]:
    return [*trainer.model.state_dict().values(), *trainer.evaluated().state_dict().values()]


@pytest.mark.parametrize("forces", ["conservative", "vector"])
def test_it_learns(make: Callable[..., Trainer], forces: ForceMode) -> None:
    reports: list[EpochReport] = []
    trainer = make(forces=forces, epochs=40, batch_structures=4, ema_decay=0.8, early_stop_patience=99)
    state = trainer.run(keep(reports))
    assert state.ended == "epochs"
    assert [r.epoch for r in reports] == list(range(1, 41))
    assert reports[-1].train_loss < 0.6 * reports[0].train_loss
    assert reports[-1].val_loss < 0.8 * reports[0].val_loss
    assert set(reports[-1].val_by_source) == {"cluster", "crystal"}
    assert reports[-1].structures_seen == 40 * len(trainer.train_indices)
    assert state.best_val_loss == min(r.val_loss for r in reports)
    assert EpochReport(**reports[-1].to_dict()) == reports[-1]


def test_the_best_weights_are_kept_with_what_is_needed_to_use_them(make: Callable[..., Trainer]) -> None:
    trainer = make(epochs=3)
    state = trainer.run(go_on)
    saved = checkpoint.load(trainer.best_path)
    model = FoundationModel(ModelConfig.from_dict(saved["config"]))
    model.load_state_dict(saved["model"])
    assert model.config == trainer.model.config
    assert count_parameters(model) == count_parameters(trainer.model)
    again = make(epochs=3, folder="other", ema_decay=0.0)
    again.model.load_state_dict(saved["model"])
    assert again.validate()[0] == pytest.approx(state.best_val_loss, rel=1e-6)


@pytest.mark.parametrize("forces", ["conservative", "vector"])
def test_a_restart_changes_nothing(make: Callable[..., Trainer], forces: ForceMode) -> None:
    straight, first = make(forces=forces), make(forces=forces, folder="cut", epochs=2)
    straight.run(go_on)
    first.run(go_on)
    second = make(forces=forces, folder="cut")
    reports: list[EpochReport] = []
    state = second.run(keep(reports))
    assert [r.epoch for r in reports] == [3, 4]
    assert state == straight.state
    for a, b in zip(weights(second), weights(straight), strict=True):
        assert torch.equal(a, b)


def test_a_crash_costs_the_epoch_it_happened_in(make: Callable[..., Trainer]) -> None:
    def crash(report: EpochReport) -> bool:
        if report.epoch == 3:
            raise RuntimeError("killed")
        return True

    straight, crashed = make(), make(folder="cut")
    straight.run(go_on)
    with pytest.raises(RuntimeError, match="killed"):
        crashed.run(crash)
    reports: list[EpochReport] = []
    again = make(folder="cut")
    again.run(keep(reports))
    assert [r.epoch for r in reports] == [3, 4]
    for a, b in zip(weights(again), weights(straight), strict=True):
        assert torch.equal(a, b)


def test_a_finished_training_does_not_run_again(make: Callable[..., Trainer]) -> None:
    make(epochs=1).run(go_on)
    assert make(epochs=1).run(lambda _: pytest.fail("an epoch was trained")).ended == "epochs"


def test_what_the_listener_hangs_on_a_checkpoint_comes_back(make: Callable[..., Trainer]) -> None:
    trainer = make(epochs=1)
    trainer.state.extra["joules"] = 12.5
    trainer.run(go_on)
    assert make(epochs=1).run(go_on).extra == {"joules": 12.5}


def test_what_is_hung_on_before_a_save_is_of_that_moment(emt_store: Store, make: Callable[..., Trainer]) -> None:
    joules = itertools.count(1)
    trainer = make(epochs=3)
    trainer._before_save = lambda state: state.extra.update(joules=next(joules))
    trainer.run(go_on)
    assert checkpoint.load(trainer.last_path)["state"]["extra"] == {"joules": 3}


class Interrupted(Trainer):
    """Saves after every second step, and is cut off by the machine after `steps`."""

    steps = 10**9

    def _new_clock(self) -> Any:
        clock = super()._new_clock()
        clock.after_step = lambda _: (Due.GO_ON, Due.SAVE)[self.state.steps % 2 == 0]  # type: ignore[method-assign]
        return clock

    def _step(self, batch: Batch, n_structures: int) -> Any:
        if self.state.steps == self.steps:
            raise KeyboardInterrupt
        return super()._step(batch, n_structures)


def interrupted(trainer: Trainer, steps: int) -> Trainer:
    """The same trainer, cut off after so many steps."""
    trainer.__class__ = Interrupted
    trainer.steps = steps  # type: ignore[attr-defined]
    return trainer


@pytest.mark.parametrize("steps", [1, 3, 7, 10])
def test_an_interruption_costs_the_steps_since_the_last_checkpoint(make: Callable[..., Trainer], steps: int) -> None:
    """22 structures in steps of 4, atoms bounded too; the report of the epoch is that of all of its steps."""
    options = {"batch_structures": 4, "batch_atoms": 12, "mixture": "uniform", "epochs": 3}
    straight, whole = make(**options), []
    straight.run(keep(whole))
    with pytest.raises(KeyboardInterrupt):
        interrupted(make(folder="cut", **options), steps).run(go_on)
    again, rest = make(folder="cut", **options), []
    again.run(keep(rest))
    for a, b in zip(weights(again), weights(straight), strict=True):
        assert torch.equal(a, b)
    same = {"seconds": 0.0, "data_wait_seconds": 0.0}
    rest, whole = ([dataclasses.replace(r, **same) for r in reports] for reports in (rest, whole))
    assert rest == whole[-len(rest) :]


def test_a_middle_of_another_epoch_is_refused(make: Callable[..., Trainer]) -> None:
    """The n-th step would hold other structures, some of which were seen already."""
    with pytest.raises(KeyboardInterrupt):
        interrupted(make(batch_structures=4), 3).run(go_on)
    with pytest.raises(DataError, match=r"last\.pt: .* within an epoch of other structures or batches.* Remove"):
        make(batch_structures=5).run(go_on)


def test_between_epochs_the_batches_may_change(make: Callable[..., Trainer]) -> None:
    make(batch_structures=4, epochs=1).run(go_on)
    assert make(batch_structures=5, epochs=2).run(go_on).epoch == 2


class ScalarsRead(TorchDispatchMode):
    """Counts the numbers that are taken out of tensors: on a GPU each of them waits for all work before it."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_does_not_wait_for_the_device(make: Callable[..., Trainer], emt_store: Store) -> None:
    trainer = make(warmup_steps=3)
    with ScalarsRead() as read:
        float(torch.ones(()))
        assert read.n == 1
        for _ in range(2):
            trainer._step(emt_store.batch(np.array([0, 1, 25])), 3)
    assert read.n == 1


def test_an_epoch_may_be_shorter_than_the_data(make: Callable[..., Trainer]) -> None:
    reports: list[EpochReport] = []
    make(epochs=2, epoch_structures=8, mixture="uniform", batch_structures=4).run(keep(reports))
    assert [r.structures_seen for r in reports] == [8, 16]


def test_the_average_is_that_of_the_steps_taken(make: Callable[..., Trainer]) -> None:
    """Its decay is min(0.3, (1 + n) / (10 + n)) after n steps; what a step that is not taken left is not in it."""
    trainer = make(ema_decay=0.3)
    average, model, expected = trainer.average, trainer.model, math.nan
    assert average is not None
    for n, value in enumerate([2.0, 5.0, -1.0, 4.0, 8.0]):
        decay = [0.0, 2 / 11, 3 / 12, 0.3, 0.3][n]
        expected = value if n == 0 else decay * expected + (1 - decay) * value
        for weight, taken in ((value, True), (999.0, False)):
            for parameter in model.parameters():
                parameter.data.fill_(weight)
            average.update(model, torch.tensor(taken))
        for parameter in average.model.parameters():
            assert parameter.flatten()[0] == pytest.approx(expected, rel=1e-5)


def test_the_listener_may_stop_it(make: Callable[..., Trainer]) -> None:
    trainer = make()
    state = trainer.run(lambda report: report.epoch < 2)
    assert (state.ended, state.epoch) == ("stopped", 2)
    assert checkpoint.load(trainer.last_path)["state"]["ended"] == "stopped"


def test_early_stop(make: Callable[..., Trainer]) -> None:
    state = make(epochs=50, early_stop_patience=2, min_improvement_ratio=0.5).run(go_on)
    assert state.ended == "early_stop"
    assert state.epoch < 50
    assert state.epochs_without_improvement == 2


def test_the_learning_rate_falls_on_a_plateau(make: Callable[..., Trainer]) -> None:
    reports: list[EpochReport] = []
    trainer = make(epochs=8, learning_rate=1e-7, min_learning_rate=1e-9, plateau_patience=1)
    trainer.run(keep(reports))
    assert reports[-1].learning_rate < reports[0].learning_rate


@pytest.mark.parametrize("forces", ["conservative", "vector"])
def test_a_learning_rate_of_a_million_ends_as_diverged(make: Callable[..., Trainer], forces: ForceMode) -> None:
    trainer = make(forces=forces, learning_rate=1e6, epochs=30)
    state = trainer.run(go_on)
    assert state.ended == "diverged"
    assert math.isfinite(state.best_val_loss) or state.best_val_loss == math.inf
    assert trainer.last_path.exists()


@pytest.mark.parametrize("split", [TRAIN, VAL])
def test_nan_labels_end_as_diverged(make: Callable[..., Trainer], emt_store: Store, split: int) -> None:
    """Whether they are learnt from or judged by; the weights stay as they were."""
    broken = copy.copy(emt_store)
    broken.energy = np.where(broken.split == split, np.nan, broken.energy)
    trainer = make(store=broken)
    before = copy.deepcopy(trainer.model.state_dict())
    assert trainer.run(go_on).ended == "diverged"
    if split == TRAIN:
        for name, tensor in trainer.model.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_one_bad_batch_is_skipped(make: Callable[..., Trainer], emt_store: Store) -> None:
    broken = copy.copy(emt_store)
    broken.energy = broken.energy.copy()
    broken.energy[emt_store.indices(TRAIN)[0]] = np.nan
    trainer = make(store=broken)
    trainer.run(go_on)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_truncated_checkpoint_is_refused(make: Callable[..., Trainer]) -> None:
    trainer = make(epochs=1)
    trainer.run(go_on)
    content = trainer.last_path.read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 1):
        trainer.last_path.write_bytes(content[:size])
        with pytest.raises(DataError, match=r"last\.pt: not a readable checkpoint .* Remove the file"):
            make(epochs=2).run(go_on)


def test_a_checkpoint_of_another_model_is_refused(make: Callable[..., Trainer]) -> None:
    make(epochs=1).run(go_on)
    with pytest.raises(DataError, match=r"last\.pt: .* Remove the file"):
        make(epochs=2, forces="conservative").run(go_on)


@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_it_learns_with_other_losses_and_a_cosine(make: Callable[..., Trainer], loss: LossKind) -> None:
    reports: list[EpochReport] = []
    make(loss=loss, epochs=20, batch_structures=4, schedule="cosine", warmup_epochs=2.0, ema_decay=0.8).run(
        keep(reports)
    )
    assert reports[-1].val_loss < 0.9 * reports[0].val_loss
    assert reports[-1].learning_rate < 1e-3 < max(r.learning_rate for r in reports) <= 3e-3


def test_a_model_config_survives_json_and_refuses_strangers(emt_store: Store) -> None:
    config = model_config(emt_store)
    data = config.to_dict()
    assert ModelConfig.from_dict({**data, "sources": list(data["sources"])}) == config
    with pytest.raises(ValueError, match="unknown keys"):
        ModelConfig.from_dict({**data, "hidden": 3})
    with pytest.raises(ValueError, match="incomplete"):
        ModelConfig.from_dict({"hidden_dim": 3})
