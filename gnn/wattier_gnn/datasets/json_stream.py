"""One JSON document of any size, walked member by member: only the value at hand is in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from wattier_gnn.datasets.shard import shard_error
from wattier_gnn.structure import ShardError

CHUNK_CHARACTERS = 1 << 20
# A JSON error this far from the end of what has been read cannot be cured by reading more (the longest strings, names
# and numbers of the releases are far shorter).
LONGEST_TOKEN_CHARACTERS = 4096
MOST_VALUE_CHARACTERS = 64 << 20

_BLANK = re.compile(r"[ \t\n\r]*")


class JsonStream:
    """A position in a JSON document.

    For each name of `members` the caller must take the value, by `value` or by walking `members` of it to its end.
    """

    def __init__(self, path: Path, stream: TextIO) -> None:
        self._path, self._stream = path, stream
        self._text, self._at, self._ended = "", 0, False
        self._last = "the start"
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not blank; empty at the end of the file."""
        while True:
            blank = _BLANK.match(self._text, self._at)
            self._at = blank.end() if blank else self._at
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def members(self) -> Iterator[str]:
        """The names of the members of the object that begins here.

        Raises:
            ShardError: no object begins here, or it is truncated or malformed.
        """
        self._take("{")
        if self.peek() == "}":
            self._at += 1
            return
        while True:
            if self.peek() != '"':
                raise self._error(f"is truncated or malformed: {self._here()} where a name is due")
            name = str(self.value())
            self._take(":")
            self._last = name
            yield name
            if self.peek() == "}":
                self._at += 1
                return
            self._take(",")

    def value(self) -> Any:
        """The whole value that begins here.

        Raises:
            ShardError: it is truncated, malformed, nested too deeply or too large.
        """
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                hopeless = error.pos < len(self._text) - LONGEST_TOKEN_CHARACTERS
                if hopeless or not self._more():
                    raise self._error(f"is truncated or malformed: {error.msg}") from error
                continue
            except RecursionError as error:
                raise self._error("is nested too deeply") from error
            if end == len(self._text) and self._more():  # a number may go on
                continue
            self._at = end
            return value

    def _take(self, character: str) -> None:
        if self.peek() != character:
            raise self._error(f"is truncated or malformed: {self._here()} where {character!r} is due")
        self._at += 1

    def _more(self) -> bool:
        """Read on, as much again as there is: a long value is then parsed a few times, not once a chunk."""
        if self._ended:
            return False
        self._text, self._at = self._text[self._at :], 0
        if len(self._text) > MOST_VALUE_CHARACTERS:
            raise self._error(f"has a value of more than {MOST_VALUE_CHARACTERS:,} characters")
        more = self._stream.read(max(CHUNK_CHARACTERS, len(self._text)))
        self._text += more
        self._ended = not more
        return bool(more)

    def _here(self) -> str:
        rest = self._text[self._at : self._at + 20]
        return repr(rest) if rest else "nothing more"

    def _error(self, what_is: str) -> ShardError:
        return shard_error(self._path, f"after {self._last}", what_is, "a whole JSON object")
