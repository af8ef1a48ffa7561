"""What a model promises. The physics tests check each promise made, and that one not made is not kept."""

from __future__ import annotations

from typing import Literal, get_args

Property = Literal[
    "permutation",  # atoms may be listed in any order
    "translation",  # the origin does not matter, nor by which of its images an atom of a crystal is given
    "invariant_energy",  # the energy does not change when the structure is turned or mirrored
    "equivariant_forces",  # forces turn with the structure
    "conservative",  # forces are minus the gradient of the energy, as the stress, its strain derivative, always is
    "smooth_cutoff",  # energy and forces are continuous where a neighbour crosses the cutoff
    "continuous_forces",  # so are forces where two neighbours are equally far, as they are in symmetric crystals
    "extensive",  # n cells have n times the energy of one, and what is far apart adds up
    "batch_independent",  # what else is in the batch does not matter
]
PROPERTIES: frozenset[Property] = frozenset(get_args(Property))


def promised(family: str, forces: str) -> frozenset[Property]:
    """What our models of a family and a force mode promise."""
    broken: set[Property] = set()
    if forces != "conservative":
        broken.add("conservative")
    if forces == "direct":
        broken.add("equivariant_forces")
    if family == "pna":
        broken.add("smooth_cutoff")
        if forces == "conservative":  # the slope of a minimum jumps where another neighbour takes over
            broken.add("continuous_forces")
    return PROPERTIES - broken
