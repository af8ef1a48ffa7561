"""An event that a signal's handler may set.

`threading.Event` holds a lock for a moment in `wait` and in `set`. A handler that comes in just that moment, in the
thread that holds it, and sets the event waits for itself for ever.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import weakref


class SignalEvent(threading.Event):
    """A `threading.Event` without a lock: a flag, and a pipe that is readable once it is set. It is never cleared."""

    def __init__(self) -> None:
        super().__init__()
        self._is_set = False
        self._read_end, self._write_end = os.pipe()
        weakref.finalize(self, _close, self._read_end, self._write_end).atexit = False  # a handler may still set it

    def is_set(self) -> bool:
        """Whether it was set."""
        return self._is_set

    def set(self) -> None:
        """Wake all who wait."""
        if not self._is_set:  # so the pipe holds a byte or two, and no write ever waits
            self._is_set = True
            os.write(self._write_end, b"\0")

    def clear(self) -> None:
        """Refuse: what was told to stop stays told."""
        raise RuntimeError("a SignalEvent is not cleared; make a new one")

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, or for `timeout` seconds; returns whether it is set."""
        if not self._is_set:
            select.select([self._read_end], [], [], None if timeout is None else max(0.0, timeout))
        return self._is_set


def stop_on_signals() -> SignalEvent:
    """An event that SIGINT and SIGTERM set from now on."""
    stop = SignalEvent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
