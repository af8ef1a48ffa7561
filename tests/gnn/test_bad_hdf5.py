"""ANI-1x and QM7-X files that are damaged, announce what they do not hold, or point at other files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from sound_files import NAMES, survey, write_good

from wattier_gnn.cleaning import removal_reason
from wattier_gnn.datasets import READERS
from wattier_gnn.structure import Structure


@pytest.mark.parametrize("source", ["ani1x", "qm7x"])
def test_hdf5_of_another_dataset(source: str, tmp_path: Path) -> None:
    path = tmp_path / NAMES[source]
    with h5py.File(path, "w") as file:
        file["CO/atomic_numbers/x"] = np.zeros(2)
    keys, (message,) = survey(source, path)
    assert keys == []
    assert "/CO/atomic_numbers" in message


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("wb97x_dz.energy", np.array([b"low"] * 8), "must be a dataset of numbers [8]"),
        ("wb97x_dz.energy", np.zeros((8, 2)), "is float64 [8, 2]"),
        ("wb97x_dz.forces", np.zeros((8, 3, 3)), "must be a dataset of numbers [8, 2, 3]"),
        ("atomic_numbers", np.array([6.5, 8.0]), "holds fractions"),
        ("atomic_numbers", np.float64(6), "is float64 []"),
        ("coordinates", None, "coordinates"),
    ],
)
def test_hdf5_with_a_wrong_dataset(name: str, value: Any, said: str, tmp_path: Path) -> None:
    path = write_good(tmp_path, "ani1x")
    with h5py.File(path, "r+") as file:
        file.copy("CO", "C2O2")
        del file[f"CO/{name}"]
        if value is not None:
            file[f"CO/{name}"] = value
    keys, (message,) = survey("ani1x", path)
    assert said in message
    assert f"/CO/{name}" in message
    assert keys == [f"C2O2/{row}" for row in range(8)]  # the other formula is read


def test_one_bad_conformation_of_qm7x(tmp_path: Path) -> None:
    path = write_good(tmp_path, "qm7x")
    with h5py.File(path, "r+") as file:
        file["1/Geom-m1-i1-c1-0/note"] = "fine"
        del file["1/Geom-m1-i1-c1-3/pbe0FOR"]
        file["1/Geom-m1-i1-c1-3/pbe0FOR"] = np.zeros((3, 3))
        file["2"] = 3
    keys, messages = survey("qm7x", path)
    assert len(keys) == 7
    assert [("/1/Geom-m1-i1-c1-3/pbe0FOR" in messages[0]), ("/2: is a Dataset" in messages[1])] == [True, True]


def test_hdf5_that_announces_what_it_does_not_hold(tmp_path: Path) -> None:
    path = write_good(tmp_path, "ani1x")
    with h5py.File(path, "r+") as file:
        group = file.create_group("H")
        group["atomic_numbers"] = np.array([1], dtype=np.uint8)
        group.create_dataset("coordinates", (10**12, 1, 3), "f4", chunks=(1000, 1, 3), compression="gzip")
    keys, (message,) = survey("ani1x", path)
    assert len(keys) == 8
    assert "announces 12,000,000,000,000 bytes of which 0 are stored" in message


def test_hdf5_whose_chunks_unpack_to_gigabytes(tmp_path: Path) -> None:
    path = write_good(tmp_path, "qm7x")
    with h5py.File(path, "r+") as file:
        group = file.create_group("7/Geom-m1-i1-c1-1")
        group.create_dataset("atNUM", (10**8,), "i8", chunks=(10**8,), compression="gzip")
    keys, (message,) = survey("qm7x", path)
    assert len(keys) == 8
    assert "is stored in chunks of 800,000,000 bytes" in message


def test_hdf5_that_points_at_other_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(24)))
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["atomic_numbers"] = np.array([1])
    path = write_good(tmp_path, "ani1x")
    with h5py.File(path, "r+") as file:
        file["H"] = h5py.ExternalLink(other.name, "/")
        file["He/atomic_numbers"] = np.array([2], dtype=np.uint8)
        file["He"].create_dataset("coordinates", (2, 1, 3), "f4", external=[(str(secret), 0, 24)])
    _, messages = survey("ani1x", path)
    assert "is a link to 'other.h5'" in messages[0]
    assert "takes its values from another file" in messages[1]


@pytest.mark.parametrize("source", ["ani1x", "qm7x"])
def test_a_path_that_leads_through_another_file_is_not_followed(source: str, tmp_path: Path) -> None:
    path, other = write_good(tmp_path, source), tmp_path / "other.h5"
    other.write_bytes(path.read_bytes())
    with h5py.File(path, "w") as file:
        file["door"] = h5py.ExternalLink(other.name, "/")
        with h5py.File(other) as there:
            for name in there:
                file[f"a{name}"] = h5py.SoftLink(f"/door/{name}")
        file["broken"] = h5py.SoftLink("/nowhere")
    keys, messages = survey(source, path)
    assert keys == []
    assert any("is a link to '/door/" in message for message in messages)
    assert any("/broken: is a link to '/nowhere'" in message for message in messages)


@pytest.mark.parametrize(("number", "reason"), [(0, "unknown element"), (119, "unknown element"), (None, "no atoms")])
def test_impossible_atoms_are_left_to_cleaning(number: int | None, reason: str, tmp_path: Path) -> None:
    numbers = np.array([] if number is None else [number], dtype=np.uint8)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group["atomic_numbers"] = numbers
        group["coordinates"], group["wb97x_dz.forces"] = (np.zeros((1, len(numbers), 3), "f4") for _ in range(2))
        group["wb97x_dz.energy"] = np.zeros(1)
    (found,) = READERS["ani1x"].read(path)
    assert isinstance(found, Structure)
    assert removal_reason(found, 100.0) == reason
