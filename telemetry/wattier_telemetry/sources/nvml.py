"""NVIDIA GPUs, through the driver's NVML library.

Energy comes from the total-energy counter (Volta and newer, mJ since the driver loaded). Power is the instantaneous
field, and the plain power call only where that field is missing: the call is averaged over one second on Ampere and
newer, except GA100 (nvml.h 12.9). The power of a whole module, which is all that some GH200 tell, holds a CPU as well
and is not used. What the meter needs comes in one call of the driver, but for the mask of throttle reasons.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import pynvml

from wattier_telemetry.records import Device, Reading
from wattier_telemetry.source import PowerSource, SourceUnavailable
from wattier_telemetry.sources.nvml_devices import (
    ENERGY,
    MEMORY_CELSIUS,
    POWER,
    Gpu,
    Slow,
    ask,
    field_values,
    open_gpus,
)

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

_NO_SAMPLES = (  # the last: one more came between the binding's two calls, and will be there the next time
    pynvml.NVML_SUCCESS,
    pynvml.NVML_ERROR_NOT_FOUND,
    pynvml.NVML_ERROR_INSUFFICIENT_SIZE,
)
_SLOW_KEPT_SECONDS = 5.0
_BUSY_KEPT_SECONDS = 1.0

_Answer = TypeVar("_Answer")


class NvmlSource(PowerSource):
    """The NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves to this process, or all of the node.

    Args:
        whole_node: Ignore the mask, and read a GPU that is split by MIG as a whole, with "(MIG)" in its name.

    Raises:
        SourceUnavailable: If there is no driver, no GPU to read, or one is split by MIG and not the whole node's.
    """

    name = "nvml"

    def __init__(self, *, whole_node: bool = False) -> None:
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise SourceUnavailable(f"NVML does not start ({error}); is an NVIDIA driver installed?") from error
        self._open = True
        try:
            self._gpus = {gpu.device.uuid: gpu for gpu in open_gpus(whole_node=whole_node)}
        except BaseException:
            self.close()
            raise

    def devices(self) -> tuple[Device, ...]:
        """Return the GPUs in the order of CUDA_VISIBLE_DEVICES, or in NVML's for a whole node."""
        return tuple(gpu.device for gpu in self._gpus.values())

    def read(self, device: Device) -> Reading:
        """Read every figure the GPU offers; a figure it does not support is None."""
        return self._answer(device, _read)

    def read_energy(self, device: Device) -> Reading:
        """Read energy, power, the power cap (at most 5 s old) and throttling."""
        return self._answer(device, lambda gpu: _read_energy(gpu)[0])

    def busy_by_pid(self, device: Device) -> Mapping[int, float]:
        """Return each process's mean share of the GPU's time since the call before (at first: the last second).

        Where the driver has no new sample, an answer of less than a second ago is given again.
        """
        return self._answer(device, _busy)

    def _answer(self, device: Device, question: Callable[[Gpu], _Answer]) -> _Answer:
        if not self._open:
            raise SourceUnavailable("nvml: the source is closed")
        try:
            return question(self._gpus[device.uuid])
        except pynvml.NVMLError as error:
            raise SourceUnavailable(f"{device.name} {device.uuid} does not answer: {error}") from error

    def handle(self, device: Device) -> Any:
        """Return what NVML knows a device by, for whoever asks or tells it other things."""
        return self._gpus[device.uuid].handle

    def close(self) -> None:
        """Shut NVML down (it counts its users)."""
        if self._open:
            self._open = False
            pynvml.nvmlShutdown()


def _read_energy(gpu: Gpu) -> tuple[Reading, Mapping[int, Any]]:
    """Return what a meter reads, and the values by field id."""
    values = field_values(gpu.handle, gpu.fields)
    millijoules = values.get(ENERGY)
    if millijoules is None and gpu.device.method == "counter":
        millijoules = ask(pynvml.nvmlDeviceGetTotalEnergyConsumption, gpu.handle)
    milliwatts = values.get(POWER)
    if milliwatts is None and POWER not in gpu.fields:
        milliwatts = ask(pynvml.nvmlDeviceGetPowerUsage, gpu.handle)
    counted = {word: values[number] / 1e9 for word, number in gpu.nanoseconds.items() if values.get(number) is not None}
    reading = Reading(
        time_seconds=time.time(),
        power_watts=_scaled(milliwatts, 1e-3),
        energy_joules=_scaled(millijoules, 1e-3),
        power_limit_watts=_slow(gpu).limit_watts,
        throttle_reasons=_throttle_reasons(gpu.handle),
        throttle_seconds=counted or None,
    )
    return reading, values


def _read(gpu: Gpu) -> Reading:
    handle = gpu.handle
    reading, values = _read_energy(gpu)
    rates = ask(pynvml.nvmlDeviceGetUtilizationRates, handle)
    memory = ask(pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)  # "used" without what is reserved
    if memory is None:
        memory = ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    slow = _slow(gpu)
    return replace(
        reading,
        utilization_ratio=None if rates is None else rates.gpu / 100,
        memory_utilization_ratio=None if rates is None else rates.memory / 100,
        memory_used_bytes=None if memory is None else memory.used,
        memory_total_bytes=None if memory is None else memory.total,
        temperature_celsius=ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        # 0 is how some boards without that sensor answer; no memory at work is that cold.
        memory_temperature_celsius=values.get(MEMORY_CELSIUS) or None,
        clock_hertz=_scaled(ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM), 1e6),
        memory_clock_hertz=_scaled(ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM), 1e6),
        power_limit_max_watts=slow.limit_max_watts,
        ecc_corrected=slow.ecc_corrected,
        ecc_uncorrected=slow.ecc_uncorrected,
    )


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _slow(gpu: Gpu) -> Slow:
    now, known = time.monotonic(), gpu.slow
    if known is None or now - known[0] > _SLOW_KEPT_SECONDS:
        handle = gpu.handle
        limits = ask(pynvml.nvmlDeviceGetPowerManagementLimitConstraints, handle)
        corrected, uncorrected = pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
        known = (
            now,
            Slow(
                _scaled(ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle), 1e-3),
                None if limits is None else limits[1] / 1e3,
                ask(pynvml.nvmlDeviceGetTotalEccErrors, handle, corrected, pynvml.NVML_VOLATILE_ECC),
                ask(pynvml.nvmlDeviceGetTotalEccErrors, handle, uncorrected, pynvml.NVML_VOLATILE_ECC),
            ),
        )
        gpu.slow = known
    return known[1]


def _throttle_reasons(handle: Any) -> tuple[str, ...] | None:
    mask = ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    if mask is None:  # drivers before 535 know the call only by its older name
        mask = ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    return None if mask is None else tuple(word for bit, word in _REASONS.items() if mask & bit)


def _busy(gpu: Gpu) -> Mapping[int, float]:
    newest, came, answer = gpu.busy
    try:
        samples = ask(pynvml.nvmlDeviceGetProcessUtilization, gpu.handle, newest) or []
    except pynvml.NVMLError as error:  # the binding takes "none" for an error, too
        if error.value not in _NO_SAMPLES:
            raise
        samples = []
    # Some drivers fill the list up with rubbish: no process, or busier than can be.
    good = [sample for sample in samples if sample.pid and sample.timeStamp > newest and sample.smUtil <= 100]
    if not good:
        return answer if time.monotonic() - came < _BUSY_KEPT_SECONDS else {}
    last = max(sample.timeStamp for sample in good)
    since = newest or last - 1_000_000  # us; the driver's memory reaches back further than "lately"
    parts: dict[int, list[float]] = {}
    for sample in good:
        if sample.timeStamp > since:
            parts.setdefault(sample.pid, []).append(sample.smUtil / 100)
    answer = {pid: sum(part) / len(part) for pid, part in parts.items()}
    gpu.busy = last, time.monotonic(), answer
    return answer
