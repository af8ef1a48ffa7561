"""A batch of samples as bytes: JSON under zlib, whose checksum tells a torn file from a whole one.

Nothing in it is ever executed, so that a foreign file in the spool can do no harm.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

MOST_BYTES = 2**28  # of one segment once decompressed: a small file must not fill the memory
_FORMAT = 1


class Series(NamedTuple):
    """The samples of one series in one batch.

    Attributes:
        name: Metric name.
        labels: All its labels.
        times_ms: Wall clock of each sample, ms since 1970, growing.
        values: Value of each sample.
    """

    name: str
    labels: tuple[tuple[str, str], ...]
    times_ms: list[int]
    values: list[float]


def encode(batch: Sequence[Series]) -> bytes:
    """Return the bytes of a segment."""
    table = {"format": _FORMAT, "series": [list(series) for series in batch]}
    return zlib.compress(json.dumps(table, separators=(",", ":")).encode(), 1)


def decode(data: bytes) -> list[Series]:
    """Read what `encode` wrote.

    Raises:
        ValueError: If it is torn, foreign or too large.
    """
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(data, MOST_BYTES)
    except zlib.error as error:
        raise ValueError(f"is torn or no batch: {error}") from error
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError("is torn, or larger than any batch")
    try:
        table = json.loads(text)
    except RecursionError as error:
        raise ValueError("is no batch") from error
    if not isinstance(table, dict) or table.get("format") != _FORMAT or not isinstance(table.get("series"), list):
        raise ValueError(f"is no batch of format {_FORMAT}")
    return [_series(item) for item in table["series"]]


def _series(item: Any) -> Series:
    try:
        name, labels, times_ms, values = item
        pairs = tuple((key, value) for key, value in labels)
        texts = isinstance(name, str) and all(isinstance(text, str) for pair in pairs for text in pair)
        good = texts and len(times_ms) == len(values) and all(type(time_ms) is int for time_ms in times_ms)
        numbers = [float(value) for value in values if type(value) in {int, float}]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"holds a series that is none: {error}") from error
    if not good or len(numbers) != len(values):
        raise ValueError("holds a series that is none")
    return Series(name, pairs, times_ms, numbers)
