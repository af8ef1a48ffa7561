"""The physical size of a trial: products, memory traffic, operators and structures of one set of hyper-parameters.

Arithmetic on the config and on a few means of the store; it knows nothing of a device's speed, nor of joules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wattier.config import ModelSection, RunConfig, TrainingSection
from wattier.records import Fidelity, Params
from wattier_gnn.model import ModelConfig
from wattier_gnn.sampling import choose_subset, source_shares
from wattier_gnn.splits import TRAIN, VAL
from wattier_gnn.store import Store
from wattier_gnn.workload import FLOAT_BYTES, model_work

# Reads and writes of a parameter in a step: AdamW's 7, clipping, zeroing and adding up the gradient, the average.
OPTIMIZER_PASSES = 15
OPTIMIZER_OPERATIONS_A_LAYER, STEP_OPERATIONS = 25, 100  # averaging weights, one tensor at a time; loss and clipping
CHECKPOINT_OVERHEAD_BYTES = 50_000  # names, states of generators, counters


_model_work = lru_cache(maxsize=4096)(model_work)  # most hyper-parameters have no part in it


class Workload(NamedTuple):
    """The work of a whole trial; sums over all ranks, unless said otherwise.

    Attributes:
        flops: of products, in training and validation.
        bytes_moved: read and written by operators, the optimiser's among them.
        operations: operators that each rank starts, one after the other.
        structures: read and put into batches, in training and validation.
        steps: of the optimiser; every rank takes part in each.
        epochs: of training.
        parameters: of the model.
        ranks: processes that share the work.
        starts: of them, those that are started for this trial alone.
    """

    flops: float
    bytes_moved: float
    operations: float
    structures: float
    steps: float
    epochs: float
    parameters: int
    ranks: int
    starts: int = 0


class _Split(NamedTuple):
    """Structures of one split, by source: how many [S], mean atoms [S], mean edges [S]."""

    counts: NDArray[np.float64]
    atoms: NDArray[np.float64]
    edges: NDArray[np.float64]

    def means(self, shares: NDArray[np.float64] | None) -> tuple[float, float]:
        """Atoms and edges of a structure, drawn by shares of the sources; None = as they are."""
        weights = self.counts / max(1.0, self.counts.sum()) if shares is None else shares
        return float(weights @ self.atoms), float(weights @ self.edges)


def workload_of(config: RunConfig, store: Store) -> Callable[[Params, Fidelity], Workload]:
    """What computes the workload of a run's trials: some 20 microseconds each.

    The structures that a fidelity trains on are looked at once, when it is first asked for.
    """
    model = config.model.model_dump() | {
        "sources": store.sources,
        "energy_scale_ev": tuple(store.meta["energy_scale_ev"]),
        "mean_neighbors": store.meta["mean_neighbors"],
        "cutoff_angstrom": store.meta["cutoff_angstrom"],
    }
    training = config.training.model_dump()
    model_keys, training_keys = frozenset(ModelSection.model_fields), frozenset(TrainingSection.model_fields)
    val = _split(store, store.indices(VAL))

    @lru_cache(maxsize=64)
    def train(structures: int | None) -> _Split:
        return _split(store, choose_subset(store.indices(TRAIN), store.source_index, structures, config.seed))

    def workload(params: Params, fidelity: Fidelity) -> Workload:
        chosen = model | {k: v for k, v in params.items() if k in model_keys}
        how = training | {k: v for k, v in params.items() if k in training_keys}
        work = _workload(ModelConfig(**chosen), how, train(fidelity.structures), val, fidelity, store.sources)
        # Ray keeps its actors from one trial to the next; inline, further ranks are children of this trial.
        return work._replace(starts=fidelity.ranks - 1) if config.launcher == "inline" else work

    return workload


def disk_bytes(parameters: int, *, averaged: bool) -> int:
    """What a trial leaves on the disk: weights in ``best.pt``; weights, average and moments in ``last.pt``.

    averaged: an average of the weights is kept (`ema_decay` above 0). The log and the journals, some kilobytes, are
    not in.
    """
    copies = 1 + 1 + 2 + int(averaged)
    return copies * FLOAT_BYTES * parameters + 2 * CHECKPOINT_OVERHEAD_BYTES


def _workload(  # noqa: PLR0913, PLR0917
    model: ModelConfig, how: dict[str, Any], train: _Split, val: _Split, fidelity: Fidelity, sources: tuple[str, ...]
) -> Workload:
    shares = source_shares(
        train.counts, sources, how["mixture"], how["mixture_temperature"], how["source_weights"]
    )  # fmt: skip
    drawn, validated = float(how["epoch_structures"] or train.counts.sum()), float(val.counts.sum())
    atoms, edges = train.means(shares)
    val_atoms, val_edges = val.means(None)
    steps, val_steps = _steps(how, drawn, atoms, edges), _steps(how, validated, val_atoms, val_edges)
    in_step = drawn * edges / max(steps, 1.0) / fidelity.ranks if model.edge_chunk else 0.0
    work = _model_work(model, in_step)
    optimiser_bytes = OPTIMIZER_PASSES * FLOAT_BYTES * work.parameters * fidelity.ranks
    step_operations = work.training_operations + OPTIMIZER_OPERATIONS_A_LAYER * model.n_layers + STEP_OPERATIONS
    flops = drawn * work.training_flops.of(atoms, edges) + validated * work.inference_flops.of(val_atoms, val_edges)
    moved = drawn * work.training_bytes.of(atoms, edges) + validated * work.inference_bytes.of(val_atoms, val_edges)
    return Workload(
        flops=fidelity.epochs * flops,
        bytes_moved=fidelity.epochs * (moved + steps * optimiser_bytes),
        operations=fidelity.epochs * (steps * step_operations + val_steps * work.inference_operations),
        structures=fidelity.epochs * (drawn + validated),
        steps=fidelity.epochs * steps,
        epochs=fidelity.epochs,
        parameters=work.parameters,
        ranks=fidelity.ranks,
    )


def _steps(how: dict[str, Any], structures: float, atoms: float, edges: float) -> float:
    """Steps of an epoch, whose structures are taken for alike."""
    if structures == 0:
        return 0.0
    fit = float(how["batch_structures"])
    if how["batch_atoms"] is not None:
        fit = min(fit, how["batch_atoms"] / max(atoms, 1e-9))
    if how["batch_edges"] is not None:
        fit = min(fit, how["batch_edges"] / max(edges, 1e-9))
    return math.ceil(structures / max(1.0, fit))


def _split(store: Store, indices: Any) -> _Split:
    source = np.asarray(store.source_index)[indices]
    counts = np.bincount(source, minlength=len(store.sources)).astype(np.float64)
    some = np.maximum(counts, 1.0)
    atoms = np.bincount(source, weights=np.asarray(store.n_atoms)[indices], minlength=len(counts)) / some
    edges = np.bincount(source, weights=np.asarray(store.n_edges)[indices], minlength=len(counts)) / some
    return _Split(counts, atoms, edges)
