"""A model, not a measurement: CPU time of this process and its children, times the watts of a busy core.

It is what is left on a laptop or in a virtual machine without any counter, and every figure says ``estimated``.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass

import psutil

from wattier_telemetry.records import Device, Reading
from wattier_telemetry.source import PowerSource, SourceUnavailable

DEFAULT_RATED_WATTS = 10.0  # per core: servers and laptops lie between about 3 and 15 W a core at full load


@dataclass(frozen=True, slots=True)
class _Times:
    own_seconds: float
    reaped_seconds: float  # of children that ended and were waited for

    @property
    def total_seconds(self) -> float:
        return self.own_seconds + self.reaped_seconds


class EstimatedSource(PowerSource):
    """The CPU energy of one process tree, as cumulative CPU seconds times rated watts.

    An idle process is billed nothing, and memory and disks are left out: compare estimates only with estimates.

    Args:
        rated_watts: Watts of one busy core, W. None = 10 W.
        pid: Root of the process tree. None = this process.

    Raises:
        SourceUnavailable: If the watts are not positive or there is no such process.
    """

    name = "estimated"

    def __init__(self, *, rated_watts: float | None = None, pid: int | None = None) -> None:
        self.rated_watts = DEFAULT_RATED_WATTS if rated_watts is None else float(rated_watts)
        if not 0 < self.rated_watts < float("inf"):
            raise SourceUnavailable(f"rated_watts is {rated_watts}, but must be a positive number of watts per core")
        pid = os.getpid() if pid is None else pid
        try:
            self._root = psutil.Process(pid)
            started = int(self._root.create_time())
        except psutil.Error as error:
            raise SourceUnavailable(f"process {pid} cannot be watched: {error}") from error
        # Host, pid and start: two processes never collide, not even when the pid comes round again.
        uuid = f"{socket.gethostname()}:process-{pid}-{started}"
        self._device = Device(uuid, f"process {pid} at {self.rated_watts:g} W per core", "cpu", 0, method="estimated")
        self._lock = threading.Lock()
        self._processes = {self._root: _Times(0.0, 0.0)}
        self._cpu_seconds = 0.0
        self._next_scan = 0.0
        self._advance()
        self._cpu_seconds = 0.0  # what was burnt before now is not ours to bill

    def devices(self) -> tuple[Device, ...]:
        """Return the one device: this process tree."""
        return (self._device,)

    def read(self, device: Device) -> Reading:  # noqa: ARG002  (there is only one)
        """Return the energy estimated since the source was opened, J."""
        with self._lock:
            self._advance()
            return Reading(time_seconds=time.time(), energy_joules=self._cpu_seconds * self.rated_watts)

    def close(self) -> None:
        """Nothing is held open."""

    def _advance(self) -> None:
        """Add the CPU time burnt since the last call.

        A process that ended takes its seconds along; if its parent waited for it they come back as the parent's
        "reaped" seconds, otherwise they are lost. So reaped seconds count only above what was last seen of those that
        vanished, and the sum never falls.
        """
        before, now = self._processes, {}
        for process in {*before, *self._scan()}:
            times = _times(process)
            if times is not None:
                now[process] = times
        fresh = [times.total_seconds for process, times in now.items() if process not in before]
        own = [max(0.0, now[p].own_seconds - before[p].own_seconds) for p in now if p in before]
        reaped = sum(now[p].reaped_seconds - before[p].reaped_seconds for p in now if p in before)
        vanished = sum(times.total_seconds for process, times in before.items() if process not in now)
        self._cpu_seconds += sum(fresh) + sum(own) + max(0.0, reaped - vanished)
        self._processes = now

    def _scan(self) -> list[psutil.Process]:
        """Find children, at most one twentieth of the time: on a busy node it means reading thousands of files."""
        started = time.monotonic()
        if started < self._next_scan:
            return []
        try:
            return self._root.children(recursive=True)
        except psutil.Error:
            return []
        finally:
            ended = time.monotonic()
            self._next_scan = ended + 20 * (ended - started)


def _times(process: psutil.Process) -> _Times | None:
    try:
        if not process.is_running():  # the pid may already belong to somebody else
            return None
        times = process.cpu_times()
    except psutil.Error:
        return None
    return _Times(times.user + times.system, times.children_user + times.children_system)
