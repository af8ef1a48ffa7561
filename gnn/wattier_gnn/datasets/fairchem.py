"""The containers of the Open Catalyst Project, in which OC20 and OC22 are released and passed on.

LMDB files of pickled torch_geometric records under the keys 0, 1, 2 ... (fairchem 1.x), LMDB files of zipped JSON rows
of ASE (``*.aselmdb``, fairchem 2.x), and ASE trajectories.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wattier_gnn.datasets import ulm
from wattier_gnn.datasets.ase_row import Row, parse_row, row_structure
from wattier_gnn.datasets.lmdb_file import LmdbFile
from wattier_gnn.datasets.safe_pickle import load, load_record
from wattier_gnn.datasets.shard import (
    MOST_RECORD_BYTES,
    Identity,
    Shape,
    cell_or_none,
    checked_array,
    or_bad,
    shard_error,
)
from wattier_gnn.structure import BadRecord, DataError, ShardError, Structure

MUST_BE_ROW = "a zipped row of an ASE database"


class Names(NamedTuple):
    """How a source names its structures, given the numbers ``{sid}`` of the system and ``{fid}`` of the frame."""

    source: str
    group: str
    key: str


def read_lmdb(path: Path, names: Names) -> Iterator[Structure | BadRecord]:
    """All records of an LMDB file of pickled torch_geometric data, in the order of their numbers.

    Raises:
        ShardError: the file is truncated or no LMDB file.
    """
    with LmdbFile(path) as file:
        try:
            n_records = _n_records(path, file)
        except DataError as error:
            yield BadRecord(str(error))
            n_records = file.entries - 1
        for index in range(n_records):
            yield or_bad(path, partial(_pickled, path, file, str(index), names))


def read_aselmdb(path: Path, names: Names) -> Iterator[Structure | BadRecord]:
    """All rows of an ASE-LMDB file, in the order of their ids.

    Raises:
        ShardError: the file is truncated or no LMDB file.
    """
    for row in aselmdb_rows(path):
        if isinstance(row, BadRecord):
            yield row
        else:
            yield or_bad(path, partial(_named_row, path, f"key {row['id']}", row, names))


def read_trajectory(path: Path, source: str) -> Iterator[Structure | BadRecord]:
    """All frames of an ASE trajectory; the file is the group, since its frames follow one another.

    Raises:
        ShardError: the file is truncated or no trajectory.
    """
    for index, frame in enumerate(ulm.frames(path)):
        if isinstance(frame, ShardError):
            yield BadRecord(str(frame))
        else:
            identity = Identity(source, path.stem, f"{path.stem}/{index}")
            yield or_bad(path, partial(row_structure, path, f"frame {index}", frame, identity))


def aselmdb_rows(path: Path) -> Iterator[Row | BadRecord]:
    """The rows of an ASE-LMDB file with their ``id``, in its order.

    Raises:
        ShardError: the file is truncated or no LMDB file.
    """
    with LmdbFile(path) as file:
        for row_id in sorted(int(key) for key in file.keys() if key.isdigit() and len(key) < 20):  # noqa: SIM118
            try:
                yield {**_unzipped_row(path, file, row_id), "id": row_id}
            except DataError as error:
                yield BadRecord(str(error))


def _unzipped_row(path: Path, file: LmdbFile, row_id: int) -> Row:
    inside = f"key {row_id}"
    unpack = zlib.decompressobj()
    try:
        text = unpack.decompress(file.get(str(row_id).encode()) or b"", MOST_RECORD_BYTES)
    except zlib.error as error:
        raise shard_error(path, inside, f"cannot be unzipped ({error})", MUST_BE_ROW) from error
    if not unpack.eof:
        what_is = (
            "is cut short" if len(text) < MOST_RECORD_BYTES else f"unpacks to more than {MOST_RECORD_BYTES:,} bytes"
        )
        raise shard_error(path, inside, what_is, MUST_BE_ROW)
    return parse_row(path, inside, text)


def _named_row(path: Path, inside: str, row: Row, names: Names) -> Structure:
    data = row.get("data")
    sid, fid = (data.get(name) if isinstance(data, Mapping) else None for name in ("sid", "fid"))
    if not isinstance(sid, int | str) or not isinstance(fid, int | str):
        raise shard_error(path, inside, f"is of system {sid!r:.40}, frame {fid!r:.40}", "a row whose data names both")
    return row_structure(path, inside, row, _identity(names, sid, fid))


def _identity(names: Names, sid: int | str, fid: int | str) -> Identity:
    """Some rows hold the full names that the text files use, ``random17`` and ``frame3``."""
    sid, fid = str(sid).removeprefix("random"), str(fid).removeprefix("frame")
    return Identity(names.source, names.group.format(sid=sid), names.key.format(sid=sid, fid=fid))


def _n_records(path: Path, file: LmdbFile) -> int:
    length = file.get(b"length")
    if length is None:
        return file.entries
    n_records = int(checked_array(path, "key length", _plain(load(length, f"{path}: key length")), (), np.int64))
    if not 0 <= n_records < 2 * file.entries:  # a missing record is reported by its key, but not any number of them
        raise shard_error(path, "key length", f"is {n_records}", f"the number of records among {file.entries} keys")
    return n_records


def _pickled(path: Path, file: LmdbFile, key: str, names: Names) -> Structure:
    data = file.get(key.encode())
    if data is None:
        raise shard_error(path, f"key {key}", "is missing", "there: keys run from 0 without gaps")
    record = _Record(path, key, load_record(data, f"{path}: key {key}"))
    numbers = record.array(("atomic_numbers",), ("atoms",), np.int64)
    shape = (len(numbers), 3)
    sid, fid = int(record.array(("sid",), (), np.int64)), int(record.array(("fid",), (), np.int64))
    identity = _identity(names, sid, fid)
    return Structure(
        numbers=numbers,
        positions_angstrom=record.array(("pos",), shape, np.float64),
        cell_angstrom=cell_or_none(record.array(("cell",), (1, 3, 3), np.float64)[0]),
        pbc=(True, True, True),
        energy_ev=float(record.array(("y", "energy"), (), np.float64)),
        forces_ev_per_angstrom=record.array(("force", "forces"), shape, np.float64),
        source=names.source,
        group=identity.group or "",
        key=identity.key,
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
        array = _plain(value)
        if shape == () and getattr(array, "size", 0) == 1:
            array = array.reshape(())
        return checked_array(self.path, f"key {self.key}: {names[0]}", array, shape, dtype)


def _plain(value: Any) -> Any:
    """A tensor, an array or a number; nothing else: nested lists may be tiny and yet unfold to any size."""
    import torch

    if isinstance(value, torch.Tensor) and value.dtype not in (torch.bfloat16, torch.bool):
        return value.detach().numpy()
    return value if isinstance(value, np.ndarray | np.number | int | float) else np.array("not numeric")
