"""Sort the finished trials of a stage into tiers; each pick and each near miss with its reason in words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from wattier.choices import Choices
from wattier.config_ensemble import SelectSection
from wattier.errors import UserError
from wattier.objectives import Objectives
from wattier.records import EpochRecord, NearMiss, Pick, Selection, Tier, TrialResult
from wattier.select_field import (
    STOPPED,
    Exclusion,
    Field,
    Standing,
    by_trade_off,
    compare,
    split_candidates,
)
from wattier.select_noise import estimate_noise
from wattier.select_rules import ACCURATE_RULES, Judged, Question, Verdict, balanced_rule, by_loss
from wattier.select_words import (
    PINNED,
    Yardsticks,
    convergence_words,
    energy_words,
    flag_words,
    flags_of,
    numbers_of,
    record_of,
    sentence,
    trial_numbers,
)
from wattier.space import Space
from wattier.spacing import Spacing
from wattier.units import format_joules, format_ratio

__all__ = ["Exclusion", "Field", "Standing", "by_trade_off", "compare", "select_trials", "split_candidates"]

NEAR = 3  # trials of each tier that are named though they are not in it
ROUNDING = 1e-9  # of joules: another unit must not change who is within a ratio
BOTH = Objectives(("val_loss", "energy_joules"))
_OUTSIDE = ("clearly_worse", "behind_gap", "next")
_ADVICE = {
    STOPPED: "Let more trials finish: set reduction_factor of the stage to null, in a new run_dir.",
    "diverged": "Lower the upper end of learning_rate in search.space, in a new run_dir.",
    "failed": "Read error.txt in their folders, mend the cause and run again in a new run_dir.",
    "interrupted": "Run the same command again to finish them.",
    "over a limit": "Raise search.constraints, in a new run_dir, or take what is dear out of search.space.",
    "energy unknown": "Run `wattier-telemetry doctor`, or set telemetry.source to estimated.",
}


class _Filled(NamedTuple):
    """A tier's picks, and who came near."""

    picks: list[tuple[Judged, Standing]]
    misses: list[tuple[Judged, str, str]]  # kind, and why in words


def select_trials(  # noqa: PLR0913  (what is compared, by which rules, and what is known beside)
    trials: Sequence[TrialResult],
    config: SelectSection,
    *,
    stage: str,
    project: Callable[[TrialResult], float | None],
    objectives: Objectives = BOTH,
    curves: Callable[[TrialResult], Sequence[EpochRecord]] | None = None,
    space: Space | None = None,
    choices: Choices | None = None,
) -> Selection:
    """Fill the tiers `accurate` and `balanced`, and `pinned` with what a person picked and no rule did.

    Args:
        trials: results of any stages; those of other stages are left aside, since a fidelity is one fair comparison.
        config: rules and sizes of the tiers.
        stage: the stage to pick from.
        project: joules that the full training of a trial would cost, None where that cannot be said.
        objectives: what the search compares: a front of two, or a ranking.
        curves: a trial's epochs, from which the noise of its loss is estimated; None = it is not known.
        space: where the distance between trials is measured; None = none is kept.
        choices: what a person said of single trials.

    Raises:
        UserError: no trial of the stage can be picked; the message counts why.
    """
    candidates, values, excluded = _comparable(trials, stage, objectives)
    chosen = choices or Choices()
    allowed = {trial.trial_id for trial in candidates if trial.trial_id not in chosen.vetoed}
    if not allowed:
        raise UserError(_nothing_to_pick(stage, excluded, len(candidates)))
    field = compare(candidates, values)
    noise = None if curves is None else estimate_noise(candidates, {t.trial_id: curves(t) for t in candidates})
    question = Question([s for s in field.standings if s.trial_id in allowed], config, noise, objectives.names)
    pinned = [trial for trial in trials if trial.fidelity.stage == stage and trial.trial_id in chosen.pinned]
    projected = {trial.trial_id: project(trial) for trial in (*candidates, *pinned)}
    sticks = Yardsticks(
        by_loss(question.standings)[0], len(candidates), objectives.names, noise, projected,
        _sum_known([projected[trial.trial_id] for trial in candidates]),
    )  # fmt: skip
    tiers, misses = _tiers(question, sticks, None if space is None else Spacing(space, candidates), chosen)
    tiers += _pinned_tiers(pinned, tiers, field, sticks)
    picked = dict.fromkeys(pick.trial_id for tier in tiers for pick in tier.picks)
    return Selection(
        stage=stage,
        tiers=tuple(tiers),
        front=tuple(s.trial_id for s in by_loss(field.standings) if s.rank == 0),
        hypervolume=field.hypervolume,
        reference_point=field.reference_point,
        candidates=tuple(trial.trial_id for trial in candidates),
        excluded={trial_id: exclusion.reason for trial_id, exclusion in excluded.items()},
        projected_joules=_sum_known([projected[trial_id] for trial_id in picked]),
        projected_joules_all=sticks.projected_all,
        near_misses=_near_misses([*misses, *_vetoed(field, sticks, chosen)], picked),
        pinned=chosen.pinned,
        vetoed=chosen.vetoed,
        objectives=objectives.names,
        rules=config.model_dump(mode="json", exclude={"pin", "veto"}),
        noise=None if noise is None else noise.record,
    )


def _comparable(
    trials: Sequence[TrialResult], stage: str, objectives: Objectives
) -> tuple[list[TrialResult], list[tuple[float, ...]], dict[str, Exclusion]]:
    """The candidates with the values they are compared by, and why each other trial is none."""
    candidates, excluded = split_candidates(trials, stage=stage, by_energy=objectives.names != ("val_loss",))
    kept, values = [], []
    for trial in candidates:
        known = objectives.of_result(trial)
        if known is None:
            what = " or ".join(name for name in objectives.names if name != "val_loss")
            excluded[trial.trial_id] = Exclusion("not comparable", f"its {what} is not known")
        else:
            kept.append(trial)
            values.append(known)
    return kept, values, excluded


def _tiers(
    question: Question, sticks: Yardsticks, spacing: Spacing | None, chosen: Choices
) -> tuple[list[Tier], list[NearMiss]]:
    config = question.settings
    name, rule = balanced_rule(config, len(question.standings[0].values))
    tiers, misses, taken = [], [], list[str]()
    for tier, wanted, rule_name, verdict in (
        ("accurate", config.accurate, config.accurate_rule, ACCURATE_RULES[config.accurate_rule](question)),
        ("balanced", config.balanced, name, rule(question)),
    ):
        refuse = (lambda _: None) if tier == "accurate" else _dear(question, sticks)
        filled = _fill(verdict, wanted, taken, spacing, refuse, config)
        taken += [standing.trial_id for _, standing in filled.picks]
        picks = tuple(
            record_of(s, sticks, judged.words, pinned=s.trial_id in chosen.pinned, trade_off=judged.trade_off)
            for judged, s in filled.picks
        )
        notes = (*verdict.notes, *_free_places(tier, wanted, filled))
        tiers.append(Tier(tier, verdict.words, picks, rule_name, wanted, verdict.clear, notes if wanted else ()))
        misses += [_near_miss(tier, judged, kind, why, sticks) for judged, kind, why in filled.misses]
    return tiers, misses


def _fill(  # noqa: PLR0913, PLR0917  (the order, the size, and what may keep a trial out)
    verdict: Verdict,
    wanted: int,
    taken: Sequence[str],
    spacing: Spacing | None,
    refuse: Callable[[Standing], tuple[str, str] | None],
    config: SelectSection,
) -> _Filled:
    """Go down a rule's order until the tier is full, and on until the next few are known."""
    filled, near = _Filled([], []), 0
    for judged in verdict.order if wanted else ():
        standing = judged.standing
        if standing.trial_id in taken:
            continue
        is_full = len(filled.picks) >= wanted
        others = [*taken, *(s.trial_id for _, s in filled.picks)]
        if judged.kind is not None:
            why: tuple[str, str] | None = (judged.kind, judged.words)
        else:
            why = refuse(standing) or _copy(standing, others, spacing, config.min_distance)
        if why is None and not is_full:
            filled.picks.append((judged, standing))
        elif why is None or why[0] in _OUTSIDE:
            near += 1
            filled.misses.append((judged, *(why or ("next", f"the tier holds {wanted}"))))
        elif not is_full and why is not None:
            filled.misses.append((judged, *why))
        if near >= NEAR + config.accurate + config.balanced:  # some of them may be picked by the other rule
            break
    return filled


def _copy(
    standing: Standing, others: Sequence[str], spacing: Spacing | None, min_distance: float
) -> tuple[str, str] | None:
    found = None if spacing is None or not min_distance else spacing.nearest(standing.trial_id, others)
    if found is None or found[1] >= min_distance:
        return None
    return "copy", f"its hyper-parameters are {found[1]:.2g} from those of {found[0]}, nearer than {min_distance:g}"


def _dear(question: Question, sticks: Yardsticks) -> Callable[[Standing], tuple[str, str] | None]:
    """What keeps a trial out of the balanced tier: an energy ceiling, or joules that are not comparable."""
    config, best = question.settings, sticks.best.trial

    def refuse(standing: Standing) -> tuple[str, str] | None:
        trial, joules = standing.trial, standing.trial.energy_joules
        if config.flagged == "leave_out" and (flags := flags_of(trial)):
            return "flagged", f"left out since it is {' and '.join(flags).replace('_', ' ')}"
        ceilings = [(config.max_energy_joules, "")]
        if config.max_energy_ratio is not None and best.energy_joules is not None:
            of_best = f", {format_ratio(config.max_energy_ratio)} of the joules of {best.trial_id}"
            ceilings.append((config.max_energy_ratio * best.energy_joules, of_best))
        for ceiling, what in ceilings:
            if ceiling is not None and (joules is None or joules > ceiling * (1 + ROUNDING)):
                return "ceiling", f"dearer than the energy ceiling of {format_joules(ceiling)}{what}"
        return None

    return refuse


def _free_places(tier: str, wanted: int, filled: _Filled) -> list[str]:
    """What keeps a tier from being full, where its rule would have filled it."""
    missing = wanted - len(filled.picks)
    kinds = Counter(kind for _, kind, _ in filled.misses if kind not in _OUTSIDE)
    if missing <= 0 or not kinds:
        return []
    words = {"ceiling": "above the energy ceiling", "copy": "too near to a pick", "flagged": "flagged"}
    counts = ", ".join(f"{count} {words[kind]}" for kind, count in kinds.most_common())
    return [f"{missing} of {wanted} places in {tier} stay free: {counts}"]


def _near_miss(tier: str, judged: Judged, kind: str, why: str, sticks: Yardsticks) -> NearMiss:
    standing = judged.standing
    because = why if judged.words in ("", why) else f"{why}; {judged.words}"
    return NearMiss(
        reason=sentence(standing, sticks, because),
        trade_off=judged.trade_off,
        tier=tier,
        kind=kind,
        **numbers_of(standing, sticks),
    )


def _near_misses(misses: Sequence[NearMiss], picked: Mapping[str, None]) -> tuple[NearMiss, ...]:
    """Those that no tier holds: all that were refused a place, and of those behind them the next few."""
    counts: Counter[str] = Counter()
    kept = []
    for miss in misses:
        if miss.trial_id in picked:
            continue
        counts[miss.tier] += miss.kind in _OUTSIDE
        if miss.kind not in _OUTSIDE or counts[miss.tier] <= NEAR:
            kept.append(miss)
    return tuple(kept)


def _vetoed(field: Field, sticks: Yardsticks, chosen: Choices) -> list[NearMiss]:
    return [
        NearMiss(reason=sentence(s, sticks, "ruled out by hand"), kind="veto", **numbers_of(s, sticks))
        for s in field.standings
        if s.trial_id in chosen.vetoed
    ]


def _pinned_tiers(pinned: Sequence[TrialResult], tiers: Sequence[Tier], field: Field, sticks: Yardsticks) -> list[Tier]:
    """The tier of what a person picked and no rule did; none where there is no such trial."""
    by_rule = {pick.trial_id for tier in tiers for pick in tier.picks}
    standings = {s.trial_id: s for s in field.standings}
    picks = []
    for trial in sorted((t for t in pinned if t.trial_id not in by_rule), key=lambda t: t.trial_id):
        if trial.trial_id in standings:
            picks.append(record_of(standings[trial.trial_id], sticks, "", pinned=True, trade_off=None))
            continue
        parts = [f"pinned by hand, though it was not compared ({trial.status} after {trial.epochs_done} epochs)"]
        parts += [energy_words(trial), *convergence_words(trial.trial_id, sticks)]
        picks.append(Pick(reason="; ".join(parts) + flag_words(trial), **trial_numbers(trial, sticks, pinned=True)))
    return [Tier(PINNED, "pinned by hand", tuple(picks), "hand")] if picks else []


def _nothing_to_pick(stage: str, excluded: Mapping[str, Exclusion], vetoed: int) -> str:
    if vetoed:
        return (
            f"selection: all {vetoed} trials of stage {stage!r} that could be picked are ruled out by hand. Give one "
            "back: wattier select RUN --free ID."
        )
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
