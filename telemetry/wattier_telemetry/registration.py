"""How a running trial tells the node's exporter that it exists: one small file, rewritten whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import socket
import stat
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import psutil

from wattier_telemetry.records import METHODS, Method

ENVIRONMENT_VARIABLE = "WATTIER_REGISTRY"
MOST_BYTES = 2**20  # of one registration
_MOST_PID = 2**31 - 1


@dataclass(frozen=True, slots=True)
class TrialRegistration:
    """One rank of a running trial, as it wants to be seen.

    Attributes:
        run: Name of the run.
        stage: Name of the stage.
        trial: Id of the trial.
        rank: Rank inside the trial.
        pid: Process on this host; the registration dies with it.
        device_uuids: Devices it uses.
        fraction: Part of each device it owns.
        epoch: Epochs finished.
        epochs: Epochs planned.
        val_loss: Latest validation loss.
        structures_per_second: Training speed, 1/s.
        energy_joules: Energy so far, J.
        method: How that energy is known.
        host: Where the pid lives.
    """

    run: str
    stage: str
    trial: str
    rank: int
    pid: int
    device_uuids: tuple[str, ...] = ()
    fraction: float = 1.0
    epoch: int | None = None
    epochs: int | None = None
    val_loss: float | None = None
    structures_per_second: float | None = None
    energy_joules: float | None = None
    method: Method | None = None
    host: str = field(default_factory=socket.gethostname)

    def path(self, folder: Path | None = None) -> Path:
        """Return the file of this rank; names that need cleaning get a digest, so that no two ranks share a file."""
        parts = [self.run, self.stage, self.trial, str(self.rank)]
        clean = ".".join(re.sub(r"[^A-Za-z0-9_-]", "_", part)[:60] for part in parts)
        if clean != ".".join(parts) or any("." in part for part in parts):
            clean += "." + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
        return (default_folder() if folder is None else folder) / f"{clean}.json"

    def write(self, folder: Path | None = None) -> Path:
        """Put the registration in place of the one before, atomically."""
        path = self.path(folder)
        # A diverged loss is NaN, which JSON does not have; and a live panel is no reason to stop a trial.
        data = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}
        replace_file(path, json.dumps(data, allow_nan=False))
        return path

    def withdraw(self, folder: Path | None = None) -> None:
        """Remove the registration; it is no error if it is gone."""
        self.path(folder).unlink(missing_ok=True)


def default_folder() -> Path:
    """Return WATTIER_REGISTRY, or a folder of this user alone on this node, made if missing.

    Raises:
        PermissionError: If somebody else owns the folder in the shared temporary directory.
    """
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(named)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        folder = Path(runtime) / "wattier"
    else:
        folder = Path(tempfile.gettempdir()) / f"wattier-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else; set {ENVIRONMENT_VARIABLE} to a folder of yours")
    folder.chmod(0o700)
    return folder


def read_registrations(folder: Path | None = None) -> list[TrialRegistration]:
    """Return the living trials of a folder; torn files are passed over, files of dead processes here are removed."""
    folder = default_folder() if folder is None else folder
    found = []
    for path in sorted(folder.glob("[!.]*.json")):
        try:
            registration = load_registration(path)
            written_seconds = path.stat().st_mtime
        except (OSError, ValueError, TypeError):
            continue
        if registration.host == socket.gethostname() and not is_alive(registration.pid, written_seconds):
            with contextlib.suppress(OSError):
                path.unlink()
            continue
        found.append(registration)
    return found


def load_registration(path: Path) -> TrialRegistration:
    """Read one file, which may be anybody's.

    Raises:
        OSError: If it cannot be read.
        TypeError, ValueError: If it is no registration.
    """
    try:
        return parse_registration(json.loads(read_small_file(path)))
    except (RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: is no registration") from error


def read_small_file(path: Path) -> bytes:
    """Read a file that may be anybody's: a pipe is not waited for, a link not followed, nothing huge read.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no file, or huge.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
            raise ValueError(f"{path}: is no file, or larger than {MOST_BYTES} bytes")
        return file.read(MOST_BYTES)


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def is_alive(pid: int, written_seconds: float) -> bool:
    """Whether the process that wrote a file at this time, in seconds since 1970, still runs."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        # A process younger than the file has inherited the pid of the one that wrote it (2 s for clock rounding).
        return process.create_time() <= written_seconds + 2
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def parse_registration(data: Any) -> TrialRegistration:
    """Check what the exporter will rely on; a file by another version of Wattier may hold more.

    Raises:
        TypeError, ValueError: If a field is missing or has a wrong type.
    """
    if not isinstance(data, dict):
        raise TypeError("a registration is a JSON object")
    known = {f.name for f in fields(TrialRegistration)}
    registration = TrialRegistration(**{key: value for key, value in data.items() if key in known})
    texts = (registration.run, registration.stage, registration.trial, registration.host)
    counts = (registration.rank, registration.pid)
    measures = ("fraction", "epoch", "epochs", "val_loss", "structures_per_second", "energy_joules")
    good = (
        all(isinstance(text, str) for text in texts)
        and all(isinstance(count, int) for count in counts)
        and 0 < registration.pid <= _MOST_PID
        and isinstance(registration.device_uuids, list)
        and all(isinstance(getattr(registration, name), int | float | None) for name in measures)
        and all(math.isfinite(getattr(registration, name) or 0) for name in measures)
        and 0 < registration.fraction <= 1
        and registration.method in (None, *METHODS)
    )
    if not good:
        raise ValueError("a field of the registration has the wrong type")
    uuids = tuple(str(uuid) for uuid in registration.device_uuids)
    return TrialRegistration(**{**{name: getattr(registration, name) for name in known}, "device_uuids": uuids})
