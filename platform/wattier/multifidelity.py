"""Where to search next: the configuration that promises the most hypervolume per joule at full fidelity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc
from threadpoolctl import ThreadpoolController

from wattier.beliefs import Beliefs, CostOf, Kernels, Observation
from wattier.config_space import ChoiceParameter, RangeParameter
from wattier.encoding import Encoder
from wattier.pareto import non_dominated_ranks
from wattier.records import Params

__all__ = ["MultiFidelitySampler", "Observation"]
Array = NDArray[np.float64]
Key = tuple[object, ...]

N_SPREAD = 512  # candidates all over the space
N_NEAR = 256  # candidates near the front
N_LISTED = 2000  # a space of no more configurations is searched whole
N_CENTRES = 12
SCOUTS_A_PARAMETER = 8
SCOUTS_COST = 1.5  # full trials
WORTH = 0.5


def scouts(n_parameters: int, epochs: int, trials: int) -> int:
    """How many trials of a stage are looked at for one rung only, to learn what the space is like.

    Joules and much of the loss are known from the first epoch on. Eight a parameter, as long as all of them together
    cost no more than a trial and a half, and take no more than a fifth of the stage's trials.
    """
    return min(SCOUTS_A_PARAMETER * n_parameters, int(SCOUTS_COST * epochs), trials // 5)


class MultiFidelitySampler:
    """Bayesian optimisation over hyper-parameters and fidelity, by expected hypervolume improvement per joule.

    The first trials are spread over the space (a Sobol sequence), cheap ones first where joules can be foreseen. Then
    one Gaussian process learns the loss from all fidelities, another one the joules, and the next trial is the one with
    the largest expected gain in hypervolume at full fidelity divided by its joules. A trial that was stopped early may
    be proposed again.

    A proposal depends on the seed and on what is known, not on earlier calls: a resumed run proposes the same.

    Args:
        space: parameters by name.
        seed: of the random candidates.
        n_scouts: trials at the beginning that end at their first rung, see `scouts`.
    """

    def __init__(self, space: Mapping[str, RangeParameter | ChoiceParameter], seed: int, n_scouts: int = 0) -> None:
        self.encoder = Encoder(space)
        self.seed, self.n_scouts = seed, n_scouts
        self.n_first = max(5, min(len(self.encoder.space) + 2, 10), n_scouts)
        self._kernels = Kernels()
        self._listed = self.encoder.all() if self.encoder.size(N_LISTED) is not None else None
        self._threads = ThreadpoolController()

    def suggest(
        self,
        observations: Sequence[Observation],
        *,
        pending: Sequence[Params] = (),
        lost: Sequence[Params] = (),
        cost: CostOf | None = None,
        affordable_joules: float | None = None,
    ) -> Params | None:
        """The next configuration to run; None when every one of a finite space has run, runs, or is lost.

        Args:
            observations: in the order in which they were made.
            pending: configurations that run now.
            lost: configurations that diverged or failed.
            cost: projected joules of full trials, if a cost model knows.
            affordable_joules: what is left; a configuration that needs more is proposed only if all do.
        """
        # Matrices are small: threads cost more than they give (30 times more, measured on two cores).
        with self._threads.limit(limits=1, user_api="blas"):
            closed = {self.encoder.key(o.params) for o in observations if o.complete}
            closed |= {self.encoder.key(params) for params in (*pending, *lost)}
            tried = {self.encoder.key(o.params): o.params for o in observations}
            rng = np.random.default_rng([self.seed, len(observations), len(pending), len(lost)])
            beliefs = None
            if len(tried) >= 3:
                beliefs = Beliefs(self.encoder, self._kernels, observations, pending, lost, cost)
            if beliefs is None or len(closed | set(tried)) < self.n_first:
                known = [*tried.values(), *pending, *lost]
                return self._spread(known, closed, rng, beliefs, cost, affordable_joules)
            return self._best(beliefs, self._candidates(observations, closed, rng), closed, rng, affordable_joules)

    def goes_on(
        self,
        observations: Sequence[Observation],
        trial: Sequence[Observation],
        *,
        pending: Sequence[Params] = (),
        lost: Sequence[Params] = (),
        cost: CostOf | None = None,
    ) -> bool:
        """Whether a running trial is worth its remaining joules: whether it promises at least half as much for a joule
        as the best trial that could be started instead.

        The scouts, which say what the space is like, end at their first rung. Nothing is lost by that: a trial that
        turns out well may be proposed again.

        Args:
            observations: of other trials.
            trial: what this one has shown at its rungs, the latest last.
            pending: other configurations that run now.
            lost: configurations that diverged or failed.
            cost: as in `suggest`.
        """
        latest = trial[-1]
        tried = {self.encoder.key(o.params) for o in (*observations, latest)}
        if len(tried) <= self.n_first:
            return len(tried) > self.n_scouts
        with self._threads.limit(limits=1, user_api="blas"):
            known = [*observations, *trial]
            rng = np.random.default_rng([self.seed, len(known), len(pending), len(lost)])
            closed = {self.encoder.key(o.params) for o in known if o.complete}
            closed |= {self.encoder.key(params) for params in (*pending, *lost, latest.params)}
            candidates = self._candidates(known, closed, rng)
            if not candidates:
                return True
            beliefs = Beliefs(self.encoder, self._kernels, known, pending, lost, cost)
            outlook = beliefs.outlook([latest.params, *candidates])
            beliefs.aim(outlook)
            scores = beliefs.score(outlook)
            left = max(1.0 - latest.fidelity, 1e-9)
            return bool(scores[0] / left >= WORTH * scores[1:].max())

    def _best(
        self,
        beliefs: Beliefs,
        candidates: list[Params],
        closed: set[Key],
        rng: np.random.Generator,
        joules: float | None,
    ) -> Params | None:
        if not candidates:
            return None
        outlook = beliefs.outlook(candidates)
        beliefs.aim(outlook)
        scores = beliefs.score(outlook, joules)
        if self._listed is None:  # look closer around the best
            top = [candidates[index] for index in np.argsort(-scores, kind="stable")[: N_CENTRES // 2]]
            closer = self._near(top, closed, rng, N_NEAR // 2, reach=(-2.3, -1.0))
            candidates, scores = candidates + closer, np.append(scores, beliefs.score(beliefs.outlook(closer), joules))
        return candidates[int(np.argmax(scores))]

    def _spread(  # noqa: PLR0913, PLR0917  (all that is known)
        self,
        known: Sequence[Params],
        closed: set[Key],
        rng: np.random.Generator,
        beliefs: Beliefs | None,
        cost: CostOf | None,
        joules: float | None,
    ) -> Params | None:
        """The point of a low-discrepancy sequence that is farthest from what is known, for the root of its joules."""
        known_keys = {self.encoder.key(params) for params in known}
        points = qmc.Sobol(len(self.encoder.space), rng=np.random.default_rng(self.seed)).random(128)
        candidates = self._open([self.encoder.at(point) for point in points], closed | known_keys)[:64]
        if not candidates:
            candidates = self._candidates([], closed | known_keys, rng) or self._candidates([], closed, rng)
        if not candidates:
            return None
        x = self.encoder.encode(candidates)
        distance = np.ones(len(x))
        if known:
            gaps = x[:, None, :] - self.encoder.encode(known)[None, :, :]
            distance = np.sqrt((gaps**2).sum(axis=2)).min(axis=1)
        if beliefs is not None and beliefs.two_objectives:
            distance /= np.sqrt(beliefs.expected_joules(candidates))
        elif cost is not None:
            distance /= np.sqrt(np.maximum(cost(candidates), 1e-12))
        if cost is not None and joules is not None:
            distance = np.where(cost(candidates) > joules, distance * 1e-9, distance)
        return candidates[int(np.argmax(distance))]

    def _candidates(
        self, observations: Sequence[Observation], closed: set[Key], rng: np.random.Generator
    ) -> list[Params]:
        if self._listed is not None:
            return self._open(self._listed, closed)
        points = qmc.Sobol(len(self.encoder.space), rng=rng).random(N_SPREAD)
        stopped = [o.params for o in observations[-2 * N_NEAR :] if not o.complete]
        everywhere = self._open([*stopped, *(self.encoder.at(point) for point in points)], closed)
        done = [o for o in observations if o.complete] or list(observations)
        if not done:
            return everywhere
        done = done[-4 * N_NEAR :]
        ranks = non_dominated_ranks([(o.loss, o.joules or 0.0) for o in done])
        centres = [done[index].params for index in np.argsort(ranks, kind="stable")[:N_CENTRES]]
        return everywhere + self._near(centres, closed, rng, N_NEAR, reach=(-1.7, -0.5))

    def _near(
        self,
        centres: Sequence[Params],
        closed: set[Key],
        rng: np.random.Generator,
        count: int,
        reach: tuple[float, float],
    ) -> list[Params]:
        """Configurations that differ from a centre in some parameters, by steps of 10 ** reach of the range."""
        units = np.array([self.encoder.unit(params) for params in centres])
        size = (count, units.shape[1])
        moved = rng.random(size) < max(0.3, 1.5 / size[1])
        steps = 10 ** rng.uniform(*reach, size=(count, 1)) * rng.standard_normal(size)
        near = units[rng.integers(len(units), size=count)] + moved * steps
        near = np.where(rng.random(size) < 0.3 / size[1], rng.random(size), near)
        return self._open([self.encoder.at(point) for point in np.clip(near, 0.0, math.nextafter(1.0, 0.0))], closed)

    def _open(self, candidates: Sequence[Params], closed: set[Key]) -> list[Params]:
        """Each candidate once, without those that are closed."""
        unique = {self.encoder.key(params): params for params in candidates}
        return [params for key, params in unique.items() if key not in closed]
