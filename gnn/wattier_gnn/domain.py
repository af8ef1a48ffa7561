"""What training data looked like around atoms of each element, and in words where a structure does not look like it.

Of each source and element: how near the nearest neighbour was, and how many neighbours were within the cutoff (the
density around an atom). To a structure that leaves these ranges the members extrapolate, however much they agree. The
reverse does not hold: what stays within them may be strange in ways that they do not see.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from wattier_gnn.arrays import squared_lengths
from wattier_gnn.reference import MAX_ATOMIC_NUMBER
from wattier_gnn.structure import DataError

DISTANCE_MARGIN, NEIGHBOURS_MARGIN = 0.05, 0.20  # relative: extremes of a sample are not those of what it is from
N_ELEMENTS = MAX_ATOMIC_NUMBER + 1


class Surroundings(NamedTuple):
    """What an atom sees, for N atoms; nearest [Angstrom] is the cutoff where it has no neighbour."""

    numbers: Any
    source_index: Any
    structure_index: Any
    nearest: Any
    neighbours: Any


def surroundings(arrays: Mapping[str, Any], cutoff_angstrom: float) -> Surroundings:
    """Of all atoms of some arrays, see `structures_to_arrays`, with edges within a cutoff."""
    n_atoms, n = np.diff(arrays["atom_offset"]), len(arrays["numbers"])
    receivers = arrays["edge_index"][0] + np.repeat(arrays["atom_offset"][:-1], np.diff(arrays["edge_offset"]))
    squares = np.full(n, cutoff_angstrom**2)
    np.minimum.at(squares, receivers, squared_lengths(arrays))
    return Surroundings(
        arrays["numbers"].astype(np.int64),
        np.repeat(arrays["source_index"].astype(np.int64), n_atoms),
        np.repeat(np.arange(len(n_atoms)), n_atoms),
        np.sqrt(squares),
        np.bincount(receivers, minlength=n),
    )


class ElementRange(NamedTuple):
    """What was seen around the atoms of one element in one source."""

    atoms: int
    nearest_min: float
    nearest_max: float
    neighbours_min: int
    neighbours_max: int


@dataclass(frozen=True)
class TrainingDomain:
    """Ranges of the training data of each source, by atomic number, for neighbours within a cutoff."""

    cutoff_angstrom: float
    ranges: tuple[Mapping[int, ElementRange], ...]

    def reasons(self, arrays: Mapping[str, Any]) -> tuple[str | None, ...]:
        """What is unlike the training data of its source, for each structure of some arrays; None = nothing.

        arrays: as `structures_to_arrays` gives them, with edges within `cutoff_angstrom`. The first thing that is found
        is said, in the order of `_ODD`.
        """
        atoms, (seen, nearest_min, nearest_max, few, many) = surroundings(arrays, self.cutoff_angstrom), self._bounds
        its = atoms.source_index, atoms.numbers
        odd = (
            seen[its] == 0,
            atoms.nearest < nearest_min[its] * (1 - DISTANCE_MARGIN),
            atoms.nearest > nearest_max[its] * (1 + DISTANCE_MARGIN),
            atoms.neighbours < few[its] * (1 - NEIGHBOURS_MARGIN),
            atoms.neighbours > many[its] * (1 + NEIGHBOURS_MARGIN),
        )
        found: list[str | None] = [None] * (len(arrays["atom_offset"]) - 1)
        for flags, text in zip(odd, _ODD, strict=True):
            for k in np.flatnonzero(flags):
                owner = int(atoms.structure_index[k])
                if found[owner] is None:
                    number = int(atoms.numbers[k])
                    known = self.ranges[atoms.source_index[k]].get(number)
                    found[owner] = text.format(
                        number=number, nearest=atoms.nearest[k], count=int(atoms.neighbours[k]), known=known,
                        cutoff=self.cutoff_angstrom,
                    )  # fmt: skip
        return tuple(found)

    @cached_property
    def _bounds(self) -> tuple[Any, ...]:
        """Each field of the ranges as an array [S, 119]; an element not seen has only a first one."""
        table = np.zeros((len(self.ranges), N_ELEMENTS, len(ElementRange._fields)))
        table[:, :, 2] = table[:, :, 4] = np.inf
        for row, ranges in zip(table, self.ranges, strict=True):
            for number, known in ranges.items():
                row[number] = known
        return tuple(np.moveaxis(table, -1, 0))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: of each source, each atomic number's range as a list."""
        by_source = [{str(z): list(known) for z, known in sorted(ranges.items())} for ranges in self.ranges]
        return {"cutoff_angstrom": self.cutoff_angstrom, "ranges": by_source}

    @classmethod
    def from_dict(cls, data: Any, n_sources: int) -> TrainingDomain:
        """Inverse of `to_dict`.

        Raises:
            DataError: a number is missing or none, an element does not exist, or there are not as many as sources.
        """
        try:
            cutoff, by_source = float(data["cutoff_angstrom"]), data["ranges"]
            ranges = tuple({int(z): _range(known) for z, known in of_source.items()} for of_source in by_source)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise DataError(f"training_domain is not readable ({error!r}). Get the release anew.") from error
        whole = len(ranges) == n_sources and all(0 < z < N_ELEMENTS for of_source in ranges for z in of_source)
        if not whole or not 0 < cutoff < math.inf:
            raise DataError(
                f"training_domain has {len(ranges)} sources and a cutoff of {cutoff:g}, but must have {n_sources}, "
                f"elements from 1 to {MAX_ATOMIC_NUMBER}, and a length. Get the release anew."
            )
        return cls(cutoff, ranges)


_ODD = (
    "element {number} was never seen in training",
    "an atom of element {number} has a neighbour at {nearest:.2f} A, but none was nearer than "
    "{known.nearest_min:.2f} A in training",
    "an atom of element {number} has its nearest neighbour at {nearest:.2f} A or beyond, but none was farther than "
    "{known.nearest_max:.2f} A in training",
    "an atom of element {number} has {count} neighbours within {cutoff:g} A, but none had fewer than "
    "{known.neighbours_min} in training",
    "an atom of element {number} has {count} neighbours within {cutoff:g} A, but none had more than "
    "{known.neighbours_max} in training",
)


def measure_domain(
    parts: Iterable[Mapping[str, Any]], sources: Sequence[str], cutoff_angstrom: float
) -> TrainingDomain:
    """The ranges of training structures, given as arrays (see `structures_to_arrays`) some at a time."""
    shape = (len(sources), N_ELEMENTS)
    count, few, many = (
        np.zeros(shape, dtype=np.int64),
        np.full(shape, np.iinfo(np.int64).max),
        np.zeros(shape, np.int64),
    )
    low, high = np.full(shape, np.inf), np.zeros(shape)
    for arrays in parts:
        atoms = surroundings(arrays, cutoff_angstrom)
        its = atoms.source_index, atoms.numbers
        np.add.at(count, its, 1)
        np.minimum.at(low, its, atoms.nearest)
        np.maximum.at(high, its, atoms.nearest)
        np.minimum.at(few, its, atoms.neighbours)
        np.maximum.at(many, its, atoms.neighbours)
    columns = (count, low.round(4), high.round(4), few, many)
    ranges = tuple(
        {int(z): ElementRange(*(column[s, z].item() for column in columns)) for z in np.flatnonzero(count[s])}
        for s in range(len(sources))
    )
    return TrainingDomain(cutoff_angstrom, ranges)


def _range(values: Sequence[Any]) -> ElementRange:
    atoms, nearest_min, nearest_max, few, many = values
    numbers = [float(v) for v in (atoms, nearest_min, nearest_max, few, many)]
    if not all(0 <= v < math.inf for v in numbers):
        raise ValueError(f"{values!r} holds something that is no number of 0 or more")
    return ElementRange(int(atoms), numbers[1], numbers[2], int(few), int(many))
