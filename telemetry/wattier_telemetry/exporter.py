"""The Prometheus exporter: devices and trials of one node, read at the moment of the scrape."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from wattier_telemetry.records import Device, Reading
from wattier_telemetry.registration import TrialRegistration, read_registrations
from wattier_telemetry.source import PowerSource

DEFAULT_PORT = 9500
_DEVICE = ["uuid", "device", "domain", "source"]
_TRIAL = ["run", "stage", "trial", "rank"]
_GAUGES = {  # field of Reading: (metric, help)
    "power_watts": ("wattier_power_watts", "Power, W; the mean since the last scrape where only energy is counted."),
    "utilization_ratio": ("wattier_utilization_ratio", "Share of time busy, 0 to 1."),
    "memory_used_bytes": ("wattier_memory_used_bytes", "Device memory in use, B."),
    "memory_total_bytes": ("wattier_memory_total_bytes", "Device memory there is, B."),
    "temperature_celsius": ("wattier_temperature_celsius", "Core temperature, degrees Celsius."),
    "clock_hertz": ("wattier_clock_hertz", "Compute clock, Hz."),
    "memory_clock_hertz": ("wattier_memory_clock_hertz", "Memory clock, Hz."),
}
_TRIAL_GAUGES = {
    "epoch": ("wattier_trial_epoch", "Epochs finished."),
    "val_loss": ("wattier_trial_val_loss", "Latest validation loss."),
    "structures_per_second": ("wattier_trial_structures_per_second", "Training speed, 1/s."),
}


class TelemetryCollector(Collector):
    """Reads the source and the trials' registrations when Prometheus asks.

    Unknown figures have no series, and a device that fails costs no other device its series.

    Args:
        source: What to read.
        registry_folder: Where trials register. None = the default folder of this user.
    """

    def __init__(self, source: PowerSource, registry_folder: Path | None = None) -> None:
        self._source = source
        self._folder = registry_folder
        self._lock = threading.Lock()
        self._errors = {device.uuid: 0 for device in source.devices()}
        self._last: dict[str, Reading] = {}

    def collect(self) -> Iterator[Metric]:
        """Yield every metric family, devices first."""
        with self._lock:
            readings = list(self._read())
            errors = CounterMetricFamily("wattier_read_errors", "Readings that failed.", labels=["uuid", "source"])
            for uuid, count in self._errors.items():
                errors.add_metric([uuid, self._source.name], count)
        yield from self._device_metrics(readings)
        yield errors
        yield from _trial_metrics(_registrations(self._folder))

    def _read(self) -> Iterator[tuple[Device, Reading, float | None]]:
        """Yield each device that answers, with its power; from a bare counter that is the mean since the last look."""
        for device in self._source.devices():
            try:
                reading = self._source.read(device)
            except Exception:  # noqa: BLE001  (a broken device, whatever it raises, must not take the others along)
                self._errors[device.uuid] += 1
                continue
            before = self._last.get(device.uuid)
            self._last[device.uuid] = reading
            yield device, reading, _power_watts(before, reading)

    def _device_metrics(self, readings: list[tuple[Device, Reading, float | None]]) -> Iterator[Metric]:
        gauges = {name: GaugeMetricFamily(*metric, labels=_DEVICE) for name, metric in _GAUGES.items()}
        energy = CounterMetricFamily(
            "wattier_energy_joules", "Energy counter with an arbitrary zero, J.", labels=_DEVICE
        )
        throttled = GaugeMetricFamily(
            "wattier_throttled", "1 for each reason that holds the clock down.", labels=[*_DEVICE, "reason"]
        )
        for device, reading, power_watts in readings:
            labels = [device.uuid, device.name, device.domain, self._source.name]
            for name, family in gauges.items():
                value = power_watts if name == "power_watts" else getattr(reading, name)
                if value is not None:
                    family.add_metric(labels, value)
            if reading.energy_joules is not None:
                energy.add_metric(labels, reading.energy_joules)
            if reading.throttle_reasons is not None:  # "none" at 0 tells "runs freely" from "cannot say"
                for reason in reading.throttle_reasons or ("none",):
                    throttled.add_metric([*labels, reason], float(reason != "none"))
        yield from gauges.values()
        yield energy
        yield throttled


def _power_watts(before: Reading | None, now: Reading) -> float | None:
    if now.power_watts is not None:
        return now.power_watts
    if before is None or before.energy_joules is None or now.energy_joules is None:
        return None
    seconds, joules = now.time_seconds - before.time_seconds, now.energy_joules - before.energy_joules
    return joules / seconds if seconds > 0 and joules >= 0 else None


def _registrations(folder: Path | None) -> list[TrialRegistration]:
    try:
        return read_registrations(folder)
    except OSError:  # no folder, no trials; the devices are still there
        return []


def _trial_metrics(registrations: list[TrialRegistration]) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        "wattier_trial_info",
        "Which trial uses which device; 1. Never join it to a device's energy: trials may share a device.",
        labels=[*_TRIAL, "uuid", "fraction", "method"],
    )
    energy = CounterMetricFamily("wattier_trial_energy_joules", "Energy of the trial's rank so far, J.", labels=_TRIAL)
    gauges = {name: GaugeMetricFamily(*metric, labels=_TRIAL) for name, metric in _TRIAL_GAUGES.items()}
    for trial in registrations:
        labels = [trial.run, trial.stage, trial.trial, str(trial.rank)]
        for uuid in trial.device_uuids or ("",):
            info.add_metric([*labels, uuid, f"{trial.fraction:g}", trial.method or ""], 1)
        if trial.energy_joules is not None:
            energy.add_metric(labels, trial.energy_joules)
        for name, family in gauges.items():
            value = getattr(trial, name)
            if value is not None:
                family.add_metric(labels, value)
    yield info
    yield energy
    yield from gauges.values()


@dataclass(frozen=True)
class Exporter:
    """A running exporter.

    Attributes:
        address: Where it listens.
        port: The port it got, which matters if 0 was asked for.
    """

    address: str
    port: int
    _server: Any
    _thread: threading.Thread

    def close(self) -> None:
        """Stop listening. The source stays open, for it is the caller's."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve(
    source: PowerSource, address: str = "127.0.0.1", port: int = DEFAULT_PORT, registry_folder: Path | None = None
) -> Exporter:
    """Serve ``/metrics`` from a background thread, to this machine alone unless told otherwise.

    There is no password: whoever reaches the address reads names of runs. Listen wider only on a trusted network.

    Raises:
        OSError: If the address cannot be had, for example because the port is taken.
    """
    registry = CollectorRegistry()
    registry.register(TelemetryCollector(source, registry_folder))
    server, thread = start_http_server(port, addr=address, registry=registry)
    return Exporter(address, server.server_port, server, thread)
