"""An interrupt that arrives while Python collects an object stops the command all the same."""

import os
import signal
import subprocess
import sys
import time

import pytest

from wattier import interrupts
from wattier.departure import NotFinishedError, leaving_in_time
from wattier.interrupts import Interrupted, interrupt, interrupts_kept
from wattier.rundir import RunDir
from wattier.walltime import Limit


@pytest.fixture(autouse=True)
def hook(monkeypatch):
    """The hook as it was before, which hears of what else is swallowed."""
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    yield heard
    assert [swallowed.exc_value for swallowed in heard if isinstance(swallowed.exc_value, KeyboardInterrupt)] == []


@pytest.fixture
def on_sigterm():
    """The handler of the command."""
    before = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, before)


class Finalized:
    """Does something while it is collected."""

    def __init__(self, what):
        self.what = what

    def __del__(self):
        self.what()


def collected(what):
    """An interrupt in a finalizer, and then a while in which it may come again."""
    Finalized(what)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_swallowed_interrupt_comes_again(on_sigterm, number):
    with pytest.raises(KeyboardInterrupt) as caught, interrupts_kept():
        collected(lambda: os.kill(os.getpid(), number))
    assert isinstance(caught.value, Interrupted) == (number == signal.SIGTERM)


def test_also_where_it_is_swallowed_twice(on_sigterm, monkeypatch):
    monkeypatch.setattr(interrupts, "AGAIN_SECONDS", 0.5)
    swallowed = []

    def swallow():
        os.kill(os.getpid(), signal.SIGTERM)
        swallowed.append("never reached")

    def for_long():
        swallowed.append(1)
        time.sleep(20)

    with pytest.raises(Interrupted, match="SIGTERM"), interrupts_kept():
        try:
            Finalized(swallow)
            collected(for_long)  # the second comes in here
        finally:
            assert swallowed == [1]


def test_the_end_of_the_walltime_is_not_lost_either(tmp_path):
    begun = time.monotonic()
    with (
        pytest.raises(NotFinishedError, match="walltime"),
        interrupts_kept(),
        leaving_in_time(RunDir(tmp_path), Limit(time.time() + 0.2, "x")),
    ):
        collected(lambda: time.sleep(1))
    assert time.monotonic() - begun < 15


def test_other_errors_go_where_they_went(hook):
    def fail():
        raise ValueError("x")

    with interrupts_kept():
        Finalized(fail)
    assert [type(swallowed.exc_value) for swallowed in hook] == [ValueError]
    hook.clear()


def test_one_that_nobody_hears_any_more_does_not_kill_the_process(tmp_path):
    """As at the end of a command that has listened to SIGUSR1."""
    with pytest.raises(KeyboardInterrupt), interrupts_kept():
        with leaving_in_time(RunDir(tmp_path), None):
            Finalized(lambda: os.kill(os.getpid(), signal.SIGUSR1))
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
        collected(lambda: None)


def test_the_end_of_the_interpreter_is_left_alone():
    code = """if True:
        import atexit, os, signal
        from wattier.interrupts import interrupts_kept
        for number in range(3):
            atexit.register(lambda number=number: print("cleaned", number, flush=True))
        atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
        with interrupts_kept():
            pass
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["cleaned", "2", "cleaned", "1", "cleaned", "0"]
    assert "KeyboardInterrupt" in done.stderr
