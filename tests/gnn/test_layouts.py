"""What our writers write, our readers and independent readers read back."""

from __future__ import annotations

import io
import json
import lzma
import pickletools
import sys
from pathlib import Path
from typing import Any

import h5py
import lmdb
import numpy as np
import pytest
from ase.io import read as ase_read

from wattier_gnn.datasets import READERS, json_stream
from wattier_gnn.sample import layouts
from wattier_gnn.structure import Structure

REAL_OC22 = Path(__file__).resolve().parents[3] / "shared/data/oc22_s2ef/lmdb/train/data.0000.lmdb"


def make(source: str, group: str, key: str, seed: int, periodic: bool = True) -> Structure:
    rng = np.random.default_rng(seed)
    return Structure(
        numbers=np.array([1, 6, 8, 29], dtype=np.int64),
        positions_angstrom=rng.normal(size=(4, 3)),
        cell_angstrom=rng.normal(size=(3, 3)) + 6 * np.eye(3) if periodic else None,
        pbc=(periodic,) * 3,
        energy_ev=float(rng.normal() * 1000),
        forces_ev_per_angstrom=rng.normal(size=(4, 3)),
        source=source,
        group=group,
        key=key,
    )


def assert_equal(found: Structure, expected: Structure, atol: float) -> None:
    assert (found.source, found.group, found.key, found.pbc) == (
        expected.source,
        expected.group,
        expected.key,
        expected.pbc,
    )
    np.testing.assert_array_equal(found.numbers, expected.numbers)
    assert found.energy_ev == pytest.approx(expected.energy_ev, abs=1e-7, nan_ok=True)
    np.testing.assert_allclose(found.positions_angstrom, expected.positions_angstrom, atol=atol)
    assert found.forces_ev_per_angstrom is not None
    assert expected.forces_ev_per_angstrom is not None
    np.testing.assert_allclose(found.forces_ev_per_angstrom, expected.forces_ev_per_angstrom, atol=atol)
    if expected.cell_angstrom is None:
        assert found.cell_angstrom is None
    else:
        assert found.cell_angstrom is not None
        np.testing.assert_allclose(found.cell_angstrom, expected.cell_angstrom, atol=atol)


def read_back(source: str, path: Path, expected: list[Structure], atol: float) -> None:
    reader = READERS[source]
    found = {structure.key: structure for shard in reader.shards(path) for structure in reader.read(shard)}
    assert set(found) == {structure.key for structure in expected}
    for structure in expected:
        assert_equal(found[structure.key], structure, atol)


def test_ani1x(tmp_path: Path) -> None:
    expected = [make("ani1x", "CHCuO", f"CHCuO/{row}", row, periodic=False) for row in range(3)]
    layouts.write_ani1x(tmp_path / "a.h5", expected)
    read_back("ani1x", tmp_path, expected, atol=1e-5)
    with h5py.File(tmp_path / "a.h5") as file:
        group = file["CHCuO"]
        assert group["atomic_numbers"].dtype == np.uint8
        assert group["coordinates"].dtype == np.float32
        assert group["wb97x_dz.energy"][1] * 27.211386245988 == pytest.approx(expected[1].energy_ev)


def test_ani1x_refuses_isomers_in_another_order(tmp_path: Path) -> None:
    first, second = (make("ani1x", "CHCuO", f"CHCuO/{row}", row, periodic=False) for row in range(2))
    first.numbers[:] = first.numbers[::-1].copy()
    with pytest.raises(ValueError, match="different orders"):
        layouts.write_ani1x(tmp_path / "a.h5", [first, second])


def test_qm7x(tmp_path: Path) -> None:
    keys = ["1/Geom-m1-i1-c1-1", "1/Geom-m1-i1-c1-2", "12/Geom-m12-i1-c1-1"]
    expected = [make("qm7x", key.split("/")[0], key, seed, periodic=False) for seed, key in enumerate(keys)]
    layouts.write_qm7x(tmp_path / "1000.hdf5", expected, {"12": "CO"})
    read_back("qm7x", tmp_path, expected, atol=0)
    with h5py.File(tmp_path / "1000.hdf5") as file:
        assert file["12"].attrs["smiles"] == "CO"
        assert file[keys[1]]["ePBE0"].shape == (1,)
        assert set(file[keys[1]]) == {"atNUM", "atXYZ", "ePBE0", "pbe0FOR"}


def test_oc20(tmp_path: Path) -> None:
    expected = [make("oc20", f"random{n}", f"random{n}/frame{n + 3}", n) for n in range(4)]
    tags, fixed = [[0, 0, 1, 2]] * 2, [[True, False, False, False]] * 2
    layouts.write_oc20(tmp_path, 2, expected[:2], tags, fixed)
    layouts.write_oc20(tmp_path, 10, expected[2:], tags, fixed)
    read_back("oc20", tmp_path, expected, atol=1e-8)
    assert [shard.name for shard in READERS["oc20"].shards(tmp_path)] == ["2.extxyz.xz", "10.extxyz.xz"]
    atoms: Any = ase_read(tmp_path / "2.extxyz.xz", index=1, format="extxyz")
    assert atoms.get_potential_energy() == pytest.approx(expected[1].energy_ev)
    assert atoms.get_tags().tolist() == [0, 0, 1, 2]
    assert atoms.constraints[0].index.tolist() == [0]
    assert lzma.decompress((tmp_path / "2.txt.xz").read_bytes()) == b"random0,frame3,nan\nrandom1,frame4,nan\n"


def test_an_unpacked_shard_is_not_read_twice(tmp_path: Path) -> None:
    layouts.write_oc20(tmp_path, 0, [make("oc20", "random1", "random1/frame0", 0)], [[0] * 4], [[False] * 4])
    for name in ("0.extxyz", "0.txt"):
        (tmp_path / name).write_bytes(lzma.decompress((tmp_path / f"{name}.xz").read_bytes()))
    assert [shard.name for shard in READERS["oc20"].shards(tmp_path)] == ["0.extxyz"]


def test_oc22(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_geometric", None)  # importing it would fail: reading needs no PyG
    expected = [make("oc22", str(n), f"{n}/{n + 7}", n) for n in range(12)]
    layouts.write_oc22(tmp_path / "data.0000.lmdb", expected, [[0, 1, 2, 2]] * 12)
    read_back("oc22", tmp_path, expected, atol=1e-5)
    keys = [structure.key for structure in READERS["oc22"].read(tmp_path / "data.0000.lmdb")]
    assert keys == [structure.key for structure in expected]  # 2 before 10
    assert sys.modules["torch_geometric"] is None  # and leaves no stub behind


def pickle_shape(path: Path) -> list[str]:
    """The opcodes of record 0 and their short arguments: all but numbers and tensor bytes."""
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as environment, environment.begin() as view:
        record = bytes(view.get(b"0") or b"")
    shape = []
    for opcode, argument, _ in pickletools.genops(io.BytesIO(record)):
        numeric = opcode.name in ("BININT1", "BININT2", "BININT", "BINFLOAT", "FRAME", "BINBYTES", "SHORT_BINBYTES")
        shape.append("number" if numeric else f"{opcode.name} {argument}")
    return shape


def test_oc22_records_are_pickled_as_the_released_ones(tmp_path: Path) -> None:
    if not REAL_OC22.is_file():
        pytest.skip(f"the genuine sample is not part of the repository and is not at {REAL_OC22}")
    layouts.write_oc22(tmp_path / "data.lmdb", [make("oc22", "1", "1/2", 0)], [[0, 1, 2, 2]])
    assert pickle_shape(tmp_path / "data.lmdb") == pickle_shape(REAL_OC22)


@pytest.mark.parametrize("chunk", [50, 1 << 20])
def test_mptrj(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(json_stream, "CHUNK_CHARACTERS", chunk)  # small: a frame spans many chunks
    expected = [make("mptrj", f"mp-{n // 2}", f"mp-{n // 2}-0-{n}", n) for n in range(4)]
    layouts.write_mptrj(tmp_path / "a.json", expected)
    read_back("mptrj", tmp_path, expected, atol=1e-7)
    released = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    frame = released["mp-1"]["mp-1-0-3"]
    assert frame["energy_per_atom"] * 4 == pytest.approx(expected[3].energy_ev)
    lattice = frame["structure"]["lattice"]
    assert expected[3].cell_angstrom is not None
    b, c = expected[3].cell_angstrom[1:]
    assert np.cos(np.radians(lattice["alpha"])) == pytest.approx(b @ c / lattice["b"] / lattice["c"])


def test_mptrj_writes_an_unknown_energy_as_null(tmp_path: Path) -> None:
    structure = make("mptrj", "mp-1", "mp-1-0-0", 0)
    object.__setattr__(structure, "energy_ev", float("nan"))
    layouts.write_mptrj(tmp_path / "a.json", [structure])
    assert '"corrected_total_energy":null' in (tmp_path / "a.json").read_text(encoding="utf-8")
    read_back("mptrj", tmp_path, [structure], atol=1e-7)


def test_layouts_of_crystals_refuse_molecules(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no cell"):
        layouts.write_mptrj(tmp_path / "a.json", [make("mptrj", "mp-1", "mp-1-0-0", 0, periodic=False)])
