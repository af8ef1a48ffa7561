"""The sampler on a scripted source: whose joules, when samples come, what survives a restart, a hang, a set clock."""

import itertools
import json
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripted import ScriptedSource

from wattier_telemetry import TrialRegistration
from wattier_telemetry.exporter import lane as lane_module
from wattier_telemetry.exporter import trials
from wattier_telemetry.exporter.attribution import Ledger, Part, roots_of, split
from wattier_telemetry.exporter.lane import Lane
from wattier_telemetry.exporter.sampler import Sampler
from wattier_telemetry.exporter.series import WattierView
from wattier_telemetry.exporter.state import SamplerState
from wattier_telemetry.exporter.trials import MOST_PAIRS, Roster
from wattier_telemetry.registration import read_registrations

A, B = ("r", "s", "a", "0"), ("r", "s", "b", "0")
GOOD = {"run": "r", "stage": "s", "trial": "t", "rank": 0, "pid": os.getpid(), "host": socket.gethostname()}
BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class ListSink:
    def __init__(self):
        self.samples = []

    def add(self, time_seconds, points):
        self.samples.append((time_seconds, points))

    def points(self):
        return []

    def close(self):
        pass


@pytest.fixture
def child():
    """Return a function that starts a process which does nothing."""
    children = []

    def start():
        children.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]))
        return children[-1]

    yield start
    for process in children:
        process.kill()
        process.wait()


@pytest.fixture
def sampling(tmp_path):
    """Return a function that starts a sampler, and closes it and its sources in the end."""
    running = []

    def start(*sources, **options):
        sampler = Sampler(sources, registry=tmp_path / "trials", **{"period_seconds": 0.05, **options})
        sampler.start()
        running.append((sampler, sources))
        return sampler

    yield start
    for sampler, sources in running:
        for source in sources:
            source.close()
        sampler.close()


@pytest.fixture
def register(tmp_path):
    def write(trial, pid=None, uuids=("g",), fraction=1.0, **more):
        registration = TrialRegistration(
            "r", "s", trial, 0, os.getpid() if pid is None else pid, tuple(uuids), fraction, **more
        )
        registration.write(tmp_path / "trials")
        return lambda: registration.withdraw(tmp_path / "trials")

    return write


def points(sampler, ended_after=0):
    sampler.fresh(0.0)
    with sampler.locked:
        node, _ = sampler.look(ended_after=ended_after)
        view = WattierView()
        found = [*view.devices(node.watched, node), *view.common(node)]
    return {(p.name, frozenset(p.labels)): p.value for p in found}


def pick(found, name, **labels):
    return [value for (n, have), value in found.items() if n == name and labels.items() <= dict(have).items()]


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


class TestSplit:
    def test_registered_parts_leave_a_rest(self):
        weights, attribution = split([Part(A, 0.25, 1), Part(B, 0.5, 2)], {}, {})
        assert (weights, attribution) == ({A: 0.25, B: 0.5}, "equal")

    def test_parts_above_one_are_scaled(self):
        assert split([Part(A, 1.0, 1), Part(B, 1.0, 2)], {}, {}).weights == {A: 0.5, B: 0.5}

    def test_alone_is_whole(self):
        assert split([Part(A, 1.0, 1)], {}, {}) == ({A: 1.0}, "whole")

    def test_utilization_decides_and_strangers_are_nobodys(self):
        weights, attribution = split([Part(A, 0.5, 1), Part(B, 0.5, 2)], {1: 0.3, 7: 0.3, 9: 0.4}, {1: 1, 7: 2})
        assert attribution == "utilization"
        assert weights == pytest.approx({A: 0.3, B: 0.3})

    def test_unknown_pids_or_idle_fall_back_to_parts(self):
        parts = [Part(A, 0.5, 1), Part(B, 0.5, 2)]
        assert split(parts, {77: 0.9}, {}).attribution == "equal"
        assert split(parts, {1: 0.0}, {1: 1}).attribution == "equal"

    def test_ranks_in_one_process_share_its_part(self):
        assert split([Part(A, 1.0, 1), Part(B, 1.0, 1)], {1: 0.8}, {1: 1}).weights == {A: 0.5, B: 0.5}

    def test_a_childs_work_is_its_trials(self, child):
        pid = child().pid
        known = {}
        assert roots_of({pid: 0.5, 2**22 + 1: 0.1}, {os.getpid()}, known) == {pid: os.getpid()}
        assert roots_of({}, {os.getpid()}, known) == {}
        assert known == {}


class TestLedger:
    def test_shares_and_rest_equal_the_total_exactly(self):
        ledger = Ledger()
        for step, third in itertools.product(range(1, 2000, 7), (1 / 3, 0.1, 0.999999)):
            ledger.book(step, {A: third, B: 1 - third})
            assert ledger.total == ledger.rest + sum(ledger.shares.values())
        assert ledger.total == 3 * sum(range(1, 2000, 7))

    def test_nothing_ever_falls(self):
        ledger = Ledger()
        ledger.book(100, {A: 0.5})
        ledger.book(-70, {A: 0.5})
        assert (ledger.total, ledger.rest, ledger.shares) == (100, 50, {A: 50})

    def test_old_trials_are_forgotten_but_not_their_joules(self):
        ledger = Ledger()
        for i in range(1100):
            ledger.book(10, {("r", "s", str(i), "0"): 1.0})
        ledger.forget({("r", "s", "0", "0")})
        assert len(ledger.shares) == 1000
        assert ledger.shares["r", "s", "0", "0"] == 10
        assert ledger.forgotten == 1000
        assert Ledger.from_dict(json.loads(json.dumps(ledger.to_dict()))) == ledger

    def test_books_that_do_not_balance_are_refused(self):
        with pytest.raises(ValueError, match="total"):
            Ledger.from_dict({"total": 5, "rest": 1, "forgotten": 0, "shares": [[*A, 3]]})
        with pytest.raises(ValueError, match="negative"):
            Ledger.from_dict({"total": 5, "rest": 8, "forgotten": 0, "shares": [[*A, -3]]})


def reading_of(source, joules):
    """Return when the reading was taken at which a counter that began at the first one had grown by so many joules."""
    (watts,) = set(source.watts.values())
    first = source.read_times[0]
    at = min(source.read_times, key=lambda at: abs(watts * (at - first) - joules))
    assert watts * (at - first) == pytest.approx(joules, abs=1e-3)
    return at


class TestBilling:
    def test_two_trials_and_the_rest(self, sampling, register):
        source, other = ScriptedSource(g=200.0), ScriptedSource("another", other=50.0)
        register("a", fraction=0.5)
        register("b", fraction=0.25)
        sampler = sampling(source, other)
        until(lambda: source.reads > 8 and other.reads > 8)
        seen = source.read_times[-2]
        found = points(sampler)
        (total,) = pick(found, "wattier_accounted_energy_joules_total", uuid="g")
        (rest,) = pick(found, "wattier_unattributed_energy_joules_total", uuid="g")
        (a,) = pick(found, "wattier_trial_energy_joules_total", trial="a")
        (b,) = pick(found, "wattier_trial_energy_joules_total", trial="b")
        assert reading_of(source, total) >= seen
        assert (a, b) == pytest.approx((total / 2, total / 4), rel=1e-6)
        assert a + b + rest == pytest.approx(total, abs=1e-9)
        assert pick(found, "wattier_unattributed_energy_joules_total", uuid="other") == pick(
            found, "wattier_accounted_energy_joules_total", uuid="other"
        )

    def test_a_killed_trial_is_billed_to_its_end_and_shown_once_more(self, sampling, register, child):
        process = child()
        register("a", pid=process.pid)
        source = ScriptedSource(g=1000.0)
        sampler = sampling(source, period_seconds=500.0)
        assert pick(points(sampler), "wattier_trial_info", trial="a")
        time.sleep(0.4)
        end = time.monotonic()
        process.kill()
        process.wait()
        gone = time.monotonic()
        until(lambda: not pick(points(sampler), "wattier_trial_info", trial="a"))
        with sampler.locked:
            _, number = sampler.look()
        (joules,) = pick(points(sampler), "wattier_trial_energy_joules_total", trial="a")
        after = [at for at in source.read_times if at > gone]
        assert end <= reading_of(source, joules) <= after[1]  # looked at when it ends, not every 500 s
        assert not pick(points(sampler, ended_after=number), "wattier_trial_energy_joules_total")

    def test_a_trial_that_comes_later_owes_nothing_for_before(self, sampling, register):
        source = ScriptedSource(g=1000.0)
        sampler = sampling(source, period_seconds=10.0)
        time.sleep(0.5)
        began = time.monotonic()
        register("a")
        until(lambda: pick(points(sampler), "wattier_trial_energy_joules_total", trial="a"))
        found = points(sampler)
        (own,) = pick(found, "wattier_trial_energy_joules_total")
        (rest,) = pick(found, "wattier_unattributed_energy_joules_total")
        assert reading_of(source, rest) >= began  # all until a reading after it came is nobody's
        assert reading_of(source, rest + own) in source.read_times[-2:]

    def test_utilization_is_asked_of_the_driver(self, sampling, register, child):
        process = child()
        source = ScriptedSource(g=100.0)
        source.busy = {process.pid: 0.9, os.getpid(): 0.3}
        register("a", pid=process.pid, fraction=0.5)
        register("b", fraction=0.5)
        sampler = sampling(source)
        until(lambda: sampler.watched[0].latest.attribution == "utilization")
        found = points(sampler)
        shares = "wattier_trial_device_share_ratio"
        # The child is a trial of its own, though it is also a child of the other trial's process.
        assert pick(found, shares, trial="a", attribution="utilization") == pytest.approx([0.75])
        assert pick(found, shares, trial="b", attribution="utilization") == pytest.approx([0.25])

    def test_estimates_are_not_split(self, sampling, register):
        register("a", energy_joules=12.5, method="estimated")
        found = points(sampling(ScriptedSource(g=100.0, method="estimated")))
        assert not pick(found, "wattier_trial_energy_joules_total")
        assert pick(found, "wattier_trial_metered_joules_total", trial="a") == [12.5]

    def test_lost_device_bills_no_trial_that_left_meanwhile(self, sampling, register):
        source = ScriptedSource(g=1000.0)
        leave = register("a")
        sampler = sampling(source)
        until(lambda: pick(points(sampler), "wattier_trial_energy_joules_total"))
        source.failing.add("g")
        until(lambda: sampler.watched[0].errors)
        leave()
        until(lambda: not sampler.look()[0].trials and not sampler.watched[0].present)
        (billed,) = pick(points(sampler), "wattier_trial_energy_joules_total")
        time.sleep(0.3)
        source.failing.clear()
        until(lambda: sampler.watched[0].ledger.rest > 250e6)
        assert pick(points(sampler), "wattier_trial_energy_joules_total") == [billed]

    def test_number_of_trials_is_bounded(self, tmp_path, register, caplog):
        for i in range(MOST_PAIRS // 50 + 2):
            register(f"t{i:03}", uuids=[f"u{j}" for j in range(50)])
        roster = Roster(tmp_path / "trials")
        assert len(roster.refresh()) == MOST_PAIRS // 50
        assert roster.not_shown == 2
        assert "2 registered trials are not shown" in caplog.text
        roster.close()

    def test_a_trial_that_moves_to_another_device_is_billed_on_both(self, sampling, register):
        withdraw = register("a", uuids=("g",))
        began = time.monotonic()
        sampler = sampling(ScriptedSource(g=1000.0, h=1000.0), period_seconds=5.0)
        points(sampler)
        on_g = time.monotonic()
        time.sleep(0.5)
        move = time.monotonic()
        register("a", uuids=("h",))
        until(lambda: pick(points(sampler), "wattier_trial_info", trial="a", uuid="h"))
        points(sampler)
        on_h = time.monotonic()
        time.sleep(0.5)
        leave = time.monotonic()
        withdraw()
        until(lambda: not pick(points(sampler), "wattier_trial_info", trial="a"))
        found = points(sampler)
        gone = time.monotonic()
        (of_g,) = pick(found, "wattier_trial_energy_joules_total", uuid="g")
        (of_h,) = pick(found, "wattier_trial_energy_joules_total", uuid="h")
        assert 1000 * (move - on_g) <= of_g <= 1000 * (on_h - began)
        assert 1000 * (leave - on_h) <= of_h <= 1000 * (gone - move)

    def test_a_reading_that_is_garbage_costs_nobody_else_his_joules(self, sampling):
        class Garbage(ScriptedSource):
            def read(self, device):
                reading = super().read(device)
                return replace(reading, energy_joules=float("nan")) if device.uuid == "bad" else reading

        sampler = sampling(Garbage(bad=100.0, good=100.0))
        until(lambda: pick(points(sampler), "wattier_accounted_energy_joules_total", uuid="good")[0] > 20)
        assert pick(points(sampler), "wattier_accounted_energy_joules_total", uuid="bad")[0] > 10  # by its power

    def test_a_module_that_holds_other_gpus_is_not_counted_beside_them(self, tmp_path):
        amd, cray = ScriptedSource("amd", a=1.0, b=1.0), ScriptedSource("cray", c=1.0)
        both = Sampler([amd, cray], registry=tmp_path)
        assert [(watched.device.uuid, watched.card) for watched in both.watched] == [("a", 0), ("b", 1)]
        alone = Sampler([cray], registry=tmp_path)
        assert [(watched.device.uuid, watched.card) for watched in alone.watched] == [("c", None)]

    def test_long_names_are_cut(self, tmp_path, register):
        register("x" * 500)
        roster = Roster(tmp_path / "trials")
        ((_, _, trial, _),) = roster.refresh()
        assert trial == "x" * 200
        roster.close()


class TestHostileRegistrations:
    @pytest.mark.parametrize(
        "more",
        [{"pid": 10**30}, {"pid": -1}, {"epoch": 10**400}, {"fraction": 10**400}, {"device_uuids": "g"}],
        ids=lambda more: next(iter(more)) + str(next(iter(more.values())))[:2],
    )
    def test_a_number_that_cannot_be(self, tmp_path, register, more):
        register("good")
        (tmp_path / "trials/bad.json").write_text(json.dumps({**GOOD, "device_uuids": ["g"], **more}))
        assert [key[2] for key in Roster(tmp_path / "trials").refresh()] == ["good"]
        assert [trial.trial for trial in read_registrations(tmp_path / "trials")] == ["good"]

    def test_brackets_without_end(self, tmp_path, register):
        register("good")
        (tmp_path / "trials/bad.json").write_text("[" * 100_000)
        assert len(Roster(tmp_path / "trials").refresh()) == len(read_registrations(tmp_path / "trials")) == 1

    @pytest.mark.timeout(20)
    def test_a_pipe_a_link_and_a_file_that_is_huge(self, tmp_path, register):
        register("good")
        os.mkfifo(tmp_path / "trials/pipe.json")
        (tmp_path / "trials/link.json").symlink_to("/dev/zero")
        with (tmp_path / "trials/huge.json").open("wb") as file:
            file.truncate(2**40)
        assert len(Roster(tmp_path / "trials").refresh()) == len(read_registrations(tmp_path / "trials")) == 1

    def test_a_crowd_takes_no_more_descriptors_than_are_shown(self, tmp_path):
        for i in range(MOST_PAIRS + 500):
            (tmp_path / f"{i:05}.json").write_text(json.dumps({**GOOD, "trial": str(i), "device_uuids": ["g"]}))
        before = len(list(Path("/proc/self/fd").iterdir()))
        roster = Roster(tmp_path)
        assert (len(roster.refresh()), roster.not_shown) == (MOST_PAIRS, 500)
        assert len(list(Path("/proc/self/fd").iterdir())) - before <= MOST_PAIRS + 10
        roster.close()

    def test_a_folder_made_anew_is_listened_to(self, tmp_path, register, monkeypatch):
        """Also where the new folder has the inode of the old one, as it often has."""
        monkeypatch.setattr(trials, "_EVENT_SECONDS", 300)
        roster = Roster(tmp_path / "trials")
        for _ in range(10):
            register("a")
            roster.refresh()
            shutil.rmtree(tmp_path / "trials")
            register("a")
            assert len(roster.refresh()) == 1
            time.sleep(0.15)
            roster.refresh()
            register("b")
            begin = time.monotonic()
            roster.wait()
            assert time.monotonic() - begin < 60
            assert len(roster.refresh()) == 2
            shutil.rmtree(tmp_path / "trials")
            roster.refresh()
        roster.close()


class TestSchedule:
    @pytest.fixture
    def play(self, monkeypatch):
        """Return a function that runs a lane's thread here, on a clock of its own: (times of its samples, lane).

        Each sample takes as long as it is told, and whoever waits is woken 0.3 ms late.
        """
        now, times = [1000.0], []

        class Wake:
            def wait(self, seconds):
                now[0] += seconds + 0.0003

            def notify_all(self):
                pass

        def run(period, costs):
            left = iter(costs)

            def book(lane, *_):
                times.append(lane.started_at - 1000.0)
                cost = next(left, None)
                now[0] += cost or 0.0
                if cost is None:
                    lane.close()

            lane = Lane(ScriptedSource(g=1.0), [], threading.RLock(), book)
            lane._wake = Wake()
            lane._run(1000.0, period)
            return times, lane.state(now[0])

        monkeypatch.setattr(lane_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
        return run

    @pytest.mark.parametrize("period", [0.01, 0.05, 1.0])
    def test_ticks_do_not_drift(self, play, period):
        times, state = play(period, [0.9 * period] * 500)
        assert times == pytest.approx([n * period for n in range(501)], abs=0.0003 + 1e-9)
        assert (state.samples, state.missed) == (501, 0)

    def test_the_real_thread_keeps_that_schedule(self, sampling):
        """A stall of the machine puts its latest sample off for a moment; a schedule that drifts never comes back."""
        source = ScriptedSource(g=1.0)
        sampler = sampling(source, period_seconds=0.01)
        time.sleep(1.5)

        def is_on_time():
            with sampler.locked:
                (lane,), times = sampler.look()[0].lanes, list(source.read_times)
            return abs((times[-1] - times[0]) / 0.01 - (lane.samples + lane.missed - 1)) < 1.5

        until(is_on_time)

    @pytest.mark.parametrize("held", [0.3, 0.45, 0.55, 1.2, 19.4, 19.6])
    def test_missed_ticks_are_counted_and_not_made_up(self, play, held):
        """A driver that hangs for so many periods beyond its own: those are gone, and no two samples are bunched."""
        times, state = play(0.05, [0.02] * 3 + [0.05 + held * 0.05] + [0.02] * 20)
        slots = [at / 0.05 for at in times]
        assert slots[:4] == pytest.approx([0, 1, 2, 3], abs=0.01)
        first = math.floor(4 + held + 0.5)  # the slot it is back for: that one, if it is less than half a period late
        assert math.floor(slots[4] + 1e-9) == first
        assert slots[5:] == pytest.approx(list(range(first + 1, first + 21)), abs=0.01)
        assert min(later - earlier for earlier, later in itertools.pairwise(slots)) > 0.5
        assert state.samples + state.missed == first + 21
        assert state.missed == first - 4

    @pytest.mark.parametrize("period", [0.009, 0.0, -1.0, float("nan"), float("inf")])
    def test_impossible_periods(self, period):
        with pytest.raises(ValueError, match="period_seconds"):
            Sampler([], period_seconds=period)

    def test_a_hung_driver_stops_its_own_devices_only(self, sampling):
        stuck, well = ScriptedSource(name="stuck", g=1.0), ScriptedSource(name="well", h=2.0)
        sampler = sampling(stuck, well)
        sampler.stale_seconds = 0.5
        until(lambda: stuck.reads and well.reads)
        stuck.gate.clear()
        until(lambda: not pick(points(sampler), "wattier_power_watts", uuid="g"))
        found = points(sampler)
        assert pick(found, "wattier_power_watts", uuid="h") == [2.0]
        assert pick(found, "wattier_device_up", uuid="g") == [0]
        assert pick(found, "wattier_sample_age_seconds", source="stuck")[0] > 0.5
        until(lambda: sampler._lanes[0].hangs(time.monotonic()))
        begin = time.monotonic()
        sampler.fresh(0.0, timeout_seconds=300)
        assert time.monotonic() - begin < 60  # what hangs is no longer waited for
        stuck.gate.set()
        until(lambda: pick(points(sampler), "wattier_power_watts", uuid="g") == [1.0])

    def test_stale_device_loses_its_series_and_the_error_is_logged_once(self, sampling, caplog):
        source = ScriptedSource(g=1.0, h=2.0)
        sampler = sampling(source)
        sampler.stale_seconds = 0.3
        until(lambda: pick(points(sampler), "wattier_power_watts", uuid="g"))
        source.failing.add("g")
        until(lambda: not pick(points(sampler), "wattier_power_watts", uuid="g"))
        found = points(sampler)
        assert pick(found, "wattier_power_watts", uuid="h") == [2.0]
        assert pick(found, "wattier_read_errors_total", uuid="g")[0] >= 2
        assert caplog.text.count("does not answer: fell off the bus") == 1


class TestFresh:
    def test_is_newer_than_the_schedule(self, sampling):
        source = ScriptedSource(g=1.0)
        sampler = sampling(source, period_seconds=60.0)
        until(lambda: source.reads == 1)
        source.watts["g"] = 5.0
        time.sleep(0.1)
        assert pick(points(sampler), "wattier_power_watts") == [5.0]

    def test_many_at_once_cause_one_reading(self, sampling):
        source = ScriptedSource(g=1.0)
        sampler = sampling(source, period_seconds=60.0)
        until(lambda: sampler.generation)
        (lane,) = sampler._lanes
        with sampler.locked:
            lane.started_at = lane.sampled_at = lane.sampled_at - 1000
        source.gate.clear()
        asking = {"target": sampler.fresh, "args": (100.0,), "kwargs": {"timeout_seconds": 60}}
        threads = [threading.Thread(**asking, daemon=True) for _ in range(20)]
        for thread in threads:
            thread.start()
        until(lambda: len(sampler._sampled._waiters) == 20)
        source.gate.set()
        for thread in threads:
            thread.join()
        assert source.reads == 2


class TestSinks:
    def test_every_tick_reaches_the_sink_with_times_that_never_fall(self, sampling, caplog):
        wall = [1_000_000.0]
        sink = ListSink()
        source = ScriptedSource(g=1.0)
        sampler = sampling(source, sinks=[sink], clock=lambda: wall[0])
        until(lambda: len(sink.samples) > 5)
        wall[0] -= 3600
        until(lambda: len(sink.samples) > 15)
        times = [at for at, _ in sink.samples]
        assert times == sorted(set(times))
        evenly = [at - 1_000_000 + sampler._start for at in times]  # each when its reading was begun
        assert all(a <= b <= c for a, b, c in zip([0, *source.read_times], evenly, source.read_times, strict=False))
        assert caplog.text.count("the wall clock was set") == 1
        assert pick(points(sampler), "wattier_clock_offset_seconds")[0] == pytest.approx(
            -3600 - (time.monotonic() - sampler._start), abs=5
        )

    def test_sources_are_kept_apart_and_the_common_part_comes_once_a_period(self, sampling):
        sink = ListSink()
        sampler = sampling(ScriptedSource(name="x", g=1.0), ScriptedSource(name="y", h=1.0), sinks=[sink])
        until(lambda: len(sink.samples) > 20)
        sampler.close()
        for _, found in sink.samples:
            uuids = {dict(p.labels)["uuid"] for p in found if p.name == "wattier_power_watts"}
            assert uuids in ({"g"}, {"h"})
        common = sum(any(p.name == "wattier_build_info" for p in found) for _, found in sink.samples)
        assert len(sink.samples) / 3 < common < 2 * len(sink.samples) / 3

    def test_an_ended_trials_last_joules_are_pushed(self, sampling, register):
        sink = ListSink()
        leave = register("a")
        sampler = sampling(ScriptedSource(g=100.0), sinks=[sink], period_seconds=0.1)
        until(lambda: len(sink.samples) > 3)
        leave()
        until(lambda: not sampler.look()[0].trials)
        ended = len(sink.samples)
        until(lambda: len(sink.samples) > ended + 5)
        series = [
            (i, p.value)
            for i, (_, found) in enumerate(sink.samples)
            for p in found
            if p.name == "wattier_trial_energy_joules_total"
        ]
        assert [value for _, value in series] == sorted(value for _, value in series)
        assert series[-1][0] <= ended + 2
        assert series[-1][1] == sampler.watched[0].ledger.shares["r", "s", "a", "0"] / 1e6


class TestState:
    def restart(self, sampling, source, folder, **options):
        state = SamplerState(folder, flush_seconds=0.1)
        return sampling(source, state=state, **options), state

    def test_joules_of_the_time_between_are_made_good(self, sampling, register, tmp_path):
        source = ScriptedSource(g=1000.0)
        register("a", fraction=0.5)
        first, state = self.restart(sampling, source, tmp_path / "state")
        until(lambda: pick(points(first), "wattier_trial_energy_joules_total"))
        time.sleep(0.3)
        first.close()
        state.close()
        time.sleep(0.5)
        began = time.monotonic()
        second, _ = self.restart(sampling, source, tmp_path / "state")
        found = points(second)
        (total,) = pick(found, "wattier_accounted_energy_joules_total")
        (mine,) = pick(found, "wattier_trial_energy_joules_total")
        assert reading_of(source, total) >= began
        assert mine == pytest.approx(total / 2, abs=1e-3)

    def test_a_counter_that_went_back_adds_nothing(self, sampling, tmp_path):
        source = ScriptedSource(g=1000.0)
        first, state = self.restart(sampling, source, tmp_path / "state")
        until(lambda: source.reads > 3)
        first.close()
        state.close()
        before = first.watched[0].ledger.total
        source.offset_joules = -1e6
        second, _ = self.restart(sampling, source, tmp_path / "state", period_seconds=60.0)
        until(lambda: second.watched[0].reading is not None)
        assert second.watched[0].ledger.total == before

    def test_it_is_written_while_running(self, sampling, tmp_path):
        sampler, _ = self.restart(sampling, ScriptedSource(g=1000.0), tmp_path / "state")
        path = tmp_path / "state" / "sampler.json"
        until(lambda: path.exists() and json.loads(path.read_bytes())["devices"]["g"]["total"] > 100e6)
        assert sampler.look()[0].state_errors == 0

    def test_a_folder_has_one_user(self, tmp_path):
        state = SamplerState(tmp_path)
        with pytest.raises(OSError, match="in use by another exporter"):
            SamplerState(tmp_path)
        state.close()
        SamplerState(tmp_path).close()

    BOOKS = '{"boot": "%s", "devices": {"g": {"total": 0, "rest": 0, "forgotten": 0, "shares": [], %s}}}'

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "[]",
            '{"devices": 3}',
            '{"boot": "", "devices": {"g": {}}}',
            '{"boot": "", "devices": {"g": {"total": Infinity, "rest": 0, "forgotten": 0, "shares": []}}}',
            "[" * 100_000,
            BOOKS % (BOOT, '"counter": NaN, "weights": []'),
            BOOKS % (BOOT, '"counter": 1, "weights": [["r", "s", "t", "0", -5]]'),
        ],
        ids=range(9),
    )
    def test_a_damaged_file_is_told_and_passed_over(self, sampling, tmp_path, caplog, text):
        (tmp_path / "state").mkdir()
        (tmp_path / "state" / "sampler.json").write_text(text)
        self.restart(sampling, ScriptedSource(g=1.0), tmp_path / "state")
        assert "joules start at zero" in caplog.text

    def test_a_counter_that_leapt_while_nobody_looked_is_not_billed(self, sampling, tmp_path):
        (tmp_path / "state").mkdir()
        (tmp_path / "state" / "sampler.json").write_text(self.BOOKS % (BOOT, '"counter": -1e15, "weights": []'))
        sampler, _ = self.restart(sampling, ScriptedSource(g=100.0), tmp_path / "state")
        until(lambda: sampler.watched[0].ledger.total > 0)
        assert sampler.watched[0].ledger.total < 1e9

    def test_a_slow_disk_hides_no_trials_end(self, sampling, register, child, tmp_path, monkeypatch):
        process, gate = child(), threading.Event()
        register("a", pid=process.pid)
        monkeypatch.setattr("os.fsync", lambda _: gate.wait(20))
        state = SamplerState(tmp_path / "state", flush_seconds=0.05)
        sampler = sampling(ScriptedSource(g=100.0), state=state)
        until((tmp_path / "state" / ".sampler.json.tmp").exists)
        until(lambda: A in sampler.watched[0].ledger.shares)
        process.kill()
        process.wait()
        until(lambda: not sampler.look()[0].trials and A not in sampler.watched[0].present)
        billed, rest = sampler.watched[0].ledger.shares[A], sampler.watched[0].ledger.rest
        until(lambda: sampler.watched[0].ledger.rest > rest + 20e6)
        assert sampler.watched[0].ledger.shares[A] == billed
        gate.set()

    def test_a_full_disk_is_counted_and_told_once(self, sampling, tmp_path, caplog, monkeypatch):
        sampler, state = self.restart(sampling, ScriptedSource(g=1000.0), tmp_path / "state")
        until((tmp_path / "state" / "sampler.json").exists)

        def full(_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr("os.fsync", full)
            until(lambda: state.errors >= 2)
        assert caplog.text.count("cannot be written") == 1
        assert pick(points(sampler), "wattier_state_write_errors_total")[0] >= 2
