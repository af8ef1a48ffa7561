"""The trials that live on this node, as their registration files and their processes say."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from wattier_telemetry.exporter.attribution import Key
from wattier_telemetry.exporter.metrics import label
from wattier_telemetry.registration import TrialRegistration, default_folder, is_alive, load_registration

MOST_PAIRS = 1000  # of a trial rank and a device: what bounds the number of series

_IN_CHANGES = 0x8 | 0x40 | 0x80 | 0x200  # inotify: closed after writing, moved from, moved to, deleted
_IN_IGNORED = 0x8000  # the folder is gone, and one made since may have its inode
_POLL_SECONDS, _EVENT_SECONDS = 0.1, 1.0  # between two looks at a folder that does not, or does, tell of changes

_log = logging.getLogger(__name__)


@dataclass
class _File:
    stamp: tuple[int, int, int]
    registration: TrialRegistration | None  # None = torn, or not ours
    process: int | None = None  # a descriptor that turns readable when the process ends


class Roster:
    """Watches the folder where trials register; safe to use from several threads.

    Args:
        folder: Where trials register. None = the default folder of this user.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._host = socket.gethostname()
        self._files: dict[str, _File] = {}
        self._ends = select.epoll() if hasattr(select, "epoll") else None  # each process is a descriptor in it
        self._lock = threading.Lock()
        self._events: int | None = None  # a descriptor that turns readable when the folder changes
        self._bell: int | None = None  # one that turns readable when nobody shall wait any more
        if self._ends is not None:
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._ends.register(self._bell, select.EPOLLIN)
        self._inode = self._changed_ns = -1
        self._unsure_until = 0.0
        self.living: dict[Key, TrialRegistration] = {}
        self.not_shown = self._left_out = 0
        self._complaint = ""

    def wait(self) -> None:
        """Return when a process has ended or the folder has changed, at the latest after a second."""
        if self._ends is not None:
            self._ends.poll(_POLL_SECONDS if self._events is None else _EVENT_SECONDS)
        else:
            time.sleep(_POLL_SECONDS)

    def interrupt(self) -> None:
        """Let `wait` return at once, now and from now on."""
        if self._bell is not None:
            os.eventfd_write(self._bell, 1)

    def refresh(self) -> dict[Key, TrialRegistration]:
        """Return who lives now."""
        with self._lock:
            ended = {descriptor for descriptor, _ in self._ends.poll(0)} if self._ends is not None else set()
            if self._events in ended and self._events is not None:
                with contextlib.suppress(OSError):
                    if _is_gone(os.read(self._events, 65536)):
                        self._inode = -1
            if (
                self._folder_changed()
                or ended - {self._bell}
                or any(self._unwatched(file) for file in self._files.values())
            ):
                self._scan(ended)
            return self.living

    def close(self) -> None:
        """Let the descriptors go."""
        with self._lock:
            for name in list(self._files):
                self._drop(name)
            self._listen(None)
            if self._ends is not None and self._bell is not None:
                self._ends.close()
                os.close(self._bell)
                self._ends = self._bell = None

    def _folder_changed(self) -> bool:
        """Whether the folder was touched since the last look, or so lately that its time stamp may not tell."""
        try:
            if self._folder is None:
                self._folder = default_folder()
            status = self._folder.stat()
        except OSError as error:
            if not isinstance(error, FileNotFoundError) and str(error) != self._complaint:
                self._complaint = str(error)
                _log.warning("no trials are seen: %s", error)
            self._listen(None)
            self._inode = self._changed_ns = -1
            return bool(self._files)
        if status.st_ino != self._inode:
            self._inode = status.st_ino
            self._listen(self._folder)
        changed = status.st_mtime_ns != self._changed_ns
        if changed:
            self._changed_ns, self._unsure_until = status.st_mtime_ns, time.monotonic() + 0.1
        return changed or time.monotonic() < self._unsure_until

    def _listen(self, folder: Path | None) -> None:
        """Let the kernel tell of changes in the folder, so that nobody has to look ten times a second."""
        if self._events is not None:
            os.close(self._events)
            self._events = None
        if self._ends is None or folder is None:
            return
        try:
            library = ctypes.CDLL(None)
            events = library.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, AttributeError):
            return
        if events >= 0 and library.inotify_add_watch(events, os.fsencode(folder), _IN_CHANGES) >= 0:
            self._ends.register(events, select.EPOLLIN)
            self._events = events
        elif events >= 0:
            os.close(events)

    def _scan(self, ended: set[int]) -> None:
        found: set[str] = set()
        entries = []
        with contextlib.suppress(OSError):
            if self._folder is not None:
                with os.scandir(self._folder) as scan:
                    entries = [entry for entry in scan if entry.name.endswith(".json") and entry.name[0] != "."]
        seen = self._left_out = 0
        for entry in sorted(entries, key=lambda entry: entry.name):
            if seen >= MOST_PAIRS:  # never to be shown, and each would take a file descriptor
                self._left_out += 1
                continue
            with contextlib.suppress(OSError):
                self._look_at(entry, ended)
                found.add(entry.name)
                seen += self._files[entry.name].registration is not None
        for name in self._files.keys() - found:
            self._drop(name)
        self._choose()

    def _look_at(self, entry: os.DirEntry[str], ended: set[int]) -> None:
        status = entry.stat()
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        file = self._files.get(entry.name)
        before = file.registration if file else None
        if file is None or file.stamp != stamp:
            registration = None
            with contextlib.suppress(ValueError, TypeError):
                registration = load_registration(Path(entry.path))
            if file is None or registration is None or before is None or before.pid != registration.pid:
                self._drop(entry.name)
                file = _File(stamp, registration, self._watch(registration))
            else:
                file = _File(stamp, registration, file.process)
            self._files[entry.name] = file
        if file.registration is None or not self._here(file.registration):
            return
        dead = file.process in ended if file.process is not None else None
        if dead is None or file.registration is not before:
            dead = dead or not is_alive(file.registration.pid, status.st_mtime)
        if dead:
            Path(entry.path).unlink(missing_ok=True)
            raise FileNotFoundError(entry.path)

    def _here(self, registration: TrialRegistration | None) -> bool:
        return registration is not None and registration.host == self._host

    def _unwatched(self, file: _File) -> bool:
        return file.process is None and self._here(file.registration)

    def _watch(self, registration: TrialRegistration | None) -> int | None:
        if registration is None or not self._here(registration) or self._ends is None:
            return None
        try:
            descriptor = os.pidfd_open(registration.pid)
        except (OSError, AttributeError):  # dead, or a kernel before 5.3
            return None
        self._ends.register(descriptor, select.EPOLLIN)
        return descriptor

    def _drop(self, name: str) -> None:
        file = self._files.pop(name, None)
        if file is not None and file.process is not None:
            if self._ends is not None:
                self._ends.unregister(file.process)
            os.close(file.process)

    def _choose(self) -> None:
        living: dict[Key, TrialRegistration] = {}
        pairs, not_shown = 0, self._left_out
        for name in sorted(self._files):
            trial = self._files[name].registration
            if trial is None:
                continue
            size = max(1, len(trial.device_uuids))
            key = (label(trial.run), label(trial.stage), label(trial.trial), label(trial.rank))
            if pairs + size > MOST_PAIRS or key in living:
                not_shown += 1
                continue
            pairs += size
            living[key] = trial
        if not_shown > self.not_shown:
            _log.warning("%s: %d registered trials are not shown: %d is the most", self._folder, not_shown, MOST_PAIRS)
        self.living, self.not_shown = living, not_shown


def _is_gone(events: bytes) -> bool:
    """Tell whether the kernel says that it watches the folder no longer."""
    at = 0
    while at + 16 <= len(events):
        _, mask, _, length = struct.unpack_from("iIII", events, at)
        if mask & _IN_IGNORED:
            return True
        at += 16 + length
    return False
