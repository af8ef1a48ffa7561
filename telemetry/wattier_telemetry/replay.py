"""A recorded power trace, played against the wall clock: for tests, demonstrations and machines without a counter.

The file is a CSV with the header ``time_seconds,device,power_watts`` and, where a counter was recorded,
``energy_joules``. Before and after the trace the edge value holds, so that one line means constant watts.
"""

from __future__ import annotations

import csv
import math
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from wattier_telemetry.records import Device, Method, Reading
from wattier_telemetry.source import PowerSource, SourceUnavailable

_COLUMNS = ["time_seconds", "device", "power_watts"]


@dataclass
class _Trace:
    device: Device
    times: list[float] = field(default_factory=list)
    watts: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)  # at each time, recorded or integrated


class ReplaySource(PowerSource):
    """Devices whose power was recorded earlier.

    Power runs straight between two lines; its exact integral from the first line on is the energy counter, so two
    processes that replay one file agree. Every device counts as a GPU.

    Args:
        path: The CSV.
        clock: Wall clock, seconds since 1970.

    Raises:
        SourceUnavailable: If the file cannot be read; the message names the line and what is wrong with it.
    """

    name = "replay"

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        try:
            with path.open(newline="", encoding="utf-8") as file:
                lines = list(csv.reader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise SourceUnavailable(f"{path}: cannot be read: {error}") from error
        self._recorded, self._traces = _parse(path, lines)

    def devices(self) -> tuple[Device, ...]:
        """Return the devices in the order in which the file first names them."""
        return tuple(trace.device for trace in self._traces.values())

    def read(self, device: Device) -> Reading:
        """Return power and counter at this moment of the trace."""
        now, trace = self._clock(), self._traces[device.uuid]
        watts, joules = _at(trace, now, integrate=not self._recorded)
        return Reading(time_seconds=now, power_watts=watts, energy_joules=joules)

    def close(self) -> None:
        """Nothing is held open."""


def _at(trace: _Trace, now: float, *, integrate: bool) -> tuple[float, float]:
    """Return watts and joules at a time; the counter runs on at the edge's watts outside the trace."""
    times, watts, joules = trace.times, trace.watts, trace.joules
    i = bisect_right(times, now) - 1
    if i < 0 or i == len(times) - 1:
        edge = max(i, 0)
        return watts[edge], joules[edge] + watts[edge] * (now - times[edge])
    part = (now - times[i]) / (times[i + 1] - times[i])
    power = watts[i] + part * (watts[i + 1] - watts[i])
    if integrate:
        return power, joules[i] + (watts[i] + power) / 2 * (now - times[i])
    return power, joules[i] + part * (joules[i + 1] - joules[i])


def _parse(path: Path, lines: list[list[str]]) -> tuple[bool, dict[str, _Trace]]:
    header = [cell.strip() for cell in lines[0]] if lines else []
    if header not in (_COLUMNS, [*_COLUMNS, "energy_joules"]):
        wanted = ",".join(_COLUMNS)
        raise SourceUnavailable(f"{path}: line 1 is '{','.join(header)}', but must be {wanted}[,energy_joules]")
    traces: dict[str, _Trace] = {}
    for number, cells in enumerate(lines[1:], start=2):
        if cells:
            _add_line(f"{path}: line {number}", header, cells, traces)
    if not traces:
        raise SourceUnavailable(f"{path}: line 2: the trace is empty; give at least one line of power")
    recorded = len(header) == 4
    if not recorded:
        for trace in traces.values():
            for i in range(1, len(trace.times)):
                mean = (trace.watts[i - 1] + trace.watts[i]) / 2
                trace.joules.append(trace.joules[-1] + mean * (trace.times[i] - trace.times[i - 1]))
    return recorded, traces


def _add_line(where: str, header: list[str], cells: list[str], traces: dict[str, _Trace]) -> None:
    method: Method = "counter" if len(header) == 4 else "integrated"
    if len(cells) != len(header):
        raise SourceUnavailable(f"{where} has {len(cells)} cells, but must have {len(header)}: {','.join(header)}")
    numbers: dict[str, float] = {}
    for column, cell in zip(header, cells, strict=True):
        if column == "device":
            continue
        try:
            numbers[column] = float(cell)
        except ValueError:
            numbers[column] = math.nan
        if not math.isfinite(numbers[column]):
            raise SourceUnavailable(f"{where}: {column} is '{cell.strip()}', but must be a finite number")
    name = cells[1].strip()
    if not name:
        raise SourceUnavailable(f"{where}: device is empty")
    if numbers["power_watts"] < 0:
        raise SourceUnavailable(f"{where}: power_watts is {numbers['power_watts']:g}, but must not be negative")
    trace = traces.setdefault(name, _Trace(Device(name, name, "gpu", len(traces), method=method)))
    if trace.times and numbers["time_seconds"] <= trace.times[-1]:
        raise SourceUnavailable(f"{where}: time_seconds of {name} must grow from line to line")
    trace.times.append(numbers["time_seconds"])
    trace.watts.append(numbers["power_watts"])
    if "energy_joules" in numbers:
        trace.joules.append(numbers["energy_joules"])
    elif not trace.joules:
        trace.joules.append(0.0)  # the counter is anchored at the trace's first line
