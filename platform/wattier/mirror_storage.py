"""Where the mirror of a run lies: a journal file that a killed writer cannot lock or spoil, or a database."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

GRACE_SECONDS = 5.0  # a writer holds the lock for a millisecond; one that seems to hold it for so long is dead
DATABASE_SECONDS = 10  # until a database that does not answer counts as unreachable
LONGEST_PAUSE_SECONDS = 0.1

optuna.logging.set_verbosity(optuna.logging.WARNING)
log = logging.getLogger(__name__)


class MirrorLock(JournalFileSymlinkLock):
    """Optuna's lock of a journal, which optuna-dashboard takes too, without its trap.

    Optuna follows the link to see whether its holder is alive. The link of a dashboard that was started with a relative
    path and killed leads nowhere, and Optuna then asks again and again, for ever, without a pause.
    """

    def __init__(self, path: Path, grace_seconds: float = GRACE_SECONDS) -> None:
        super().__init__(str(path))
        self._link, self._grace_seconds = Path(f"{path}.lock"), grace_seconds

    def acquire(self) -> bool:
        """Take the lock, from a dead holder if need be."""
        pause, seen, since = 0.001, None, time.monotonic()
        while True:
            try:
                self._link.symlink_to(self._lock_target_file)
            except FileExistsError:
                holder = self._holder()
                if holder != seen:
                    seen, since = holder, time.monotonic()
                elif holder is not None and time.monotonic() - since > self._grace_seconds:
                    self._link.unlink(missing_ok=True)
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            else:
                return True

    def _holder(self) -> tuple[int, int] | None:
        try:
            found = self._link.lstat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns


class MirrorJournal(JournalFileBackend):
    """Optuna's journal file, which need not survive a power cut, since it can be made again from the run directory.

    So nothing waits for the disk (Optuna does at each of the dozen lines of a trial), and a line that a killed writer
    tore is cut off before the next one is written; otherwise nobody could read on.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._mutex = path, MirrorLock(path)
        super().__init__(str(path), self._mutex)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write some operations whole."""
        lines = "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in logs)
        self._mutex.acquire()
        try:
            with self._path.open("r+b") as file:
                file.seek(_whole_bytes(self._path))
                file.truncate()
                file.write(lines.encode())
        finally:
            self._mutex.release()


def open_journal(path: Path) -> BaseStorage:
    """The journal of a mirror; one that is damaged is set aside, since all of it can be made again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        lock = MirrorLock(path)
        lock.acquire()
        try:
            os.truncate(path, _whole_bytes(path))
        finally:
            lock.release()
    try:
        return JournalStorage(MirrorJournal(path))
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001  (whatever is in the file, Optuna replays it)
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        log.warning("%s: is no journal of Optuna (%s). It is now %s, and made anew", path, error, aside.name)
        return JournalStorage(MirrorJournal(path))


def open_database(url: str) -> BaseStorage:
    """A database by its URL, with time limits, so that one that never answers is an error.

    Raises:
        Exception: whatever the database's library says; its text may hold the URL's password.
    """
    options: dict[str, Any] = {"pool_pre_ping": True}  # the server may have been restarted since
    if url.startswith("sqlite"):
        options["connect_args"] = {"timeout": DATABASE_SECONDS}
    else:
        options["connect_args"] = {"connect_timeout": DATABASE_SECONDS}
    return RDBStorage(url, engine_kwargs=options)


def let_go(storage: BaseStorage | None) -> None:
    """Close the connections of a database, in the thread that used it."""
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


def _whole_bytes(path: Path) -> int:
    """Size up to the last line that was ended."""
    size = path.stat().st_size
    with path.open("rb") as file:
        position = size
        while position > 0:
            begin = max(0, position - 65536)
            file.seek(begin)
            found = file.read(position - begin).rfind(b"\n")
            if found >= 0:
                return begin + found + 1
            position = begin
    return 0
