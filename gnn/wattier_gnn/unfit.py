"""Structures that no model can answer for, and why, in words for whoever asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from wattier_gnn.arrays import squared_lengths
from wattier_gnn.cleaning import MAX_POSITION_ANGSTROM, MIN_CELL_ANGSTROM, geometry_reason
from wattier_gnn.structure import Structure

NEAREST_ANGSTROM = 0.01  # of two atoms: at 0 a distance has no gradient
IN_WORDS = {
    "nan position": "a position or a lattice vector is NaN or infinite, but must be a number of Angstrom. Mend it.",
    "position out of range": f"an atom lies more than {MAX_POSITION_ANGSTROM:g} Angstrom from the origin, but must lie "
    "nearer. Wrap or shift the structure.",
    "cell without volume": "the lattice vectors along which it repeats span no volume, or are shorter than "
    f"{MIN_CELL_ANGSTROM:g} Angstrom, but must not. Mend the cell, or set pbc to False there.",
    "impossible density": "more atoms are in one place than matter can have, but positions and cell must be in "
    "Angstrom. Mend their unit.",
}


class Overlap(NamedTuple):
    """Two atoms of one structure that are too near."""

    structure: int
    message: str


def unfit(structure: Structure, reference_ev: Any, source: str) -> str | None:
    """Why a structure cannot be predicted; None when it can.

    Args:
        structure: what was given.
        reference_ev: [119], the source's energy of each element, 0 for those that its training data did not hold.
        source: its name, for the message.
    """
    if not len(structure.numbers):
        return "there is no atom, but must be at least one. Leave the structure out."
    numbers = np.unique(structure.numbers)
    known = (numbers > 0) & (numbers < len(reference_ev))
    known[known] = reference_ev[numbers[known]] != 0
    if not known.all():
        return (
            f"atomic number {int(numbers[~known][0])} does not occur in the {source} training data, but all must. "
            f"Use another source than {source!r} or another release."
        )
    reason = geometry_reason(structure)
    return IN_WORDS[reason] if reason else None


def overlapping(arrays: Mapping[str, Any]) -> Overlap | None:
    """The nearest two atoms, or an atom and its image, if they are too near; arrays are of `structures_to_arrays`."""
    squares = squared_lengths(arrays)
    if not len(squares) or squares.min() >= NEAREST_ANGSTROM**2:
        return None
    edge = int(squares.argmin())
    structure = int(np.searchsorted(arrays["edge_offset"], edge, side="right")) - 1
    i, j = sorted(arrays["edge_index"][:, edge].tolist())
    message = (
        f"atoms {i} and {j} are {squares[edge] ** 0.5:.4f} Angstrom apart, but must be {NEAREST_ANGSTROM:g} at least. "
        "Move one, or take it away if it is there twice."
    )
    return Overlap(structure, message)
