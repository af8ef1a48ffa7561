"""A release made ready for data of your own: energies aligned, heads cut out, and, if wished, the backbone held still.

What comes out knows one source, the new one: the heads of the others belong to a backbone that may move, and to force
heads that all sources share, so that what was stated of them would hold no more. They are in the release it came from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wattier_gnn.batching import StepLimits, cut_into_steps
from wattier_gnn.ensemble import Ensemble
from wattier_gnn.model import FoundationModel, build_model
from wattier_gnn.reference import MAX_ATOMIC_NUMBER, composition, fit_correction
from wattier_gnn.splits import SPLIT_NAMES, TEST, TRAIN, VAL
from wattier_gnn.store import Store
from wattier_gnn.structure import DataError

FEWEST_STRUCTURES = 10
FEWEST_OF_A_SPLIT = 2
MOST_ALIGNED = 2000  # structures by which energies are aligned: a few coefficients need no more
LIMITS = StepLimits(64, None, None)


class Alignment(NamedTuple):
    """How the energies of new data stand to those of a release.

    origin: position of the source of the release that explains them best; its head is what training begins with.
    references_ev: float64 [119], composition reference of the new source; 0 for elements that do not occur.
    residual_ev_per_atom: root mean square of what that head and such references leave, before any training, of
    structures that they were not fitted to (leave-one-out).
    unaligned_ev_per_atom: the same with the release's own references.
    """

    origin: int
    references_ev: Any
    residual_ev_per_atom: float
    unaligned_ev_per_atom: float


class TunedStore(Store):
    """A store of one source under a new name, aligned anew, every split of it filled.

    Where whole groups leave a split almost empty, as the frames of one molecule do, frames are dealt one by one:
    `torn_groups` says so, for validation then tells of frames like those of training.
    """

    def __init__(self, folder: Path, cutoff_angstrom: float | None, source: str, seed: int) -> None:
        """Open a store of one source; seed: of the dealing.

        Raises:
            DataError: it holds too few structures; or as `Store` does.
        """
        super().__init__(folder, cutoff_angstrom)
        if len(self) < FEWEST_STRUCTURES:
            raise DataError(
                f"{folder}: holds {len(self)} usable structures, but must hold {FEWEST_STRUCTURES} or more to train, "
                "validate and test on. Give more of them."
            )
        (about,) = self.meta["by_source"].values()
        self.meta |= {"sources": [source], "by_source": {source: about}}
        counts = np.bincount(self.split, minlength=len(SPLIT_NAMES))
        self.torn_groups = bool(counts.min() < FEWEST_OF_A_SPLIT)
        if self.torn_groups:
            self.split = _dealt(len(self), seed)
            self.columns = {**self.columns, "split": self.split}
            counts = np.bincount(self.split, minlength=len(SPLIT_NAMES))
            about["structures"] = dict(zip(SPLIT_NAMES, counts.tolist(), strict=True))

    def align(self, alignment: Alignment) -> None:
        """Let batches hold what that alignment leaves of the energies."""
        self.references = alignment.references_ev[None]
        self.meta |= {"references_ev": self.references.tolist()}


def _dealt(n: int, seed: int) -> Any:
    split = np.full(n, TRAIN, dtype=np.int8)
    order = np.random.default_rng(seed).permutation(n)
    part = max(FEWEST_OF_A_SPLIT, n // 10)
    split[order[:part]], split[order[part : 2 * part]] = VAL, TEST
    return split


def align(release: Ensemble, store: Store, source: str) -> Alignment:
    """Find the source of a release whose head explains new energies best, and the references that it then needs.

    The references are those of that source, corrected by a fit to what its head leaves that is made for few structures:
    see `fit_correction`. Of one composition, which cannot tell elements apart, all get the same shift.
    A source of the release keeps its references: its level of theory is the release's.
    """
    indices = np.random.default_rng(0).permutation(store.indices(TRAIN))[:MOST_ALIGNED]
    counts: Any = np.concatenate([np.zeros((0, MAX_ATOMIC_NUMBER + 1)), *_compositions(store, indices)])
    n_atoms, energy = counts.sum(axis=1), store.energy[indices]
    present = counts.any(axis=0)
    origins = [release.sources.index(source)] if source in release.sources else range(len(release.sources))
    found = []
    for origin in origins:
        known = release.references_ev[origin]
        left = energy - _mean_energies(release, store, indices, origin) - counts @ known
        free = present & (known == 0) if source in release.sources else present
        correction, error = fit_correction(np.where(free, counts, 0.0), n_atoms, left)
        apart = float(np.sqrt(np.mean((left / n_atoms) ** 2)))
        unknown = int(np.count_nonzero(known[present] == 0))
        found.append((unknown, error, Alignment(origin, np.where(present, known + correction, 0.0), error, apart)))
    return min(found, key=lambda entry: entry[:2])[2]


def unseen_elements(release: Ensemble, store: Store) -> list[int]:
    """Atomic numbers in a store that no source of a release was trained on."""
    (about,) = store.meta["by_source"].values()
    seen: Any = np.asarray(release.references_ev).any(axis=0)
    return [int(z) for z in about["elements"] if not seen[z]]


def has_forces(store: Store) -> bool:
    """Whether any training structure has forces."""
    steps = cut_into_steps(store.indices(TRAIN), LIMITS, store.n_atoms, store.n_edges)
    return any(store.gather(step, edges=False)["force_mask"].any() for step in steps)


def adapted(model: FoundationModel, origin: int, source: str, *, freeze: bool) -> FoundationModel:
    """The same network for one source: it answers what the model answers for its source `origin`.

    freeze: the encoder learns no more; the heads do.
    """
    config, only_shared = model.config, model.config.energy_heads == "shared"
    scale = model.shared_scale_ev if only_shared else config.energy_scale_ev[origin]
    tuned = build_model(replace(config, sources=(source,), energy_scale_ev=(scale,)), 0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in state.items():
        if name.startswith(("energy_heads.", "deviation_head.")) and not only_shared:
            state[name] = value[origin : origin + 1].clone()
    if config.energy_heads == "both":  # what sources share had the geometric mean of their units
        state["shared_head.out"] *= model.shared_scale_ev / scale
    state["energy_scale_ev"] = tuned.energy_scale_ev.clone()
    tuned.load_state_dict(state)
    if freeze:
        tuned.encoder.requires_grad_(False)
    return tuned


def unadapted_errors(
    release: Ensemble, store: Store, origin: int, split: int, references_ev: Any = None
) -> tuple[float, float | None]:
    """Mean absolute errors of a release as it is, for its source `origin`: eV/atom, and eV/Angstrom where known.

    references_ev: [119] to take in place of the release's own.
    """
    references = release.references_ev[origin] if references_ev is None else references_ev
    indices, energy, force = store.indices(split), [], []
    for step in cut_into_steps(indices, LIMITS, store.n_atoms, store.n_edges):
        arrays = _as_source(store, step, origin)
        n_atoms = np.diff(arrays["atom_offset"])
        baseline = composition(arrays["numbers"], n_atoms) @ references
        said = release.combine(release.members_say(arrays), baseline)
        energy.append(np.abs(said.energy_ev - arrays["energy"]) / n_atoms)
        force.append(np.abs(said.forces_ev_per_angstrom - arrays["forces"])[arrays["force_mask"]].ravel())
    forces = np.concatenate(force)
    return float(np.concatenate(energy).mean()), float(forces.mean()) if len(forces) else None


def _mean_energies(release: Ensemble, store: Store, indices: Any, origin: int) -> Any:
    """What the members say on average, relative to the references: float64 [n] eV."""
    steps = cut_into_steps(indices, LIMITS, store.n_atoms, store.n_edges)
    said = [release.members_say(_as_source(store, step, origin)).energies_ev for step in steps]
    return release.weights_of_members @ np.concatenate(said, axis=1)


def _as_source(store: Store, indices: Any, origin: int) -> dict[str, Any]:
    arrays = store.gather(indices)
    return arrays | {"source_index": np.full_like(arrays["source_index"], origin)}


def _compositions(store: Store, indices: Any) -> Iterator[Any]:
    for step in cut_into_steps(indices, LIMITS, store.n_atoms, store.n_edges):
        arrays = store.gather(step, edges=False)
        yield composition(arrays["numbers"], np.diff(arrays["atom_offset"]))
