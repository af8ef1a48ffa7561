"""A trial's power and memory over time: a small recording beside the energy journal, for pictures.

The bill is the journal's. The trace tells when the joules were drawn: each line holds what is owed so far, so that a
line may be left out and no joule is lost. It is a recording as `wattier_telemetry.recording.trace` reads it.
"""

from __future__ import annotations

import csv
import io
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from wattier_telemetry import Device, EnergyMeter, EnergyReport, Share

SUFFIX = ".trace.csv"
COLUMNS = (
    "time_seconds", "device", "name", "domain", "method", "power_watts", "energy_joules", "memory_used_bytes",
    "throttle_seconds",
)  # fmt: skip
FIRST_PERIOD_SECONDS = 0.25
MOST_MOMENTS = 512
_LEAST_SECONDS = 1e-3  # between two lines, to which times are written
_LEAST_COVERAGE = 0.5  # of the time since the line before; with less of it measured, its power is not known


@dataclass(frozen=True)
class _Line:
    """What one device is known to owe at the end of its share."""

    share: Share
    power_watts: float | None
    memory_bytes: int | None

    @property
    def covered_seconds(self) -> float:
        return self.share.coverage_ratio * self.share.seconds

    def cells(self, name: str = "") -> list[object]:
        seconds = self.share.throttled_seconds
        throttled = None if seconds is None else "|".join(f"{k}:{v:.3f}" for k, v in seconds.items()) or "none"
        watts, joules = self.power_watts, self.share.joules
        return [
            f"{self.share.end_seconds:.3f}", self.share.device_uuid, name, self.share.domain, self.share.method,
            "" if watts is None else f"{watts:.6g}", "" if joules is None else f"{joules:.9g}",
            "" if self.memory_bytes is None else self.memory_bytes, throttled or "",
        ]  # fmt: skip


class PowerTrace:
    """A trace that stays small: with too many moments every second one goes, and the period doubles.

    Lines are appended whole; SIGKILL loses at most the last one. When it is thinned, the file is replaced at once.

    Args:
        path: the file, ``*.trace.csv``; it must not be there.
        names: of devices by their UUID, for their first lines.
        period_seconds: time between two lines, until the trace is thinned.
        most_moments: lines of each device, at most.
    """

    def __init__(
        self,
        path: Path,
        names: Mapping[str, str] | None = None,
        *,
        period_seconds: float = FIRST_PERIOD_SECONDS,
        most_moments: int = MOST_MOMENTS,
    ) -> None:
        self.path, self.period_seconds = path, period_seconds
        self._names = names or {}
        self._most = most_moments
        self._moments: list[dict[str, _Line]] = []
        path.write_text(_csv([list(COLUMNS)]), encoding="utf-8")

    def add(self, report: EnergyReport, memory_bytes: int | None = None) -> None:
        """Add a moment: what is owed of each device from the start of its share to the end, which must have grown."""
        before = self._moments[-1] if self._moments else {}
        moment = {
            share.device_uuid: _line(share, before.get(share.device_uuid), memory_bytes) for share in report.shares
        }
        if not moment or any(_seconds_between(before.get(u), line) < _LEAST_SECONDS for u, line in moment.items()):
            return  # the meter was closed, or has no device
        names = {} if self._moments else self._names
        self._moments.append(moment)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_csv([line.cells(names.get(uuid, "")) for uuid, line in moment.items()]))
        if len(self._moments) >= self._most:
            self._thin()

    def _thin(self) -> None:
        self.period_seconds *= 2
        kept = self._moments[:1]
        for first, second in zip(self._moments[1::2], self._moments[2::2], strict=False):
            before = kept[-1]
            kept.append({uuid: _joined(before.get(uuid), first.get(uuid), line) for uuid, line in second.items()})
        if len(self._moments) % 2 == 0:
            kept.append(self._moments[-1])
        self._moments = kept
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        rows: list[list[object]] = [list(COLUMNS)]
        rows += [line.cells(self._names.get(uuid, "")) for uuid, line in kept[0].items()]
        rows += [line.cells() for moment in kept[1:] for line in moment.values()]
        temporary.write_text(_csv(rows), encoding="utf-8")
        temporary.replace(self.path)


@contextmanager
def traced_power(
    path: Path,
    meter: EnergyMeter,
    devices: Sequence[Device],
    memory_bytes: Callable[[], int | None],
    *,
    least_seconds: float = 0.0,
) -> Iterator[None]:
    """Trace an open meter from a thread of its own until the block ends; a full disk ends the trace, not the trial.

    Args:
        path: the file to make.
        meter: whose joules; each look makes it write its journal.
        devices: the meter's.
        memory_bytes: what the process holds.
        least_seconds: time between two looks, at the least: what the journal was told, for the sake of the file system.
    """
    stop = threading.Event()
    names = {device.uuid: device.name for device in devices}
    period_seconds = max(FIRST_PERIOD_SECONDS, least_seconds)

    def follow() -> None:
        with suppress(OSError):
            trace, ended = PowerTrace(path, names, period_seconds=period_seconds), False
            while not ended:
                ended = stop.is_set()
                trace.add(meter.so_far(), memory_bytes())
                stop.wait(trace.period_seconds)

    thread = threading.Thread(target=follow, name="wattier-power-trace", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _line(share: Share, before: _Line | None, memory_bytes: int | None) -> _Line:
    line = _Line(share, None, memory_bytes)
    if before is None or share.joules is None or before.share.joules is None:
        return line
    seconds = _seconds_between(before, line)
    if seconds <= 0 or line.covered_seconds - before.covered_seconds < _LEAST_COVERAGE * seconds:
        return line
    return replace(line, power_watts=max(0.0, share.joules - before.share.joules) / seconds)


def _seconds_between(before: _Line | None, line: _Line) -> float:
    return math.inf if before is None else line.share.end_seconds - before.share.end_seconds


def _joined(before: _Line | None, first: _Line | None, second: _Line) -> _Line:
    """The second of two neighbouring lines, which speaks for the time of both; a gap in either stays a gap."""
    if first is None or first.power_watts is None or second.power_watts is None:
        return replace(second, power_watts=None)
    sizes = [size for size in (first.memory_bytes, second.memory_bytes) if size is not None]
    return _line(second.share, before, max(sizes, default=None))


def _csv(rows: list[list[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
