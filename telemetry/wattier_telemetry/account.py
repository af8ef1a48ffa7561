"""The arithmetic of the meter for one device: readings in, joules out; no clock, no thread, no file.

An energy counter is exact only at the moments when it is refreshed, on many GPUs every 100 ms. A window that opens and
closes between two refreshes would be wrong by up to one refresh at full power, at both of its edges. So the account
looks for the *ticks*, the readings at which the counter has moved, and cuts the refresh interval that holds an edge in
proportion (`Edge.cut`). Between the first and the last tick the counter is taken as it is.
"""

from __future__ import annotations

from wattier_telemetry.counter_check import CounterCheck, Faults
from wattier_telemetry.edges import Edge
from wattier_telemetry.integral import PowerIntegral, PowerRange, credible, most_watts, trapezoid
from wattier_telemetry.ownership import MeanFraction
from wattier_telemetry.records import Attribution, Device, Method, Reading, Share, weakest
from wattier_telemetry.rhythm import Rhythm, Tick
from wattier_telemetry.throttling import ThrottleClock

_STUCK_SECONDS, _STUCK_READINGS = 1.0, 5  # a counter that stands still so long under power is not believed
_COARSE_SECONDS = 0.01  # a counter that is refreshed more often needs no care at the edges
_RECENT_SECONDS = 1.0
_OPENING_TICKS, _LATER_TICKS = 12, 2  # that may tell where the first, and the last, was
_DENSE_SECONDS = 0.065  # between two samples: the meter's own interval and its jitter


class Account:
    """Adds up the energy of one device from one reading to the next.

    A counter's difference is taken where there is a counter, otherwise the trapezoid of two power samples.

    Args:
        device: Whose account this is.
        method: How the source knows its counter.
        longest_gap_seconds: Two power samples further apart are still billed, but what lay between them was not
            seen, so it does not count as covered. A counter misses nothing, however far apart its readings are.
        fraction: Part of the device that the work owns, until `add` says otherwise.
    """

    def __init__(self, device: Device, method: Method, *, longest_gap_seconds: float, fraction: float = 1.0) -> None:
        self.device = device
        self.covered_seconds = 0.0
        self.power_watts: float | None = None  # the latest known, for reservations
        self._source_method = method
        self._longest_gap_seconds = longest_gap_seconds
        self._methods: set[Method] = set()
        self._first_time: float | None = None
        self._first_late_seconds = self._last_late_seconds = 0.0
        self._answered_at: float | None = None
        self._closed_at: float | None = None
        self._last: tuple[float, Reading] | None = None
        self._counter: tuple[float, float] | None = None  # time and joules of the latest reading that had a counter
        # Edges: the first and the last refresh interval of the window.
        self._rhythm = Rhythm(device.counter_refresh_seconds)
        self._opening: Edge | None = None
        self._opening_ticks = 0  # those since, from which it may still be learned where the first was
        self._closing: Edge | None = None
        self._later_ticks = 0  # after the one that closed, if that was not seen closely
        self._end_can_be_cut = False
        # Between them: what the ticks say, and the sampled power since the last of them.
        self._booked_joules = 0.0
        self._integrated = PowerIntegral()
        self._pending = PowerIntegral()
        self._tail = PowerIntegral()
        self._recent_watts: float | None = None  # as the counter has it
        self._unseen_seconds = 0.0  # of which nothing at all is known
        # What may contradict the counter, and how far power has been seen to swing.
        self._check = CounterCheck()
        self._power = PowerIntegral()
        self._seen = PowerRange()
        self._fraction = MeanFraction(fraction)
        self._throttling = ThrottleClock()
        self._stuck_seconds = 0.0
        self._pending_readings = 0
        self._faults = Faults()

    def preview(self, reading: Reading) -> None:
        """Learn the power before the window opens, without billing anything."""
        reading = credible(reading)
        self.power_watts = reading.power_watts
        self._see_power(reading)

    @property
    def joules(self) -> float:
        """Energy of the whole device so far, J; before `close` its latest moments are still an estimate."""
        return self._estimate()[0]

    @property
    def wants_fast_readings(self) -> bool:
        """Whether the edge at the start still waits for some ticks, which close readings would time better."""
        waited = 0.0 if self._first_time is None or self._last is None else self._last[0] - self._first_time
        return self._coarse_counter and not self._rhythm.well_known and waited < 4 * self._rhythm.refresh_seconds

    @property
    def settled(self) -> bool:
        """Whether the edge at the end is known as well as it will be."""
        if self._closing is None:
            return not self._end_can_be_cut
        return self._rhythm.is_close(self._closing.tick) or self._later_ticks >= _LATER_TICKS

    @property
    def refresh_seconds(self) -> float:
        """Time between two refreshes of the counter, s: as measured, else as the source says."""
        return self._rhythm.refresh_seconds

    def add(
        self, time_seconds: float, reading: Reading, fraction: float | None = None, *, late_seconds: float = 0.0
    ) -> None:
        """Book the step since the last reading.

        Args:
            time_seconds: When the reading was asked for, on any clock that never jumps.
            reading: What the device answered.
            fraction: Part of the device that the work owned in this step, if that is known.
            late_seconds: How long the answer took: the figures are from any moment in between.
        """
        self._faults.readings += 1
        reading = credible(reading)
        self._see_power(reading)
        last, self._last = self._last, (time_seconds, reading)
        self._answered_at, self._last_late_seconds = time_seconds, late_seconds
        if last is None:
            self._first_time, self._first_late_seconds = time_seconds, late_seconds
            if reading.energy_joules is not None:
                self._counter = (time_seconds, reading.energy_joules)
            return
        step = trapezoid(last, (time_seconds, reading))
        self._power.add(step)
        moved = None
        if reading.energy_joules is not None:
            before, self._counter = self._counter, (time_seconds, reading.energy_joules)
            moved = None if before is None else self._moved(reading.energy_joules - before[1], time_seconds - before[0])
        self._pending_readings += 1
        if moved is not None:
            self._count(moved, step, time_seconds, late_seconds)
        elif self._counter is None:
            self._integrate(step)
        else:  # the counter did not answer this time: its next answer will hold this step too
            self._pending.add(step)
        self._fraction.add(step, moved, fraction)
        self._throttling.add(last[1], reading, step.seconds)

    def fail(self, error: Exception) -> None:
        """Note that the device did not answer; the next reading that does is joined to the last one that did."""
        self._faults.readings += 1
        self._faults.failures += 1
        self._faults.failure = " ".join(str(error).split())

    def close(self, time_seconds: float) -> None:
        """End the window at its last reading; what `look_back` is given afterwards is not billed."""
        self._closed_at = time_seconds
        answered = self._last is not None and self._last[0] == time_seconds
        self._end_can_be_cut = answered and self._coarse_counter and self._opening is not None

    def look_back(self, time_seconds: float, reading: Reading, *, late_seconds: float = 0.0) -> None:
        """Use a reading from just after the window: the next tick tells where in its interval the end lay."""
        if self.settled or self._closed_at is None or self._counter is None or self._last is None:
            return
        reading = credible(reading)
        self._see_power(reading)
        step = trapezoid(self._last, (time_seconds, reading))
        before, self._last = self._last[1].energy_joules, (time_seconds, reading)
        if self._closing is not None:
            if reading.energy_joules is not None and before is not None and reading.energy_joules > before:
                self._tick(time_seconds, step.seconds, late_seconds)
                self._closing, self._later_ticks = self._closing.placed(self._rhythm), self._later_ticks + 1
            return
        moved = 0.0 if reading.energy_joules is None else reading.energy_joules - self._counter[1]
        if moved < 0 or self._is_jump(moved, time_seconds - self._counter[0]):
            self._end_can_be_cut = False
        elif moved == 0:
            self._tail.add(step)
        else:
            tick = self._tick(time_seconds, step.seconds, late_seconds)
            self._tail.add(step.part(tick.at - (time_seconds - step.seconds)))
            edge = Edge(self._closed_at, self._last_late_seconds, tick, moved, step.seconds + late_seconds, self._tail)
            self._closing = edge.placed(self._rhythm)

    def reservation_joules(self, seconds: float) -> float:
        """Return what the device may draw in the coming seconds: the larger of its present and its mean power, J."""
        watts = self.power_watts or 0.0
        if self._last is not None and self._first_time is not None and self._last[0] > self._first_time:
            watts = max(watts, self.joules / (self._last[0] - self._first_time))
        return watts * seconds

    def share(
        self,
        start_seconds: float,
        seconds: float,
        *,
        reserved_seconds: float = 0.0,
        attribution: Attribution = "whole",
    ) -> Share:
        """Return the share over ``seconds`` from the start, with a reservation behind it if asked."""
        joules, low, high = self._estimate()
        total_seconds = seconds + reserved_seconds
        if self._answered_at is not None and self._first_time is not None:
            high += max(0.0, seconds - (self._answered_at - self._first_time)) * self._possible_watts()
        if reserved_seconds:
            reserved = self.reservation_joules(reserved_seconds)
            joules, high = joules + reserved, high + reserved
        known = bool(self._methods) or joules > 0
        fraction = self._fraction.value
        return Share(
            device_uuid=self.device.uuid,
            domain=self.device.domain,
            start_seconds=start_seconds,
            end_seconds=start_seconds + total_seconds,
            fraction=fraction,
            joules=joules * fraction if known else None,
            method=weakest(self._methods) or self._source_method,
            coverage_ratio=min(1.0, self.covered_seconds / total_seconds) if total_seconds > 0 else float(known),
            joules_low=low * fraction if known else None,
            joules_high=high * fraction if known else None,
            attribution=attribution,
            throttled_seconds=self._throttling.seconds,
        )

    def warnings(self) -> list[str]:
        """Return what went wrong, in one sentence each."""
        stood = self._is_stuck or self._stuck_seconds > 0
        found = self._faults.sentences(stood_still=stood, doubt=self._check.warning())
        return [f"{self.device.name} {self.device.uuid}: {sentence}" for sentence in found]

    # -- booking -------------------------------------------------------------------------------------------------

    def _moved(self, moved: float, seconds: float) -> float:
        """Return by how much the counter moved; below zero where it is not to be believed."""
        if self._is_jump(moved, seconds):
            self._faults.jumps += 1
            return -1.0
        self._faults.backward_steps += moved < 0
        return moved

    def _count(self, moved: float, step: PowerIntegral, time_seconds: float, late_seconds: float) -> None:
        """Book what the counter did in a step."""
        if moved < 0:  # seen on MI100, and after a driver reset: this step cannot be told by the counter
            self._pending_readings = 0
            self._rhythm.forget()
            self._opening_ticks = _OPENING_TICKS
            gap = min(step.seconds, self._rhythm.refresh_seconds) if self._coarse_counter else 0.0
            span = step
            if self._coarse_counter or self._is_stuck:
                span = self._pending
                span.add(step.part(step.seconds - gap / 2))
            self._pending = step.part(gap / 2)
            self._integrate(self._without_counter(span, step.seconds), uncovered_seconds=step.seconds)
            return
        self._methods.add(self._source_method)
        self.covered_seconds += step.seconds
        if moved == 0 and (self._coarse_counter or step.known):
            self._pending.add(step)
            return
        if not self._coarse_counter:
            self._pending.add(step)
            self._book_tick(moved, PowerIntegral())
            return
        tick = self._tick(time_seconds, step.seconds, late_seconds)
        since = min(step.seconds, max(0.0, time_seconds - tick.at))
        self._pending.add(step.part(step.seconds - since))
        if self._opening is None:
            first, late = self._first_time or 0.0, self._first_late_seconds
            self._opening = Edge(first, late, tick, moved, step.seconds + late_seconds, self._pending)
            self._pending, self._pending_readings = step.part(since), 0
        else:
            self._book_tick(moved, step.part(since))
        if self._opening_ticks < _OPENING_TICKS:
            self._opening_ticks += 1
            self._opening = self._opening.placed(self._rhythm)

    def _tick(self, time_seconds: float, step_seconds: float, late_seconds: float) -> Tick:
        """Note a tick that a reading has shown: it came somewhere in the gap, and of several it is the last."""
        tick = Tick(time_seconds - min(step_seconds, self._rhythm.refresh_seconds), time_seconds + late_seconds)
        self._rhythm.see(tick)
        return tick

    def _book_tick(self, moved: float, since: PowerIntegral) -> None:
        """Book what the counter moved by; ``since`` is the power already sampled after the tick."""
        pending, self._pending = self._pending, since
        readings, self._pending_readings = self._pending_readings, 0
        stood = readings >= _STUCK_READINGS and pending.seconds >= self._stuck_after_seconds
        if pending.known:
            self._check.add(moved, pending)
        if pending.known and stood and moved < 0.5 * pending.joules:
            self._stuck_seconds += pending.seconds
            self._methods.add("integrated")
            self._integrated.add(pending)
            return
        self._booked_joules += moved
        if pending.seconds > 0:
            rate = moved / pending.seconds
            before = rate if self._recent_watts is None else self._recent_watts
            self._recent_watts = before + (rate - before) * min(1.0, pending.seconds / _RECENT_SECONDS)
            if not pending.known:
                self.power_watts = rate

    def _without_counter(self, span: PowerIntegral, gap_seconds: float) -> PowerIntegral:
        """Return a span that the counter does not tell; when its ticks were is known up to a gap.

        Dense samples tell it best. Sparse ones miss what changes between them, so half of what the counter lately said
        is put in their place.
        """
        if not span.known or self._recent_watts is None:
            return span
        usual = self._recent_watts * span.seconds
        slack = span.slack_joules + gap_seconds * self._swing_watts()
        if gap_seconds <= _DENSE_SECONDS:
            return PowerIntegral(span.seconds, span.joules, slack, span.coarse_seconds)
        slack += abs(usual - span.joules) / 2
        return PowerIntegral(span.seconds, (span.joules + usual) / 2, slack, span.coarse_seconds)

    def _integrate(self, span: PowerIntegral, *, uncovered_seconds: float | None = None) -> None:
        """Book sampled power for good; part of the span may have been covered already."""
        seconds = span.seconds if uncovered_seconds is None else uncovered_seconds
        if not span.known:
            self._unseen_seconds += span.seconds
            return
        self._integrated.add(span)
        self.covered_seconds += seconds if seconds <= self._longest_gap_seconds else 0.0
        self._methods.add(weakest((self._source_method, "integrated")) or "integrated")

    def _see_power(self, reading: Reading) -> None:
        self._seen.add(reading)
        if reading.power_watts is not None and self._closed_at is None:
            self.power_watts = reading.power_watts

    # -- judging -------------------------------------------------------------------------------------------------

    @property
    def _coarse_counter(self) -> bool:
        return self.device.counter_refresh_seconds >= _COARSE_SECONDS and self._counter is not None

    @property
    def _stuck_after_seconds(self) -> float:
        return max(_STUCK_SECONDS, 10 * self._rhythm.refresh_seconds)

    @property
    def _is_stuck(self) -> bool:
        pending, stood = self._pending, self._pending_readings >= _STUCK_READINGS
        return pending.known and stood and pending.seconds >= self._stuck_after_seconds and pending.joules > 0

    def _is_jump(self, moved: float, seconds: float) -> bool:
        """Tell whether a counter moved by more than the device can have drawn, with a second for a late refresh."""
        return moved > most_watts(self._seen.limit_watts) * (seconds + 1.0)

    def _possible_watts(self) -> float:
        """Return the most the device may have drawn while nobody looked."""
        return max(self._seen.highest_watts, self.power_watts or 0.0, self._seen.limit_watts or 0.0)

    def _swing_watts(self) -> float:
        """Return how far apart power may have been within a refresh interval."""
        shortest_seen = min(self._rhythm.refresh_seconds, self._power.seconds)
        if self.device.power_average_seconds > shortest_seen or self._seen.highest_watts == 0.0:
            return self._possible_watts()  # an average hides the swing
        return self._seen.highest_watts - self._seen.lowest_watts

    def _estimate(self) -> tuple[float, float, float]:
        """Return the energy so far and what it lies between, J."""
        joules = self._booked_joules + self._integrated.joules
        slack = self._slack_joules(self._integrated)
        if self._opening is not None:
            estimate, error = self._cut(self._opening)
            joules, slack = joules + estimate, slack + error
        if self._closing is not None:
            estimate, error = self._cut(self._closing)
            joules, slack = joules + self._closing.tick_joules - estimate, slack + error
        elif self._coarse_counter or self._is_stuck:
            if self._is_stuck:
                self._methods.add("integrated")
            joules += self._pending.joules
            slack += self._slack_joules(self._pending)
            if self._coarse_counter:  # the last tick came before the reading that showed it
                slack += self._rhythm.refresh_seconds * max(self._seen.highest_watts, self.power_watts or 0.0)
        # A refresh of lateness is no more than the edges doubt already; an exact counter leaves none to doubt.
        free = self._rhythm.refresh_seconds if self._coarse_counter else 0.0
        for late in (self._first_late_seconds, self._last_late_seconds):
            slack += max(0.0, late - free) * self._possible_watts()
        low, high = max(0.0, joules - slack), joules + slack + self._unseen_seconds * self._possible_watts()
        if self._check.is_distrusted:
            self._methods.add("integrated")
            low, high = min(low, self._power.joules), max(high, self._power.joules)
            joules = max(joules, self._power.joules)
        return joules, low, high

    def _cut(self, edge: Edge) -> tuple[float, float]:
        return edge.cut(
            self._rhythm,
            swing_watts=self._swing_watts(),
            highest_watts=self._seen.highest_watts,
            averaged_seconds=self.device.power_average_seconds,
        )

    def _slack_joules(self, integral: PowerIntegral) -> float:
        """Return how wrong a sum of samples may be: half the swing wherever nobody looked for long."""
        lag = self.device.power_average_seconds * self._swing_watts() if integral.seconds > 0 else 0.0
        return integral.slack_joules + integral.coarse_seconds * self._swing_watts() / 2 + lag
