"""Putting a power limit back: by whoever holds its lock, from its note, and only where it is still ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, NamedTuple

from wattier_telemetry.cap_note import CapNote, boot_id, locked, note_path, noted, read_note, remove_note
from wattier_telemetry.power_limit import PowerCapError, PowerLimiter, is_same, label
from wattier_telemetry.records import Device

Outcome = Literal["restored", "already back", "changed by others", "another boot", "in use", "problem"]


class Restoration(NamedTuple):
    """What became of a note, and one sentence about it."""

    uuid: str
    outcome: Outcome
    text: str


def put_back(limiter: PowerLimiter, device: Device, note: CapNote, folder: Path) -> Restoration:
    """Restore what a note says, look whether it came true, and remove the note; for who holds the lock.

    A limit that is neither the cap nor the original is somebody else's doing, and is left as it is.

    Raises:
        PowerCapError: If the limit is not back; the note stays.
    """
    if note.boot_id != boot_id():
        remove_note(folder, note.uuid)
        return Restoration(note.uuid, "another boot", f"{label(device)}: the machine has started anew since its cap")
    result = _put_back(limiter, device, note)
    remove_note(folder, note.uuid)
    return result


def _put_back(limiter: PowerLimiter, device: Device, note: CapNote) -> Restoration:
    name, now, original = label(device), limiter.limits(device).limit_watts, note.original_watts
    if is_same(now, original):
        return Restoration(note.uuid, "already back", f"{name}: its power limit is {original:g} W already")
    if not is_same(now, note.cap_watts):
        text = f"{name}: somebody else set its power limit, to {now:g} W, after it was capped at {note.cap_watts:g} W"
        return Restoration(note.uuid, "changed by others", f"{text}; it is left so (before the cap: {original:g} W)")
    limiter.set_limit(device, original)
    now = limiter.limits(device).limit_watts
    if not is_same(now, original):
        raise PowerCapError(
            f"{name}: the driver took its power limit of {original:g} W back, but still says {now:g} W. Set it by hand"
        )
    return Restoration(note.uuid, "restored", f"{name}: its power limit is {original:g} W again")


def restore_stale(limiter: PowerLimiter, folder: Path) -> list[Restoration]:
    """Put back what the dead left behind: caps whose process is gone, and whose lock is free.

    Notes of GPUs that the limiter does not see are left to those who see them.
    """
    devices = {note_path(folder, device.uuid): device for device in limiter.devices()}
    found = []
    for path in noted(folder):
        if (device := devices.get(path)) is not None and (done := _restore_one(limiter, device, folder)) is not None:
            found.append(done)
    return found


def _restore_one(limiter: PowerLimiter, device: Device, folder: Path) -> Restoration | None:
    try:
        with locked(folder, device.uuid) as user:
            if user is not None:
                who = f"process {user.pid}" if user.pid else "another process"
                return Restoration(device.uuid, "in use", f"{label(device)}: is capped by {who}")
            note = read_note(folder, device.uuid)
            if note is None:
                return None
            if is_held(note):
                text = f"{label(device)}: is capped by process {note.holder.pid}, and nobody looks after it"
                return Restoration(device.uuid, "in use", text)
            return put_back(limiter, device, note, folder)
    except (PowerCapError, OSError) as error:
        return Restoration(device.uuid, "problem", str(error))


def is_held(note: CapNote) -> bool:
    """Whether the process that a cap is meant for, other than this one, still runs."""
    return note.holder.pid != os.getpid() and note.boot_id == boot_id() and note.holder.is_alive()
