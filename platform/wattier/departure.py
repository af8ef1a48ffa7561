"""How a command leaves before it is made to: its trials read in the run directory when they must be gone.

The command writes ``leave.json`` when it knows how long its job lasts, or has caught a signal. Rank 0 of each trial
looks at it about once a second; it saves at the step it has reached, and the same command goes on from there.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from wattier.interrupts import Interrupted
from wattier.rundir import LEAVE_NAME, RunDir, read_json, write_json
from wattier.walltime import Limit

EXIT_NOT_FINISHED = 75  # EX_TEMPFAIL of sysexits.h: a job script runs the same command again
LEFT_RESULT = "interrupted.json"  # of a trial that was told to leave; gone when it is taken up again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
WRAP_UP_SECONDS = 15.0  # of the command, when its trials are gone: records, Ray's end, the job script's
START_SECONDS = 30.0  # a trial that started later would do little but start
MARGIN_SECONDS = 3.0  # beyond what a trial says it needs: the end of its meter and process group, clocks that differ
POLL_SECONDS = 0.5
AT_ONCE = 0.0  # by anybody's clock, also that of a node that is minutes behind


class NotFinishedError(Interrupted):
    """The command leaves before it is done; what it did is saved."""


class _Note(NamedTuple):
    at_seconds: float  # s since the epoch
    last_start_seconds: float
    reason: str


class LeaveNote:
    """What ``leave.json`` says, looked at no more than twice a second."""

    def __init__(self, run: RunDir) -> None:
        self._path = run.path / LEAVE_NAME
        self._seen: tuple[int, int] | None = None
        self._note: _Note | None = None
        self._look_at = 0.0

    def due(self, seconds: float = 0.0) -> str | None:
        """Why to leave, if what takes so many more seconds would end too late; None = there is time."""
        note = self._read()
        return note.reason if note is not None and time.time() + seconds >= note.at_seconds else None

    def too_late_to_start(self) -> str | None:
        """Why no trial is to start any more; None = there is time."""
        note = self._read()
        return note.reason if note is not None and time.time() >= note.last_start_seconds else None

    def _read(self) -> _Note | None:
        now = time.monotonic()
        if now < self._look_at:
            return self._note
        self._look_at = now + POLL_SECONDS
        try:
            state = self._path.stat()
            if (seen := (state.st_mtime_ns, state.st_ino)) != self._seen:
                self._note, self._seen = _decoded(json.loads(self._path.read_text(encoding="utf-8"))), seen
        except FileNotFoundError:
            self._note = self._seen = None
        except (OSError, ValueError, TypeError, KeyError):  # nobody's trial dies of a file that tells it to leave
            return self._note
        return self._note


def _decoded(data: Any) -> _Note:
    return _Note(float(data["at"]), float(data["last_start"]), str(data["reason"]))


class Departure:
    """The end of this command, as far as it is known: writes the note, and hears signals."""

    def __init__(self, run: RunDir, limit: Limit | None) -> None:
        self.run, self.limit = run, limit
        self._has_hurried = False
        self.raised: NotFinishedError | None = None
        self.leaves_at: float | None = None
        if limit is not None:
            left = max(0.0, limit.at_seconds - time.time())
            self.leaves_at = limit.at_seconds - min(WRAP_UP_SECONDS, left / 4)
            self._write("walltime", self.leaves_at - min(START_SECONDS, left / 10))

    def hurry(self, number: int, _frame: object = None) -> None:
        """A signal came: trials save and leave. Where none runs, or they were told before, leave at once."""
        name = "walltime" if number == signal.SIGALRM else signal.Signals(number).name
        if _TRIALS.running and number == signal.SIGALRM:
            return  # they know
        if not _TRIALS.running or self._has_hurried:
            self.raised = NotFinishedError(name, number)
            raise self.raised
        self._has_hurried = True
        self.leaves_at = AT_ONCE
        self._write(name, AT_ONCE)

    def _write(self, reason: str, last_start: float) -> None:
        write_json(self.run.path / LEAVE_NAME, {"at": self.leaves_at, "last_start": last_start, "reason": reason})


@contextmanager
def leaving_in_time(run: RunDir, limit: Limit | None) -> Iterator[Departure]:
    """For the length of a command that holds the run's lock: its trials know when to leave, and signals are heard."""
    departure = Departure(run, limit)
    if threading.current_thread() is not threading.main_thread():
        yield departure
        return
    before = {number: signal.signal(number, departure.hurry) for number in SIGNALS}
    try:
        with _alarm(departure):
            yield departure
    except KeyboardInterrupt as stop:
        if departure.raised is None or isinstance(stop, NotFinishedError):
            raise
        raise departure.raised from None  # in whose place Ray has raised a KeyboardInterrupt of its own
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _alarm(departure: Departure) -> Iterator[None]:
    """Wake this process when it has to leave; an alarm that somebody else has set rings after it, if it is due."""
    if departure.leaves_at is None:
        yield
        return
    handler, began = signal.signal(signal.SIGALRM, departure.hurry), time.monotonic()
    others, _ = signal.setitimer(signal.ITIMER_REAL, max(0.001, departure.leaves_at - time.time()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if others:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, others - (time.monotonic() - began)))


class _Trials:
    """Whether this process runs trials, which must be told of a signal; a signal is the whole process's."""

    running = False


_TRIALS = _Trials()


@contextmanager
def trials_run() -> Iterator[None]:
    """While trials run, a signal is passed on to them."""
    _TRIALS.running = True
    try:
        yield
    finally:
        _TRIALS.running = False


def left_trials(run: RunDir) -> list[tuple[str, str, str]]:
    """Stage, id and reason of the trials that were told to leave and are not taken up again yet."""
    paths = sorted((run.path / "trials").glob(f"*/*/{LEFT_RESULT}"))
    return [(path.parts[-3], path.parts[-2], str(read_json(path).get("ended"))) for path in paths]


def note_of(run_dir: str | Path | os.PathLike[str]) -> LeaveNote:
    """The note of a run, for a process that knows its path alone."""
    return LeaveNote(RunDir(Path(run_dir)))
