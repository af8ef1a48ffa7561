"""Power sampled over a span of time, and how wrong its integral may be."""

from __future__ import annotations

from dataclasses import dataclass

from wattier_telemetry.records import Reading

_FAST_SECONDS = 0.02  # between two power samples closer than this the power is taken to run straight


@dataclass(slots=True)
class PowerIntegral:
    """Sampled power over a span of time; ``joules`` is worth nothing where some power was not ``known``."""

    seconds: float = 0.0
    joules: float = 0.0
    slack_joules: float = 0.0
    coarse_seconds: float = 0.0  # part of the span in which the samples lay far apart
    known: bool = True

    def add(self, other: PowerIntegral) -> None:
        self.seconds += other.seconds
        self.joules += other.joules
        self.slack_joules += other.slack_joules
        self.coarse_seconds += other.coarse_seconds
        self.known = self.known and other.known

    def part(self, seconds: float) -> PowerIntegral:
        """Return the first seconds of a span over which the power is taken as even."""
        share = max(0.0, min(1.0, seconds / self.seconds)) if self.seconds > 0 else 0.0
        return PowerIntegral(
            share * self.seconds,
            share * self.joules,
            share * self.slack_joules,
            share * self.coarse_seconds,
            self.known,
        )


@dataclass(slots=True)
class Edge:
    """A refresh interval that holds an edge of the window, between the edge and the tick after it."""

    seconds: float  # from the edge to the tick
    tick_joules: float  # by which the counter moved
    gap_seconds: float  # in which the tick happened, unseen
    power: PowerIntegral


def trapezoid(before: tuple[float, Reading], now: tuple[float, Reading]) -> PowerIntegral:
    """Return the energy between two power samples, J."""
    seconds, first, last = now[0] - before[0], before[1].power_watts, now[1].power_watts
    if first is None or last is None:
        return PowerIntegral(seconds, known=False)
    coarse = seconds if seconds > _FAST_SECONDS else 0.0
    slack = 0.0 if coarse else abs(first - last) / 2 * seconds
    return PowerIntegral(seconds, (first + last) / 2 * seconds, slack, coarse)
