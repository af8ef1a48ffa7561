"""One rank of some spread stores: ``spread_worker.py RANK SIZE FOLDER PORT CUTOFF STORE...``; leaves FOLDER/rank.npz.

Each store is read twice: with its own cutoff, and with the smaller CUTOFF.
"""

from __future__ import annotations

import faulthandler
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from wattier_gnn.batching import StepLimits, edges_to_cut_by
from wattier_gnn.distributed import World, process_group
from wattier_gnn.spread import SpreadStore

SEED, STEPS = 5, 6


def parts_of_steps(n_structures: int, size: int) -> list[list[np.ndarray]]:
    """The indices of each rank in each step: shuffled, of uneven length, with repeats and empty parts."""
    rng = np.random.default_rng(SEED)
    return [[rng.integers(0, n_structures, rng.integers(0, 7)) for _ in range(size)] for _ in range(STEPS)]


def main(rank: int, size: int, folder: Path, port: int, cutoff: float, store_folders: list[Path]) -> None:
    """Every step's batch of this rank from each store, in float64."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    faulthandler.dump_traceback_later(60)  # a rank that hangs says where
    world = World(rank=rank, size=size, port=port)
    with process_group(world, torch.device("cpu")):
        found = {}
        stores = [SpreadStore(path, world, reach) for reach in (None, cutoff) for path in store_folders]
        for number, store in enumerate(stores):
            limits = StepLimits(8, edges=99)
            found[f"{number}.n_edges"] = edges_to_cut_by(store, np.arange(1, 20), limits, world, torch.device("cpu"))
            found[f"{number}.bounds"] = store.bounds
            for step, parts in enumerate(parts_of_steps(len(store), size)):
                batch = store.batch_of(parts, rank)
                found[f"{number}.{step}.part"] = parts[rank]
                found |= {f"{number}.{step}.{f.name}": getattr(batch, f.name).numpy() for f in fields(batch)}
    np.savez(folder / f"{rank}.npz", **found)


if __name__ == "__main__":
    rank, size, folder, port, cutoff, *stores = sys.argv[1:]
    main(int(rank), int(size), Path(folder), int(port), float(cutoff), list(map(Path, stores)))
