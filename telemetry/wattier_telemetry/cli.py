# ruff: noqa: T201  (printing is what a command line is for)
"""The command ``wattier-telemetry``: doctor, read, watch, record, report, serve, power-caps."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict

from wattier_telemetry.commands import make_parser
from wattier_telemetry.doctor import diagnose, remarks
from wattier_telemetry.exporter import ServeOptions, start
from wattier_telemetry.power_cap import cap_states, restore_caps
from wattier_telemetry.power_limit import Limits, PowerCapError
from wattier_telemetry.recording.card import make_card
from wattier_telemetry.recording.card_text import render, span
from wattier_telemetry.recording.recorder import Recording, TraceWriter, record
from wattier_telemetry.source import PowerSource, SourceUnavailable, open_node_sources, open_source
from wattier_telemetry.stopping import stop_on_signals
from wattier_telemetry.watch import Watcher, watch

_PROGRESS_SECONDS = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 it cannot be done as asked."""
    options = make_parser().parse_args(arguments)
    commands = {
        "doctor": _doctor,
        "read": _read,
        "watch": _watch,
        "record": _record,
        "report": _report,
        "serve": _serve,
        "power-caps": _power_caps,
    }
    try:
        return commands[options.command](options)
    except BrokenPipeError:  # `| head` has seen enough; nothing may be flushed into it at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (SourceUnavailable, PowerCapError) as error:
        message = str(error)
    except (ValueError, ImportError, OSError) as error:
        message = f"{options.command}: {error}"
    sys.stderr.write(f"wattier-telemetry: {' '.join(message.split())}\n")
    return 2


def _doctor(_: Namespace) -> int:
    for finding in diagnose():
        print(f"{'ok ' if finding.works else '-- '} {finding.source:<10} {finding.measures}")
        for line in (*finding.notes, finding.what_to_do):
            if line:
                print(f"               {line}")
    for remark in (*remarks(), *_left_caps()):
        print(f"note           {remark}")
    return 0


def _left_caps() -> list[str]:
    """Put back what dead processes left capped, and say so."""
    try:
        return [done.text for done in restore_caps() if done.outcome != "in use"]
    except PowerCapError as error:
        return [str(error)]


def _power_caps(options: Namespace) -> int:
    done = restore_caps() if options.restore else []
    for restoration in done:
        print(restoration.text)
    if options.restore:
        return 2 if any(restoration.outcome == "problem" for restoration in done) else 0
    for device, limits, remark in cap_states():
        print(f"{device.uuid}  {device.name}  {_limits(limits)}{remark}")
    return 0


def _limits(limits: Limits | None) -> str:
    if limits is None:
        return ""
    range_ = f"{limits.low_watts:g} to {limits.high_watts:g} W"
    return f"{limits.limit_watts:g} W (by itself {limits.default_watts:g} W, can be set from {range_})  "


def _read(options: Namespace) -> int:
    with closing(open_source(options.source)) as source:
        devices = [{**asdict(device), "reading": asdict(source.read(device))} for device in source.devices()]
    print(json.dumps({"source": source.name, "devices": devices}, indent=2))
    return 0


def _watch(options: Namespace) -> int:
    stop = stop_on_signals()
    with ExitStack() as stack:
        watcher = Watcher(_open(stack, options.source), options.registry, period_seconds=options.period)
        if options.once:
            watcher.lines()
            time.sleep(min(0.5, options.period))  # a bare counter shows its power at the second look
            print("\n".join(watcher.lines()))
            return 0
        watch(watcher, period_seconds=options.period, stop=stop, out=sys.stdout, keys=sys.stdin)
    return 0


def _record(options: Namespace) -> int:
    stop = stop_on_signals()
    with ExitStack() as stack:
        sources = _open(stack, options.source)
        if any(source.name == "estimated" for source in sources):
            sys.stderr.write("record: no counter here; the estimate knows only the processes of this command itself\n")
        writer = TraceWriter(options.output)
        try:
            with writer:
                state = record(
                    sources,
                    writer,
                    period_seconds=options.period,
                    duration_seconds=options.duration,
                    registry=options.registry,
                    stop=stop,
                    progress=_Progress(options.output.name),
                )
        except OSError as error:
            raise OSError(f"{error}; what was recorded is in {writer.growing}") from error
    for uuid, failures in state.failures.items():
        sys.stderr.write(f"record: {uuid}: {failures} readings failed, the last with: {state.reasons[uuid]}\n")
    print(f"{options.output}: {state.samples} samples in {span(state.seconds)}")
    return 0


class _Progress:
    """A line on the terminal that is rewritten each second; silent elsewhere."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._shown = 0.0

    def __call__(self, state: Recording) -> None:
        now = time.monotonic()
        if sys.stderr.isatty() and now - self._shown >= _PROGRESS_SECONDS:
            self._shown = now
            failed = sum(state.failures.values())
            line = f"{self._name}: {span(state.seconds)}, {state.samples} samples" + (
                f", {failed} failed" * bool(failed)
            )
            sys.stderr.write(f"\r{line[:78]}\x1b[K")
            sys.stderr.flush()


def _report(options: Namespace) -> int:
    card = make_card(options.file, grid_grams_co2_per_kwh=options.grid_intensity)
    if options.json:
        print(json.dumps(card.to_dict(), indent=2, allow_nan=False))
    else:
        sys.stdout.write(render(card))
    return 0


def _serve(options: Namespace) -> int:
    settings = ServeOptions(
        sources=options.source,
        address=options.address,
        port=options.port,
        registry=options.registry,
        period_seconds=options.period,
        allow=tuple(options.allow),
        token_file=options.token_file,
        tls_certificate=options.tls_certificate,
        tls_key=options.tls_key,
        names=options.names,
        push=options.push,
        push_format=options.push_format,
        spool=options.spool,
        flush_seconds=options.flush,
        discovery=options.discovery,
    )
    stop = stop_on_signals()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    running = start(settings)
    try:
        print(f"serving {options.source} on {running.url}", flush=True)
        stop.wait()
    finally:
        running.close()
    return 0


def _open(stack: ExitStack, names: str) -> list[PowerSource]:
    # A path may hold a comma, which parts names elsewhere.
    sources = [open_source(names)] if names.startswith("replay:") else open_node_sources(names)
    for source in sources:
        stack.callback(source.close)
    return sources


if __name__ == "__main__":
    sys.exit(main())
