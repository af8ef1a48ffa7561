"""How the figures of a run came about: meters, devices, machines, versions, seeds."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import NamedTuple

from wattier.ledger import add_up, trial_bills
from wattier.power_trace import SUFFIX
from wattier.rundir import RunDir
from wattier_telemetry import EnergyReport, Share

PACKAGES = ("wattier", "torch", "ray", "optuna", "numpy", "plotly", "pydantic", "ase", "nvidia-ml-py")
MOST_TRACES = 2000  # whose first line is read for the names of devices
_CPU_INFO = Path("/proc/cpuinfo")


class MeterRow(NamedTuple):
    """All devices of one domain that were measured in one way: what they drew, and between which bounds that lies."""

    domain: str
    method: str
    attribution: str  # how a trial's part of a shared device is known
    devices: int
    joules: float | None
    joules_low: float | None
    joules_high: float | None
    coverage_ratio: float


class DeviceRow(NamedTuple):
    """Devices of one name."""

    name: str
    domain: str
    devices: int


class ProvenanceInfo(NamedTuple):
    """Everything that a reader needs to judge or to repeat a run. Versions are of the machine that wrote the report."""

    meters: tuple[MeterRow, ...]
    devices: tuple[DeviceRow, ...]
    device_uuids: int
    seed: int
    machine: dict[str, str]
    versions: dict[str, str]


def provenance_info(run: RunDir) -> ProvenanceInfo:
    """Read from the bills of all trials, and from this machine."""
    report = add_up(trial_bills(run).values())
    groups: dict[tuple[str, str, str], list[Share]] = {}
    for share in report.shares:
        groups.setdefault((share.domain, share.method, share.attribution), []).append(share)
    return ProvenanceInfo(
        meters=tuple(_meter(key, shares) for key, shares in sorted(groups.items())),
        devices=_devices(run),
        device_uuids=len({share.device_uuid for share in report.shares}),
        seed=run.config().seed,
        machine=_machine(),
        versions=_versions(),
    )


def _meter(key: tuple[str, str, str], shares: list[Share]) -> MeterRow:
    report = EnergyReport.of(shares)
    uuids = len({share.device_uuid for share in shares})
    return MeterRow(*key, uuids, report.joules, *report.stated_bounds_joules, coverage_ratio=report.coverage_ratio)


def _devices(run: RunDir) -> tuple[DeviceRow, ...]:
    """Names as the traces of trials tell them; a process whose CPU time was counted is named by what it was billed."""
    found: dict[str, tuple[str, str]] = {}
    for path in sorted((run.path / "trials").glob(f"*/*/*{SUFFIX}"))[:MOST_TRACES]:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            for row in csv.DictReader(file):
                if not row.get("name"):
                    break
                name = str(row["name"])
                if name.startswith("process "):  # one a trial: what it was billed at is what they share
                    name = f"CPU time{name[name.find(' at') :]}" if " at" in name else "CPU time"
                found[str(row["device"])] = (name[:80], str(row["domain"]))
    kinds = list(found.values())
    return tuple(DeviceRow(name, domain, kinds.count((name, domain))) for name, domain in sorted(set(kinds)))


def _machine() -> dict[str, str]:
    machine = {"host": platform.node(), "system": platform.platform(), "cores": str(os.cpu_count() or "unknown")}
    try:
        lines = [line for line in _CPU_INFO.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        machine |= {"CPU": lines[0].partition(":")[2].strip()} if lines else {}
    except OSError:
        pass
    return machine


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
