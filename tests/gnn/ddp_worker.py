"""One rank of some small trainings: ``ddp_worker.py JOB RANK SIZE STORE FOLDER PORT...``; leaves FOLDER/rank.json.

A process of its own and not ``torch.multiprocessing.spawn``: pytest's import mode hides test modules from spawned
children.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wattier_gnn.batch import Batch
from wattier_gnn.distributed import World, all_sum, process_group
from wattier_gnn.model import ForceMode, ModelConfig, build_model
from wattier_gnn.sharding import Sharding
from wattier_gnn.snapshot import Due
from wattier_gnn.splits import TRAIN, VAL
from wattier_gnn.store import Store
from wattier_gnn.structure import DataError
from wattier_gnn.train import EpochReport, TrainConfig, Trainer

MODES: tuple[ForceMode, ...] = ("conservative", "vector")
CPU = torch.device("cpu")
N_PORTS = 9
STEPS_AN_EPOCH, STEPS_BETWEEN_CHECKPOINTS = 4, 3


class RecordingTrainer(Trainer):
    """Keeps the loss of every step and this rank's part of it; may save by steps and die after one."""

    save_every_steps: int | None = None
    die_after_steps: int | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []
        self.parts: list[list[int]] = []
        self._is_training = False

    def _new_clock(self) -> Any:
        return EveryNthStep(self.save_every_steps) if self.save_every_steps else super()._new_clock()

    def _train_epoch(self, started: float) -> float:
        self._is_training = True
        try:
            return super()._train_epoch(started)
        finally:
            self._is_training = False

    def _split(self, steps: Any) -> Any:
        is_training = self._is_training
        for parts in super()._split(steps):
            if is_training:
                self.parts.append([int(k) for k in parts[self.world.rank]])
            yield parts

    def _step(self, batch: Batch, n_structures: int) -> Tensor:
        result = super()._step(batch, n_structures)
        torch.rand(1)  # a network with dropout would draw too
        self.losses.append(float(result[0]))
        if len(self.losses) == self.die_after_steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


class EveryNthStep:
    """A checkpoint clock that counts steps."""

    def __init__(self, n: int) -> None:
        self._n, self._steps = n, 0

    def after_step(self, save_seconds: float) -> Due:
        self._steps += 1
        return Due.SAVE if self._steps % self._n == 0 else Due.GO_ON

    def saved(self) -> None:
        """Nothing: steps are counted, whatever is saved between."""


class CollectiveStore(Store):
    """A store that can be read only by all ranks together, as one that is spread over them."""

    is_collective = True
    reads = 0

    def batch_of(self, parts: Sequence[Any], rank: int) -> Batch:
        self.reads += 1
        present = int(all_sum(torch.tensor(len(parts[rank]))))
        if present != sum(len(part) for part in parts):
            raise RuntimeError(f"the ranks are not at the same step: together they have {present} structures")
        return self.batch(parts[rank])


def make_trainer(store: Store, folder: Path, world: World, forces: ForceMode, **config: Any) -> RecordingTrainer:
    """13 training structures in steps of 4, 4, 4 and 1; both sources in validation; heads of every kind."""
    model = ModelConfig(
        sources=store.sources,
        energy_scale_ev=tuple(store.meta["energy_scale_ev"]),
        mean_neighbors=store.meta["mean_neighbors"],
        cutoff_angstrom=store.meta["cutoff_angstrom"],
        hidden_dim=16,
        n_layers=2,
        n_radial=6,
        head_dim=16,
        forces=forces,
        energy_variance=True,
    )
    train, val = store.indices(TRAIN), store.indices(VAL)
    return RecordingTrainer(
        build_model(model, seed=0),
        store,
        TrainConfig(**{"batch_structures": STEPS_AN_EPOCH, "learning_rate": 1e-3, "epochs": 3, **config}),
        train_indices=np.concatenate([train[:10], train[-3:]]),
        val_indices=np.concatenate([val[:1], val[-2:]]),
        folder=folder,
        device=CPU,
        world=world,
    )


def train_once(store: Store, folder: Path, world: World, forces: ForceMode, **config: Any) -> dict[str, Any]:
    """Three epochs: losses of all steps and of validation, the parts of this rank, a hash of the weights."""
    reports: list[float] = []

    def listener(report: EpochReport) -> bool:
        reports.append(report.val_loss)
        return True

    with process_group(world, CPU):
        trainer = make_trainer(store, folder, world, forces, **config)
        state = trainer.run(listener)
        absolute = sum(p.detach().double().abs().sum() for p in trainer.model.parameters())
        weights = float(absolute.full_tensor() if hasattr(absolute, "full_tensor") else absolute)
    return {
        "losses": trainer.losses,
        "parts": trainer.parts,
        "val": reports,
        "best_val": state.best_val_loss,
        "ended": state.ended,
        "weights": weights,
    }


def train_until_the_listener_fails(store: Store, folder: Path, world: World) -> dict[str, Any]:
    """Rank 0's listener raises after the second epoch."""

    def listener(report: EpochReport) -> bool:
        if report.epoch == 2:
            raise RuntimeError("the listener failed")
        return True

    with process_group(world, CPU):
        trainer = make_trainer(store, folder, world, "vector", epochs=50)
        try:
            state = trainer.run(listener)
        except RuntimeError as error:
            return {"error": str(error), "steps": len(trainer.losses)}
    return {"ended": state.ended, "epoch": state.epoch, "steps": len(trainer.losses)}


def train_with_checkpoints(
    store: Store, folder: Path, world: World, *, seed: int = 7, die_after_steps: int | None = None
) -> dict[str, Any]:
    """A training that saves within epochs, with everything on that has a state; it may be killed in one."""
    torch.manual_seed(seed)
    reports: list[dict[str, Any]] = []

    def listener(report: EpochReport) -> bool:
        reports.append({**asdict(report), "seconds": 0.0, "data_wait_seconds": 0.0})
        return True

    with process_group(world, CPU):
        trainer = make_trainer(
            store, folder, world, "vector", epochs=4, schedule="plateau", warmup_steps=6, mixture="uniform",
            loss="huber", plateau_patience=1, min_improvement_ratio=0.9,
        )  # fmt: skip
        trainer.save_every_steps, trainer.die_after_steps = STEPS_BETWEEN_CHECKPOINTS, die_after_steps
        trainer.run(listener)
    return {"reports": reports, "steps": len(trainer.losses)}


def refusal(store: Store, folder: Path, world: World) -> str:
    """What a spread model with forces by gradient is told."""
    with process_group(world, CPU):
        try:
            make_trainer(store, folder, world, "conservative", sharding="fsdp")
        except DataError as error:
            return str(error)
    return ""


def undisturbed(store_folder: Path, folder: Path, worlds: Sequence[World]) -> dict[str, Any]:
    """Every training that nobody kills, each in a process group of its own."""
    store = Store(store_folder)
    result: dict[str, Any] = {
        mode: train_once(store, folder / mode, world, mode) for mode, world in zip(MODES, worlds, strict=False)
    }
    result["failing"] = train_until_the_listener_fails(store, folder / "failing", worlds[2])
    together = CollectiveStore(store_folder)
    result["spread"] = train_once(together, folder / "spread", worlds[3], "vector", sharding="fsdp")
    result["spread"]["reads"] = together.reads
    result["straight"] = train_with_checkpoints(store, folder / "straight", worlds[4])
    shardings: tuple[Sharding, ...] = ("fsdp", "none", "fsdp")
    result["handed over"] = [
        train_once(store, folder / "handed", world, "vector", sharding=sharding, epochs=epochs)
        for epochs, (sharding, world) in enumerate(zip(shardings, worlds[5:8], strict=True), start=1)
    ]
    if worlds[0].size > 1:
        result["refusal"] = refusal(store, folder / "refused", worlds[8])
    return result


def main(job: str, rank: int, size: int, store_folder: Path, folder: Path, ports: list[int]) -> None:
    """``undisturbed``, ``killed-N`` after N steps, or ``resumed``."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(60)  # a rank that hangs says where
    worlds = [World(rank=rank, size=size, port=port) for port in ports]
    if job == "undisturbed":
        result = undisturbed(store_folder, folder, worlds)
    elif job == "resumed":  # from another seed: what is drawn now must follow from the checkpoint
        result = train_with_checkpoints(Store(store_folder), folder / "killed", worlds[0], seed=8)
    else:
        steps = int(job.removeprefix("killed-"))
        result = train_with_checkpoints(Store(store_folder), folder / "killed", worlds[0], die_after_steps=steps)
    (folder / f"{rank}-{job}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    job, rank, size, store, folder, *ports = sys.argv[1:]
    main(job, int(rank), int(size), Path(store), Path(folder), [int(port) for port in ports])
