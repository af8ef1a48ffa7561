"""Any ASE database with energies: SQLite (``.db``), JSON (``.json``), LMDB (``.aselmdb``), trajectory (``.traj``).

Read row by row: ASE takes all of a JSON database into memory, and creates tables in an SQLite file that has none.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from wattier_gnn.datasets.ase_row import Row, parse_row, row_structure
from wattier_gnn.datasets.fairchem import aselmdb_rows, read_trajectory
from wattier_gnn.datasets.json_stream import JsonStream
from wattier_gnn.datasets.shard import (
    MOST_RECORD_BYTES,
    STREAM_ERRORS,
    Identity,
    Reader,
    find_shards,
    open_text,
    or_bad,
    shard_error,
)
from wattier_gnn.structure import BadRecord, DataError, Structure

COLUMNS = ("id", "numbers", "positions", "cell", "pbc", "energy", "forces", "key_value_pairs")
_BLOBS = (("numbers", np.dtype("<i4")), ("positions", np.dtype("<f8")), ("cell", np.dtype("<f8")),
          ("forces", np.dtype("<f8")))  # fmt: skip


def shards(path: Path) -> list[Path]:
    """The database files under `path` (see `find_shards`)."""
    return find_shards(path, (".db", ".json", ".aselmdb", ".traj"))


def read(path: Path) -> Iterator[Structure | BadRecord]:
    """All rows; a key ``group`` among the key-value pairs names the group, the formula does otherwise.

    Raises:
        ShardError: the file is truncated or no ASE database.
    """
    if path.suffix == ".traj":
        yield from read_trajectory(path, "ase_db")
        return
    rows = {".json": _json_rows, ".aselmdb": aselmdb_rows}.get(path.suffix, _sqlite_rows)
    for row in rows(path):
        yield row if isinstance(row, BadRecord) else or_bad(path, partial(_structure, path, row))


def _structure(path: Path, row: Row) -> Structure:
    pairs = row.get("key_value_pairs")
    group = pairs.get("group") if isinstance(pairs, dict) else None
    named = None if group is None else str(group)
    return row_structure(path, f"row {row['id']}", row, Identity("ase_db", named, f"{path.name}/{row['id']}"))


def _json_rows(path: Path) -> Iterator[Row | BadRecord]:
    try:
        with open_text(path) as stream:
            document = JsonStream(path, stream)
            for name in document.members():
                row = document.value()
                if not name.isdigit():  # ids, nextid, metadata
                    continue
                if isinstance(row, dict):
                    yield {**row, "id": name}
                else:
                    yield BadRecord(str(shard_error(path, f"row {name}", f"is a {type(row).__name__}", "an object")))
    except STREAM_ERRORS as error:
        raise shard_error(path, "", f"cannot be read: {error}", "a whole file") from error


def _sqlite_rows(path: Path) -> Iterator[Row | BadRecord]:
    try:
        # Nothing is written, no lock is taken, and no function the schema names is called.
        with closing(
            sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1", uri=True)
        ) as connection:
            connection.text_factory = bytes
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_RECORD_BYTES)
            connection.execute("PRAGMA trusted_schema = OFF")
            made = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'systems' AND type = 'table'")
            sql, *_ = made.fetchone() or (b"",)
            if not bytes(sql).upper().startswith(b"CREATE TABLE"):  # a view or a virtual table may hold any number
                raise shard_error(path, "", "has no table 'systems'", "an ASE database")
            for (row_id,) in connection.execute("SELECT id FROM systems ORDER BY id"):
                try:
                    yield _sqlite_row(path, connection, row_id)
                except DataError as error:
                    yield BadRecord(str(error))
    except sqlite3.Error as error:
        raise shard_error(path, "", f"SQLite says {error}", "a whole ASE database") from error


def _sqlite_row(path: Path, connection: sqlite3.Connection, row_id: Any) -> Row:
    query = f"SELECT {', '.join(COLUMNS)} FROM systems WHERE id = ?"
    try:
        columns = connection.execute(query, (row_id,)).fetchone()
    except sqlite3.Error as error:
        raise shard_error(path, f"row {row_id}", f"SQLite says {error}", "a row that can be read") from error
    if columns is None:
        raise shard_error(path, f"row {row_id}", "is in the index only", "a row that can be read")
    return _decoded(path, dict(zip(COLUMNS, columns, strict=True)))


def _decoded(path: Path, row: dict[str, Any]) -> Row:
    """A row of the table with its blobs as arrays (little endian, flat)."""
    inside = f"row {row['id']}"
    for name, dtype in _BLOBS:
        blob = row[name]
        if blob is None:
            continue
        if not isinstance(blob, bytes) or len(blob) % dtype.itemsize:
            raise shard_error(path, f"{inside}: {name}", f"is {blob!r:.40}", f"a blob of {dtype.name}")
        array = np.frombuffer(blob, dtype)
        row[name] = array if name == "numbers" or len(array) % 3 else array.reshape(-1, 3)
    pbc = row["pbc"]
    if not isinstance(pbc, int) or not 0 <= pbc < 8:
        raise shard_error(path, f"{inside}: pbc", f"is {pbc!r:.40}", "a number from 0 to 7")
    row["pbc"] = [bool(pbc & bit) for bit in (1, 2, 4)]
    row["key_value_pairs"] = parse_row(path, f"{inside}: key_value_pairs", row["key_value_pairs"] or b"")
    return row


READER = Reader("ase_db", shards, read, "energy (total, eV) and forces (eV/Å, before constraints) as stored")
