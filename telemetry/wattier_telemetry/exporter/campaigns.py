"""The campaigns whose drivers live on this node: which files say so, and the series made of them."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from wattier_telemetry.campaign import MOST_TRIALS, STATUSES, SUFFIX, CampaignRegistration, load_campaign
from wattier_telemetry.exporter.metrics import Labels, Metric, Point, label
from wattier_telemetry.registration import default_folder, is_alive

MOST_CAMPAIGNS = 10  # of this node's drivers: what bounds the number of series
_PAUSE_SECONDS = 0.25  # between two looks at the folder

Stamp = tuple[int, int, int]

RUN, STAGE, PHASE, BUDGET, FORECAST = (
    ("run",),
    ("run", "stage"),
    ("run", "phase"),
    ("run", "budget"),
    ("run", "forecast"),
)
ENDED = ("run", "stage", "trial", "status")
CAMPAIGN = tuple(
    Metric(f"wattier_campaign_{name}", "gauge", text, unit, labels)
    for name, text, unit, labels in (
        ("info", "What the driver does, and where to read more; always 1.", "1", (*PHASE, "report", "ray_dashboard")),
        ("started_timestamp_seconds", "When the driver began, since 1970.", "s", RUN),
        ("updated_timestamp_seconds", "When the driver last said how it stands, since 1970.", "s", RUN),
        ("trials_planned", "Trials a stage has in the end.", "trials", STAGE),
        (
            "trials",
            f"Trials by how they stand: {', '.join(STATUSES)}. They add up to those planned.",
            "trials",
            (*STAGE, "status"),
        ),
        (
            "failures",
            "Trials that failed or diverged, by why: out_of_memory, diverged, killed, node_lost, stalled, over_budget, "
            "error.",
            "trials",
            (*STAGE, "reason"),
        ),
        ("best_val_loss", "Lowest validation loss of the trials that finished the stage.", "-", STAGE),
        (
            "hypervolume",
            "Area that the finished trials of a stage dominate in (loss, J), with the reference point that the worst "
            "of them give at the time, as in selection.json.",
            "J",
            STAGE,
        ),
        ("energy_joules", "Energy of a phase so far, killed and failed trials included: the ledger.", "J", PHASE),
        (
            "energy_low_joules",
            "The true energy of a phase is not below, as far as the meters can say; not of estimates.",
            "J",
            PHASE,
        ),
        (
            "energy_high_joules",
            "The true energy of a phase is not above, as far as the meters can say; not of estimates.",
            "J",
            PHASE,
        ),
        ("budget_joules", "What may be spent.", "J", BUDGET),
        ("budget_spent_joules", "What is spent of it.", "J", BUDGET),
        (
            "budget_used_ratio",
            "Share of a limit that is used up; resource: joules, seconds, trials.",
            "from 0",
            (*BUDGET, "resource"),
        ),
        ("projected_joules", "What a part of the campaign will have taken in the end.", "J", FORECAST),
        ("completion_timestamp_seconds", "When a part of the campaign is expected to end, since 1970.", "s", FORECAST),
        ("trial_val_loss", f"Loss of a trial that ended; the newest {MOST_TRIALS:,} are shown.", "-", ENDED),
        ("trial_joules", f"Bill of a trial that ended; the newest {MOST_TRIALS:,} are shown.", "J", ENDED),
        ("trials_not_shown", "Trials that ended and are not shown one by one.", "trials", RUN),
    )
)


class Campaigns:
    """Watches the folder where drivers register; safe to use from several threads.

    Args:
        folder: Where they register. None = the default folder of this user.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._files: dict[str, tuple[Stamp, CampaignRegistration | None]] = {}
        self._lock = threading.Lock()
        self._looked_at = float("-inf")
        self._living: tuple[CampaignRegistration, ...] = ()

    def refresh(self) -> tuple[CampaignRegistration, ...]:
        """Return whose driver lives; the same object as long as nothing changed."""
        with self._lock:
            if time.monotonic() - self._looked_at < _PAUSE_SECONDS:
                return self._living
            self._looked_at = time.monotonic()
            with contextlib.suppress(OSError):
                self._scan()
            by_run = {
                campaign.run: campaign for _, (_, campaign) in sorted(self._files.items()) if campaign is not None
            }
            found = list(by_run.values())  # of a name one, for a series may be on a page once
            if (living := tuple(found[:MOST_CAMPAIGNS])) != self._living:
                self._living = living
            return self._living

    def _scan(self) -> None:
        found = {}
        self._folder = default_folder() if self._folder is None else self._folder
        if self._folder.is_dir():
            with os.scandir(self._folder) as scan:
                entries = [entry for entry in scan if entry.name.endswith(SUFFIX) and entry.name[0] != "."]
            for entry in sorted(entries, key=lambda entry: entry.name)[: 10 * MOST_CAMPAIGNS]:
                with contextlib.suppress(OSError):
                    found[entry.name] = self._look_at(entry)
        self._files = found

    def _look_at(self, entry: os.DirEntry[str]) -> tuple[Stamp, CampaignRegistration | None]:
        status = entry.stat(follow_symlinks=False)
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        before, campaign = self._files.get(entry.name, (None, None))
        if before != stamp or (campaign is not None and not is_alive(campaign.pid, status.st_mtime)):
            campaign = None
            with contextlib.suppress(ValueError, TypeError):
                campaign = load_campaign(Path(entry.path))
        return stamp, campaign


def campaign_points(campaign: CampaignRegistration) -> Iterator[Point]:
    """Yield what is known of a campaign; what is not has no series."""
    run = (("run", label(campaign.run)),)
    info = {"phase": campaign.phase, "report": campaign.report, "ray_dashboard": campaign.ray_dashboard}
    yield Point("wattier_campaign_info", (*run, *((name, label(text)) for name, text in info.items())), 1.0)
    yield from _known("started_timestamp_seconds", run, campaign.started_seconds)
    yield from _known("updated_timestamp_seconds", run, campaign.updated_seconds)
    yield from _stages(campaign, run)
    for phase in campaign.phases:
        labels = (*run, ("phase", label(phase.phase)))
        yield from _known("energy_joules", labels, phase.joules)
        yield from _known("energy_low_joules", labels, phase.joules_low)
        yield from _known("energy_high_joules", labels, phase.joules_high)
    for budget in campaign.budgets:
        labels = (*run, ("budget", label(budget.budget)))
        yield from _known("budget_joules", labels, budget.joules)
        yield from _known("budget_spent_joules", labels, budget.spent_joules)
        for resource, ratio in budget.used_ratios.items():
            yield from _known("budget_used_ratio", (*labels, ("resource", resource)), ratio)
    for forecast in campaign.forecasts:
        labels = (*run, ("forecast", label(forecast.forecast)))
        yield from _known("projected_joules", labels, forecast.joules)
        yield from _known("completion_timestamp_seconds", labels, forecast.ends_seconds)


def _stages(campaign: CampaignRegistration, run: Labels) -> Iterator[Point]:
    for stage in campaign.stages:
        labels = (*run, ("stage", label(stage.stage)))
        yield from _known("trials_planned", labels, stage.planned)
        for status, count in stage.statuses.items():
            yield from _known("trials", (*labels, ("status", status)), count)
        for reason, count in stage.failures.items():
            yield from _known("failures", (*labels, ("reason", reason)), count)
        yield from _known("best_val_loss", labels, stage.best_val_loss)
        yield from _known("hypervolume", labels, stage.hypervolume)
    for trial in campaign.trials:
        names = {"stage": trial.stage, "trial": trial.trial, "status": trial.status}
        labels = (*run, *((name, label(text)) for name, text in names.items()))
        yield from _known("trial_val_loss", labels, trial.val_loss)
        yield from _known("trial_joules", labels, trial.joules)
    yield from _known("trials_not_shown", run, campaign.not_shown)


def _known(name: str, labels: Labels, value: float | None) -> Iterator[Point]:
    if value is not None:
        yield Point(f"wattier_campaign_{name}", labels, float(value))
