"""AMD GPUs, through the amdsmi binding that ROCm brings.

On MI250X one package holds two dies, which HIP shows as two GPUs; power and energy belong to the package, and only
its even die reports them. Such a pair is one `Device` here, so that its joules are billed once and never as zero.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from wattier_telemetry.records import Device, Reading
from wattier_telemetry.source import PowerSource, SourceUnavailable

# amd_smi.h: one tick is 15.259 uJ, that is 2**-16 J; the library's own "counter_resolution" of 15.3 is 0.27 % high.
JOULES_PER_TICK = 2.0**-16
_VIOLATIONS = {
    "active_ppt_pwr": "power_cap",
    "active_socket_thrm": "socket_thermal",
    "active_vr_thrm": "regulator_thermal",
    "active_hbm_thrm": "memory_thermal",
    "active_prochot_thrm": "prochot",
}


@dataclass(frozen=True)
class _Package:
    device: Device
    meter: Any  # handle of the die that reports power and energy
    dies: list[Any]  # handles of the visible dies


class AmdSource(PowerSource):
    """The AMD GPU packages of which this process sees at least one die.

    ROCR_VISIBLE_DEVICES and then HIP_VISIBLE_DEVICES are applied, by index. A process that owns one die of a package
    should meter it with ``fraction=0.5``.

    Raises:
        SourceUnavailable: If the binding or its library is missing or does not fit, or no device is visible.
    """

    name = "amd"

    def __init__(self, *, whole_node: bool = False) -> None:
        self._whole_node = whole_node
        self._smi = _binding()
        try:
            self._smi.amdsmi_init()
        except Exception as error:
            raise SourceUnavailable(f"AMD SMI does not start: {_line(error)}") from error
        self._open = True
        try:
            packages = _packages(self._smi)
        except SourceUnavailable:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise SourceUnavailable(f"AMD SMI cannot list the GPUs: {_line(error)}") from error
        self._packages = {package.device.uuid: package for package in packages}

    def devices(self) -> tuple[Device, ...]:
        """Return one device per package, in AMD SMI's order."""
        return tuple(package.device for package in self._packages.values())

    def read(self, device: Device) -> Reading:
        """Read the package: energy and power of its reporting die, the rest over the visible dies."""
        if not self._open:
            raise SourceUnavailable("amd: the source is closed")
        smi, package = self._smi, self._packages[device.uuid]
        energy, power = _energy_joules(smi, package.meter), _power_watts(smi, package.meter)
        if energy is None and power is None and _ask(smi.amdsmi_get_gpu_device_uuid, package.meter) is None:
            raise SourceUnavailable(f"{device.name} {device.uuid} does not answer")
        busy = _values(_field(smi.amdsmi_get_gpu_activity, die, "gfx_activity") for die in package.dies)
        used = _values(_field(smi.amdsmi_get_gpu_vram_usage, die, "vram_used") for die in package.dies)
        total = _values(_field(smi.amdsmi_get_gpu_vram_usage, die, "vram_total") for die in package.dies)
        return Reading(
            time_seconds=time.time(),
            power_watts=power,
            energy_joules=energy,
            utilization_ratio=sum(busy) / len(busy) / 100 if busy else None,
            memory_used_bytes=sum(used) * 2**20 if used else None,  # the library says MB and divides by 2**20
            memory_total_bytes=sum(total) * 2**20 if total else None,
            temperature_celsius=max(_values(_celsius(smi, die) for die in package.dies), default=None),
            clock_hertz=max(_values(_hertz(smi, die, "GFX") for die in package.dies), default=None),
            memory_clock_hertz=max(_values(_hertz(smi, die, "MEM") for die in package.dies), default=None),
            throttle_reasons=_throttle_reasons(smi, package.meter),
        )

    def close(self) -> None:
        """Shut AMD SMI down."""
        if self._open:
            self._open = False
            with contextlib.suppress(Exception):
                self._smi.amdsmi_shut_down()


def _binding() -> ModuleType:
    """Import amdsmi, first the one beside the installed library, which always fits it.

    Without the library the import prints to stdout and raises KeyError; with an older one, AttributeError.
    """
    folder = str(Path(os.environ.get("ROCM_PATH", "/opt/rocm")) / "share" / "amd_smi")
    sys.path.insert(0, folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module("amdsmi")
    except Exception as error:
        raise SourceUnavailable(
            f"the amdsmi binding cannot be used ({_line(error)}); install ROCm 6.1 or newer, or point ROCM_PATH at it"
        ) from error
    finally:
        sys.path.remove(folder)


def _packages(smi: ModuleType) -> list[_Package]:
    handles = list(smi.amdsmi_get_processor_handles())
    if not handles:
        raise SourceUnavailable("AMD SMI works, but there is no GPU on this machine")
    visible = _visible(_hip_order(smi, handles))
    packages: list[_Package] = []
    for index, handle in enumerate(handles):
        pair = handles[index - 1] if index % 2 and _is_second_die(smi, handles[index - 1], handle) else None
        if pair is not None and packages and packages[-1].meter is pair:
            packages[-1].dies.append(handle)
            continue
        label = _field(smi.amdsmi_get_gpu_asic_info, handle, "market_name", kind=str) or "AMD GPU"
        uuid = str(smi.amdsmi_get_gpu_device_uuid(handle))
        packages.append(_Package(Device(uuid, label, "gpu", index), handle, [handle]))
    shown = [
        _Package(package.device, package.meter, dies)
        for package in packages
        if (dies := [die for die in package.dies if any(die is seen for seen in visible)])
    ]
    if not shown:
        raise SourceUnavailable("AMD SMI works, but ROCR_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES leaves no GPU")
    return shown


def _is_second_die(smi: ModuleType, first: Any, second: Any) -> bool:
    """Tell whether two dies share a package: one of them reports for both, and the other reads 0 or N/A.

    Told by what they report, not by their name: MI210, MI300X and an MI250X in a virtual machine report differently.
    """
    names = [_field(smi.amdsmi_get_gpu_asic_info, die, "market_name", kind=str) for die in (first, second)]
    silent = not _power_watts(smi, second) and not _energy_joules(smi, second)
    speaking = bool(_power_watts(smi, first) or _energy_joules(smi, first))
    return names[0] == names[1] and silent and speaking


def _hip_order(smi: ModuleType, handles: list[Any]) -> list[Any]:
    """Return the dies as HIP counts them, which differs from AMD SMI's order on some nodes (ROCm 6.4+ tells)."""
    enumerate_info = getattr(smi, "amdsmi_get_gpu_enumeration_info", None)
    ids = [_field(enumerate_info, handle, "hip_id") if enumerate_info else None for handle in handles]
    known = [number for number in ids if number is not None]
    if len(set(known)) < len(handles):
        return handles
    return [handle for _, handle in sorted(zip(known, handles, strict=True), key=lambda pair: pair[0])]


def _visible(handles: list[Any]) -> list[Any]:
    for variable in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):  # HIP counts among what ROCR left over
        mask = os.environ.get(variable)
        if mask is None:
            continue
        entries = [entry.strip() for entry in mask.split(",") if entry.strip()]
        if not all(entry.isdecimal() and int(entry) < len(handles) for entry in entries):
            raise SourceUnavailable(f"{variable}='{mask}' must hold indices of the {len(handles)} dies, as in 0,1")
        handles = [handles[int(entry)] for entry in dict.fromkeys(entries)]
    return handles


def _ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call AMD SMI; None where it refuses. Every release raises its own exceptions, so all of them count."""
    try:
        return function(*arguments)
    except Exception:  # noqa: BLE001
        return None


def _field(function: Callable[..., Any], handle: Any, key: str, kind: type = float) -> Any:
    """Return one entry of an answer, or None where it is missing, 'N/A' or of another type."""
    answer = _ask(function, handle)
    value = answer.get(key) if isinstance(answer, dict) else None
    if kind is float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if good and value is not None else None
    return value if isinstance(value, kind) else None


def _values(items: Any) -> list[float]:
    return [item for item in items if item is not None]


def _energy_joules(smi: ModuleType, die: Any) -> float | None:
    ticks = _field(smi.amdsmi_get_energy_count, die, "energy_accumulator")
    if ticks is None:
        ticks = _field(smi.amdsmi_get_energy_count, die, "power")  # its name up to ROCm 6.2
    return None if ticks is None else ticks * JOULES_PER_TICK


def _power_watts(smi: ModuleType, die: Any) -> float | None:
    # MI300 answers the first and 'N/A' to the second; MI200 the other way round.
    for key in ("current_socket_power", "average_socket_power"):
        watts: float | None = _field(smi.amdsmi_get_power_info, die, key)
        if watts is not None:
            return watts
    return None


def _celsius(smi: ModuleType, die: Any) -> float | None:
    for sensor in ("HOTSPOT", "JUNCTION", "EDGE"):
        kind = getattr(smi.AmdSmiTemperatureType, sensor, None)
        value = _ask(smi.amdsmi_get_temp_metric, die, kind, smi.AmdSmiTemperatureMetric.CURRENT) if kind else None
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return float(value)
    return None


def _hertz(smi: ModuleType, die: Any, clock: str) -> float | None:
    kind = getattr(smi.AmdSmiClkType, clock)
    for key in ("clk", "cur_clk"):  # renamed in ROCm 6.2
        megahertz = _field(lambda handle: smi.amdsmi_get_clock_info(handle, kind), die, key)
        if megahertz is not None:
            return float(megahertz) * 1e6
    return None


def _throttle_reasons(smi: ModuleType, die: Any) -> tuple[str, ...] | None:
    """Return what holds the clock down; only MI300 and newer tell (ROCm 6.3+)."""
    status = _ask(smi.amdsmi_get_violation_status, die) if hasattr(smi, "amdsmi_get_violation_status") else None
    if not isinstance(status, dict):
        return None
    known = {word: status.get(key) for key, word in _VIOLATIONS.items() if isinstance(status.get(key), bool)}
    return tuple(word for word, active in known.items() if active) if known else None


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
