"""The power sources of the simulated hosts."""

from __future__ import annotations

import math
from pathlib import Path

from replay.world import LOST, LOST_FROM, World, trace
from wattier_telemetry import Device, Reading
from wattier_telemetry.sources.replay import ReplaySource


class LosingSource(ReplaySource):
    """A replay in which one GPU stops answering for a while, as one does that has fallen off the bus.

    Args:
        path: The trace.
        lost: Begin and end of each time in which it does not answer, s since 1970.
    """

    def __init__(self, path: Path, lost: tuple[tuple[float, float], ...]) -> None:
        super().__init__(path)
        self._lost = lost

    def read(self, device: Device) -> Reading:
        """Return what stood in the trace at this moment.

        Raises:
            OSError: If the GPU is lost.
        """
        now = self._clock()
        if device.uuid == LOST and any(begin <= now < end for begin, end in self._lost):
            raise OSError("GPU is lost")
        return super().read(device)


def open_host(world: World, host: str, folder: Path, start_seconds: float, rounds: int) -> LosingSource:
    """Write the trace of a host into a folder, and open it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trace.csv"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in trace(world, host, start_seconds, rounds))
    begins = [start_seconds + number * world.seconds for number in range(rounds)]
    ends = [*begins[1:], math.inf]  # it is mended for the next round
    lost = tuple((begin + LOST_FROM * world.seconds, end) for begin, end in zip(begins, ends, strict=True))
    return LosingSource(path, lost)
