"""One thread of the sampler: it reads the devices of one source, on schedule and when asked."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from wattier_telemetry.exporter.attribution import roots_of
from wattier_telemetry.exporter.series import LaneState
from wattier_telemetry.exporter.watched import Watched
from wattier_telemetry.records import Reading
from wattier_telemetry.source import PowerSource

_HUNG_SECONDS = 1.0  # nobody waits for a source that has been silent for longer

_log = logging.getLogger(__name__)


class Look(NamedTuple):
    """What one device answered; no reading = nothing."""

    watched: Watched
    at: float
    reading: Reading | None
    busy: dict[int, float]
    roots: dict[int, int]


class Lane:
    """The thread of one source, so that a driver that hangs stops only its own devices.

    Ticks are at ``start + n * period`` of the monotonic clock; one that is half a period late is skipped and counted,
    so that samples never come bunched.

    Args:
        source: What to read.
        devices: Its devices.
        lock: Held whenever the lane's figures or its devices' change.
        book: Called with the lane, what the devices answered, and whether a sink is to get it; under the lock.
    """

    def __init__(
        self,
        source: PowerSource,
        devices: list[Watched],
        lock: threading.RLock,
        book: Callable[[Lane, list[Look], bool], None],
    ) -> None:
        self.source, self.devices = source, devices
        self.started_at = self.sampled_at = float("-inf")
        self._lock, self._book = lock, book
        self._wake = threading.Condition(lock)
        self._wanted = self._push_wanted = self._closing = False
        self._samples = self._missed = 0
        self._seconds = self._last_seconds = 0.0
        self._known_pids: dict[int, int | None] = {}
        self._failing: set[str] = set()
        self.thread = threading.Thread(target=lambda: None)

    def start(self, origin: float, period_seconds: float) -> None:
        """Begin; the ticks count from the origin."""
        name = f"wattier-sampler-{self.source.name}"
        self.thread = threading.Thread(target=self._run, args=(origin, period_seconds), name=name, daemon=True)
        self.thread.start()

    def want(self, *, push: bool = False) -> None:
        """Ask for a sample outside the schedule; the caller has the lock."""
        self._wanted = True
        self._push_wanted = self._push_wanted or push
        self._wake.notify_all()

    def close(self) -> None:
        """Let the thread end after the sample it is at; the caller has the lock."""
        self._closing = True
        self._wake.notify_all()

    def hangs(self, now: float) -> bool:
        """Whether the driver has not answered for long."""
        return self.started_at > self.sampled_at and now - self.started_at > _HUNG_SECONDS

    def state(self, now: float) -> LaneState:
        """Return how it goes."""
        age = now - self.sampled_at if self._samples else None
        return LaneState(self.source.name, self._samples, self._missed, self._seconds, self._last_seconds, age)

    def _run(self, origin: float, period_seconds: float) -> None:
        tick = max(0, int((time.monotonic() - origin) / period_seconds))
        while True:
            with self._lock:
                scheduled = False
                while not self._closing:
                    late = (time.monotonic() - origin) / period_seconds - tick
                    if late >= 0.5 and self._samples:
                        self._missed += int(late + 0.5)
                        tick += int(late + 0.5)
                    elif late >= 0:
                        scheduled = True
                        tick += 1
                        break
                    elif self._wanted:
                        break
                    else:
                        self._wake.wait(-late * period_seconds)
                if self._closing:
                    return
                push, self._wanted, self._push_wanted = scheduled or self._push_wanted, False, False
                self.started_at = time.monotonic()
                contested = {watched.device.uuid for watched in self.devices if watched.contested}
                pids = {part.pid for watched in self.devices for part in watched.present.values()}
            try:
                self._sample(contested, pids, push=push)
            except Exception:  # noqa: BLE001  (a thread that dies would freeze its series)
                _log.exception("source %s: a sample failed", self.source.name)

    def _sample(self, contested: set[str], pids: set[int], *, push: bool) -> None:
        looks = [self._look_at(watched, pids if watched.device.uuid in contested else None) for watched in self.devices]
        ended_at = time.monotonic()
        with self._lock:
            self._samples += 1
            self._last_seconds = ended_at - self.started_at
            self._seconds += self._last_seconds
            self.sampled_at = self.started_at
            self._book(self, looks, push)

    def _look_at(self, watched: Watched, pids: set[int] | None) -> Look:
        """Read one device, and ask which processes use it where there are some whose part matters."""
        device, before = watched.device, time.monotonic()
        try:
            reading = self.source.read(device)
        except Exception as error:  # noqa: BLE001  (a broken device, whatever it raises, must not take the others along)
            if device.uuid not in self._failing:
                self._failing.add(device.uuid)
                _log.warning("%s %s does not answer: %s", device.name, device.uuid, " ".join(str(error).split()))
            with self._lock:
                watched.account.fail(error)
            return Look(watched, before, None, {}, {})
        at = (before + time.monotonic()) / 2
        if device.uuid in self._failing:
            self._failing.remove(device.uuid)
            _log.warning("%s %s answers again", device.name, device.uuid)
        busy: dict[int, float] = {}
        if pids is not None:
            try:
                busy = dict(self.source.busy_by_pid(device))
            except Exception as error:  # noqa: BLE001  (then the registered parts decide)
                _log.debug("%s: %s", device.uuid, error)
        return Look(watched, at, reading, busy, roots_of(busy, pids, self._known_pids) if pids and busy else {})
