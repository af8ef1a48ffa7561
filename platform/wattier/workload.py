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


_Splits = Callable[[int | None], "_Split"]
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


class Typical(NamedTuple):
    """What structures of a source are like, within TYPICAL_CUTOFF_ANGSTROM; structures NaN = as many as one has."""

    atoms: float
    neighbors: float
    is_periodic: bool
    structures: float = math.nan


# Published means; of the sample, what it holds of each source.
TYPICAL = {
    "ani1x": Typical(15, 14, False), "qm7x": Typical(17, 16, False), "oc20": Typical(73, 30, True),
    "oc22": Typical(80, 36, True), "mptrj": Typical(31, 31, True), "extxyz": Typical(30, 30, True),
    "ase_db": Typical(30, 30, True), "sample": Typical(10, 20, True, 500),
}  # fmt: skip
TYPICAL_CUTOFF_ANGSTROM = 5.0


class _Split(NamedTuple):
    """Structures of one split, by source: how many [S], mean atoms [S], mean edges [S]."""

    counts: NDArray[np.float64]
    atoms: NDArray[np.float64]
    edges: NDArray[np.float64]

    def means(self, shares: NDArray[np.float64] | None) -> tuple[float, float]:
        """Atoms and edges of a structure, drawn by shares of the sources; None = as they are."""
        weights = self.counts / max(1.0, self.counts.sum()) if shares is None else shares
        return float(weights @ self.atoms), float(weights @ self.edges)


def workload_of(config: RunConfig, store: Store | None) -> Callable[[Params, Fidelity], Workload]:
    """What computes the workload of a run's trials: some 20 microseconds each.

    The structures that a fidelity trains on are looked at once, when it is first asked for. Where there is no store yet
    structures are guessed from what the sources are known to hold; NaN where a fidelity takes all of them and nobody
    knows how many.
    """
    train, val = _guessed(config) if store is None else _looked_up(config, store)
    sources: tuple[str, ...] = tuple(config.data.sources) if store is None else store.sources
    model = config.model.model_dump() | {
        "sources": sources, "energy_scale_ev": (1.0,) * len(sources), "mean_neighbors": 1.0,  # of no effect on the work
    }  # fmt: skip
    training = config.training.model_dump()
    model_keys, training_keys = frozenset(ModelSection.model_fields), frozenset(TrainingSection.model_fields)

    def workload(params: Params, fidelity: Fidelity) -> Workload:
        chosen = model | {k: v for k, v in params.items() if k in model_keys}
        how = training | {k: v for k, v in params.items() if k in training_keys}
        n = fidelity.structures
        work = _workload(ModelConfig(**chosen), how, train(n), val(n), fidelity, sources)
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
    if structures == 0 or math.isnan(structures):
        return structures
    fit = float(how["batch_structures"])
    if how["batch_atoms"] is not None:
        fit = min(fit, how["batch_atoms"] / max(atoms, 1e-9))
    if how["batch_edges"] is not None:
        fit = min(fit, how["batch_edges"] / max(edges, 1e-9))
    return math.ceil(structures / max(1.0, fit))


def _looked_up(config: RunConfig, store: Store) -> tuple[_Splits, _Splits]:
    """Training and validation structures of a store, by the number that a fidelity trains on."""
    validation = _split(store, store.indices(VAL))

    @lru_cache(maxsize=64)
    def train(structures: int | None) -> _Split:
        return _split(store, choose_subset(store.indices(TRAIN), store.source_index, structures, config.seed))

    return train, lambda _: validation


def _guessed(config: RunConfig) -> tuple[_Splits, _Splits]:
    """The same, of what the sources will hold: structures of typical size, as many of each source."""
    split, names = config.data.split, config.data.sources
    typical = [TYPICAL["sample" if path == "sample" else name] for name, path in names.items()]
    reach = (config.data.cutoff_angstrom / TYPICAL_CUTOFF_ANGSTROM) ** 3
    atoms = np.array([t.atoms for t in typical])
    neighbors = [t.neighbors * reach if t.is_periodic else min(t.neighbors * reach, t.atoms - 1) for t in typical]
    there = np.array([t.structures for t in typical])

    def train(structures: int | None) -> _Split:
        asked = math.inf if structures is None else structures / max(1, len(typical))
        counts = np.where(np.isnan(there) & np.isfinite(asked), asked, np.minimum(there * split.train, asked))
        return _Split(counts, atoms, atoms * np.array(neighbors))

    def validation(structures: int | None) -> _Split:
        """All of the split, where anybody knows how much that is; else its part beside what is trained on."""
        counts = np.where(np.isnan(there), train(structures).counts / split.train, there) * split.val
        return _Split(counts, atoms, atoms * np.array(neighbors))

    return train, validation


def _split(store: Store, indices: Any) -> _Split:
    source = np.asarray(store.source_index)[indices]
    counts = np.bincount(source, minlength=len(store.sources)).astype(np.float64)
    some = np.maximum(counts, 1.0)
    atoms = np.bincount(source, weights=np.asarray(store.n_atoms)[indices], minlength=len(counts)) / some
    edges = np.bincount(source, weights=np.asarray(store.n_edges)[indices], minlength=len(counts)) / some
    return _Split(counts, atoms, edges)
