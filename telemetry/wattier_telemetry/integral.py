"""Power sampled over a span of time, and how wrong its integral may be."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from wattier_telemetry.records import Reading

_FAST_SECONDS = 0.02  # between two power samples closer than this the power is taken to run straight

MOST_WATTS = 1e5  # no device that is measured here, not even a whole node, draws that
_MOST_LIMITS = 10.0  # nor so many times its own power cap


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
class PowerRange:
    """Between what powers a device was seen, and its limit, W."""

    lowest_watts: float = math.inf
    highest_watts: float = 0.0
    limit_watts: float | None = None

    def add(self, reading: Reading) -> None:
        """Take what a reading tells."""
        if reading.power_limit_watts is not None:
            self.limit_watts = reading.power_limit_watts
        if reading.power_watts is not None:
            self.lowest_watts = min(self.lowest_watts, reading.power_watts)
            self.highest_watts = max(self.highest_watts, reading.power_watts)


def trapezoid(before: tuple[float, Reading], now: tuple[float, Reading]) -> PowerIntegral:
    """Return the energy between two power samples, J."""
    seconds, first, last = now[0] - before[0], before[1].power_watts, now[1].power_watts
    if first is None or last is None:
        return PowerIntegral(seconds, known=False)
    coarse = seconds if seconds > _FAST_SECONDS else 0.0
    slack = 0.0 if coarse else abs(first - last) / 2 * seconds
    return PowerIntegral(seconds, (first + last) / 2 * seconds, slack, coarse)


def most_watts(limit_watts: float | None) -> float:
    """Return the power above which a figure is garbage, W."""
    limited = limit_watts is not None and 0 < limit_watts < MOST_WATTS / _MOST_LIMITS
    return _MOST_LIMITS * limit_watts if limited and limit_watts is not None else MOST_WATTS


def credible(reading: Reading) -> Reading:
    """Return the reading without figures that cannot be: one of them would poison every sum after it."""
    watts, joules, seconds = reading.power_watts, reading.energy_joules, reading.throttle_seconds
    bad: dict[str, Any] = {}
    if watts is not None and not 0 <= watts <= most_watts(reading.power_limit_watts):
        bad["power_watts"] = None
    if joules is not None and not math.isfinite(joules):
        bad["energy_joules"] = None
    if seconds is not None and not all(map(math.isfinite, seconds.values())):
        bad["throttle_seconds"] = None
    return replace(reading, **bad) if bad else reading
