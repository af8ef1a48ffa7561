"""The meter over a piece of a run's work: which source, whose share, and where its journal lies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from pathlib import Path

import torch

from wattier.config import TelemetrySection
from wattier.peak_memory import held_memory_bytes
from wattier.power_trace import SUFFIX as TRACE_SUFFIX
from wattier.power_trace import traced_power
from wattier_telemetry import Device, EnergyMeter, Reading, open_source
from wattier_telemetry.journal import SUFFIX as JOURNAL_SUFFIX
from wattier_telemetry.source import PowerSource, SourceUnavailable


@contextmanager
def metered(  # noqa: PLR0913  (most are keywords)
    folder: Path,
    name: str,
    telemetry: TelemetrySection,
    *,
    on_gpu: bool,
    fraction: float = 1.0,
    counted_by_parent: bool = False,
    traced: bool = False,
) -> Iterator[tuple[EnergyMeter, PowerSource]]:
    """A running meter whose journal lies in a folder, and if traced a trace beside it; one of each for each attempt."""
    folder.mkdir(parents=True, exist_ok=True)
    source = _open_source(telemetry, on_gpu=on_gpu)
    if counted_by_parent and all(device.method == "estimated" for device in source.devices()):
        source = _NoDevices()
    # Asked for by name: a list of the folder, by each of the thousands of processes that meter in it, takes its square.
    names = (folder / f"attempt{attempt}-{name}.energy.json" for attempt in count(1))
    journal = next(path for path in names if not path.exists())
    meter = EnergyMeter(
        source,
        journal=journal,
        fraction=fraction,
        interval_seconds=telemetry.interval_seconds,
        journal_seconds=telemetry.journal_seconds,
        synchronize=_wait_for_cuda if on_gpu else None,
    )
    try:
        with meter, _trace_beside(meter, source, telemetry, on_gpu=on_gpu) if traced else nullcontext():
            yield meter, source
    finally:
        source.close()


def _trace_beside(
    meter: EnergyMeter, source: PowerSource, telemetry: TelemetrySection, *, on_gpu: bool
) -> AbstractContextManager[None]:
    if meter.journal is None or not source.devices():
        return nullcontext()
    path = meter.journal.with_name(meter.journal.name.removesuffix(JOURNAL_SUFFIX) + TRACE_SUFFIX)
    return traced_power(
        path,
        meter,
        source.devices(),
        lambda: held_memory_bytes(on_gpu=on_gpu),
        least_seconds=telemetry.journal_seconds or 0.0,
    )


def check_source(telemetry: TelemetrySection) -> None:
    """Open the config's source once, so that one that is not there is refused before any trial starts.

    Raises:
        SourceUnavailable: with what to do.
    """
    _open_source(telemetry, on_gpu=torch.cuda.is_available()).close()


def _wait_for_cuda() -> None:
    """Wait for the work that was queued; before the first work there is no context, and asking would make one."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def _open_source(telemetry: TelemetrySection, *, on_gpu: bool) -> PowerSource:
    """The source that the config names; by itself, work on the CPU is not measured by a GPU that idles beside it."""
    automatic = telemetry.source == "auto" and "WATTIER_POWER_SOURCE" not in os.environ
    if automatic and not on_gpu:
        try:
            return open_source("rapl")
        except SourceUnavailable:
            return open_source("estimated", rated_watts=telemetry.rated_watts_per_core)
    return open_source(telemetry.source, rated_watts=telemetry.rated_watts_per_core)


class _NoDevices(PowerSource):
    """The source of a process whose energy somebody else counts."""

    name = "none"

    def devices(self) -> tuple[Device, ...]:
        return ()

    def read(self, device: Device) -> Reading:
        raise SourceUnavailable(f"{device.uuid}: this source has no devices")

    def close(self) -> None:
        """Nothing is open."""
