"""A recording, played against the wall clock: for tests, demonstrations and machines without a counter.

The file is what `wattier_telemetry.recording.trace` reads, at the least a CSV with the header
``time_seconds,device,power_watts`` and, where a counter was recorded, ``energy_joules``. Before and after the trace the
edge value holds, so that one line means constant watts.
"""

from __future__ import annotations

import time
from array import array
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from wattier_telemetry.recording.trace import FIGURES, Sample, TraceError, read_trace
from wattier_telemetry.records import Device, Reading
from wattier_telemetry.source import PowerSource, SourceUnavailable

_HELD = (*(name for name in FIGURES if name not in ("power_watts", "energy_joules")), "throttle_reasons")


@dataclass
class _Curve:
    """Values at growing times."""

    times: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, time_seconds: float, value: float) -> None:
        self.times.append(time_seconds)
        self.values.append(value)


@dataclass
class _Trace:
    device: Device
    power: _Curve = field(default_factory=_Curve)
    energy: _Curve = field(default_factory=_Curve)  # recorded, or the integral of the power
    recorded: bool = False
    times: array[float] = field(default_factory=lambda: array("d"))
    held: list[Reading] = field(default_factory=list)  # as long as `times`, or empty if nothing else was recorded


class ReplaySource(PowerSource):
    """Devices that were recorded earlier.

    Power runs straight between two lines; its exact integral from the first line on is the energy counter, so two
    processes that replay one file agree. Every other figure stands until the next line. A device is a GPU unless the
    file says otherwise.

    Args:
        path: The CSV or Parquet file.
        clock: Wall clock, seconds since 1970.

    Raises:
        SourceUnavailable: If the file cannot be read; the message names the line and what is wrong with it.
    """

    name = "replay"

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._traces: dict[str, _Trace] = {}
        try:
            for sample in read_trace(path):
                _add(self._traces, sample)
        except TraceError as error:
            raise SourceUnavailable(str(error)) from error
        for trace in self._traces.values():
            _finish(path, trace)

    def devices(self) -> tuple[Device, ...]:
        """Return the devices in the order in which the file first names them."""
        return tuple(trace.device for trace in self._traces.values())

    def read(self, device: Device) -> Reading:
        """Return what stood in the trace at this moment."""
        now, trace = self._clock(), self._traces[device.uuid]
        reading = Reading(now)
        if trace.held:
            i = max(0, bisect_right(trace.times, now) - 1)
            reading = replace(trace.held[i], time_seconds=now)
        watts = _power(trace.power, now) if trace.power.times else None
        return replace(reading, power_watts=watts, energy_joules=_energy(trace, now))

    def close(self) -> None:
        """Nothing is held open."""


def _add(traces: dict[str, _Trace], sample: Sample) -> None:
    reading = sample.reading
    trace = traces.get(sample.device.uuid)
    if trace is None:
        trace = traces[sample.device.uuid] = _Trace(sample.device, recorded=sample.known_method)
    if reading.power_watts is not None:
        trace.power.add(reading.time_seconds, reading.power_watts)
    if reading.energy_joules is not None:
        trace.energy.add(reading.time_seconds, reading.energy_joules)
    others = any(getattr(reading, name) is not None for name in _HELD) or reading.throttle_seconds is not None
    if others and not trace.held:  # the lines before told nothing of this kind
        trace.held = [Reading(earlier) for earlier in trace.times]
    trace.times.append(reading.time_seconds)
    if others or trace.held:
        trace.held.append(reading)


def _finish(path: Path, trace: _Trace) -> None:
    """Give a device without a counter one: the integral of its power, anchored at the trace's first line."""
    known_method, trace.recorded = trace.recorded, bool(trace.energy.times)
    if trace.recorded:
        trace.device = trace.device if known_method else replace(trace.device, method="counter")
        return
    times, watts = trace.power.times, trace.power.values
    if not times:
        raise SourceUnavailable(f"{path}: {trace.device.uuid} has neither power_watts nor energy_joules in any line")
    joules = 0.0
    trace.energy.add(times[0], joules)
    for i in range(1, len(times)):
        joules += (watts[i - 1] + watts[i]) / 2 * (times[i] - times[i - 1])
        trace.energy.add(times[i], joules)
    method = trace.device.method if known_method and trace.device.method == "estimated" else "integrated"
    trace.device = replace(trace.device, method=method, counter_refresh_seconds=0.0)


def _power(power: _Curve, now: float) -> float:
    """Return the power at a time, W: straight lines, and level outside."""
    times, watts = power.times, power.values
    i = bisect_right(times, now) - 1
    if i < 0 or i == len(times) - 1:
        return watts[max(i, 0)]
    return watts[i] + (now - times[i]) / (times[i + 1] - times[i]) * (watts[i + 1] - watts[i])


def _energy(trace: _Trace, now: float) -> float:
    """Return the counter at a time, J; outside the trace it runs on at the edge's watts."""
    times, joules = trace.energy.times, trace.energy.values
    i = bisect_right(times, now) - 1
    if i < 0 or i == len(times) - 1:
        edge = max(i, 0)
        return joules[edge] + _edge_watts(trace, edge) * (now - times[edge])
    if not trace.recorded:
        return joules[i] + (trace.power.values[i] + _power(trace.power, now)) / 2 * (now - times[i])
    if joules[i + 1] < joules[i]:  # a reset: the counter stands until it is over, and never runs backward slowly
        return joules[i]
    return joules[i] + (now - times[i]) / (times[i + 1] - times[i]) * (joules[i + 1] - joules[i])


def _edge_watts(trace: _Trace, edge: int) -> float:
    """Return the power beyond the first or the last value of the counter, W."""
    if trace.power.times:
        return _power(trace.power, trace.energy.times[edge])
    times, joules = trace.energy.times, trace.energy.values
    if len(times) == 1:
        return 0.0
    low = 0 if edge == 0 else edge - 1
    return max(0.0, joules[low + 1] - joules[low]) / (times[low + 1] - times[low])
