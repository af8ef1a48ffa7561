"""The process that looks after one cap: ``python -m wattier_telemetry.cap_keeper``, started by `PowerCap`.

It sets the limit, waits for the end of the process that asked for it (its holder), of whatever kind, and puts the
limit back. It is nobody's child, in a session of its own, so that what kills the holder, its children or its process
group leaves it alone; if it is killed as well, the note on the disk tells the next one. It alone has the lock, which
forked children of the holder would inherit.

On its standard input comes a request, one line of JSON, and later the word that the cap is over, or the end of the
file. It answers with lines of JSON: ``capped`` or ``error``, and in the end ``restoration`` or ``error``.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import syslog
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from wattier_telemetry.cap_note import CapNote, Process, boot_id, locked, notes_folder, read_note, write_note
from wattier_telemetry.cap_restore import Restoration, is_held, put_back, restore_stale
from wattier_telemetry.power_limit import PowerCapError, PowerLimiter, cap_of, is_same, label, open_limiter
from wattier_telemetry.records import Device
from wattier_telemetry.source import SourceUnavailable

_TRIES, _PAUSE_SECONDS = 3, 0.5  # of putting back
_WITHOUT_PIDFD_SECONDS = 0.2  # between two looks at the holder


def main() -> None:
    """Keep one cap."""
    if os.fork():  # who started this process waits for it; the keeper itself is to be nobody's child
        os._exit(0)
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        return  # the holder died before it could ask
    request = json.loads(line)
    holder = Process(request["pid"], request["started_ticks"])
    try:
        with _woken_by_signals() as wake, closing(open_limiter(whole_node=True)) as limiter:
            os.chdir("/")  # where it began may be removed under it
            _keep(limiter, request, holder, wake)
    except (PowerCapError, SourceUnavailable, OSError) as error:
        _tell({"error": str(error)})


def _keep(limiter: PowerLimiter, request: dict[str, Any], holder: Process, wake: socket.socket) -> None:
    folder, uuid = notes_folder(make=True), request["uuid"]
    device = next((device for device in limiter.devices() if device.uuid == uuid), None)
    if device is None:
        raise PowerCapError(f"{uuid}: there is no such GPU on this node")
    restore_stale(limiter, folder)
    with _the_lock(folder, device, holder, request["wait_seconds"]):
        if (left := read_note(folder, uuid)) is not None:
            put_back(limiter, device, left, folder)
        limits = limiter.limits(device)
        watts, before = cap_of(device, limits, request["ratio"]), limits.limit_watts
        if watts > before or is_same(watts, before):  # a cap never raises what somebody set lower
            _tell({"capped": {"watts": before, "before_watts": before}})
            reason = _wait(holder, wake)
            done = _unchanged(limiter, device, before)
        else:
            note = CapNote(uuid, before, watts, boot_id(), holder)
            write_note(folder, note)
            try:
                _cap(limiter, device, watts)
                _tell({"capped": {"watts": watts, "before_watts": before}})
                reason = _wait(holder, wake)
            finally:
                done = _put_back(limiter, device, note, folder)
        _tell({"restoration": list(done), "reason": reason})


def _unchanged(limiter: PowerLimiter, device: Device, before: float) -> Restoration:
    now = limiter.limits(device).limit_watts
    if is_same(now, before):
        return Restoration(device.uuid, "already back", f"{label(device)}: its power limit is {now:g} W, as it was")
    text = f"{label(device)}: somebody else set its power limit, from {before:g} W to {now:g} W"
    return Restoration(device.uuid, "changed by others", text)


def _cap(limiter: PowerLimiter, device: Device, watts: float) -> None:
    limiter.set_limit(device, watts)
    now = limiter.limits(device).limit_watts
    if not is_same(now, watts):
        raise PowerCapError(
            f"{label(device)}: the driver took a power limit of {watts:g} W, but still says {now:g} W; the limits of "
            "this GPU cannot be set, as in some virtual machines. Do without power caps"
        )


def _put_back(limiter: PowerLimiter, device: Device, note: CapNote, folder: Path) -> Restoration:
    """Put back, with patience; whoever asked may be dead, so that a failure goes to the node's log as well."""
    for tries_left in reversed(range(_TRIES)):
        try:
            done = put_back(limiter, device, note, folder)
            break
        except (PowerCapError, OSError) as error:
            if not tries_left:
                syslog.syslog(syslog.LOG_ERR, f"wattier: {error}")
                raise
            time.sleep(_PAUSE_SECONDS)
    if done.outcome == "changed by others":
        syslog.syslog(syslog.LOG_WARNING, f"wattier: {done.text}")
    return done


@contextmanager
def _the_lock(folder: Path, device: Device, holder: Process, wait_seconds: float) -> Iterator[None]:
    """Get the lock of a GPU that nobody has capped; who has may be about to end, or be cleaned up after.

    Raises:
        PowerCapError: If somebody still has it in the end.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        with locked(folder, device.uuid, holder) as other:
            user = other
            if user is None:
                note = read_note(folder, device.uuid)
                if note is None or note.holder == holder or not is_held(note):
                    yield
                    return
                user = note.holder  # its keeper was killed
        if time.monotonic() > deadline or not holder.is_alive():
            raise PowerCapError(_in_use(device, user))
        time.sleep(0.02)


def _in_use(device: Device, user: Process) -> str:
    who = f"process {user.pid}" if user.pid else "another process"
    return (
        f"{label(device)}: is capped by {who} already, and a power limit acts on all who share a GPU. Give each trial "
        "a whole one"
    )


def _wait(holder: Process, wake: socket.socket) -> str:
    """Wait until the cap is over; say why it is."""
    poll = select.poll()
    poll.register(sys.stdin.fileno(), select.POLLIN)
    poll.register(wake, select.POLLIN)
    pidfd = None
    with contextlib.suppress(OSError, AttributeError):  # gone already, or an old kernel
        pidfd = os.pidfd_open(holder.pid)
        poll.register(pidfd, select.POLLIN)
    while holder.is_alive():
        timeout_seconds = _WITHOUT_PIDFD_SECONDS if pidfd is None else 60.0
        ready = [descriptor for descriptor, _ in poll.poll(timeout_seconds * 1000)]
        if wake.fileno() in ready:
            return "a signal ended the keeper"
        if sys.stdin.fileno() in ready:
            return "released" if os.read(sys.stdin.fileno(), 100) else "the holder let go"
    return "the holder died"


@contextmanager
def _woken_by_signals() -> Iterator[socket.socket]:
    """Turn the polite signals into something to wait for; what is under way is not interrupted."""
    here, there = socket.socketpair()
    with here, there:
        there.setblocking(False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
        try:
            yield here
        finally:
            signal.set_wakeup_fd(-1)


def _tell(answer: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        os.write(sys.stdout.fileno(), json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
