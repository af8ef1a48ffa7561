"""What a problem is: a space, ascending fidelities, loss and joules at each, and the true front at the highest.

Epochs are the fidelity, joules are cumulative from a trial's start. The loss that a search sees is noisy; what it is
scored by is the loss without noise at the last epoch, so that luck is no achievement.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import numpy as np
from scipy.stats import qmc
from search.space import Array, Params, Space, decoded, from_unit, to_unit

from wattier.pareto import hypervolume, non_dominated_ranks

N_SAMPLE, N_ROUNDS, N_CHILDREN = 2**15, 6, 20_000
MARGIN = 0.1  # of the front's extent, by which the reference point lies beyond its worst corner


class Problem(Protocol):
    """What every method of the bench is given; functions and tables alike."""

    name: str
    space: Space
    epochs: tuple[int, ...]

    def snap(self, params: Params) -> Params:
        """The configuration that is really evaluated: itself, or the nearest row of a table."""

    def loss(self, params: Params, epoch: int, seed: int) -> float:
        """Validation loss after an epoch, with the noise of this seed."""

    def joules(self, params: Params, epoch: int) -> float:
        """Cumulative joules from the start of training to the end of an epoch."""

    def truth(self, params: Params) -> tuple[float, float]:
        """Loss without noise and joules, at the highest fidelity."""

    @property
    def front(self) -> Array:
        """[n, 2] the true front of (loss, joules) at the highest fidelity, ascending in loss."""

    @property
    def median_joules(self) -> float:
        """What the median configuration costs at the highest fidelity."""


@dataclass(frozen=True)
class FunctionProblem:
    """A problem given by formulas over columns of values.

    Attributes:
        curve: (columns, progress) -> [n] loss without noise; progress runs from 0 to 1 at the highest fidelity.
        epoch_joules: columns -> [n] joules of an epoch.
        start_joules: what starting a trial costs, whatever its length.
        noise: progress -> standard deviation of the loss.
    """

    name: str
    space: Space
    epochs: tuple[int, ...]
    curve: Callable[[dict[str, Array], float], Array]
    epoch_joules: Callable[[dict[str, Array]], Array]
    start_joules: float
    noise: Callable[[float], float]

    def snap(self, params: Params) -> Params:
        """The configuration itself."""
        return params

    def progress(self, epoch: int) -> float:
        """Place of an epoch between the first one and the last, on a log scale."""
        return math.log(epoch) / math.log(self.epochs[-1])

    def loss(self, params: Params, epoch: int, seed: int) -> float:
        """Noise follows from configuration, epoch and seed alone: asked twice, the answer is the same."""
        s = self.progress(epoch)
        key = zlib.crc32(repr((self.name, sorted(params.items()), epoch, seed)).encode())
        noise = self.noise(s) * np.random.default_rng(key).standard_normal()
        return float(self.curve(self._columns(params), s)[0] + noise)

    def joules(self, params: Params, epoch: int) -> float:
        """Proportional to epochs, beyond what the start costs."""
        return float(self.start_joules + epoch * self.epoch_joules(self._columns(params))[0])

    def truth(self, params: Params) -> tuple[float, float]:
        """Closed form."""
        return float(self.curve(self._columns(params), 1.0)[0]), self.joules(params, self.epochs[-1])

    def outcomes(self, unit: Array) -> Array:
        """[n, 2] loss without noise and joules at the highest fidelity of points in the unit cube."""
        columns = decoded(self.space, unit)
        joules = self.start_joules + self.epochs[-1] * self.epoch_joules(columns)
        return np.column_stack([self.curve(columns, 1.0), joules])

    @cached_property
    def _sample(self) -> Array:
        points: Array = qmc.Sobol(len(self.space), seed=0).random(N_SAMPLE)
        return points

    @cached_property
    def median_joules(self) -> float:
        """Over a Sobol sample of the unit cube."""
        return float(np.median(self.outcomes(self._sample)[:, 1]))

    @cached_property
    def front(self) -> Array:
        """A dense sample, then rounds of children around the front found so far, with ever smaller steps."""
        rng = np.random.default_rng(0)
        elite, values = _non_dominated(self._sample, self.outcomes(self._sample))
        for step in 0.2 / 3.0 ** np.arange(N_ROUNDS):
            parents = elite[rng.integers(len(elite), size=N_CHILDREN)]
            moved = rng.random(parents.shape) < rng.choice([1.0, 0.5, 1.0 / parents.shape[1]], size=(N_CHILDREN, 1))
            children = np.clip(parents + step * rng.standard_normal(parents.shape) * moved, 0.0, 1.0)
            points = np.vstack([elite, children])
            elite, values = _non_dominated(points, np.vstack([values, self.outcomes(children)]))
        return thinned(values)

    def _columns(self, params: Params) -> dict[str, Array]:
        return decoded(self.space, to_unit(self.space, params)[None])


@dataclass(frozen=True)
class KnownFront(FunctionProblem):
    """A function whose front is known: the configurations it is made of, in the unit cube, densely."""

    optimal: Callable[[], Array] | None = None

    @cached_property
    def front(self) -> Array:
        """Of the configurations known to be optimal, those that no other dominates."""
        assert self.optimal is not None
        points = self.optimal()
        return thinned(_non_dominated(points, self.outcomes(points))[1])


def reference_point(front: Array) -> tuple[float, float]:
    """The worst loss and joules on the true front, and a tenth of its extent beyond."""
    worst, best = front.max(axis=0), front.min(axis=0)
    extent = np.where(worst > best, worst - best, np.maximum(np.abs(worst), 1.0))
    loss, joules = worst + MARGIN * extent
    return float(loss), float(joules)


def true_hypervolume(front: Array) -> float:
    """What a search that has found everything would score."""
    return hypervolume(front, reference_point(front))


def reduction(problem: Problem) -> int:
    """The factor between fidelities where it is one whole number, else 3."""
    factors = {b / a for a, b in pairwise(problem.epochs)}
    factor = factors.pop() if len(factors) == 1 else 3.0
    return int(factor) if factor.is_integer() else 3


def reports(problem: Problem) -> list[int]:
    """Epochs at which every method is told the loss: the problem's, and the rungs."""
    return sorted({*problem.epochs, *rungs(problem)})


def rungs(problem: Problem) -> list[int]:
    """Epochs at which successive halving compares: the first, times the reduction factor, and so on below the last."""
    found, epoch = [], problem.epochs[0]
    while epoch < problem.epochs[-1]:
        found.append(epoch)
        epoch *= reduction(problem)
    return found


def drawn(problem: FunctionProblem, n: int, seed: int) -> list[Params]:
    """Random configurations of a problem."""
    rng = np.random.default_rng(seed)
    return [from_unit(problem.space, point) for point in rng.random((n, len(problem.space)))]


def thinned(values: Array, n: int = 4000) -> Array:
    """At most n of a front's points, ascending in loss."""
    ordered = np.unique(values, axis=0)
    return ordered[np.unique(np.linspace(0, len(ordered) - 1, n).astype(int))]


def _non_dominated(points: Array, values: Array) -> tuple[Array, Array]:
    order = np.lexsort((values[:, 1], values[:, 0]))
    lowest = np.minimum.accumulate(values[order, 1])
    kept = order[np.concatenate(([True], values[order, 1][1:] < lowest[:-1]))]
    return points[kept], values[kept]


def non_dominated(values: Array) -> Array:
    """[m, 2] the points on the front, each once, ascending in loss."""
    return np.unique(values[non_dominated_ranks(values) == 0], axis=0)
