"""The trace of a trial: its integral is the bill, it stays small, gaps stay gaps, and it is an ordinary recording."""

import itertools
import math
import time

import pytest

from wattier.config import TelemetrySection
from wattier.metering import metered
from wattier.power_trace import COLUMNS, PowerTrace
from wattier_telemetry import EnergyReport, Share, read_journal
from wattier_telemetry.recording.trace import read_trace

START = 1_760_000_000.0


def owed(seconds, joules, *, coverage=1.0, throttled=None, uuid="GPU-0"):
    share = Share(uuid, "gpu", START, START + seconds, 1.0, joules, "counter", coverage, throttled_seconds=throttled)
    return EnergyReport.of([share])


def readings(path):
    return [sample.reading for sample in read_trace(path)]


def watts_by_shape(seconds):
    return 200 + 100 * math.sin(seconds / 7)


def joules_by_shape(seconds):
    """The integral of `watts_by_shape`, in closed form."""
    return 200 * seconds + 700 * (1 - math.cos(seconds / 7))


def integral(lines):
    """Joules of mean watts over the time since the line before."""
    pairs = itertools.pairwise(lines)
    return math.fsum(b.power_watts * (b.time_seconds - a.time_seconds) for a, b in pairs if b.power_watts is not None)


@pytest.mark.parametrize("moments", [3, 16, 17, 200])
def test_the_integral_is_the_bill_however_often_it_was_thinned(tmp_path, moments):
    trace = PowerTrace(tmp_path / "a.trace.csv", most_moments=16)
    for i in range(moments):
        trace.add(owed(float(i), joules_by_shape(i)), memory_bytes=1000 + i)
    lines = readings(trace.path)
    assert len(lines) <= 16
    assert lines[-1].time_seconds == START + moments - 1
    assert lines[-1].energy_joules == pytest.approx(joules_by_shape(moments - 1))
    assert integral(lines) == pytest.approx(joules_by_shape(moments - 1), rel=1e-5)
    assert lines[-1].memory_used_bytes == 1000 + moments - 1
    for before, line in itertools.pairwise(lines):
        middle = (before.time_seconds + line.time_seconds) / 2 - START
        assert line.power_watts == pytest.approx(watts_by_shape(middle), abs=60)


def test_a_gap_is_no_zero_and_outlives_every_thinning(tmp_path):
    trace = PowerTrace(tmp_path / "a.trace.csv", most_moments=8)
    for i in range(60):
        seen = i if i < 30 else max(30, i - 5)  # five seconds in which no device answered
        trace.add(owed(float(i), 100.0 * seen, coverage=seen / i if i else 1.0))
    lines = readings(trace.path)[1:]
    assert sum(line.power_watts is None for line in lines) >= 1
    assert all(line.power_watts is None or line.power_watts == pytest.approx(100) for line in lines)


def test_throttling_grows_from_line_to_line(tmp_path):
    trace = PowerTrace(tmp_path / "a.trace.csv")
    for i in range(5):
        trace.add(owed(float(i), 10.0 * i, throttled={"power_cap": i / 2}))
    assert [line.throttle_seconds["power_cap"] for line in readings(trace.path)] == [0, 0.5, 1, 1.5, 2]


def test_a_line_that_was_torn_by_a_kill_is_left_out(tmp_path):
    trace = PowerTrace(tmp_path / "a.trace.csv")
    for i in range(5):
        trace.add(owed(float(i), 10.0 * i))
    trace.path.write_bytes(trace.path.read_bytes()[:-9])
    assert len(list(read_trace(trace.path, warn=lambda _: None))) == 4


def test_a_metered_trial_leaves_a_trace_that_ends_with_its_journal(tmp_path):
    watts = tmp_path / "watts.csv"
    watts.write_text("time_seconds,device,power_watts\n0,GPU-0,50\n")
    section = TelemetrySection(source=f"replay:{watts}", interval_seconds=0.02)
    with metered(tmp_path / "trial", "rank0", section, on_gpu=False, traced=True) as (meter, _):
        time.sleep(0.7)
        meter.close()
        time.sleep(0.3)  # what is done after the bill was closed is not its
    (path,) = (tmp_path / "trial").glob("*.trace.csv")
    assert path.name == "attempt1-rank0.trace.csv"
    lines, bill = readings(path), read_journal(tmp_path / "trial" / "attempt1-rank0.energy.json")
    assert lines[-1].energy_joules == pytest.approx(bill.joules, rel=1e-6)
    began = lines[0].energy_joules or 0.0  # on a busy machine the first look is late
    assert integral(lines) == pytest.approx(bill.joules - began, rel=0.02, abs=1.0)
    assert lines[1].memory_used_bytes > 1e6
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)


def test_a_trace_looks_no_more_often_than_the_journal_is_written(tmp_path):
    section = TelemetrySection(source="estimated", journal_seconds=30.0)
    with metered(tmp_path, "rank0", section, on_gpu=False, traced=True):
        time.sleep(0.6)
    assert len(readings(tmp_path / "attempt1-rank0.trace.csv")) == 2  # the first and the last


def test_nobody_else_is_traced(tmp_path):
    with metered(tmp_path, "driver", TelemetrySection(source="estimated"), on_gpu=False):
        pass
    assert not list(tmp_path.glob("*.trace.csv"))
