"""LMDB files of Open Catalyst records that are damaged or mean harm: nothing is run, the sound records are read."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from sound_files import write_good

from wattier_gnn.datasets import READERS, safe_pickle
from wattier_gnn.datasets.lmdb_file import LmdbFile
from wattier_gnn.sample import layouts
from wattier_gnn.structure import BadRecord, DataError, ShardError, Structure

N_RECORDS = 8


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An OC22 file of eight sound records."""
    return write_good(tmp_path, "oc22", N_RECORDS)


def put(path: Path, key: bytes, value: bytes | None) -> None:
    environment = lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 28)
    with environment, environment.begin(write=True) as transaction:
        if value is None:
            transaction.delete(key)
        else:
            transaction.put(key, value)


def refused(path: Path, source: str = "oc22") -> str:
    """The message of the one bad record; all others are sound."""
    found = list(READERS[source].read(path))
    (bad,) = (record for record in found if isinstance(record, BadRecord))
    assert len(found) - 1 in (N_RECORDS, N_RECORDS - 1)  # the length key is a record too many
    assert str(path) in bad.message
    assert "\n" not in bad.message
    return bad.message


class Malicious:
    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return (self.call, self.arguments)


@pytest.mark.parametrize("key", [b"3", b"length"])
@pytest.mark.parametrize("source", ["oc20", "oc22"])
def test_a_malicious_pickle_is_refused_and_not_run(key: bytes, source: str, path: Path, tmp_path: Path) -> None:
    target = tmp_path / "was_run"
    put(path, key, pickle.dumps(Malicious(os.system, f"touch {target}")))
    message = refused(path, source)
    assert "system" in message
    assert f"key {key.decode()}" in message
    assert "Nothing was run" in message
    assert not target.exists()


def test_a_malicious_pickle_inside_a_tensor_is_refused_and_not_run(path: Path, tmp_path: Path) -> None:
    # torch.storage._load_from_bytes is on the list, and by itself would unpickle its argument without any list.
    target = tmp_path / "was_run"
    inner = pickle.dumps(Malicious(os.system, f"touch {target}"), protocol=2)
    bomb = b"\x80\x02ctorch.storage\n_load_from_bytes\nB" + len(inner).to_bytes(4, "little") + inner + b"\x85R."
    put(path, b"0", bomb)
    refused(path)
    assert not target.exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "builtins getattr", "numpy load", "torch load", "torch.hub load", "posix system",
             "torch._utils _rebuild_parameter", "torch.jit load", "numpy.core.multiarray fromfile"],
)  # fmt: skip
def test_a_global_outside_the_list_is_refused(name: str, path: Path) -> None:
    put(path, b"0", b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n.")
    assert name.replace(" ", ".") in refused(path)


def storage(values: Any) -> Any:
    return torch.tensor(values).storage()


def rebuild(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Malicious:
    return Malicious(torch._utils._rebuild_tensor_v2, storage([1.0, 2.0]), offset, size, stride, False, OrderedDict())


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((10**9, 3), (0, 0), 0),
        ((10**12,), (1,), 0),
        ((2,), (1,), 1),
        ((2,), (5,), 0),
        ((-1,), (1,), 0),
        ((1,), (1,), -1),
    ],
)
def test_a_tensor_larger_than_its_storage(
    size: tuple[int, ...], stride: tuple[int, ...], offset: int, path: Path
) -> None:
    put(path, b"4", pickle.dumps(rebuild(size, stride, offset)))
    assert "key 4" in refused(path)


def zipped_storage() -> bytes:
    stream = io.BytesIO()
    torch.save(torch.zeros(4), stream)
    return stream.getvalue()


BOMBS: dict[str, Callable[[], bytes]] = {
    "an array of a terabyte": lambda: pickle.dumps(Malicious(np.ndarray, (10**12,))),
    "an array of objects": lambda: pickle.dumps(np.array([{}, []], dtype=object)),
    "bytes of an exabyte": lambda: b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b"x.",
    "a memo of 32 GiB": lambda: b"\x80\x02Nr\xff\xff\xff\x7f.",
    "a text memo of 32 GiB": lambda: b"\x80\x02Np2147483647\n.",
    "lists in lists": lambda: b"\x80\x02" + b"]q\x00" + b"".join(b"](h\x00h\x00eq\x00" for _ in range(60)) + b".",
    "a storage in a zip file": lambda: pickle.dumps(Malicious(torch.storage._load_from_bytes, zipped_storage())),
    "a scalar that is an object": lambda: pickle.dumps(np.float64(1)).replace(b"f8", b"O8"),
    "a scalar of a megabyte": lambda: pickle.dumps(np.float64(1)).replace(b"f8", b"V9"),
    "no storage": lambda: pickle.dumps(
        Malicious(torch._utils._rebuild_tensor_v2, {}, 0, (1,), (1,), False, OrderedDict())
    ),
    "an empty value": lambda: b"",
    "noise": lambda: random.Random(0).randbytes(3000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_record_that_announces_more_than_it_is(name: str, path: Path) -> None:
    put(path, b"5", BOMBS[name]())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "key 5" in refused(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


def test_nested_lists_in_a_field_are_not_unfolded(path: Path) -> None:
    inner: list[Any] = [0.0]
    for _ in range(25):  # 2**25 numbers, were it an array
        inner = [inner, inner]
    with layouts.torch_geometric_stubs() as stubs:
        record = stubs["Data"]()
        record.__dict__ |= {"pos": inner, "atomic_numbers": inner, "sid": 1, "fid": 1}
        put(path, b"5", pickle.dumps(record))
    assert "atomic_numbers" in refused(path)


def test_a_pickle_cannot_change_what_later_pickles_use(path: Path) -> None:
    # BUILD with a pair (None, {name: value}) sets attributes of whatever lies on the stack.
    for module, name in (("torch_geometric.data", "Data"), ("torch._utils", "_rebuild_tensor_v2"),
                         ("torch.storage", "_load_from_bytes"), ("collections", "OrderedDict")):  # fmt: skip
        change = f"c{module}\n{name}\n(N}}X\x05\0\0\0extraK\x01stb.".encode()
        with pytest.raises(ShardError):
            safe_pickle.load(b"\x80\x02" + change, "here")
    assert not hasattr(safe_pickle.Record, "extra")
    assert len([record for record in READERS["oc22"].read(path) if isinstance(record, Structure)]) == N_RECORDS


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "is missing"),
        (b"\x80\x05", "cannot be unpickled"),
        (pickle.dumps({"y": 1.0}), "is a dict"),
    ],
)
def test_a_wrong_record(value: bytes | None, said: str, path: Path) -> None:
    put(path, b"3", value)
    message = refused(path)
    assert said in message
    assert "key 3" in message


@pytest.mark.parametrize("length", [10**12, -1, "many", 2.5])
def test_a_wrong_length_does_not_end_the_file(length: Any, path: Path) -> None:
    put(path, b"length", pickle.dumps(length))
    assert "key length" in refused(path)


@pytest.mark.parametrize("names", [("y", "force"), ("energy", "forces")])
@pytest.mark.parametrize(("source", "group", "key"), [("oc20", "random4", "random4/frame2"), ("oc22", "4", "4/2")])
def test_labels_of_both_generations_in_both_datasets(
    names: tuple[str, str], source: str, group: str, key: str, tmp_path: Path
) -> None:
    fields = {"pos": np.zeros((1, 3)), "cell": np.eye(3)[None], "atomic_numbers": np.array([1]), "sid": 4, "fid": 2}
    with layouts.torch_geometric_stubs() as stubs:
        record = stubs["Data"]()
        record.__dict__ |= fields | {names[0]: np.float64(-3.0), names[1]: np.ones((1, 3))}
        put(tmp_path / "data.lmdb", b"0", pickle.dumps(record))
    (structure,) = READERS[source].read(tmp_path / "data.lmdb")
    assert isinstance(structure, Structure)
    assert (structure.source, structure.group, structure.key, structure.energy_ev) == (source, group, key, -3.0)


def test_the_file_reader_agrees_with_the_library(tmp_path: Path) -> None:
    rng, path = random.Random(0), tmp_path / "data.lmdb"
    with lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 28) as environment:
        with environment.begin(write=True) as transaction:
            for key in rng.sample(range(10**6), 4000):
                transaction.put(str(key).encode(), rng.randbytes(rng.choice([0, 3, 100, 2000, 2040, 9000])))
        with environment.begin(write=True) as transaction:
            for key in range(10**6):
                if key % 3 == 0:
                    transaction.delete(str(key).encode())
        with environment.begin() as transaction:
            expected = dict(transaction.cursor())
    with LmdbFile(path) as file:
        assert file.entries == len(expected)
        assert list(file.keys()) == list(expected)
        assert {key: file.get(key) for key in expected} == expected
        assert file.get(b"absent") is None


def test_no_five_bytes_kill_the_reader(path: Path, tmp_path: Path) -> None:
    sound, damaged = path.read_bytes(), tmp_path / "damaged.lmdb"
    n_read = 0
    for seed in range(120):
        rng, data = random.Random(seed), bytearray(sound)
        for _ in range(5):
            data[rng.choice([rng.randrange(len(data)), rng.randrange(3 * 4096)])] = rng.randrange(256)
        damaged.write_bytes(data)
        try:
            n_read += sum(isinstance(record, Structure) for record in READERS["oc22"].read(damaged))
        except DataError as error:
            assert str(damaged) in str(error)
    assert n_read > 60


def test_pages_in_a_circle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    (root,) = struct.unpack_from("<Q", data, 4096 + 128)  # of the second header, which a compacted copy fills
    data[root * 4096 + 10 : root * 4096 + 12] = (1).to_bytes(2, "little")  # the root becomes a branch page
    for at in struct.unpack_from("<9H", data, root * 4096 + 16):
        struct.pack_into("<HHH", data, root * 4096 + at, root, 0, 0)  # whose children are itself
    path.write_bytes(data)
    messages = [record.message for record in READERS["oc22"].read(path) if isinstance(record, BadRecord)]
    assert messages
    assert all("in a circle" in message for message in messages)


def zipped_row(**changes: Any) -> bytes:
    zeros = {"__ndarray__": [[2, 3], "float64", [0.0] * 6]}
    row = {
        "numbers": {"__ndarray__": [[2], "int64", [6, 8]]},
        "positions": zeros,
        "cell": {"__ndarray__": [[3, 3], "float64", [1.0] * 9]},
        "pbc": {"__ndarray__": [[3], "bool", [True] * 3]},
        "energy": -1.0,
        "forces": zeros,
        "data": {"sid": 1, "fid": 2},
    }
    return zlib.compress(json.dumps({name: v for name, v in (row | changes).items() if v != "drop"}).encode())


HUGE = {"__ndarray__": [[10**12, 3], "float64", [0.0]]}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (zipped_row(numbers=HUGE), "announces [1000000000000, 3] and holds 1 numbers"),
        (zipped_row(positions={"__ndarray__": [[-2, -3], "float64", [0.0] * 6]}), "is no array"),
        (zipped_row(forces={"__ndarray__": "all of them"}), "is no array"),
        (zipped_row(forces=[[0, 0, 0]]), "is int64 [1, 3], but must be numbers [2, 3]"),
        (zipped_row(energy="low"), "energy"),
        (zipped_row(energy="drop"), "has no energy"),
        (zipped_row(pbc=[2, 3, 4]), "three booleans"),
        (zipped_row(data={}), "is of system None"),
        (zlib.compress(b"[" * 100_000), "is no JSON"),
        (zlib.compress(b"[1, 2]"), "is a list"),
        (zlib.compress(b"{" + b"\xff"), "is no JSON"),
        (zlib.compress(b" " * (100 << 20)), "unpacks to more than"),
        (zipped_row()[:-9], "is cut short"),
        (b"plain", "cannot be unzipped"),
    ],
)
@pytest.mark.parametrize("source", ["oc20", "oc22"])
def test_a_wrong_row_of_an_aselmdb(value: bytes, said: str, source: str, tmp_path: Path) -> None:
    path = tmp_path / "data.aselmdb"
    for key, row in ((b"1", zipped_row()), (b"2", value), (b"10", zipped_row()), (b"nextid", zlib.compress(b"11"))):
        put(path, key, row)
    first, bad, last = READERS[source].read(path)
    assert isinstance(first, Structure)
    assert isinstance(last, Structure)
    assert isinstance(bad, BadRecord)
    assert said in bad.message
    assert "key 2" in bad.message
