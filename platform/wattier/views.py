"""What a run has to say, as plain tuples: console, figures, report and tests all read these."""

from __future__ import annotations

import math
import statistics
from typing import Any, NamedTuple

from wattier.ledger import LedgerInfo, StatusEnergy, ledger_info, stages_in_order, trial_folders
from wattier.records import EpochRecord, Selection, TrialResult
from wattier.rundir import FULL_STAGE, RunDir
from wattier.select import compare, split_candidates
from wattier_telemetry import bill

__all__ = [
    "Curve",
    "EvaluationInfo",
    "LedgerInfo",
    "ParetoInfo",
    "ParetoPoint",
    "PickRow",
    "ProjectionInfo",
    "SelectionInfo",
    "StatusEnergy",
    "TrialRow",
    "TrialsInfo",
    "evaluation_info",
    "learning_curves_info",
    "ledger_info",
    "pareto_info",
    "projection_info",
    "selection_info",
    "trials_info",
]


class TrialRow(NamedTuple):
    """One trial of one stage; a folder without a record is an interrupted (or still running) trial."""

    stage: str
    trial_id: str
    status: str
    params: dict[str, Any]
    val_loss: float | None
    energy_joules: float | None
    energy_method: str | None
    epochs_done: int
    epochs: int | None
    wall_seconds: float | None
    n_parameters: int | None
    tier: str | None
    note: str  # error, or why it is no candidate
    throttled_ratio: float | None = None
    throttled: bool = False  # its joules and seconds are not comparable
    joules_low: float | None = None
    joules_high: float | None = None
    coverage_ratio: float | None = None
    mean_watts: float | None = None
    peak_memory_bytes: int | None = None
    started_at: str | None = None
    devices: tuple[str, ...] = ()


class TrialsInfo(NamedTuple):
    """All trials, stage by stage in the order of the funnel."""

    rows: tuple[TrialRow, ...]
    param_names: tuple[str, ...]


class ParetoPoint(NamedTuple):
    """A trial with a loss and joules. kind: a tier's name, `candidate`, or the status of one that is not compared."""

    trial_id: str
    val_loss: float
    energy_joules: float
    kind: str
    on_front: bool
    epochs_done: int
    epochs: int
    is_candidate: bool = False
    params: dict[str, Any] = {}  # noqa: RUF012  (of a tuple, which nobody changes)
    throttled: bool = False


class ParetoInfo(NamedTuple):
    """Loss and joules of the trials of one stage; the front holds candidates alone, cheapest first."""

    stage: str
    points: tuple[ParetoPoint, ...]
    front: tuple[tuple[float, float], ...]  # val_loss, energy_joules
    hypervolume: float | None
    reference_point: tuple[float, float] | None
    not_shown: tuple[str, ...]  # trial ids without a loss or without joules


class PickRow(NamedTuple):
    """A picked trial, and its full training once that is done."""

    tier: str
    trial_id: str
    reason: str
    search: TrialRow | None
    full: TrialRow | None


class SelectionInfo(NamedTuple):
    """The tiers with their numbers."""

    selection: Selection
    rows: tuple[PickRow, ...]
    saved_joules: float | None  # full training of all candidates minus that of the picks
    excluded: tuple[tuple[str, str], ...]


class EvaluationInfo(NamedTuple):
    """The released ensemble against held-out structures, as ``evaluation.json`` has it; a number may be None."""

    members: tuple[dict[str, Any], ...]
    sources: dict[str, dict[str, Any]]
    calibration: dict[str, dict[str, Any]]
    parity: dict[str, dict[str, list[float | None]]]
    more: dict[str, Any] = {}  # noqa: RUF012  (of a tuple, which nobody changes): intervals, weights, pooled ...


class ProjectionInfo(NamedTuple):
    """What finished search trials cost against what was projected before they started."""

    stage: str
    trials: int
    median_error_ratio: float  # of |measured - projected| / measured
    joules: float
    projected_joules: float


class Curve(NamedTuple):
    """Validation loss and joules so far of one trial, [epochs] each."""

    stage: str
    trial_id: str
    status: str
    tier: str | None
    epochs: tuple[int, ...]
    val_loss: tuple[float | None, ...]
    energy_joules: tuple[float | None, ...]


def trials_info(run: RunDir) -> TrialsInfo:
    """Every trial there is a record or a folder of."""
    selection = run.selection()
    records = {(t.fidelity.stage, t.trial_id): t for t in run.trials()}
    keys = dict.fromkeys([*records, *trial_folders(run)])
    stages = stages_in_order(run, {stage for stage, _ in keys})
    rows = [
        _row(records[key], selection) if key in records else _row_without_record(run, *key, selection)
        for key in sorted(keys, key=lambda key: (stages.index(key[0]), key[1]))
    ]
    names = dict.fromkeys(name for row in rows for name in row.params)
    return TrialsInfo(tuple(rows), tuple(names))


def pareto_info(run: RunDir) -> ParetoInfo | None:
    """Accuracy against energy in the selected stage, or in the last search stage with trials; None before any."""
    selection = run.selection()
    stage = selection.stage if selection else _last_search_stage(run)
    if stage is None:
        return None
    trials = run.trials(stage)
    candidates, _ = split_candidates(trials, stage=stage)
    field = compare(candidates) if candidates else None
    on_front = {s.trial.trial_id for s in field.standings if s.rank == 0} if field else set()
    ids = {t.trial_id for t in candidates}
    points = []
    for trial in trials:
        joules, loss = trial.energy_joules, trial.val_loss
        if joules is None or loss is None or not math.isfinite(loss):
            continue
        kind = _tier(selection, stage, trial.trial_id) or ("candidate" if trial.trial_id in ids else trial.status)
        is_on_front = trial.trial_id in on_front
        points.append(
            ParetoPoint(
                trial.trial_id, loss, joules, kind, is_on_front, trial.epochs_done, trial.fidelity.epochs,
                trial.trial_id in ids, trial.params, trial.throttled,
            )
        )  # fmt: skip
    front = sorted({(p.val_loss, p.energy_joules) for p in points if p.on_front}, key=lambda point: point[::-1])
    shown = {p.trial_id for p in points}
    return ParetoInfo(
        stage=stage,
        points=tuple(points),
        front=tuple(front),
        hypervolume=field.hypervolume if field else None,
        reference_point=field.reference_point if field else None,
        not_shown=tuple(t.trial_id for t in trials if t.trial_id not in shown),
    )


def selection_info(run: RunDir) -> SelectionInfo | None:
    """The tiers with the numbers of their trials; None before `wattier select`."""
    selection = run.selection()
    if selection is None:
        return None
    rows = {(row.stage, row.trial_id): row for row in trials_info(run).rows}
    picks = tuple(
        PickRow(
            tier=tier.name,
            trial_id=pick.trial_id,
            reason=pick.reason,
            search=rows.get((selection.stage, pick.trial_id)),
            full=rows.get((FULL_STAGE, pick.trial_id)),
        )
        for tier in selection.tiers
        for pick in tier.picks
    )
    every, chosen = selection.projected_joules_all, selection.projected_joules
    saved = every - chosen if every is not None and chosen is not None else None
    return SelectionInfo(selection, picks, saved, tuple(sorted(selection.excluded.items())))


def evaluation_info(run: RunDir) -> EvaluationInfo | None:
    """What the evaluation found; None before it ran.

    Raises:
        UserError: the file is damaged.
    """
    data = run.evaluation()
    if data is None:
        return None
    return EvaluationInfo(
        members=tuple(data.get("members") or ()),
        sources=data.get("sources") or {},
        calibration={name: part for name, part in (data.get("calibration") or {}).items() if part},
        parity=data.get("parity") or {},
        more={name: part for name, part in data.items() if name not in EvaluationInfo._fields},
    )


def learning_curves_info(run: RunDir) -> tuple[Curve, ...]:
    """Curves of every trial that finished at least one epoch, in the order of `trials_info`."""
    curves = []
    for row in trials_info(run).rows:
        records = run.epochs(row.stage, row.trial_id)
        if records:
            curves.append(
                Curve(
                    stage=row.stage,
                    trial_id=row.trial_id,
                    status=row.status,
                    tier=row.tier,
                    epochs=tuple(r.epoch for r in records),
                    val_loss=tuple(r.val_loss for r in records),
                    energy_joules=tuple(r.energy_joules for r in records),
                )
            )
    return tuple(curves)


def projection_info(run: RunDir) -> tuple[ProjectionInfo, ...]:
    """How well joules were projected, stage by stage; stopped and retried trials did other work than was projected."""
    found = []
    for stage in stages_in_order(run, set()):
        pairs = [
            (trial.energy_joules, trial.projected_joules)
            for trial in run.trials(stage)
            if trial.status == "complete" and trial.attempts == 1 and trial.energy_joules and trial.projected_joules
        ]
        if pairs and stage != FULL_STAGE:  # full training ends when it has converged, which nobody projects
            errors = [abs(joules - projected) / joules for joules, projected in pairs]
            sums = [math.fsum(column) for column in zip(*pairs, strict=True)]
            found.append(ProjectionInfo(stage, len(pairs), statistics.median(errors), sums[0], sums[1]))
    return tuple(found)


def _row(trial: TrialResult, selection: Selection | None) -> TrialRow:
    stage = trial.fidelity.stage
    low, high = trial.energy.stated_bounds_joules
    note = trial.error or ""
    if selection and stage == selection.stage:
        note = selection.excluded.get(trial.trial_id, note)
    return TrialRow(
        stage=stage,
        trial_id=trial.trial_id,
        status="diverged" if trial.diverged else trial.status,
        params=trial.params,
        val_loss=trial.val_loss,
        energy_joules=trial.energy_joules,
        energy_method=trial.energy.method,
        epochs_done=trial.epochs_done,
        epochs=trial.fidelity.epochs,
        wall_seconds=trial.wall_seconds,
        n_parameters=trial.n_parameters,
        tier=_tier(selection, stage, trial.trial_id),
        note=note,
        throttled_ratio=trial.throttled_ratio,
        throttled=trial.throttled,
        joules_low=low,
        joules_high=high,
        coverage_ratio=trial.energy.coverage_ratio if trial.energy.shares else None,
        mean_watts=trial.mean_watts,
        peak_memory_bytes=trial.peak_memory_bytes,
        started_at=trial.started_at,
        devices=trial.devices,
    )


def _row_without_record(run: RunDir, stage: str, trial_id: str, selection: Selection | None) -> TrialRow:
    epochs: list[EpochRecord] = run.epochs(stage, trial_id)
    report = bill(run.trial_folder(stage, trial_id))
    return TrialRow(
        stage=stage,
        trial_id=trial_id,
        status="interrupted",
        params={},
        val_loss=epochs[-1].val_loss if epochs else None,
        energy_joules=report.joules,
        energy_method=report.method,
        epochs_done=len(epochs),
        epochs=None,
        wall_seconds=report.seconds or None,
        n_parameters=None,
        tier=_tier(selection, stage, trial_id),
        note="no result was recorded: it was interrupted, or is still running",
    )


def _tier(selection: Selection | None, stage: str, trial_id: str) -> str | None:
    """The tier that a trial of the selected stage, or its full training, belongs to."""
    if selection is None or stage not in (selection.stage, FULL_STAGE):
        return None
    return next((t.name for t in selection.tiers if any(p.trial_id == trial_id for p in t.picks)), None)


def _last_search_stage(run: RunDir) -> str | None:
    seen = {t.fidelity.stage for t in run.trials()} - {FULL_STAGE}
    return max(seen, key=stages_in_order(run, seen).index, default=None)
