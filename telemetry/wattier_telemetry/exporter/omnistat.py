"""The same figures under Omnistat's names, so that a site can change the exporter and keep its Grafana.

Names, labels and units are those of Omnistat 1.14 (its SMI, RMS and info collectors). Everything is a gauge there.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wattier_telemetry.exporter.attribution import Key
from wattier_telemetry.exporter.metrics import Labels, Metric, Point, label
from wattier_telemetry.exporter.series import Node, version
from wattier_telemetry.exporter.watched import Watched
from wattier_telemetry.records import Device, ErrorCounts, Reading

JOB_FILE_VARIABLE = "WATTIER_OMNISTAT_JOB_FILE"
DEFAULT_JOB_FILE = "/tmp/omni_rmsjobinfo"  # where its prolog writes it
SCHEMA = "1.0"
_CARD = ("card",)
_SOURCE, _PLACE = ("card", "source"), ("card", "location")
_JOB = ("jobid", "user", "partition", "nodes", "batchflag", "jobstep", "type")
RAS_BLOCKS = ("umc", "sdma", "gfx", "mmhub", "athub", "pcie_bif", "hdp", "xgmi_wafl")
RAS_KINDS = ("correctable", "uncorrectable", "deferred")
_HEAT = ("thermal", "thrm", "temperature", "prochot")


def _gauge(name: str, text: str, unit: str, labels: tuple[str, ...] = _CARD) -> Metric:
    return Metric(name, "gauge", text, unit, labels)


METRICS: tuple[Metric, ...] = (
    _gauge("rocm_num_gpus", "GPUs of the node.", "GPUs", ()),
    _gauge(
        "rocm_version_info",
        "What the GPU is; always 1.",
        "1",
        ("card", "driver_ver", "vbios", "type", "serial", "schema"),
    ),
    _gauge("rocm_utilization_percentage", "Share of time busy.", "%"),
    _gauge("rocm_vram_used_percentage", "Device memory in use.", "%"),
    _gauge("rocm_vram_total_bytes", "Device memory there is.", "B"),
    _gauge("rocm_vram_busy_percentage", "Share of time the memory controller was busy.", "%"),
    _gauge("rocm_average_socket_power_watts", "Power. Of two dies in one package, each has its part.", "W", _SOURCE),
    _gauge("rocm_energy_joules", "Energy counter with an arbitrary zero.", "J"),
    _gauge("rocm_sclk_clock_mhz", "Compute clock.", "MHz", _SOURCE),
    _gauge("rocm_mclk_clock_mhz", "Memory clock.", "MHz", _SOURCE),
    _gauge("rocm_temperature_celsius", "Hottest core sensor.", "degrees Celsius", _PLACE),
    _gauge("rocm_temperature_memory_celsius", "Hottest memory sensor.", "degrees Celsius", _PLACE),
    _gauge("rocm_power_cap_watts", "Power cap in force.", "W"),
    *(
        _gauge(f"rocm_ras_{block}_{kind}_count", f"Errors of the block {block}: {kind}.", "errors")
        for block in RAS_BLOCKS
        for kind in RAS_KINDS
    ),
    _gauge("rocm_num_compute_units", "Compute units there are.", "CUs"),
    _gauge("rocm_compute_unit_occupancy", "Compute units that processes occupy.", "CUs"),
    _gauge("rocm_xgmi_total_read_kilobytes", "Read over the links to other GPUs.", "KB"),
    _gauge("rocm_xgmi_total_write_kilobytes", "Written over the links to other GPUs.", "KB"),
    _gauge("rocm_average_decoder_utilization_percentage", "Share of time the video decoders were busy.", "%"),
    _gauge("rocm_throttle_events", "Times a thermal reason was seen to begin.", "events"),
    _gauge("rmsjob_info", "The job on this node; all labels empty when there is none.", "1", _JOB),
    _gauge(
        "rmsjob_annotations",
        "Start of a trial (marker: run/stage/trial), seconds since 1970; 0 once when it has ended.",
        "s",
        ("marker", "jobid"),
    ),
    _gauge("omnistat_info", "Version and mode; always 1.", "1", ("version", "mode", "schema")),
)

HEAD = f"""With `--names omnistat` these are shown beside Wattier's own. `card` is the GPU's position among all GPUs
of the node. `rmsjob_info` comes from Omnistat's job file (`{DEFAULT_JOB_FILE}`, or the path in
`{JOB_FILE_VARIABLE}`), otherwise from the environment of Slurm, Flux or PBS in which the exporter was
started. Pushed series carry `instance` (the host) as Omnistat's do; they carry no `user`."""

NOT_EXPOSED = """
Not exposed are the series of other collectors: `omnistat_host_*`, `omnistat_network_*`, `omnistat_vendor_*` (Wattier's
source `cray` has these joules), `omnistat_hardware_counter`, `omnistat_kernel_*`, `omnistat_fom`, `omnistat_perf_*`.
"""


class OmnistatView:
    """Omnistat's names.

    Args:
        environment: Where the resource manager's variables are.
    """

    metrics: Sequence[Metric] = METRICS

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._environment = dict(environment)
        self._file = Path(self._environment.get(JOB_FILE_VARIABLE) or DEFAULT_JOB_FILE)
        self._stamp: tuple[int, int] | None = None
        self._job: dict[str, str] = {}

    def devices(self, watches: Iterable[Watched], node: Node) -> Iterator[Point]:
        """Yield what is said of these devices; only GPUs have such names."""
        for watched in watches:
            if watched.card is not None:
                card: Labels = (("card", str(watched.card)),)
                yield Point("rocm_version_info", (*card, *_version(watched.device)), 1.0)
                if watched.device.uuid in node.fresh and watched.reading is not None:
                    yield from _measured(watched, watched.reading, card)

    def common(self, node: Node) -> Iterator[Point]:
        """Yield the number of GPUs, the job, its trials, and who says so."""
        yield Point("rocm_num_gpus", (), sum(watched.card is not None for watched in node.watched))
        job = self.job()
        yield Point("rmsjob_info", tuple((name, job.get(name, "")) for name in _JOB), 1.0)
        jobid = ("jobid", job.get("jobid", ""))
        running: dict[str, float] = {}
        for key in node.trials:
            since = node.started.get(key, 0.0)
            running[_marker(key)] = min(since, running.get(_marker(key), since))
        for marker in dict.fromkeys(_marker(ended.key) for ended in node.ended):
            running.setdefault(marker, 0.0)
        for marker, seconds in running.items():
            yield Point("rmsjob_annotations", (("marker", marker), jobid), seconds)
        about = (("version", version()), ("mode", "wattier"), ("schema", SCHEMA))
        yield Point("omnistat_info", about, 1.0)

    def job(self) -> dict[str, str]:
        """Return the labels of the job on this node, or nothing."""
        stamp = None
        with contextlib.suppress(OSError):
            status = self._file.stat()
            stamp = (status.st_mtime_ns, status.st_size)
        if stamp is None:
            self._stamp = None
            return _from_environment(self._environment)
        if stamp != self._stamp:
            try:
                self._job = _from_file(json.loads(self._file.read_bytes()))
                self._stamp = stamp
            except (OSError, ValueError):  # being written just now: look again next time
                self._stamp = None
        return self._job


def _measured(watched: Watched, reading: Reading, card: Labels) -> Iterator[Point]:
    total, used = reading.memory_total_bytes, reading.memory_used_bytes
    averaged = watched.device.power_average_seconds > 0
    power = (*card, ("source", "average_socket_power" if averaged else "current_socket_power"))
    core, memory = (*card, ("location", "hotspot")), (*card, ("location", "vram"))
    rows: tuple[tuple[str, Labels, float | None], ...] = (
        ("rocm_utilization_percentage", card, _scaled(reading.utilization_ratio, 100)),
        ("rocm_vram_used_percentage", card, 100 * used / total if used is not None and total else None),
        ("rocm_vram_total_bytes", card, total),
        ("rocm_vram_busy_percentage", card, _scaled(reading.memory_utilization_ratio, 100)),
        ("rocm_average_socket_power_watts", power, watched.power_watts),
        ("rocm_energy_joules", card, reading.energy_joules),
        ("rocm_sclk_clock_mhz", (*card, ("source", "current_gfxclk")), _scaled(reading.clock_hertz, 1e-6)),
        ("rocm_mclk_clock_mhz", (*card, ("source", "current_uclk")), _scaled(reading.memory_clock_hertz, 1e-6)),
        ("rocm_temperature_celsius", core, reading.temperature_celsius),
        ("rocm_temperature_memory_celsius", memory, reading.memory_temperature_celsius),
        ("rocm_power_cap_watts", card, reading.power_limit_watts),
        ("rocm_num_compute_units", card, reading.compute_units),
        ("rocm_compute_unit_occupancy", card, reading.compute_units_busy),
        ("rocm_xgmi_total_read_kilobytes", card, _scaled(reading.link_read_bytes, 1 / 1024)),
        ("rocm_xgmi_total_write_kilobytes", card, _scaled(reading.link_written_bytes, 1 / 1024)),
        ("rocm_average_decoder_utilization_percentage", card, _scaled(reading.decoder_utilization_ratio, 100)),
        *_errors(reading, card),
    )
    yield from (Point(name, labels, value) for name, labels, value in rows if value is not None)
    if reading.throttle_reasons is not None or reading.throttle_seconds is not None:
        events = sum(count for reason, count in watched.events.items() if any(word in reason for word in _HEAT))
        yield Point("rocm_throttle_events", card, events)


def _errors(reading: Reading, card: Labels) -> Iterator[tuple[str, Labels, float | None]]:
    """Yield errors by block; a device that does not tell blocks apart counts errors of its memory."""
    blocks = reading.errors_by_block
    if blocks is None:
        blocks = {"umc": ErrorCounts(reading.ecc_corrected, reading.ecc_uncorrected, None)}
    for block in RAS_BLOCKS:
        for kind, count in zip(RAS_KINDS, blocks.get(block, ()), strict=False):
            yield f"rocm_ras_{block}_{kind}_count", card, count


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _version(device: Device) -> Labels:
    return (
        ("driver_ver", label(device.driver_version)),
        ("vbios", label(device.vbios_version)),
        ("type", label(device.name)),
        ("serial", label(device.serial)),
        ("schema", SCHEMA),
    )


def _marker(key: Key) -> str:
    return label("/".join(key[:3]))


def _from_file(data: Any) -> dict[str, str]:
    """Read the JSON that Omnistat's prolog writes."""
    if not isinstance(data, dict):
        return {}
    names = ("JOB_ID", "JOB_USER", "JOB_PARTITION", "JOB_NUM_NODES", "JOB_BATCHMODE", "STEP_ID", "TYPE")
    return {ours: label(data.get(f"RMS_{theirs}")) for ours, theirs in zip(_JOB, names, strict=True)}


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Say of the job what its own environment tells."""
    get = environment.get
    if jobid := get("SLURM_JOB_ID"):
        step = get("SLURM_STEP_ID", "")
        inside = step.isdecimal() and int(step) < 4_000_000_000  # Slurm's mark for "in no step"
        batch = "0" if "SLURM_PTY_PORT" in environment else "1"
        values = (jobid, get("SLURM_JOB_USER"), get("SLURM_JOB_PARTITION"), get("SLURM_JOB_NUM_NODES"), batch)
        return _labels(*values, step if inside else "-1", "slurm")
    if jobid := get("FLUX_JOB_ID"):
        return _labels(jobid, _user(), get("FLUX_JOB_QUEUE"), get("FLUX_JOB_NNODES"), "1", "-1", "flux")
    if jobid := get("PBS_JOBID"):
        nodes = None
        with contextlib.suppress(OSError):
            nodes = str(len(set(Path(get("PBS_NODEFILE", "")).read_text().split())))
        batch = "0" if "INTERACTIVE" in get("PBS_ENVIRONMENT", "") else "1"
        user = get("PBS_O_LOGNAME") or _user()
        return _labels(jobid.split(".")[0], user, get("PBS_QUEUE"), nodes, batch, "-1", "pbs")
    return {}


def _labels(*values: str | None) -> dict[str, str]:
    return {name: label(value) for name, value in zip(_JOB, values, strict=True)}


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return None
