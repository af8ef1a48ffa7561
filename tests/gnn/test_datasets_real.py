"""Readers against genuine samples of each released layout, spot-checked by independent readers."""

from __future__ import annotations

import gzip
import io
import json
import lzma
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
from ase.io import read as ase_read

from wattier_gnn.datasets import READERS
from wattier_gnn.structure import BadRecord, Structure

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
HARTREE_EV = 27.211386245988

pytestmark = pytest.mark.skipif(
    not REAL.is_dir(), reason=f"the genuine samples are not part of the repository and are not at {REAL}"
)


@cache
def structures(name: str, inside: str) -> list[Structure]:
    reader = READERS[name]
    found = [record for shard in reader.shards(REAL / inside) for record in reader.read(shard)]
    assert not [record for record in found if isinstance(record, BadRecord)]
    return [record for record in found if isinstance(record, Structure)]


def largest_forces(found: list[Structure]) -> Any:
    forces = [structure.forces_ev_per_angstrom for structure in found]
    return np.array([np.linalg.norm(force, axis=1).max() for force in forces if force is not None])


class Counts(NamedTuple):
    """The figures of COUNTS.md: structures, those with a force above 100 eV/Å, fewest and most atoms, groups."""

    structures: int
    strong: int
    fewest: int | None
    most: int | None
    groups: int | None


@pytest.mark.parametrize(
    ("name", "inside", "counts"),
    [
        ("ani1x", "ani1x", Counts(1560, 0, 6, 47, 83)),
        ("qm7x", "qm7x", Counts(377, 0, 3, 14, 38)),
        ("oc20", "oc20_s2ef/0.extxyz.xz", Counts(1313, 3, 33, 185, None)),
        ("oc20", "oc20_s2ef/1.extxyz.xz", Counts(1313, 2, 40, 166, None)),
        ("oc22", "oc22_s2ef/lmdb/train", Counts(16, 0, None, None, 16)),
        ("oc22", "oc22_s2ef/lmdb/val_id", Counts(16, 0, None, None, 16)),
        ("mptrj", "mptrj", Counts(240, 8, 2, 60, 230)),
        ("extxyz", "mptrj/mptrj-random-1k.xyz.xz", Counts(1000, 0, 2, 192, None)),
        ("extxyz", "mptrj/mptrj-highest-stress-1k.xyz.xz", Counts(1000, 23, 1, 120, None)),
        ("extxyz", "oc22_s2ef", Counts(33, 0, 44, 146, None)),
        ("oc22", "oc22_s2ef/oc22_33.aselmdb", Counts(33, 0, 44, 146, 33)),
        ("ase_db", "oc22_s2ef/oc22_33.aselmdb", Counts(33, 0, 44, 146, None)),
    ],
)
def test_counts_equal_those_of_the_collection(name: str, inside: str, counts: Counts) -> None:
    found = structures(name, inside)
    assert len(found) == counts.structures
    assert len({structure.key for structure in found}) == counts.structures
    assert {structure.source for structure in found} == {name}
    forces = largest_forces(found)
    assert len(forces) == counts.structures
    assert int((forces > 100).sum()) == counts.strong
    sizes = [len(structure.numbers) for structure in found]
    if counts.fewest is not None:
        assert (min(sizes), max(sizes)) == (counts.fewest, counts.most)
    if counts.groups is not None:
        assert len({structure.group for structure in found}) == counts.groups


def test_ani1x_is_converted_from_hartree() -> None:
    found = {structure.key: structure for structure in structures("ani1x", "ani1x")}
    with h5py.File(REAL / "ani1x" / "ani1x_layout_wb97x_631gd.h5") as file:
        group = file["C2H4O"]
        structure = found["C2H4O/3"]
        assert structure.group == "C2H4O"
        assert structure.cell_angstrom is None
        assert structure.pbc == (False, False, False)
        assert structure.energy_ev == pytest.approx(group["wb97x_dz.energy"][3] * HARTREE_EV, abs=1e-9)
        np.testing.assert_array_equal(structure.numbers, group["atomic_numbers"])
        np.testing.assert_allclose(structure.positions_angstrom, group["coordinates"][3])
        assert structure.forces_ev_per_angstrom is not None
        np.testing.assert_allclose(
            structure.forces_ev_per_angstrom, group["wb97x_dz.forces"][3].astype(float) * HARTREE_EV
        )


def test_qm7x_takes_the_dispersion_free_pair() -> None:
    found = {structure.key: structure for structure in structures("qm7x", "qm7x")}
    with h5py.File(REAL / "qm7x" / "1000.hdf5") as file:
        group = file["10/Geom-m1-i1-c1-opt"]
        structure = found["10/Geom-m1-i1-c1-opt"]
        assert structure.energy_ev == group["ePBE0"][0]
        assert structure.forces_ev_per_angstrom is not None
        np.testing.assert_array_equal(structure.forces_ev_per_angstrom, group["pbe0FOR"])
        np.testing.assert_array_equal(structure.positions_angstrom, group["atXYZ"])


def test_oc20_keeps_raw_forces_of_fixed_atoms() -> None:
    found = structures("oc20", "oc20_s2ef/0.extxyz.xz")
    # Unpacked first: ASE seeks back after each frame, which on the xz file itself takes minutes.
    text = lzma.decompress((REAL / "oc20_s2ef" / "0.extxyz.xz").read_bytes()).decode()
    for index in (0, 700):
        atoms: Any = ase_read(io.StringIO(text), index=index, format="extxyz")
        structure = found[index]
        fixed = atoms.constraints[0].index
        assert structure.energy_ev == atoms.get_potential_energy()
        assert structure.forces_ev_per_angstrom is not None
        np.testing.assert_array_equal(structure.forces_ev_per_angstrom, atoms.get_forces(apply_constraint=False))
        assert np.abs(structure.forces_ev_per_angstrom[fixed]).max() > 0
        np.testing.assert_array_equal(structure.cell_angstrom, atoms.cell.array)
        assert structure.pbc == (True, True, True)
    assert found[0].group == "random1000100"
    assert found[0].key == "random1000100/frame0"


def test_oc22_pickles_equal_the_converted_file() -> None:
    converted = {
        str(atoms.info["sid"]): atoms for atoms in ase_read(REAL / "oc22_s2ef" / "oc22_33.extxyz", index=":16")
    }
    for structure in structures("oc22", "oc22_s2ef/lmdb/train"):
        atoms = converted[structure.group]
        assert structure.energy_ev == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
        np.testing.assert_array_equal(structure.numbers, atoms.numbers)
        np.testing.assert_allclose(structure.positions_angstrom, atoms.positions, atol=1e-5)
        assert structure.forces_ev_per_angstrom is not None
        assert structure.cell_angstrom is not None
        np.testing.assert_allclose(structure.forces_ev_per_angstrom, atoms.get_forces(), atol=1e-5)
        np.testing.assert_allclose(structure.cell_angstrom, atoms.cell.array, atol=1e-5)


def test_mptrj_positions_of_skew_cells_equal_the_given_ones() -> None:
    with gzip.open(REAL / "mptrj" / "MPtrj_sample_layout.json.gz", "rt", encoding="utf-8") as stream:
        released = json.load(stream)
    skew = 0
    for structure in structures("mptrj", "mptrj"):
        frame = released[structure.group][structure.key]
        sites = frame["structure"]["sites"]
        np.testing.assert_allclose(structure.positions_angstrom, [site["xyz"] for site in sites], atol=1e-5)
        assert structure.energy_ev == frame["corrected_total_energy"]
        np.testing.assert_array_equal(structure.forces_ev_per_angstrom, frame["force"])
        assert structure.cell_angstrom is not None
        skew += not np.allclose(structure.cell_angstrom, structure.cell_angstrom.T, atol=1e-3)
    assert skew > 100  # a transposed lattice would not go unnoticed


def test_the_rows_of_an_aselmdb_equal_the_converted_file() -> None:
    converted: Any = ase_read(REAL / "oc22_s2ef" / "oc22_33.extxyz", index=":")
    by_system = {(atoms.info["sid"], atoms.info["fid"]): atoms for atoms in converted}
    for structure in structures("oc22", "oc22_s2ef/oc22_33.aselmdb"):
        system, frame = structure.key.split("/")
        atoms = by_system[int(system), int(frame)]
        assert structure.group == system
        assert structure.energy_ev == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
        np.testing.assert_array_equal(structure.numbers, atoms.numbers)
        np.testing.assert_allclose(structure.positions_angstrom, atoms.positions, atol=1e-7)
        assert structure.cell_angstrom is not None
        assert structure.forces_ev_per_angstrom is not None
        np.testing.assert_allclose(structure.cell_angstrom, atoms.cell.array, atol=1e-7)
        np.testing.assert_allclose(structure.forces_ev_per_angstrom, atoms.get_forces(), atol=1e-7)


def test_mptrj_equals_the_same_frames_in_another_file() -> None:
    others: dict[str, Any] = {}
    for name in ("mptrj-random-1k", "mptrj-highest-stress-1k"):
        text = lzma.decompress((REAL / "mptrj" / f"{name}.xyz.xz").read_bytes()).decode()
        frames: Any = ase_read(io.StringIO(text), index=":", format="extxyz")
        others |= {str(atoms.info["mptrj_snapshot_id"]): atoms for atoms in frames}
    compared = 0
    for structure in structures("mptrj", "mptrj"):
        atoms = others.get(structure.key)
        if atoms is None:
            continue
        compared += 1
        assert structure.group == atoms.info["mptrj_traj_id"]
        np.testing.assert_array_equal(structure.numbers, atoms.numbers)
        assert structure.cell_angstrom is not None
        assert structure.forces_ev_per_angstrom is not None
        np.testing.assert_allclose(structure.cell_angstrom, atoms.cell.array, atol=1e-5)
        np.testing.assert_allclose(structure.positions_angstrom, atoms.positions, atol=1e-4)
        np.testing.assert_allclose(
            structure.forces_ev_per_angstrom, atoms.get_forces(apply_constraint=False), atol=1e-5
        )
    assert compared > 200


@pytest.mark.parametrize(
    ("name", "inside", "farthest_angstrom", "pairs"),
    [("ani1x", "ani1x", 0.3, 200), ("qm7x", "qm7x", 0.3, 40), ("oc20", "oc20_s2ef", 0.05, 1000)],
)
def test_energies_fall_along_the_forces(name: str, inside: str, farthest_angstrom: float, pairs: int) -> None:
    """The trapezoidal rule between neighbouring geometries: units and sign of forces agree with those of energies."""
    rises, works = [], []
    found = structures(name, inside)
    for first, second in pairwise(found):
        if first.group != second.group or not np.array_equal(first.numbers, second.numbers):
            continue
        step = second.positions_angstrom - first.positions_angstrom
        if not 1e-6 < np.abs(step).max() < farthest_angstrom:
            continue
        assert first.forces_ev_per_angstrom is not None
        assert second.forces_ev_per_angstrom is not None
        rises.append(second.energy_ev - first.energy_ev)
        works.append(-0.5 * float(np.sum((first.forces_ev_per_angstrom + second.forces_ev_per_angstrom) * step)))
    assert len(rises) > pairs
    slope = np.dot(rises, works) / np.dot(works, works)
    assert slope == pytest.approx(1.0, abs=0.05)
    assert np.corrcoef(rises, works)[0, 1] > 0.99
