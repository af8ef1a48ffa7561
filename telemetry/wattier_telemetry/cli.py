# ruff: noqa: T201  (printing is what a command line is for)
"""The command ``wattier-telemetry``: doctor, read, serve."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from wattier_telemetry.doctor import diagnose
from wattier_telemetry.exporter import DEFAULT_PORT, serve
from wattier_telemetry.source import SourceUnavailable, open_source


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say it in one line; the usage text is what --help is for."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 it cannot be done as asked."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "doctor":
            return _doctor()
        if options.command == "read":
            return _read(options.source)
        return _serve(options.source, options.address, options.port, options.registry)
    except SourceUnavailable as error:
        sys.stderr.write(f"wattier-telemetry: {error}\n")
    except OSError as error:
        sys.stderr.write(f"wattier-telemetry: {options.command}: {error}\n")
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="wattier-telemetry", description="Measure the energy of GPUs and CPUs.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    commands.add_parser("doctor", help="say what can be measured on this machine")
    read = commands.add_parser("read", help="print one reading of every device as JSON")
    serving = commands.add_parser("serve", help="serve Prometheus metrics until stopped")
    for command in (read, serving):
        command.add_argument(
            "--source", default="auto", help="auto, nvml, amd, rapl, estimated or replay:<path> (default: auto)"
        )
    serving.add_argument("--address", default="127.0.0.1", help="where to listen (default: this machine alone)")
    serving.add_argument("--port", type=_port, default=DEFAULT_PORT, help=f"default: {DEFAULT_PORT}")
    serving.add_argument("--registry", type=Path, default=None, help="folder where trials register")
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"is '{text}', but must be a number from 0 to 65535")
    return int(text)


def _doctor() -> int:
    for finding in diagnose():
        print(f"{'ok ' if finding.works else '-- '} {finding.source:<10} {finding.measures}")
        if finding.what_to_do:
            print(f"               {finding.what_to_do}")
    return 0


def _read(name: str) -> int:
    source = open_source(name)
    try:
        devices = [{**asdict(device), "reading": asdict(source.read(device))} for device in source.devices()]
        print(json.dumps({"source": source.name, "devices": devices}, indent=2))
    finally:
        source.close()
    return 0


def _serve(name: str, address: str, port: int, registry: Path | None) -> int:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    source = open_source(name)
    try:
        exporter = serve(source, address, port, registry)
        print(f"serving {source.name} on http://{exporter.address}:{exporter.port}/metrics", flush=True)
        stop.wait()
        exporter.close()
    finally:
        source.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
