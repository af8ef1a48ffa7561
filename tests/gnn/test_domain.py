"""What training data looked like, against brute force; and what is flagged as unlike it, in words."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from wattier_gnn.domain import TrainingDomain, measure_domain, surroundings
from wattier_gnn.store import structures_to_arrays
from wattier_gnn.structure import DataError, Structure

SOURCES = ("a", "b")


def arrays_of(tools: Any, *structures: Structure) -> dict[str, Any]:
    return structures_to_arrays(structures, SOURCES, tools.cutoff_angstrom)


def distances(structure: Structure) -> Any:
    """Of each atom to all others and to all images within three cells: [N, n] Angstrom, by enumeration."""
    positions, cell = structure.positions_angstrom, structure.cell_angstrom
    steps = [(0, 0, 0)] if cell is None else list(itertools.product(range(-3, 4), repeat=3))
    shifts = np.array(steps) @ (np.zeros((3, 3)) if cell is None else cell)
    apart = positions[None, :, None] + shifts[None, None] - positions[:, None, None]
    found = np.linalg.norm(apart, axis=-1).reshape(len(positions), -1)
    return np.where(found < 1e-9, np.inf, found)


def test_surroundings_are_those_of_brute_force(tools: Any) -> None:
    scenes = list(tools.scenes().values())
    found = surroundings(arrays_of(tools, *scenes), tools.cutoff_angstrom)
    expected = [distances(scene) for scene in scenes]
    nearest = np.concatenate([d.min(axis=1) for d in expected])
    np.testing.assert_allclose(found.nearest, np.minimum(nearest, tools.cutoff_angstrom))
    np.testing.assert_array_equal(
        found.neighbours, np.concatenate([(d < tools.cutoff_angstrom).sum(axis=1) for d in expected])
    )
    np.testing.assert_array_equal(found.structure_index, np.repeat([0, 1, 2], [8, 5, 2]))


@pytest.fixture
def domain(tools: Any) -> TrainingDomain:
    scenes = tools.scenes()
    parts = [arrays_of(tools, scenes["molecule"], scenes["skew"]), arrays_of(tools, scenes["small"])]
    return measure_domain(parts, SOURCES, tools.cutoff_angstrom)


def test_ranges_are_by_source_and_element(tools: Any, domain: TrainingDomain) -> None:
    molecule = tools.scenes()["molecule"]
    apart = distances(molecule)
    hydrogen = apart[molecule.numbers == 1]
    found = domain.ranges[0][1]
    assert found.atoms == 4
    assert (found.nearest_min, found.nearest_max) == pytest.approx(
        (hydrogen.min(axis=1).min(), hydrogen.min(axis=1).max()), abs=1e-4
    )
    counts = (hydrogen < tools.cutoff_angstrom).sum(axis=1)
    assert (found.neighbours_min, found.neighbours_max) == (counts.min(), counts.max())
    assert set(domain.ranges[0]) == {1, 6, 7, 8, 11, 17}
    assert set(domain.ranges[1]) == {8, 13, 29}


def test_what_was_trained_on_is_not_odd(tools: Any, domain: TrainingDomain) -> None:
    assert domain.reasons(arrays_of(tools, *tools.scenes().values())) == (None, None, None)


@pytest.mark.parametrize(("change", "words"), [
    (lambda s: replace(s, numbers=np.where(s.numbers == 7, 15, s.numbers)), "element 15 was never seen"),
    (lambda s: replace(s, source="b"), "element 6 was never seen|element 1 was never seen"),
    (lambda s: replace(s, positions_angstrom=s.positions_angstrom * 0.6), "but none was nearer than"),
    (lambda s: replace(s, positions_angstrom=s.positions_angstrom * 1.8), "but none was farther than"),
    (lambda s: replace(s, positions_angstrom=s.positions_angstrom * 100), "nearest neighbour at 4.00 A or beyond"),
])  # fmt: skip
def test_what_is_unlike_it_is_odd_for_a_reason(tools: Any, domain: TrainingDomain, change: Any, words: str) -> None:
    molecule = tools.scenes()["molecule"]
    good, odd = domain.reasons(arrays_of(tools, molecule, change(molecule)))
    assert good is None
    assert odd is not None
    assert re.search(words, odd), odd


def test_densities_never_seen_are_odd(tools: Any) -> None:
    """Atoms as near as ever, but with more or fewer others around them than ever."""
    near = replace(tools, cutoff_angstrom=3.0)
    line = [tools.structure([18] * n, [[2.0 * k, 0, 0] for k in range(n)]) for n in (3, 4)]
    square = tools.structure([18] * 9, [[2.0 * i, 2.0 * j, 0] for i in range(3) for j in range(3)])
    few, many = measure_domain([arrays_of(near, line[1])], SOURCES, 3.0).reasons(arrays_of(near, line[0], square))
    assert few is None, "the ends of a line of three are those of a line of four"
    # A corner of the square has two neighbours at 2 A and one at 2.83 A.
    assert many == "an atom of element 18 has 3 neighbours within 3 A, but none had more than 2 in training"
    few, none = measure_domain([arrays_of(near, square)], SOURCES, 3.0).reasons(arrays_of(near, line[0], square))
    assert few == "an atom of element 18 has 1 neighbours within 3 A, but none had fewer than 3 in training"
    assert none is None


def test_a_domain_is_the_same_after_json(tools: Any, domain: TrainingDomain) -> None:
    again = TrainingDomain.from_dict(json.loads(json.dumps(domain.to_dict())), 2)
    assert again == domain


GOOD = {"cutoff_angstrom": 3.0, "ranges": [{"1": [5, 0.7, 1.2, 1, 4]}, {}]}


@pytest.mark.parametrize("data", [
    None, [], {}, {**GOOD, "cutoff_angstrom": math.nan}, {**GOOD, "cutoff_angstrom": -1}, {**GOOD, "ranges": [{}]},
    {**GOOD, "ranges": 3}, {**GOOD, "ranges": [{"0": [5, 0.7, 1.2, 1, 4]}, {}]},
    {**GOOD, "ranges": [{"119": [5, 0.7, 1.2, 1, 4]}, {}]}, {**GOOD, "ranges": [{"x": [5, 0.7, 1.2, 1, 4]}, {}]},
    {**GOOD, "ranges": [{"1": [5, 0.7, 1.2, 1]}, {}]}, {**GOOD, "ranges": [{"1": [5, math.nan, 1.2, 1, 4]}, {}]},
    {**GOOD, "ranges": [{"1": [5, "a", 1.2, 1, 4]}, {}]}, {**GOOD, "ranges": [{"1": None}, {}]},
])  # fmt: skip
def test_a_domain_that_is_none_is_refused(data: Any) -> None:
    assert TrainingDomain.from_dict(GOOD, 2).to_dict() == GOOD
    with pytest.raises(DataError, match="training_domain"):
        TrainingDomain.from_dict(data, 2)
