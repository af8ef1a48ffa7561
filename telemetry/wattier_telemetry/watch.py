"""A live table in the terminal: devices, and the trials that run on them."""

from __future__ import annotations

import contextlib
import select
import shutil
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from wattier_telemetry.account import Account
from wattier_telemetry.recording.card_text import figure, printable
from wattier_telemetry.recording.recorder import Owners
from wattier_telemetry.records import Device, Reading
from wattier_telemetry.registration import TrialRegistration
from wattier_telemetry.source import PowerSource

WIDTH = 80
_NAME = 20
_KEY_SECONDS = 0.05  # how late a key or a signal may be noticed
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _REST_OF_LINE, _REST = "\x1b[H", "\x1b[K", "\x1b[J"


class Watcher:
    """What the table shows; it reads when asked and knows nothing of terminals.

    Args:
        sources: What to read.
        registry: Where trials register. None = the default folder of this user.
        period_seconds: How often it will be asked, s.
    """

    def __init__(self, sources: Sequence[PowerSource], registry: Path | None, *, period_seconds: float) -> None:
        self._owners = Owners(registry)
        gap = max(1.0, 5 * period_seconds)
        self._rows = [
            (source, device, Account(device, device.method, longest_gap_seconds=gap))
            for source in sources
            for device in source.devices()
        ]
        self._began = time.monotonic()
        self._readings = 0

    def lines(self) -> list[str]:
        """Read every device once and return the table, no line longer than 80 columns."""
        names = ", ".join(dict.fromkeys(source.name for source, _, _ in self._rows))
        elapsed = time.monotonic() - self._began
        table = [f"wattier-telemetry watch: {names}; energy of the last {elapsed:.0f} s", ""]
        table.append(
            f"{'device':<{_NAME}} {'W':>7} {'J':>10} {'busy':>5} {'memory GiB':>13} {'°C':>4} {'MHz':>5} held back"
        )
        table += [self._row(*row) for row in self._rows]
        trials = self._owners.look()
        if trials:
            table += ["", f"{'trial':<38} {'rank':>4} {'epoch':>9} {'loss':>11} {'J':>13}"]
            table += [_trial(trial) for trial in trials]
        self._readings += 1
        return [printable(line)[:WIDTH].rstrip() for line in table]

    def _row(self, source: PowerSource, device: Device, account: Account) -> str:
        name = _shortened(f"{device.uuid} {device.name}" if device.name not in device.uuid else device.uuid)
        try:
            reading = source.read(device)
        except Exception as error:  # noqa: BLE001  (a broken device must not end the others' table)
            account.fail(error)
            return f"{name} does not answer: {' '.join(str(error).split())}"
        account.add(time.monotonic(), reading)
        watts = account.power_watts if reading.power_watts is None else reading.power_watts
        joules = account.joules if self._readings else None
        return " ".join(
            (
                name,
                _cell(watts, 7, "{:.1f}"),
                _cell(joules, 10, "{}", figure),
                _cell(reading.utilization_ratio, 5, "{:.0%}"),
                f"{_memory(reading):>13}",
                _cell(reading.temperature_celsius, 4, "{:.0f}"),
                _cell(None if reading.clock_hertz is None else reading.clock_hertz / 1e6, 5, "{:.0f}"),
                "-" if reading.throttle_reasons is None else ",".join(reading.throttle_reasons) or "no",
            )
        )


def _shortened(name: str) -> str:
    return f"{name[: _NAME - 1]}~" if len(name) > _NAME else f"{name:<{_NAME}}"


def _cell(value: float | None, width: int, form: str, convert: Callable[[float], object] = lambda v: v) -> str:
    return f"{'-' if value is None else form.format(convert(value)):>{width}}"


def _memory(reading: Reading) -> str:
    used, total = reading.memory_used_bytes, reading.memory_total_bytes
    if used is None and total is None:
        return "-"
    return "/".join("-" if value is None else f"{value / 2**30:.1f}" for value in (used, total))


def _trial(trial: TrialRegistration) -> str:
    name = f"{trial.run}/{trial.stage}/{trial.trial}"
    name = name if len(name) <= 38 else "~" + name[-37:]
    epoch = "-" if trial.epoch is None else f"{trial.epoch:g}" + ("" if trial.epochs is None else f"/{trial.epochs:g}")
    loss = "-" if trial.val_loss is None else f"{trial.val_loss:.5g}"
    joules = "-" if trial.energy_joules is None else figure(trial.energy_joules)
    return f"{name:<38} {trial.rank:>4} {epoch:>9} {loss:>11} {joules:>13}"


def watch(
    watcher: Watcher, *, period_seconds: float, stop: threading.Event, out: TextIO, keys: TextIO | None = None
) -> None:
    """Show the table each period until ``stop`` is set or q is typed.

    Redrawn in place on a terminal, which is left as it was found; otherwise one block after the other.
    """
    terminal = out.isatty()
    with _quiet_keys(keys) as typed, _screen(out, on=terminal):
        began = time.monotonic()
        while not stop.is_set():
            lines = watcher.lines()
            if terminal:
                height = max(2, shutil.get_terminal_size().lines)
                ending = ["", "q quits"] if len(lines) + 2 <= height else []
                shown = (lines + ending)[:height]
                out.write(_HOME + f"{_REST_OF_LINE}\n".join(shown) + _REST_OF_LINE + _REST)
            else:
                out.write("\n".join(lines) + "\n\n")
            out.flush()
            slot = int((time.monotonic() - began) / period_seconds) + 1
            if _wait(began + slot * period_seconds, stop, typed):
                return


def _wait(until: float, stop: threading.Event, typed: TextIO | None) -> bool:
    """Wait for a time; returns early, and True, if q was typed or a signal came."""
    while not stop.is_set() and (left := until - time.monotonic()) > 0:
        if typed is None:
            stop.wait(left)
        elif select.select([typed], [], [], min(left, _KEY_SECONDS))[0]:
            key = typed.buffer.raw.read(1) if hasattr(typed, "buffer") else typed.read(1)  # type: ignore[attr-defined]
            if key in (b"q", b"Q", b"\x03", "q", "Q"):
                return True
            if not key:  # the other end is gone
                typed = None
    return stop.is_set()


@contextlib.contextmanager
def _quiet_keys(keys: TextIO | None) -> Iterator[TextIO | None]:
    """Let single keys be read, without echo, and restore the terminal afterwards."""
    if keys is None or not keys.isatty():
        yield None
        return
    before = termios.tcgetattr(keys)
    tty.setcbreak(keys)
    try:
        yield keys
    finally:
        termios.tcsetattr(keys, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _screen(out: TextIO, *, on: bool) -> Iterator[None]:
    if not on:
        yield
        return
    out.write(_ENTER)
    try:
        yield
    finally:
        out.write(_LEAVE)
        out.flush()
