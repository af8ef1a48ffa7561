"""The meter against the true energy of simulated drivers, through the real vendor bindings.

The scenarios behave as the facts say of real drivers: counters refreshed every 100 ms, power averaged over a second,
counters that reset, step back or stand still, a GPU that falls off the bus. Each truth is a closed form (scenario.py).
All windows of a test run at the same time, one meter for each.
"""

import random
import time
from contextlib import ExitStack

import pytest
from scenario import SimulatedDevice

from wattier_telemetry import EnergyMeter, Reading
from wattier_telemetry.nvml import NvmlSource
from wattier_telemetry.source import PowerSource

LONG_SECONDS = 20.0
HARD = {  # name: device; every one must be right within 0.5 % over 20 s
    "constant": SimulatedDevice(500),
    "1 Hz": SimulatedDevice(700, 100, 1.0),
    "5 Hz": SimulatedDevice(700, 100, 5.0),
    "20 Hz": SimulatedDevice(700, 100, 20.0),
    "reset": SimulatedDevice(600, 200, 1.0, {"reset": 9.63}),
    "backward": SimulatedDevice(600, 200, 5.0, {"backward": 12.31, "by": 212}),
    "averaged power only": SimulatedDevice(700, 100, 1.0, {"instant": "na"}),
    "slow power": SimulatedDevice(700, 100, 1.0, {"power_refresh": 0.1}),
}


class OneDevice(PowerSource):
    """One device of a source, so that each has a meter of its own."""

    name = "one device"

    def __init__(self, source, index):
        self._source, self._device = source, source.devices()[index]

    def devices(self):
        return (self._device,)

    def read(self, device) -> Reading:
        return self._source.read(device)

    def read_energy(self, device) -> Reading:
        return self._source.read_energy(device)

    def close(self):
        pass


class Polling:
    """Power once a second times a second, with the times cut to whole seconds: how it is usually done."""

    def __init__(self, source):
        self.source, self.device = source, source.devices()[0]
        self.samples = []

    def look(self):
        self.samples.append((int(time.time()), self.source.read(self.device).power_watts))

    def joules(self):
        pairs = zip(self.samples, self.samples[1:], strict=False)
        return sum((a[1] + b[1]) / 2 * (b[0] - a[0]) for a, b in pairs)


class Window:
    """A meter that remembers when its edges were, on the scenario's clock."""

    def __init__(self, source, start, **options):
        self.edges, self._start = [], start
        self.meter = EnergyMeter(source, **options)

    def true_joules(self, device):
        begin, end = self.edges
        return device.joules(begin - self._start, end - self._start)

    def open(self):
        self.meter.__enter__()
        self.edges.append(self.meter._opened_at)

    def close(self):
        self.meter.close()
        self.edges.append(self.meter._opened_at + self.meter.report.seconds)
        return self.meter.report


def test_long_windows_are_right_within_half_a_per_cent(simulated_nvml, capsys):
    start = simulated_nvml(*HARD.values())
    source = NvmlSource()
    windows = [Window(OneDevice(source, i), start) for i in range(len(HARD))]
    polls = [Polling(OneDevice(source, i)) for i in range(len(HARD))]
    time.sleep(random.uniform(0, 0.1))  # the edges lie anywhere between two refreshes
    for window in windows:
        window.open()
    for _ in range(int(LONG_SECONDS) + 1):
        for poll in polls:
            poll.look()
        time.sleep(1.0)
    rows = []
    for window, poll, (name, device) in zip(windows, polls, HARD.items(), strict=True):
        report = window.close()
        truth = window.true_joules(device)
        rows.append((name, truth, report, poll.joules() / (device.joules(0, 1000) / 1000 * LONG_SECONDS) - 1))
    source.close()
    with capsys.disabled():
        print(f"\n{'window of 20 s':<20} {'true J':>9} {'meter':>8} {'bound':>8} {'1 Hz polling':>13}")
        for name, truth, report, polled in rows:
            bound = (report.joules_high - report.joules_low) / 2 / truth
            print(f"{name:<20} {truth:9.0f} {report.joules / truth - 1:+8.3%} {bound:8.3%} {polled:+13.1%}")
    for name, truth, report, _ in rows:
        assert report.joules == pytest.approx(truth, rel=0.005), name
        assert report.joules_low <= truth <= report.joules_high, name
