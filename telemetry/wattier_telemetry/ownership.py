"""Whose a shared device is: the part of it that a process owns at a moment, and over a window."""

from __future__ import annotations

import os
import time

import psutil

from wattier_telemetry.integral import PowerIntegral
from wattier_telemetry.records import Attribution, Device
from wattier_telemetry.source import PowerSource


class Owners:
    """Whose a shared device is at the moment: this process's part of its utilization, or an equal part for each."""

    def __init__(self, source: PowerSource, fraction: float) -> None:
        self._source = source
        self._fraction = fraction
        self._told: set[str] = set()  # devices that have told, at least once
        self._is_own: dict[int, bool] = {}  # by process id, for a second: a number may be given to another process
        self._forget_at = 0.0

    def fraction_of(self, device: Device) -> float | None:
        """Return the part of a device, or None where it is what the meter was told."""
        if self._fraction == 1 or device.method == "estimated":
            return None
        try:
            busy = self._source.busy_by_pid(device)
        except Exception:  # noqa: BLE001  (the joules are known all the same)
            return None
        total = sum(busy.values())
        if total <= 0 or not any(psutil.pid_exists(pid) for pid in busy):  # pids of another namespace mean nothing
            return None
        self._told.add(device.uuid)
        return sum(ratio for pid, ratio in busy.items() if self._owns(pid)) / total

    def attribution_of(self, device: Device) -> Attribution:
        """Return how the part of a device is known."""
        if self._fraction == 1 or device.method == "estimated":
            return "whole"
        return "utilization" if device.uuid in self._told else "equal"

    def _owns(self, pid: int) -> bool:
        """Tell whether a process is this one or a descendant; its ancestors are few, all processes may be thousands."""
        now = time.monotonic()
        if now >= self._forget_at:
            self._forget_at = now + 1.0
            self._is_own.clear()
        if pid not in self._is_own:
            try:
                family = (pid, *(parent.pid for parent in psutil.Process(pid).parents()))
            except psutil.Error:  # gone, or of another namespace
                family = (pid,)
            self._is_own[pid] = os.getpid() in family
        return self._is_own[pid]


class MeanFraction:
    """The part of a device's energy that the work owned: weighted by energy, or by time where there is none."""

    def __init__(self, fraction: float) -> None:
        self._fraction, self._weights, self._weighted = fraction, 0.0, 0.0

    def add(self, step: PowerIntegral, moved_joules: float | None, fraction: float | None) -> None:
        """Remember whose a step was, None = not known.

        A driver tells only a moment after work begins: what comes before its first answer takes the mean of the rest.
        """
        if fraction is None and self._weights == 0:
            return
        weight = step.joules if step.known else max(0.0, moved_joules or 0.0)
        weight = weight or 1e-12 * step.seconds
        self._weights += weight
        self._weighted += weight * (self._fraction if fraction is None else fraction)

    @property
    def value(self) -> float:
        """Above 0, at most 1."""
        fraction = self._weighted / self._weights if self._weights > 0 else self._fraction
        return min(1.0, max(fraction, 1e-6))
