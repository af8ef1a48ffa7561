"""ASE databases and trajectories: what ASE writes is read as ASE reads it, and what is damaged is told."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.db import connect
from ase.io import read as ase_read
from ase.io import write as ase_write
from ase.io.trajectory import Trajectory

from wattier_gnn.datasets import READERS
from wattier_gnn.structure import BadRecord, ShardError, Structure

SKEW = np.array([[5.1, 0.0, 0.0], [1.9, 4.7, 0.0], [-1.3, 0.8, 6.6]])
N_FRAMES = 6


def frames(same_atoms: bool = True) -> list[Atoms]:
    """Labelled frames in a skew cell, periodic along two vectors, with a fixed atom whose raw force is not 0."""
    rng = np.random.default_rng(2)
    found = []
    for index in range(N_FRAMES):
        symbols = "CuOH2" if same_atoms or index % 2 else "CuO"
        atoms = Atoms(symbols, rng.normal(size=(len(Atoms(symbols)), 3)), cell=SKEW, pbc=(True, True, False))
        forces = rng.normal(size=(len(atoms), 3))
        atoms.calc = SinglePointCalculator(atoms, energy=float(-100 * rng.random()), forces=forces)
        atoms.set_constraint(FixAtoms([0]))
        found.append(atoms)
    return found


def write(path: Path, same_atoms: bool = True) -> list[Atoms]:
    written = frames(same_atoms)
    if path.suffix == ".traj":
        ase_write(path, written)
    else:
        with connect(path) as database:
            for index, atoms in enumerate(written):
                database.write(atoms, group=f"g{index // 2}", data={"note": [1, 2]})
    return written


@pytest.mark.parametrize("same_atoms", [True, False])
@pytest.mark.parametrize(
    ("source", "name"), [("ase_db", "a.db"), ("ase_db", "a.json"), ("ase_db", "a.traj"), ("oc22", "run7.traj")]
)
def test_what_ase_writes_is_read_as_ase_reads_it(source: str, name: str, same_atoms: bool, tmp_path: Path) -> None:
    path = tmp_path / name
    write(path, same_atoms)
    expected: Any = ase_read(path, index=":")
    found = list(READERS[source].read(path))
    assert READERS[source].shards(tmp_path) == [path]
    assert len(found) == len(expected) == N_FRAMES
    for index, (structure, atoms) in enumerate(zip(found, expected, strict=True)):
        assert isinstance(structure, Structure)
        np.testing.assert_array_equal(structure.numbers, atoms.numbers)
        np.testing.assert_array_equal(structure.positions_angstrom, atoms.positions)
        np.testing.assert_array_equal(structure.cell_angstrom, atoms.cell.array)
        assert structure.pbc == (True, True, False)
        assert structure.energy_ev == atoms.get_potential_energy(apply_constraint=False)
        assert structure.forces_ev_per_angstrom is not None
        np.testing.assert_array_equal(structure.forces_ev_per_angstrom, atoms.get_forces(apply_constraint=False))
        assert np.abs(structure.forces_ev_per_angstrom[0]).max() > 0  # of the fixed atom
        assert structure.source == source
        assert structure.group == (path.stem if path.suffix == ".traj" else f"g{index // 2}")
    assert len({structure.key for structure in found if isinstance(structure, Structure)}) == N_FRAMES


@pytest.mark.parametrize("name", ["a.db", "a.json"])
def test_molecules_without_forces_are_grouped_by_formula(name: str, tmp_path: Path) -> None:
    atoms = Atoms("OH2", np.eye(3))
    atoms.calc = SinglePointCalculator(atoms, energy=-3.0)
    with connect(tmp_path / name) as database:
        database.write(atoms)
        database.write(Atoms("He"))  # no energy
    structure, bad = READERS["ase_db"].read(tmp_path / name)
    assert isinstance(structure, Structure)
    assert (structure.cell_angstrom, structure.pbc, structure.group) == (None, (False, False, False), "H2O")
    assert structure.forces_ev_per_angstrom is None
    assert isinstance(bad, BadRecord)
    assert "row 2: has no energy" in bad.message


def test_a_database_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    sqlite3.connect(path).close()
    path.touch()
    before = path.read_bytes()
    with pytest.raises(ShardError, match="has no table 'systems'"):
        list(READERS["ase_db"].read(path))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.97])
@pytest.mark.parametrize("name", ["a.db", "a.json", "a.traj"])
def test_a_truncated_file(name: str, fraction: float, tmp_path: Path) -> None:
    path = tmp_path / name
    written = write(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    found: list[Structure | BadRecord] = []
    try:
        found.extend(READERS["ase_db"].read(path))
    except ShardError as error:
        assert str(path) in str(error)
    else:  # the tables' indices are not needed
        assert len(found) == N_FRAMES
    for structure in found:
        if isinstance(structure, Structure):  # what is read in spite of the damage is right
            assert any(np.array_equal(structure.positions_angstrom, atoms.positions) for atoms in written)


@pytest.mark.parametrize("name", ["a.db", "a.json", "a.traj", "a.aselmdb"])
def test_a_picture_under_the_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 64)
    with pytest.raises(ShardError, match=str(path)):
        list(READERS["ase_db"].read(path))


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE systems SET positions = x'0011' WHERE id = 3", "positions"),
        ("UPDATE systems SET numbers = 'no' WHERE id = 3", "numbers"),
        ("UPDATE systems SET numbers = zeroblob(70000000) WHERE id = 3", "SQLite says string or blob too big"),
        ("UPDATE systems SET forces = zeroblob(24) WHERE id = 3", "forces"),
        ("UPDATE systems SET energy = 'low' WHERE id = 3", "energy"),
        ("UPDATE systems SET pbc = 99 WHERE id = 3", "pbc"),
        ("UPDATE systems SET key_value_pairs = '[[[' WHERE id = 3", "key_value_pairs"),
    ],
)
def test_a_wrong_row_of_a_table(statement: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    write(path)
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    connection.close()
    found = list(READERS["ase_db"].read(path))
    (bad,) = (record for record in found if isinstance(record, BadRecord))
    assert len(found) == N_FRAMES
    assert "row 3: " in bad.message
    assert said in bad.message


def test_a_view_that_makes_up_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE VIEW systems AS WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n) SELECT id FROM n"
        )
    connection.close()
    with pytest.raises(ShardError, match="has no table 'systems'"):
        list(READERS["ase_db"].read(path))


def replace_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.update({"3": 7}), "row 3: is a int"),
        (lambda rows: rows["3"].pop("positions"), "row 3: has no positions"),
        (lambda rows: rows["3"]["positions"].update({"__ndarray__": [[10**12], "float64", [0]]}), "announces"),
        (lambda rows: rows["3"].update(numbers={"__ase_objtype__": "atoms"}), "is no array"),
    ],
)
def test_a_wrong_row_of_a_json_database(change: Callable[[dict[str, Any]], None], said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write(path)
    replace_json(path, change)
    found = list(READERS["ase_db"].read(path))
    (bad,) = (record for record in found if isinstance(record, BadRecord))
    assert len(found) == N_FRAMES
    assert said in bad.message


def overwrite(data: bytes, old: bytes, new: bytes) -> bytes:
    """`data` with the third `old` replaced by as many bytes."""
    parts = data.split(old, 3)
    return old.join(parts[:3]) + new.ljust(len(old)) + parts[3]


POSITIONS = b'"positions.": {"ndarray": '


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (POSITIONS + b"[[4, 3]", POSITIONS + b"[[9**9]", "is no JSON"),
        (POSITIONS + b"[[4, 3]", POSITIONS + b"[[9999]", "announces"),
        (POSITIONS + b"[[4, 3]", POSITIONS + b"[[-4,3]", "must be [shape"),
        (POSITIONS + b'[[4, 3], "float64"', POSITIONS + b'[[4, 3], "object"', "must be [shape"),
        (b'"energy": ', b'"energx": ', "has no energy"),
    ],
)
def test_a_wrong_frame_of_a_trajectory(old: bytes, new: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.traj"
    write(path)
    path.write_bytes(overwrite(path.read_bytes(), old, new))
    found = list(READERS["oc22"].read(path))
    (bad,) = (record for record in found if isinstance(record, BadRecord))
    assert len(found) == N_FRAMES
    assert said in bad.message
    assert "frame 2" in bad.message


@pytest.mark.parametrize("count", [-1, 10**12])
def test_a_trajectory_that_announces_frames(count: int, tmp_path: Path) -> None:
    path = tmp_path / "a.traj"
    write(path)
    data = bytearray(path.read_bytes())
    struct.pack_into("<q", data, 32, count)
    path.write_bytes(data)
    with pytest.raises(ShardError, match=f"announces {count} frames"):
        list(READERS["oc22"].read(path))


def test_the_frames_of_an_open_catalyst_trajectory_share_a_group(tmp_path: Path) -> None:
    with Trajectory(str(tmp_path / "K2O_1_x.traj"), "w") as trajectory:
        for atoms in frames():
            trajectory.write(atoms)
    found = list(READERS["oc22"].read(tmp_path / "K2O_1_x.traj"))
    keys = [(record.group, record.key) for record in found if isinstance(record, Structure)]
    assert keys == [("K2O_1_x", f"K2O_1_x/{index}") for index in range(N_FRAMES)]
