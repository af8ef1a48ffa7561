"""Side-by-side timings, in one process, alternating; ratios are what counts. Nothing is gated on them.

usage: make bench
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from wattier_gnn.egnn import EGNNLayer
from wattier_gnn.ingest import ingest
from wattier_gnn.layers import RadialBasis
from wattier_gnn.model import ModelConfig, build_model
from wattier_gnn.sample import SAMPLE_SOURCES, sample_path
from wattier_gnn.store import Store

SEED, REPEATS, HIDDEN_DIM = 0, 15, 128


def main() -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    print(f"python {platform.python_version()}, torch {torch.__version__}, 1 thread, seed {SEED}, {platform.machine()}")
    with tempfile.TemporaryDirectory() as folder:
        store = sample_store(Path(folder) / "store")
        batch = store.batch(np.random.default_rng(SEED).choice(len(store), 32, replace=False))
        print(f"32 structures, {len(batch.numbers)} atoms, {batch.edge_index.shape[1]} edges, hidden {HIDDEN_DIM}")
        edge_linear(batch)
        force_modes(store, batch)


def edge_linear(batch) -> None:
    """The first edge linear on nodes before the gather, against the same weights on concatenated edges."""
    layer = EGNNLayer(HIDDEN_DIM, 16, moves_coordinates=False)
    h = torch.randn(len(batch.numbers), HIDDEN_DIM, requires_grad=True)
    i, j = batch.edge_index
    distance = torch.linalg.vector_norm(batch.positions[j] + batch.edge_shift - batch.positions[i], dim=1)
    basis = RadialBasis(16, 5.0)(distance)
    joined = nn.Linear(2 * HIDDEN_DIM + 16, HIDDEN_DIM)
    with torch.no_grad():
        joined.weight.copy_(torch.cat([layer.receiver.weight, layer.sender.weight, layer.radial.weight], dim=1))
        joined.bias.copy_(layer.receiver.bias)

    def on_nodes() -> Tensor:
        return layer.receiver(h)[i] + layer.sender(h)[j] + layer.radial(basis)

    def on_edges() -> Tensor:
        return joined(torch.cat([h[i], h[j], basis], dim=1))

    torch.testing.assert_close(on_nodes(), on_edges(), rtol=1e-4, atol=1e-4)
    compare("first edge linear", ("on nodes", step(on_nodes)), ("on edges", step(on_edges)))


def force_modes(store: Store, batch) -> None:
    """A training step with direct equivariant forces, against forces by gradient."""
    steps = []
    for mode in ("vector", "conservative"):
        config = ModelConfig(
            store.sources, tuple(store.meta["energy_scale_ev"]), store.meta["mean_neighbors"], 5.0, HIDDEN_DIM,
            forces=mode,
        )  # fmt: skip
        model = build_model(config, SEED).train()

        def loss(model=model) -> Tensor:
            prediction = model(batch)
            return (prediction.energy - batch.energy).abs().mean() + (prediction.forces - batch.forces).abs().mean()

        steps.append((mode, step(loss)))
    compare("training step", *steps)


def step(function: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward and backward."""
    return lambda: function().sum().backward()


def compare(title: str, first: tuple[str, Callable[[], None]], second: tuple[str, Callable[[], None]]) -> None:
    seconds: dict[str, list[float]] = {first[0]: [], second[0]: []}
    for repeat in range(REPEATS + 2):
        for name, function in (first, second):
            started = time.perf_counter()
            function()
            if repeat >= 2:  # the first two warm up
                seconds[name].append(time.perf_counter() - started)
    a, b = (statistics.median(seconds[name]) for name in (first[0], second[0]))
    print(f"{title}: {first[0]} {1e3 * a:.1f} ms, {second[0]} {1e3 * b:.1f} ms, ratio {b / a:.2f}")


def sample_store(folder: Path) -> Store:
    return ingest(
        {source: sample_path(source) for source in SAMPLE_SOURCES}, folder, cutoff_angstrom=5.0,
        max_force_ev_per_angstrom=100.0, on_bad="skip", split={"train": 0.8, "val": 0.1, "test": 0.1}, seed=SEED,
        say=lambda _: None,
    )  # fmt: skip


if __name__ == "__main__":
    main()
