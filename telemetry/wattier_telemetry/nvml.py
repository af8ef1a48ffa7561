"""NVIDIA GPUs, through the driver's NVML library.

Energy comes from the total-energy counter (Volta and newer, mJ since the driver loaded). Power is the instantaneous
field: the plain power call is averaged over one second on Ampere and newer (nvml.h 12.9), too slow for a short trial.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pynvml

from wattier_telemetry.records import Device, Reading
from wattier_telemetry.source import PowerSource, SourceUnavailable

_REASONS = {
    0x2: "application_clocks",
    0x4: "power_cap",
    0x8: "hardware_slowdown",
    0x10: "sync_boost",
    0x20: "software_thermal",
    0x40: "hardware_thermal",
    0x80: "power_brake",
    0x100: "display_clocks",
}  # 0x1 is "idle", which is rest and not throttling

# What a device answers when it simply does not have the figure; anything else means that the device is in trouble.
_UNKNOWN = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_INVALID_ARGUMENT,
    pynvml.NVML_ERROR_NO_DATA,
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    pynvml.NVML_ERROR_DEPRECATED,
)


class NvmlSource(PowerSource):
    """The NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves to this process.

    Raises:
        SourceUnavailable: If there is no driver, no visible device, or a visible device is split by MIG.
    """

    name = "nvml"

    def __init__(self, *, whole_node: bool = False) -> None:
        self._whole_node = whole_node
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise SourceUnavailable(f"NVML does not start ({error}); is an NVIDIA driver installed?") from error
        self._open = True
        try:
            self._handles = _visible_handles()
        except BaseException:
            self.close()
            raise
        self._devices = tuple(device for device, _ in self._handles.values())

    def devices(self) -> tuple[Device, ...]:
        """Return the visible GPUs in the order of CUDA_VISIBLE_DEVICES."""
        return self._devices

    def read(self, device: Device) -> Reading:
        """Read every figure the GPU offers; a figure it does not support is None."""
        if not self._open:
            raise SourceUnavailable("nvml: the source is closed")
        handle = self._handles[device.uuid][1]
        try:
            return _read(handle)
        except pynvml.NVMLError as error:
            raise SourceUnavailable(f"{device.name} {device.uuid} does not answer: {error}") from error

    def close(self) -> None:
        """Shut NVML down (it counts its users)."""
        if self._open:
            self._open = False
            pynvml.nvmlShutdown()


def _read(handle: Any) -> Reading:
    millijoules = _ask(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)
    rates = _ask(pynvml.nvmlDeviceGetUtilizationRates, handle)
    memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    temperature = _ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU)
    clock = _ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM)
    memory_clock = _ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM)
    return Reading(
        time_seconds=time.time(),
        power_watts=_power_watts(handle),
        energy_joules=None if millijoules is None else millijoules / 1e3,
        utilization_ratio=None if rates is None else rates.gpu / 100,
        memory_used_bytes=None if memory is None else memory.used,
        memory_total_bytes=None if memory is None else memory.total,
        temperature_celsius=temperature,
        clock_hertz=None if clock is None else clock * 1e6,
        memory_clock_hertz=None if memory_clock is None else memory_clock * 1e6,
        throttle_reasons=_throttle_reasons(handle),
    )


def _ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call NVML; None where the device does not have the figure."""
    try:
        return function(*arguments)
    except pynvml.NVMLError as error:
        if error.value in _UNKNOWN:
            return None
        raise


def _power_watts(handle: Any) -> float | None:
    fields = _ask(
        pynvml.nvmlDeviceGetFieldValues, handle, [(pynvml.NVML_FI_DEV_POWER_INSTANT, pynvml.NVML_POWER_SCOPE_GPU)]
    )
    # The call succeeds even where the field does not: each value carries its own return code.
    if fields is not None and fields[0].nvmlReturn == pynvml.NVML_SUCCESS:
        return float(fields[0].value.uiVal) / 1e3
    milliwatts = _ask(pynvml.nvmlDeviceGetPowerUsage, handle)
    return None if milliwatts is None else milliwatts / 1e3


def _throttle_reasons(handle: Any) -> tuple[str, ...] | None:
    mask = _ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    if mask is None:  # drivers before 535 know the call only by its older name
        mask = _ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    return None if mask is None else tuple(word for bit, word in _REASONS.items() if mask & bit)


def _visible_handles() -> dict[str, tuple[Device, Any]]:
    """Return the visible devices and their handles by UUID.

    The mask counts as CUDA_DEVICE_ORDER=PCI_BUS_ID does, NVML's order; on a node of equal GPUs that is CUDA's too.
    """
    try:
        everything = {}
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            device = Device(pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle), "gpu", index)
            everything[device.uuid] = (device, handle)
        chosen = _chosen(list(everything), os.environ.get("CUDA_VISIBLE_DEVICES"))
        for uuid in chosen:
            _refuse_mig(*everything[uuid])
    except pynvml.NVMLError as error:
        raise SourceUnavailable(f"NVML cannot list the GPUs: {error}") from error
    if not chosen:
        raise SourceUnavailable("NVML works, but there is no GPU on this machine")
    return {uuid: everything[uuid] for uuid in chosen}


def _chosen(uuids: list[str], mask: str | None) -> list[str]:
    """Return the UUIDs that a CUDA_VISIBLE_DEVICES mask leaves, in the mask's order."""
    if mask is None:
        return uuids
    chosen: list[str] = []
    for entry in filter(None, (part.strip() for part in mask.split(","))):
        if entry == "-1":  # CUDA stops at the first invalid entry, and -1 is the customary way to say so
            break
        if entry.isdecimal():
            found = uuids[int(entry) : int(entry) + 1]
        else:
            found = [uuid for uuid in uuids if uuid.startswith(entry)]
        if entry.startswith("MIG-"):
            raise SourceUnavailable(f"CUDA_VISIBLE_DEVICES='{mask}' names a MIG slice, whose energy NVML does not tell")
        if len(found) != 1:
            raise SourceUnavailable(
                f"CUDA_VISIBLE_DEVICES='{mask}': '{entry}' is not one GPU of the {len(uuids)} on this machine"
            )
        chosen += [uuid for uuid in found if uuid not in chosen]
    if not chosen:
        raise SourceUnavailable(f"CUDA_VISIBLE_DEVICES='{mask}' leaves no GPU to this process")
    return chosen


def _refuse_mig(device: Device, handle: Any) -> None:
    mode = _ask(pynvml.nvmlDeviceGetMigMode, handle)
    if mode is not None and mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE:
        raise SourceUnavailable(
            f"{device.name} {device.uuid} is split by MIG, and NVML does not tell the energy of a slice; "
            "use a whole GPU, or the source 'estimated'"
        )
