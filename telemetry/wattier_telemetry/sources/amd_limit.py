"""Power limits of AMD GPUs: those of the package's first sensor; microwatts."""

from __future__ import annotations

from typing import Any

from wattier_telemetry.power_limit import Limits, PowerCapError, PowerLimiter, label, refusal
from wattier_telemetry.records import Device
from wattier_telemetry.sources.amd import AmdSource
from wattier_telemetry.sources.amd_binding import NO_UINT32, ask, entries, number, one_line

_NO_PERMISSION = 10  # AMDSMI_STATUS_NO_PERM
_SENSOR = 0


class AmdLimiter(PowerLimiter):
    """The limits of the dies of an `AmdSource`; a package of two dies has one limit for both, which no die may set.

    Raises:
        SourceUnavailable: As `AmdSource`.
    """

    def __init__(self, *, whole_node: bool = False) -> None:
        self._source = AmdSource(whole_node=whole_node)

    def devices(self) -> tuple[Device, ...]:
        """Return the dies of the source."""
        return self._source.devices()

    def limits(self, device: Device) -> Limits:
        """See `PowerLimiter.limits`."""
        if device.package_uuid is not None:
            raise PowerCapError(
                f"{label(device)} is one of two dies that share a power limit, which would act on the other one, too"
            )
        smi, handle = self._source.handle(device)
        answer = entries(ask(smi.amdsmi_get_power_cap_info, handle))
        told = [_watts(answer.get(key)) for key in ("power_cap", "default_power_cap", "max_power_cap")]
        lowest = _watts(answer.get("min_power_cap"))
        if lowest is None or not all(told):
            raise PowerCapError(f"{label(device)} does not tell its power limit, or not its range")
        limit, default, highest = (watts or 0.0 for watts in told)
        return Limits(limit, default, lowest, highest)

    def set_limit(self, device: Device, watts: float) -> None:
        """See `PowerLimiter.set_limit`."""
        smi, handle = self._source.handle(device)
        try:
            smi.amdsmi_set_power_cap(handle, _SENSOR, round(watts * 1e6))
        except Exception as error:
            code = getattr(error, "get_error_code", lambda: None)()
            if code == _NO_PERMISSION:
                raise refusal(device, one_line(error)) from error
            raise PowerCapError(
                f"{label(device)} does not take a power limit of {watts:g} W: {one_line(error)}"
            ) from error

    def close(self) -> None:
        """Close the source."""
        self._source.close()


def _watts(microwatts: Any) -> float | None:
    value = number(microwatts, below=NO_UINT32)  # 4 kW, more than any; it is also what "no figure" looks like
    return None if value is None else value / 1e6
