"""Periodic neighbour lists, by vesin."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import vesin

from wattier_gnn.structure import DataError, Structure


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
        DataError: the structure is periodic, but its lattice vectors span no volume.
    """
    periodic = structure.cell_angstrom is not None and any(structure.pbc)
    box = structure.cell_angstrom if structure.cell_angstrom is not None else np.zeros((3, 3))
    finder = vesin.NeighborList(cutoff=cutoff_angstrom, full_list=True)
    try:
        receivers, senders, shifts = finder.compute(
            points=structure.positions_angstrom,
            box=box,
            periodic=list(structure.pbc) if periodic else False,
            quantities="ijS",
        )
    except RuntimeError as error:
        raise DataError(
            f"{structure.source} {structure.key}: no neighbours can be found ({error}), but the lattice vectors of a "
            "periodic structure must span a volume. Remove the structure, or mend its cell."
        ) from error
    order = np.lexsort((senders, receivers))
    index = np.stack([receivers, senders])[:, order].astype(np.int32)
    return Edges(
        index, np.asarray(shifts)[order].astype(np.int16)
    )  # int8 is too small for atoms that drifted far from their cell
