"""Neighbour lists against a brute force over images, and against ASE."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.neighborlist import neighbor_list
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from wattier_gnn.neighbors import find_edges
from wattier_gnn.structure import DataError, Structure

CUTOFF = 4.0
REACH = 8  # images each way that the brute force tries, where it is not told


def edge_set(structure: Structure, cutoff: float = CUTOFF) -> set[tuple[int, ...]]:
    """All (i, j, shift) of the product."""
    edges = find_edges(structure, cutoff)
    rows = {(*pair, *shift) for pair, shift in zip(edges.index.T.tolist(), edges.shift.tolist(), strict=True)}
    assert len(rows) == edges.index.shape[1], "an edge is there twice"
    return rows


def brute_force(structure: Structure, cutoff: float = CUTOFF, reach: int = REACH) -> set[tuple[int, ...]]:
    """All (i, j, shift) by trying every image."""
    cell = structure.cell_angstrom if structure.cell_angstrom is not None else np.zeros((3, 3))
    positions = structure.positions_angstrom
    shifts = np.array(list(itertools.product(*(range(-reach, reach + 1) if p else (0,) for p in structure.pbc))))
    vectors = positions[None, None] + (shifts @ cell)[:, None, None] - positions[None, :, None]
    near = np.argwhere(np.linalg.norm(vectors, axis=-1) < cutoff).tolist()
    return {(i, j, *shifts[k].tolist()) for k, i, j in near if i != j or shifts[k].any()}


def by_ase(structure: Structure, cutoff: float = CUTOFF) -> set[tuple[int, ...]]:
    """The same by ASE."""
    atoms = Atoms(
        numbers=structure.numbers,
        positions=structure.positions_angstrom,
        cell=structure.cell_angstrom,
        pbc=structure.pbc,
    )
    i, j, shifts = neighbor_list("ijS", atoms, cutoff)
    return {(*pair, *shift) for pair, shift in zip(np.stack([i, j]).T.tolist(), shifts.tolist(), strict=True)}


@pytest.mark.parametrize("name", ["molecule", "skew", "small"])
@pytest.mark.parametrize("pbc", [(True, True, True), (True, True, False), (False, True, False), (False, False, False)])
def test_every_image_is_found_once(tools: Any, name: str, pbc: tuple[bool, bool, bool]) -> None:
    scene = tools.scenes()[name]
    if scene.cell_angstrom is not None:
        scene = replace(scene, pbc=pbc)
    assert edge_set(scene) == brute_force(scene) == by_ase(scene)


def test_one_atom_in_a_small_cell_neighbours_its_own_images(tools: Any) -> None:
    cubic = tools.structure([84], [[0.3, 0.3, 0.3]], cell_angstrom=3.3 * np.eye(3), pbc=(True, True, True))
    edges = find_edges(cubic, 4.0)
    assert edges.index.shape == (2, 6)
    assert edges.index.max() == 0
    assert sorted(map(tuple, np.abs(edges.shift).tolist())) == 2 * [(0, 0, 1)] + 2 * [(0, 1, 0)] + 2 * [(1, 0, 0)]


def test_a_slab_may_leave_its_open_axis_without_a_lattice_vector(tools: Any) -> None:
    cell = np.array([[2.6, 0, 0], [0.7, 2.7, 0], [0, 0, 0]])
    slab = tools.structure([29, 29], [[0, 0, 0], [1.3, 1.3, 1.8]], cell_angstrom=cell, pbc=(True, True, False))
    assert edge_set(slab) == brute_force(slab)


def test_edges_are_sorted_by_receiver_and_their_reverse_is_there(tools: Any) -> None:
    for scene in tools.scenes().values():
        edges = find_edges(scene, CUTOFF)
        assert (np.diff(edges.index[0]) >= 0).all()
        rows = edge_set(scene)
        assert rows == {(j, i, -a, -b, -c) for i, j, a, b, c in rows}


def test_an_atom_far_from_its_cell_keeps_true_edges(tools: Any) -> None:
    scene = tools.scenes()["small"]
    positions = scene.positions_angstrom.copy()
    positions[1] += np.array([400, 0, -300]) @ scene.cell_angstrom
    moved = replace(scene, positions_angstrom=positions)
    edges = find_edges(moved, CUTOFF)
    assert edges.index.shape == find_edges(scene, CUTOFF).index.shape
    i, j = edges.index
    vectors = positions[j] + edges.shift.astype(float) @ scene.cell_angstrom - positions[i]
    assert np.linalg.norm(vectors, axis=1).max() < CUTOFF


@pytest.mark.parametrize("n_atoms", [1, 2])
def test_no_neighbours_is_no_error(tools: Any, n_atoms: int) -> None:
    far = tools.structure([1] * n_atoms, [[9.0 * k, 0, 0] for k in range(n_atoms)])
    edges = find_edges(far, CUTOFF)
    assert edges.index.shape == (2, 0)
    assert edges.shift.shape == (0, 3)


@pytest.mark.parametrize("cell", [np.zeros((3, 3)), np.ones((3, 3))])
def test_a_periodic_structure_without_volume_is_refused(tools: Any, cell: Any) -> None:
    flat = tools.structure([1], [[0, 0, 0]], cell_angstrom=cell, pbc=(True, True, True))
    with pytest.raises(DataError, match=r"a k: .*volume"):
        find_edges(flat, CUTOFF)


KINDS = ("small", "one atom", "slab", "skewed")


def random_cell(number: int) -> Structure:
    """A cell of one of four kinds; atoms may lie outside of it."""
    rng, kind = np.random.default_rng(number), KINDS[number % len(KINDS)]
    low, high, n_atoms = {"small": (1.8, 3.5, 3), "one atom": (1.6, 4.2, 1), "slab": (2.2, 5.0, 4)}.get(
        kind, (2.5, 6.0, 3)
    )
    cell = np.diag(rng.uniform(low, high, 3)) + np.triu(rng.uniform(-0.4, 0.4, (3, 3)), 1)
    if kind == "skewed":
        cell[1, 0], cell[2, :2] = rng.uniform(-1, 1) * cell[0, 0], rng.uniform(-1, 1, 2) * cell[0, 0]
    cell = cell @ np.linalg.qr(rng.normal(size=(3, 3)))[0]  # turned, so that no vector lies along an axis
    pbc = (True, True, kind != "slab")
    return Structure(
        numbers=rng.integers(1, 90, n_atoms),
        positions_angstrom=rng.uniform(-0.3, 1.3, (n_atoms, 3)) @ cell,
        cell_angstrom=cell,
        pbc=pbc,
        energy_ev=0.0,
        forces_ev_per_angstrom=None,
        source="a",
        group="g",
        key=str(number),
    )


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_two_hundred_random_cells(kind: int) -> None:
    """Fifty of each kind, by a supercell that is large enough: heights of a cell say how many images a cutoff spans."""
    n_edges = 0
    for number in range(kind, 200, len(KINDS)):
        structure = random_cell(number)
        cell = structure.cell_angstrom
        assert cell is not None
        heights = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)
        spread = np.ptp(structure.positions_angstrom @ np.linalg.inv(cell), axis=0).max()
        found = edge_set(structure)
        assert found == brute_force(structure, reach=int(np.ceil(CUTOFF / heights.min() + spread)))
        n_edges += len(found)
        if KINDS[kind] == "small":
            assert heights.min() < CUTOFF
    assert n_edges > 400


@settings(max_examples=60, deadline=None)
@given(
    skew=arrays(np.float64, (3, 3), elements=st.floats(-0.9, 0.9)),
    lengths=arrays(np.float64, 3, elements=st.floats(2.2, 8.0)),
    fractions=arrays(np.float64, (3, 3), elements=st.floats(-1.5, 1.5)),
    pbc=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_any_cell(skew: Any, lengths: Any, fractions: Any, pbc: tuple[bool, bool, bool]) -> None:
    cell = np.diag(lengths) + np.tril(skew, -1)
    structure = Structure(
        numbers=np.array([1, 6, 8]),
        positions_angstrom=fractions @ cell,
        cell_angstrom=cell,
        pbc=pbc,
        energy_ev=0.0,
        forces_ev_per_angstrom=None,
        source="a",
        group="g",
        key="k",
    )
    expected = brute_force(structure)
    found = edge_set(structure)
    # An edge of length cutoff +- rounding may fall on either side.
    for i, j, *shift in found ^ expected:
        vector = structure.positions_angstrom[j] + np.array(shift) @ cell - structure.positions_angstrom[i]
        assert np.linalg.norm(vector) == pytest.approx(CUTOFF, abs=1e-9)
