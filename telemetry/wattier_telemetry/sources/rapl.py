"""CPU packages and memory, through the kernel's powercap files (Intel, and AMD since Linux 5.8).

The files count microjoules and wrap around. Since CVE-2020-8694 only root may read them on most machines.
"""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from wattier_telemetry.records import Device, Domain, Reading
from wattier_telemetry.source import PowerSource, SourceUnavailable

POWERCAP = Path("/sys/class/powercap")
_REFRESH_SECONDS = 0.001  # the processor updates its counter about every millisecond


@dataclass
class _Zone:
    device: Device
    file: Path
    range_microjoules: int
    last_microjoules: int = 0
    wrapped_microjoules: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class RaplSource(PowerSource):
    """The CPU packages and their memory; the whole machine, whoever uses it.

    Args:
        root: The powercap folder, replaceable for tests.

    Raises:
        SourceUnavailable: If there is no such counter, or it may not be read.
    """

    name = "rapl"

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones = {zone.device.uuid: zone for zone in _zones(root)}
        if not self._zones:
            raise SourceUnavailable(f"{root} holds no RAPL package (a virtual machine, or the kernel lacks it)")

    def devices(self) -> tuple[Device, ...]:
        """Return the packages and their memory in the kernel's order."""
        return tuple(zone.device for zone in self._zones.values())

    def read(self, device: Device) -> Reading:
        """Read the counter, unwrapped: it only grows. At full power it wraps every few minutes, so read more often."""
        zone = self._zones[device.uuid]
        with zone.lock:  # two threads that both see the wrap would count it twice
            now = _microjoules(zone.file)
            if now < zone.last_microjoules:
                zone.wrapped_microjoules += zone.range_microjoules
            zone.last_microjoules = now
            total = now + zone.wrapped_microjoules
        return Reading(time_seconds=time.time(), energy_joules=total / 1e6)

    def close(self) -> None:
        """Nothing is held open."""


def _zones(root: Path) -> list[_Zone]:
    """Return packages and their memory; psys holds the packages, core and uncore are held by them.

    Only ``intel-rapl:`` zones: ``intel-rapl-mmio:`` is a second door to the same package counter.
    """
    host = socket.gethostname()
    zones: list[_Zone] = []
    folders = sorted(root.glob("intel-rapl:*"), key=lambda folder: [int(n) for n in folder.name.split(":")[1:]])
    for folder in folders:
        label = _text(folder / "name")
        domain: Domain | None = "cpu" if label.startswith("package") else "dram" if label == "dram" else None
        if domain is None:
            continue
        uuid = f"{host}:{folder.name}"
        device = Device(uuid, f"{label} {folder.name}", domain, len(zones), counter_refresh_seconds=_REFRESH_SECONDS)
        file = folder / "energy_uj"
        zone = _Zone(device, file, _microjoules(folder / "max_energy_range_uj"))
        zone.last_microjoules = _microjoules(file)
        zones.append(zone)
    return zones


def _microjoules(file: Path) -> int:
    text = _text(file)
    if not text.isdecimal():
        raise SourceUnavailable(f"{file} holds '{text}', but must hold a number of microjoules")
    return int(text)


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except PermissionError as error:
        raise SourceUnavailable(
            f"{file} may be read only by root; run as root, or let an administrator `chmod a+r {file}`"
        ) from error
    except OSError as error:
        raise SourceUnavailable(f"{file} cannot be read: {error.strerror}") from error
