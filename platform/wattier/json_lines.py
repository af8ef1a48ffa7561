"""Files of one JSON record a line: appended whole, read whole, or read on from where the last reading ended."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from wattier.errors import UserError

ANCHOR_BYTES = 4096  # of what was read last: that they still stand there tells that the file only grew

log = logging.getLogger(__name__)


def append_json_line(path: Path, data: Any) -> None:
    """Append one record in one write, after closing a line that a crash tore."""
    append_json_lines(path, [data])


def append_json_lines(path: Path, many: Sequence[Any]) -> None:
    """Append some records as `append_json_line` does one."""
    line = "".join(json.dumps(data, allow_nan=False) + "\n" for data in many)
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[Any]:
    """All whole records; a line torn by a crash is left out with a warning, damage elsewhere is an error.

    Raises:
        UserError: a line that something follows is no JSON and no torn record.
    """
    news = GrowingLines(path).read()
    return news.records + news.unended


class News(NamedTuple):
    """What a file has to say since it was last read."""

    anew: bool  # it is another file, or was rewritten, or this is the first reading: forget what it said before
    records: list[Any]
    unended: list[Any]  # of a last line that has no end yet: none, or one record, which the next reading tells again


class GrowingLines:
    """Reads a file of JSON lines again and again, but parses each line once.

    A file that only grew is read on from the last line that had an end. That it only grew is judged by its identity,
    its size, its time of change, and the last bytes that were read. What is not seen is a change in place that keeps
    the length of what lies further up, made between the same two readings as an append: editors make a new file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.forget()

    def forget(self) -> None:
        """Start over at the next reading."""
        self._identity: tuple[int, int] | None = None
        self._size = self._changed_ns = self._offset = self._lines = 0
        self._anchor = b""

    def read(self) -> News:
        """What is new; a file that is not there holds nothing.

        Raises:
            UserError: a line is no JSON and no torn record; the next reading starts over.
        """
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                anew = not self._goes_on(file, status)
                if anew:
                    self.forget()
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            self.forget()
            return News(True, [], [])
        ended, unended = data[: data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1 :]
        try:
            news = News(anew, *self._parsed(ended, unended))
        except UserError:
            self.forget()
            raise
        self._identity = status.st_dev, status.st_ino
        self._size, self._changed_ns = status.st_size, status.st_mtime_ns
        self._offset += len(ended)
        self._lines += ended.count(b"\n")
        self._anchor = (self._anchor + ended)[-ANCHOR_BYTES:]
        return news

    def _goes_on(self, file: BufferedReader, status: os.stat_result) -> bool:
        """Whether the file is what it was, and perhaps more."""
        if self._identity != (status.st_dev, status.st_ino):
            return False
        if status.st_size == self._size and status.st_mtime_ns != self._changed_ns:
            return False
        return os.pread(file.fileno(), len(self._anchor), self._offset - len(self._anchor)) == self._anchor

    def _parsed(self, ended: bytes, unended: bytes) -> tuple[list[Any], list[Any]]:
        records = []
        for number, line in enumerate(ended.split(b"\n")[:-1], start=self._lines + 1):
            records += _record(self.path, number, line)
        return records, _record(self.path, self._lines + ended.count(b"\n") + 1, unended)


def _record(path: Path, number: int, line: bytes) -> list[Any]:
    """The record of a line; none of a blank or torn one."""
    if not line.strip():
        return []
    try:
        return [json.loads(line)]
    except ValueError as error:
        if _is_torn(line):
            _warn_of_torn_line(path, number)
            return []
        raise UserError(f"{path}: line {number} is no JSON record ({error}). Remove that line.") from error


def _is_torn(line: bytes) -> bool:
    """Whether a record was begun and never ended: its writer died in the middle and wrote it again later."""
    outside_strings = re.sub(rb'"(?:[^"\\]|\\.)*(?:"|\\?$)', b"", line)
    return line.startswith(b"{") and outside_strings.count(b"{") > outside_strings.count(b"}")


@cache
def _warn_of_torn_line(path: Path, number: int) -> None:
    """Once, however often the file is read."""
    log.warning("%s: line %d was torn by a crash and is left out", path, number)
