"""The meter against the true energy of simulated drivers, through the real vendor bindings.

The scenarios behave as the facts say of real drivers: counters refreshed every 100 ms, power averaged over a second,
counters that reset, step back or stand still, a GPU that falls off the bus. Each truth is a closed form (scenario.py).
All windows of a test run at the same time, one meter for each.
"""

import os
import random
import re
import time
from contextlib import ExitStack

import pytest
from scenario import SimulatedDevice
from scripted import OneDevice

from wattier_telemetry import EnergyMeter
from wattier_telemetry.sources.nvml import NvmlSource

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

    def blur(self):
        """How wrong a steady load may be where the machine held the readings of the edges up, as part of the window."""
        (account,) = self.meter._accounts
        edges = [edge for edge in (account._opening, account._closing) if edge is not None]
        if len(edges) < 2 or any(edge.refreshes is None and edge.unseen_seconds >= 0.1 for edge in edges):
            return 1.0  # for longer than a refresh: the bound alone tells
        return sum(edge.tick.gap_seconds for edge in edges) / 2 / self.meter.report.seconds

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


SHORT = {
    **{name: device for name, device in HARD.items() if name not in ("reset", "backward")},
    "one burst": SimulatedDevice(700, 70, 0.5),
}


def test_short_windows_hold_the_truth_within_their_own_bound(simulated_nvml, capsys):
    start = simulated_nvml(*SHORT.values())
    source = NvmlSource()
    rng = random.Random(0)
    rows, steady = [], []
    for _ in range(6):
        windows = [Window(OneDevice(source, i), start) for i in range(len(SHORT))]
        time.sleep(rng.uniform(0, 0.1))
        for window in windows:
            window.open()
        time.sleep(rng.uniform(0.3, 0.6))
        for window, (name, device) in zip(windows, SHORT.items(), strict=True):
            rows.append((name, window.close(), window.true_joules(device)))
            if name == "constant":
                steady.append((rows[-1][1].joules / rows[-1][2] - 1, window.blur()))
    source.close()
    with capsys.disabled():
        print(f"\n{'windows of 0.3 to 1 s':<22} {'mean |error|':>12} {'mean bound':>11}")
        for name in SHORT:
            some = [(report, truth) for other, report, truth in rows if other == name]
            error = sum(abs(report.joules / truth - 1) for report, truth in some) / len(some)
            bound = sum((report.joules_high - report.joules_low) / 2 / truth for report, truth in some) / len(some)
            print(f"{name:<22} {error:12.1%} {bound:11.1%}")
            assert bound < 0.6, f"{name}: a bound that says nothing"
    for name, report, truth in rows:
        assert report.seconds >= 0.3
        assert report.joules_low <= truth <= report.joules_high, name
    assert all(abs(error) < max(0.03, blur) for error, blur in steady)


@pytest.mark.parametrize("device", [SimulatedDevice(500), SimulatedDevice(700, 100, 1.0)])
def test_a_gpu_that_is_lost_half_way_is_billed_in_part_and_says_so(simulated_nvml, device):
    device = SimulatedDevice(device.high, device.low, device.hz, {"lost": 1.5, "limit": 700})
    start = simulated_nvml(device)
    source = NvmlSource()
    window = Window(source, start)
    window.open()
    time.sleep(3.0 - (time.monotonic() - start))
    report = window.close()
    truth = window.true_joules(device)
    assert 0 < report.joules < 0.8 * truth
    assert report.joules_low <= truth <= report.joules_high
    seen = (start + 1.5 - window.edges[0]) / report.seconds
    assert seen - 0.1 <= report.coverage_ratio <= seen + 0.001
    assert any("lost" in text.lower() for text in report.warnings)


def test_a_stuck_counter_is_replaced_by_power(simulated_nvml):
    device = SimulatedDevice(400, extra={"stuck": 1.0})
    start = simulated_nvml(device)
    window = Window(NvmlSource(), start)
    window.open()
    time.sleep(4.0)
    report = window.close()
    truth = window.true_joules(device)
    assert report.joules == pytest.approx(truth, rel=0.02)
    assert report.joules_low <= truth <= report.joules_high
    assert report.method == "integrated"
    assert any("stood still" in text for text in report.warnings)


@pytest.mark.parametrize(("gain", "verdict"), [(0.3, "the larger is billed"), (1.5, "the counter is billed")])
def test_a_counter_that_contradicts_its_power_is_not_trusted_in_silence(simulated_nvml, gain, verdict):
    device = SimulatedDevice(400, extra={"gain": gain})
    start = simulated_nvml(device)
    window = Window(NvmlSource(), start)
    window.open()
    time.sleep(5.0)
    report = window.close()
    truth = window.true_joules(device)
    assert report.joules == pytest.approx(max(1.0, gain) * truth, rel=0.02)
    (warning,) = [text for text in report.warnings if verdict in text]
    assert float(re.search(r"says ([0-9.]+) of", warning)[1]) == pytest.approx(gain, rel=0.05)
    if gain < 0.5:
        assert report.joules_low <= truth <= report.joules_high * 1.02


def test_windows_nest_and_run_side_by_side(simulated_nvml):
    device = SimulatedDevice(700, 100, 1.0)
    start = simulated_nvml(device)
    source = NvmlSource()
    outer, first, second = (Window(source, start) for _ in range(3))
    for window in (outer, first, second):
        window.open()
        time.sleep(0.5)
    reports = {window: window.close() for window in (first, second, outer)}
    for window, report in reports.items():
        assert report.joules_low <= window.true_joules(device) <= report.joules_high
    assert reports[outer].joules > reports[first].joules > reports[second].joules


def test_two_trials_on_one_gpu_are_told_apart_where_the_driver_can(simulated_nvml):
    """By what the driver says of their processes, else in the parts they were given."""
    device = SimulatedDevice(600, extra={"pid1": os.getpid(), "busy1": 0.6, "pid2": os.getppid(), "busy2": 0.2})
    start = simulated_nvml(device, SimulatedDevice(600))
    source = NvmlSource()
    told, untold = OneDevice(source, 0), OneDevice(source, 1)
    windows = [Window(told, start, fraction=0.5), *(Window(untold, start, fraction=part) for part in (0.5, 0.25))]
    with ExitStack() as stack:
        for window in windows:
            stack.callback(window.meter.close)
            window.open()
        time.sleep(6)  # so that readings of an edge that came late are less than the 2 % below
        reports = [window.close() for window in windows]
    truths = [window.true_joules(device) for window in windows]
    for report, truth, part in zip(reports, truths, (0.75, 0.5, 0.25), strict=True):
        assert report.joules == pytest.approx(part * truth, rel=0.02)
        (share,) = report.shares
        assert share.fraction == pytest.approx(part, rel=1e-9)
        assert share.joules_low <= part * truth <= share.joules_high
        assert share.joules_high - share.joules_low < 0.3 * part * truth, "a bound that says nothing"
    assert [report.shares[0].attribution for report in reports] == ["utilization", "equal", "equal"]


def test_throttling_is_counted_by_reason(simulated_nvml):
    device = SimulatedDevice(600, extra={"reasons": 0x4, "throttle_from": 0, "throttle_to": 1000})
    start = simulated_nvml(device, SimulatedDevice(100, extra={"reasons": 0x1}))
    window = Window(NvmlSource(), start)
    window.open()
    time.sleep(1.0)
    report = window.close()
    throttled, free = report.shares
    assert throttled.throttled_seconds["power_cap"] == pytest.approx(report.seconds, abs=0.2)
    assert sum(free.throttled_seconds.values()) == 0
    assert report.throttled_seconds == {"power_cap": throttled.throttled_seconds["power_cap"]}
    assert report.throttled_ratio == pytest.approx(0.5, abs=0.1)


def test_queued_work_is_waited_for_at_both_edges(simulated_nvml):
    start = simulated_nvml(SimulatedDevice(300))
    waits = []

    def synchronize():
        waits.append(time.monotonic())
        time.sleep(0.3)

    window = Window(NvmlSource(), start, synchronize=synchronize)
    window.open()
    window.close()
    assert len(waits) == 2
    assert window.edges[0] >= waits[0] + 0.3
    assert window.edges[1] >= waits[1] + 0.3
