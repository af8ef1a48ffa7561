"""What the search believes: loss, joules and limits of a configuration at full fidelity, from all that was observed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from wattier.acquisition import ShiftedLogNormal, expected_hypervolume_improvement, expected_improvement
from wattier.encoding import Encoder
from wattier.records import Params
from wattier.surrogate import GaussianProcess, Kernel

Array = NDArray[np.float64]
CostOf = Callable[[Sequence[Params]], NDArray[np.float64]]

N_MODEL = 200  # observations a model is conditioned on
N_KERNEL = 100  # observations its kernel is fitted to
LARGEST = 1e100
FLOORS = (0.0, 0.3, 3.0)  # candidates for `Scale.floor`
MARGIN = 0.1  # of the range of each objective, beyond the worst that was seen: as `select.compare` does
OPTIMISM = 1.0  # standard deviations of the loss by which a candidate may turn out better, see `Beliefs.aim`
EXCESS_OF_LOST = 2.0  # times what is allowed
DOUBT = 0.2  # trials that were not lost, believed of a place where nobody was
SMALLEST = 1e-300


class Observation(NamedTuple):
    """What one trial showed at one fidelity; a trial that passed several may give one for each, in their order.

    Attributes:
        params: hyper-parameters by name.
        fidelity: share of the sampled stage's fidelity (epochs times structures), in (0, 1].
        loss: first objective there, finite; a diverged trial is no observation.
        joules: second objective projected to fidelity 1; None = single objective.
        limits: measured / allowed for each constraint; above 1 = infeasible.
        complete: it finished fidelity 1; only such ones are on a front.
    """

    params: Params
    fidelity: float
    loss: float
    joules: float | None
    limits: Mapping[str, float]
    complete: bool


class Outlook(NamedTuple):
    """What is believed of n candidates: encoded configurations, loss, joules (second objective), and projected cost."""

    x: Array
    loss: ShiftedLogNormal
    joules: ShiftedLogNormal | None
    cost: Array | None


class Scale(NamedTuple):
    """log(value - shift); the shift lies `floor` times the distance from the lowest to the median below the lowest.

    0 is the plain logarithm, a large floor is nearly linear.
    """

    floor: float

    def shift(self, values: Array) -> float:
        """What is taken from values before the logarithm."""
        lowest = float(values.min())
        if self.floor == 0 and lowest > 0:
            return 0.0
        floor = self.floor or FLOORS[1]
        return lowest - floor * (float(np.median(values)) - lowest) - 1e-9 * (1 + abs(lowest))


class Kernels:
    """Kernels and scales of the models, each fitted to the first m observations for some m close to all.

    So a fit serves several proposals, and a resumed run, which knows the same observations in the same order, finds
    the same ones.
    """

    def __init__(self) -> None:
        self._fitted: dict[tuple[str, int], tuple[Kernel, Scale]] = {}

    def get(self, name: str, x: Array, z: Array, values: Array, groups: NDArray[np.int64]) -> tuple[Kernel, Scale]:
        """The kernel and scale of highest posterior density; the scale's derivative is part of the density."""
        key = (name, _milestone(len(values)))
        if key not in self._fitted:
            rows = np.unique(np.linspace(0, key[1] - 1, min(key[1], N_KERNEL)).astype(int))
            self._fitted = {known: fit for known, fit in self._fitted.items() if known[0] != name}
            self._fitted[key] = _best_fit(x[rows], z[rows], values[rows], groups)
        return self._fitted[key]


def _milestone(n: int) -> int:
    """n up to 24, then the last step of a sequence that grows by an eighth at a time."""
    if n <= 24:
        return n
    milestone = 24
    while milestone + milestone // 8 <= n:
        milestone += milestone // 8
    return milestone


def _best_fit(x: Array, z: Array, values: Array, groups: NDArray[np.int64]) -> tuple[Kernel, Scale]:
    plain = values.min() > 1e-3 * np.median(values) > 0
    fits = []
    for floor in FLOORS if plain else FLOORS[1:]:
        scale = Scale(floor)
        logs = np.log(values - scale.shift(values))
        process, evidence = GaussianProcess.fit(x, z, logs, groups)
        fits.append((evidence - float(logs.sum()), process.kernel, scale))
    _, kernel, scale = max(fits, key=lambda fit: fit[0])
    return kernel, scale


class Beliefs:
    """Models conditioned on what is known now.

    Args:
        encoder: of the search space.
        kernels: fitted earlier, extended here.
        observations: at least one.
        pending: configurations that run now: they are believed to end as expected (kriging believer).
        lost: configurations that diverged or failed.
        cost: projected joules of full trials by a cost model; the joules' model then learns how far it is off.
    """

    def __init__(  # noqa: PLR0913, PLR0917  (all that is known)
        self,
        encoder: Encoder,
        kernels: Kernels,
        observations: Sequence[Observation],
        pending: Sequence[Params],
        lost: Sequence[Params],
        cost: CostOf | None,
    ) -> None:
        self.encoder, self.kernels, self.cost = encoder, kernels, cost
        self.two_objectives = all(observation.joules is not None for observation in observations)
        self.x = encoder.encode([observation.params for observation in observations])
        self.keys = [encoder.key(o.params) for o in observations]
        self.latest = list({key: index for index, key in enumerate(self.keys)}.values())
        losses = _winsorised(np.clip([o.loss for o in observations], -LARGEST, LARGEST))
        fidelities = np.clip([o.fidelity for o in observations], 1e-9, 1.0)
        kept = _informative(observations)
        waiting = encoder.encode(pending)
        z = np.log(fidelities) / math.log(min(float(fidelities.min()), 0.999))
        kernel, scale = kernels.get("loss", self.x, z, losses, encoder.groups)
        self.loss_shift = scale.shift(losses)
        self.rows = self.x[kept]
        logs = np.log(losses[kept] - self.loss_shift)
        self.loss = GaussianProcess(self.rows, z[kept], logs, encoder.groups, kernel)
        believed = np.empty((0, 2))
        if self.two_objectives:
            joules = np.maximum([observations[index].joules or 0.0 for index in self.latest], 1e-12)
            if cost is not None:
                joules = joules / np.maximum(cost([observations[index].params for index in self.latest]), 1e-12)
            self.joules, self.joules_shift = self._latest_model("joules", joules)
            believed = np.column_stack(self._expected(waiting, pending)) if pending else believed
        if pending:
            means, _ = self.loss.predict(waiting)
            x, at = np.vstack([self.rows, waiting]), np.append(z[kept], np.zeros(len(pending)))
            self.loss = GaussianProcess(x, at, np.append(logs, means), encoder.groups, kernel)
        self._set_front(observations, believed)
        self.limits = [*self._limit_models(observations), *self._lost_model(lost)]
        self.lost = encoder.encode(lost)

    def outlook(self, candidates: Sequence[Params]) -> Outlook:
        """What is believed of candidates: the part that takes time."""
        x = self.encoder.encode(candidates)
        loss = ShiftedLogNormal(*self.loss.predict(x), self.loss_shift)
        cost = None if self.cost is None else np.maximum(self.cost(candidates), SMALLEST)
        if self.two_objectives:
            return Outlook(x, loss, ShiftedLogNormal(*self._log_joules(x, candidates)), cost)
        return Outlook(x, loss, None, cost)

    def score(self, outlook: Outlook, affordable_joules: float | None = None) -> Array:
        """What candidates promise: expected gain in hypervolume (or loss) per joule, times their chance to be valid."""
        if outlook.joules is not None:
            gain = expected_hypervolume_improvement(self.front, self.reference_point, outlook.loss, outlook.joules)
            joules = self._mid_joules(outlook.joules)
        else:
            gain = expected_improvement(self.best_loss, outlook.loss)
            joules = np.ones(len(outlook.x)) if outlook.cost is None else outlook.cost
        score = gain / joules * self._chance_valid(outlook.x)
        if affordable_joules is not None:
            # What is compared may be joules a structure, or to convergence: a budget is of whole trials.
            price = joules if outlook.cost is None else outlook.cost
            score = np.where(price > affordable_joules, score * 1e-9, score)
        return np.asarray(np.nan_to_num(score, nan=0.0, posinf=0.0))

    def expected_joules(self, candidates: Sequence[Params]) -> Array:
        """Projected joules of full trials."""
        x = self.encoder.encode(candidates)
        return self._mid_joules(ShiftedLogNormal(*self._log_joules(x, candidates)))

    def _mid_joules(self, joules: ShiftedLogNormal) -> Array:
        return np.maximum(_exp(joules.log_mean) + joules.shift, self.least_joules)

    def _set_front(self, observations: Sequence[Observation], believed: Array) -> None:
        done = [o for o in observations if o.complete and all(ratio <= 1 for ratio in o.limits.values())]
        seen = self.x[self.latest[-N_MODEL:]]
        expected = _exp(self.loss.predict(seen)[0]) + self.loss_shift
        worst_loss = float(expected.max())
        self.best_loss = min((o.loss for o in done), default=worst_loss)
        if not self.two_objectives:
            return
        joules = [o.joules for o in observations if o.joules is not None]
        known = np.array([(o.loss, o.joules) for o in done], dtype=np.float64).reshape(-1, 2)
        self.front = np.vstack([known, believed])
        self.least_joules = max(0.3 * min(joules), SMALLEST)
        self.worst = (worst_loss, max(joules))

    def aim(self, outlook: Outlook) -> None:
        """Set the reference point: a tenth of its extent beyond the worst corner of the front that may be.

        That front is made of what was measured and of what candidates reach if their losses turn out a standard
        deviation below what is expected: else a model that knows only cheap configurations would rule dear ones out.
        Around a wider front the search would spend joules on ends that no front has.
        """
        if outlook.joules is None:
            return
        mean, sd, _ = outlook.loss
        joules = self._mid_joules(outlook.joules)
        worst, best = np.full(2, -math.inf), np.full(2, math.inf)
        for losses in (mean, mean - OPTIMISM * sd):
            reached = np.column_stack([_exp(losses) + self.loss_shift, joules])
            front = non_dominated(np.vstack([self.front, reached]))
            worst, best = np.maximum(worst, front.max(axis=0)), np.minimum(best, front.min(axis=0))
        worst = np.where(worst > best, worst, np.maximum(self.worst, worst))
        corner = worst + MARGIN * (worst - best) + 1e-12 * (1 + np.abs(worst))
        self.reference_point = (float(corner[0]), float(corner[1]))

    def _latest_model(self, name: str, values: Array) -> tuple[GaussianProcess, float]:
        """A model of what hardly depends on fidelity: the latest value of each configuration, and its scale's shift."""
        return self._model(name, self.x[self.latest], np.minimum(values, LARGEST))

    def _model(self, name: str, x: Array, values: Array) -> tuple[GaussianProcess, float]:
        z, kept = np.zeros(len(values)), slice(-N_MODEL, None)
        kernel, scale = self.kernels.get(name, x, z, values, self.encoder.groups)
        shift = scale.shift(values)
        return GaussianProcess(x[kept], z[kept], np.log(values[kept] - shift), self.encoder.groups, kernel), shift

    def _log_joules(self, x: Array, candidates: Sequence[Params]) -> tuple[Array, Array, float | Array]:
        mean, sd = self.joules.predict(x)
        if self.cost is None:
            return mean, sd, self.joules_shift
        prior = np.maximum(self.cost(candidates), 1e-12)
        return mean + np.log(prior), sd, self.joules_shift * prior

    def _expected(self, x: Array, candidates: Sequence[Params]) -> tuple[Array, Array]:
        mean, _, shift = self._log_joules(x, candidates)
        return _exp(self.loss.predict(x)[0]) + self.loss_shift, _exp(mean) + shift

    def _limit_models(self, observations: Sequence[Observation]) -> list[tuple[GaussianProcess, float]]:
        """A model for each constraint that somebody has come near to."""
        latest = [observations[index].limits for index in self.latest]
        models = []
        for name in sorted({name for limits in latest for name in limits}):
            values = np.array([max(float(limits.get(name, 0.0)), 1e-6) for limits in latest])
            if values.max() > 0.5:
                models.append(self._latest_model(f"limit {name}", values))
        return models

    def _lost_model(self, lost: Sequence[Params]) -> list[tuple[GaussianProcess, float]]:
        """What diverged or failed, as if it had used too much of something that all others used little of."""
        if not lost:
            return []
        taken = {self.encoder.key(params) for params in lost}
        fine = [row for row in self.latest if self.keys[row] not in taken]
        x = np.vstack([self.x[fine], self.encoder.encode(lost)])
        return [self._model("lost", x, np.repeat([1 / EXCESS_OF_LOST, EXCESS_OF_LOST], [len(fine), len(lost)]))]

    def _chance_valid(self, x: Array) -> Array:
        chance = np.ones(len(x))
        for model, shift in self.limits:
            mean, sd = model.predict(x)
            room = max(1.0 - shift, SMALLEST)
            chance *= ndtr((math.log(room) - mean) / sd)
        if len(self.lost):
            width = 0.15 * math.sqrt(x.shape[1])
            fine, lost = _nearby(x, self.rows, width), _nearby(x, self.lost, width)
            chance *= (fine + DOUBT) / (fine + lost + DOUBT)
        return chance


def _nearby(x: Array, centres: Array, width: float) -> Array:
    """Number of centres around each row, softly counted."""
    squared = ((x[:, None, :] - centres[None, :, :]) ** 2).sum(axis=2)
    return np.asarray(np.exp(-0.5 * squared / width**2).sum(axis=1))


def non_dominated(points: Array) -> Array:
    """The front of [n, 2] points, each once, ascending in the first objective."""
    ordered = points[np.lexsort((points[:, 1], points[:, 0]))]
    lowest = np.minimum.accumulate(np.append(np.inf, ordered[:, 1]))
    return ordered[ordered[:, 1] < lowest[:-1]]


def _exp(values: Array) -> Array:
    return np.exp(np.clip(values, -690.0, 690.0))


def _winsorised(losses: Array) -> Array:
    """Losses far worse than the rest moved to where outliers begin, on a log scale above the lowest (Tukey's fence)."""
    lowest, floor = losses.min(), 0.3 * (np.median(losses) - losses.min()) + 1e-9 * (1 + abs(losses.min()))
    logs = np.log(losses - lowest + floor)
    quarter, three = np.quantile(logs, [0.25, 0.75])
    fence = three + 1.5 * (three - quarter) + 1e-9
    return np.where(logs > fence, np.exp(fence) - floor + lowest, losses)


def _informative(observations: Sequence[Observation]) -> NDArray[np.int64]:
    """At most `N_MODEL` rows: the best losses among finished trials of similar joules, the latest, and some of all."""
    n = len(observations)
    if n <= N_MODEL:
        return np.arange(n)
    done = np.array([index for index, o in enumerate(observations) if o.complete], dtype=np.int64)
    by_joules = done[np.argsort([observations[index].joules or 0.0 for index in done], kind="stable")]
    best = [
        index
        for part in np.array_split(by_joules, 10)
        for index in sorted(part, key=lambda index: observations[index].loss)[: N_MODEL // 20]
    ]
    latest = np.arange(n - N_MODEL // 4, n)
    spread = np.linspace(0, n - 1, N_MODEL // 4).astype(np.int64)
    return np.unique(np.concatenate([np.array(best, dtype=np.int64), latest, spread]))
