"""The two edges of a window whose counter is refreshed only now and then: how much of a refresh lies within."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from wattier_telemetry.integral import PowerIntegral
from wattier_telemetry.rhythm import Rhythm, Tick


@dataclass(slots=True)
class Edge:
    """A refresh interval that holds an edge of the window, between the edge and the tick after it."""

    at: float  # the edge
    late_seconds: float  # how long after it its reading may have been
    tick: Tick
    tick_joules: float  # by which the counter moved
    unseen_seconds: float  # between the two readings that showed it: long enough for several ticks?
    power: PowerIntegral  # from the edge to the middle of where the tick was seen
    refreshes: int | None = None  # how many of them, of `period` seconds each, the joules are of; None = not known
    or_refreshes: int | None = None  # where it cannot be told for sure: what else they may be of
    period: float = 0.0
    doubt_seconds: float = 0.0  # about that period

    @property
    def seconds(self) -> float:
        """From the edge to the tick."""
        return max(0.0, self.tick.at - self.at)

    @property
    def power_joules(self) -> float:
        """Sampled energy from the edge to the tick, also where that was found to be elsewhere than it was seen, J."""
        return self.power.joules * self.seconds / self.power.seconds if self.power.seconds > 0 else self.power.joules

    def placed(self, rhythm: Rhythm) -> Edge:
        """Return it with its tick where the rhythm of the others says, if they say it more closely."""
        found = rhythm.place(self.tick)
        if found is None:
            return self
        refreshes = fewest = 1
        if self.unseen_seconds >= found.period:
            since, until = found.tick.after - self.at - self.late_seconds, found.tick.until - self.at
            fewest, refreshes = (max(1, math.ceil(seconds / found.period)) for seconds in (since, until))
        if fewest < refreshes and self.power.known and self.power.joules > 0:
            # A tick came so close to the edge that it may be of the window or not. Power says it, if not for sure.
            spent = self.tick_joules / (self.power.joules / self.power.seconds * found.period)
            refreshes, fewest = sorted((fewest, refreshes), key=lambda number: abs(number - spent))
        known = replace(self, refreshes=refreshes, or_refreshes=fewest)
        return replace(known, tick=found.tick, period=found.period, doubt_seconds=found.error)

    def cut(
        self, rhythm: Rhythm, *, swing_watts: float, highest_watts: float, averaged_seconds: float
    ) -> tuple[float, float]:
        """Return the energy between the edge and the tick after it, and how wrong that may be, J.

        Two estimates: the tick's joules in proportion to time, and the sampled power. The first needs no honest
        power field, so it is billed; where power swings, the second bounds how wrong it is.

        Args:
            rhythm: Of the counter.
            swing_watts: How far apart power may have been within a refresh.
            highest_watts: The highest that was seen.
            averaged_seconds: Over which the power field is a mean.
        """
        refresh, seconds, doubt = rhythm.refresh_seconds, self.seconds, self.tick.gap_seconds / 2
        if self.refreshes is not None:
            even, whole, doubt = True, self.refreshes * self.period, doubt + self.doubt_seconds
        else:
            doubt += rhythm.error_seconds  # an edge that looks longer than a refresh by so little
            even = self.unseen_seconds < refresh and seconds <= refresh + doubt  # is one: no tick was missed
            whole = refresh if even else max(refresh, seconds + refresh / 2)
        # `whole` is the time in which the tick's joules were spent.
        estimate = self.tick_joules * min(1.0, seconds / whole)
        rate = self.tick_joules / whole
        error = seconds * max(0.0, whole - seconds) / whole * max(swing_watts, 0.0)
        error += doubt * max(rate, highest_watts)
        if self.or_refreshes is not None and self.or_refreshes != self.refreshes:
            error += abs(estimate - self.tick_joules * min(1.0, seconds / (self.or_refreshes * self.period)))
        if not even:
            error += refresh / 2 * max(rate, highest_watts)
        if self.power.known and averaged_seconds <= refresh:
            error += abs(self.power_joules - estimate)
        return estimate, error
