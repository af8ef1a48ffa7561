"""What can be measured on this machine, how well, and what to do where it cannot."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from wattier_telemetry.records import Device, Reading
from wattier_telemetry.source import AUTOMATIC_ORDER, ENVIRONMENT_VARIABLE, PowerSource, SourceUnavailable, open_source

SOURCES = (*AUTOMATIC_ORDER[:-1], "cray", AUTOMATIC_ORDER[-1])  # the estimate last: it is what is left
PROBE_SECONDS = 1.0  # for all sources together
_POLL_SECONDS = 0.002
_COMPARED_SECONDS = 0.5
_ADVICE = {
    "nvml": "On an NVIDIA machine: check that nvidia-smi works, and that CUDA_VISIBLE_DEVICES names whole GPUs.",
    "amd": "On an AMD machine: check that amd-smi works, and set ROCM_PATH to the ROCm installation.",
    "rapl": "Outside a virtual machine: `sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj` until next boot.",
    "cray": "On an HPE Cray EX node: mount /sys/cray/pm_counters into the container, if this is one.",
    "estimated": "Give a positive number of watts per core.",
}
_MASKS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")
_WHY_MISSING = {  # what a GPU may lack, and why
    "energy_joules": "energy counter (before NVIDIA Volta or AMD Vega 20 there is none): power is integrated instead",
    "power_watts": "power: the mean between two readings of the counter is shown",
    "utilization_ratio": "utilization (not under MIG or in some virtual GPUs)",
    "memory_total_bytes": "memory size",
    "temperature_celsius": "temperature (not in some virtual GPUs)",
    "memory_temperature_celsius": "memory temperature (only HBM models have the sensor)",
    "clock_hertz": "clock",
    "power_limit_watts": "power limit (not on some laptops and virtual GPUs)",
    "ecc_uncorrected": "ECC errors (ECC is off, or the model has none)",
    "throttle_reasons": "throttle reasons: throttled trials cannot be flagged",
    "throttle_seconds": "accumulated throttle time: it is sampled instead",
}


class Finding(NamedTuple):
    """What one source can do here.

    Attributes:
        source: Name for `open_source`.
        works: Whether it opened and at least one device answered.
        measures: What it measures, or why it does not work.
        what_to_do: Advice; empty where there is nothing to do.
        notes: How well it measures, and which figures are missing; one sentence each.
    """

    source: str
    works: bool
    measures: str
    what_to_do: str
    notes: tuple[str, ...] = ()


def diagnose(*, probe_seconds: float = PROBE_SECONDS) -> list[Finding]:
    """Try every source and say what it is worth; the first that works is what ``auto`` takes.

    Args:
        probe_seconds: How long the counters are watched, all at once, s; 0 = they are not.
    """
    opened: dict[str, PowerSource | str] = {}
    try:
        for name in SOURCES:
            try:
                opened[name] = open_source(name)
            except SourceUnavailable as reason:
                opened[name] = str(reason)
        probes = _watch([source for source in opened.values() if not isinstance(source, str)], probe_seconds)
        return [_finding(name, source, probes) for name, source in opened.items()]
    finally:
        for source in opened.values():
            if not isinstance(source, str):
                source.close()


@dataclass
class _Probe:
    """What a second of close looks at one device has shown."""

    device: Device
    first: Reading | None = None
    problem: str = ""
    readings: list[Reading] = field(default_factory=list)

    def look(self, source: PowerSource) -> None:
        try:
            if self.first is None:
                self.first = source.read(self.device)
            else:
                self.readings.append(source.read_energy(self.device))
        except Exception as error:  # noqa: BLE001  (a broken device must not hide the others)
            self.problem = " ".join(str(error).split())

    def notes(self) -> list[str]:
        """Return how often the counter moved, and how it compares with the power field."""
        counted = [(r.time_seconds, r.energy_joules) for r in self.readings if r.energy_joules is not None]
        if len(counted) < 3 or self.device.method == "estimated":
            return []
        ticks = [now for before, now in itertools.pairwise(counted) if now[1] != before[1]]
        watched = counted[-1][0] - counted[0][0]
        if len(ticks) < 2:
            return [f"{self.device.name}: its counter moved {len(ticks)} time(s) in {watched:.1f} s"]
        refresh = statistics.median(after[0] - before[0] for before, after in itertools.pairwise(ticks))
        poll = watched / (len(counted) - 1)
        bound = "at least every" if refresh < 1.5 * poll else "every"
        found = [f"{self.device.name}: its counter is refreshed {bound} {1000 * refresh:.0f} ms"]
        ratio = self._ratio(ticks[0][0], ticks[-1][0], ticks[-1][1] - ticks[0][1])
        if ratio is not None:
            averaged = self.device.power_average_seconds
            lag = f", which is averaged over {averaged:g} s" if averaged > 0 else ""
            found.append(f"{self.device.name}: the counter says {ratio:.3f} times what integrated power says{lag}")
        return found

    def _ratio(self, start: float, end: float, joules: float) -> float | None:
        """Return the counter over the integral of power between two refreshes, if that is long enough to tell."""
        sampled = [(r.time_seconds, r.power_watts) for r in self.readings if r.power_watts is not None]
        inside = [sample for sample in sampled if start <= sample[0] <= end]
        if end - start < _COMPARED_SECONDS or len(inside) < 5:
            return None
        mean = _mean_height(inside)
        return joules / (mean * (end - start)) if mean > 0 else None


def _mean_height(curve: list[tuple[float, float]]) -> float:
    """Return the mean height of a curve of straight lines."""
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(curve))
    return area / (curve[-1][0] - curve[0][0]) if curve[-1][0] > curve[0][0] else curve[0][1]


def _watch(sources: Iterable[PowerSource], seconds: float) -> dict[str, list[_Probe]]:
    """Read all devices in turns for a while; the estimate is a model and needs no watching."""
    pairs = [(source, _Probe(device)) for source in sources for device in source.devices()]
    for source, probe in pairs:
        probe.look(source)
    counters = [(source, probe) for source, probe in pairs if probe.first and probe.device.method != "estimated"]
    end = time.monotonic() + seconds
    while counters and time.monotonic() < end:
        for source, probe in counters:
            probe.look(source)
        time.sleep(_POLL_SECONDS)
    probes: dict[str, list[_Probe]] = {}
    for source, probe in pairs:
        probes.setdefault(source.name, []).append(probe)
    return probes


def _finding(name: str, source: PowerSource | str, probes: Mapping[str, list[_Probe]]) -> Finding:
    if isinstance(source, str):
        return Finding(name, False, source, _ADVICE[name])
    mine = probes.get(source.name, [])
    works, parts, notes = False, [], []
    for probe in mine:
        figures = _figures(probe)
        works = works or bool(figures)
        what = figures or probe.problem or "neither energy nor power"
        parts.append(
            f"{probe.device.name} [{probe.device.domain}]: {what}" if probe.first else f"{probe.device.name}: {what}"
        )
        notes += probe.notes()
    notes += _missing(mine)
    advice = "" if works else _ADVICE[name]
    if works and all(probe.device.method == "estimated" for probe in mine):
        advice = "A model, not a measurement: compare its joules only with other estimates."
    return Finding(name, works, "; ".join(parts), advice, tuple(dict.fromkeys(notes)))


def _figures(probe: _Probe) -> str:
    reading = probe.first
    if reading is None:
        return ""
    energy = f"energy ({probe.device.method})" if reading.energy_joules is not None else None
    power = "power" if reading.power_watts is not None else None
    return " and ".join(filter(None, (energy, power)))


def _missing(probes: list[_Probe]) -> list[str]:
    """Say which figures no GPU of a source gives; processors and memory have only energy anyway."""
    readings = [probe.first for probe in probes if probe.first is not None and probe.device.domain == "gpu"]
    if not readings or all(probe.device.uuid.partition(":")[2].startswith("cray-") for probe in probes):
        return []
    absent = [text for name, text in _WHY_MISSING.items() if all(getattr(r, name) is None for r in readings)]
    return [f"not given: {text}" for text in absent]


def remarks(root: Path = Path("/")) -> list[str]:
    """Say what about this node or this process limits every source.

    Args:
        root: Where the file system begins, replaceable for tests.
    """
    found = [
        f"{name} is '{os.environ[name]}': this process is billed for these GPUs alone; `serve`, `watch` and `record` "
        "look at the whole node"
        for name in _MASKS
        if name in os.environ
    ]
    if chosen := os.environ.get(ENVIRONMENT_VARIABLE):
        found.append(f"{ENVIRONMENT_VARIABLE} is '{chosen}': it stands in for auto")
    if " hypervisor" in _text(root / "proc/cpuinfo"):
        found.append("a virtual machine: its processor shows no energy counter (RAPL); measure on the host if you can")
    if (root / ".dockerenv").exists() or (root / "run/.containerenv").exists():
        found.append("a container: give it the devices, and /sys/class/powercap or /sys/cray, read-only")
    found += _closed_counters(root)
    return found


def _closed_counters(root: Path) -> list[str]:
    closed = [
        file
        for file in sorted((root / "sys/class/powercap").glob("intel-rapl:*/energy_uj"))
        if not os.access(file, os.R_OK)
    ]
    if not closed:
        return []
    return [
        f"{len(closed)} energy counter(s) such as {closed[0]} may be read only by root: `sudo chmod a+r` opens them"
    ]


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
