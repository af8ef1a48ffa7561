"""The arithmetic of the meter for one device: readings in, joules out; no clock, no thread, no file."""

from __future__ import annotations

from wattier_telemetry.records import Device, Method, Reading, Share, weakest


class Account:
    """Adds up the energy of one device from one reading to the next.

    A counter's difference is taken where both readings have one, otherwise the trapezoid of two power samples.

    Args:
        device: Whose account this is.
        method: How the source knows its counter.
        longest_gap_seconds: Two power samples further apart are still billed, but what lay between them was not
            seen, so it does not count as covered. A counter misses nothing, however far apart its readings are.
    """

    def __init__(self, device: Device, method: Method, *, longest_gap_seconds: float) -> None:
        self.device = device
        self.joules = 0.0
        self.covered_seconds = 0.0
        self.power_watts: float | None = None  # the latest known, for reservations
        self._source_method = method
        self._methods: set[Method] = set()
        self._longest_gap_seconds = longest_gap_seconds
        self._first_time: float | None = None
        self._last: tuple[float, Reading] | None = None
        self._backward_steps = 0
        self._readings = 0
        self._failures = 0
        self._failure = ""

    def preview(self, reading: Reading) -> None:
        """Learn the power before the window opens, without billing anything."""
        self.power_watts = reading.power_watts

    def add(self, time_seconds: float, reading: Reading) -> None:
        """Book the step since the last reading; ``time_seconds`` is any clock that never jumps."""
        self._readings += 1
        last, self._last = self._last, (time_seconds, reading)
        if reading.power_watts is not None:
            self.power_watts = reading.power_watts
        if last is None:
            self._first_time = time_seconds
            return
        seconds, before = time_seconds - last[0], last[1]
        if before.energy_joules is not None and reading.energy_joules is not None:
            step = reading.energy_joules - before.energy_joules
            if step >= 0:
                self._book(step, seconds, self._source_method)
                if reading.power_watts is None and seconds > 0:
                    self.power_watts = step / seconds
                return
            self._backward_steps += 1  # seen on MI100, and after a driver reset: this step cannot be told by it
        if before.power_watts is not None and reading.power_watts is not None:
            covered = seconds if seconds <= self._longest_gap_seconds else 0.0
            method = weakest((self._source_method, "integrated"))
            self._book((before.power_watts + reading.power_watts) / 2 * seconds, covered, method or "integrated")

    def fail(self, error: Exception) -> None:
        """Note that the device did not answer; the next reading that does is joined to the last one that did."""
        self._readings += 1
        self._failures += 1
        self._failure = " ".join(str(error).split())

    def reservation_joules(self, seconds: float) -> float:
        """Return what the device may draw in the coming seconds: the larger of its present and its mean power, J."""
        watts = self.power_watts or 0.0
        if self._last is not None and self._first_time is not None and self._last[0] > self._first_time:
            watts = max(watts, self.joules / (self._last[0] - self._first_time))
        return watts * seconds

    def share(self, start_seconds: float, seconds: float, *, fraction: float, reserved_seconds: float = 0.0) -> Share:
        """Return the share over ``seconds`` from the start, with a reservation behind it if asked."""
        total_seconds, joules = seconds + reserved_seconds, self.joules
        if reserved_seconds:
            joules += self.reservation_joules(reserved_seconds)
        known = bool(self._methods) or joules > 0
        return Share(
            device_uuid=self.device.uuid,
            domain=self.device.domain,
            start_seconds=start_seconds,
            end_seconds=start_seconds + total_seconds,
            fraction=fraction,
            joules=joules * fraction if known else None,
            method=weakest(self._methods) or self._source_method,
            coverage_ratio=min(1.0, self.covered_seconds / total_seconds) if total_seconds > 0 else float(known),
        )

    def warnings(self) -> list[str]:
        """Return what went wrong, in one sentence each."""
        found = []
        if self._backward_steps:
            found.append(
                f"{self.device.name} {self.device.uuid}: its energy counter went backward {self._backward_steps} "
                "time(s); power samples, where there are any, replace it for these steps"
            )
        if self._failures:
            found.append(
                f"{self.device.name} {self.device.uuid}: {self._failures} of {self._readings} readings failed, "
                f"the last with: {self._failure}"
            )
        return found

    def _book(self, joules: float, covered_seconds: float, method: Method) -> None:
        self.joules += joules
        self.covered_seconds += covered_seconds
        self._methods.add(method)
