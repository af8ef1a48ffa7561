"""What a selection says of a trial: one sentence with its numbers, and the numbers beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from wattier.records import Pick, TrialResult
from wattier.select_field import Standing
from wattier.select_noise import Noise
from wattier.select_rules import COSTS
from wattier.units import format_joules, format_ratio

FULLY_MEASURED = 0.99  # of the time under the meter
THROTTLED, PARTLY_MEASURED, PINNED = "throttled", "partly_measured", "pinned"


class Yardsticks(NamedTuple):
    """What the sentences compare a trial with.

    best: the lowest loss of those that nobody ruled out. projected: joules to convergence by trial id, of all trials.
    """

    best: Standing
    candidates: int
    names: Sequence[str]
    noise: Noise | None
    projected: Mapping[str, float | None]
    projected_all: float | None


def flags_of(trial: TrialResult) -> tuple[str, ...]:
    """What makes a trial's joules less comparable than those of others."""
    flags = []
    if trial.throttled:
        flags.append(THROTTLED)
    if trial.energy.joules is not None and trial.energy.coverage_ratio < FULLY_MEASURED:
        flags.append(PARTLY_MEASURED)
    return tuple(flags)


def numbers_of(standing: Standing, sticks: Yardsticks, *, pinned: bool = False) -> dict[str, Any]:
    """The fields of a pick that are numbers, and its flags."""
    two = len(standing.values) == 2
    return trial_numbers(standing.trial, sticks, pinned=pinned) | {
        "front": standing.rank + 1 if two else None,
        "contribution_ratio": standing.contribution_ratio if two else None,
    }


def trial_numbers(trial: TrialResult, sticks: Yardsticks, *, pinned: bool = False) -> dict[str, Any]:
    """Those of any trial, compared or not."""
    energy = trial.energy
    low, high = energy.stated_bounds_joules
    return {
        "trial_id": trial.trial_id,
        "val_loss": trial.val_loss,
        "val_loss_noise": sticks.noise.std(trial.trial_id) if sticks.noise else None,
        "energy_joules": energy.joules,
        "energy_method": energy.method,
        "joules_low": low,
        "joules_high": high,
        "projected_joules": sticks.projected[trial.trial_id],
        "flags": (*flags_of(trial), *((PINNED,) if pinned else ())),
    }


def sentence(standing: Standing, sticks: Yardsticks, because: str) -> str:
    """Loss, joules, why, and what training it to the end would cost."""
    parts = [loss_words(standing, sticks) + _price(standing.trial, sticks)]
    if len(standing.values) == 2 and sticks.names[1] != "energy_joules":
        parts.append(f"{standing.values[1]:.4g} {COSTS[sticks.names[1]]}")
    if because:
        parts.append(because)
    if len(standing.values) == 2 and standing.rank == 0:
        lost = format_ratio(standing.contribution_ratio)
        parts.append(f"on the Pareto front, which loses {lost} of its hypervolume without it")
    elif len(standing.values) == 2:
        parts.append(f"on front {standing.rank + 1}: only trials of the fronts before beat it in both")
    parts += convergence_words(standing.trial_id, sticks)
    return "; ".join(parts) + flag_words(standing.trial)


def loss_words(standing: Standing, sticks: Yardsticks) -> str:
    """The loss with its noise, against the best."""
    loss = f"validation loss {standing.val_loss:.4g}"
    std = sticks.noise.std(standing.trial_id) if sticks.noise else None
    if std is not None:
        loss += f" ± {std:.2g}"
    if standing.trial_id == sticks.best.trial_id:
        return f"{loss}, the lowest of {sticks.candidates} candidates"
    return f"{loss}, {above(standing.val_loss, sticks.best.val_loss)} the best"


def convergence_words(trial_id: str, sticks: Yardsticks) -> list[str]:
    """Joules to convergence, beside those of all candidates together."""
    projected, every = sticks.projected[trial_id], sticks.projected_all
    if projected is None:
        return []
    words = f"to convergence {format_joules(projected)}"
    if every and sticks.candidates > 1:
        words += f", {format_ratio(projected / every)} of what training all {sticks.candidates} would take"
    return [words]


def flag_words(trial: TrialResult) -> str:
    """What is not comparable, in brackets; nothing of a trial without flags."""
    text = ""
    flags = flags_of(trial)
    if PARTLY_MEASURED in flags:
        coverage = format_ratio(trial.energy.coverage_ratio)
        text += f" (its energy was measured during {coverage} of the time only)"
    if THROTTLED in flags:
        ratio = format_ratio(trial.throttled_ratio)
        text += f" (its devices were throttled during {ratio} of the time: its joules and seconds are not comparable)"
    return text


def energy_words(trial: TrialResult) -> str:
    """Joules with their method, and how far off they may be as far as the meters say; an estimate says nothing."""
    energy = trial.energy
    if energy.joules is None:
        return "unknown joules"
    method: str = energy.method or "unknown"
    low, high = energy.stated_bounds_joules
    if energy.joules and low is not None and high is not None:
        ratio = max(high - energy.joules, energy.joules - low) / energy.joules
        method += f" ± {format_ratio(ratio)}"
    return f"{format_joules(energy.joules)} ({method})"


def above(val_loss: float, best: float) -> str:
    """How far a loss is above the best one, or below it, as one may be that was ruled out."""
    side = "above" if val_loss >= best else "below"
    if best > 0:
        return f"{format_ratio(abs(val_loss / best - 1))} {side}"
    return f"{abs(val_loss - best):.3g} {side}"


def record_of(standing: Standing, sticks: Yardsticks, because: str, *, pinned: bool, trade_off: float | None) -> Pick:
    """A pick of a candidate."""
    numbers = numbers_of(standing, sticks, pinned=pinned)
    told = "; ".join(part for part in (because, "pinned by hand" if pinned else "") if part)
    return Pick(reason=sentence(standing, sticks, told), trade_off=trade_off, **numbers)


def _price(trial: TrialResult, sticks: Yardsticks) -> str:
    joules, best = trial.energy_joules, sticks.best.trial.energy_joules
    if joules is None:
        return ""
    text = f", for {energy_words(trial)}"
    if trial.trial_id != sticks.best.trial_id and best:
        text += f", {format_ratio(joules / best)} of the joules of the most accurate"
    return text
