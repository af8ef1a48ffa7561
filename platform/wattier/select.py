"""Sort the finished trials of a stage into tiers, each pick with its reason in words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from wattier.config_ensemble import SelectSection
from wattier.errors import UserError
from wattier.pareto import hypervolume, hypervolume_contributions, non_dominated_ranks
from wattier.records import Pick, Selection, Tier, TrialResult
from wattier.units import format_joules, format_ratio
from wattier_telemetry.records import METHODS

REFERENCE_MARGIN = 0.1
_STOPPED = "stopped by the scheduler"
_ADVICE = {
    _STOPPED: "Let more trials finish: set reduction_factor of the stage to null, in a new run_dir.",
    "diverged": "Lower the upper end of learning_rate in search.space, in a new run_dir.",
    "failed": "Read error.txt in their folders, mend the cause and run again in a new run_dir.",
    "interrupted": "Run the same command again to finish them.",
    "over a limit": "Raise search.constraints, in a new run_dir, or take what is dear out of search.space.",
    "energy unknown": "Run `wattier-telemetry doctor`, or set telemetry.source to estimated.",
}


class Exclusion(NamedTuple):
    """Why a trial is no candidate: a kind to count by, and a sentence with this trial's numbers."""

    kind: str
    reason: str


class Standing(NamedTuple):
    """Where a candidate stands among the candidates."""

    trial: TrialResult
    val_loss: float
    energy_joules: float
    rank: int
    contribution_ratio: float  # of the hypervolume of its own front


class Field(NamedTuple):
    """All candidates and the yardsticks they are compared with."""

    standings: list[Standing]
    hypervolume: float
    reference_point: tuple[float, float]


def select_trials(
    trials: Sequence[TrialResult],
    config: SelectSection,
    *,
    stage: str,
    project: Callable[[TrialResult], float | None],
) -> Selection:
    """Fill the tiers `accurate` and `balanced` from the trials that finished a stage.

    Args:
        trials: results of any stages; those of other stages are left aside, since a fidelity is one fair comparison.
        config: sizes of the tiers.
        stage: the stage to pick from.
        project: joules that the full training of a trial would cost, None where that cannot be said.

    Raises:
        UserError: no trial of the stage can be picked; the message counts why.
    """
    candidates, excluded = split_candidates(trials, stage=stage)
    if not candidates:
        raise UserError(_nothing_to_pick(stage, excluded))
    field = compare(candidates)
    accurate, balanced = _picked(field.standings, config)
    best = min(field.standings, key=_by_loss)
    return Selection(
        stage=stage,
        tiers=(
            Tier("accurate", _accurate_rule(config), tuple(_pick(s, best, field) for s in accurate)),
            Tier("balanced", _balanced_rule(config), tuple(_pick(s, best, field) for s in balanced)),
        ),
        front=tuple(s.trial.trial_id for s in sorted(field.standings, key=_by_loss) if s.rank == 0),
        hypervolume=field.hypervolume,
        reference_point=field.reference_point,
        candidates=tuple(trial.trial_id for trial in candidates),
        excluded={trial_id: exclusion.reason for trial_id, exclusion in excluded.items()},
        projected_joules=_sum_known([project(s.trial) for s in (*accurate, *balanced)]),
        projected_joules_all=_sum_known([project(trial) for trial in candidates]),
    )


def split_candidates(
    trials: Sequence[TrialResult], *, stage: str, by_energy: bool = True
) -> tuple[list[TrialResult], dict[str, Exclusion]]:
    """Trials of a stage that may be compared, sorted by id, and why each other one may not.

    by_energy: whether joules are compared too, which must then be known and measured alike.
    """
    of_stage = sorted((t for t in trials if t.fidelity.stage == stage), key=lambda t: t.trial_id)
    excluded = {t.trial_id: why for t in of_stage if (why := _exclusion(t, by_energy=by_energy)) is not None}
    candidates = [t for t in of_stage if t.trial_id not in excluded]
    if not candidates or not by_energy:
        return candidates, excluded
    sizes = Counter(_measured_as(t) for t in candidates)
    kept = max(sizes, key=lambda way: (sizes[way], -METHODS.index(way[0]), len(way[1]), way[1]))
    for trial in candidates:
        if (way := _measured_as(trial)) != kept:
            reason = f"its joules are {_in_words(way)}, those of the others {_in_words(kept)}: they are not comparable"
            excluded[trial.trial_id] = Exclusion("energy measured in another way", reason)
    return [t for t in candidates if t.trial_id not in excluded], excluded


def compare(candidates: Sequence[TrialResult], values: Sequence[tuple[float, ...]] | None = None) -> Field:
    """Rank candidates of one stage in (val_loss, energy_joules), or in two other values of each.

    The reference point lies 10 % of each objective's range beyond the worst candidate, so that the ends of the front
    count too; contributions are ratios and so do not depend on the objectives' units.
    """
    own = [(t.val_loss, t.energy_joules) for t in candidates]
    points = np.array(own if values is None else values, dtype=np.float64)
    low, high = points.min(axis=0), points.max(axis=0)
    size = np.where(high > 0, high, 1.0)
    spans = np.where(high > low, high - low, size)
    worst = low + (1 + REFERENCE_MARGIN) * spans
    corner = (float(worst[0]), float(worst[1]))
    ranks = non_dominated_ranks(points)
    ratios = np.zeros(len(points))
    normalised, unit_corner = (points - low) / spans, (1 + REFERENCE_MARGIN,) * 2
    for rank in np.unique(ranks):
        members = ranks == rank
        total = hypervolume(normalised[members], unit_corner)
        ratios[members] = hypervolume_contributions(normalised[members], unit_corner) / total
    standings = [
        Standing(trial, float(point[0]), float(point[1]), int(rank), float(ratio))
        for trial, point, rank, ratio in zip(candidates, points, ranks, ratios, strict=True)
    ]
    return Field(standings, hypervolume(points, corner), corner)


def _exclusion(trial: TrialResult, *, by_energy: bool = True) -> Exclusion | None:
    progress = f"after {trial.epochs_done} of {trial.fidelity.epochs} epochs"
    by_status = {
        "pruned": Exclusion(_STOPPED, f"{_STOPPED} {progress}: its joules are not comparable"),
        "failed": Exclusion("failed", f"failed: {trial.error or 'no error was recorded'}"),
        "interrupted": Exclusion("interrupted", f"interrupted {progress}: it never finished"),
    }
    if trial.diverged:
        return Exclusion("diverged", f"diverged {progress}")
    if trial.status != "complete":
        return by_status[trial.status]
    if trial.val_loss is None or not math.isfinite(trial.val_loss):
        return Exclusion("diverged", "diverged: its validation loss is not a number")
    if over := {name: ratio for name, ratio in trial.limit_ratios.items() if ratio > 1}:
        worst = max(over, key=lambda name: over[name])
        return Exclusion("over a limit", f"used {over[worst]:.2f} times the {worst} that search.constraints allows")
    if by_energy and not trial.energy_joules:
        why = "nothing could be measured" if trial.energy_joules is None else "its meter counted 0 J"
        return Exclusion("energy unknown", f"energy unknown: {why}")
    return None


def _measured_as(trial: TrialResult) -> tuple[str, tuple[str, ...]]:
    """Method and domains: GPU joules of one trial and GPU + CPU joules of another are no fair comparison either."""
    return trial.energy.method or METHODS[-1], tuple(sorted(trial.energy.joules_by_domain))


def _in_words(way: tuple[str, tuple[str, ...]]) -> str:
    return f"{way[0]} ({' + '.join(way[1])})"


def _picked(standings: Sequence[Standing], config: SelectSection) -> tuple[list[Standing], list[Standing]]:
    accurate = sorted(standings, key=_by_loss)[: config.accurate]
    taken = {s.trial.trial_id for s in accurate}
    # Fronts are those of all candidates: what an accurate pick dominates is no trade-off, though the pick is taken.
    rest = sorted((s for s in standings if s.trial.trial_id not in taken), key=by_trade_off)
    return accurate, rest[: config.balanced]


def by_trade_off(standing: Standing) -> tuple[int, float, str]:
    """Sort key: successive fronts, and within a front the larger contribution first."""
    return standing.rank, -standing.contribution_ratio, standing.trial.trial_id


def _by_loss(standing: Standing) -> tuple[float, float, str]:
    return standing.val_loss, standing.energy_joules, standing.trial.trial_id


def _accurate_rule(config: SelectSection) -> str:
    return f"lowest validation loss of the candidates, {config.accurate} wanted"


def _balanced_rule(config: SelectSection) -> str:
    return (
        f"from the rest, {config.balanced} wanted: by successive Pareto fronts in (validation loss, joules), within a "
        "front by exclusive hypervolume contribution, both objectives scaled to the candidates' ranges (best 0, "
        f"worst 1), reference point {1 + REFERENCE_MARGIN:g} in each"
    )


def _pick(standing: Standing, best: Standing, field: Field) -> Pick:
    loss, joules = f"validation loss {standing.val_loss:.4g}", format_joules(standing.energy_joules)
    if standing is best:
        text = f"{loss}, the lowest of {len(field.standings)} candidates, for {joules}"
    else:
        joules_ratio = format_ratio(standing.energy_joules / best.energy_joules)
        text = (
            f"{loss}, {_above(standing.val_loss, best.val_loss)} the best, for {joules}, "
            f"{joules_ratio} of the joules of the most accurate"
        )
    if standing.rank == 0:
        lost = format_ratio(standing.contribution_ratio)
        text += f"; on the Pareto front, which loses {lost} of its hypervolume without it"
    else:
        text += f"; on front {standing.rank + 1}: only trials of the fronts before beat it in both"
    coverage = standing.trial.energy.coverage_ratio
    if coverage < 0.9:
        text += f" (its energy was measured during {format_ratio(coverage)} of the time only)"
    if standing.trial.throttled:
        ratio = format_ratio(standing.trial.throttled_ratio)
        text += f" (its devices were throttled during {ratio} of the time: its joules and seconds are not comparable)"
    return Pick(standing.trial.trial_id, text)


def _above(val_loss: float, best: float) -> str:
    if best > 0:
        return f"{format_ratio(val_loss / best - 1)} above"
    return f"{val_loss - best:.3g} above"


def _nothing_to_pick(stage: str, excluded: dict[str, Exclusion]) -> str:
    if not excluded:
        return f"selection: stage {stage!r} has no trials yet. Run the search first."
    kinds = Counter(exclusion.kind for exclusion in excluded.values()).most_common()
    counts = ", ".join(f"{number} {kind}" for kind, number in kinds)
    return f"selection: none of the {len(excluded)} trials of stage {stage!r} can be picked: {counts}. " + _ADVICE.get(
        kinds[0][0], ""
    )


def _sum_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == len(values) else None
