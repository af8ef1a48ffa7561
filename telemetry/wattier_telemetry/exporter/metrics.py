"""Every metric the exporter shows, in one table; run as a module, it prints docs/metrics.md.

The HELP and TYPE lines, the points of a device and the documentation are all made from `METRICS`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

Labels = tuple[tuple[str, str], ...]
LONGEST_LABEL = 200


class Point(NamedTuple):
    """One value of one series, as it stands in an exposition: counters end in ``_total``."""

    name: str
    labels: Labels
    value: float


class Sink(Protocol):
    """Where a sampler puts what it saw, beside showing it to whoever scrapes."""

    def add(self, time_seconds: float, points: Sequence[Point]) -> None:
        """Take one sample; never blocks for long and never raises."""

    def points(self) -> list[Point]:
        """Return the sink's own figures, which go into the next sample."""

    def close(self) -> None:
        """Keep what was taken, and stop."""


class Metric(NamedTuple):
    """One metric: what its HELP text says, and from which field of a `Reading` it comes, if it comes from one."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    unit: str
    labels: tuple[str, ...]
    field: str | None = None


DEVICE = ("uuid", "device", "domain", "source")
TRIAL = ("run", "stage", "trial", "rank")
INFO = (*DEVICE, "method", "pci_bus_id", "package", "driver_version", "vbios_version", "serial")
ENERGY, POWER, THROTTLED = "wattier_energy_joules_total", "wattier_power_watts", "wattier_throttled"
TRIAL_ENERGY = "wattier_trial_energy_joules_total"

READINGS = (
    Metric(POWER, "gauge", "Power; the mean over at least 0.1 s where only energy is counted.", "W", DEVICE),
    Metric("wattier_utilization_ratio", "gauge", "Share of time busy.", "0 to 1", DEVICE, "utilization_ratio"),
    Metric(
        "wattier_memory_utilization_ratio",
        "gauge",
        "Share of time the memory controller was busy.",
        "0 to 1",
        DEVICE,
        "memory_utilization_ratio",
    ),
    Metric("wattier_memory_used_bytes", "gauge", "Device memory in use.", "B", DEVICE, "memory_used_bytes"),
    Metric("wattier_memory_total_bytes", "gauge", "Device memory there is.", "B", DEVICE, "memory_total_bytes"),
    Metric(
        "wattier_temperature_celsius", "gauge", "Hottest core sensor.", "degrees Celsius", DEVICE, "temperature_celsius"
    ),
    Metric(
        "wattier_memory_temperature_celsius",
        "gauge",
        "Hottest memory sensor.",
        "degrees Celsius",
        DEVICE,
        "memory_temperature_celsius",
    ),
    Metric("wattier_clock_hertz", "gauge", "Compute clock.", "Hz", DEVICE, "clock_hertz"),
    Metric("wattier_memory_clock_hertz", "gauge", "Memory clock.", "Hz", DEVICE, "memory_clock_hertz"),
    Metric("wattier_power_limit_watts", "gauge", "Power cap in force.", "W", DEVICE, "power_limit_watts"),
    Metric(
        "wattier_power_limit_max_watts",
        "gauge",
        "Highest power cap the device allows.",
        "W",
        DEVICE,
        "power_limit_max_watts",
    ),
    Metric(
        "wattier_ecc_corrected_total",
        "counter",
        "Memory errors corrected since the driver loaded.",
        "errors",
        DEVICE,
        "ecc_corrected",
    ),
    Metric(
        "wattier_ecc_uncorrected_total",
        "counter",
        "Memory errors that could not be corrected.",
        "errors",
        DEVICE,
        "ecc_uncorrected",
    ),
    Metric(
        "wattier_decoder_utilization_ratio",
        "gauge",
        "Share of time the video decoders were busy.",
        "0 to 1",
        DEVICE,
        "decoder_utilization_ratio",
    ),
    Metric(
        "wattier_link_read_bytes_total", "counter", "Read over the links to other GPUs.", "B", DEVICE, "link_read_bytes"
    ),
    Metric(
        "wattier_link_written_bytes_total",
        "counter",
        "Written over the links to other GPUs.",
        "B",
        DEVICE,
        "link_written_bytes",
    ),
    Metric("wattier_compute_units", "gauge", "Compute units there are.", "units", DEVICE, "compute_units"),
    Metric(
        "wattier_compute_units_busy",
        "gauge",
        "Compute units that processes occupy at the moment.",
        "units",
        DEVICE,
        "compute_units_busy",
    ),
)

DEVICES = (
    *READINGS,
    Metric(
        ENERGY,
        "counter",
        "The device's energy counter as it stands, with an arbitrary zero; without a counter, sampled power added up. "
        "The label method says which: counter, integrated or estimated.",
        "J",
        (*DEVICE, "method"),
    ),
    Metric(
        "wattier_accounted_energy_joules_total",
        "counter",
        "Energy since the exporter first saw the device, guarded against counters that stand still or go backward. "
        "The shares of all trials plus the unattributed rest are equal to it.",
        "J",
        DEVICE,
    ),
    Metric(
        "wattier_unattributed_energy_joules_total",
        "counter",
        "Part of the accounted energy that belongs to no registered trial.",
        "J",
        ("uuid",),
    ),
    Metric(
        THROTTLED,
        "gauge",
        "1 while a reason holds the clock down, 0 for the reasons known not to; reason=none at 0 = none does.",
        "0 or 1",
        (*DEVICE, "reason"),
    ),
    Metric(
        "wattier_throttled_seconds_total",
        "counter",
        "Time each reason has held the clock down, as the device itself counts it.",
        "s",
        (*DEVICE, "reason"),
    ),
    Metric(
        "wattier_block_errors_total",
        "counter",
        "Errors by block of the device since the driver loaded: corrected, uncorrected or deferred.",
        "errors",
        (*DEVICE, "block", "kind"),
    ),
    Metric(
        "wattier_throttle_events_total",
        "counter",
        "Times a reason was seen to begin; what happens between two samples is not seen.",
        "events",
        (*DEVICE, "reason"),
    ),
    Metric("wattier_device_info", "gauge", "What the device is; always 1.", "1", INFO),
    Metric("wattier_device_up", "gauge", "Whether the device has lately answered.", "0 or 1", DEVICE),
    Metric(
        "wattier_read_errors_total",
        "counter",
        "Readings that failed since the exporter started.",
        "readings",
        ("uuid", "source"),
    ),
)

TRIALS = (
    Metric(
        "wattier_trial_info",
        "gauge",
        "Which trial uses which device; always 1. Join it on uuid to what a device does, never to its energy: "
        "trials may share a device.",
        "1",
        (*TRIAL, "uuid", "fraction", "method"),
    ),
    Metric(
        TRIAL_ENERGY,
        "counter",
        "A trial's share of the device's accounted energy, to the last sample in which its process lived. After the "
        "end it is shown in one more scrape.",
        "J",
        (*TRIAL, "uuid"),
    ),
    Metric(
        "wattier_trial_device_share_ratio",
        "gauge",
        "Part of the device's energy that the trial was billed in the last sample, and by what: its process "
        "utilization, an equal (registered) part, or the whole device.",
        "0 to 1",
        (*TRIAL, "uuid", "attribution"),
    ),
    Metric(
        "wattier_trial_metered_joules_total",
        "counter",
        "The trial's own meter, restarts included, all devices of the rank together: what its ledger says.",
        "J",
        TRIAL,
        "energy_joules",
    ),
    Metric("wattier_trial_epoch", "gauge", "Epochs finished.", "epochs", TRIAL, "epoch"),
    Metric("wattier_trial_epochs_planned", "gauge", "Epochs planned.", "epochs", TRIAL, "epochs"),
    Metric("wattier_trial_val_loss", "gauge", "Latest validation loss.", "-", TRIAL, "val_loss"),
    Metric(
        "wattier_trial_structures_per_second",
        "gauge",
        "Training speed.",
        "1/s",
        TRIAL,
        "structures_per_second",
    ),
)

EXPORTER = (
    Metric("wattier_build_info", "gauge", "Version of the exporter; always 1.", "1", ("version", "python")),
    Metric("wattier_sampling_period_seconds", "gauge", "Time between two scheduled samples.", "s", ()),
    Metric("wattier_samples_total", "counter", "Samples taken.", "samples", ("source",)),
    Metric("wattier_sampling_seconds_total", "counter", "Time spent reading.", "s", ("source",)),
    Metric("wattier_sample_seconds", "gauge", "Time the last sample took to read.", "s", ("source",)),
    Metric(
        "wattier_missed_ticks_total",
        "counter",
        "Scheduled samples that came too late to be taken.",
        "samples",
        ("source",),
    ),
    Metric("wattier_sample_age_seconds", "gauge", "Time since the source was last read.", "s", ("source",)),
    Metric("wattier_clock_offset_seconds", "gauge", "How far the wall clock was set since the start.", "s", ()),
    Metric("wattier_trials_not_shown", "gauge", "Registered trials beyond what the exporter shows.", "trials", ()),
    Metric("wattier_state_write_errors_total", "counter", "Times the joules could not be saved.", "writes", ()),
    Metric("wattier_exporter_cpu_seconds_total", "counter", "CPU time of the exporter.", "s", ()),
)

METRICS = (*DEVICES, *TRIALS, *EXPORTER)


def label(value: object) -> str:
    """Return a label's value, cut to a length that a database bears; unknown is empty."""
    return "" if value is None else str(value)[:LONGEST_LABEL]


def expose(points: Iterable[Point], metrics: Sequence[Metric] = METRICS) -> bytes:
    """Return the points in Prometheus' text format, families in the table's order, others behind them."""
    families: dict[str, list[str]] = {metric.name: [] for metric in metrics}
    known = {metric.name: metric for metric in metrics}
    for name, labels, value in points:
        families.setdefault(name, []).append(f"{name}{_braces(labels)} {_number(value)}\n")
    parts = []
    for name, lines in families.items():
        if lines:
            metric = known.get(name)
            kind = metric.kind if metric else "counter" if name.endswith("_total") else "gauge"
            text = metric.help if metric else name.replace("_", " ") + "."
            parts.append(f"# HELP {name} {_escaped(text)}\n# TYPE {name} {kind}\n")
            parts += lines
    return "".join(parts).encode()


@lru_cache(maxsize=65536)
def _braces(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_quoted(value)}"' for name, value in labels) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _quoted(text: str) -> str:
    # A lone surrogate (a file name that is not UTF-8) cannot be encoded.
    return _escaped(text).replace('"', '\\"').encode(errors="replace").decode()


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value))


def push_metrics() -> tuple[Metric, ...]:
    """Return the rows of the sink that pushes, which states them itself."""
    from wattier_telemetry.push import PUSH_METRICS

    rows = []
    for name, kind, text, labels in PUSH_METRICS:
        unit = "B" if name.endswith("bytes") else "s" if name.endswith("seconds") else "count"
        rows.append(Metric(name, "counter" if kind == "counter" else "gauge", text, unit, labels))
    return tuple(rows)


def document() -> str:
    """Return docs/metrics.md."""
    from wattier_telemetry.exporter import campaigns, omnistat

    parts = [_HEAD]
    own = (("Devices", DEVICES), ("Trials", TRIALS), ("The exporter itself", EXPORTER))
    sections = (*own, (_CAMPAIGN, campaigns.CAMPAIGN), ("Pushing (with `--push`)", push_metrics()))
    for title, metrics in sections:
        parts.append(f"\n## {title}\n\n{_rows(metrics)}")
    parts.append(f"\n## Omnistat's names\n\n{omnistat.HEAD}\n\n{_rows(omnistat.METRICS)}\n{omnistat.NOT_EXPOSED}")
    return "".join(parts)


_HEAD = """# Metrics

<!-- Made by: python -W ignore -m wattier_telemetry.exporter.metrics > docs/metrics.md -->

What `wattier-telemetry serve` shows at `/metrics`, and pushes. Units are Prometheus' base units. A figure that a device
cannot give has no series; one that has not answered for 5 s (or 5 periods, if that is longer) loses all but
`wattier_device_up`, `wattier_device_info`, its error count and its accounted joules. Labels are cut to 200 characters.
At most 1,000 pairs of trial rank and device are shown.

The bill of a trial is in its run directory. These series are for pictures and for cross-checks: take differences of raw
values (`max_over_time - min_over_time`), never `increase()` or `rate()` of joules, which extrapolate.
"""


_CAMPAIGN = """Campaigns

What only the driver of a search knows. It writes one file in the folder where trials register, about once a second, and
the exporter on its node shows these series as long as the driver lives. Where several exporters of a node read one
folder, each does, so take `max by (run, ...)`. A campaign has at most 2,000 series of trials that ended (the newest
1,000), and some 20 a stage; at most 10 campaigns a node are shown."""


def _rows(metrics: Iterable[Metric]) -> str:
    lines = ["| metric | type | unit | labels | meaning |", "|---|---|---|---|---|"]
    for metric in metrics:
        labels = ", ".join(metric.labels) or "-"
        lines.append(f"| `{metric.name}` | {metric.kind} | {metric.unit} | {labels} | {metric.help} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())
