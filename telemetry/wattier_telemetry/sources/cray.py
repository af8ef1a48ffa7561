"""HPE Cray nodes, through the files in which the node's controller counts: ``/sys/cray/pm_counters``.

Each file holds one figure, its unit and the controller's own time stamp: ``123456 J 1723 us``. The controller rewrites
all of them ten times a second and then raises the number in ``freshness``.
"""

from __future__ import annotations

import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from wattier_telemetry.records import Device, Domain, Reading
from wattier_telemetry.source import PowerSource, SourceUnavailable

PM_COUNTERS = Path("/sys/cray/pm_counters")
_REFRESH_SECONDS = 0.1
_ATTEMPTS = 5


@dataclass(frozen=True)
class _Meter:
    device: Device
    energy: Path
    power: Path


class CraySource(PowerSource):
    """The CPUs, the memory and each accelerator module of a node; the whole machine, whoever uses it.

    Args:
        root: The folder of the counters, replaceable for tests.
        whole_node: List the node's total as well, of which the others are parts: never add it to them.

    Raises:
        SourceUnavailable: If there is no such counter, or it may not be read.
    """

    name = "cray"

    def __init__(self, root: Path | None = None, *, whole_node: bool = False) -> None:
        root = PM_COUNTERS if root is None else root
        if not root.is_dir():
            raise SourceUnavailable(f"{root} does not exist: this is no HPE Cray node")
        self._freshness = root / "freshness"
        self._meters = {meter.device.uuid: meter for meter in _meters(root, whole_node=whole_node)}
        if not self._meters:
            raise SourceUnavailable(f"{root} holds no energy counter of CPU, memory or accelerators")
        for meter in self._meters.values():
            self._look(meter)

    def devices(self) -> tuple[Device, ...]:
        """Return CPU, memory, the accelerators by number, and the node's total if asked for."""
        return tuple(meter.device for meter in self._meters.values())

    def read(self, device: Device) -> Reading:
        """Read energy and power of one update of the controller."""
        return self._look(self._meters[device.uuid])

    def close(self) -> None:
        """Nothing is held open."""

    def _look(self, meter: _Meter) -> Reading:
        """Read again if the controller wrote in between, so that energy and power belong together."""
        for _ in range(_ATTEMPTS):
            before = self._update()
            joules = _figure(meter.energy, "J")
            watts = _figure(meter.power, "W") if meter.power.exists() else None
            now = time.time()
            if self._update() == before:
                return Reading(time_seconds=now, power_watts=watts, energy_joules=joules)
        raise SourceUnavailable(
            f"{self._freshness} changed during each of {_ATTEMPTS} readings; the node is overloaded"
        )

    def _update(self) -> str | None:
        """Return which update of the controller the files hold; None = this controller does not number them."""
        return _text(self._freshness).split()[0] if self._freshness.exists() else None


def _meters(root: Path, *, whole_node: bool) -> list[_Meter]:
    """Return what is counted here; a node without one of the files has one device less."""
    found: list[tuple[str, str, Domain]] = [
        ("cpu", "CPUs of the node", "cpu"),
        ("memory", "memory of the node", "dram"),
    ]
    modules = [match for path in root.glob("accel*_energy") if (match := re.fullmatch(r"accel(\d*)_energy", path.name))]
    numbers = sorted({int(match[1]) for match in modules if match[1]})
    # A bare accel_energy is the one module of an old blade, or the sum of those that are numbered.
    names = [f"accel{number}" for number in numbers] or ["accel"] * bool(modules)
    found += [(name, f"accelerator module {name.removeprefix('accel') or 0}", "gpu") for name in names]
    if whole_node:
        found.append(("", "node total", "node"))
    meters: list[_Meter] = []
    host = socket.gethostname()
    for prefix, label, domain in found:
        energy, power = (root / "_".join(filter(None, (prefix, what))) for what in ("energy", "power"))
        if energy.exists():
            uuid = f"{host}:cray-{prefix or 'node'}"
            device = Device(uuid, label, domain, len(meters), counter_refresh_seconds=_REFRESH_SECONDS)
            meters.append(_Meter(device, energy, power))
    return meters


def _figure(file: Path, unit: str) -> float:
    text = _text(file)
    words = text.split()
    if len(words) < 2 or not words[0].isdecimal() or words[1] != unit:
        raise SourceUnavailable(f"{file} holds '{text[:60]}', but must hold a whole number and {unit}")
    return float(words[0])


def _text(file: Path) -> str:
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError as error:
        raise SourceUnavailable(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SourceUnavailable(f"{file} cannot be read: it holds no text") from error
    if not text:
        raise SourceUnavailable(f"{file} is empty")
    return text
