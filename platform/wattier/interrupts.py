"""Interrupts that are not lost.

A signal's handler runs wherever the main thread is. What it raises inside a ``__del__`` or the callback of a weak
reference goes to ``sys.unraisablehook`` and no further: Python prints it, and the command goes on.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

AGAIN_SECONDS = 0.02  # a finalizer is over by then; if not, once more


class Interrupted(KeyboardInterrupt):
    """Something other than Ctrl-C asks to stop: a signal, by its number. Passes whatever a KeyboardInterrupt passes."""

    def __init__(self, reason: str, number: int = signal.SIGTERM) -> None:
        super().__init__(reason)
        self.number = number


def interrupt(number: int, _frame: object) -> None:
    """A signal's handler that stops what runs, as Ctrl-C does."""
    raise Interrupted(signal.Signals(number).name, number)


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """For the length of a block an interrupt that Python would swallow comes again; not while the interpreter ends."""
    otherwise = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        error = unraisable.exc_value
        if isinstance(error, KeyboardInterrupt):
            _send_again(error.number if isinstance(error, Interrupted) else signal.SIGINT)
        else:
            otherwise(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = otherwise


def _send_again(number: int) -> None:
    timer = threading.Timer(AGAIN_SECONDS, _send, (number,))
    timer.daemon = True
    with contextlib.suppress(RuntimeError):  # the interpreter is on its way out, which is what was asked for
        timer.start()


def _send(number: int) -> None:
    main = threading.main_thread().ident
    if main is not None:
        is_heard = callable(signal.getsignal(number))  # who heard it may have given it back: then it would kill
        signal.pthread_kill(main, number if is_heard else signal.SIGINT)
