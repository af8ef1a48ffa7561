"""How a tier is chosen: a rule puts the trials in order, and says with its numbers which of them may be in the tier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from wattier.config_ensemble import SelectSection
from wattier.select_clear import Ordered, clear_group, not_worse
from wattier.select_field import REFERENCE_MARGIN, Standing
from wattier.select_noise import Noise
from wattier.units import format_ratio

Array = NDArray[np.float64]
SAME = 1e-9  # scores that differ by less are equal: the unit of the joules must not break a tie
FENCE = 1.5  # interquartile ranges above the upper quartile (Tukey 1977)


class Question(NamedTuple):
    """What a rule is asked: the candidates that nobody has ruled out, by id, and what is known of their losses."""

    standings: Sequence[Standing]
    settings: SelectSection
    noise: Noise | None
    names: tuple[str, ...]


class Judged(NamedTuple):
    """A trial, and why a rule puts it where it does; `kind` of what keeps it out of the tier, None = it may be in."""

    standing: Standing
    words: str
    kind: str | None = None
    trade_off: float | None = None


class Verdict(NamedTuple):
    """A rule's answer: the best first. `words`: the rule; `clear`: whether the tier stands out, None = not asked."""

    order: list[Judged]
    words: str
    clear: bool | None = None
    notes: tuple[str, ...] = ()


class TierRule(Protocol):
    """How a tier is chosen. Who may not be in it comes after who may."""

    def __call__(self, question: Question, /) -> Verdict:
        """Order all standings of a question, of which there is at least one."""


def significance(question: Question) -> Verdict:
    """Those whose losses stand out from all others against the noise; else those not clearly worse than the best.

    See `select_clear` for both tests.
    """
    ordered, noise = by_loss(question.standings), question.noise
    if noise is None:
        told = gap(question)
        note = "the noise of the losses cannot be estimated from so few late epochs, so the largest gap decides"
        return told._replace(notes=(note, *told.notes))
    if len(ordered) == 1:
        return Verdict([Judged(ordered[0], "the only candidate")], _test_words(question))
    table = Ordered.of([(s.trial_id, s.val_loss) for s in ordered], noise)
    level, others = 1 - question.settings.confidence, len(ordered) - 1
    group = clear_group(table, max(question.settings.accurate, 1), level)
    if group is not None:
        size, p = group
        rest = len(ordered) - size
        ahead = f"one of {size} with a clear advantage" if size > 1 else "with a clear advantage"
        inside = f"{ahead} over the other {rest} ({_chance(p)})"
        outside = f"clearly above the {size} most accurate ({_chance(p)})"
        return Verdict(
            [Judged(s, inside) if i < size else Judged(s, outside, "clearly_worse") for i, s in enumerate(ordered)],
            _test_words(question),
            clear=True,
        )
    chances = not_worse(table)
    order = []
    for index, (standing, p) in enumerate(zip(ordered, chances.tolist(), strict=True)):
        if index == 0:
            order.append(Judged(standing, "without a clear advantage over the next"))
        elif p >= level:
            order.append(Judged(standing, f"not clearly above the best ({_chance(p)})"))
        else:
            order.append(Judged(standing, f"clearly above the best ({_chance(p)})", "clearly_worse"))
    order.sort(key=lambda judged: judged.kind is not None)
    as_good = sum(judged.kind is None for judged in order) - 1
    note = (
        f"no trial or group of trials stands out: {as_good} of the other {others} "
        f"{'is' if as_good == 1 else 'are'} not clearly worse than the best"
    )
    return Verdict(order, _test_words(question), clear=False, notes=(note,))


def gap(question: Question) -> Verdict:
    """Those before the largest relative gap between neighbours, among as many as the tier may hold and one more."""
    ordered = by_loss(question.standings)
    words = f"trials before the largest relative gap in loss, at most {question.settings.accurate}"
    losses = np.array([s.val_loss for s in ordered])
    if len(ordered) == 1:
        return Verdict([Judged(ordered[0], "the only candidate")], words)
    steps = np.diff(losses)
    relative = bool(losses[0] > 0)
    gaps = steps / losses[:-1] if relative else steps
    gaps = gaps[: max(question.settings.accurate, 1)]
    size = 1 + int(np.argmax(gaps)) if gaps.any() else len(ordered)  # all are equal
    if size == len(ordered):
        return Verdict([Judged(s, "with no gap in loss before or behind it") for s in ordered], words)
    width = format_ratio(float(gaps[size - 1])) if relative else f"{gaps[size - 1]:.3g}"
    inside = f"before a gap of {width} in loss" + (f", with {size - 1} other{'s' * (size > 2)}" if size > 1 else "")
    outside = f"behind a gap of {width} in loss"
    judged = [Judged(s, inside) if i < size else Judged(s, outside, "behind_gap") for i, s in enumerate(ordered)]
    return Verdict(judged, words)


def lowest(question: Question) -> Verdict:
    """By loss alone."""
    order = [Judged(s, f"number {i} by loss") for i, s in enumerate(by_loss(question.standings), start=1)]
    return Verdict(order, f"lowest validation loss of the candidates, {question.settings.accurate} wanted")


def knee(question: Question) -> Verdict:
    """Farthest below the straight line between the most accurate trial and the cheapest.

    The knee of a front is where the curve bends farthest away from the line through its ends (Das 1999,
    https://doi.org/10.1007/BF01195985; on normalised axes this is the difference that Kneedle looks at, Satopaa et al.
    2011, https://doi.org/10.1109/ICDCSW.2011.20). A trial's trade-off is the share of the costs between the two ends
    that it saves, less the share of the accuracy between them that it gives up: 0 on the line, 1 in the ideal corner.
    A loss that is an outlier (above the upper quartile by 1.5 interquartile ranges) makes no end, since with one the
    whole front would shrink to a point beside it.
    """
    standings = question.standings
    points = np.array([s.values for s in standings])
    lower, upper = np.quantile(points[:, 0], [0.25, 0.75])
    inside = np.flatnonzero(points[:, 0] <= upper + FENCE * (upper - lower) + SAME * abs(upper)).tolist()
    best = min(inside, key=lambda i: (*points[i], standings[i].trial_id))
    cheapest = min(inside, key=lambda i: (points[i, 1], points[i, 0], standings[i].trial_id))
    spans = np.array([points[cheapest, 0] - points[best, 0], points[best, 1] - points[cheapest, 1]])
    ranges = np.ptp(points[inside], axis=0)
    is_traded = bool((spans > 0).all())
    spans = spans if is_traded else np.where(ranges > 0, ranges, np.where(points[best] > 0, points[best], 1.0))
    corner = np.array([points[best, 0], points[cheapest, 1]])
    scores = (1.0 if is_traded else 0.0) - ((points - corner) / spans).sum(axis=1)
    names = standings[best].trial_id, standings[cheapest].trial_id
    order = [
        Judged(standings[i], _knee_words(standings[i].trial_id, float(scores[i]), names, is_traded=is_traded),
               trade_off=float(scores[i]))
        for i in in_order(-scores, standings)
    ]  # fmt: skip
    cost = cost_word(question.names)
    words = (
        f"best trade-off between validation loss and {cost}, {question.settings.balanced} wanted: the share of {cost} "
        f"saved less the share of accuracy given up between {names[0]}, the most accurate, and {names[1]}, the "
        "cheapest; 0 on the straight line between the two, 1 with the accuracy of the one at the price of the other"
    )
    notes = () if is_traded else (f"{names[0]} is the most accurate and the cheapest: there is nothing to trade",)
    return Verdict(order, words, notes=notes)


def fronts(question: Question) -> Verdict:
    """By successive fronts, and within a front by hypervolume contribution."""
    places = in_order(np.array([-s.contribution_ratio for s in question.standings]), question.standings)
    order = sorted((question.standings[i] for i in places), key=lambda s: s.rank)
    words = (
        f"from the rest, {question.settings.balanced} wanted: by successive Pareto fronts in (validation loss, "
        f"{cost_word(question.names)}), within a front by exclusive hypervolume contribution, both scaled to the "
        f"candidates' ranges (best 0, worst 1), reference point {1 + REFERENCE_MARGIN:g} in each"
    )
    return Verdict([Judged(s, "") for s in order], words)


def objective(question: Question) -> Verdict:
    """By the one value that the search compares."""
    values = np.array([s.values[0] for s in question.standings])
    what = "validation loss" if question.names == ("val_loss",) else f"weighted sum of {' and '.join(question.names)}"
    order = [question.standings[i] for i in in_order(values, question.standings)]
    words = f"from the rest, {question.settings.balanced} wanted: by the search's one objective, {what}"
    is_loss = question.names == ("val_loss",)
    return Verdict([Judged(s, "" if is_loss else f"{what} {s.values[0]:.4g}") for s in order], words)


ACCURATE_RULES: dict[str, TierRule] = {"significance": significance, "gap": gap, "lowest": lowest}
BALANCED_RULES: dict[str, TierRule] = {"knee": knee, "fronts": fronts}
COSTS = {
    "energy_joules": "joules",
    "joules_per_structure": "joules a structure",
    "projected_joules": "joules to convergence",
}


def balanced_rule(settings: SelectSection, n_values: int) -> tuple[str, TierRule]:
    """Name and function; where the search compares one value, that is the trade-off."""
    if n_values == 1:
        return "objective", objective
    return settings.balanced_rule, BALANCED_RULES[settings.balanced_rule]


def by_loss(standings: Sequence[Standing]) -> list[Standing]:
    """The lowest loss first; of equal ones the cheaper."""
    return sorted(standings, key=lambda s: (s.val_loss, *s.values, s.trial_id))


def in_order(scores: Array, standings: Sequence[Standing]) -> list[int]:
    """Indices from the lowest score to the highest; scores that are equal but for rounding go by loss, cost and id.

    Arithmetic with joules in another unit rounds otherwise, and must not put other trials first.
    """
    order = np.argsort(scores, kind="stable")
    levels = np.concatenate(([0], np.cumsum(np.diff(scores[order]) > SAME)))
    keys = {int(i): (int(level), *standings[i].values, standings[i].trial_id) for i, level in zip(order, levels)}  # noqa: B905
    return sorted(keys, key=lambda i: keys[i])


def cost_word(names: Sequence[str]) -> str:
    """What the second objective is called in a sentence."""
    return COSTS.get(names[1] if len(names) > 1 else "energy_joules", "joules")


def _knee_words(trial_id: str, score: float, ends: tuple[str, str], *, is_traded: bool) -> str:
    if trial_id in ends:
        return "the most accurate of those compared" if trial_id == ends[0] else "the cheapest of those compared"
    return f"trade-off {score:+.2f} between {ends[0]} and {ends[1]}" if is_traded else ""


def _test_words(question: Question) -> str:
    settings = question.settings
    return (
        f"clear advantage in validation loss at {format_ratio(settings.confidence)} confidence, after all comparisons, "
        f"against the noise of {question.noise.record.source if question.noise else 'losses'}; at most "
        f"{settings.accurate}"
    )


def _chance(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
