"""How long training waits for its data, and what drawing an epoch costs. Nothing is gated on it.

usage: make bench
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench import sample_store

from wattier_gnn.batching import StepLimits, cut_into_steps, split_over_ranks
from wattier_gnn.model import ModelConfig, build_model
from wattier_gnn.sampling import Sampler, choose_subset, source_shares
from wattier_gnn.splits import TRAIN, VAL
from wattier_gnn.store import Store
from wattier_gnn.train import EpochReport, TrainConfig, Trainer

SEED, TURNS, EPOCHS = 0, 2, 3
N_STRUCTURES, N_RANKS, N_SPLIT = 10_000_000, 8, 1000
SHARES = (0.03, 0.03, 0.87, 0.06, 0.01)  # about those of ani1x, qm7x, oc20, oc22, mptrj in the full releases


def main() -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    print(f"python {platform.python_version()}, torch {torch.__version__}, 1 thread, {cores} cores, seed {SEED}")
    with tempfile.TemporaryDirectory() as folder:
        store = sample_store(Path(folder) / "store")
        for hidden_dim, n_layers, n_structures in ((48, 2, 640), (256, 4, 96)):
            waiting(store, Path(folder), hidden_dim, n_layers, n_structures)
    drawing()


def waiting(store: Store, folder: Path, hidden_dim: int, n_layers: int, n_structures: int) -> None:
    """Epochs with batches read ahead and with batches read when asked for, in turn."""
    chosen = choose_subset(store.indices(TRAIN), store.source_index, n_structures, SEED)
    config = ModelConfig(
        store.sources, tuple(store.meta["energy_scale_ev"]), store.meta["mean_neighbors"], 5.0, hidden_dim, n_layers,
        forces="vector",
    )  # fmt: skip
    seconds: dict[int, list[float]] = {2: [], 0: []}
    waits: dict[int, list[float]] = {2: [], 0: []}
    for turn in range(TURNS):
        for prefetched in (2, 0):
            reports: list[EpochReport] = []
            Trainer(
                build_model(config, SEED), store, TrainConfig(epochs=EPOCHS, prefetch_batches=prefetched),
                train_indices=chosen, val_indices=store.indices(VAL)[:8],
                folder=folder / f"{hidden_dim}-{prefetched}-{turn}", device=torch.device("cpu"),
            ).run(lambda report, kept=reports: kept.append(report) is None)  # fmt: skip
            for report in reports[1:]:  # the first warms up
                seconds[prefetched].append(report.seconds)
                waits[prefetched].append(report.data_wait_seconds / report.seconds)
    ahead, asked = (statistics.median(seconds[key]) for key in (2, 0))
    shares = [100 * statistics.median(waits[key]) for key in (2, 0)]
    print(
        f"hidden {hidden_dim}, {n_layers} layers, batches of 32: waits for data {shares[0]:.2f} % of the time read "
        f"ahead, {shares[1]:.2f} % read when asked for; epoch {ahead:.2f} s and {asked:.2f} s, ratio "
        f"{asked / ahead:.2f}"
    )


def drawing() -> None:
    """One epoch of ten million structures: order, steps, and the parts of eight ranks."""
    rng = np.random.default_rng(SEED)
    source_index = rng.choice(len(SHARES), N_STRUCTURES, p=SHARES).astype(np.int16)
    n_atoms = rng.integers(5, 150, N_STRUCTURES)
    n_edges = n_atoms * rng.integers(10, 40, N_STRUCTURES)
    indices = np.arange(N_STRUCTURES)
    counts = np.bincount(source_index, minlength=len(SHARES))
    for mixture, limits in (
        ("natural", StepLimits(512)),
        ("temperature", StepLimits(512)),
        ("temperature", StepLimits(512, 40_000, 900_000)),
    ):
        shares = source_shares(counts, "abcde", mixture, 2.0, None)
        started = time.perf_counter()
        sampler = Sampler(indices, seed=SEED, source_index=source_index, shares=shares)
        order = sampler.epoch(0)
        ordered = time.perf_counter() - started
        steps = list(cut_into_steps(order, limits, n_atoms, n_edges))
        total = time.perf_counter() - started
        print(
            f"{N_STRUCTURES:,} structures, {mixture}, {limits}: order {ordered:.2f} s, with {len(steps):,} steps "
            f"{total:.2f} s"
        )
    started = time.perf_counter()
    parts = [split_over_ranks(step, n_edges[step], N_RANKS) for step in steps[:N_SPLIT]]
    seconds = time.perf_counter() - started
    busiest = [max(work) / np.mean(work) for work in ([n_edges[p].sum() for p in step] for step in parts)]
    print(
        f"a step of about {len(steps[0])} over {N_RANKS} ranks: {1e6 * seconds / N_SPLIT:.0f} us; the busiest has "
        f"{100 * (np.mean(busiest) - 1):.2f} % more edges than the mean, dealt in turn it would have "
        f"{100 * (np.mean([_dealt(n_edges[step]) for step in steps[:N_SPLIT]]) - 1):.2f} %"
    )


def _dealt(work: np.ndarray) -> float:
    sums = [work[rank::N_RANKS].sum() for rank in range(N_RANKS)]
    return float(max(sums) / np.mean(sums))


if __name__ == "__main__":
    main()
