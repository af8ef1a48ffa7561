"""What can be typed after ``wattier-telemetry``: the commands, their options, and an example of each."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from wattier_telemetry.exporter import DEFAULT_PORT, ServeOptions

_SOURCE = "auto, nvml, amd, rapl, cray, estimated or replay:<path of a CSV or Parquet file> (default: auto)"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say it in one line; the usage text is what --help is for."""
        self.exit(2, f"{self.prog}: {message}\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(
        prog="wattier-telemetry",
        description="Measure the energy of GPUs and CPUs, per device and per trial.",
        epilog="Start with: wattier-telemetry doctor",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for add in (_doctor, _read, _watch, _record, _report, _serve, _power_caps):
        add(commands)
    return parser


def _command(commands: argparse._SubParsersAction[_Parser], name: str, summary: str, *example: str) -> _Parser:
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog="example:\n" + "\n".join(f"  {line}" for line in example),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _doctor(commands: argparse._SubParsersAction[_Parser]) -> None:
    _command(
        commands,
        "doctor",
        "say what can be measured on this machine, how well, and how to enable the rest",
        "wattier-telemetry doctor        # takes about a second",
    )


def _read(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _command(
        commands,
        "read",
        "print one reading of every device as JSON",
        "wattier-telemetry read --source nvml | jq '.devices[].reading.power_watts'",
    )
    parser.add_argument("--source", default="auto", help=_SOURCE)


def _watch(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _command(
        commands,
        "watch",
        "show a live table of devices and running trials; q ends it",
        "wattier-telemetry watch --period 0.5",
        "wattier-telemetry watch --once >> snapshot.txt",
    )
    _node(parser)
    parser.add_argument("--period", type=_period, default=1.0, metavar="SECONDS", help="between two looks (default: 1)")
    parser.add_argument("--once", action="store_true", help="print the table once and end")


def _record(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _command(
        commands,
        "record",
        "write every reading, and which trials ran, into a CSV or Parquet file",
        "wattier-telemetry record --output night.parquet --period 0.1 --duration 28800",
        "wattier-telemetry report night.parquet",
    )
    _node(parser)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="file to make, named .csv or .parquet"
    )
    parser.add_argument(
        "--period", type=_period, default=1.0, metavar="SECONDS", help="between two readings, 0.01 and up (default: 1)"
    )
    parser.add_argument(
        "--duration", type=_positive, default=math.inf, metavar="SECONDS", help="default: until Ctrl-C or SIGTERM"
    )


def _report(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _command(
        commands,
        "report",
        "print the energy card of a recording: per trial, per device and for the whole job",
        "wattier-telemetry report night.parquet --grid-intensity 380",
        "wattier-telemetry report night.parquet --json | jq '.trials[] | {trial, joules: .bill.joules}'",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="what `record` wrote")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--grid-intensity",
        type=_not_negative,
        metavar="GCO2_PER_KWH",
        help="carbon intensity of the electricity, g/kWh: adds grams of CO2",
    )


def _serve(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _command(
        commands,
        "serve",
        "serve Prometheus metrics until stopped, and push them where asked",
        "wattier-telemetry serve --address 0.0.0.0 --allow 10.1.0.0/16 --token-file /etc/wattier/token",
        "wattier-telemetry serve --period 0.1 --push http://db:8428 --push-format victoriametrics",
    )
    default = ServeOptions()
    _node(parser)
    parser.add_argument("--address", default=default.address, help="where to listen (default: this machine alone)")
    parser.add_argument("--port", type=_port, default=DEFAULT_PORT, help=f"0 = any free one (default: {DEFAULT_PORT})")
    parser.add_argument(
        "--period",
        type=_period,
        default=default.period_seconds,
        metavar="SECONDS",
        help=f"between two samples, 0.01 and up (default: {default.period_seconds:g})",
    )
    parser.add_argument(
        "--names", choices=("wattier", "omnistat"), default=default.names, help="omnistat adds the series of Omnistat"
    )
    parser.add_argument("--discovery", type=Path, metavar="FILE", help="JSON file in which Prometheus finds this node")
    guard = parser.add_argument_group("who may scrape")
    guard.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="CIDR",
        help="network that may ask, again for each (10.1.0.0/16)",
    )
    guard.add_argument("--token-file", type=Path, metavar="FILE", help="ask for the bearer token in this file")
    guard.add_argument("--tls-certificate", type=Path, metavar="FILE", help="PEM; serves HTTPS, needs --tls-key")
    guard.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM, private key of the certificate")
    push = parser.add_argument_group("pushing")
    push.add_argument("--push", metavar="URL", help="server that takes the samples")
    push.add_argument(
        "--push-format",
        choices=("remote-write", "victoriametrics"),
        default=default.push_format,
        help=f"default: {default.push_format}",
    )
    push.add_argument("--spool", type=Path, metavar="DIR", help="keep samples here until the server has them")
    push.add_argument(
        "--flush",
        type=_positive,
        default=default.flush_seconds,
        metavar="SECONDS",
        help=f"what a kill may cost (default: {default.flush_seconds:g})",
    )


def _power_caps(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _command(
        commands,
        "power-caps",
        "show the power limit of every GPU of this node, and who has capped it",
        "wattier-telemetry power-caps",
        "wattier-telemetry power-caps --restore   # also fit for the epilog of a batch system",
    )
    parser.add_argument(
        "--restore", action="store_true", help="put back the limits of GPUs that dead processes left capped"
    )


def _node(parser: _Parser) -> None:
    parser.add_argument("--source", default="auto", help=f"{_SOURCE}; several are separated by commas")
    parser.add_argument("--registry", type=Path, default=None, metavar="DIR", help="folder where trials register")


def _number(text: str, allowed: Callable[[float], bool], wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not allowed(value):
        raise argparse.ArgumentTypeError(f"is '{text}', but must be {wanted}")
    return value


def _period(text: str) -> float:
    return _number(text, lambda value: value >= 0.01, "a number of seconds, 0.01 or more")


def _positive(text: str) -> float:
    return _number(text, lambda value: value > 0, "a number of seconds above 0")


def _not_negative(text: str) -> float:
    return _number(text, lambda value: value >= 0, "grams per kWh, 0 or more")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"is '{text}', but must be a number from 0 to 65535")
    return int(text)
