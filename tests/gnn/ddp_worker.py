"""One rank of some small trainings: ``ddp_worker.py RANK SIZE STORE FOLDER PORT PORT PORT``; leaves FOLDER/rank.json.

A process of its own and not ``torch.multiprocessing.spawn``: pytest's import mode hides test modules from spawned
children.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wattier_gnn.distributed import World, process_group
from wattier_gnn.model import ForceMode, ModelConfig, build_model
from wattier_gnn.splits import TRAIN, VAL
from wattier_gnn.store import Store
from wattier_gnn.train import EpochReport, TrainConfig, Trainer

MODES: tuple[ForceMode, ...] = ("conservative", "vector")
CPU = torch.device("cpu")


class RecordingTrainer(Trainer):
    """Keeps the loss of every step, and which sources were in it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []
        self.parts: list[list[int]] = []

    def _step(self, indices: Any) -> float:
        self.losses.append(super()._step(indices))
        self.parts.append([int(k) for k in indices])
        return self.losses[-1]


def make_trainer(store: Store, folder: Path, world: World, forces: ForceMode, epochs: int) -> RecordingTrainer:
    """13 training structures in steps of 4, 4, 4 and 1; both sources in validation."""
    config = ModelConfig(
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
    train, val = store.indices(TRAIN), store.indices(VAL)
    return RecordingTrainer(
        build_model(config, seed=0),
        store,
        TrainConfig(epochs=epochs, batch_structures=4, learning_rate=1e-3),
        train_indices=np.concatenate([train[:10], train[-3:]]),
        val_indices=np.concatenate([val[:1], val[-2:]]),
        folder=folder,
        device=CPU,
        world=world,
    )


def train_once(store: Store, folder: Path, world: World, forces: ForceMode) -> dict[str, Any]:
    """Three epochs: losses of all steps and of validation, the parts of this rank, a hash of the weights."""
    reports: list[float] = []

    def listener(report: EpochReport) -> bool:
        reports.append(report.val_loss)
        return True

    with process_group(world, CPU):
        trainer = make_trainer(store, folder / forces, world, forces, epochs=3)
        state = trainer.run(listener)
    return {
        "losses": trainer.losses,
        "parts": trainer.parts,
        "val": reports,
        "best_val": state.best_val_loss,
        "ended": state.ended,
        "weights": float(sum(p.detach().double().abs().sum() for p in trainer.model.parameters())),
    }


def train_until_the_listener_fails(store: Store, folder: Path, world: World) -> dict[str, Any]:
    """Rank 0's listener raises after the second epoch."""

    def listener(report: EpochReport) -> bool:
        if report.epoch == 2:
            raise RuntimeError("the listener failed")
        return True

    with process_group(world, CPU):
        trainer = make_trainer(store, folder / "failing", world, "vector", epochs=50)
        try:
            state = trainer.run(listener)
        except RuntimeError as error:
            return {"error": str(error), "steps": len(trainer.losses)}
    return {"ended": state.ended, "epoch": state.epoch, "steps": len(trainer.losses)}


def main(rank: int, size: int, store_folder: Path, folder: Path, ports: list[int]) -> None:
    """Everything one rank has to do, each training in a process group of its own."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(60)  # a rank that hangs says where
    store = Store(store_folder)
    worlds = [World(rank=rank, size=size, port=port) for port in ports]
    result: dict[str, Any] = {
        mode: train_once(store, folder, world, mode) for mode, world in zip(MODES, worlds, strict=False)
    }
    result["failing"] = train_until_the_listener_fails(store, folder, worlds[2])
    (folder / f"{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), [int(p) for p in sys.argv[5:]])
