"""How far validation losses scatter, so that a difference between two trials can be told from chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wattier.priors import key_of
from wattier.records import EpochRecord, LossNoise, TrialResult

Array = NDArray[np.float64]
LATE_EPOCHS = 4  # at the least, of which the second half of the training is made
DOUBT = 1.645  # standard errors: how alike the variances are is taken at its lower 95 % bound
TREND = 3  # parameters of a parabola
ENOUGH_FREEDOM = 3.0  # fewer degrees of freedom, and the noise itself is a guess
LEAST_RATIO = 1e-5  # of the median: a variance of 0 has no logarithm
ROUNDING = 1e-9  # of a loss: what is smaller is arithmetic


class Noise(NamedTuple):
    """Variances of the candidates' validation losses, by trial id, and what is known of them as a whole.

    freedom: degrees of freedom of each variance. total: of all of them together, above which no test can have more.
    """

    variance: dict[str, float]
    freedom: dict[str, float]
    total: float
    record: LossNoise

    def std(self, trial_id: str) -> float | None:
        """Standard deviation of a trial's validation loss; None of one that was not asked about."""
        variance = self.variance.get(trial_id)
        return None if variance is None else math.sqrt(variance)


def estimate_noise(trials: Sequence[TrialResult], curves: Mapping[str, Sequence[EpochRecord]]) -> Noise | None:
    """The noise of each trial's loss: of its own late epochs, leaning on those of all the others, and of repetitions.

    A trial's own variance rests on few epochs, so it is drawn towards the common one by as much as the variances are
    alike (empirical Bayes, Smyth 2004, https://doi.org/10.2202/1544-6115.1027). Where configurations were repeated
    often enough, what their losses differ by beyond that is added to all. What it does not hold is how the loss would
    change with another seed or another validation set, where no repetition shows it.

    Args:
        trials: those that are compared, all of one stage.
        curves: by trial id, their epochs; of some nothing may be known.

    Returns:
        None where there are too few late epochs and repetitions to say anything.
    """
    scatter = {t.trial_id: late_scatter(curves.get(t.trial_id, ())) for t in trials}
    known = {trial_id: found for trial_id, found in scatter.items() if found is not None}
    repeated, repeats = repeated_variance(trials)
    if sum(freedom for _, freedom in known.values()) < ENOUGH_FREEDOM:
        if repeats < ENOUGH_FREEDOM:
            return None
        return _alike(trials, repeated, repeats, LossNoise(math.sqrt(repeated), repeats, 0, "repeated configurations"))
    own, freedoms = np.array(list(known.values())).T
    common, prior, moderated = moderate(own, freedoms)
    total = float(freedoms.sum())
    variances = dict(zip(known, moderated.tolist(), strict=True))
    freedom = {name: min(prior + scatter_of[1], total) for name, scatter_of in known.items()}
    between = _between(trials, variances, repeated, repeats)
    pooled = math.sqrt(float(own @ freedoms) / total + between)
    source = "late epochs and repeated configurations" if between else "late epochs"
    variance = {t.trial_id: _at_least(variances.get(t.trial_id, common) + between, t) for t in trials}
    return Noise(
        variance,
        {t.trial_id: freedom.get(t.trial_id, min(prior, total)) for t in trials},
        min(total, repeats) if between else total,
        LossNoise(pooled, total, len(known), source),
    )


def late_scatter(records: Sequence[EpochRecord]) -> tuple[float, float] | None:
    """Variance of the loss from one late epoch to the next, and its degrees of freedom.

    What a parabola leaves of the losses of the second half of the epochs: the trend of a training that is not quite
    over is bent, but no more than that. For Gaussian noise the variance is a chi-square with the degrees of freedom.

    Returns:
        None where there are not four losses.
    """
    losses = {r.epoch: r.val_loss for r in records if r.val_loss is not None and math.isfinite(r.val_loss)}
    last = max(losses, default=0)
    epochs = tuple(e for e in sorted(losses) if e > last - max(last // 2, LATE_EPOCHS))
    freedom = len(epochs) - TREND
    if freedom < 1:
        return None
    left = _without_trend(epochs) @ np.array([losses[e] for e in epochs])
    return float(left @ left) / freedom, float(freedom)


@lru_cache(maxsize=64)
def _without_trend(epochs: tuple[int, ...]) -> Array:
    """What takes a parabola off losses at these epochs, [n, n]."""
    powers = np.vander((np.array(epochs) - np.mean(epochs)) / len(epochs), TREND)
    basis, _ = np.linalg.qr(powers)
    left: Array = np.eye(len(epochs)) - basis @ basis.T
    return left


def moderate(variances: Array, freedoms: Array) -> tuple[float, float, Array]:
    """Variances drawn towards what they have in common, the more the more alike they are.

    They are taken for draws from a scaled inverse chi-square distribution, whose two parameters follow from the mean
    and the variance of their logarithms (Smyth 2004). How alike they are is itself uncertain, and a test among hundreds
    of trials lives in the tails: its cautious end is taken.

    Returns:
        The common variance, the degrees of freedom it counts as (infinite = all are one), and the moderated ones, [n].
    """
    from scipy.optimize import brentq
    from scipy.special import digamma, polygamma

    pooled = float(variances @ freedoms / freedoms.sum())
    alike = (pooled, math.inf, np.full(len(variances), pooled))
    median = float(np.median(variances))
    if len(variances) < 3 or median <= 0:
        return alike
    halves = freedoms / 2
    logs = np.log(np.maximum(variances, LEAST_RATIO * median)) - digamma(halves) + np.log(halves)
    squares = (logs - logs.mean()) ** 2
    doubt = DOUBT * float(np.std(squares, ddof=1)) / math.sqrt(len(logs))
    excess = float(np.var(logs, ddof=1) - np.mean(polygamma(1, halves))) + doubt
    if excess <= float(polygamma(1, 1e6)):
        return alike
    root = brentq(lambda x: math.log(float(polygamma(1, math.exp(x))) / excess), math.log(1e-6), math.log(1e6))
    prior = 2 * math.exp(root)
    common = math.exp(float(np.mean(logs)) + float(digamma(prior / 2)) - math.log(prior / 2))
    return common, prior, (prior * common + freedoms * variances) / (prior + freedoms)


def repeated_variance(trials: Sequence[TrialResult]) -> tuple[float, float]:
    """Variance of the loss among trials with the same hyper-parameters, and its degrees of freedom; 0 of none."""
    groups: dict[str, list[float]] = {}
    for trial in trials:
        if trial.val_loss is not None:
            groups.setdefault(key_of(trial.params), []).append(trial.val_loss)
    again = [losses for losses in groups.values() if len(losses) > 1]
    freedom = sum(len(losses) - 1 for losses in again)
    squares = math.fsum((len(losses) - 1) * float(np.var(losses, ddof=1)) for losses in again)
    return (squares / freedom if freedom else 0.0), float(freedom)


def _between(trials: Sequence[TrialResult], variances: Mapping[str, float], repeated: float, repeats: float) -> float:
    """Variance from one training to the next beyond that from epoch to epoch; 0 where repetitions do not show any."""
    if repeats < ENOUGH_FREEDOM:
        return 0.0
    times: dict[str, int] = {}
    for trial in trials:
        times[key_of(trial.params)] = times.get(key_of(trial.params), 0) + 1
    within = [variances[t.trial_id] for t in trials if times[key_of(t.params)] > 1 and t.trial_id in variances]
    return max(0.0, repeated - float(np.mean(within))) if within else repeated


def _alike(trials: Sequence[TrialResult], variance: float, freedom: float, record: LossNoise) -> Noise:
    variances = {t.trial_id: _at_least(variance, t) for t in trials}
    return Noise(variances, dict.fromkeys(variances, freedom), freedom, record)


def _at_least(variance: float, trial: TrialResult) -> float:
    """Deterministic losses have no noise but the rounding of their arithmetic."""
    return max(variance, (ROUNDING * abs(trial.val_loss or 0.0)) ** 2, 1e-300)
