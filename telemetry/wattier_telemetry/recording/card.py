"""The energy report card of a recording: per device, per trial and for the whole job.

Energy follows the rules of the meter, for it is the meter's own `Account` that adds it up: differences of counters
first, guarded against resets, then power integrated over real timestamps. What trials owned together is divided by the
fractions that they registered, step by step, in proportion to the energy of each step; the rest is shown as
unattributed, so that the parts add up to the device.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from wattier_telemetry.account import Account
from wattier_telemetry.recording.tally import Bill, Step, Tally, step_joules, sum_of
from wattier_telemetry.recording.trace import Sample, TrialPart, read_trace
from wattier_telemetry.records import DOMAINS, Device, Share
from wattier_telemetry.throttling import ThrottleClock

_HEAD_SAMPLES = 512
_LONGEST_GAP_PERIODS = 5.0  # as the meter has it
_SHORTEST_GAP_SECONDS = 1.0

TrialKey = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class DeviceCard:
    """One device; ``in_total`` is False for what holds other devices or was measured twice."""

    device: str
    name: str
    domain: str
    source: str
    in_total: bool
    unattributed_joules: float | None
    bill: Bill


@dataclass(frozen=True, slots=True)
class TrialCard:
    """One trial, over its ranks and devices; ``joules_by_device`` adds up to its joules."""

    run: str
    stage: str
    trial: str
    ranks: tuple[int, ...]
    joules_by_device: Mapping[str, float]
    bill: Bill


@dataclass(frozen=True, slots=True)
class Card:
    """A recording's energy; the trials and ``unattributed_joules`` add up to the job."""

    file: str
    start_seconds: float
    end_seconds: float
    samples: int
    grid_grams_co2_per_kwh: float | None
    job: Bill
    joules_by_domain: Mapping[str, float]
    unattributed_joules: float | None
    trials: tuple[TrialCard, ...]
    devices: tuple[DeviceCard, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


class _DeviceLog:
    """Everything that is known of one device."""

    def __init__(self, sample: Sample, longest_gap_seconds: float) -> None:
        self.device: Device = sample.device
        self.source = sample.source
        self.account = Account(self.device, self.device.method, longest_gap_seconds=longest_gap_seconds)
        self.first_seconds = self.last_seconds = sample.reading.time_seconds
        self.tally = Tally()
        self.weight = 0.0
        self.weights: dict[TrialKey, float] = {}  # the joules of its steps as seen at the time; only ratios matter
        self.seconds: dict[TrialKey, float] = {}
        self.overcommitted = False
        self._last: Sample | None = None

    def add(self, sample: Sample) -> tuple[Step | None, tuple[TrialPart, ...]]:
        """Book a line; returns the step that it ends, and who owned the device in it."""
        reading, last = sample.reading, self._last
        self._last, self.last_seconds = sample, reading.time_seconds
        covered = self.account.covered_seconds
        self.account.add(reading.time_seconds, reading)
        if last is None:
            self.tally.see(reading)
            return None, ()
        seconds = reading.time_seconds - last.reading.time_seconds
        clock = ThrottleClock()
        clock.add(last.reading, reading, seconds)
        step = Step(last.reading, reading, seconds, self.account.covered_seconds - covered, clock.seconds)
        self.tally.add(step)
        parts = last.trials or ()
        self._divide(step, parts)
        return step, parts

    def _divide(self, step: Step, parts: tuple[TrialPart, ...]) -> None:
        joules = step_joules(step, self.device.counter_refresh_seconds)
        self.weight += joules
        claimed = math.fsum(part.fraction for part in parts)
        self.overcommitted = self.overcommitted or claimed > 1 + 1e-9
        for part in parts:
            key = part[:3]
            self.weights[key] = self.weights.get(key, 0.0) + joules * part.fraction / max(1.0, claimed)
        for key in {part[:3] for part in parts}:
            self.seconds[key] = self.seconds.get(key, 0.0) + step.seconds

    def share(self) -> Share:
        return self.account.share(self.first_seconds, self.last_seconds - self.first_seconds)

    def ratio(self, key: TrialKey) -> float:
        """Return the part of the device's energy that a trial owes."""
        return self.weights.get(key, 0.0) / self.weight if self.weight > 0 else 0.0


def make_card(path: Path, *, grid_grams_co2_per_kwh: float | None = None) -> Card:
    """Read a recording and add it up.

    Args:
        path: CSV or Parquet file.
        grid_grams_co2_per_kwh: Stated carbon intensity of the electricity, g/kWh.

    Raises:
        TraceError: If the recording cannot be read.
    """
    warnings: list[str] = []
    samples = read_trace(path, warn=warnings.append)
    head = list(islice(samples, _HEAD_SAMPLES))
    book = _Book(_longest_gap_seconds(head))
    for sample in chain(head, samples):
        book.add(sample)
    return book.card(str(path), grid_grams_co2_per_kwh, warnings)


def _longest_gap_seconds(head: Iterable[Sample]) -> float:
    last: dict[str, float] = {}
    steps = []
    for sample in head:
        now, uuid = sample.reading.time_seconds, sample.device.uuid
        if uuid in last:
            steps.append(now - last[uuid])
        last[uuid] = now
    return max(_SHORTEST_GAP_SECONDS, _LONGEST_GAP_PERIODS * statistics.median(steps or [0.0]))


class _Book:
    """The devices, trials and the job of one recording while it is read."""

    def __init__(self, longest_gap_seconds: float) -> None:
        self._gap = longest_gap_seconds
        self._devices: dict[str, _DeviceLog] = {}
        self._trials: dict[TrialKey, Tally] = {}
        self._ranks: dict[TrialKey, set[int]] = {}
        self._samples = 0

    def add(self, sample: Sample) -> None:
        self._samples += 1
        uuid = sample.device.uuid
        if uuid not in self._devices:
            self._devices[uuid] = _DeviceLog(sample, self._gap)
        step, parts = self._devices[uuid].add(sample)
        for part in parts:
            self._ranks.setdefault(part[:3], set()).add(part.rank)
        if step is not None:
            for key in {part[:3] for part in parts}:
                self._trials.setdefault(key, Tally()).add(step)

    def card(self, file: str, grid: float | None, warnings: list[str]) -> Card:
        logs = list(self._devices.values())
        counted = list(_counted(logs))
        start, end = min(log.first_seconds for log in logs), max(log.last_seconds for log in logs)
        for log in logs:
            log.account.close(log.last_seconds)
        job = sum_of(log.tally for log in counted).bill(end - start, [(log.share(), 1.0) for log in counted], grid)
        trials = tuple(self._trial(key, tally, counted, grid) for key, tally in sorted(self._trials.items()))
        paid = math.fsum(trial.bill.joules or 0.0 for trial in trials)
        return Card(
            file=file,
            start_seconds=start,
            end_seconds=end,
            samples=self._samples,
            grid_grams_co2_per_kwh=grid,
            job=job,
            joules_by_domain=_by_domain(counted),
            unattributed_joules=None if job.joules is None else max(0.0, job.joules - paid),
            trials=trials,
            devices=tuple(_device_card(log, grid, in_total=log in counted) for log in logs),
            warnings=tuple(warnings + list(_complaints(logs))),
        )

    def _trial(self, key: TrialKey, tally: Tally, logs: list[_DeviceLog], grid: float | None) -> TrialCard:
        mine = [log for log in logs if key in log.seconds]
        bill = tally.bill(
            max((log.seconds[key] for log in mine), default=0.0), [(log.share(), log.ratio(key)) for log in mine], grid
        )
        joules = {log.device.uuid: log.ratio(key) * (log.share().joules or 0.0) for log in mine}
        return TrialCard(*key, tuple(sorted(self._ranks[key])), joules, bill)


def _counted(logs: list[_DeviceLog]) -> Iterator[_DeviceLog]:
    """Yield what adds up to the job: no node total, which holds the others, and nothing that two sources measured.

    A Cray controller measures the GPUs and CPUs that their own drivers measure too.
    """
    others = {log.device.domain for log in logs if log.source != "cray"}
    found = [
        log
        for log in logs
        if log.device.domain != "node" and not (log.source == "cray" and log.device.domain in others)
    ]
    yield from found or logs


def _by_domain(logs: list[_DeviceLog]) -> dict[str, float]:
    joules: dict[str, float] = {}
    for log in logs:
        known = log.share().joules
        if known is not None:
            joules[log.device.domain] = joules.get(log.device.domain, 0.0) + known
    return {domain: joules[domain] for domain in DOMAINS if domain in joules}


def _device_card(log: _DeviceLog, grid: float | None, *, in_total: bool) -> DeviceCard:
    share = log.share()
    bill = log.tally.bill(share.seconds, [(share, 1.0)], grid)
    rest = None if share.joules is None else share.joules * max(0.0, 1.0 - math.fsum(map(log.ratio, log.weights)))
    return DeviceCard(log.device.uuid, log.device.name, log.device.domain, log.source, in_total, rest, bill)


def _complaints(logs: list[_DeviceLog]) -> Iterator[str]:
    for log in logs:
        yield from log.account.warnings()
        if log.overcommitted:
            yield (
                f"{log.device.name} {log.device.uuid}: the trials on it claimed more than the whole device; "
                "each is billed in proportion to its claim"
            )
