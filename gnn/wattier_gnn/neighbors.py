"""Periodic neighbour lists, by vesin."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

from wattier_gnn.structure import DataError, Structure

# vesin imports torch where it can, for tensors that we do not give it. A process that only reads files would pay for
# that with a second of start-up and 150 MB.
if "torch" in sys.modules:
    import vesin
else:
    sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it fails
    try:
        import vesin
    finally:
        del sys.modules["torch"]

MAX_SHIFT = np.iinfo(np.int16).max


class Edges(NamedTuple):
    """Directed edges of one structure, sorted by receiver.

    index: int32 [2, E], rows (receiver i, sender j). shift: int16 [E, 3], the lattice translation of the sender in
    units of the cell vectors: the edge vector is ``positions[j] + shift @ cell - positions[i]`` [Angstrom].
    """

    index: Any
    shift: Any


def find_edges(structure: Structure, cutoff_angstrom: float) -> Edges:
    """All pairs closer than the cutoff, every periodic image of a neighbour and of the atom itself included.

    Raises:
        DataError: the structure is periodic, but its lattice vectors span no volume; or an atom lies too far from
            its cell.
    """
    try:
        return edges_of(structure.positions_angstrom, structure.cell_angstrom, structure.pbc, cutoff_angstrom)
    except RuntimeError as error:
        raise DataError(
            f"{structure.source} {structure.key}: no neighbours can be found ({error}), but the lattice vectors of a "
            "periodic structure must span a volume, and hold its atoms. Remove the structure, or mend its cell."
        ) from error


def edges_of(positions: Any, cell: Any, pbc: Any, cutoff_angstrom: float) -> Edges:
    """The edges of atoms at positions [N, 3] in a cell [3, 3] or None; raises RuntimeError as `find_edges` says."""
    periodic = np.asarray(pbc, dtype=bool) & (cell is not None)
    # One thread: parallel work is over structures, and the order of edges must not vary.
    finder = vesin.NeighborList(cutoff=cutoff_angstrom, full_list=True, sorted=True, n_threads=1)
    pairs, shifts = finder.compute(
        points=positions,
        box=np.zeros((3, 3)) if cell is None else cell,
        periodic=periodic,
        quantities="PS",
        copy=False,  # they are copied below, while the finder that owns them is there
    )
    # int8 is too small for atoms that drifted far from their cell
    if len(shifts) and np.abs(shifts).max() > MAX_SHIFT:
        raise RuntimeError(f"an atom is more than {MAX_SHIFT} cells away")
    # Receivers come sorted, but the order within one receiver is not promised.
    order = np.argsort(pairs[:, 0] * len(positions) + pairs[:, 1], kind="stable")
    return Edges(pairs.T[:, order].astype(np.int32), shifts[order].astype(np.int16))
