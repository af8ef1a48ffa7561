"""Which trials are worth their next epoch: successive halving on the loss, or on loss and joules with confidence."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from wattier.records import EpochRecord

Array = NDArray[np.float64]


def rung_epochs(epochs: int, reduction_factor: int | None) -> list[int]:
    """Epochs 1, r, r^2 ... below the last; none without a reduction factor.

    Raises:
        ValueError: the factor is below 2, so the rungs would never reach the last epoch.
    """
    if reduction_factor is None:
        return []
    if reduction_factor < 2:
        raise ValueError(f"reduction_factor is {reduction_factor}, but must be at least 2")
    rungs, rung = [], 1
    while rung < epochs:
        rungs.append(rung)
        rung *= reduction_factor
    return rungs


class Rungs:
    """Losses of trials at rungs: the first report of each trial at or after the epochs of `rung_epochs`.

    Attributes:
        losses: by epoch, of each trial that was compared there.
    """

    def __init__(self, epochs: int, reduction_factor: int | None) -> None:
        self.places = rung_epochs(epochs, reduction_factor)
        self.losses: dict[int, dict[str, float]] = {}
        self._passed: dict[str, int] = {}

    def entered(self, trial_id: str, epoch: int, loss: float) -> dict[str, float] | None:
        """The rung that a trial stands on with this report, itself included; None between rungs."""
        passed = bisect_right(self.places, epoch)
        if passed <= self._passed.get(trial_id, 0):
            return None
        self._passed[trial_id] = passed
        rung = self.losses.setdefault(epoch, {})
        rung[trial_id] = loss
        return rung


class RungScheduler(ABC):
    """Judges trials at rungs; asked twice about one epoch, it repeats its answer.

    Attributes:
        epochs: of a whole trial.
        disqualified: trials that used more than is allowed.
        answers: by trial and epoch.
    """

    def __init__(self, epochs: int, reduction_factor: int | None) -> None:
        self.epochs = epochs
        self._rungs = Rungs(epochs, reduction_factor)
        self.disqualified: set[str] = set()
        self.answers: dict[tuple[str, int], bool] = {}

    @property
    def rungs(self) -> Mapping[int, Mapping[str, float]]:
        """Losses of the trials that were compared, by epoch."""
        return self._rungs.losses

    def go_on(self, trial_id: str, record: EpochRecord) -> bool:
        """Whether a trial is worth its next epoch; a diverged one is not."""
        key = (trial_id, record.epoch)
        if key not in self.answers:
            self.answers[key] = self._judge(trial_id, record)
        return self.answers[key]

    @abstractmethod
    def disqualify(self, trial_id: str) -> None:
        """A trial used more than is allowed: it is no reason to stop others."""

    @abstractmethod
    def _judge(self, trial_id: str, record: EpochRecord) -> bool:
        """The answer, when it is asked for the first time."""


class Halving(RungScheduler):
    """Asynchronous successive halving on the validation loss (Li et al., MLSys 2020).

    Rungs stand at epochs 1, r, r^2 ... below the last; a trial goes on past a rung while it is among the best 1/r of
    those that reached it. Asked twice about one epoch, it repeats its answer.
    """

    def __init__(self, epochs: int, reduction_factor: int | None) -> None:
        super().__init__(epochs, reduction_factor)
        self.reduction_factor = reduction_factor or 0

    def disqualify(self, trial_id: str) -> None:
        """A trial used more than is allowed: nobody is compared with it."""
        for rung in self._rungs.losses.values():
            rung.pop(trial_id, None)
        self.disqualified.add(trial_id)

    def _judge(self, trial_id: str, record: EpochRecord) -> bool:
        if record.val_loss is None or not math.isfinite(record.val_loss):
            return False
        if record.epoch >= self.epochs or trial_id in self.disqualified:
            return True
        rung = self._rungs.entered(trial_id, record.epoch, record.val_loss)
        if rung is None:
            return True
        keep = max(1, math.ceil(len(rung) / self.reduction_factor))
        return sorted(rung.values())[keep - 1] >= record.val_loss


P_STOP = 0.05  # a trial goes on while it has this chance to end below every finished trial that is not dearer
N_CAREFUL = 2  # trials that reached the end past a rung, before that rung stops anybody
PRIOR_TRIALS = 3.0  # weight of the prior spread between rung and end, in trials
PRIOR_SPREAD = 0.5  # ... that spread, in spreads of the losses at the rung
PRIOR_SD = np.array([3.0, 0.5, 0.4])  # of the regression's offset, of its slopes over rung loss and log joules


class ParetoHalving(RungScheduler):
    """Stops a trial that is dominated with confidence in loss and joules.

    At each rung (epochs 1, r, r^2 ...) a trial is compared with finished trials that cost no more: their joules and its
    own, projected to the last epoch. It is stopped when one of them was no worse at this rung and the chance that its
    final loss ends below the best of theirs is less than `P_STOP`. The chance comes from the trials that went on: a
    Bayesian linear regression of the final loss on the loss at the rung and on the joules (dear models learn slowly, so
    that curves cross), on a logarithmic scale. So a trial that nobody finished dominates always goes on, rungs that say
    little stop few, and where all rungs stop too much nothing is lost for ever: the sampler may propose it again.

    Asked twice about one epoch, it repeats its answer; replaying the records in their order rebuilds it.
    """

    def __init__(self, epochs: int, reduction_factor: int | None) -> None:
        super().__init__(epochs, reduction_factor)
        self.joules: dict[str, float] = {}
        self.final: dict[str, float] = {}

    def disqualify(self, trial_id: str) -> None:
        """A trial used more than is allowed: it still shows how losses fall, and dominates nobody."""
        self.disqualified.add(trial_id)

    def _judge(self, trial_id: str, record: EpochRecord) -> bool:
        if record.val_loss is None or not math.isfinite(record.val_loss):
            return False
        if record.energy_joules is not None and 0 < record.energy_joules < math.inf and record.epoch > 0:
            self.joules[trial_id] = record.energy_joules / record.epoch * self.epochs
        if record.epoch >= self.epochs:
            self.final[trial_id] = record.val_loss  # only what reached the last epoch dominates anything
            return True
        rung = self._rungs.entered(trial_id, record.epoch, record.val_loss)
        return rung is None or not self._is_dominated(trial_id, rung)

    def _is_dominated(self, trial_id: str, rung: dict[str, float]) -> bool:
        went_on = [other for other in self.final if other in rung and other != trial_id]
        joules = self.joules.get(trial_id, math.inf)
        fair = [other for other in went_on if other not in self.disqualified]
        cheaper = [other for other in fair if joules == math.inf or self.joules.get(other, math.inf) <= joules]
        if len(went_on) < N_CAREFUL or all(rung[other] > rung[trial_id] for other in cheaper):
            return False
        return self._chance_below(trial_id, rung, went_on, min(self.final[other] for other in cheaper)) < P_STOP

    def _chance_below(self, trial_id: str, rung: dict[str, float], went_on: Sequence[str], level: float) -> float:
        """Probability that a trial ends below a level: the predictive Student t of a conjugate linear regression."""
        at_rung = np.array(list(rung.values()))
        lowest = min(*rung.values(), *self.final.values())
        floor = 0.3 * (float(np.median(at_rung)) - lowest) + 1e-9 * (1 + abs(lowest))

        def scaled(losses: Sequence[float]) -> Array:
            return np.asarray(np.log(np.maximum(np.asarray(losses) - lowest, 0.0) + floor))

        spread = float(np.std(scaled(list(rung.values())))) + 1e-9
        centre = float(np.mean(scaled(list(rung.values()))))
        trials = [*went_on, trial_id]
        start = scaled([rung[trial] for trial in trials])
        x = np.column_stack([np.ones(len(trials)), (start - centre) / spread, self._relative_joules(trials, rung)])
        y = (scaled([self.final[trial] for trial in went_on]) - start[:-1]) / spread
        # Prior N(0, PRIOR_SD^2) on coefficients, scaled inverse chi-squared on the noise (Gelman et al., BDA3, 14.8).
        prior = np.diag(PRIOR_SPREAD**2 / PRIOR_SD**2)
        precision = x[:-1].T @ x[:-1] + prior
        coefficients = np.linalg.solve(precision, x[:-1].T @ y)
        residual = max(float(y @ y - coefficients @ precision @ coefficients), 0.0)
        freedom = PRIOR_TRIALS + len(y)
        variance = (PRIOR_TRIALS * PRIOR_SPREAD**2 + residual) / freedom
        sd = math.sqrt(variance * (1 + float(x[-1] @ np.linalg.solve(precision, x[-1]))))
        expected = start[-1] + spread * float(x[-1] @ coefficients)
        return float(student_t.cdf((scaled([level])[0] - expected) / (spread * sd), freedom))

    def _relative_joules(self, trials: Sequence[str], rung: dict[str, float]) -> Array:
        """Log joules in standard deviations from the mean of a rung; 0 where unknown."""
        known = np.log([self.joules[trial] for trial in rung if trial in self.joules] or [1.0])
        centre, spread = float(np.mean(known)), float(np.std(known)) + 1e-9
        return np.array([(math.log(self.joules[t]) - centre) / spread if t in self.joules else 0.0 for t in trials])
