"""AMD GPUs, through the amdsmi binding that ROCm brings.

A package of MI250 or MI250X holds two dies, which HIP shows as two GPUs, and one meter, which only one die reports: the
other says 0 or nothing. Here each die is a device and returns half of the package's energy, power and power cap, so
that all dies together are what the meter says, and a trial that owns one die is billed one half.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import platform
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, ClassVar

from wattier_telemetry.records import Device, Reading
from wattier_telemetry.source import PowerSource, SourceUnavailable
from wattier_telemetry.sources.amd_binding import (
    NO_UINT16,
    NO_UINT32,
    ask,
    entries,
    import_binding,
    number,
    one_line,
    raw_metrics,
    word,
)
from wattier_telemetry.sources.amd_engines import Engines
from wattier_telemetry.sources.amd_throttle import Throttling
from wattier_telemetry.sources.amd_visible import Candidate, hip_order, visible

# amd_smi.h: one tick is 15.259 uJ, that is 2**-16 J; the library's own "counter_resolution" of 15.3 is 0.27 % high.
JOULES_PER_TICK = 2.0**-16
# amd_smi.cc: "fastest SMU FW sample time is 100 ms"; on MI250X a few ms were seen (arXiv 2604.06056). The longer holds.
_COUNTER_REFRESH_SECONDS = 0.1
_LIMIT_KEPT_SECONDS = 5.0
_TWO_DIES = "gfx90a"  # MI210 is of this kind as well, but alone on its board

_log = logging.getLogger(__name__)


@dataclass
class _Die:
    """One die, the die that reports for its package, and what is remembered; each thread writes whole values."""

    device: Device
    handle: Any
    meter: Any
    engines: Engines
    parts: int = 1  # among so many dies the meter's figures are divided
    throttling: Throttling = field(default_factory=Throttling)
    limits: tuple[float, float | None, float | None] | None = None  # when they were read, cap and highest cap in W


class AmdSource(PowerSource):
    """The AMD GPU dies that this process may use, in the order of HIP.

    Args:
        whole_node: List every die, whatever ROCR_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES say.

    Raises:
        SourceUnavailable: If the binding or its library is missing or does not fit, or no device is visible.
    """

    name = "amd"
    _lock: ClassVar[threading.Lock] = threading.Lock()
    _users: ClassVar[int] = 0  # the library does not count: one shut-down ends it for all

    def __init__(self, *, whole_node: bool = False) -> None:
        self._smi = import_binding()
        with AmdSource._lock:
            try:
                self._smi.amdsmi_init()
            except Exception as error:
                raise SourceUnavailable(f"AMD SMI does not start: {one_line(error)}") from error
            AmdSource._users += 1
        self._open = True
        try:
            dies = _open_dies(self._smi, whole_node=whole_node)
        except SourceUnavailable:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise SourceUnavailable(f"AMD SMI cannot list the GPUs: {one_line(error)}") from error
        self._dies = {die.device.uuid: die for die in dies}

    def devices(self) -> tuple[Device, ...]:
        """Return one device per die, in the order in which HIP shows them to this process."""
        return tuple(die.device for die in self._dies.values())

    def read(self, device: Device) -> Reading:
        """Read every figure the die offers, and its part of the package's; what it does not tell is None."""
        die = self._die(device)
        smi, handle = self._smi, die.handle
        reading = self.read_energy(device)
        activity = entries(ask(smi.amdsmi_get_gpu_activity, handle))
        memory = entries(ask(smi.amdsmi_get_gpu_vram_usage, handle))
        errors = entries(ask(getattr(smi, "amdsmi_get_gpu_total_ecc_count", None), handle))
        return replace(
            reading,
            utilization_ratio=_scaled(number(activity.get("gfx_activity"), below=101), 0.01),
            memory_utilization_ratio=_scaled(number(activity.get("umc_activity"), below=101), 0.01),
            # The library says MB and divides by 2**20.
            memory_used_bytes=_scaled(number(memory.get("vram_used"), below=NO_UINT32), 2.0**20),
            memory_total_bytes=_scaled(number(memory.get("vram_total"), below=NO_UINT32), 2.0**20),
            temperature_celsius=_celsius(smi, handle, "HOTSPOT", "JUNCTION", "EDGE"),
            memory_temperature_celsius=_celsius(smi, handle, "VRAM") or _hottest_hbm(smi, handle),
            clock_hertz=_hertz(smi, handle, "GFX"),
            memory_clock_hertz=_hertz(smi, handle, "MEM"),
            power_limit_max_watts=_limits_watts(smi, die)[1],
            ecc_corrected=number(errors.get("correctable_count")),
            ecc_uncorrected=number(errors.get("uncorrectable_count")),
            **die.engines.look(raw_metrics(smi, handle), self.busy_by_pid(device)),
        )

    def read_energy(self, device: Device) -> Reading:
        """Read energy, power, the power cap (at most 5 s old) and throttling."""
        die = self._die(device)
        smi, share = self._smi, 1 / die.parts
        joules = _energy_joules(smi, die.meter) if device.method == "counter" else None
        reading = Reading(
            time_seconds=time.time(),
            power_watts=_scaled(_power_watts(smi, die.meter)[0], share),
            energy_joules=_scaled(joules, share),
        )
        if reading.energy_joules is None and reading.power_watts is None and _is_mute(smi, die.handle):
            raise SourceUnavailable(f"{device.name} {device.uuid} does not answer")
        reasons, seconds = die.throttling.look(raw_metrics(smi, die.handle))
        cap = _limits_watts(smi, die)[0]
        return replace(reading, power_limit_watts=cap, throttle_reasons=reasons, throttle_seconds=seconds)

    def busy_by_pid(self, device: Device) -> Mapping[int, float]:
        """Return the share of the die's compute units that each process occupies at the moment.

        The driver counts compute units (from MI200 on), and the library makes whole per cents of them.
        """
        processes = ask(self._smi.amdsmi_get_gpu_process_list, self._die(device).handle)
        known = map(entries, processes or ())
        shares = {process.get("pid"): number(process.get("cu_occupancy"), below=101) for process in known}
        return {pid: share / 100 for pid, share in shares.items() if isinstance(pid, int) and pid and share is not None}

    def _die(self, device: Device) -> _Die:
        if not self._open:
            raise SourceUnavailable("amd: the source is closed")
        return self._dies[device.uuid]

    def handle(self, device: Device) -> tuple[ModuleType, Any]:
        """Return the binding, and what it knows a device by, for whoever asks or tells it other things."""
        return self._smi, self._die(device).handle

    def close(self) -> None:
        """Let AMD SMI go; the last source to do so shuts it down."""
        if self._open:
            self._open = False
            with AmdSource._lock:
                AmdSource._users -= 1
                if AmdSource._users == 0:
                    with contextlib.suppress(Exception):
                        self._smi.amdsmi_shut_down()


def _open_dies(smi: ModuleType, *, whole_node: bool) -> list[_Die]:
    handles = list(smi.amdsmi_get_processor_handles())
    if not handles:
        raise SourceUnavailable("AMD SMI works, but there is no GPU on this machine")
    meters = _meters(smi, handles)
    uuids = _uuids(smi, handles)
    ordered = hip_order(smi, handles)
    shown = [candidate for candidate in ordered if uuids[candidate.place] is not None]
    for candidate in set(ordered).difference(shown):
        _log.warning("AMD GPU %d is left out: it does not tell its UUID", candidate.index)
    if not whole_node:
        shown = [candidate for candidate in visible(ordered) if candidate in shown]
    if not shown:
        raise SourceUnavailable("AMD SMI works, but leaves no GPU that answers to this process")
    return [_described(smi, candidate, meters[candidate.place], uuids) for candidate in shown]


def _uuids(smi: ModuleType, handles: list[Any]) -> list[str | None]:
    """Return what each die is called all over the world; None where it does not say."""
    told = [word(ask(smi.amdsmi_get_gpu_device_uuid, handle)) for handle in handles]
    uuids: list[str | None] = []
    for uuid, handle in zip(told, handles, strict=True):
        # Without a serial number, as in some guests of a hypervisor, the library makes equal ones.
        alike = uuid is not None and told.count(uuid) > 1
        place = word(ask(smi.amdsmi_get_gpu_device_bdf, handle))
        uuids.append(f"{uuid}-{platform.node()}-{place}" if alike else uuid)
    return uuids


def _meters(smi: ModuleType, handles: list[Any]) -> list[tuple[int, int]]:
    """Return, for each die, the die that reports for its package and the number of dies it reports for.

    A package is told by what its dies report, not by a name: of two neighbours alike, one has power or energy.
    """
    reports = [bool(_power_watts(smi, handle)[0] or _energy_joules(smi, handle)) for handle in handles]
    kinds = [_kind(smi, handle) for handle in handles]
    meters = [(place, 1) for place in range(len(handles))]
    paired = False
    for first, second in itertools.pairwise(range(len(handles))):
        alike = kinds[first] is not None and kinds[first] == kinds[second]
        paired = not paired and alike and reports[first] != reports[second]
        if paired:
            meters[first] = meters[second] = (first if reports[first] else second, 2)
    return meters


def _kind(smi: ModuleType, handle: Any) -> str | None:
    """Return the name of a die that may be one of two, or None."""
    asic = entries(ask(smi.amdsmi_get_gpu_asic_info, handle))
    name, architecture = word(asic.get("market_name")), word(asic.get("target_graphics_version"))
    single = name is None or "MI210" in name or architecture not in (None, _TWO_DIES)
    return None if single else name


def _described(smi: ModuleType, candidate: Candidate, meter: tuple[int, int], uuids: list[str | None]) -> _Die:
    """Find out what the die is and how its joules are known."""
    handle, (reporting, parts) = candidate.handle, meter
    meter_handle = candidate.handles[reporting]
    asic = entries(ask(smi.amdsmi_get_gpu_asic_info, handle))
    board = entries(ask(getattr(smi, "amdsmi_get_gpu_board_info", None), handle))
    driver = entries(ask(getattr(smi, "amdsmi_get_gpu_driver_info", None), handle))
    vbios = entries(ask(getattr(smi, "amdsmi_get_gpu_vbios_info", None), handle))
    counts = bool(_energy_joules(smi, meter_handle))  # 0: a counter that is not there, as in a virtual machine
    device = Device(
        uuid=uuids[candidate.place] or "",
        name=word(asic.get("market_name")) or "AMD GPU",
        domain="gpu",
        index=candidate.index,
        method="counter" if counts else "integrated",
        counter_refresh_seconds=_COUNTER_REFRESH_SECONDS if counts else 0.0,
        power_average_seconds=_COUNTER_REFRESH_SECONDS if _power_watts(smi, meter_handle)[1] else 0.0,
        package_uuid=uuids[reporting] if parts > 1 else None,
        pci_bus_id=word(ask(smi.amdsmi_get_gpu_device_bdf, handle)),
        driver_version=word(driver.get("driver_version")),
        vbios_version=word(vbios.get("version")) or word(vbios.get("part_number")),
        serial=word(board.get("product_serial")) or word(asic.get("asic_serial")),
    )
    return _Die(device, handle, meter_handle, Engines(smi, handle), parts)


def _energy_joules(smi: ModuleType, handle: Any) -> float | None:
    answer = entries(ask(smi.amdsmi_get_energy_count, handle))
    ticks = number(answer.get("energy_accumulator"))
    if ticks is None:
        ticks = number(answer.get("power"))  # its name up to ROCm 6.2
    return _scaled(ticks, JOULES_PER_TICK)


def _power_watts(smi: ModuleType, handle: Any) -> tuple[float | None, bool]:
    """Return the power and whether it is an average: MI300 answers the momentary field, MI200 the averaged one."""
    answer = entries(ask(smi.amdsmi_get_power_info, handle))
    momentary = number(answer.get("current_socket_power"), below=NO_UINT16)
    if momentary is not None:
        return momentary, False
    return number(answer.get("average_socket_power"), below=NO_UINT16), True


def _limits_watts(smi: ModuleType, die: _Die) -> tuple[float | None, float | None]:
    """Return the die's part of the cap in force and of the highest one."""
    now, known = time.monotonic(), die.limits
    if known is None or now - known[0] > _LIMIT_KEPT_SECONDS:
        answer = entries(ask(smi.amdsmi_get_power_cap_info, die.meter))
        cap, highest = (number(answer.get(key), below=NO_UINT32) or None for key in ("power_cap", "max_power_cap"))
        known = now, _scaled(cap, 1e-6 / die.parts), _scaled(highest, 1e-6 / die.parts)  # uW
        die.limits = known
    return known[1], known[2]


def _celsius(smi: ModuleType, handle: Any, *sensors: str) -> float | None:
    """Return the first of some sensors that answers; 0 is how one that is not there answers."""
    for sensor in sensors:
        kind = getattr(smi.AmdSmiTemperatureType, sensor, None)
        if kind is not None:
            value = number(
                ask(smi.amdsmi_get_temp_metric, handle, kind, smi.AmdSmiTemperatureMetric.CURRENT), below=1000
            )
            if value:
                return value
    return None


def _hottest_hbm(smi: ModuleType, handle: Any) -> float | None:
    stacks = [_celsius(smi, handle, f"HBM_{stack}") for stack in range(4)]
    return max((value for value in stacks if value is not None), default=None)


def _hertz(smi: ModuleType, handle: Any, clock: str) -> float | None:
    answer = entries(ask(smi.amdsmi_get_clock_info, handle, getattr(smi.AmdSmiClkType, clock)))
    megahertz = number(answer.get("clk", answer.get("cur_clk")), below=NO_UINT16)  # renamed in ROCm 6.2
    return _scaled(megahertz or None, 1e6)


def _is_mute(smi: ModuleType, handle: Any) -> bool:
    """Tell whether a die without energy and power answers nothing else either; its UUID may come from a cache."""
    return ask(smi.amdsmi_get_gpu_activity, handle) is None and ask(smi.amdsmi_get_gpu_vram_usage, handle) is None


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
