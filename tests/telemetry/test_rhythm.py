"""Where a tick of a counter was, by the others; and a meter held up at its edges, in a closed form."""

import math
import random

import pytest

from wattier_telemetry import Device, Reading
from wattier_telemetry.account import Account
from wattier_telemetry.rhythm import Rhythm, Tick

WATTS = 500.0


def rhythm_of(*ticks, stated=0.1):
    rhythm = Rhythm(stated)
    for after, until in ticks:
        rhythm.see(Tick(after, until))
    return rhythm


def holds(tick, at):
    return tick.after - 1e-9 <= at <= tick.until + 1e-9


class TestRefreshTime:
    def test_two_neighbours_that_were_seen_closely_tell_it(self):
        rhythm = rhythm_of((0.098, 0.103), (0.178, 0.183))
        assert (rhythm.refresh_seconds, rhythm.error_seconds) == (pytest.approx(0.085), pytest.approx(0.01))

    def test_what_the_source_states_stands_where_they_do_not_contradict_it(self):
        assert rhythm_of((0.09, 0.11), (0.195, 0.215)).refresh_seconds == 0.1

    def test_neighbours_of_which_one_was_seen_late_do_not(self):
        assert not rhythm_of((0.098, 0.103), (0.15, 0.2), (0.298, 0.303)).learned


class TestPlace:
    @pytest.mark.parametrize("period", [0.095, 0.1, 0.104])
    def test_a_tick_seen_late_is_where_the_beat_says(self, period):
        ticks = [(k * period - 0.003, k * period + 0.003) for k in range(1, 6)]
        found = rhythm_of((-0.05, 0.04), *ticks).place(Tick(-0.05, 0.04))
        assert holds(found.tick, 0.0)
        assert found.tick.gap_seconds < 0.04
        assert abs(found.period - period) <= found.error + 1e-9

    def test_of_several_it_is_the_last(self):
        rhythm = rhythm_of(*((k / 10 - 0.003, k / 10 + 0.003) for k in range(5)))
        found = rhythm.place(Tick(0.56, 0.65))
        assert holds(found.tick, 0.6)
        assert holds(rhythm.place(Tick(0.44, 0.65)).tick, 0.6)

    def test_one_that_may_or_may_not_have_come_is_not_guessed(self):
        rhythm = rhythm_of(*((k / 10 - 0.003, k / 10 + 0.003) for k in range(5)))
        assert rhythm.place(Tick(0.602, 0.702)) is None

    def test_ticks_without_a_beat_tell_nothing(self):
        uneven = [0.0, 0.1, 0.23, 0.3, 0.44, 0.5]
        rhythm = rhythm_of(*((at - 0.003, at + 0.003) for at in uneven))
        assert rhythm.place(Tick(0.56, 0.64)) is None

    def test_a_counter_five_times_as_fast_as_stated_is_learned(self):
        rhythm = rhythm_of(*((k * 0.02 - 0.001, k * 0.02 + 0.001) for k in range(15)))
        assert rhythm.refresh_seconds == pytest.approx(0.02, abs=0.001)
        assert rhythm.well_known
        found = rhythm.place(Tick(0.305, 0.325))
        assert found is None or holds(found.tick, 0.32)

    def test_two_ticks_of_one_moment_tell_nothing(self):
        rhythm = rhythm_of((0.2, 0.2), (0.2, 0.2), (0.3, 0.3))
        assert rhythm.refresh_seconds == pytest.approx(0.1, abs=0.005)

    def test_too_few_too_far_or_forgotten_tell_nothing(self):
        assert rhythm_of((0.198, 0.202)).place(Tick(0.25, 0.34)) is None
        rhythm = rhythm_of((0.198, 0.202), (0.298, 0.302))
        assert rhythm.place(Tick(0.35, 0.44)) is not None
        assert rhythm.place(Tick(1.35, 1.44)) is None
        rhythm.forget()
        assert rhythm.place(Tick(0.35, 0.44)) is None

    @pytest.mark.parametrize("seed", range(40))
    def test_never_says_where_it_was_not(self, seed):
        """Ticks up to a fiftieth of a refresh off the beat, seen through gaps of any length."""
        rng = random.Random(seed)
        period = rng.uniform(0.093, 0.107)
        at = [k * period + rng.uniform(-0.02, 0.02) * 0.093 for k in range(40)]
        rhythm, placed = Rhythm(0.1), 0
        for true in at:
            gap = rng.choice([0.005, 0.01, 0.05, 0.07])
            early = rng.uniform(0, gap)
            tick = Tick(true - early, true + gap - early)
            rhythm.see(tick)
            if found := rhythm.place(tick):
                placed += 1
                assert holds(found.tick, true)
        assert placed > 5


def closed(reads, begin, end, later, *, watts=lambda _: WATTS, joules=lambda t: WATTS * t):
    """A share from readings at known times of a counter refreshed each 0.1 s; a pair is (asked at, late by)."""
    device = Device("d", "device", "gpu", 0, counter_refresh_seconds=0.1)

    def reading(at):
        return Reading(at, power_watts=watts(at), energy_joules=joules(math.floor(at * 10 + 1e-9) / 10))

    account = Account(device, "counter", longest_gap_seconds=5)
    for asked, late in [(begin, 0.0), *reads, (end, 0.0)]:
        account.add(asked, reading(asked + late), late_seconds=late)
    account.close(end)
    for asked, late in later:
        if not account.settled:
            account.look_back(asked, reading(asked + late), late_seconds=late)
    return account.share(0.0, end - begin)


def steady(first, last):
    return [(first + 0.05 * k, 0.0) for k in range(int((last - first) / 0.05) + 1)]


class TestAMeterThatIsHeldUp:
    """A busy machine holds up the thread: readings come 60 to 250 ms apart just at an edge."""

    @pytest.mark.parametrize("begin", [0.013, 0.038, 0.061, 0.088])
    @pytest.mark.parametrize("held", [0.06, 0.095, 0.13, 0.19, 0.25])
    def test_at_the_start(self, begin, held):
        back = begin + 0.01 + held
        share = closed(
            [(begin + 0.01, 0.0), *((back + 0.005 * k, 0.0) for k in range(80)), *steady(back + 0.42, 1.5)],
            begin,
            1.553,
            [(1.558 + 0.005 * k, 0.0) for k in range(25)],
        )
        truth = WATTS * (1.553 - begin)
        assert share.joules == pytest.approx(truth, abs=WATTS * 0.012)
        assert share.joules_low <= truth <= share.joules_high

    @pytest.mark.parametrize("end", [1.523, 1.538, 1.561, 1.588])
    @pytest.mark.parametrize("held", [0.06, 0.095, 0.13, 0.19, 0.25])
    def test_at_the_end(self, end, held):
        begin = 0.013
        share = closed(
            [*((begin + 0.005 * k, 0.0) for k in range(1, 80)), *steady(begin + 0.4, end - 0.01)],
            begin,
            end,
            [(end + held + 0.005 * k, 0.0) for k in range(50)],
        )
        truth = WATTS * (end - begin)
        assert share.joules == pytest.approx(truth, abs=WATTS * 0.012)
        assert share.joules_low <= truth <= share.joules_high

    @pytest.mark.parametrize("end", [1.501, 1.507, 1.513, 1.593, 1.599])
    @pytest.mark.parametrize("held", [0.095, 0.19])
    def test_at_the_end_so_close_to_a_tick_that_it_cannot_be_told(self, end, held):
        share = closed(
            [*((0.013 + 0.005 * k, 0.0) for k in range(1, 80)), *steady(0.413, end - 0.0005)],
            0.013,
            end,
            [(end + held + 0.005 * k, 0.0) for k in range(50)],
        )
        assert share.joules_low <= WATTS * (end - 0.013) <= share.joules_high

    @pytest.mark.parametrize("late", [0.02, 0.045, 0.07])
    def test_between_asking_and_the_answer(self, late):
        """What a slow driver, or a thread put aside, says late is not taken for what was so when it was asked."""
        begin, end = 0.013, 1.547
        asked = [0.03 + 0.05 * k for k in range(30)]
        share = closed([(t, late if k % 2 else 0.0) for k, t in enumerate(asked)], begin, end, [(end + 0.005, late)])
        truth = WATTS * (end - begin)
        assert share.joules_low <= truth <= share.joules_high
        assert share.joules == pytest.approx(truth, abs=WATTS * 0.03)

    @pytest.mark.parametrize("seed", range(40))
    def test_the_truth_of_a_swinging_load_is_within_the_bounds(self, seed):
        rng = random.Random(seed)
        hz = rng.choice([0.7, 1.0, 3.0, 5.0, 20.0])

        def joules(t):
            periods, phase = divmod(t * hz, 1)
            return (700 * (periods * 0.5 + min(phase, 0.5)) + 100 * (periods * 0.5 + max(phase - 0.5, 0.0))) / hz

        begin = rng.uniform(0, 0.1)
        reads, t = [], begin
        while t < begin + 1.2:
            t += rng.choice([0.005, 0.01, 0.05, 0.12, 0.2])
            reads.append((t, rng.choice([0.0, 0.001, 0.004])))
            t += reads[-1][1]
        end, after, t = t + 0.01, [], t + 0.01
        while t < end + 0.4:
            t += rng.choice([0.005, 0.02, 0.09, 0.15])
            after.append((t, 0.0))
        share = closed(reads, begin, end, after, watts=lambda t: 700.0 if (t * hz) % 1 < 0.5 else 100.0, joules=joules)
        assert share.joules_low <= joules(end) - joules(begin) <= share.joules_high


@pytest.mark.parametrize(("first", "last"), [(0.0, 0.06), (0.06, 0.0), (0.05, 0.05)])
def test_an_exact_counter_that_answers_late_is_doubted_by_so_much(first, last):
    """300 W for half a second: what a late answer holds is of another time, before or behind the window."""
    account = Account(Device("d", "device", "gpu", 0, counter_refresh_seconds=0.001), "counter", longest_gap_seconds=5)
    for asked, late in ((10.0, first), (10.2, 0.0), (10.5, last)):
        at = asked + late
        account.add(asked, Reading(at, power_watts=300.0, energy_joules=300 * at), late_seconds=late)
    account.close(10.5)
    share = account.share(0.0, 0.5)
    assert share.joules_low <= 150 <= share.joules_high
    assert share.joules_high - share.joules_low == pytest.approx(2 * 300 * (first + last), rel=0.05)
