"""What the sampler knows, as points under Wattier's own names."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import NamedTuple, Protocol

from wattier_telemetry.campaign import CampaignRegistration
from wattier_telemetry.exporter.attribution import MICRO, Key
from wattier_telemetry.exporter.campaigns import CAMPAIGN, campaign_points
from wattier_telemetry.exporter.metrics import (
    ENERGY,
    METRICS,
    POWER,
    READINGS,
    THROTTLED,
    TRIAL,
    TRIAL_ENERGY,
    TRIALS,
    Labels,
    Metric,
    Point,
    label,
)
from wattier_telemetry.exporter.watched import Watched
from wattier_telemetry.records import Reading
from wattier_telemetry.registration import TrialRegistration


class Ended(NamedTuple):
    """A trial that is over, shown once more."""

    key: Key
    joules: Mapping[str, float]  # by device uuid


class LaneState(NamedTuple):
    """How reading one source goes."""

    source: str
    samples: int
    missed: int
    seconds: float
    last_seconds: float
    age_seconds: float | None


class Node(NamedTuple):
    """One look at everything the sampler knows; consistent, for it is taken under the sampler's lock."""

    watched: Sequence[Watched]
    fresh: frozenset[str]  # uuids of devices whose reading is not too old
    trials: Mapping[Key, TrialRegistration]
    started: Mapping[Key, float]  # when each trial was first seen, s since 1970
    ended: Sequence[Ended]
    lanes: Sequence[LaneState]
    period_seconds: float
    offset_seconds: float
    not_shown: int
    state_errors: int
    campaigns: Sequence[CampaignRegistration] = ()


class View(Protocol):
    """A set of names for the same figures."""

    metrics: Sequence[Metric]

    def devices(self, watches: Iterable[Watched], node: Node) -> Iterator[Point]:
        """Yield what is said of these devices."""

    def common(self, node: Node) -> Iterator[Point]:
        """Yield what is said of the node and its trials."""


class WattierView:
    """Wattier's own names."""

    metrics: Sequence[Metric] = (*METRICS, *CAMPAIGN)

    def devices(self, watches: Iterable[Watched], node: Node) -> Iterator[Point]:
        """Yield what is said of these devices, and each trial's share of them."""
        for watched in watches:
            fresh = watched.device.uuid in node.fresh
            yield from _standing(watched, fresh=fresh)
            if fresh:
                yield from _reading(watched)
            if watched.billed:
                yield from _shares(watched, node)

    def common(self, node: Node) -> Iterator[Point]:
        """Yield trials, campaigns and the exporter itself."""
        for key, trial in node.trials.items():
            yield from _trial(key, trial)
        for ended in node.ended:
            for uuid, joules in ended.joules.items():
                yield Point(TRIAL_ENERGY, (*trial_labels(ended.key), ("uuid", label(uuid))), joules)
        for campaign in node.campaigns:
            yield from campaign_points(campaign)
        yield from _exporter(node)


def trial_labels(key: Key) -> Labels:
    """Return a trial's labels."""
    return tuple(zip(TRIAL, key, strict=True))


def _standing(watched: Watched, *, fresh: bool) -> Iterator[Point]:
    """What is said of a device whether or not it answers."""
    yield Point("wattier_device_info", watched.info, 1.0)
    yield Point("wattier_device_up", watched.labels, float(fresh))
    yield Point("wattier_read_errors_total", (*watched.uuid, watched.labels[3]), watched.errors)


def _errors(reading: Reading, labels: Labels) -> Iterator[Point]:
    for block, counts in (reading.errors_by_block or {}).items():
        for kind, count in counts._asdict().items():
            if count is not None:
                yield Point("wattier_block_errors_total", (*labels, ("block", label(block)), ("kind", kind)), count)


def _reading(watched: Watched) -> Iterator[Point]:
    reading, labels = watched.reading, watched.labels
    if reading is None:
        return
    if watched.power_watts is not None:
        yield Point(POWER, labels, watched.power_watts)
    for metric in READINGS:
        value = None if metric.field is None else getattr(reading, metric.field)
        if value is not None:
            yield Point(metric.name, labels, value)
    if reading.energy_joules is not None:
        yield Point(ENERGY, (*labels, ("method", watched.device.method)), reading.energy_joules)
    elif not watched.has_counter and reading.power_watts is not None:
        yield Point(ENERGY, (*labels, ("method", "integrated")), watched.ledger.total / MICRO)
    acting = reading.throttle_reasons
    if acting is not None:
        for reason in (*watched.events, *(("none",) if not acting else ())):
            yield Point(THROTTLED, (*labels, ("reason", label(reason))), float(reason in acting))
        for reason, events in watched.events.items():
            yield Point("wattier_throttle_events_total", (*labels, ("reason", label(reason))), events)
    for reason, seconds in (reading.throttle_seconds or {}).items():
        yield Point("wattier_throttled_seconds_total", (*labels, ("reason", label(reason))), seconds)
    yield from _errors(reading, labels)


def _shares(watched: Watched, node: Node) -> Iterator[Point]:
    ledger = watched.ledger
    yield Point("wattier_accounted_energy_joules_total", watched.labels, ledger.total / MICRO)
    yield Point("wattier_unattributed_energy_joules_total", watched.uuid, ledger.rest / MICRO)
    for key in watched.present:
        if key not in node.trials:
            continue
        labels = (*trial_labels(key), *watched.uuid)
        yield Point(TRIAL_ENERGY, labels, ledger.shares.get(key, 0) / MICRO)
        if key in watched.latest.weights:
            attribution = ("attribution", watched.latest.attribution)
            yield Point("wattier_trial_device_share_ratio", (*labels, attribution), watched.latest.weights[key])


def _trial(key: Key, trial: TrialRegistration) -> Iterator[Point]:
    labels = trial_labels(key)
    more = (("fraction", f"{trial.fraction:g}"), ("method", trial.method or ""))
    for uuid in dict.fromkeys(label(uuid) for uuid in trial.device_uuids or ("",)):
        yield Point("wattier_trial_info", (*labels, ("uuid", uuid), *more), 1.0)
    for metric in TRIALS:
        value = None if metric.field is None else getattr(trial, metric.field)
        if value is not None and math.isfinite(value):
            yield Point(metric.name, labels, value)


def _exporter(node: Node) -> Iterator[Point]:
    yield Point("wattier_build_info", (("version", version()), ("python", platform.python_version())), 1.0)
    yield Point("wattier_sampling_period_seconds", (), node.period_seconds)
    for lane in node.lanes:
        source = (("source", lane.source),)
        yield Point("wattier_samples_total", source, lane.samples)
        yield Point("wattier_sampling_seconds_total", source, lane.seconds)
        yield Point("wattier_sample_seconds", source, lane.last_seconds)
        yield Point("wattier_missed_ticks_total", source, lane.missed)
        if lane.age_seconds is not None:
            yield Point("wattier_sample_age_seconds", source, lane.age_seconds)
    yield Point("wattier_clock_offset_seconds", (), node.offset_seconds)
    yield Point("wattier_trials_not_shown", (), node.not_shown)
    yield Point("wattier_state_write_errors_total", (), node.state_errors)
    yield Point("wattier_exporter_cpu_seconds_total", (), time.process_time())


def version() -> str:
    """Return Wattier's version."""
    try:
        return metadata.version("wattier")
    except metadata.PackageNotFoundError:  # run from a copied folder
        return "unknown"
