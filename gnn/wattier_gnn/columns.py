"""The columns of a store on the disk: opened for reading, read in runs, appended to.

A file may be longer than the manifest says: somebody is appending, or was killed while doing so. It may never be
shorter: reading a mapped page that is not there would kill the process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np

from wattier_gnn.arrays import COLUMNS
from wattier_gnn.structure import DataError


def column_path(folder: Path, name: str) -> Path:
    """The file of a column."""
    return folder / f"{name}.bin"


def open_columns(folder: Path, rows: Mapping[str, int]) -> dict[str, Any]:
    """All columns, memory-mapped and read-only.

    Raises:
        DataError: a file is missing or shorter than its rows, or the numbers of rows contradict each other.
    """
    arrays = {}
    for name, column in COLUMNS.items():
        path, n_rows = column_path(folder, name), rows.get(name)
        if not isinstance(n_rows, int) or n_rows < 0:
            raise _unreadable(folder, f"its manifest has no number of rows of {name}")
        try:
            n_bytes = path.stat().st_size
        except OSError as error:
            raise _unreadable(folder, f"{path.name}: {error.strerror}") from error
        if n_bytes < n_rows * column.row_bytes:
            raise _unreadable(folder, f"{path.name} has {n_bytes} bytes of {n_rows * column.row_bytes}")
        shape = (n_rows, *column.row)
        # An empty file cannot be mapped. A plain array on top of the map is faster to index than the map itself.
        mapped = np.memmap(path, column.dtype, "r", shape=shape) if n_rows else np.zeros(shape, column.dtype)
        arrays[name] = mapped.view(np.ndarray)
    _check_ends(folder, arrays)
    return arrays


def read_rows(folder: Path, name: str, first: int, stop: int) -> Any:
    """Some rows of a column, read and not mapped: what was read does not stay in memory."""
    column = COLUMNS[name]
    n_values = (stop - first) * int(np.prod(column.row, dtype=np.int64))
    values = np.fromfile(column_path(folder, name), column.dtype, n_values, offset=first * column.row_bytes)
    return values.reshape(stop - first, *column.row)


class Appender:
    """Writes behind the last row of every column of a folder. Use as a context manager.

    Attributes:
        rows: of each column, with what was appended so far.
    """

    def __init__(self, folder: Path, rows: Mapping[str, int] | None = None) -> None:
        """Rows behind `rows` are cut off; None is for a store that is to begin."""
        self.folder = folder
        self.rows = dict(rows) if rows else dict.fromkeys(COLUMNS, 0)
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Self:
        """Raises DataError where a file is shorter than its rows: cutting it back would fill it up with zeros."""
        for name, column in COLUMNS.items():
            path, due = column_path(self.folder, name), self.rows[name] * column.row_bytes
            n_bytes = path.stat().st_size if path.exists() else 0
            if n_bytes < due:
                raise _unreadable(self.folder, f"{path.name} has {n_bytes} bytes of {due}")
        for name, column in COLUMNS.items():
            path = column_path(self.folder, name)
            path.touch()
            file = self._stack.enter_context(path.open("r+b"))
            file.truncate(self.rows[name] * column.row_bytes)
            file.seek(0, os.SEEK_END)
            self._files[name] = file
            if column.per == "bound" and self.rows[name] == 0:
                self._write(name, np.zeros(1, dtype=np.int64))
        self.ends = {name: self._last(name) for name, column in COLUMNS.items() if column.per == "bound"}
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def append(self, arrays: Mapping[str, Any]) -> None:
        """Append some structures: every column, but offsets count from 0 and ``n_atoms``, ``n_edges`` follow them."""
        arrays = {
            **arrays,
            "n_atoms": np.diff(arrays["atom_offset"]),
            "n_edges": np.diff(arrays["edge_offset"]),
        }
        for name, column in COLUMNS.items():
            values = arrays[name]
            if column.per == "bound":
                values = values[1:] + self.ends[name]
                self.ends[name] += int(arrays[name][-1])
            self._write(name, values)

    def flush(self) -> None:
        """Return when all that was appended is on the disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def _write(self, name: str, values: Any) -> None:
        column = COLUMNS[name]
        rows = np.ascontiguousarray(values, dtype=column.dtype)
        if rows.shape[1:] != column.row:
            raise ValueError(f"{name} has rows {rows.shape[1:]}, but must have {column.row}")
        self._files[name].write(rows.data)
        self.rows[name] += len(rows)

    def _last(self, name: str) -> int:
        self._files[name].flush()
        return int(read_rows(self.folder, name, self.rows[name] - 1, self.rows[name])[0])


def _check_ends(folder: Path, arrays: Mapping[str, Any]) -> None:
    """Offsets must end where the rows they count end, or a batch would read what is not there."""
    n = len(arrays["energy"])
    for name, column in COLUMNS.items():
        due = {"structure": n, "bound": n + 1}.get(column.per)
        if due is not None and len(arrays[name]) != due:
            raise _unreadable(folder, f"{name} has {len(arrays[name])} rows, but must have {due}")
    for offset, counted in (("atom_offset", "atoms"), ("key_offset", "keys"), ("edge_offset", "edges")):
        absent = counted == "edges" and len(arrays[counted]) == 0
        if not absent and len(arrays[counted]) != arrays[offset][-1]:
            raise _unreadable(folder, f"{counted} has {len(arrays[counted])} rows, but {offset} ends elsewhere")


def _unreadable(folder: Path, what_is: str) -> DataError:
    return DataError(f"{folder}: not a readable store ({what_is}). Remove the folder and prepare the data again.")
