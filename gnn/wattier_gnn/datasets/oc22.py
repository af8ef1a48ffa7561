"""OC22 S2EF-Total as released: LMDB files of pickled torch_geometric records, keys 0, 1, 2 ... in ASCII.

Tran et al., "The Open Catalyst 2022 (OC22) dataset and challenges", ACS Catal. 13, 3066 (2023). The container of
fairchem 1.x's OC20 LMDBs is the same; they differ in the names of the labels, and both are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import numpy as np
from numpy.typing import NDArray

from wattier_gnn.datasets.safe_pickle import load, load_record
from wattier_gnn.datasets.shard import Reader, Shape, cell_or_none, checked_array, find_shards, shard_error
from wattier_gnn.structure import Structure


def shards(path: Path) -> list[Path]:
    """The LMDB files under `path` (see `find_shards`)."""
    return find_shards(path, (".lmdb",))


def read(path: Path) -> Iterator[Structure]:
    """All records of a file in the order of their keys.

    Raises:
        ShardError: the file is truncated, lacks a record, or a record lacks a field.
        DataError: a record's pickle asks for code (see `safe_pickle`).
    """
    for key, data in _iterate_values(path):
        yield _structure(_Record(path, key, load_record(data, f"{path}: key {key}")))


def _iterate_values(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False) as environment:
            _check_size(path, environment)
            with environment.begin() as transaction:
                for index in range(_n_records(path, transaction)):
                    data = transaction.get(str(index).encode())
                    if data is None:
                        raise shard_error(path, f"key {index}", "is missing", "there: keys run from 0 without gaps")
                    yield str(index), bytes(data)
    except lmdb.Error as error:
        raise shard_error(path, "", f"LMDB says {error}", "a whole LMDB file") from error


def _check_size(path: Path, environment: lmdb.Environment) -> None:
    # LMDB maps the file into memory: reading a page that was cut off would kill the process (SIGBUS), not raise.
    pages = environment.info()["last_pgno"] + 1
    must_be, is_bytes = pages * environment.stat()["psize"], path.stat().st_size
    if is_bytes < must_be:
        raise shard_error(path, "", f"has {is_bytes} bytes", f"at least {must_be} bytes long, as its header says")


def _n_records(path: Path, transaction: lmdb.Transaction) -> int:
    length = transaction.get(b"length")
    if length is None:
        return int(transaction.stat()["entries"])
    n_records = load(bytes(length), f"{path}: key length")
    return int(checked_array(path, "key length", n_records, (), np.int64))


def _structure(record: _Record) -> Structure:
    numbers = record.array(("atomic_numbers",), ("atoms",), np.int64)
    shape = (len(numbers), 3)
    system, frame = int(record.array(("sid",), (), np.int64)), int(record.array(("fid",), (), np.int64))
    return Structure(
        numbers=numbers,
        positions_angstrom=record.array(("pos",), shape, np.float64),
        cell_angstrom=cell_or_none(record.array(("cell",), (1, 3, 3), np.float64)[0]),
        pbc=(True, True, True),
        energy_ev=float(record.array(("y", "energy"), (), np.float64)),
        forces_ev_per_angstrom=record.array(("force", "forces"), shape, np.float64),
        source="oc22",
        group=str(system),
        key=f"{system}/{frame}",
    )


class _Record(NamedTuple):
    path: Path
    key: str
    fields: Mapping[str, Any]

    def array(self, names: tuple[str, ...], shape: Shape, dtype: type[np.generic]) -> NDArray[Any]:
        """The first of `names` that the record holds, checked; a one-element tensor passes for a number."""
        value = next((self.fields[name] for name in names if self.fields.get(name) is not None), None)
        if value is None:
            must_be = "a record of the S2EF task (structure to energy and forces)"
            raise shard_error(self.path, f"key {self.key}", f"has no field {names[0]}", must_be)
        array = value.numpy() if hasattr(value, "numpy") else np.asarray(value)
        if shape == () and array.size == 1:
            array = array.reshape(())
        return checked_array(self.path, f"key {self.key}: {names[0]}", array, shape, dtype)


READER = Reader("oc22", shards, read, "y (DFT total, eV; `energy` in newer files) and force (`forces`), all atoms free")
