"""The rhythm of an energy counter: when it was refreshed, by all the refreshes that were seen. Arithmetic only.

A refresh (a *tick*) is seen at the first reading that shows it; it came somewhere between that one and the reading
before. A thread that a busy machine held up reads late, and then that may be anywhere. But ticks are regular: others,
which were seen closely, tell where this one was.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

_IRREGULAR = 0.02  # of a refresh: so far from the beat a tick may be
_CLOSELY = 0.25  # of a refresh: a tick seen less closely tells nothing of the beat
_LONGEST_REST = 4  # refreshes between two ticks over which they are counted without doubt
_KEPT = 8


class Tick(NamedTuple):
    """A tick between two readings; where they lie so far apart that there may have been several, the last of them.

    Attributes:
        after: When it cannot have come yet, s.
        until: When it was seen, s.
    """

    after: float
    until: float

    @property
    def at(self) -> float:
        """The middle of where it may have been, s."""
        return (self.after + self.until) / 2

    @property
    def gap_seconds(self) -> float:
        """How closely it was seen, s."""
        return self.until - self.after


class Placed(NamedTuple):
    """Where a tick was, the time from one to the next, and how wrong that may be, s."""

    tick: Tick
    period: float
    error: float


class Rhythm:
    """Learns how often a counter is refreshed, and tells where a tick was that was not seen closely.

    Args:
        refresh_seconds: Time between two refreshes, s, as the source has it.
    """

    def __init__(self, refresh_seconds: float) -> None:
        self._stated_seconds = refresh_seconds
        self._shortest, self._longest = 0.0, math.inf  # between them lies the time from tick to tick
        self._regular = True
        self._neighbour: Tick | None = None  # the latest tick, if it was one of them
        self._close: deque[Tick] = deque(maxlen=_KEPT)  # the latest ticks that were seen closely

    @property
    def refresh_seconds(self) -> float:
        """Time between two refreshes, s: as stated, or what comes nearest to that where it was measured wrong."""
        return min(max(self._stated_seconds, self._shortest), self._longest, 2 * self._stated_seconds)

    @property
    def error_seconds(self) -> float:
        """How wrong that may be, s; 0 where only the source's word is known."""
        if not self.learned:
            return 0.0
        return max(self._longest - self.refresh_seconds, self.refresh_seconds - self._shortest, 0.0)

    @property
    def well_known(self) -> bool:
        """Whether it was measured so well that ticks can be counted some way ahead."""
        return self.learned and self.error_seconds <= _IRREGULAR * self._stated_seconds

    @property
    def learned(self) -> bool:
        """Whether it was measured."""
        return self._longest < math.inf

    def is_close(self, tick: Tick) -> bool:
        """Whether a tick was seen so closely that it tells where others were."""
        return tick.gap_seconds <= _CLOSELY * self._stated_seconds

    def see(self, tick: Tick) -> None:
        """Take a tick; two neighbours that were seen closely tell the refresh time, farther ones more exactly."""
        before, self._neighbour = self._neighbour, tick if self.is_close(tick) else None
        if self._neighbour is None:
            return
        if before is not None:
            self._learn(1, before, tick)
        for other in reversed(self._close if self.learned else ()):
            count = round((tick.at - other.at) / self.refresh_seconds)
            if 1 < count <= _LONGEST_REST:
                self._learn(count, other, tick)
        self._close.append(tick)

    def _learn(self, count: int, before: Tick, tick: Tick) -> None:
        """Take what two ticks tell that are so many refreshes apart."""
        if tick.until <= before.after:  # of one moment: nothing
            return
        shortest = max(self._shortest, (tick.after - before.until) / count)
        longest = min(self._longest, (tick.until - before.after) / count)
        if shortest <= longest:
            self._shortest, self._longest = shortest, longest
        elif shortest > longest + 4 * self._slack:
            self._regular = False

    def forget(self) -> None:
        """Begin anew: the counter did what no counter should, and its beat may be another one."""
        self._close.clear()
        self._neighbour = None

    def place(self, tick: Tick) -> Placed | None:
        """Return where a tick must have been, or None where the others do not say it more closely."""
        if not (self.learned and self._regular):
            return None
        period, rest = self.refresh_seconds, _LONGEST_REST * self.refresh_seconds
        near = [other for other in self._close if abs(other.until - tick.until) <= rest]
        if not near:
            return None
        first = min(near, key=lambda other: abs(other.until - tick.until))
        beat = [(round((other.at - first.at) / period), other) for other in near]
        number = math.floor((tick.until - first.at) / period)
        possible = [self._of_beat(beat, n) for n in range(number - 1, number + 3)]
        inside = [one for one in possible if one.after <= tick.until and one.until >= tick.after]
        # It is the last of them before the reading that showed it: which one that is must be plain.
        if not inside or (inside[-1].until > tick.until and len(inside) > 1):
            return None
        found = Tick(max(inside[-1].after, tick.after), min(inside[-1].until, tick.until))
        return Placed(found, period, self.error_seconds) if 0 <= found.gap_seconds < tick.gap_seconds else None

    @property
    def _slack(self) -> float:
        return _IRREGULAR * self._stated_seconds

    def _of_beat(self, beat: list[tuple[int, Tick]], number: int) -> Tick:
        """Return where a tick may have been by each of the others; after > until where they contradict each other."""
        slack = 2 * self._slack  # both ticks may be off the beat, and so may those that told the period
        short, long = self._shortest - slack, self._longest + slack
        after = max(one.after + (n := number - k) * (short if n > 0 else long) for k, one in beat)
        until = min(one.until + (n := number - k) * (long if n > 0 else short) for k, one in beat)
        return Tick(after - slack, until + slack)
