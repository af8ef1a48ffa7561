"""HPE Cray nodes, through the counters of the node's controller in ``/sys/cray/pm_counters``."""

from __future__ import annotations

from pathlib import Path

from wattier_telemetry.records import Device, Reading
from wattier_telemetry.source import PowerSource, SourceUnavailable

PM_COUNTERS = Path("/sys/cray/pm_counters")


class CraySource(PowerSource):
    """Placeholder until its file is written in this same change."""

    name = "cray"

    def __init__(self, root: Path = PM_COUNTERS, *, whole_node: bool = False) -> None:
        raise SourceUnavailable(f"{root} does not exist: this is no HPE Cray node")

    def devices(self) -> tuple[Device, ...]:
        """Return nothing."""
        return ()

    def read(self, device: Device) -> Reading:
        """Refuse."""
        raise SourceUnavailable(device.uuid)

    def close(self) -> None:
        """Nothing is open."""
