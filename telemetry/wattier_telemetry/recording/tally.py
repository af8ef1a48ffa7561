"""Adding up steps of a recording: what a metric was, what held the clock down, what it cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from wattier_telemetry.recording.trace import FIGURES
from wattier_telemetry.records import Method, Reading, Share, weakest

JOULES_PER_KWH = 3.6e6
METRICS = tuple(name for name in FIGURES if name != "energy_joules")


@dataclass(frozen=True, slots=True)
class Spread:
    """How large a metric was; the mean is weighted by time."""

    mean: float
    max: float


@dataclass(frozen=True, slots=True)
class Bill:
    """What a device, a trial or the job cost.

    Attributes:
        seconds: Wall time, s.
        joules: Energy, J; None = not measured.
        kwh: The same in kWh.
        joules_low: The true energy is not below, as far as sampling can tell, J.
        joules_high: The true energy is not above, J.
        grams_co2: At the stated intensity of the grid, g; None = none was stated.
        method: The weakest method among the devices.
        coverage_ratio: Share of device time that was truly measured, 0 to 1.
        metrics: Each figure that was recorded, over all devices concerned.
        throttled_seconds: Device time under each throttle reason, s; None = no device can say.
        throttled_ratio: Share of device time under the most frequent reason, 0 to 1.
    """

    seconds: float
    joules: float | None
    kwh: float | None
    joules_low: float | None
    joules_high: float | None
    grams_co2: float | None
    method: Method | None
    coverage_ratio: float
    metrics: Mapping[str, Spread]
    throttled_seconds: Mapping[str, float] | None
    throttled_ratio: float | None


@dataclass(frozen=True, slots=True)
class Step:
    """What happened to a device between two lines."""

    before: Reading
    now: Reading
    seconds: float
    covered_seconds: float
    throttled: Mapping[str, float] | None


@dataclass
class Tally:
    """Metrics and throttling of many steps."""

    device_seconds: float = 0.0
    covered_seconds: float = 0.0
    sums: dict[str, list[float]] = field(default_factory=dict)  # integral, seconds, largest, latest
    throttled: dict[str, float] = field(default_factory=dict)
    telling_seconds: float = 0.0

    def see(self, reading: Reading) -> None:
        """Take a line's figures into the maxima."""
        for name in METRICS:
            value = getattr(reading, name)
            if value is not None:
                entry = self.sums.setdefault(name, [0.0, 0.0, value, value])
                entry[2], entry[3] = max(entry[2], value), value

    def add(self, step: Step) -> None:
        """Add a step of one device."""
        self.see(step.before)
        self.see(step.now)
        self.device_seconds += step.seconds
        self.covered_seconds += step.covered_seconds
        if step.covered_seconds > 0:  # nobody knows how a metric ran through a gap
            for name in self.sums:
                first, last = getattr(step.before, name), getattr(step.now, name)
                if first is not None and last is not None:
                    self.sums[name][0] += (first + last) / 2 * step.seconds
                    self.sums[name][1] += step.seconds
        if step.throttled is not None:
            self.telling_seconds += step.seconds
            for reason, seconds in step.throttled.items():
                self.throttled[reason] = self.throttled.get(reason, 0.0) + seconds

    def metrics(self) -> dict[str, Spread]:
        """Return the mean and the maximum of each figure that was ever known."""
        found = {}
        for name in METRICS:
            if name in self.sums:
                integral, seconds, largest, latest = self.sums[name]
                found[name] = Spread(integral / seconds if seconds > 0 else latest, largest)
        return found

    def bill(self, seconds: float, shares: Iterable[tuple[Share, float]], grid: float | None) -> Bill:
        """Return the bill for parts of some shares; a part is the ratio of the share that is ours."""
        known = [(share, part) for share, part in shares if share.joules is not None]
        joules = math.fsum(part * (share.joules or 0.0) for share, part in known) if known else None
        low, high = (
            math.fsum(part * _or(getattr(share, bound), share.joules) for share, part in known) if known else None
            for bound in ("joules_low", "joules_high")
        )
        telling = self.telling_seconds > 0
        return Bill(
            seconds=seconds,
            joules=joules,
            kwh=None if joules is None else joules / JOULES_PER_KWH,
            joules_low=low,
            joules_high=high,
            grams_co2=None if joules is None or grid is None else joules / JOULES_PER_KWH * grid,
            method=weakest(share.method for share, _ in known),
            coverage_ratio=min(1.0, self.covered_seconds / self.device_seconds) if self.device_seconds > 0 else 0.0,
            metrics=self.metrics(),
            throttled_seconds={reason: s for reason, s in sorted(self.throttled.items()) if s > 0} if telling else None,
            throttled_ratio=min(1.0, max(self.throttled.values(), default=0.0) / self.telling_seconds)
            if telling
            else None,
        )


def sum_of(tallies: Iterable[Tally]) -> Tally:
    """Return the tally of several devices."""
    total = Tally()
    for tally in tallies:
        total.device_seconds += tally.device_seconds
        total.covered_seconds += tally.covered_seconds
        total.telling_seconds += tally.telling_seconds
        for reason, seconds in tally.throttled.items():
            total.throttled[reason] = total.throttled.get(reason, 0.0) + seconds
        for name, (integral, seconds, largest, latest) in tally.sums.items():
            entry = total.sums.setdefault(name, [0.0, 0.0, largest, latest])
            total.sums[name] = [entry[0] + integral, entry[1] + seconds, max(entry[2], largest), latest]
    return total


def _or(value: float | None, otherwise: float | None) -> float:
    return (otherwise or 0.0) if value is None else value


def step_joules(step: Step, refresh_seconds: float) -> float:
    """Return the joules of a step: of the counter where it had the time to move, else of the sampled power."""
    moved = None
    if step.before.energy_joules is not None and step.now.energy_joules is not None:
        moved = step.now.energy_joules - step.before.energy_joules
        if moved > 0 and step.seconds >= refresh_seconds:
            return moved
    if step.before.power_watts is not None and step.now.power_watts is not None:
        return (step.before.power_watts + step.now.power_watts) / 2 * step.seconds
    return max(0.0, moved or 0.0)
