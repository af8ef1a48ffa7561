"""Where the joules of a run went, added up from its energy journals."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from wattier.records import PhaseEnergy
from wattier.rundir import FULL_STAGE, START_UP_PHASE, RunDir
from wattier_telemetry import EnergyReport, bill
from wattier_telemetry.records import METHODS

FULL_PHASE = "full training"
ENDED_BY_ITSELF = ("complete", "pruned")
STATUSES = (*ENDED_BY_ITSELF, "failed", "interrupted")


class StatusEnergy(NamedTuple):
    """What trials of one status have cost, over all stages."""

    status: str
    trials: int
    joules: float | None


class LedgerInfo(NamedTuple):
    """Where the joules went. `total` counts a share that two phases claim once."""

    phases: tuple[PhaseEnergy, ...]
    total: PhaseEnergy
    joules_by_domain: dict[str, float]
    joules_by_method: dict[str, float]  # weakest last
    by_status: tuple[StatusEnergy, ...]


def ledger_info(run: RunDir) -> LedgerInfo:
    """Joules by phase, read from the energy journals: attempts, ranks and killed trials are all in."""
    trials = trial_bills(run)
    statuses = {(t.fidelity.stage, t.trial_id): t.status for t in run.trials()}
    phases: dict[str, list[EnergyReport]] = {}
    for folder in sorted(p for p in (run.path / "phases").glob("*") if p.is_dir()):
        phases.setdefault(_phase_name(run, folder.name), []).append(bill(folder))
    counts: dict[str, int] = {}
    for (stage, _), report in trials.items():
        phase = _stage_phase(stage)
        phases.setdefault(phase, []).append(report)
        counts[phase] = counts.get(phase, 0) + 1
    order = [
        "data",
        START_UP_PHASE,
        *(_stage_phase(stage) for stage in stages_in_order(run, {key[0] for key in trials})),
        "evaluation",
    ]
    known = [name for name in order if name in phases]
    names = known + sorted(set(phases) - set(known))
    total = add_up(chain.from_iterable(phases.values()))
    by_status = {status: [r for key, r in trials.items() if _status(statuses, key) == status] for status in STATUSES}
    return LedgerInfo(
        phases=tuple(phase_of(name, add_up(phases[name]), counts.get(name, 0)) for name in names),
        total=phase_of("total", total, len(trials)),
        joules_by_domain=total.joules_by_domain,
        joules_by_method=_by_method(total),
        by_status=tuple(StatusEnergy(s, len(r), add_up(r).joules) for s, r in by_status.items() if r),
    )


def add_up(reports: Iterable[EnergyReport]) -> EnergyReport:
    """The sum of many reports in one pass; adding them pair by pair takes quadratic time."""
    every = list(reports)
    return EnergyReport.of(
        chain.from_iterable(report.shares for report in every), chain.from_iterable(report.warnings for report in every)
    )


def trial_folders(run: RunDir) -> list[tuple[str, str]]:
    """Stage and trial id of every trial that wrote something, recorded or not."""
    found: list[Path] = [p for p in sorted((run.path / "trials").glob("*/*")) if p.is_dir()]
    return [(path.parent.name, path.name) for path in found]


def trial_bills(run: RunDir, stages: Collection[str] | None = None) -> dict[tuple[str, str], EnergyReport]:
    """What each trial owes: by its record where that is its last word, else by its journals, if its folder is there.

    stages: None = all.

    A trial that ended by itself wrote its result when all of its ranks had closed their meters, so its record is the
    sum of its journals, of which there may be thousands. A failed one may have had ranks that went on for a while;
    where its journals are gone, its record still knows.
    """
    folders = [key for key in trial_folders(run) if stages is None or key[0] in stages]
    rows = [t for t in run.trials() if stages is None or t.fidelity.stage in stages]
    records = {(t.fidelity.stage, t.trial_id): t for t in rows}
    ended = {key for key, trial in records.items() if trial.status in ENDED_BY_ITSELF}
    bills = {key: trial.energy for key, trial in records.items()}
    journals = {key: bill(run.trial_folder(*key)) for key in folders if key not in ended}
    return bills | {key: found for key, found in journals.items() if found.joules is not None or key not in bills}


def stages_in_order(run: RunDir, seen: set[str]) -> list[str]:
    """Stages in the order of the funnel, then those the config does not know."""
    order = [*(stage.name for stage in run.config().search.stages), FULL_STAGE]
    return order + sorted(seen - set(order))


def _stage_phase(stage: str) -> str:
    return FULL_PHASE if stage == FULL_STAGE else f"search:{stage}"


def _phase_name(run: RunDir, folder: str) -> str:
    is_stage = folder == FULL_STAGE or folder in {stage.name for stage in run.config().search.stages}
    return _stage_phase(folder) if is_stage else folder


def _status(statuses: dict[tuple[str, str], Any], key: tuple[str, str]) -> str:
    return str(statuses.get(key, "interrupted"))


def _by_method(report: EnergyReport) -> dict[str, float]:
    parts = {m: [s.joules for s in report.shares if s.method == m and s.joules is not None] for m in METHODS}
    return {method: math.fsum(joules) for method, joules in parts.items() if joules}


def phase_of(name: str, report: EnergyReport, trials: int) -> PhaseEnergy:
    """The bill of a phase."""
    coverage = report.coverage_ratio if report.shares else None
    bounds = report.stated_bounds_joules
    return PhaseEnergy(name, report.joules, report.method, coverage, trials, report.warnings, *bounds)
