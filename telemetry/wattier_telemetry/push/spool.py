"""The spool: batches of samples as files in a folder, oldest first, until a server has taken them.

<folder>/0000000000000042.1500.segment   batch number 42, which holds 1,500 samples
<folder>/rejected/                       what no server will take, kept for a person to look at
<folder>/state.json                      how much is lost if the process dies now
<folder>/lock                            held by the one process that may write here
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from wattier_telemetry.push.segment import MOST_BYTES, Series, decode, encode

SUFFIX = ".segment"
DEFAULT_CAP_BYTES = 2**30
REJECTED_KEPT = 1000
LOSSES = ("killed", "disk_full", "spool_full", "rejected", "corrupt")
_NAME = re.compile(r"(\d{16})\.(\d{1,9})\.segment")
_TEMPORARY = ".segment.tmp"
_STATE_BYTES = 4096

_log = logging.getLogger(__name__)


class SpoolUnavailable(OSError):  # noqa: N818  (it names a state of the machine, not a mistake in the code)
    """The folder cannot be used; the message is one line that says why and what to do."""


class Segment(NamedTuple):
    """A batch in the spool. ``replayed`` = an earlier process wrote it, and may have sent it already."""

    path: Path
    samples: int
    size_bytes: int
    replayed: bool


class Spool:
    """A folder of batches that outlives the process. Methods may be called from several threads.

    Args:
        folder: Made if missing; one process at a time.
        cap_bytes: Beyond this size the oldest batches are dropped, and counted in `lost`.

    Attributes:
        lost: Samples lost for good, by reason.

    Raises:
        SpoolUnavailable: If another process has it, or it cannot be written.
    """

    def __init__(self, folder: Path, *, cap_bytes: int = DEFAULT_CAP_BYTES) -> None:
        self._folder, self._cap_bytes = folder, cap_bytes
        self._rejected = folder / "rejected"
        self._mutex = threading.Lock()
        self._busy: Segment | None = None  # is being sent: not to be dropped
        self._sent: list[tuple[float, Segment]] = []  # may still be in the server's memory only, until when
        self.lost: Counter[str] = Counter(dict.fromkeys(LOSSES, 0))
        self.corrupt = 0
        self._lock = _lock(folder)
        try:
            self._state = os.open(folder / "state.json", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            self._rejected.mkdir(mode=0o700, exist_ok=True)
            (folder / _TEMPORARY).unlink(missing_ok=True)
            self._count_unclean_end()
            self._queue = self._scan()
            self._bytes = sum(segment.size_bytes for segment in self._queue)
        except OSError as error:
            os.close(self._lock)
            raise SpoolUnavailable(f"{folder}: cannot be used as a spool: {error.strerror}") from error
        self._next = 1 + max((_number(path) for path in (*folder.iterdir(), *self._rejected.iterdir())), default=0)
        if self._queue:
            _log.warning("%s: %d batches of an earlier process are sent first", folder, len(self._queue))

    @property
    def size_bytes(self) -> int:
        """Bytes that wait to be sent."""
        return self._bytes

    def __len__(self) -> int:
        """Return how many batches wait."""
        return len(self._queue)

    def append(self, batch: Sequence[Series]) -> None:
        """Write one batch, down to the disk.

        Raises:
            OSError: If the disk is full or does not take it; nothing is left behind.
        """
        data = encode(batch)
        samples = sum(len(series.times_ms) for series in batch)
        path = self._folder / f"{self._next:016d}.{samples}{SUFFIX}"
        _write(self._folder / _TEMPORARY, path, data)
        with self._mutex:
            self._next += 1
            self._queue.append(Segment(path, samples, len(data), replayed=False))
            self._bytes += len(data)
            self._enforce_cap()

    def oldest(self) -> Segment | None:
        """Return the batch to send next, which `done` or `reject` must end."""
        with self._mutex:
            self._busy = self._queue[0] if self._queue else None
            return self._busy

    def read(self, segment: Segment) -> list[Series]:
        """Return what a batch holds.

        Raises:
            ValueError: If it is torn or no batch.
            OSError: If it cannot be read.
        """
        descriptor = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            return decode(file.read(MOST_BYTES))

    def done(self, segment: Segment, hold_seconds: float = 0.0) -> None:
        """Forget a batch that a server has taken; with a hold, at the first `done` after it, and `recall` undoes it."""
        self._forget(segment)
        self._sent.append((time.monotonic() + hold_seconds, segment))
        while self._sent and self._sent[0][0] <= time.monotonic():
            _delete(self._sent.pop(0)[1].path)

    def recall(self) -> int:
        """Put the batches on hold back into the queue, and return how many."""
        with self._mutex:
            back = [segment for _, segment in self._sent]
            self._queue[:0], self._sent = back, []
            self._bytes += sum(segment.size_bytes for segment in back)
        return len(back)

    def reject(self, segment: Segment, *, corrupt: bool = False) -> None:
        """Move a batch out of the way for good, and count its samples as lost."""
        self._forget(segment)
        try:
            self._move_to_rejected(segment.path)
        except OSError as error:
            _log.error("%s: cannot be moved to rejected: %s", segment.path, error.strerror)
        self.corrupt += corrupt
        self.lost["corrupt" if corrupt else "rejected"] += segment.samples

    def note(self, at_risk: int, *, clean: bool = False, reason: str = "killed") -> None:
        """Say how many samples are lost if this is the last word: an upper bound.

        The page is overwritten in place, which SIGKILL cannot tear and a full disk does not hinder.
        """
        state = {"clean": clean, "at_risk": at_risk, "reason": reason, "flushed_at_seconds": time.time()}
        with contextlib.suppress(OSError):  # the first write needs room; without it an unclean end has no bound
            os.pwrite(self._state, json.dumps(state).encode().ljust(_STATE_BYTES - 1) + b"\n", 0)

    def close(self) -> None:
        """Let the folder go. Closing twice is harmless."""
        if self._lock >= 0:
            for _, segment in self._sent:
                _delete(segment.path)
            os.close(self._state)
            os.close(self._lock)
            self._lock = self._state = -1

    def _forget(self, segment: Segment) -> None:
        with self._mutex:
            self._busy = None
            self._queue.remove(segment)
            self._bytes -= segment.size_bytes

    def _enforce_cap(self) -> None:
        dropped = samples = 0
        while self._bytes > self._cap_bytes and len(self._queue) > 1 + (self._busy is not None):
            segment = self._queue.pop(0 if self._busy is None else 1)
            with contextlib.suppress(OSError):
                segment.path.unlink(missing_ok=True)
            self._bytes -= segment.size_bytes
            dropped, samples = dropped + 1, samples + segment.samples
        if dropped:
            self.lost["spool_full"] += samples
            text = "%s: is over its cap of %d bytes: the %d oldest batches with %d samples are dropped"
            _log.error(text, self._folder, self._cap_bytes, dropped, samples)

    def _scan(self) -> list[Segment]:
        queue = []
        for path in sorted(self._folder.iterdir()):
            name = _NAME.fullmatch(path.name)
            if path.is_file() and not path.is_symlink() and name:
                queue.append(Segment(path, int(name[2]), path.stat().st_size, replayed=True))
            elif path.name.endswith(SUFFIX):
                self.corrupt += 1
                self._move_to_rejected(path)
                _log.error("%s: is no batch of ours: moved to %s", path, self._rejected)
        return queue

    def _move_to_rejected(self, path: Path) -> None:
        target, number = self._rejected / path.name, 1
        while target.exists() or target.is_symlink():
            number += 1
            target = self._rejected / f"{path.name}.{number}"
        with contextlib.suppress(FileNotFoundError):
            path.rename(target)
        for old in sorted(self._rejected.iterdir())[:-REJECTED_KEPT]:
            with contextlib.suppress(OSError):  # a folder somebody named like a batch
                old.unlink()

    def _count_unclean_end(self) -> None:
        page = os.pread(self._state, _STATE_BYTES, 0)
        if not page.strip():
            return  # a new spool
        try:
            state = json.loads(page)
            clean, at_risk, reason = bool(state["clean"]), int(state["at_risk"]), str(state["reason"])
        except (ValueError, TypeError, KeyError):
            _log.error("%s/state.json: is damaged: samples lost at the last end, if any, are not counted", self._folder)
            return
        if not clean:
            self.lost[reason if reason in {"killed", "disk_full"} else "killed"] += max(0, at_risk)
            text = "%s: the last process did not end cleanly (%s): at most %d samples are lost, and counted so"
            _log.error(text, self._folder, reason, at_risk)


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # a read-only disk must not hold up the queue
        _log.error("%s: was sent, but cannot be deleted: %s", path, error.strerror)


def _number(path: Path) -> int:
    name = _NAME.match(path.name)
    return int(name[1]) if name else 0


def _write(temporary: Path, path: Path, data: bytes) -> None:
    """Make the file appear whole or not at all, and be there after a power cut."""
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _lock(folder: Path) -> int:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise SpoolUnavailable(f"{folder}: cannot be used as a spool: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        text = f"{folder}: is the spool of another running process. Give each its own folder"
        raise SpoolUnavailable(text) from error
    return descriptor
