"""Where power comes from: the seam that every vendor file implements, and the function that picks one."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from wattier_telemetry.records import Device, Reading

ENVIRONMENT_VARIABLE = "WATTIER_POWER_SOURCE"
AUTOMATIC_ORDER = ("nvml", "amd", "rapl", "estimated")
COUNTERS = ("nvml", "amd", "rapl", "cray")
NAMES = ("auto", *COUNTERS, "estimated")

_log = logging.getLogger(__name__)


class SourceUnavailable(Exception):  # noqa: N818  (it names a state of the machine, not a mistake in the code)
    """A source cannot measure here; the message is one line that says why and what to do."""


class PowerSource(Protocol):
    """Something that can be asked for the power or the energy of devices.

    A new source is one file that passes the contract test. Methods that read may be called from several threads.
    """

    @property
    def name(self) -> str:
        """Short name, as `open_source` takes it."""

    def devices(self) -> tuple[Device, ...]:
        """Return the devices this process may use, always the same ones in the same order."""

    def read(self, device: Device) -> Reading:
        """Look at one device now.

        Raises:
            SourceUnavailable: If the device does not answer any more; the others may still do.
        """

    def read_energy(self, device: Device) -> Reading:
        """Look at energy, power and throttling alone, where that is cheaper: what a meter reads, many times a second.

        Raises:
            SourceUnavailable: If the device does not answer any more.
        """
        return self.read(device)

    def busy_by_pid(self, device: Device) -> Mapping[int, float]:
        """Return how busy each process has lately kept the device, 0 to 1; empty = the device does not tell."""
        del device
        return {}

    def close(self) -> None:
        """Let the vendor library go. Closing twice is harmless."""


def open_source(name: str = "auto", *, rated_watts: float | None = None, whole_node: bool = False) -> PowerSource:
    """Open a power source by its name.

    Args:
        name: ``auto`` (the first that works of nvml, amd, rapl, estimated), one of these, ``cray``, or
            ``replay:<path>``. ``auto`` gives way to the environment variable WATTIER_POWER_SOURCE.
        rated_watts: Watts per busy core that the estimated source assumes; ignored by the others.
        whole_node: Look at the node as its exporter does, not as one process that is billed: visibility masks are
            ignored, a GPU split by MIG is read as a whole, and totals that hold other devices are listed too.

    Raises:
        SourceUnavailable: If the source does not work here, or there is no such source.
    """
    if name == "auto":
        name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if name == "auto":
        return _first_that_works(rated_watts)
    kind, colon, path = name.partition(":")
    if kind == "replay":
        if not path:
            raise SourceUnavailable("power source 'replay' needs a file: replay:<path of a CSV or Parquet file>")
        from wattier_telemetry.sources.replay import ReplaySource

        return ReplaySource(Path(path))
    openers = _openers(rated_watts, whole_node=whole_node)
    if colon or name not in openers:
        close = difflib.get_close_matches(kind, (*NAMES, "replay"), n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise SourceUnavailable(f"power source is '{name}', but must be {', '.join(NAMES)} or replay:<path>.{hint}")
    return openers[name]()


def open_node_sources(names: str = "auto") -> list[PowerSource]:
    """Open what an exporter of a whole node reads.

    Args:
        names: ``auto`` (every counter that works here: nvml, amd, rapl, cray; the estimate if none does), or names as
            `open_source` takes them, separated by commas.

    Raises:
        SourceUnavailable: If one that was named does not work here.
    """
    if names == "auto":
        names = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if names != "auto":
        sources: list[PowerSource] = []
        try:
            for name in names.split(","):
                sources.append(open_source(name.strip(), whole_node=True))
        except SourceUnavailable:
            for source in sources:
                source.close()
            raise
        return sources
    openers = _openers(None, whole_node=True)
    found = []
    for name in COUNTERS:
        try:
            found.append(openers[name]())
        except SourceUnavailable as reason:
            _log.info("power source %s: %s", name, reason)
    return found or [openers["estimated"]()]


def _first_that_works(rated_watts: float | None) -> PowerSource:
    openers = _openers(rated_watts, whole_node=False)
    for name in AUTOMATIC_ORDER[:-1]:
        try:
            return openers[name]()
        except SourceUnavailable as reason:
            _log.info("power source %s: %s", name, reason)
    return openers[AUTOMATIC_ORDER[-1]]()


def _openers(rated_watts: float | None, *, whole_node: bool) -> dict[str, Callable[[], PowerSource]]:
    """Return how to open each source; imported here because a source imports this file for its exception."""
    from wattier_telemetry.sources.amd import AmdSource
    from wattier_telemetry.sources.cray import CraySource
    from wattier_telemetry.sources.estimated import EstimatedSource
    from wattier_telemetry.sources.nvml import NvmlSource
    from wattier_telemetry.sources.rapl import RaplSource

    return {
        "nvml": lambda: NvmlSource(whole_node=whole_node),
        "amd": lambda: AmdSource(whole_node=whole_node),
        "rapl": RaplSource,
        "cray": lambda: CraySource(whole_node=whole_node),
        "estimated": lambda: EstimatedSource(rated_watts=rated_watts),
    }
