"""The joules of the sampler, kept in one file, so that an exporter that is killed and started again goes on billing."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wattier_telemetry.exporter.attribution import Ledger, Split
from wattier_telemetry.exporter.watched import Watched

_log = logging.getLogger(__name__)
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class SamplerState:
    """``sampler.json`` in a folder that one exporter at a time may use.

    Args:
        folder: Where to keep it; made if missing.
        flush_seconds: How often it is written, s.

    Raises:
        OSError: If the folder cannot be used, or another exporter uses it.
    """

    def __init__(self, folder: Path, *, flush_seconds: float = 5.0) -> None:
        self.flush_seconds = flush_seconds
        self.errors = 0
        self._path = folder / "sampler.json"
        self._written: dict[str, Any] | None = None
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = os.open(folder / "sampler.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise OSError(f"{folder} is in use by another exporter; give this one a folder of its own") from error

    def restore(self, watches: Iterable[Watched]) -> None:
        """Go on with the books as they were left; what the counter says since then is billed at the first reading."""
        try:
            data = json.loads(self._path.read_bytes())
            devices = data["devices"]
            same_boot = data["boot"] == _boot()
            for watched in watches:
                saved = devices.get(watched.device.uuid)
                if saved is None or not watched.billed:
                    continue
                watched.ledger = Ledger.from_dict(saved)
                if same_boot and saved["counter"] is not None:  # a counter starts anew with the driver
                    watched.saved_counter, watched.saved_split = _last_words(saved)
        except FileNotFoundError:
            return
        except (OSError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            _log.warning("%s cannot be read, so joules start at zero: %r", self._path, error)

    def snapshot(self, watches: Iterable[Watched]) -> dict[str, Any]:
        """Return what to write; cheap, for the sampler waits for it."""
        return {
            "boot": _boot(),
            "devices": {watched.device.uuid: _books(watched) for watched in watches if watched.billed},
        }

    def write(self, data: dict[str, Any]) -> None:
        """Replace the file; a disk that is full is logged once and counted."""
        if data == self._written:
            return
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(data, file, allow_nan=False)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        except OSError as error:
            self.errors += 1
            if self._written is not None or self.errors == 1:
                _log.warning("%s cannot be written, so a restart would lose joules: %s", self._path, error)
            self._written = None
            return
        self._written = data

    def close(self) -> None:
        """Let another exporter use the folder."""
        with contextlib.suppress(OSError):
            os.close(self._lock)


def _last_words(saved: dict[str, Any]) -> tuple[float, Split]:
    """Return the counter as it stood, and whom its device was billed to."""
    counter = float(saved["counter"])
    weights = {(row[0], row[1], row[2], row[3]): float(row[4]) for row in saved["weights"]}
    if not (math.isfinite(counter) and all(0 <= weight <= 1 for weight in weights.values())):
        raise ValueError("the counter or a weight cannot be")
    return counter, Split(weights, "equal")


def _books(watched: Watched) -> dict[str, Any]:
    counter = watched.saved_counter if watched.reading is None else watched.reading.energy_joules
    split = watched.saved_split if watched.reading is None else watched.latest
    weights = [[*key, weight] for key, weight in split.weights.items()]
    return {**watched.ledger.to_dict(), "counter": counter, "weights": weights}


def _boot() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""
