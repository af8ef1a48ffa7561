"""The power limit of a GPU: the seam that each vendor's file implements, and what may be asked of it.

Nothing here remembers or restores anything: `PowerCap` does, and is what a trial uses.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from wattier_telemetry.records import Device
from wattier_telemetry.source import SourceUnavailable

_SAME_WATTS = 0.5  # caps are whole watts, and drivers tell limits in milliwatts or finer


class PowerCapError(Exception):
    """A power limit cannot be set, or not put back; the message is one line that says why and what to do."""


class Limits(NamedTuple):
    """The power limit of a device, W: in force, without anybody's doing, and the range in which it can be set."""

    limit_watts: float
    default_watts: float
    low_watts: float
    high_watts: float


class PowerLimiter(Protocol):
    """Something that can be asked for power limits, and told to set them."""

    def devices(self) -> tuple[Device, ...]:
        """Return the devices, in the order of the power source of the same vendor."""

    def limits(self, device: Device) -> Limits:
        """Ask for the limit in force and its range.

        Raises:
            PowerCapError: If the device has no such limit, or does not answer.
        """

    def set_limit(self, device: Device, watts: float) -> None:
        """Set the limit. Whether the driver did as it said shows in `limits`.

        Raises:
            PowerCapError: If this process may not, or the device does not take it.
        """

    def close(self) -> None:
        """Let the vendor library go. Closing twice is harmless."""


def open_limiter(*, whole_node: bool = False) -> PowerLimiter:
    """Open the limiter that works here, NVIDIA's first, as ``auto`` does for power.

    Args:
        whole_node: Ignore the masks of visible devices.

    Raises:
        PowerCapError: If there is no GPU that answers.
    """
    from wattier_telemetry.sources.amd_limit import AmdLimiter
    from wattier_telemetry.sources.nvml_limit import NvmlLimiter

    reasons = []
    for kind in (NvmlLimiter, AmdLimiter):
        try:
            return kind(whole_node=whole_node)
        except SourceUnavailable as reason:
            reasons.append(str(reason))
    raise PowerCapError(f"there is no GPU here whose power limit could be set: {'; '.join(reasons)}")


def label(device: Device) -> str:
    """Name a device in a message."""
    return f"{device.name} {device.uuid}"


def is_same(watts: float, other_watts: float) -> bool:
    """Whether two limits are one and the same, but for rounding."""
    return abs(watts - other_watts) <= _SAME_WATTS


def cap_of(device: Device, limits: Limits, ratio: float) -> float:
    """Return what a ratio of the device's default limit comes to, in whole watts.

    Raises:
        PowerCapError: If the device does not take such a limit.
    """
    watts = float(round(ratio * limits.default_watts))
    low, high = limits.low_watts, limits.high_watts
    if not low <= watts <= high:
        raise PowerCapError(
            f"{label(device)}: a power cap of {ratio:g} is {watts:g} W, but must be from {low:g} to {high:g} W there, "
            f"that is from {low / limits.default_watts:.3g} to {min(1.0, high / limits.default_watts):.3g} of its "
            f"default limit, {limits.default_watts:g} W"
        )
    return watts


def refusal(device: Device, reason: str) -> PowerCapError:
    """Return what to say where the driver does not let this user set the limit."""
    return PowerCapError(
        f"{label(device)}: the driver does not let this user set its power limit ({reason}). As a rule only root may: "
        "run the trials as root, ask the node's administrator, or do without power caps"
    )
