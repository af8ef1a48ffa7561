"""What can be measured on this machine, and what to do where it cannot."""

from __future__ import annotations

from typing import NamedTuple

from wattier_telemetry.source import AUTOMATIC_ORDER, PowerSource, SourceUnavailable, open_source

_ADVICE = {
    "nvml": "On an NVIDIA machine: check that nvidia-smi works, and that CUDA_VISIBLE_DEVICES names whole GPUs.",
    "amd": "On an AMD machine: check that amd-smi works, and set ROCM_PATH to the ROCm installation.",
    "rapl": "Outside a virtual machine: `sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj` until next boot.",
    "estimated": "Give a positive number of watts per core.",
}


class Finding(NamedTuple):
    """What one source can do here.

    Attributes:
        source: Name for `open_source`.
        works: Whether it opened and at least one device answered.
        measures: What it measures, or why it does not work.
        what_to_do: Advice; empty where there is nothing to do.
    """

    source: str
    works: bool
    measures: str
    what_to_do: str


def diagnose() -> list[Finding]:
    """Try every source and say what it is worth; the first that works is what ``auto`` takes."""
    return [_examine(name) for name in AUTOMATIC_ORDER]


def _examine(name: str) -> Finding:
    try:
        source = open_source(name)
    except SourceUnavailable as reason:
        return Finding(name, False, str(reason), _ADVICE[name])
    try:
        return _measure(source)
    finally:
        source.close()


def _measure(source: PowerSource) -> Finding:
    works, parts = False, []
    for device in source.devices():
        try:
            reading = source.read(device)
        except SourceUnavailable as reason:
            parts.append(f"{device.name}: {reason}")
            continue
        energy = f"energy ({device.method})" if reading.energy_joules is not None else None
        power = "power" if reading.power_watts is not None else None
        figures = " and ".join(filter(None, (energy, power)))
        works = works or bool(figures)
        parts.append(f"{device.name} [{device.domain}]: {figures or 'neither energy nor power'}")
    advice = "" if works else _ADVICE[source.name]
    if works and all(device.method == "estimated" for device in source.devices()):
        advice = "A model, not a measurement: compare its joules only with other estimates."
    return Finding(source.name, works, "; ".join(parts), advice)
