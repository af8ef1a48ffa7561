"""Power limits of NVIDIA GPUs: what was set, apart from what the driver enforces besides; milliwatts."""

from __future__ import annotations

import pynvml

from wattier_telemetry.power_limit import Limits, PowerCapError, PowerLimiter, label, refusal
from wattier_telemetry.records import Device
from wattier_telemetry.sources.nvml import NvmlSource


class NvmlLimiter(PowerLimiter):
    """The limits of the GPUs of an `NvmlSource`.

    While it is open the driver stays loaded, and without persistence mode the limit lasts only as long.

    Raises:
        SourceUnavailable: As `NvmlSource`.
    """

    def __init__(self, *, whole_node: bool = False) -> None:
        self._source = NvmlSource(whole_node=whole_node)

    def devices(self) -> tuple[Device, ...]:
        """Return the GPUs of the source."""
        return self._source.devices()

    def limits(self, device: Device) -> Limits:
        """See `PowerLimiter.limits`."""
        handle = self._source.handle(device)
        try:
            low, high = pynvml.nvmlDeviceGetPowerManagementLimitConstraints(handle)
            default = pynvml.nvmlDeviceGetPowerManagementDefaultLimit(handle)
            limit = pynvml.nvmlDeviceGetPowerManagementLimit(handle)
        except pynvml.NVMLError as error:
            raise PowerCapError(f"{label(device)} does not tell its power limit: {error}") from error
        return Limits(limit / 1e3, default / 1e3, low / 1e3, high / 1e3)

    def set_limit(self, device: Device, watts: float) -> None:
        """See `PowerLimiter.set_limit`."""
        try:
            pynvml.nvmlDeviceSetPowerManagementLimit(self._source.handle(device), round(watts * 1e3))
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_NO_PERMISSION:
                raise refusal(device, str(error)) from error
            raise PowerCapError(f"{label(device)} does not take a power limit of {watts:g} W: {error}") from error

    def close(self) -> None:
        """Close the source."""
        self._source.close()
