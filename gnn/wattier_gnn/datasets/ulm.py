"""ASE's trajectory files (``.traj``, the ULM container), frame by frame, with every announced size checked first.

ASE's reader allocates what a file announces and broadcasts a number to any shape. Layout: ``ase.io.ulm``, version 3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wattier_gnn.datasets.ase_row import Row, parse_row
from wattier_gnn.datasets.shard import MOST_RECORD_BYTES, shard_error
from wattier_gnn.structure import ShardError

_HEADER = struct.Struct("<8s16sqqq")  # magic, tag, version, number of items, where their offsets are
_MAGIC = (b"- of Ulm", b"AFFormat")
_TYPES = ("bool", "int8", "uint8", "int16", "int32", "int64", "float32", "float64")


def frames(path: Path) -> Iterator[Row | ShardError]:
    """Each frame as a row (see `ase_row`), or what is wrong with it.

    Raises:
        ShardError: the file is truncated or no trajectory.
    """
    try:
        with path.open("rb") as file:
            trajectory = _Trajectory(path, file, path.stat().st_size)
            offsets = trajectory.offsets()
            shared: Row = {}  # numbers and pbc stand in the first frame only, unless they change
            for index in range(len(offsets) // 8):
                (offset,) = struct.unpack_from("<q", offsets, 8 * index)
                try:
                    frame = trajectory.frame(offset, f"frame {index}")
                except ShardError as error:
                    yield error
                    continue
                shared = shared or {name: frame[name] for name in ("numbers", "pbc") if name in frame}
                yield {**shared, **frame}
    except OSError as error:
        raise shard_error(path, "", f"cannot be read: {error}", "a whole trajectory") from error


class _Trajectory(NamedTuple):
    path: Path
    file: BinaryIO
    size: int

    def offsets(self) -> bytes:
        """Where each frame begins, in 8 bytes each."""
        header = self.file.read(_HEADER.size)
        is_one = header[:8] in _MAGIC and header[8:24].strip() == b"ASE-Trajectory"
        if len(header) < _HEADER.size or not is_one:
            raise shard_error(self.path, "", f"starts with {header[:24]!r}", "an ASE trajectory")
        *_, n_items, at = _HEADER.unpack(header)
        if not 0 <= n_items <= self.size // 8 or not 0 <= at <= self.size - 8 * n_items:
            raise shard_error(self.path, "", f"announces {n_items} frames in {self.size} bytes", "whole")
        self.file.seek(at)
        return self.file.read(8 * n_items)

    def frame(self, offset: int, inside: str) -> Row:
        """The row of the frame that begins at an offset."""
        (length,) = struct.unpack("<q", self._bytes(offset, 8, inside))
        item = parse_row(self.path, inside, self._bytes(offset + 8, length, inside))
        calculator = item.get("calculator.")
        results = calculator if isinstance(calculator, Mapping) else {}
        row: dict[str, Any] = {}
        for names, place in ((("numbers", "pbc", "positions", "cell"), item), (("energy", "forces"), results)):
            for name in names:
                if f"{name}." in place:
                    big = item.get("_little_endian", True) is False
                    row[name] = self._array(place[f"{name}."], big, f"{inside}: {name}")
                elif name in place:
                    row[name] = place[name]
        return row

    def _array(self, announced: Any, big_endian: bool, inside: str) -> NDArray[Any]:
        match announced:
            case {"ndarray": [list() as shape, str() as kind, int() as offset]} if kind in _TYPES and all(
                isinstance(length, int) and length >= 0 for length in shape
            ):
                dtype = np.dtype(kind).newbyteorder(">" if big_endian else "<")
                data = self._bytes(offset, prod(shape) * dtype.itemsize, inside)
                return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))
            case _:
                raise shard_error(self.path, inside, f"is {announced!r:.60}", "[shape, type, offset]")

    def _bytes(self, offset: int, n_bytes: int, inside: str) -> bytes:
        if not 0 <= n_bytes <= MOST_RECORD_BYTES or not 0 <= offset <= self.size - n_bytes:
            what_is = f"announces {n_bytes:,} bytes at {offset:,} in a file of {self.size:,}"
            raise shard_error(self.path, inside, what_is, f"inside the file, and at most {MOST_RECORD_BYTES:,} bytes")
        self.file.seek(offset)
        return self.file.read(n_bytes)
