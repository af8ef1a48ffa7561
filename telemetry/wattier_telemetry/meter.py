"""The energy meter: a window around a piece of work, over all devices of a source."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from wattier_telemetry.account import Account
from wattier_telemetry.journal import Journal
from wattier_telemetry.ownership import Owners
from wattier_telemetry.records import Device, EnergyReport, Reading
from wattier_telemetry.source import PowerSource

_FIRST_TICK_SECONDS = 0.01  # a source without a power field shows its power only at its second reading
_EDGE_SECONDS = 0.005  # between two readings while a tick of the counter is awaited
_EDGE_REFRESHES = 3  # a counter that has not moved for so long after the end will not tell the end
_LOCK_SECONDS = 0.1  # between two looks whether the meter was closed by whoever has the lock
_JITTER = 0.2  # of the interval: samples in step with a load that pulsates would see only one side of it
_RESERVED_INTERVALS = 2.5
_TIMES_ASKED = 3  # at most, while the answers come late
_HANGS_SECONDS = 0.25  # an answer that takes so long is the driver's, or nothing that asking again would mend
_HELD_UP_RATIO, _HELD_UP_SECONDS = 2.0, 0.0002  # late are those that took so much longer than the quickest did
_LONGEST_GAP_INTERVALS = 5.0


class _Answer(NamedTuple):
    """What a device answered, or why it did not, and how long after all were asked."""

    reading: Reading | Exception
    late_seconds: float


class EnergyMeter:
    """Measures the energy of a ``with`` block, and leaves a bill even if the process is killed inside it.

        with EnergyMeter(open_source(), journal=folder / "rank0.energy.json") as meter:
            ...
            meter.so_far().joules
        meter.report.joules

    A background thread reads every device each interval and rewrites the journal: energy so far plus a reservation
    for two and a half intervals to come (or so many times the longest recent stall of the thread, if that is longer)
    at the larger of present and mean power. A process that is killed is therefore billed a little too much, not too
    little, as long as its power does not rise and no new stall is longer than that.

    A child that is forked inside the window has no part in it: there `close` does nothing, and `so_far` is empty.

    Windows may nest and run side by side, one meter each, over one source. At the edges of a window whose counter is
    refreshed only now and then, the meter reads quickly until the next refresh (see `Account`): for up to two
    refreshes after the start, in the background, and for up to one after the end, before `close` returns.

    Args:
        source: What to read; it stays open, for it is the caller's.
        journal: File ``*.energy.json`` for the journal. If it exists, a free name beside it is used.
        fraction: Part of each device that this work owns. Below 1, what the driver tells of the processes on the
            device takes its place where it tells: then the share is this process's (and its children's) part of
            their utilization. An estimated device counts only this process, so its joules are never scaled.
        interval_seconds: Time between two readings, s; each is up to a fifth shorter or longer.
        journal_seconds: Time between two writes of the journal, s; None = at every reading. The reservation lasts so
            much longer, so that a process that is killed is billed up to so many seconds of its power too much.
        synchronize: Called at both edges before the reading, to wait for work that was only queued, such as
            ``torch.cuda.synchronize``.
        clock: Wall clock for the edges of shares, seconds since 1970.
        monotonic: Clock for durations, s.

    Raises:
        ValueError: If the fraction, or one of the intervals, is out of range, or the journal's name is wrong.
    """

    def __init__(  # noqa: PLR0913  (two of them are clocks, for tests)
        self,
        source: PowerSource,
        *,
        journal: Path | None = None,
        fraction: float = 1.0,
        interval_seconds: float = 0.05,
        journal_seconds: float | None = None,
        synchronize: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is {fraction}, but must be above 0 and at most 1")
        if not 0 < interval_seconds < float("inf"):
            raise ValueError(f"interval_seconds is {interval_seconds}, but must be above 0")
        if journal_seconds is not None and not 0 < journal_seconds < float("inf"):
            raise ValueError(f"journal_seconds is {journal_seconds}, but must be above 0")
        self._source = source
        self._interval_seconds = interval_seconds
        self._journal_seconds = max(interval_seconds, journal_seconds or 0.0)
        self._clock, self._monotonic = clock, monotonic
        longest_gap = max(1.0, _LONGEST_GAP_INTERVALS * interval_seconds)
        self._accounts = [
            Account(
                device,
                device.method,
                longest_gap_seconds=longest_gap,
                fraction=1.0 if device.method == "estimated" else fraction,
            )
            for device in source.devices()
        ]
        self._synchronize = synchronize
        self._owners = Owners(source, fraction)
        self._journal_path = journal
        self._journal: Journal | None = None
        self._journal_failure = ""
        self._notes: list[str] = []
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._is_closing = False
        self._thread: threading.Thread | None = None
        self._start_seconds = 0.0
        self._opened_at: float | None = None
        self._sampled_at = self._journaled_at = 0.0
        self._pid = os.getpid()
        self._gaps: deque[float] = deque(maxlen=16)
        self._answer_seconds: deque[float] = deque(maxlen=16)  # how long it took until all devices had answered
        self._report: EnergyReport | None = None

    def __enter__(self) -> Self:
        """Open the window: reserve in the journal first, then take the first reading."""
        if self._opened_at is not None:
            raise RuntimeError("an EnergyMeter measures one window; make a new one for the next")
        before, answered = self._monotonic(), True
        for account in self._accounts:
            try:
                account.preview(self._source.read(account.device))
            except Exception:  # noqa: BLE001  (the first sample will report it)
                answered = False
        if answered:
            self._answer_seconds.append(self._monotonic() - before)
        self._wait_for_the_device()
        if self._journal_path is not None:
            self._journal = Journal(self._journal_path)
            self._start_seconds = self._clock()
            self._journal.write(self._build(0.0, reserved_seconds=self._horizon_seconds()))
        self._pid = os.getpid()
        self._open()
        if self._report is not None:  # a signal handler has closed the meter
            return self
        self._thread = threading.Thread(target=self._run, name="wattier-energy-meter", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the window."""
        self.close()

    def close(self) -> None:
        """Take the last reading and put the exact report into the journal. Closing twice is harmless."""
        if self._opened_at is None or self._report is not None or os.getpid() != self._pid:
            return
        if not self._is_closing:  # else a signal handler has come in the middle of this, and waits for none of it
            self._is_closing = True
            self._stop.set()
            if self._thread is not None:
                self._thread.join()
        self._wait_for_the_device()
        with self._lock:
            if self._report is not None:
                return
            now = self._sample()
            try:
                self._look_back(now)
            finally:
                self._report = self._build(now - self._opened_at)
            if self._journal is not None:
                try:
                    self._journal.finish(self._report)
                except OSError as failure:  # the reservation stands: billed a little too much, never too little
                    self._journal_failure = str(failure)
                    self._report = self._build(now - self._opened_at)

    @property
    def report(self) -> EnergyReport:
        """The exact report of the closed window.

        Raises:
            RuntimeError: If the window is not closed yet; `so_far` is what is known then.
        """
        if self._report is None:
            raise RuntimeError("the meter has no report before it is closed; ask so_far() for the energy until now")
        return self._report

    @property
    def journal(self) -> Path | None:
        """Where the journal really is, once the window is open."""
        return self._journal_path if self._journal is None else self._journal.path

    def so_far(self) -> EnergyReport:
        """Take a reading now and return the energy since the window opened; after close, the report."""
        if os.getpid() != self._pid:  # a lock that was held at the fork is never given back in the child
            return EnergyReport.empty()
        with self._lock:
            if self._report is not None:
                return self._report
            if self._opened_at is None:
                return EnergyReport.empty()
            now = self._sample()
            if self._report is None:
                self._write_journal(now)
            return self._report or self._build(now - self._opened_at)

    def _run(self) -> None:
        delay = min(_FIRST_TICK_SECONDS, self._interval_seconds)
        while not self._stop.wait(delay):
            while not self._lock.acquire(timeout=_LOCK_SECONDS):
                if self._stop.is_set():  # a signal handler closes the meter while its thread is in `so_far`
                    return
            try:
                now = self._sample()
                if now >= self._journaled_at + self._journal_seconds - self._interval_seconds / 2:
                    self._write_journal(now)
                fast = any(account.wants_fast_readings for account in self._accounts)
            finally:
                self._lock.release()
            if fast:
                delay = _EDGE_SECONDS
            else:
                interval = self._interval_seconds * random.uniform(1 - _JITTER, 1 + _JITTER)
                delay = max(0.0, interval - (self._monotonic() - now))

    def _open(self) -> None:
        """Take the first reading: the window begins where it was asked for."""
        self._start_seconds, begun = self._clock(), self._monotonic()
        self._opened_at = self._sampled_at = self._journaled_at = begun
        now, answers = self._read_all()
        if self._report is not None:
            return
        self._start_seconds += now - begun
        self._opened_at = self._sampled_at = self._journaled_at = now
        self._book(now, answers)
        self._write_journal(now)

    def _sample(self) -> float:
        """Read every device; return when they were asked."""
        now, answers = self._read_all()
        if self._report is None:  # a signal handler may have closed the meter in between
            self._book(now, answers)
        return now

    def _read_all(self) -> tuple[float, list[_Answer]]:
        """Ask every device at one time, so that a window in which all answered is covered exactly.

        Joules run to the moment a device answers, seconds to the moment it is asked. Where somebody held the thread up
        in between, it asks again; but not a driver that hangs, nor one that fails, and no answer is given up for a
        failure.
        """
        kept: tuple[float, list[_Answer]] | None = None
        for _ in range(_TIMES_ASKED):
            now = self._monotonic()
            answers = [self._ask(account.device, now) for account in self._accounts]
            seconds = self._monotonic() - now
            if any(isinstance(answer.reading, Exception) for answer in answers):
                return kept or (now, answers)
            kept = now, answers
            usual = min(self._answer_seconds, default=seconds)
            self._answer_seconds.append(seconds)
            if seconds <= _HELD_UP_RATIO * usual + _HELD_UP_SECONDS or seconds > _HANGS_SECONDS:
                break
        return now, answers

    def _ask(self, device: Device, now: float) -> _Answer:
        try:
            reading = self._source.read_energy(device)
        except Exception as error:  # noqa: BLE001  (whatever a source raises, the other devices must be billed)
            return _Answer(error, 0.0)
        return _Answer(reading, self._monotonic() - now)

    def _book(self, now: float, answers: list[_Answer]) -> None:
        self._gaps.append(now - self._sampled_at)
        self._sampled_at = now
        for account, answer in zip(self._accounts, answers, strict=True):
            if isinstance(answer.reading, Exception):
                account.fail(answer.reading)
                continue
            try:
                fraction = self._owners.fraction_of(account.device)
                account.add(now, answer.reading, fraction, late_seconds=answer.late_seconds)
            except Exception as error:  # noqa: BLE001  (nor what it answers)
                account.fail(error)

    def _write_journal(self, now: float) -> None:
        if self._journal is None or self._opened_at is None:
            return
        self._journaled_at = now
        try:
            self._journal.write(self._build(now - self._opened_at, reserved_seconds=self._horizon_seconds()))
        except OSError as failure:
            self._journal_failure = str(failure)

    def _look_back(self, closed_at: float) -> None:
        """Read on until the counters have moved once more; only then is it known what they held at the end."""
        for account in self._accounts:
            account.close(closed_at)
        waiting = [account for account in self._accounts if not account.settled]
        longest = max((account.refresh_seconds for account in waiting), default=0.0)
        for _ in range(round(_EDGE_REFRESHES * longest / _EDGE_SECONDS)):
            if not waiting:
                break
            time.sleep(_EDGE_SECONDS)
            for account in waiting:
                asked_at = self._monotonic()
                try:
                    reading = self._source.read_energy(account.device)
                except Exception:  # noqa: BLE001  (the window is over: its end stays an estimate)
                    continue
                account.look_back(asked_at, reading, late_seconds=self._monotonic() - asked_at)
            waiting = [account for account in waiting if not account.settled]

    def _wait_for_the_device(self) -> None:
        if self._synchronize is None:
            return
        try:
            self._synchronize()
        except Exception as error:  # noqa: BLE001  (a device that cannot be waited for must still be billed)
            self._notes.append(f"the device could not be waited for: {error}")

    def _horizon_seconds(self) -> float:
        """Return how long the journal must last: a thread starved once will be starved again."""
        stalled = _RESERVED_INTERVALS * max(self._interval_seconds, *self._gaps, 0.0)
        return self._journal_seconds - self._interval_seconds + stalled

    def _build(self, seconds: float, *, reserved_seconds: float = 0.0) -> EnergyReport:
        shares = [
            account.share(
                self._start_seconds,
                seconds,
                reserved_seconds=reserved_seconds,
                attribution=self._owners.attribution_of(account.device),
            )
            for account in self._accounts
        ]
        warnings = self._notes + [text for account in self._accounts for text in account.warnings()]
        if self._journal_failure:
            warnings.append(f"the journal {self.journal} could not be written: {self._journal_failure}")
        return EnergyReport.of(shares, warnings)
