"""A campaign of 400 trials whose tiers are known, because they were planted: how often does `wattier select` find them?

    python tests/planted_campaign.py            # the tables of docs/selection.md: 100 seeds, about four minutes

The world was written down before any rule was tried on it. 385 trials of the crowd cost 1 kJ to 100 kJ, evenly in the
logarithm, and end at f(J) = 1.1 + 0.9 (1 kJ / J)^0.5 or above: the excess is exponential, 15 % in the mean. Four
accurate trials cost 60 kJ to 100 kJ and end at 1.00 to 1.01, where the crowd ends above 1.19. Eleven trials at the
knee cost 8 kJ to 12 kJ and end at 1.12 to 1.14, where the crowd ends above 1.35. So the gap behind the accurate ones
is 0.11. Hyper-parameters are drawn at random, those of planted trials 0.1 of the diagonal or more apart. Losses fall
over 12 epochs as L (1 + 1.5 exp(-t / 2)), every epoch with Gaussian noise of its own, and what is recorded is the
lowest of them, as in training. Joules scatter by 2 %. Nothing tells the rules the noise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from wattier.config_ensemble import SelectSection
from wattier.config_space import ChoiceParameter, RangeParameter
from wattier.records import EpochRecord, Fidelity, Selection, TrialResult
from wattier.select import select_trials
from wattier.select_clear import Ordered, clear_group, not_worse
from wattier.select_noise import estimate_noise
from wattier.space import random_points
from wattier.spacing import Spacing
from wattier_telemetry import EnergyReport, Share

CROWD, ACCURATE, KNEE, EPOCHS = 385, 4, 11, 12
GAP = 0.11  # between the losses of the accurate trials and all others
SPACE = {
    "hidden_dim": RangeParameter(low=16, high=512, log=True),
    "learning_rate": RangeParameter(low=1e-4, high=1e-2, log=True),
    "n_layers": RangeParameter(low=2, high=6),
    "precision": ChoiceParameter(choices=["float32", "bfloat16"]),
}
NOISES = (0.0, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03)


class Campaign(NamedTuple):
    """Trials with their epochs, and the ids that were planted."""

    trials: list[TrialResult]
    curves: dict[str, list[EpochRecord]]
    accurate: frozenset[str]
    knee: frozenset[str]


def campaign(seed: int, noise: float, *, uneven: bool = False) -> Campaign:
    """A campaign; noise: standard deviation of a loss; uneven: another one for each trial (log-normal, 0.5)."""
    rng = np.random.default_rng([seed, 400])
    joules = np.concatenate([
        10 ** rng.uniform(3, 5, CROWD), rng.uniform(6e4, 1e5, ACCURATE), rng.uniform(8e3, 1.2e4, KNEE)
    ])  # fmt: skip
    floor = 1.1 + 0.9 * np.sqrt(1e3 / joules[:CROWD])
    ends = np.concatenate([
        floor * (1 + rng.exponential(0.15, CROWD)), rng.uniform(1.00, 1.01, ACCURATE), rng.uniform(1.12, 1.14, KNEE)
    ])  # fmt: skip
    stds = noise * (rng.lognormal(0, 0.5, len(ends)) if uneven else np.ones(len(ends)))
    epochs = np.arange(1, EPOCHS + 1)
    losses = ends[:, None] * (1 + 1.5 * np.exp(-epochs / 2)) + stds[:, None] * rng.standard_normal((len(ends), EPOCHS))
    joules *= 1 + 0.02 * rng.standard_normal(len(joules))
    ids = [f"t{place:03d}" for place in rng.permutation(len(ends))]
    params = _points(seed, len(ends))
    trials = [_trial(*row) for row in zip(ids, params, losses, joules, strict=True)]
    curves = {trial_id: _curve(row) for trial_id, row in zip(ids, losses.tolist(), strict=True)}
    return Campaign(trials, curves, frozenset(ids[CROWD : CROWD + ACCURATE]), frozenset(ids[CROWD + ACCURATE :]))


def chosen(made: Campaign, settings: SelectSection) -> Selection:
    """What is selected of a campaign; ten times a trial's joules train it to convergence."""
    return select_trials(
        made.trials, settings, stage="final", project=lambda t: 10 * (t.energy_joules or 0.0),
        curves=lambda trial: made.curves[trial.trial_id], space=SPACE,
    )  # fmt: skip


def found(selection: Selection, tier: str) -> frozenset[str]:
    """Ids in a tier."""
    return frozenset(p.trial_id for t in selection.tiers if t.name == tier for p in t.picks)


def _points(seed: int, count: int) -> list[dict[str, object]]:
    """Random configurations; the planted ones, at the end, are no copies of one another."""
    points = random_points(SPACE, 4 * count, seed)
    taken: list[dict[str, object]] = []
    for point in points[count:]:
        tried = [_trial(str(i), p, np.ones(1), 1.0) for i, p in enumerate([*taken, point])]
        nearest = Spacing(SPACE, tried).nearest(str(len(taken)), [str(i) for i in range(len(taken))])
        if nearest is None or nearest[1] >= 0.1:
            taken.append(point)
        if len(taken) == ACCURATE + KNEE:
            break
    return points[:CROWD] + taken


def _trial(trial_id: str, params: dict[str, object], losses: np.ndarray, joules: float) -> TrialResult:
    place = float(int(trial_id.lstrip("t")))
    energy = EnergyReport.of([Share("GPU-0", "gpu", 60 * place, 60 * place + 60, 1.0, float(joules), "counter")])
    return TrialResult(
        "planted", trial_id, params, Fidelity("final", None, EPOCHS, 1), "complete", float(losses.min()), {},
        EPOCHS, 1000, 60.0, energy,
    )  # fmt: skip


def _curve(losses: list[float]) -> list[EpochRecord]:
    return [EpochRecord(e, None, loss, {}, 100 * e, 1.0, None) for e, loss in enumerate(losses, start=1)]


class Score(NamedTuple):
    """Of many campaigns: how often a tier was exactly what was planted, and what was in it."""

    accurate: float
    knee: float
    both: float
    accurate_found: float  # of 4, in the mean
    accurate_strangers: float
    knee_found: float  # of 11, in the mean
    clear: float  # how often the accurate tier was said to stand out


def scores(ways: Sequence[SelectSection], noise: float, seeds: range, *, uneven: bool = False) -> list[Score]:
    """Select from as many campaigns as there are seeds, in each of several ways."""
    rows: list[list[tuple[float, ...]]] = [[] for _ in ways]
    for seed in seeds:
        made = campaign(seed, noise, uneven=uneven)
        for settings, of_way in zip(ways, rows, strict=True):
            selection = chosen(made, settings)
            accurate, balanced = found(selection, "accurate"), found(selection, "balanced")
            right = (accurate == made.accurate, balanced == made.knee)
            of_way.append((
                *right, all(right), len(accurate & made.accurate), len(accurate - made.accurate),
                len(balanced & made.knee), bool(selection.tiers[0].clear),
            ))  # fmt: skip
    return [Score(*np.mean(np.array(of_way, dtype=float), axis=0).tolist()) for of_way in rows]


def kept(n: int, epochs: int, spread: float, seeds: range) -> tuple[float, float]:
    """Of campaigns in which all trials are equally good: how often a given one is kept, and some group called clear.

    spread: of the logarithm of the trials' noises. The last loss is recorded here: the lowest favours noisy trials.
    """
    counts = []
    for seed in seeds:
        rng = np.random.default_rng([seed, n, epochs])
        stds = 0.1 * rng.lognormal(0, spread, n)
        losses = 1 + stds[:, None] * rng.standard_normal((n, epochs))
        trials = [_trial(f"t{i:03d}", {"x": i}, row[-1:], 1000.0) for i, row in enumerate(losses)]
        noise = estimate_noise(
            trials, {t.trial_id: _curve(row) for t, row in zip(trials, losses.tolist(), strict=True)}
        )
        assert noise is not None
        ordered = sorted((t.val_loss or 0.0, t.trial_id) for t in trials)
        table = Ordered.of([(trial_id, loss) for loss, trial_id in ordered], noise)
        place = [trial_id for _, trial_id in ordered].index("t000")
        counts.append((not_worse(table)[place] >= 0.05, clear_group(table, 10, 0.05) is not None))
    share_kept, share_clear = np.mean(np.array(counts, dtype=float), axis=0).tolist()
    return share_kept, share_clear


def _table(title: str, scores_at: Mapping[float, Score]) -> str:
    heads = (
        "noise", "gap / noise", "accurate exact", "balanced exact", "both exact", "accurate found of 4",
        "strangers there", "knee found of 11", "said to be clear",
    )  # fmt: skip
    lines = [f"\n### {title}\n\n| {' | '.join(heads)} |\n{'|---:' * len(heads)}|"]
    for noise, s in scores_at.items():
        ratio = f"{GAP / noise:.1f}" if noise else "∞"
        lines.append(
            f"| {noise:g} | {ratio} | {s.accurate:.0%} | {s.knee:.0%} | {s.both:.0%} | {s.accurate_found:.2f} | "
            f"{s.accurate_strangers:.2f} | {s.knee_found:.2f} | {s.clear:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="How often the planted tiers are found.")
    parser.add_argument("--seeds", type=int, default=100)
    seeds = range(parser.parse_args().seeds)
    ways = {
        "significance, at most 8; knee": {"accurate": 8},
        "significance, at most 4; knee": {"accurate": 4},
        "gap, at most 8; knee": {"accurate": 8, "accurate_rule": "gap"},
        "significance, at most 8; fronts": {"accurate": 8, "balanced_rule": "fronts"},
    }
    settings = [SelectSection.model_validate({"balanced": KNEE, **changes}) for changes in ways.values()]
    for uneven in (False, True):
        found_at = {noise: scores(settings, noise, seeds, uneven=uneven) for noise in NOISES}
        for place, title in enumerate(ways):
            of_way = {noise: found[place] for noise, found in found_at.items()}
            sys.stdout.write(_table(f"{title}{', uneven noise' if uneven else ''}", of_way))
            sys.stdout.flush()
    heads = ("trials", "epochs", "spread of their noises", "a given one is kept", "a group is called clear")
    sys.stdout.write(f"\n### all trials equally good\n\n| {' | '.join(heads)} |\n{'|---:' * len(heads)}|\n")
    for n, epochs in ((5, 4), (40, 12), (400, 6), (400, 12)):
        for spread in (0.0, 0.5, 1.0):
            share_kept, share_clear = kept(n, epochs, spread, seeds)
            sys.stdout.write(f"| {n} | {epochs} | {spread:g} | {share_kept:.0%} | {share_clear:.0%} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
