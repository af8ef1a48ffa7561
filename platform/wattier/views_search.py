"""What the search has to say as a whole: its funnel, how the front grew, and all hyper-parameters side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from wattier.ledger import FULL_PHASE, add_up, stages_in_order, trial_bills
from wattier.pareto import hypervolume
from wattier.records import Params, Selection, TrialResult
from wattier.rundir import FULL_STAGE, RunDir
from wattier.views import ParetoInfo, TrialRow, TrialsInfo

STATUSES = ("complete", "pruned", "diverged", "failed", "interrupted")
LOG_SPREAD = 10.0
MOST_CHOICES = 12  # values of one parameter that are no numbers


class FunnelStage(NamedTuple):
    """One stage of the funnel: who came in, how they ended, and what that cost."""

    stage: str
    planned: int | None
    trials: int
    carried: int  # configurations that a stage before had tried
    fresh: int
    counts: dict[str, int]  # by status, those that occur
    joules: dict[str, float | None]  # by status
    total_joules: float | None
    went_on: int  # configurations that the next stage, or full training, took up
    structures: int | None
    epochs: int
    ranks: int


class FunnelInfo(NamedTuple):
    """Stages in order; full training is the last."""

    stages: tuple[FunnelStage, ...]


class ProgressInfo(NamedTuple):
    """How the front of a stage grew, in the order in which its trials ended.

    trials counts every trial of the stage, joules bills every one of them; only candidates add hypervolume.
    """

    stage: str
    trials: tuple[int, ...]
    joules: tuple[float, ...]
    hypervolume_ratio: tuple[float, ...]  # of the final hypervolume
    hypervolume: float
    unknown_joules: int  # trials whose joules nobody knows, which count as 0 here


class ParallelAxis(NamedTuple):
    """One upright axis: where each trial crosses it, 0 to 1, and what stands at its ticks."""

    name: str
    unit: str
    positions: tuple[float | None, ...]  # [trials]
    ticks: tuple[tuple[float, str], ...]
    log: bool


class ParallelInfo(NamedTuple):
    """Candidates of the compared stage along their hyper-parameters and both objectives."""

    stage: str
    trial_ids: tuple[str, ...]
    kinds: tuple[str, ...]  # a tier, or `candidate`
    axes: tuple[ParallelAxis, ...]


def funnel_info(run: RunDir, trials: TrialsInfo, selection: Selection | None) -> FunnelInfo:
    """The funnel by stage, from records and journals."""
    if not trials.rows:
        return FunnelInfo(())
    config = run.config()
    bills = trial_bills(run)
    names = [name for name in stages_in_order(run, {row.stage for row in trials.rows}) if _is_shown(trials, name)]
    sections = {section.name: section for section in config.search.stages}
    by_stage = {name: [row for row in trials.rows if row.stage == name] for name in names}
    stages: list[FunnelStage] = []
    earlier: set[str] = set()
    for index, name in enumerate(names):
        rows = by_stage[name]
        own = {_key(row.params) for row in rows if row.params}
        following = by_stage[names[index + 1]] if index + 1 < len(names) else []
        later = {_key(row.params) for row in following if row.params}
        went_on = len(following) if names[index + 1 :] == [FULL_STAGE] else len(own & later)  # members keep their id
        reports = {status: [bills[name, r.trial_id] for r in rows if r.status == status] for status in STATUSES}
        joules = {status: add_up(found).joules for status, found in reports.items() if found}
        section = sections.get(name)
        planned = section.trials if section else (len(selection.picked) if selection and name == FULL_STAGE else None)
        epochs = section.epochs if section else config.full_training.epochs
        ranks = section.ranks if section else config.full_training.ranks
        structures = section.structures if section else None
        carried = len(rows) if name == FULL_STAGE else sum(_key(row.params) in earlier for row in rows if row.params)
        total = add_up(report for found in reports.values() for report in found).joules
        counts = {status: len(found) for status, found in reports.items() if found}
        stages.append(
            FunnelStage(
                name, planned, len(rows), carried, len(rows) - carried, counts, joules, total, went_on,
                structures, epochs, ranks,
            )
        )  # fmt: skip
        earlier |= own
    return FunnelInfo(tuple(stages))


def stage_title(stage: str) -> str:
    """A stage as a reader knows it."""
    return FULL_PHASE if stage == FULL_STAGE else stage


def progress_info(run: RunDir, pareto: ParetoInfo | None) -> ProgressInfo | None:
    """Hypervolume against trials and joules; None without a front."""
    if pareto is None or pareto.reference_point is None or not pareto.hypervolume:
        return None
    known = {p.trial_id: (p.val_loss, p.energy_joules) for p in pareto.points if p.is_candidate}
    front: list[tuple[float, float]] = []
    joules: list[float] = []
    ratios: list[float] = []
    ratio, unknown = 0.0, 0
    for trial in run.trials(pareto.stage):
        spent = trial.energy_joules
        unknown += spent is None
        joules.append((joules[-1] if joules else 0.0) + (spent or 0.0))
        point = known.get(trial.trial_id)
        if point is not None and not any(a <= point[0] and b <= point[1] for a, b in front):
            front = [(a, b) for a, b in front if not (point[0] <= a and point[1] <= b)] + [point]
            ratio = hypervolume(front, pareto.reference_point) / pareto.hypervolume
        ratios.append(ratio)
    trials = tuple(range(1, len(ratios) + 1))
    return ProgressInfo(pareto.stage, trials, tuple(joules), tuple(ratios), pareto.hypervolume, unknown)


def parallel_info(trials: TrialsInfo, pareto: ParetoInfo | None) -> ParallelInfo | None:
    """Parameters that differ, then loss and joules; None where fewer than two candidates or no such parameter."""
    if pareto is None:
        return None
    points = {p.trial_id: p for p in pareto.points if p.is_candidate}
    rows = [row for row in trials.rows if row.stage == pareto.stage and row.trial_id in points]
    rows.sort(key=lambda row: points[row.trial_id].kind != "candidate")  # picked ones are drawn on top
    varied = varied_parameters(rows)
    if len(rows) < 2 or not varied:
        return None
    axes = [_axis(name, "", [row.params.get(name) for row in rows]) for name in varied]
    axes.append(_axis("validation loss", "", [row.val_loss for row in rows]))
    axes.append(_axis("energy", "J", [row.energy_joules for row in rows]))
    return ParallelInfo(
        pareto.stage, tuple(row.trial_id for row in rows), tuple(points[row.trial_id].kind for row in rows), tuple(axes)
    )


def varied_parameters(rows: Sequence[TrialRow] | Sequence[TrialResult]) -> list[str]:
    """Parameters that differ between trials: the others are in the config."""
    names = dict.fromkeys(name for row in rows for name in row.params)
    return [name for name in names if len({json.dumps(r.params.get(name), default=str) for r in rows if r.params}) > 1]


def is_number(value: Any) -> bool:
    """Whether a parameter's value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_shown(trials: TrialsInfo, stage: str) -> bool:
    return stage != FULL_STAGE or any(row.stage == stage for row in trials.rows)


def _key(params: Params) -> str:
    return json.dumps(params, sort_keys=True, default=str)


def _axis(name: str, unit: str, values: Sequence[Any]) -> ParallelAxis:
    known = [value for value in values if value is not None]
    if all(is_number(value) for value in known):
        return _number_axis(name, unit, values)
    labels = sorted({str(value) for value in known}, key=lambda text: (len(text), text))
    places = {text: (index + 0.5) / len(labels) for index, text in enumerate(labels)}
    ticks = tuple((places[text], text) for text in labels[:MOST_CHOICES])
    return ParallelAxis(name, unit, tuple(None if v is None else places[str(v)] for v in values), ticks, log=False)


def _number_axis(name: str, unit: str, values: Sequence[float | None]) -> ParallelAxis:
    known = np.array([float(value) for value in values if value is not None])
    low, high = float(known.min()), float(known.max())
    log = low > 0 and high / low > LOG_SPREAD
    first, last = (math.log(low), math.log(high)) if log else (low, high)
    span = last - first or 1.0
    positions = tuple(
        None if value is None else ((math.log(value) if log else float(value)) - first) / span for value in values
    )
    middle = math.exp((first + last) / 2) if log else (first + last) / 2
    ends = ((0.0, low), (0.5, middle), (1.0, high)) if high > low else ((0.0, low),)
    ticks = tuple((place, _compact(value)) for place, value in ends)
    return ParallelAxis(name, unit, positions, ticks, log)


def _compact(value: float) -> str:
    """Three digits, numbers from ten thousand on with an SI prefix."""
    scales = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
    scale, prefix = next(((s, p) for least, s, p in scales if abs(value) >= least), (1.0, ""))
    return f"{value / scale:.3g}{prefix}"
