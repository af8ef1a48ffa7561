"""The cleaned, aligned structures of all sources in one memory-mapped folder.

Arrays of all structures are concatenated; offsets say where each begins. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wattier_gnn.batch import Batch
from wattier_gnn.neighbors import find_edges
from wattier_gnn.reference import composition, fit_references
from wattier_gnn.splits import TRAIN
from wattier_gnn.structure import DataError, Structure

FORMAT_VERSION = 1
ARRAYS = (
    "numbers", "positions", "forces", "force_mask", "atom_offset", "cells", "pbc", "energy", "source_index", "split",
    "edge_index", "edge_shift", "edge_offset", "references",
)  # fmt: skip


class Store:
    """Read access to a store; every process may open the same folder.

    Attributes:
        meta: sources, cutoff_angstrom, energy_scale_ev, mean_neighbors, groups, keys.
        numbers uint8 [N], positions float64 [N, 3], energy float64 [B] (total, eV), references float64 [S, 119],
        n_atoms and n_edges int64 [B] ...
    """

    def __init__(self, folder: Path) -> None:
        """Raises DataError where the folder is missing, of another version, or truncated."""
        self.folder = folder
        try:
            self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS}
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"{folder}: not a readable store ({error}). Remove the folder and prepare the data again."
            ) from error
        version = self.meta.get("format_version") if isinstance(self.meta, dict) else None
        if version != FORMAT_VERSION:
            raise DataError(
                f"{folder}: store version is {version}, but must be {FORMAT_VERSION}. "
                "Remove the folder and prepare the data again."
            )
        for name in ("atom_offset", "edge_offset", "source_index", "split", "references"):
            arrays[name] = np.array(arrays[name])  # small and asked for in every batch: kept in memory
        self._arrays = arrays
        self.numbers, self.positions, self.energy = arrays["numbers"], arrays["positions"], arrays["energy"]
        self.forces, self.force_mask = arrays["forces"], arrays["force_mask"]
        self.atom_offset, self.edge_offset = arrays["atom_offset"], arrays["edge_offset"]
        self.source_index, self.split, self.references = arrays["source_index"], arrays["split"], arrays["references"]
        self.n_atoms, self.n_edges = np.diff(self.atom_offset), np.diff(self.edge_offset)

    def __len__(self) -> int:
        return len(self.source_index)

    @property
    def sources(self) -> tuple[str, ...]:
        """Source names; `source_index` points into them."""
        return tuple(self.meta["sources"])

    def indices(self, split: int) -> Any:
        """Positions of the structures of one split: int64 [n]."""
        return np.flatnonzero(self.split == split)

    def baseline_ev(self, indices: Any) -> Any:
        """Composition reference energies of some structures: float64 [n] eV."""
        atoms, _ = ragged(self.atom_offset, indices)
        counts = composition(self.numbers[atoms], self.n_atoms[indices])
        return np.einsum("bz,bz->b", counts, self.references[self.source_index[indices]])

    def batch(self, indices: Any) -> Batch:
        """Join the structures at `indices` (int64 [B]) into one batch."""
        return join(self._arrays, indices, self.energy[indices] - self.baseline_ev(indices))

    def batch_of(self, parts: Sequence[Any], rank: int) -> Batch:
        """This rank's batch of a step, given every rank's indices: a store that is spread over ranks needs them all."""
        return self.batch(parts[rank])


def join(arrays: Mapping[str, Any], indices: Any, energy_ev: Any) -> Batch:
    """One batch of the structures at `indices` (int64 [B]) of `structures_to_arrays`; energy_ev [B] to be learned."""
    indices = np.asarray(indices)
    atoms, structure_of_atom = ragged(arrays["atom_offset"], indices)
    edges, structure_of_edge = ragged(arrays["edge_offset"], indices)
    n_atoms = arrays["atom_offset"][indices + 1] - arrays["atom_offset"][indices]
    first_atom = np.cumsum(n_atoms) - n_atoms
    edge_index = arrays["edge_index"][:, edges].astype(np.int64) + first_atom[structure_of_edge]
    cells = np.asarray(arrays["cells"][indices])[structure_of_edge]
    shift = np.einsum("ea,eax->ex", arrays["edge_shift"][edges].astype(np.float64), cells)
    dtype = torch.get_default_dtype()
    return Batch(
        numbers=torch.from_numpy(arrays["numbers"][atoms].astype(np.int64)),
        positions=torch.from_numpy(arrays["positions"][atoms]).to(dtype),
        edge_index=torch.from_numpy(edge_index),
        edge_shift=torch.from_numpy(shift).to(dtype),
        structure_index=torch.from_numpy(structure_of_atom),
        source_index=torch.from_numpy(arrays["source_index"][indices].astype(np.int64)),
        n_atoms=torch.from_numpy(n_atoms),
        energy=torch.from_numpy(energy_ev).to(dtype),
        forces=torch.from_numpy(arrays["forces"][atoms]).to(dtype),
        force_mask=torch.from_numpy(arrays["force_mask"][atoms]),
    )


def ragged(offset: Any, indices: Any) -> tuple[Any, Any]:
    """Flat positions of the rows of some variable-length entries, and which entry each row belongs to."""
    starts, lengths = offset[indices], offset[np.asarray(indices) + 1] - offset[indices]
    owner = np.repeat(np.arange(len(lengths)), lengths)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return starts[owner] + within, owner


def structures_to_arrays(
    structures: Sequence[Structure], sources: Sequence[str], cutoff_angstrom: float
) -> dict[str, Any]:
    """Concatenated arrays of some structures, edges included; `split` and `references` are left to the caller."""
    edges = [find_edges(s, cutoff_angstrom) for s in structures]
    n_atoms = [len(s.numbers) for s in structures]
    known = [s.forces_ev_per_angstrom is not None for s in structures]
    forces = [
        s.forces_ev_per_angstrom if s.forces_ev_per_angstrom is not None else np.zeros((len(s.numbers), 3))
        for s in structures
    ]
    zero = np.zeros((3, 3))
    return {
        "numbers": np.concatenate([s.numbers for s in structures]).astype(np.uint8),
        "positions": np.concatenate([s.positions_angstrom for s in structures]),
        "forces": np.concatenate(forces),
        "force_mask": np.repeat(known, n_atoms),
        "atom_offset": np.concatenate([[0], np.cumsum(n_atoms)]).astype(np.int64),
        "cells": np.stack([s.cell_angstrom if s.cell_angstrom is not None else zero for s in structures]),
        "pbc": np.array([s.pbc for s in structures]),
        "energy": np.array([s.energy_ev for s in structures]),
        "source_index": np.array([list(sources).index(s.source) for s in structures], dtype=np.int16),
        "edge_index": np.concatenate([e.index for e in edges], axis=1),
        "edge_shift": np.concatenate([e.shift for e in edges]),
        "edge_offset": np.concatenate([[0], np.cumsum([e.index.shape[1] for e in edges])]).astype(np.int64),
    }


def write_store(  # noqa: PLR0913  (most are keywords)
    folder: Path,
    structures: Sequence[Structure],
    split: Any,
    *,
    sources: Iterable[str],
    cutoff_angstrom: float,
    extra_files: Mapping[str, str] | None = None,
) -> Store:
    """Fit the references on the training split, then write the folder atomically and open it."""
    names = list(sources)
    arrays = structures_to_arrays(structures, names, cutoff_angstrom)
    counts = composition(arrays["numbers"], np.diff(arrays["atom_offset"]))
    training = split == TRAIN
    arrays["split"] = split
    arrays["references"] = fit_references(
        counts[training], arrays["energy"][training], arrays["source_index"][training], names
    )
    meta = {
        "format_version": FORMAT_VERSION,
        "sources": names,
        "cutoff_angstrom": cutoff_angstrom,
        "energy_scale_ev": _force_scales(arrays, training, len(names)),
        "mean_neighbors": arrays["edge_offset"][-1] / max(arrays["atom_offset"][-1], 1),
        "groups": [s.group for s in structures],
        "keys": [s.key for s in structures],
    }
    _write_atomically(folder, arrays, {"meta.json": json.dumps(meta), **(extra_files or {})})
    return Store(folder)


def _write_atomically(folder: Path, arrays: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    """A folder of files, under its name only when all of them are on the disk."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, array in arrays.items():
            with (temporary / f"{name}.npy").open("wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        for name, text in texts.items():
            with (temporary / name).open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _force_scales(arrays: dict[str, Any], training: Any, n_sources: int) -> list[float]:
    """Root mean square force component of each source's training structures, 1 where no forces are known."""
    atom_structure = np.repeat(np.arange(len(training)), np.diff(arrays["atom_offset"]))
    scales = []
    for source in range(n_sources):
        chosen = (training & (arrays["source_index"] == source))[atom_structure] & arrays["force_mask"]
        rms = float(np.sqrt(np.mean(arrays["forces"][chosen] ** 2))) if chosen.any() else 1.0
        scales.append(max(rms, 1e-3))
    return scales
