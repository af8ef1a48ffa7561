"""What is written down before a power limit is changed, so that it can be put back whoever dies: one small file a GPU.

A note says what the limit was, what it was set to, since which boot of the machine, and for which process. Beside it
lies a lock, held by the process that looks after the cap. Limits reset themselves when the machine starts: a note of
another boot says nothing about the present one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from wattier_telemetry.power_limit import PowerCapError

ENVIRONMENT_VARIABLE = "WATTIER_POWER_CAPS"
_MOST_BYTES = 2**14  # of one note
_MOST_PID = 2**31 - 1
_MOST_WATTS = 1e5
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_PROC = Path("/proc")


class Process(NamedTuple):
    """One process of this boot: a number that is given again, and when it began, in clock ticks after the boot."""

    pid: int
    started_ticks: int

    @classmethod
    def this(cls) -> Process:
        """Return the present process."""
        return cls(os.getpid(), started_ticks(os.getpid()) or 0)

    def is_alive(self) -> bool:
        """Whether it still runs."""
        return started_ticks(self.pid) == self.started_ticks


NOBODY = Process(0, 0)


@dataclass(frozen=True, slots=True)
class CapNote:
    """One cap.

    Attributes:
        uuid: The GPU.
        original_watts: Its limit before, W.
        cap_watts: Its limit from then on, W.
        boot_id: The boot of the machine.
        holder: The process for whose time the cap is meant.
    """

    uuid: str
    original_watts: float
    cap_watts: float
    boot_id: str
    holder: Process


def started_ticks(pid: int) -> int | None:
    """Return when a process began, in clock ticks after the boot; None if there is none, or only its remains."""
    try:
        # The name, in parentheses, may hold blanks and parentheses; state and figures follow the last one.
        words = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if words[0] in "ZX" else int(words[19])
    except (OSError, ValueError, IndexError):
        return None


def boot_id() -> str:
    """Return what the kernel calls the present boot.

    Raises:
        PowerCapError: If it does not tell, as outside Linux.
    """
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError as error:
        raise PowerCapError(f"the kernel does not tell its boot id ({error}), without which no cap is safe") from error


def notes_folder(*, make: bool) -> Path:
    """Return the folder of notes of this node: WATTIER_POWER_CAPS, or one of this user's.

    Args:
        make: Make it if it is not there.

    Raises:
        PowerCapError: If it cannot be made, or others may write there.
    """
    folder = _named_folder()
    if not make and not folder.exists():
        return folder
    advice = f"Set {ENVIRONMENT_VARIABLE} to a folder of yours on this node's own disk"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise PowerCapError(f"{folder}: cannot hold notes of power caps ({error.strerror}). {advice}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & _OTHERS_WRITE:
        raise PowerCapError(f"{folder}: is no folder that this user alone may write to. {advice}")
    return folder


def _named_folder() -> Path:
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(named)
    # Not the temporary directory, which batch systems give to each job and empty behind it.
    return Path("/run/wattier/power-caps") if os.geteuid() == 0 else Path(f"/var/tmp/wattier-power-caps-{os.geteuid()}")


def note_path(folder: Path, uuid: str) -> Path:
    """Return where the note of a GPU lies: no text of a UUID can lead out of the folder."""
    clean = re.sub(r"[^A-Za-z0-9_-]", "_", uuid)[:80]
    return folder / f"{clean}.{hashlib.sha256(uuid.encode()).hexdigest()[:8]}.json"


def write_note(folder: Path, note: CapNote) -> None:
    """Write a note whole or not at all; when this returns it is on the disk."""
    path = note_path(folder, note.uuid)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(note) | {"holder": note.holder._asdict()}, file, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(folder)
    except OSError as error:
        raise PowerCapError(f"{path}: cannot be written ({error.strerror}), so no limit is changed") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_note(folder: Path, uuid: str) -> None:
    """Remove a note; it is no error if it is gone."""
    note_path(folder, uuid).unlink(missing_ok=True)
    _sync_folder(folder)


def read_note(folder: Path, uuid: str) -> CapNote | None:
    """Return the note of a GPU, None if there is none.

    Raises:
        PowerCapError: If the file is no note of this GPU that this user wrote.
    """
    path = note_path(folder, uuid)
    try:
        note = _parsed(_read(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise PowerCapError(
            f"{path}: is no readable note of a power cap ({' '.join(str(error).split())[:200]}). Set the power limit "
            f"of {uuid} by hand (nvidia-smi --power-limit, amd-smi set --power-cap), then remove the file"
        ) from error
    if note.uuid != uuid:
        raise PowerCapError(f"{path}: is the note of another GPU ({note.uuid[:80]!r}). Remove the file")
    return note


def noted(folder: Path) -> list[Path]:
    """Return the files that look like notes."""
    return sorted(folder.glob("[!.]*.json"))


def _read(path: Path) -> Any:
    """Read a file that may be anybody's: a pipe is not waited for, a link not followed, nothing huge read."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            raise ValueError(f"no file, or larger than {_MOST_BYTES} bytes")
        if status.st_uid != os.geteuid() or status.st_mode & _OTHERS_WRITE:
            raise ValueError("others may have written it")
        return json.loads(file.read(_MOST_BYTES))


def _parsed(data: Any) -> CapNote:
    holder = Process(data["holder"]["pid"], data["holder"]["started_ticks"])
    note = CapNote(data["uuid"], data["original_watts"], data["cap_watts"], data["boot_id"], holder)
    figures = (note.original_watts, note.cap_watts)
    good = (
        isinstance(note.uuid, str)
        and isinstance(note.boot_id, str)
        and all(type(part) is int and part >= 0 for part in holder)
        and 0 < holder.pid <= _MOST_PID
        and all(type(watts) in (int, float) and math.isfinite(watts) and 0 < watts < _MOST_WATTS for watts in figures)
    )
    if not good:
        raise ValueError("a field is missing or has a wrong type or size")
    return note


@contextmanager
def locked(folder: Path, uuid: str, user: Process = NOBODY) -> Iterator[Process | None]:
    """Try to be the only one who sets a GPU's limit, which the system ends when this process dies.

    Args:
        folder: The folder of notes.
        uuid: The GPU.
        user: On whose behalf, which others are told; nobody's = for a moment only.

    Yields:
        None, or on whose behalf somebody else has it.
    """
    descriptor = os.open(
        note_path(folder, uuid).with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
    )
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            words = file.read(100).split()
            known = len(words) == 2 and all(word.isdigit() for word in words)
            yield Process(int(words[0]), int(words[1])) if known else NOBODY
            return
        file.truncate()
        file.write(f"{user.pid} {user.started_ticks}".encode())
        yield None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
