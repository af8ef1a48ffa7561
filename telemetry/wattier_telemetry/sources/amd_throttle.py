"""What holds an AMD GPU's clock down, and for how long, from the driver's table of metrics.

MI300 and newer count, since the driver loaded, the firmware's ticks under each limit beside all its ticks.
``amdsmi_get_violation_status`` makes percentages of their growth (amd_smi.cc), but sleeps for 100 ms in every call to
see them grow. Here they are kept from reading to reading instead, and the time between is split in the same proportion,
so that neither the length of a tick nor a sleep is needed. Older GPUs tell what acts at the moment, as bits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from wattier_telemetry.sources.amd_binding import NO_UINT32, NO_UINT64

_RESIDENCIES = {
    "ppt_residency_acc": "power_cap",
    "socket_thm_residency_acc": "socket_thermal",
    "vr_thm_residency_acc": "regulator_thermal",
    "hbm_thm_residency_acc": "memory_thermal",
    "prochot_residency_acc": "prochot",
}
_ACTIVE_RATIO = 0.01  # the library, too, calls a limit active from one per cent of the ticks on

# Bits of indep_throttle_status, alike for all GPUs: SMU_THROTTLER_*_BIT in the kernel's amdgpu_smu.h.
_BITS = {
    **dict.fromkeys(range(8), "power_cap"),  # PPT0 to PPT3, SPL, FPPT, SPPT, SPPT_APU
    **dict.fromkeys(range(16, 24), "current_limit"),  # TDC and EDC of several rails, APCC
    **dict.fromkeys((32, 33, 35, 36, 37), "socket_thermal"),  # GPU, core, edge, hotspot, SoC
    34: "memory_thermal",
    **dict.fromkeys((38, 39, 40, 41, 44, 45), "regulator_thermal"),  # voltage regulators, VRHOT
    **dict.fromkeys((42, 43), "coolant_thermal"),
    **dict.fromkeys((46, 47), "prochot"),
}


def reasons_of_bits(status: int) -> tuple[str, ...]:
    """Return the reasons whose bits are set in ``indep_throttle_status``; a bit of unknown meaning is ``other``."""
    found = {_BITS.get(bit, "other"): None for bit in range(64) if status >> bit & 1}
    return tuple(found)


class Throttling:
    """The throttling of one GPU: what acts now, and the seconds since this object was first shown a table."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ticks: int | None = None
        self._held: Mapping[str, int] = {}
        self._at = 0.0
        self._seconds: Mapping[str, float] | None = None
        self._reasons: tuple[str, ...] = ()

    def look(self, metrics: Any) -> tuple[tuple[str, ...] | None, Mapping[str, float] | None]:
        """Return the reasons and the seconds by reason; None for what the GPU cannot tell.

        Args:
            metrics: The table of metrics, or None where the GPU does not give one.
        """
        ticks = getattr(metrics, "accumulation_counter", NO_UINT64)
        if ticks >= NO_UINT64:
            status = getattr(metrics, "indep_throttle_status", NO_UINT64)
            return (None if status >= NO_UINT64 else reasons_of_bits(status)), None
        counts = {reason: getattr(metrics, field, NO_UINT64) for field, reason in _RESIDENCIES.items()}
        held = {reason: count for reason, count in counts.items() if count not in (NO_UINT32, NO_UINT64)}
        with self._lock:
            self._advance(ticks, held, time.monotonic())
            return (self._reasons, self._seconds) if self._seconds else (None, None)

    def _advance(self, ticks: int, held: Mapping[str, int], now: float) -> None:
        """Take the growth since the table was last seen to change; the firmware writes it about every 100 ms."""
        if ticks == self._ticks:
            return
        before, was_held, elapsed = self._ticks, self._held, now - self._at
        self._ticks, self._held, self._at = ticks, held, now
        known = dict.fromkeys(held, 0.0) | dict(self._seconds or {})
        if before is not None and ticks > before:  # else the first table, or counters that began again
            grown = {reason: (held[reason] - was_held.get(reason, held[reason])) / (ticks - before) for reason in held}
            shares = {reason: min(1.0, max(0.0, share)) for reason, share in grown.items()}
            known |= {reason: known[reason] + share * elapsed for reason, share in shares.items()}
            self._reasons = tuple(reason for reason, share in shares.items() if share >= _ACTIVE_RATIO)
        self._seconds = known
