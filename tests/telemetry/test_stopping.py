"""An event that signals set, however they come."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from wattier_telemetry.stopping import SignalEvent, stop_on_signals

# A handler that comes at the n-th line of what `wait` does, for every n.
HANDLERS = """
import sys
from wattier_telemetry.stopping import SignalEvent

for n in range(40):
    event, lines = SignalEvent(), []

    def trace(frame, what, _):
        if what == "line":
            lines.append(frame.f_code.co_name)
            if len(lines) == n + 1:
                event.set()
        return trace

    sys.settrace(trace)
    event.wait(0.01)
    sys.settrace(None)
    assert event.is_set() == (len(lines) > n)
print(len(lines))
"""


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_it_is_an_event():
    event = SignalEvent()
    assert not event.is_set()
    began = time.monotonic()
    assert not event.wait(0.05)
    assert time.monotonic() - began >= 0.05
    assert not event.wait(-1)
    event.set()
    event.set()
    assert event.is_set()
    assert event.wait()
    assert event.wait(1e9)
    with pytest.raises(RuntimeError, match="not cleared"):
        event.clear()


def test_all_who_wait_are_woken():
    event, woken = SignalEvent(), []
    threads = [threading.Thread(target=lambda: woken.append(event.wait(20)), daemon=True) for _ in range(5)]
    for thread in threads:
        thread.start()
    event.set()
    for thread in threads:
        thread.join(20)
    assert woken == [True] * 5


def test_it_may_be_waited_for_as_long_as_one_likes():
    event = SignalEvent()
    threading.Timer(0.1, event.set).start()
    assert event.wait(1e9)


def test_its_pipe_goes_with_it():
    before = descriptors()
    for _ in range(10):
        SignalEvent().set()
    assert descriptors() == before


def test_a_handler_that_comes_in_the_middle_of_a_wait_waits_for_nobody():
    done = subprocess.run([sys.executable, "-c", HANDLERS], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_set_it(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = stop_on_signals()
        os.kill(os.getpid(), number)
        assert stop.wait(20)
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
