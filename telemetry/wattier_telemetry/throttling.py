"""How long a device was held down, and by what."""

from __future__ import annotations

from wattier_telemetry.records import Reading

CLOCK_SETTINGS = ("application_clocks", "display_clocks")  # somebody's choice of clocks, which is not throttling


class ThrottleClock:
    """Adds up the time under each throttle reason.

    The driver's own counters of time are taken where there are any; a reason without one counts for the whole step at
    whose end it was seen.

    Attributes:
        seconds: For each reason the device knows, s. None = the device cannot say.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] | None = None

    def add(self, before: Reading, now: Reading, seconds: float) -> None:
        """Book the step between two readings."""
        counted = {}
        if before.throttle_seconds is not None and now.throttle_seconds is not None:
            counted = {
                reason: max(0.0, total - before.throttle_seconds.get(reason, total))
                for reason, total in now.throttle_seconds.items()
            }
        elif now.throttle_reasons is None:
            return
        self.seconds = self.seconds or {}
        for reason, duration in {**dict.fromkeys(now.throttle_reasons or (), seconds), **counted}.items():
            if reason not in CLOCK_SETTINGS:
                self.seconds[reason] = self.seconds.get(reason, 0.0) + min(duration, seconds)
