"""Whatever is wrong with a file becomes one line that names it; nothing a file asks for is run."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import lmdb
import numpy as np
import pytest

from wattier_gnn.datasets import READERS
from wattier_gnn.sample import layouts
from wattier_gnn.structure import DataError, ShardError, Structure

SOURCES = ("ani1x", "qm7x", "oc20", "oc22", "mptrj", "extxyz")
NAMES = {"ani1x": "a.h5", "qm7x": "1000.hdf5", "oc22": "data.0000.lmdb", "mptrj": "a.json"}


def make(source: str, index: int) -> Structure:
    rng = np.random.default_rng(index)
    group, key = {
        "ani1x": ("CO", f"CO/{index}"),
        "qm7x": ("1", f"1/Geom-m1-i1-c1-{index}"),
        "oc20": ("random1", f"random1/frame{index}"),
        "oc22": ("1", f"1/{index}"),
        "mptrj": (f"mp-{index}", f"mp-{index}-0-0"),
    }[source]
    return Structure(
        numbers=np.array([6, 8], dtype=np.int64),
        positions_angstrom=rng.normal(size=(2, 3)),
        cell_angstrom=5 * np.eye(3),
        pbc=(True, True, True),
        energy_ev=-1.0,
        forces_ev_per_angstrom=rng.normal(size=(2, 3)),
        source=source,
        group=group,
        key=key,
    )


def write_good(folder: Path, source: str, n_structures: int = 8) -> Path:
    structures = [make(source, index) for index in range(n_structures)]
    tags = [[1, 2]] * n_structures
    if source == "oc20":
        layouts.write_oc20(folder, 0, structures, tags, [[False, False]] * n_structures)
        return folder / "0.extxyz.xz"
    path = folder / NAMES[source]
    if source == "oc22":
        layouts.write_oc22(path, structures, tags)
    else:
        write: Callable[[Path, list[Structure]], None] = getattr(layouts, f"write_{source}")
        write(path, structures)
    return path


def fails(source: str, path: Path, kind: type[DataError] = ShardError) -> str:
    """The message of reading all of `path`: one line that names the file."""
    reader = READERS[source]
    with pytest.raises(DataError) as caught:
        for shard in reader.shards(path):
            list(reader.read(shard))
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert "must" in message
    return message


@pytest.mark.parametrize("source", SOURCES)
def test_a_missing_path(source: str, tmp_path: Path) -> None:
    assert "does not exist" in fails(source, tmp_path / "nowhere", DataError)


@pytest.mark.parametrize(
    ("source", "suffix"),
    list(zip(SOURCES, ("*.h5", "*.hdf5", "*.extxyz.xz", "*.lmdb", "*.json.gz", "*.xyz"), strict=True)),
)
def test_a_folder_without_such_files(source: str, suffix: str, tmp_path: Path) -> None:
    (tmp_path / "README").write_text("nothing here")
    (tmp_path / "train").mkdir()
    assert suffix in fails(source, tmp_path, DataError)


@pytest.mark.parametrize("source", SOURCES[:-1])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.6, 0.95])
def test_a_truncated_file(source: str, fraction: float, tmp_path: Path) -> None:
    path = write_good(tmp_path, source)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    fails(source, path)


@pytest.mark.parametrize("source", SOURCES)
def test_another_format_under_the_name(source: str, tmp_path: Path) -> None:
    path = tmp_path / {**NAMES, "oc20": "0.extxyz", "extxyz": "a.xyz"}[source]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 64)
    (tmp_path / "0.txt").write_text("")
    fails(source, path)


@pytest.mark.parametrize("source", ["ani1x", "qm7x"])
def test_hdf5_of_another_dataset(source: str, tmp_path: Path) -> None:
    path = tmp_path / NAMES[source]
    with h5py.File(path, "w") as file:
        file["CO/atomic_numbers/x"] = np.zeros(2)
    assert "/CO/atomic_numbers" in fails(source, path)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("wb97x_dz.energy", np.array([b"low"] * 8), "must be numbers [8]"),
        ("wb97x_dz.energy", np.zeros((8, 2)), "is float64 [8, 2]"),
        ("wb97x_dz.forces", np.zeros((8, 3, 3)), "must be numbers [8, 2, 3]"),
        ("atomic_numbers", np.array([6.5, 8.0]), "holds fractions"),
        ("coordinates", None, "coordinates"),
    ],
)
def test_hdf5_with_a_wrong_dataset(name: str, value: Any, said: str, tmp_path: Path) -> None:
    path = write_good(tmp_path, "ani1x")
    with h5py.File(path, "r+") as file:
        del file[f"CO/{name}"]
        if value is not None:
            file[f"CO/{name}"] = value
    message = fails("ani1x", path)
    assert said in message
    assert f"/CO/{name}" in message


def test_oc20_with_more_ids_than_frames_yields_nothing(tmp_path: Path) -> None:
    path = write_good(tmp_path, "oc20")
    (tmp_path / "0.txt.xz").write_bytes(lzma.compress(b"random1,frame0,nan\n" * 9))
    assert "has 8 frames for 9 lines of ids" in fails("oc20", path)
    with pytest.raises(ShardError):
        next(READERS["oc20"].read(path))


def test_oc20_without_ids(tmp_path: Path) -> None:
    path = write_good(tmp_path, "oc20")
    (tmp_path / "0.txt.xz").unlink()
    assert "0.txt.xz" in fails("oc20", path)


def test_oc20_with_malformed_ids(tmp_path: Path) -> None:
    path = write_good(tmp_path, "oc20")
    (tmp_path / "0.txt.xz").write_bytes(lzma.compress(b"random1\n" * 8))
    with pytest.raises(ShardError, match=r"0\.txt\.xz: line 1: is 'random1'"):
        list(READERS["oc20"].read(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2\nenergy=1 pbc=F\nH 0 0 0\n", "ends after 2 of 3 lines"),
        ("1\npbc=F\nH 0 0 0\n", "has no energy"),
        ("1\nenergy=1\nH 0 zero 0\n", "ASE says"),
        ("one\nenergy=1\nH 0 0 0\n", "number of atoms"),
        ("1\nenergy=low\nH 0 0 0\n", "energy"),
    ],
)
def test_malformed_extxyz(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(text)
    message = fails("extxyz", path)
    assert said in message
    assert "frame 0" in message


def test_mptrj_yields_what_comes_before_the_damage(tmp_path: Path) -> None:
    path = write_good(tmp_path, "mptrj")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.6)])
    with pytest.raises(ShardError, match="after mp-3"):
        for index, structure in enumerate(READERS["mptrj"].read(path)):
            assert structure.key == f"mp-{index}-0-0"


def test_mptrj_truncated_under_gzip(tmp_path: Path) -> None:
    packed = gzip.compress(write_good(tmp_path, "mptrj").read_bytes())
    path = tmp_path / "b.json.gz"
    path.write_bytes(packed[: len(packed) // 2])
    fails("mptrj", path)


def _drop_force(frame: dict[str, Any]) -> None:
    del frame["force"]


def _shorten_force(frame: dict[str, Any]) -> None:
    frame["force"] = frame["force"][:1]


def _word_for_energy(frame: dict[str, Any]) -> None:
    frame["corrected_total_energy"] = "low"


def _move_xyz(frame: dict[str, Any]) -> None:
    frame["structure"]["sites"][1]["xyz"][0] += 1.0


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_drop_force, "lacks 'force'"),
        (_shorten_force, "is float64 [1, 3], but must be numbers [2, 3]"),
        (_word_for_energy, "corrected_total_energy"),
        (_move_xyz, "up to 1 Å from abc"),
    ],
)
def test_mptrj_with_a_wrong_frame(spoil: Callable[[dict[str, Any]], None], said: str, tmp_path: Path) -> None:
    path = write_good(tmp_path, "mptrj")
    materials = json.loads(path.read_text(encoding="utf-8"))
    spoil(materials["mp-2"]["mp-2-0-0"])
    path.write_text(json.dumps(materials), encoding="utf-8")
    message = fails("mptrj", path)
    assert said in message
    assert "mp-2/mp-2-0-0" in message


class _Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.target}",))


def put(path: Path, key: bytes, value: bytes | None) -> None:
    environment = lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 24)
    with environment, environment.begin(write=True) as transaction:
        if value is None:
            transaction.delete(key)
        else:
            transaction.put(key, value)


@pytest.mark.parametrize("key", [b"3", b"length"])
def test_a_malicious_pickle_is_refused_and_not_run(key: bytes, tmp_path: Path) -> None:
    path = write_good(tmp_path, "oc22")
    target = tmp_path / "was_run"
    put(path, key, pickle.dumps(_Malicious(target)))
    message = fails("oc22", path, DataError)
    assert "system" in message
    assert f"key {key.decode()}" in message
    assert not target.exists()


def test_a_malicious_pickle_inside_a_tensor_is_refused_and_not_run(tmp_path: Path) -> None:
    # torch.storage._load_from_bytes is on the list, and by itself would unpickle its argument without any list.
    path = write_good(tmp_path, "oc22")
    target = tmp_path / "was_run"
    inner = pickle.dumps(_Malicious(target), protocol=2)
    bomb = b"\x80\x02ctorch.storage\n_load_from_bytes\nB" + len(inner).to_bytes(4, "little") + inner + b"\x85R."
    put(path, b"0", bomb)
    fails("oc22", path)
    assert not target.exists()


@pytest.mark.parametrize("name", ["builtins eval", "builtins getattr", "numpy load", "torch load", "torch.hub load"])
def test_a_global_outside_the_list_is_refused(name: str, tmp_path: Path) -> None:
    path = write_good(tmp_path, "oc22")
    put(path, b"0", b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n.")
    assert name.replace(" ", ".") in fails("oc22", path, DataError)


def test_numpy_arrays_in_a_record_are_read(tmp_path: Path) -> None:
    path = write_good(tmp_path, "oc22", n_structures=1)
    fields = {"pos": np.zeros((1, 3)), "cell": np.eye(3)[None], "atomic_numbers": np.array([1]), "sid": 4, "fid": 2}
    with layouts.torch_geometric_stubs() as stubs:
        record = stubs["Data"]()
        record.__dict__ |= fields | {"energy": np.array([-3.0]), "forces": np.ones((1, 3))}
        put(path, b"0", pickle.dumps(record))
    (structure,) = READERS["oc22"].read(path)
    assert (structure.key, structure.energy_ev) == ("4/2", -3.0)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "is missing"),
        (b"\x80\x05", "cannot be unpickled"),
        (pickle.dumps({"y": 1.0}), "is a dict"),
    ],
)
def test_lmdb_with_a_wrong_record(value: bytes | None, said: str, tmp_path: Path) -> None:
    path = write_good(tmp_path, "oc22")
    put(path, b"3", value)
    message = fails("oc22", path)
    assert said in message
    assert "key 3" in message
