"""What may be wrong with readings: faults that were seen, and a counter that sampled power contradicts."""

from __future__ import annotations

from dataclasses import dataclass

from wattier_telemetry.integral import PowerIntegral

_CHECKED_SECONDS, _CHECKED_READINGS = 3.0, 30  # before counter and power samples are held against each other
# Samples that lie further apart may be in step with a load that pulsates, and then say little against a counter.
_SPARSE_SECONDS, _SPARSE_READINGS = 0.5, 600
_DISTRUST_RATIO, _DOUBT_RATIO = 2.0, 1.3


class CounterCheck:
    """Adds up what a counter and the power samples say of the same spans."""

    def __init__(self) -> None:
        self._counted_joules, self._sampled, self._compared = 0.0, PowerIntegral(), 0

    def add(self, counted_joules: float, sampled: PowerIntegral) -> None:
        """Take a span of which both are known."""
        self._counted_joules += counted_joules
        self._sampled.add(sampled)
        self._compared += 1

    @property
    def ratio(self) -> float | None:
        """The counter's joules over those of the samples; None until there are enough of both."""
        sparse = self._sampled.seconds > _SPARSE_SECONDS * self._compared
        needed = _SPARSE_READINGS if sparse else _CHECKED_READINGS
        enough = self._sampled.seconds >= _CHECKED_SECONDS and self._compared >= needed
        return self._counted_joules / self._sampled.joules if enough and self._sampled.joules > 0 else None

    @property
    def is_distrusted(self) -> bool:
        """Whether they are so far apart that the counter alone must not be billed."""
        return self._is_apart(_DISTRUST_RATIO)

    def warning(self) -> str | None:
        """Return what is odd about the counter, or None."""
        if not self._is_apart(_DOUBT_RATIO):
            return None
        verdict = "the larger is billed" if self.is_distrusted else "the counter is billed"
        return f"its energy counter says {self.ratio:.2f} of what its power samples say; {verdict}"

    def _is_apart(self, factor: float) -> bool:
        ratio = self.ratio
        return ratio is not None and not 1 / factor <= ratio <= factor


@dataclass(slots=True)
class Faults:
    """How often something was wrong with a device's readings."""

    readings: int = 0
    failures: int = 0
    failure: str = ""  # the last
    backward_steps: int = 0
    jumps: int = 0

    def sentences(self, *, stood_still: bool, doubt: str | None) -> list[str]:
        """Return what went wrong, in one sentence each."""
        found = []
        if self.backward_steps:
            found.append(
                f"its energy counter went backward {self.backward_steps} time(s); "
                "power samples, where there are any, replace it for these steps"
            )
        if self.jumps:
            found.append(
                f"its energy counter jumped {self.jumps} time(s) by more than can be; power samples, "
                "where there are any, replace it for these steps"
            )
        if stood_still:
            found.append("its energy counter stood still under power; power samples replace it there")
        if doubt:
            found.append(doubt)
        if self.failures:
            found.append(f"{self.failures} of {self.readings} readings failed, the last with: {self.failure}")
        return found
