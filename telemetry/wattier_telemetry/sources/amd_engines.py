"""What an AMD GPU tells of its parts: video decoder, links to other GPUs, compute units, errors by block."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from wattier_telemetry.records import ErrorCounts
from wattier_telemetry.sources.amd_binding import NO_UINT16, NO_UINT32, NO_UINT64, ask, entries, number

_KEPT_SECONDS = 5.0  # errors are rare, and each block is a call
BLOCKS = ("UMC", "SDMA", "GFX", "MMHUB", "ATHUB", "PCIE_BIF", "HDP", "XGMI_WAFL")


class Engines:
    """The parts of one die."""

    def __init__(self, smi: ModuleType, handle: Any) -> None:
        self._smi, self._handle = smi, handle
        asic = entries(ask(smi.amdsmi_get_gpu_asic_info, handle))
        self._units = number(asic.get("num_compute_units"), below=NO_UINT32) or None
        self._errors: tuple[float, Mapping[str, ErrorCounts] | None] | None = None

    def look(self, metrics: Any, occupied: Mapping[int, float]) -> dict[str, Any]:
        """Return the fields of a Reading that the die answers.

        Args:
            metrics: The driver's table of metrics, or None.
            occupied: The share of the compute units that each process occupies.
        """
        return {
            "decoder_utilization_ratio": _decoder_ratio(metrics),
            "link_read_bytes": _kilobytes(metrics, "xgmi_read_data_acc"),
            "link_written_bytes": _kilobytes(metrics, "xgmi_write_data_acc"),
            "compute_units": self._units,
            "compute_units_busy": None if self._units is None else self._units * min(1.0, sum(occupied.values())),
            "errors_by_block": self._errors_by_block(),
        }

    def _errors_by_block(self) -> Mapping[str, ErrorCounts] | None:
        now, known = time.monotonic(), self._errors
        if known is None or now - known[0] > _KEPT_SECONDS:
            counts = {}
            for block in BLOCKS:
                kind = getattr(getattr(self._smi, "AmdSmiGpuBlock", None), block, None)
                answer = entries(ask(self._smi.amdsmi_get_gpu_ecc_count, self._handle, kind)) if kind else {}
                one = ErrorCounts(*(number(answer.get(f"{word}_count")) for word in _WORDS))
                if one.corrected is not None:
                    counts[block.lower()] = one
            known = now, counts or None
            self._errors = known
        return known[1]


_WORDS = ("correctable", "uncorrectable", "deferred")


def _decoder_ratio(metrics: Any) -> float | None:
    """Return the mean over the decoders there are; before MI300 there is one figure for all."""
    each = [value for value in getattr(metrics, "vcn_activity", ()) if value < NO_UINT16]
    if not each:
        each = [value for value in (getattr(metrics, "average_mm_activity", NO_UINT16),) if value < NO_UINT16]
    return min(1.0, sum(each) / len(each) / 100) if each else None


def _kilobytes(metrics: Any, name: str) -> float | None:
    """Return the sum over all links, B; the driver counts KB."""
    each = [value for value in getattr(metrics, name, ()) if value < NO_UINT64]
    return 1024.0 * sum(each) if each else None
