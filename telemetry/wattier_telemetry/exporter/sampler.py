"""The node's sampler: reads every device on a schedule that does not drift, and bills the trials on it.

A `Lane` is the thread of one source; one more thread watches the trials, and one saves the joules. All figures change
under one lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from wattier_telemetry.account import Account
from wattier_telemetry.campaign import CampaignRegistration
from wattier_telemetry.exporter.attribution import MICRO, Key, Part
from wattier_telemetry.exporter.campaigns import Campaigns
from wattier_telemetry.exporter.lane import Lane, Look
from wattier_telemetry.exporter.metrics import Point, Sink
from wattier_telemetry.exporter.series import Ended, Node, View, WattierView
from wattier_telemetry.exporter.state import SamplerState
from wattier_telemetry.exporter.trials import Roster
from wattier_telemetry.exporter.watched import Watched
from wattier_telemetry.registration import TrialRegistration
from wattier_telemetry.source import PowerSource

SHORTEST_PERIOD_SECONDS = 0.01
STALE_PERIODS, STALE_SECONDS = 5.0, 5.0
_CALM_SECONDS = 0.01  # between two looks at trials that come and go in a crowd
_SHOWN_AFTER_END_SECONDS = 300.0  # as long as Prometheus looks back
_STEP_SECONDS = 1.0  # a wall clock that moves by more was set, not disciplined

_log = logging.getLogger(__name__)


class Sampler:
    """Reads the devices of a node, bills its trials, and gives what it saw to sinks and scrapers.

    Args:
        sources: What to read; they stay open, for they are the caller's.
        registry: Folder where trials register. None = the default folder of this user.
        period_seconds: Time between two samples, s.
        views: The names under which sinks get what was seen.
        sinks: Where every scheduled sample goes.
        state: Where the joules are kept over a restart. None = nowhere.
        clock: Wall clock, seconds since 1970; read for the start, then only to see whether it was set.

    Raises:
        ValueError: If the period is too short.
    """

    def __init__(  # noqa: PLR0913  (all but the first have defaults)
        self,
        sources: Sequence[PowerSource],
        *,
        registry: Path | None = None,
        period_seconds: float = 1.0,
        views: Sequence[View] = (WattierView(),),
        sinks: Sequence[Sink] = (),
        state: SamplerState | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not SHORTEST_PERIOD_SECONDS <= period_seconds < float("inf"):
            raise ValueError(f"period_seconds is {period_seconds}, but must be at least {SHORTEST_PERIOD_SECONDS}")
        self.period_seconds = period_seconds
        self.stale_seconds = max(STALE_PERIODS * period_seconds, STALE_SECONDS)
        self.generation = 0
        self._views, self._sinks, self._state, self._clock = views, sinks, state, clock
        self._lock = threading.RLock()
        self._sampled = threading.Condition(self._lock)
        self._roster = Roster(registry)
        self._campaign_roster = Campaigns(registry)
        self._campaigns: tuple[CampaignRegistration, ...] = ()
        self._trials: dict[Key, TrialRegistration] = {}
        self._first_seen: dict[Key, float] = {}
        self._ending: dict[Key, TrialRegistration] = {}
        self._ended: list[tuple[int, float, Ended]] = []
        self._ended_count = self._pushed_ended = 0
        self._common_at = float("-inf")
        self._closing = threading.Event()
        self._wall_start, self._start = clock(), time.monotonic()
        self._offset_told = 0.0
        self._lanes = self._make_lanes(sources)
        self.watched = [watched for lane in self._lanes for watched in lane.devices]
        if state is not None:
            state.restore(self.watched)
        self._clerk = threading.Thread(target=self._watch_trials, name="wattier-trials", daemon=True)
        self._keeper = threading.Thread(target=self._keep_books, name="wattier-books", daemon=True)

    def _make_lanes(self, sources: Sequence[PowerSource]) -> list[Lane]:
        lanes, card, known = [], 0, set()
        longest_gap = max(1.0, STALE_PERIODS * self.period_seconds)
        measured = {device.domain for source in sources if source.name != "cray" for device in source.devices()}
        for source in sources:
            watches = []
            for device in source.devices():
                # Two sources that see one device must not bill it twice; and Cray's counters of the processors, memory
                # and accelerators hold the very devices that others list.
                if device.uuid in known or (source.name == "cray" and device.domain in measured):
                    continue
                known.add(device.uuid)
                gpu = device.domain == "gpu" and source.name != "cray"  # a module is no card: it may hold two
                account = Account(device, device.method, longest_gap_seconds=longest_gap)
                watches.append(Watched(device, source.name, card if gpu else None, account))
                card += gpu
            lanes.append(Lane(source, watches, self._lock, self._book))
        return lanes

    def start(self) -> None:
        """Begin to sample."""
        self._see_trials()
        for lane in self._lanes:
            lane.start(self._start, self.period_seconds)
        self._clerk.start()
        if self._state is not None:
            self._keeper.start()

    def close(self, *, wait_seconds: float = 2.0) -> None:
        """Stop, and save the joules; a driver that hangs is not waited for longer than told."""
        self._closing.set()
        self._roster.interrupt()
        with self._lock:
            for lane in self._lanes:
                lane.close()
            self._sampled.notify_all()
        deadline = time.monotonic() + wait_seconds
        threads = [lane.thread for lane in self._lanes] + [self._clerk, self._keeper]
        for thread in threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))
        if not self._keeper.is_alive():  # else the disk hangs; the next exporter makes the joules good by the counter
            self._save()
        if not any(thread.is_alive() for thread in threads):
            self._roster.close()

    def timeline(self) -> float:
        """Return seconds since 1970 that never go backward, whatever is done to the wall clock."""
        return self._wall_start + (time.monotonic() - self._start)

    def fresh(self, max_age_seconds: float = 0.05, *, timeout_seconds: float = 0.5) -> int:
        """Make sure that readings are not older than asked, as far as the drivers answer in time.

        Many callers at once cause one reading.

        Returns:
            A number that grows with every sample.
        """
        asked = time.monotonic()
        self._see_trials()
        with self._lock:
            oldest = asked - max_age_seconds
            waited_for = [lane for lane in self._lanes if lane.sampled_at < oldest and not lane.hangs(asked)]
            for lane in waited_for:
                if lane.started_at < oldest:
                    lane.want()
            while any(lane.sampled_at < oldest for lane in waited_for) and not self._closing.is_set():
                left = asked + timeout_seconds - time.monotonic()
                if left <= 0:
                    break
                self._sampled.wait(left)
            return self.generation

    def look(self, *, ended_after: int = 0) -> tuple[Node, int]:
        """Return everything that is known, and the number of the last ended trial in it; hold `locked` meanwhile."""
        now = time.monotonic()
        fresh = frozenset(
            watched.device.uuid
            for watched in self.watched
            if watched.reading is not None and now - watched.read_at <= self.stale_seconds
        )
        node = Node(
            watched=self.watched,
            fresh=fresh,
            trials=self._trials,
            started=self._first_seen,
            ended=[ended for number, _, ended in self._ended if number > ended_after],
            lanes=[lane.state(now) for lane in self._lanes],
            period_seconds=self.period_seconds,
            offset_seconds=self._offset_seconds(),
            not_shown=self._roster.not_shown,
            state_errors=self._state.errors if self._state is not None else 0,
            campaigns=self._campaigns,
        )
        return node, self._ended_count

    @property
    def locked(self) -> threading.RLock:
        """The lock under which nothing changes."""
        return self._lock

    def _offset_seconds(self) -> float:
        offset = self._clock() - self.timeline()
        if abs(offset - self._offset_told) > _STEP_SECONDS:
            self._offset_told = offset
            _log.warning(
                "the wall clock was set: it is %+.1f s from the time line of the samples, which goes on evenly", offset
            )
        return offset

    def _book(self, lane: Lane, looks: list[Look], push: bool) -> None:
        """Bill a sample, and pass it on."""
        for look in looks:
            watched = look.watched
            if look.reading is None:  # who left meanwhile must not be billed for however long the device is away
                watched.errors += 1
                watched.present = {key: part for key, part in watched.present.items() if key in self._trials}
                continue
            try:
                watched.take(look.at, look.reading, look.busy, look.roots)
            except Exception:  # noqa: BLE001  (what one device says must not cost the others their sample)
                watched.errors += 1
                _log.exception("%s: its reading cannot be booked", watched.device.uuid)
            self._seat(watched)
        self.generation += 1
        self._end_trials()
        if self._sinks and push:
            self._push(lane)
        self._sampled.notify_all()

    def _seat(self, watched: Watched) -> None:
        """Note who is on the device from this reading on."""
        if not watched.billed or not (self._trials or watched.present):
            return
        uuid = watched.device.uuid
        watched.present = {
            key: Part(key, trial.fraction, trial.pid)
            for key, trial in self._trials.items()
            if uuid in trial.device_uuids
        }
        watched.ledger.forget(set(watched.present))

    def _see_trials(self) -> None:
        """Look who came and who went; a change is followed by a reading at once, so that the bill is cut there."""
        living, campaigns = self._roster.refresh(), self._campaign_roster.refresh()
        with self._lock:
            if campaigns is not self._campaigns:
                self._campaigns = campaigns
                self.generation += 1
            if living is self._trials:
                return
            gone = {key: trial for key, trial in self._trials.items() if key not in living}
            came = living.keys() - self._trials.keys()
            moved = any(_claim(trial) != _claim(living.get(key, trial)) for key, trial in self._trials.items())
            self._trials = living
            self.generation += 1
            now = self.timeline()
            self._first_seen = {key: self._first_seen.get(key, now) for key in living}
            self._ending |= gone
            for key in came:
                self._ending.pop(key, None)
            if gone or came or moved:
                for lane in self._lanes:
                    lane.want(push=True)

    def _end_trials(self) -> None:
        """Close the books of trials that no device is waiting to bill any more."""
        now = time.monotonic()
        for key in [key for key in self._ending if not any(key in watched.present for watched in self.watched)]:
            trial = self._ending.pop(key)
            joules = {
                watched.device.uuid: watched.ledger.shares.get(key, 0) / MICRO
                for watched in self.watched
                if watched.billed and (watched.device.uuid in trial.device_uuids or key in watched.ledger.shares)
            }
            self._ended_count += 1
            self._ended.append((self._ended_count, now, Ended(key, joules)))
        self._ended = [one for one in self._ended[-1000:] if now - one[1] < _SHOWN_AFTER_END_SECONDS]

    def _push(self, lane: Lane) -> None:
        """Give the sinks this source's devices, and whatever belongs to none, once a period."""
        node, number = self.look(ended_after=self._pushed_ended)
        now = time.monotonic()
        points: list[Point] = [point for view in self._views for point in view.devices(lane.devices, node)]
        if node.ended or now - self._common_at >= 0.75 * self.period_seconds:
            self._common_at, self._pushed_ended = now, number
            points += [point for view in self._views for point in view.common(node)]
            points += [point for sink in self._sinks for point in sink.points()]
        for sink in self._sinks:
            sink.add(self._wall_start + (lane.started_at - self._start), points)

    def _watch_trials(self) -> None:
        while not self._closing.is_set():
            try:
                self._roster.wait()
                self._see_trials()
                self._closing.wait(_CALM_SECONDS)
            except Exception:  # noqa: BLE001  (the next look may work)
                _log.exception("the trials could not be looked at")
                self._closing.wait(1.0)

    def _keep_books(self) -> None:
        """Save the joules now and then, in a thread of its own: a slow disk must not hide who comes and goes."""
        while self._state is not None and not self._closing.wait(self._state.flush_seconds):
            try:
                self._save()
            except Exception:  # noqa: BLE001  (the next time may work)
                _log.exception("the joules could not be saved")

    def _save(self) -> None:
        if self._state is not None:
            with self._lock:
                data = self._state.snapshot(self.watched)
            self._state.write(data)


def _claim(trial: TrialRegistration) -> tuple[tuple[str, ...], float, int]:
    """Return what decides which joules are the trial's."""
    return trial.device_uuids, trial.fraction, trial.pid
