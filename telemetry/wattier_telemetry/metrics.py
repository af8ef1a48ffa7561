"""Every metric the exporter shows, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Point(NamedTuple):
    """One value of one series, as it stands in an exposition: counters end in ``_total``."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


class Sink(Protocol):
    """Where a sampler puts what it saw, beside showing it to whoever scrapes."""

    def add(self, time_seconds: float, points: Sequence[Point]) -> None:
        """Take one sample; never blocks for long and never raises."""

    def points(self) -> list[Point]:
        """Return the sink's own figures, which go into the next sample."""

    def close(self) -> None:
        """Keep what was taken, and stop."""
