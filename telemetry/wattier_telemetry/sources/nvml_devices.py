"""Which NVIDIA GPUs there are to read, and what each can answer: found out once, when the source is opened."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pynvml

from wattier_telemetry.records import Device
from wattier_telemetry.source import SourceUnavailable

ENERGY, POWER, MEMORY_CELSIUS = 83, 186, 82  # field ids: mJ; mW, in scope 0, the GPU; degrees Celsius
_NANOSECONDS = {"power_cap": 74, "software_thermal": 75, "sync_boost": 76, "board_limit": 77}
# These three counters have moved: headers of CUDA 13 say 269 to 271, where drivers such as 580.65 keep figures of
# power smoothing, and have the counters at 251 to 253. The driver is asked where it answers with 64 bits, as counters
# do; where that is so of both places, the reasons stay unknown.
_MOVED = ("software_thermal", "hardware_thermal", "power_brake")
_MOVED_TO = (269, 251)

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
_VALUE_MEMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")  # by NVML_VALUE_TYPE_*
_GA100 = re.compile(r"\b(A100|A800|A30)\b")

_COUNTER_REFRESH_SECONDS = 0.1
_AVERAGE_SECONDS = 1.0

_log = logging.getLogger(__name__)


class _Field(ctypes.Structure):
    _fields_ = pynvml.c_nvmlFieldValue_t._fields_


class Slow(NamedTuple):
    """Figures that seldom change, and are asked for every few seconds only."""

    limit_watts: float | None
    limit_max_watts: float | None
    ecc_corrected: int | None
    ecc_uncorrected: int | None


@dataclass
class Gpu:
    """One GPU, how it likes to be asked, and what is remembered of it.

    Two threads that read one GPU may both refresh what is remembered; each writes a whole new value, so no lock is
    needed, and none is held while the driver thinks.
    """

    device: Device
    handle: Any
    fields: tuple[int, ...]
    nanoseconds: Mapping[str, int]  # field id by throttle reason, for those it counts
    slow: tuple[float, Slow] | None = None  # when it was read on the monotonic clock
    busy: tuple[int, float, Mapping[int, float]] = (0, 0.0, {})  # newest sample's stamp, when it came, the answer


def ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call NVML; None where the device does not have the figure."""
    try:
        return function(*arguments)
    except pynvml.NVMLError as error:
        if error.value in _UNKNOWN:
            return None
        raise


def field_values(handle: Any, numbers: Iterable[int], *, only_type: int | None = None) -> dict[int, Any]:
    """Return the fields that the device has, by number, all from one call."""
    wanted = [(number, pynvml.NVML_POWER_SCOPE_GPU) for number in numbers]
    answers = ask(pynvml.nvmlDeviceGetFieldValues, handle, wanted) if wanted else None
    found = {}
    # The binding's own structures run Python at every access of a field; this view of the same memory does not.
    for answer in (_Field * len(answers)).from_buffer(answers) if answers else ():
        # The call succeeds even where a field does not: each value carries its own return code and its own type.
        status = answer.nvmlReturn
        if status in _UNKNOWN:
            continue
        if status != pynvml.NVML_SUCCESS:
            raise pynvml.NVMLError(status)
        kind = answer.valueType
        if kind < len(_VALUE_MEMBERS) and only_type in (None, kind):
            found[answer.fieldId] = getattr(answer.value, _VALUE_MEMBERS[kind])
    return found


def open_gpus(*, whole_node: bool) -> list[Gpu]:
    """Return the GPUs to read.

    A mask counts as CUDA_DEVICE_ORDER=PCI_BUS_ID does, NVML's order; on a node of equal GPUs that is CUDA's too.
    """
    try:
        listed = _listed(pynvml.nvmlDeviceGetCount())
        driver = ask(pynvml.nvmlSystemGetDriverVersion)
    except pynvml.NVMLError as error:
        raise SourceUnavailable(f"NVML cannot list the GPUs: {error}") from error
    mask = None if whole_node else os.environ.get("CUDA_VISIBLE_DEVICES")
    uuids = [gpu[0] if gpu else None for gpu in listed]
    chosen = [i for i, uuid in enumerate(uuids) if uuid is not None] if mask is None else _chosen(uuids, mask)
    gpus = []
    for index in chosen:
        if (found := listed[index]) is not None:
            uuid, handle = found
            unknown = Device(
                uuid, "NVIDIA GPU", "gpu", index, "counter", _COUNTER_REFRESH_SECONDS, driver_version=driver
            )
            gpus.append(_described(unknown, handle, whole_node=whole_node))
    if not gpus:
        raise SourceUnavailable("NVML works, but there is no GPU on this machine that answers")
    if all(_is_mute(gpu) for gpu in gpus):
        raise SourceUnavailable(f"{gpus[0].device.name} tells neither energy nor power; use the source 'estimated'")
    return gpus


def _listed(count: int) -> list[tuple[str, Any] | None]:
    """Return UUID and handle of each GPU; None where they cannot be had, so that the others keep their index."""
    listed: list[tuple[str, Any] | None] = []
    for index in range(count):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            listed.append((pynvml.nvmlDeviceGetUUID(handle), handle))
        except pynvml.NVMLError as error:
            _log.warning("GPU %d is left out: NVML does not tell its UUID (%s)", index, error)
            listed.append(None)
    return listed


def _chosen(uuids: list[str | None], mask: str) -> list[int]:
    """Return the indices that a CUDA_VISIBLE_DEVICES mask leaves, in the mask's order."""
    chosen: list[int] = []
    for entry in filter(None, (part.strip() for part in mask.split(","))):
        if entry == "-1":  # CUDA stops at the first invalid entry, and -1 is the customary way to say so
            break
        if entry.startswith("MIG-"):
            raise SourceUnavailable(f"CUDA_VISIBLE_DEVICES='{mask}' names a MIG slice, whose energy NVML does not tell")
        if entry.isdecimal():
            found = [int(entry)] if int(entry) < len(uuids) and uuids[int(entry)] is not None else []
        else:
            found = [index for index, uuid in enumerate(uuids) if uuid is not None and uuid.startswith(entry)]
        if len(found) != 1:
            raise SourceUnavailable(
                f"CUDA_VISIBLE_DEVICES='{mask}': '{entry}' is not one GPU of the {len(uuids)} on this machine"
            )
        chosen += [index for index in found if index not in chosen]
    if not chosen:
        raise SourceUnavailable(f"CUDA_VISIBLE_DEVICES='{mask}' leaves no GPU to this process")
    return chosen


def _described(device: Device, handle: Any, *, whole_node: bool) -> Gpu:
    """Find out what the GPU is and what it can answer; one that does not answer is listed as it would be if it did."""
    every = tuple(_NANOSECONDS.values())
    gpu = Gpu(device, handle, (ENERGY, POWER, MEMORY_CELSIUS, *every), _NANOSECONDS)
    try:
        name = ask(pynvml.nvmlDeviceGetName, handle) or device.name
        mode = ask(pynvml.nvmlDeviceGetMigMode, handle)
        if mode is not None and mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE:
            if not whole_node:
                raise SourceUnavailable(
                    f"{name} {device.uuid} is split by MIG, and NVML does not tell the energy of a slice; "
                    "use a whole GPU, or the source 'estimated'"
                )
            name += " (MIG)"
        fields = set(field_values(handle, gpu.fields))
        gpu.nanoseconds = _counted_reasons(handle, fields)
        gpu.fields = (*sorted(fields & {ENERGY, POWER, MEMORY_CELSIUS}), *gpu.nanoseconds.values())
        counts = ENERGY in fields or ask(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle) is not None
        place = ask(pynvml.nvmlDeviceGetPciInfo, handle)
        gpu.device = replace(
            device,
            name=name,
            method="counter" if counts else "integrated",
            counter_refresh_seconds=_COUNTER_REFRESH_SECONDS if counts else 0.0,
            power_average_seconds=0.0 if POWER in fields else _average_seconds(handle, name),
            pci_bus_id=None if place is None else place.busId,
            vbios_version=ask(pynvml.nvmlDeviceGetVbiosVersion, handle),
            serial=ask(pynvml.nvmlDeviceGetSerial, handle),
        )
    except pynvml.NVMLError as error:
        _log.warning("GPU %d, %s, does not answer: %s", device.index, device.uuid, error)
    return gpu


def _counted_reasons(handle: Any, fields: Collection[int]) -> dict[str, int]:
    """Return the field that counts each throttle reason's nanoseconds, for those the device counts."""
    counted = {word: number for word, number in _NANOSECONDS.items() if number in fields}
    places = []
    for first in _MOVED_TO:
        numbers = range(first, first + len(_MOVED))
        places.append(field_values(handle, numbers, only_type=pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG))
    if len([place for place in places if place]) == 1:  # where both would do, nobody can tell which is which
        for first, found in zip(_MOVED_TO, places, strict=True):
            counted |= {word: first + i for i, word in enumerate(_MOVED) if first + i in found}
    return counted


def _average_seconds(handle: Any, name: str) -> float:
    """Return the time over which nvmlDeviceGetPowerUsage averages, s (nvml.h 12.9)."""
    architecture = ask(pynvml.nvmlDeviceGetArchitecture, handle)
    old = architecture is not None and architecture < pynvml.NVML_DEVICE_ARCH_AMPERE
    return 0.0 if old or _GA100.search(name) else _AVERAGE_SECONDS


def _is_mute(gpu: Gpu) -> bool:
    """Tell whether the GPU knows neither its energy nor its power."""
    if gpu.device.method == "counter" or POWER in gpu.fields:
        return False
    with contextlib.suppress(pynvml.NVMLError):
        return ask(pynvml.nvmlDeviceGetPowerUsage, gpu.handle) is None
    return False
