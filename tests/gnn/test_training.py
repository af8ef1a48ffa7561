"""The training loop: it learns, it can be stopped and restarted, and it knows when it failed."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wattier_gnn import checkpoint
from wattier_gnn.batch import Prediction
from wattier_gnn.loss import error_sums, loss_terms, metrics_by_source, weighted_loss
from wattier_gnn.model import ForceMode, FoundationModel, ModelConfig, build_model, count_parameters
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
    return [*trainer.model.state_dict().values(), *trainer.average.state_dict().values()]


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
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


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
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_finished_training_does_not_run_again(make: Callable[..., Trainer]) -> None:
    make(epochs=1).run(go_on)
    assert make(epochs=1).run(lambda _: pytest.fail("an epoch was trained")).ended == "epochs"


def test_what_the_listener_hangs_on_a_checkpoint_comes_back(make: Callable[..., Trainer]) -> None:
    trainer = make(epochs=1)
    trainer.state.extra["joules"] = 12.5
    trainer.run(go_on)
    assert make(epochs=1).run(go_on).extra == {"joules": 12.5}


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


def test_errors_are_summed_by_source_in_closed_form(emt_store: Store) -> None:
    batch = emt_store.batch(np.array([0, 1, 25]))
    prediction = Prediction(batch.energy + torch.tensor([1.0, -3.0, 0.5]), batch.forces + 0.25)
    sums = error_sums(prediction, batch, 3)
    metrics = metrics_by_source(sums, emt_store.sources)
    assert set(metrics) == {"cluster", "crystal"}
    expected = {"energy_mae_ev": 2.0, "energy_mae_ev_per_atom": 0.5, "force_mae_ev_per_angstrom": 0.25}
    assert metrics["cluster"] == pytest.approx(expected, rel=1e-5)
    assert metrics["crystal"]["energy_mae_ev"] == pytest.approx(0.5, rel=1e-5)
    loss = weighted_loss(metrics, {"cluster": 1.0, "crystal": 2.0}, 1.0, 10.0)
    assert loss == pytest.approx(((0.5 + 2.5) / 1 + (0.125 + 2.5) / 2) / 2, rel=1e-5)
    energy, force = loss_terms(prediction, batch, torch.tensor([1.0, 2.0, 1.0]), 1.0, 10.0)
    assert float(energy) == pytest.approx(0.25 + 0.75 + 0.125 / 2, rel=1e-5)
    assert float(force) == pytest.approx(10 * (8 * 0.25 + 4 * 0.25 / 2), rel=1e-5)


def test_forces_that_are_unknown_do_not_count(emt_store: Store) -> None:
    batch = emt_store.batch(np.array([0, 1]))
    batch = dataclasses.replace(batch, force_mask=torch.zeros_like(batch.force_mask))
    prediction = Prediction(batch.energy, batch.forces + 7.0)
    assert float(loss_terms(prediction, batch, torch.ones(3), 1.0, 1.0)[1]) == 0.0
    metrics = metrics_by_source(error_sums(prediction, batch, 3), emt_store.sources)
    assert math.isnan(metrics["cluster"]["force_mae_ev_per_angstrom"])
    assert weighted_loss(metrics, {"cluster": 1.0}, 1.0, 1.0) == 0.0


def test_a_model_config_survives_json_and_refuses_strangers(emt_store: Store) -> None:
    config = model_config(emt_store)
    data = config.to_dict()
    assert ModelConfig.from_dict({**data, "sources": list(data["sources"])}) == config
    with pytest.raises(ValueError, match="unknown keys"):
        ModelConfig.from_dict({**data, "hidden": 3})
    with pytest.raises(ValueError, match="incomplete"):
        ModelConfig.from_dict({"hidden_dim": 3})
