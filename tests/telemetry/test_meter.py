"""The meter against closed forms, with an injected clock; then its journal, and processes killed under it."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from scripted import ScriptedSource

from wattier_telemetry import (
    Device,
    EnergyMeter,
    EnergyReport,
    Reading,
    SourceUnavailable,
    bill,
    open_source,
    read_journal,
)
from wattier_telemetry.account import Account
from wattier_telemetry.source import PowerSource
from wattier_telemetry.sources.rapl import RaplSource
from wattier_telemetry.sources.replay import ReplaySource


class Clock:
    """A clock that moves when told to, so that the background thread (which waits an hour) never interferes."""

    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


class Script(PowerSource):
    """A source that gives what the test says, at each moment."""

    name = "script"

    def __init__(self, readings, devices=1):
        self.readings = readings  # function of the device's index -> Reading, or raises
        self.listed = tuple(Device(f"d{i}", f"device {i}", "gpu", i) for i in range(devices))

    def devices(self):
        return self.listed

    def read(self, device):
        return self.readings(device.index)

    def close(self):
        pass


@pytest.fixture
def clock():
    return Clock()


class Settled(EnergyMeter):
    """A meter whose thread ends after its early first tick, so that the test's own steps are the only ones left."""

    def __enter__(self):
        super().__enter__()
        until(lambda: len(self._gaps) >= 2)
        self._stop.set()
        self._thread.join()
        return self


@pytest.fixture
def meter(clock):
    def make(source, **options):
        return Settled(source, clock=clock, monotonic=clock, **{"interval_seconds": 3600, **options})

    return make


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


def test_constant_watts(clock, meter, trace):
    with meter(ReplaySource(trace("0,g,250"), clock=clock)) as running:
        clock.now += 4
        assert running.so_far().joules == pytest.approx(1000)
        clock.now += 4
    report = running.report
    assert report.joules == pytest.approx(2000)
    assert (report.seconds, report.coverage_ratio, report.method) == (8, 1, "integrated")
    assert report.shares[0].key == ("g", 1000, 1008, 1)
    assert running.so_far() == report


def test_ramp(clock, meter, trace):
    with meter(ReplaySource(trace("1000,g,0", "1010,g,300"), clock=clock)) as running:
        clock.now += 7
    assert running.report.joules == pytest.approx(30 * 7**2 / 2)


def test_fraction_scales_a_device_but_not_an_estimate(clock, meter, trace):
    with meter(ReplaySource(trace("0,g,250"), clock=clock), fraction=0.25) as running:
        clock.now += 8
    assert running.report.joules == pytest.approx(500)
    assert running.report.shares[0].fraction == 0.25
    with EnergyMeter(open_source("estimated"), fraction=0.25) as running:
        pass
    assert running.report.shares[0].fraction == 1
    assert running.report.method == "estimated"


def test_power_samples_are_integrated_with_their_true_times(clock, meter):
    with meter(Script(lambda _: Reading(clock.now, power_watts=clock.now - 1000))) as running:
        for step in (1, 0.5, 2.5):
            clock.now += step
            running.so_far()
    assert running.report.joules == pytest.approx(4**2 / 2)
    assert (running.report.method, running.report.coverage_ratio) == ("integrated", 1)


def test_rapl_wrap_around(clock, meter, powercap):
    counter = powercap / "intel-rapl:0/energy_uj"
    counter.write_text("9000000")
    with meter(RaplSource(powercap)) as running:
        counter.write_text("500000")
        clock.now += 1
    assert running.report.joules_by_domain == {"cpu": pytest.approx(1.5), "dram": 0.0}
    assert running.report.method == "counter"


@pytest.mark.parametrize("case", [(100.0, 300.0, "integrated", 3), (None, 200.0, "counter", 2)])
def test_backward_counter(clock, meter, case):
    watts, joules, method, covered = case
    counter = iter([5000, 5100, 4000, 4100])
    value = {}

    def reading(_):
        if clock.now not in value:
            value[clock.now] = next(counter)
        return Reading(clock.now, power_watts=watts, energy_joules=value[clock.now])

    with meter(Script(reading)) as running:
        for _ in range(3):
            clock.now += 1
            running.so_far()
    assert running.report.joules == pytest.approx(joules)
    assert running.report.method == method
    assert running.report.coverage_ratio == pytest.approx(covered / 3)
    assert "went backward 1 time" in running.report.warnings[0]


def test_failed_readings_cost_a_power_meter_its_coverage_but_a_counter_nothing(clock, meter):
    def reading(index):
        if 1001 <= clock.now < 1003:
            raise SourceUnavailable("fell off the bus")
        return Reading(clock.now, **{"energy_joules" if index else "power_watts": clock.now if index else 10.0})

    with meter(Script(reading, devices=2), interval_seconds=0.3) as running:
        for _ in range(4):
            clock.now += 1
            running.so_far()
    sampled, counted = running.report.shares
    assert (sampled.joules, sampled.coverage_ratio) == (pytest.approx(40), pytest.approx(1 / 4))
    assert (counted.joules, counted.coverage_ratio) == (pytest.approx(4), 1)
    assert any("fell off the bus" in text for text in running.report.warnings)


@pytest.mark.parametrize("refresh", [0.0, 0.1])
@pytest.mark.parametrize(
    "garbage",
    [
        {"power_watts": float("nan")},
        {"power_watts": -100.0},
        {"power_watts": 0xFFFFFFFF / 1e3},
        {"energy_joules": float("nan")},
        {"energy_joules": float("inf")},
        {"energy_joules": (2**64 - 1) / 1e3},
        {"throttle_seconds": {"power_cap": float("nan")}},
    ],
    ids=str,
)
def test_a_reading_that_is_garbage_is_not_billed(clock, meter, garbage, refresh):
    """Once among a hundred readings of 400 W, taken each 20 ms; the counter is exact then."""

    def reading(_):
        now = clock.now - 1000
        figures = {"power_watts": 400.0, "energy_joules": 400.0 * now, "power_limit_watts": 700.0}
        return Reading(clock.now, **(figures | garbage if now == pytest.approx(0.6) else figures))

    source = Script(reading)
    source.listed = (Device("d0", "device", "gpu", 0, counter_refresh_seconds=refresh),)
    with meter(source) as running:
        for _ in range(100):
            clock.now += 0.02
            running.so_far()
    assert running.report.joules == pytest.approx(800, rel=0.02)
    assert running.report.joules_low <= 800.001
    assert running.report.joules_high == pytest.approx(800, rel=0.06)
    assert ("jumped" in str(running.report.warnings)) == (garbage == {"energy_joules": (2**64 - 1) / 1e3})


@pytest.mark.parametrize(("hz", "duty"), [(1.0, 0.2), (0.5, 0.5), (0.9, 0.3)])
def test_power_looked_at_once_a_second_does_not_overrule_a_counter_that_moves(clock, hz, duty):
    """The samples of such a load may all, or by turns, fall on its bursts."""

    def joules(t):
        periods, phase = divmod(t * hz, 1)
        bursts = (periods * duty + min(phase, duty)) / hz
        return 700 * bursts + 70 * (t - bursts)

    account = Account(Device("d", "device", "gpu", 0, counter_refresh_seconds=0.1), "counter", longest_gap_seconds=5)
    for second in range(121):
        t = second + 10.05
        watts = 700.0 if (t * hz) % 1 < duty else 70.0
        account.add(t, Reading(t, power_watts=watts, energy_joules=joules(int(t * 10) / 10)))
    assert account.joules == pytest.approx(joules(130.05) - joules(10.05), rel=0.01)


@pytest.mark.parametrize("slow", [{2}, {2, 3}])
def test_joules_and_seconds_end_together_though_an_answer_is_late(clock, slow):
    """An exact counter at 400 W, whose answers take 0.1 ms, and some of them 50 ms, from the closing on."""
    closing = []

    def reading(_):
        if closing:
            closing.append(None)
        clock.now += 0.05 if len(closing) in slow else 0.0001
        return Reading(clock.now, energy_joules=400.0 * (clock.now - 1000))

    with Settled(Script(reading), clock=clock, monotonic=clock, interval_seconds=3600) as running:
        clock.now += 0.5
        closing.append(None)
    assert running.report.joules == pytest.approx(400 * running.report.seconds, rel=1e-3)
    assert running.report.shares[0].joules_high - running.report.joules < 0.1


class Driver:
    """An exact counter at 100 W whose answers take 1 ms; what the closing's do, the test says."""

    def __init__(self, clock, closing):
        self.clock, self.closing, self.asked, self.asked_at_closing = clock, closing, 0, None

    def __call__(self, _):
        self.asked += 1
        seconds, fails = 0.001, False
        if self.asked_at_closing is not None:
            seconds, fails = self.closing[min(self.asked_at_closing, len(self.closing) - 1)]
            self.asked_at_closing += 1
        self.clock.now += seconds
        if fails:
            raise SourceUnavailable("shaky")
        return Reading(self.clock.now, energy_joules=100.0 * (self.clock.now - 1000))

    def report(self, seconds=0.5):
        script = Script(self)
        with Settled(script, clock=self.clock, monotonic=self.clock, interval_seconds=3600) as running:
            self.clock.now += seconds
            self.asked_at_closing = 0
        return running.report


def test_a_late_answer_is_not_given_up_for_a_failure(clock):
    driver = Driver(clock, [(0.01, False), (0.001, True)])
    report = driver.report()
    assert report.joules == pytest.approx(51.5, abs=1)
    assert (report.coverage_ratio, report.warnings) == (1.0, ())


@pytest.mark.parametrize("fails", [False, True])
def test_a_driver_that_hangs_is_asked_once(clock, fails):
    driver = Driver(clock, [(1.0, fails)])
    report = driver.report()
    assert driver.asked_at_closing == 1
    assert report.seconds == pytest.approx(0.5, abs=0.02)


def test_a_quick_failure_does_not_make_what_is_usual_late(clock):
    driver = Driver(clock, [(0.001, False)])
    with Settled(Script(driver), clock=clock, monotonic=clock, interval_seconds=3600) as running:
        driver.closing, driver.asked_at_closing = [(0.0, True)], 0
        running.so_far()
        driver.asked_at_closing, before = None, driver.asked
        for _ in range(10):
            running.so_far()
        assert driver.asked == before + 10


def test_a_signal_handler_that_closes_the_meter_while_it_opens_is_heard(clock):
    meters = []

    def reading(_):
        if meters and meters[0].report_is_wanted:
            meters[0].report_is_wanted = False
            meters[0].close()
        return Reading(clock.now, energy_joules=100.0 * (clock.now - 1000))

    class Closed(EnergyMeter):
        report_is_wanted = True

    meters.append(Closed(Script(reading), clock=clock, monotonic=clock, interval_seconds=3600))
    meters[0]._source.read = lambda _: Reading(clock.now)  # the preview
    meters[0]._source.read_energy = reading
    with meters[0] as running:
        assert running.report.seconds == 0
        assert running._thread is None
    assert running.so_far() is running.report


@pytest.mark.parametrize("late", [(0.0, 0.0), (0.009, 0.0), (0.0, 0.009), (0.003, 0.008), (0.008, 0.003)])
@pytest.mark.parametrize("begin", [0.001, 0.004, 0.05, 0.099])
def test_a_tick_that_was_seen_a_little_late_moves_the_edge_no_more_than_that(late, begin):
    """600 W on a counter refreshed each 0.1 s: a refresh measured too short must not look like a missed tick."""

    def joules(t):
        return 600 * int(t * 10 + 1e-9) / 10

    account = Account(Device("d", "device", "gpu", 0, counter_refresh_seconds=0.1), "counter", longest_gap_seconds=5)
    ticks = [0.1 + late[0], 0.2 + late[1]]  # when the first two readings that show a tick were taken
    times = [begin, *(t for tick in ticks for t in (tick - 0.0095, tick)), *(0.25 + 0.05 * k for k in range(15)), 0.953]
    for t in sorted(t for t in times if t >= begin):
        account.add(t, Reading(t, power_watts=600.0, energy_joules=joules(t)))
    account.close(0.953)
    account.look_back(0.996, Reading(0.996, power_watts=600.0, energy_joules=joules(0.996)))
    account.look_back(1.001, Reading(1.001, power_watts=600.0, energy_joules=joules(1.001)))
    truth, share = 600 * (0.953 - begin), account.share(0.0, 0.953 - begin)
    assert share.joules == pytest.approx(truth, abs=600 * 0.015)
    assert share.joules_low <= truth <= share.joules_high


def test_processes_that_cannot_be_listed_do_not_cost_the_joules(clock, meter):
    source = Script(lambda _: Reading(clock.now, energy_joules=100 * clock.now))

    def refuse(_):
        raise OSError("no processes here")

    source.busy_by_pid = refuse
    with meter(source, fraction=0.5) as running:
        clock.now += 4
    assert running.report.joules == pytest.approx(200)
    assert running.report.shares[0].attribution == "equal"


@pytest.mark.timeout(30)
def test_a_signal_handler_may_close_the_meter_while_it_is_read():
    """Sampled power alone: its joules are 100 W times the window, however late a reading comes."""

    class Slow(ScriptedSource):
        def read(self, device):
            time.sleep(0.02)
            return Reading(time.time(), power_watts=100.0)  # no lock: the handler may come while it is held

    for delay in (0.11, 0.117, 0.124, 0.133, 0.142, 0.151):
        source = Slow(method="integrated", g=100.0)
        source.counter = False
        running = EnergyMeter(source, interval_seconds=0.02)
        old = signal.signal(signal.SIGUSR1, lambda *_, running=running: running.close())
        sender = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGUSR1))
        try:
            with running:
                sender.start()
                while running._report is None:
                    running.so_far()
        finally:
            sender.join()
            signal.signal(signal.SIGUSR1, old)
        assert running.report.seconds >= delay
        assert running.report.joules == pytest.approx(100 * running.report.seconds, rel=1e-5)


def test_a_signal_handler_may_close_the_meter_while_it_is_closed():
    """A handler that comes while the event that stops its thread holds its lock would wait for itself."""
    running = EnergyMeter(ScriptedSource(g=100.0), interval_seconds=0.02)
    seen = []

    class Interrupted(threading.Event):
        def set(self):
            with self._cond:
                running.close()
                seen.append(running.report)
            super().set()

    running._stop = Interrupted()
    with running:
        time.sleep(0.1)
    assert [running.report] == seen, "it was closed once"
    assert not running._thread.is_alive()


def test_a_forked_child_leaves_its_parents_window_and_journal_alone(trace, tmp_path):
    path = tmp_path / "a.energy.json"
    with EnergyMeter(open_source(f"replay:{trace('0,g,100')}"), journal=path, interval_seconds=0.05) as running:
        time.sleep(0.2)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(5)
            try:
                running.so_far()
                running.close()
            except BaseException:
                os._exit(1)  # it must not go on with the tests
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        before = read_journal(path)
        until(lambda: read_journal(path).joules > before.joules + 10)  # the parent's thread goes on writing
        assert json.loads(path.read_text())["final"] is False
        so_far = running.so_far()
        assert read_journal(path).joules >= so_far.joules
    assert read_journal(path) == running.report


def test_silent_device_is_unknown(clock, meter):
    def reading(_):
        raise SourceUnavailable("no answer")

    with meter(Script(reading)) as running:
        clock.now += 5
    assert (running.report.joules, running.report.coverage_ratio, running.report.seconds) == (None, 0, 5)


def test_background_thread_samples_in_real_time():
    source = ScriptedSource(method="integrated", g=100.0)
    source.counter = False
    began = time.monotonic()
    with EnergyMeter(source, interval_seconds=0.02) as running:
        opened = time.monotonic()
        until(lambda: source.reads >= 10)
        done = time.monotonic()
    assert done - opened <= running.report.seconds <= time.monotonic() - began
    assert running.report.joules == pytest.approx(100 * running.report.seconds, rel=1e-5)


def test_misuse(trace, tmp_path):
    source = open_source(f"replay:{trace('0,g,100')}")
    for options in ({"fraction": 0}, {"fraction": 1.1}, {"interval_seconds": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            EnergyMeter(source, **options)
    with pytest.raises(RuntimeError, match="so_far"):
        _ = EnergyMeter(source).report
    with pytest.raises(ValueError, match=r"energy\.json"), EnergyMeter(source, journal=tmp_path / "a.json"):
        pass
    with EnergyMeter(source) as running:
        pass
    with pytest.raises(RuntimeError, match="one window"):
        running.__enter__()


class TestJournal:
    def test_reserves_while_running_and_is_exact_when_closed(self, clock, meter, trace, tmp_path):
        path = tmp_path / "trial" / "rank0.energy.json"
        source = ReplaySource(trace("0,g,100"), clock=clock)
        with meter(source, journal=path, interval_seconds=600) as running:
            owed = read_journal(path)  # opened a moment ago: two and a half intervals are reserved
            assert owed.joules == pytest.approx(100 * 1500)
            assert "was not closed" in owed.warnings[0]
            clock.now += 10
            running.so_far()
            owed = read_journal(path)
            assert owed.joules == pytest.approx(100 * 1510)
            assert owed.shares[0].end_seconds == pytest.approx(2510)
        assert read_journal(path) == running.report
        assert running.report.joules == pytest.approx(1000)
        assert list(path.parent.iterdir()) == [path]

    def test_reserves_at_the_mean_when_power_has_just_dropped(self, clock, meter, trace, tmp_path):
        source = ReplaySource(trace("0,g,100", "1010,g,100", "1010.001,g,1"), clock=clock)
        path = tmp_path / "a.energy.json"
        with meter(source, journal=path, interval_seconds=600) as running:
            clock.now += 11
            so_far = running.so_far().joules
            assert read_journal(path).joules == pytest.approx(so_far + so_far / 11 * 1500)

    def test_second_attempt_keeps_the_first_bill(self, clock, meter, trace, tmp_path):
        for watts in (100, 10):
            source = ReplaySource(trace(f"0,g,{watts}", name=f"{watts}.csv"), clock=clock)
            with meter(source, journal=tmp_path / "bill" / "rank0.energy.json") as running:
                clock.now += 10
        assert running.journal.name == "rank0.2.energy.json"
        total = bill(tmp_path / "bill")
        assert total.joules == pytest.approx(1100)
        assert (total.seconds, total.warnings) == (20, ())

    def test_many_devices_outgrow_the_page(self, clock, meter, tmp_path):
        path = tmp_path / "a.energy.json"
        source = Script(lambda _: Reading(clock.now, power_watts=1.0, energy_joules=clock.now), devices=64)
        with meter(source, journal=path) as running:
            clock.now += 2
            running.so_far()
            assert len(read_journal(path).shares) == 64
        assert read_journal(path).joules == pytest.approx(128)

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", '{"final": true}', '{"final": 1, "report": {}}', '{"final": true, "report": {}}']
    )
    def test_corrupt_file_is_named(self, tmp_path, text):
        path = tmp_path / "bad.energy.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"bad\.energy\.json"):
            read_journal(path)
        assert "bad.energy.json" in bill(tmp_path).warnings[0]
        assert bill(tmp_path).joules is None

    def test_missing(self, tmp_path):
        assert bill(tmp_path / "nowhere") == EnergyReport.empty()
        with pytest.raises(ValueError, match="cannot be read"):
            read_journal(tmp_path / "absent.energy.json")

    def test_a_reader_never_sees_garbage(self, trace, tmp_path):
        path = tmp_path / "a.energy.json"
        with EnergyMeter(open_source(f"replay:{trace('0,g,100')}"), journal=path, interval_seconds=0.001):
            for _ in range(300):
                assert json.loads(path.read_text())["final"] is False

    def test_full_disk_does_not_stop_the_work(self, clock, meter, trace, tmp_path, monkeypatch):
        source = ReplaySource(trace("0,g,100"), clock=clock)
        with meter(source, journal=tmp_path / "a.energy.json") as running:

            def full(*_, **__):
                raise OSError(28, "No space left on device")

            monkeypatch.setattr("os.pwrite", full)
            clock.now += 1
            assert running.so_far().joules == pytest.approx(100)
        assert "No space left" in running.report.warnings[0]


CHILD = """
import sys, time
from pathlib import Path
from wattier_telemetry import EnergyMeter
from wattier_telemetry.sources.replay import ReplaySource

class Told(ReplaySource):
    def read_energy(self, device):
        reading = super().read_energy(device)
        log.write(f"read {time.time():.6f}\\n")
        return reading

with open(sys.argv[3], "w", buffering=1) as log:
    with EnergyMeter(Told(Path(sys.argv[1])), journal=Path(sys.argv[2]), interval_seconds=0.05):
        while True:
            log.write(f"alive {time.time():.6f}\\n")
            time.sleep(0.003)
"""


@pytest.mark.parametrize("seed", range(8))
def test_killed_process_is_billed_and_never_too_little(seed, trace, tmp_path):
    """What is reserved beyond its end is what the docs say: two and a half intervals, or of its own longest stall."""
    watts, path, log = 400.0, tmp_path / "bill" / "rank0.energy.json", tmp_path / "alive.log"
    command = [sys.executable, "-c", CHILD, str(trace(f"0,g,{watts}")), str(path), str(log)]
    child = subprocess.Popen(command)
    try:
        until(lambda: child.poll() is not None or (log.exists() and "alive" in log.read_text()))
        assert child.poll() is None
        time.sleep(random.Random(seed).uniform(0.0, 0.6))
    finally:
        child.kill()
        child.wait()
    lines = [line.split() for line in log.read_text().splitlines() if len(line.split()[-1]) == 17]
    alive, reads = ([float(at) for word, at in lines if word == kind] for kind in ("alive", "read"))
    owed = bill(path.parent)
    (share,) = owed.shares
    # A reading is logged a moment after it was asked for: two asked for so far apart lie within three of the log.
    stall = max((c - a for a, c in zip(reads, reads[2:], strict=False)), default=reads[-1] - reads[0])
    # A machine that held the meter up for more than an interval, and the work not, is the exception that is documented.
    alive_until = alive[-1] if alive[-1] - reads[-1] <= 0.05 else reads[-1]
    assert watts * (alive_until - alive[0]) <= owed.joules
    assert owed.joules == pytest.approx(watts * (share.end_seconds - share.start_seconds), rel=1e-3)
    assert alive_until <= share.end_seconds <= reads[-1] + 2.5 * max(0.05, stall) + 1e-3
    assert share.start_seconds <= alive[0]
    assert "was not closed" in owed.warnings[0]
