"""Where power comes from: the seam that every vendor file implements, and the function that picks one."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from wattier_telemetry.records import Device, Method, Reading

ENVIRONMENT_VARIABLE = "WATTIER_POWER_SOURCE"
AUTOMATIC_ORDER = ("nvml", "amd", "rapl", "estimated")
NAMES = ("auto", *AUTOMATIC_ORDER)

_log = logging.getLogger(__name__)


class SourceUnavailable(Exception):  # noqa: N818  (it names a state of the machine, not a mistake in the code)
    """A source cannot measure here; the message is one line that says why and what to do."""


class PowerSource(Protocol):
    """Something that can be asked for the power or the energy of devices.

    A new source is one file that passes the contract test. `read` may be called from several threads.
    """

    @property
    def name(self) -> str:
        """Short name, as `open_source` takes it."""

    @property
    def method(self) -> Method:
        """How ``Reading.energy_joules`` is known, if the source gives it."""

    def devices(self) -> tuple[Device, ...]:
        """Return the devices this process may use, always the same ones in the same order."""

    def read(self, device: Device) -> Reading:
        """Look at one device now.

        Raises:
            SourceUnavailable: If the device does not answer any more; the others may still do.
        """

    def close(self) -> None:
        """Let the vendor library go. Closing twice is harmless."""


def open_source(name: str = "auto", *, rated_watts: float | None = None) -> PowerSource:
    """Open a power source by its name.

    Args:
        name: ``auto`` (the first that works of nvml, amd, rapl, estimated), one of these, or ``replay:<path>``.
            ``auto`` gives way to the environment variable WATTIER_POWER_SOURCE.
        rated_watts: Watts per busy core that the estimated source assumes; ignored by the others.

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
            raise SourceUnavailable("power source 'replay' needs a file: replay:<path of a CSV>")
        from wattier_telemetry.replay import ReplaySource

        return ReplaySource(Path(path))
    if colon or name not in AUTOMATIC_ORDER:
        close = difflib.get_close_matches(kind, (*NAMES, "replay"), n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise SourceUnavailable(f"power source is '{name}', but must be {', '.join(NAMES)} or replay:<path>.{hint}")
    return _openers(rated_watts)[name]()


def _first_that_works(rated_watts: float | None) -> PowerSource:
    openers = _openers(rated_watts)
    for name in AUTOMATIC_ORDER[:-1]:
        try:
            return openers[name]()
        except SourceUnavailable as reason:
            _log.info("power source %s: %s", name, reason)
    return openers[AUTOMATIC_ORDER[-1]]()


def _openers(rated_watts: float | None) -> dict[str, Callable[[], PowerSource]]:
    """Return how to open each source; imported here because a source imports this file for its exception."""
    from wattier_telemetry.amd import AmdSource
    from wattier_telemetry.estimated import EstimatedSource
    from wattier_telemetry.nvml import NvmlSource
    from wattier_telemetry.rapl import RaplSource

    return {
        "nvml": NvmlSource,
        "amd": AmdSource,
        "rapl": RaplSource,
        "estimated": lambda: EstimatedSource(rated_watts=rated_watts),
    }
