"""Which trials of a stage may be compared, and where each of them stands among the others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wattier.pareto import hypervolume, hypervolume_contributions, non_dominated_ranks
from wattier.records import TrialResult
from wattier_telemetry.records import METHODS

REFERENCE_MARGIN = 0.1
STOPPED = "stopped by the scheduler"


class Exclusion(NamedTuple):
    """Why a trial is no candidate: a kind to count by, and a sentence with this trial's numbers."""

    kind: str
    reason: str


class Standing(NamedTuple):
    """Where a candidate stands among the candidates.

    values: what is compared, all minimised: one (a ranking), or the loss and what it costs.
    contribution_ratio: of the hypervolume of its own front; 0 in a ranking.
    """

    trial: TrialResult
    values: tuple[float, ...]
    rank: int
    contribution_ratio: float

    @property
    def trial_id(self) -> str:
        """Of its trial."""
        return self.trial.trial_id

    @property
    def val_loss(self) -> float:
        """Of its trial; candidates have one."""
        return math.nan if self.trial.val_loss is None else self.trial.val_loss


class Field(NamedTuple):
    """All candidates and the yardsticks they are compared with; a ranking has no hypervolume."""

    standings: list[Standing]
    hypervolume: float | None
    reference_point: tuple[float, float] | None


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
    """Rank candidates of one stage in (val_loss, energy_joules), or in other values of each: two, or one.

    The reference point lies 10 % of each objective's range beyond the worst candidate, so that the ends of the front
    count too; contributions are ratios and so do not depend on the objectives' units.
    """
    own = [(t.val_loss, t.energy_joules) for t in candidates]
    points = np.array(own if values is None else values, dtype=np.float64)
    if points.shape[1] == 1:
        _, places = np.unique(points[:, 0], return_inverse=True)
        return Field(_standings(candidates, points, places, np.zeros(len(points))), None, None)
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
    return Field(_standings(candidates, points, ranks, ratios), hypervolume(points, corner), corner)


def by_trade_off(standing: Standing) -> tuple[int, float, str]:
    """Sort key: successive fronts, and within a front the larger contribution first."""
    return standing.rank, -standing.contribution_ratio, standing.trial_id


def _standings(
    candidates: Sequence[TrialResult],
    points: NDArray[np.float64],
    ranks: NDArray[np.int64],
    ratios: NDArray[np.float64],
) -> list[Standing]:
    return [
        Standing(trial, tuple(point), int(rank), float(ratio))
        for trial, point, rank, ratio in zip(candidates, points.tolist(), ranks, ratios, strict=True)
    ]


def _exclusion(trial: TrialResult, *, by_energy: bool = True) -> Exclusion | None:
    progress = f"after {trial.epochs_done} of {trial.fidelity.epochs} epochs"
    by_status = {
        "pruned": Exclusion(STOPPED, f"{STOPPED} {progress}: its joules are not comparable"),
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
