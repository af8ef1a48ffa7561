"""The arrays of a store: what each is called, its type, what its rows stand for; and how structures become arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from wattier_gnn.neighbors import Edges, find_edges
from wattier_gnn.structure import Structure

# What belongs to an atom, or to an edge, lies together: a structure drawn at random is two runs of bytes, not seven.
ATOM = np.dtype([("numbers", "u1"), ("force_mask", "?"), ("positions", "<f8", (3,)), ("forces", "<f8", (3,))])
# Atoms count from the first one of their structure.
EDGE = np.dtype([("receivers", "<i4"), ("senders", "<i4"), ("shift", "<i2", (3,))])


class Column(NamedTuple):
    """One array of a store on the disk: little-endian rows without a header.

    per: what a row stands for: an atom, an edge, a structure, a byte of all keys; `bound` is a boundary between
    structures, of which there is one more than structures.
    """

    dtype: Any
    row: tuple[int, ...]
    per: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.row, dtype=np.int64))


COLUMNS: Mapping[str, Column] = {
    "atoms": Column(ATOM, (), "atom"),
    "edges": Column(EDGE, (), "edge"),  # none where they are found again in each batch
    "cells": Column("<f8", (3, 3), "structure"),  # 0 where there is none
    "pbc": Column("?", (3,), "structure"),
    "energy": Column("<f8", (), "structure"),
    "source_index": Column("<i2", (), "structure"),
    "split": Column("i1", (), "structure"),
    "group": Column("<i4", (), "structure"),  # a row of the table of groups
    "n_atoms": Column("<i8", (), "structure"),
    "n_edges": Column("<i8", (), "structure"),
    "atom_offset": Column("<i8", (), "bound"),
    "edge_offset": Column("<i8", (), "bound"),
    "key_offset": Column("<i8", (), "bound"),
    "keys": Column("u1", (), "key"),  # UTF-8
}


def pack_atoms(arrays: Mapping[str, Any]) -> Any:
    """The records `ATOM` [N] of what `structures_to_arrays` made."""
    atoms = np.empty(len(arrays["numbers"]), dtype=ATOM)
    for name in ATOM.names or ():
        atoms[name] = arrays[name]
    return atoms


def pack_edges(arrays: Mapping[str, Any]) -> Any:
    """The records `EDGE` [E] of what `structures_to_arrays` made."""
    edges = np.empty(len(arrays["edge_shift"]), dtype=EDGE)
    edges["receivers"], edges["senders"] = arrays["edge_index"]
    edges["shift"] = arrays["edge_shift"]
    return edges


def unpack_atoms(atoms: Any) -> dict[str, Any]:
    """Arrays of their own from the records `ATOM` [N]. (Of one record numpy calls every view of a field contiguous.)"""
    return {name: atoms[name].copy() for name in ATOM.names or ()}


def unpack_edges(edges: Any) -> dict[str, Any]:
    """Arrays of their own from the records `EDGE` [E]: edge_index int32 [2, E], edge_shift int16 [E, 3]."""
    return {
        "edge_index": np.stack([edges["receivers"], edges["senders"]]),
        "edge_shift": edges["shift"].copy(),
    }


def structures_to_arrays(
    structures: Sequence[Structure], sources: Sequence[str], cutoff_angstrom: float
) -> dict[str, Any]:
    """Concatenated arrays of some structures, edges included; `split` and `references` are left to the caller."""
    edges = [find_edges(s, cutoff_angstrom) for s in structures]
    return concatenated(structures, edges, [list(sources).index(s.source) for s in structures])


def concatenated(
    structures: Sequence[Structure], edges: Sequence[Edges], source_index: Sequence[int]
) -> dict[str, Any]:
    """Concatenated arrays of some structures (at least one is not needed) whose edges are known."""
    n_atoms = np.array([len(s.numbers) for s in structures], dtype=np.int64)
    n_edges = np.array([e.index.shape[1] for e in edges], dtype=np.int64)
    known = [s.forces_ev_per_angstrom is not None for s in structures]
    zero = np.zeros((3, 3))
    nothing = np.zeros((0, 3))
    return {
        "numbers": np.concatenate([nothing[:, 0], *(s.numbers for s in structures)]).astype(np.uint8),
        "positions": np.concatenate([nothing, *(s.positions_angstrom for s in structures)]),
        "forces": np.concatenate([nothing, *(_forces_or_zero(s) for s in structures)]),
        "force_mask": np.repeat(np.array(known, dtype=bool), n_atoms),
        "atom_offset": offsets(n_atoms),
        "cells": np.array(
            [s.cell_angstrom if s.cell_angstrom is not None else zero for s in structures], dtype=np.float64
        ).reshape(-1, 3, 3),
        "pbc": np.array([s.pbc for s in structures], dtype=bool).reshape(-1, 3),
        "energy": np.array([s.energy_ev for s in structures], dtype=np.float64),
        "source_index": np.array(source_index, dtype=np.int16),
        "edge_index": np.concatenate([np.zeros((2, 0), dtype=np.int32), *(e.index for e in edges)], axis=1),
        "edge_shift": np.concatenate([np.zeros((0, 3), dtype=np.int16), *(e.shift for e in edges)]),
        "edge_offset": offsets(n_edges),
    }


def shifts_angstrom(arrays: Mapping[str, Any]) -> Any:
    """The translation of each edge's sender, 0 where there is no cell: float64 [E, 3] Angstrom."""
    shift = arrays["edge_shift"].astype(np.float64)
    for k in np.flatnonzero(arrays["cells"].any(axis=(1, 2))):
        its = slice(arrays["edge_offset"][k], arrays["edge_offset"][k + 1])
        shift[its] = shift[its] @ arrays["cells"][k]
    return shift


def squared_lengths(arrays: Mapping[str, Any]) -> Any:
    """Squares of the lengths of all edges: float64 [E] Angstrom^2."""
    first_atom = np.repeat(arrays["atom_offset"][:-1], np.diff(arrays["edge_offset"]))
    receivers, senders = arrays["edge_index"] + first_atom
    vectors = shifts_angstrom(arrays)  # in place, and by take: several times as fast as the plain formula
    vectors += arrays["positions"].take(senders, axis=0)
    vectors -= arrays["positions"].take(receivers, axis=0)
    return np.einsum("ex,ex->e", vectors, vectors)


def volumes(arrays: Mapping[str, Any]) -> Any:
    """Volume [Angstrom^3] of each structure's cell: float64 [B], NaN where it does not repeat in three directions."""
    volume = np.abs(np.linalg.det(arrays["cells"]))
    return np.where(arrays["pbc"].all(axis=1) & (volume > 0), volume, np.nan)


def edges_within(arrays: Mapping[str, Any], cutoff_angstrom: float) -> dict[str, Any]:
    """The same structures with the edges that a search with a smaller cutoff would have found.

    Decided in float64, as they were found; images of one pair may come in another order.
    """
    near = squared_lengths(arrays) < cutoff_angstrom**2
    kept = np.flatnonzero(near)
    return {
        **arrays,
        "edge_index": arrays["edge_index"].take(kept, axis=1),
        "edge_shift": arrays["edge_shift"].take(kept, axis=0),
        "edge_offset": offsets(near)[arrays["edge_offset"]],
    }


def offsets(lengths: Any) -> Any:
    """Where each of some entries begins, and the end: int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def ragged(offset: Any, indices: Any) -> tuple[Any, Any]:
    """Flat positions of the rows of some variable-length entries, and which entry each row belongs to."""
    starts, lengths = offset[indices], offset[np.asarray(indices) + 1] - offset[indices]
    owner = np.repeat(np.arange(len(lengths)), lengths)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return starts[owner] + within, owner


def pack_texts(texts: Sequence[str]) -> tuple[Any, Any]:
    """Texts as the bytes of all, uint8 [n], and the offset of each, int64 [len + 1]."""
    encoded = [text.encode() for text in texts]
    lengths = np.array([len(text) for text in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets(lengths)


def unpack_texts(data: Any, offset: Any) -> list[str]:
    """The texts that `pack_texts` was given."""
    whole = np.asarray(data).tobytes()
    bounds = np.asarray(offset).tolist()
    return [whole[a:b].decode() for a, b in pairwise(bounds)]


def _forces_or_zero(structure: Structure) -> Any:
    forces = structure.forces_ev_per_angstrom
    return forces if forces is not None else np.zeros((len(structure.numbers), 3))
