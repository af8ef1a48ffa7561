"""Joules and seconds of a trial before it runs: physics first, then what finished trials say, with an error bar."""

from __future__ import annotations

import bisect
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wattier.config_space import ChoiceParameter, RangeParameter
from wattier.cost_encoding import Encoding
from wattier.cost_regression import CostRegression, Rows
from wattier.device_prior import ANY_DEVICE, TERM_DOUBTS, DevicePrior
from wattier.records import Fidelity, Params

if TYPE_CHECKING:  # which imports torch
    from wattier.workload import Workload

MOST_ROWS = 192  # that are learned from at once; a refit stays within some tens of milliseconds
OWN_TERMS = 2  # of a model of which nothing is known: the amount of training, and a process
UNKNOWN_SCALE, UNKNOWN_RATIO = 1e9, 10.0
# What a guess's factor is made of: one for all terms (watts, a busy machine), and one for each (how well products,
# memory and operators are used). Together they are the factor, in squares, where one term is all the work.
COMMON_SHARE, OWN_SHARE = 0.8, 0.6
LARGEST = 1e18  # joules or seconds: what an exascale machine takes in a thousand years; more is a fault


class Projection(NamedTuple):
    """What a trial will cost. NaN = unknown: no trial has finished, and there is nothing to guess from.

    joules, seconds: medians. low, high: the 16th and 84th percentile of one such trial's cost as it will be measured
    (noise of measurements and of the machine included), so that 68 % of trials fall between them; both are divided
    and multiplied by the same factor. seconds: wall time, all ranks at work at once.
    basis: in words, what it rests on.
    """

    joules: float
    joules_low: float
    joules_high: float
    seconds: float
    seconds_low: float
    seconds_high: float
    basis: str


class _Row(NamedTuple):
    """One observation: order decides nothing, so rows are sorted by `key`, a hash of all else.

    Of one fidelity and method, those with the lowest keys stand for all, a random choice that no order changes: more
    than MOST_ROWS of them are never looked at, and so not kept.
    """

    key: bytes
    params: Params
    fidelity: Fidelity
    share: float
    workload: Workload | None
    joules: float | None
    seconds: float | None
    method: str | None


class EnergyModel:
    """Predicts joules and seconds from hyper-parameters and fidelity, and learns from each finished trial.

    Args:
        workload: the physical size of a trial; None for a user's own model, of which hyper-parameters, structures,
            epochs and ranks are all that is known.
        space: ranges and choices of the hyper-parameters, where they are known.
        prior: the device's speed and power before any trial; None = no guess before the first trial.

    Attributes:
        ignored: observations that were not learned from, by reason.
    """

    def __init__(
        self,
        workload: Callable[[Params, Fidelity], Workload] | None,
        space: Mapping[str, RangeParameter | ChoiceParameter] | None = None,
        prior: DevicePrior | None = None,
    ) -> None:
        self._workload, self._space, self._prior = workload, space, prior
        self._piles: dict[tuple[Fidelity, str | None, bool, bool], list[_Row]] = {}
        self._heard: Counter[tuple[Fidelity, str | None, bool, bool]] = Counter()
        self._fits: dict[str, _Fit] = {}
        self.ignored: Counter[str] = Counter()

    @property
    def knows_the_work(self) -> bool:
        """Whether it rests on the work of a trial, not on hyper-parameters alone."""
        return self._workload is not None

    def observe(  # noqa: PLR0913
        self,
        params: Params,
        fidelity: Fidelity,
        *,
        joules: float | None,
        seconds: float | None,
        share: float = 1.0,
        method: str | None = None,
    ) -> None:
        """Learn from a trial that ended.

        Args:
            params: its hyper-parameters.
            fidelity: what it was to do.
            joules: what it cost; None = not known.
            seconds: its wall time; None = not known.
            share: part of the fidelity that it did, such as epochs_done / epochs; above 0.
            method: how the joules are known (counter, integrated, estimated). Joules of different methods are not
                mixed: those of the most frequent one are learned from.
        """
        if not (math.isfinite(share) and 0 < share <= 1):
            self.ignored["it did nothing of its fidelity" if share == 0 else "its share is not within 0 to 1"] += 1
            return
        kept_joules, kept_seconds = self._checked("joules", joules), self._checked("seconds", seconds)
        if kept_joules is None and kept_seconds is None:
            return
        workload = self._workload(params, fidelity) if self._workload else None
        if workload is not None and not all(map(math.isfinite, workload)):
            self.ignored["its work is not known"] += 1
            return
        text = f"{sorted(params.items(), key=repr)} {fidelity} {share} {kept_joules} {kept_seconds} {method}"
        row = _Row(
            hashlib.blake2b(text.encode(), digest_size=8).digest(), params, fidelity, share, workload, kept_joules,
            kept_seconds, method,
        )  # fmt: skip
        kind = (fidelity, method, kept_joules is not None, kept_seconds is not None)
        pile = self._piles.setdefault(kind, [])
        bisect.insort(pile, row, key=lambda row: row.key)
        del pile[MOST_ROWS:]
        self._heard[kind] += 1
        self._fits.clear()

    def project(self, params: Params, fidelity: Fidelity) -> Projection:
        """What a trial will cost."""
        unknown = (math.nan,) * 3
        joules, seconds = (
            fit.interval(params, fidelity) if fit else unknown for fit in (self._fit("joules"), self._fit("seconds"))
        )
        return Projection(*joules, *seconds, self._basis(fidelity))

    def joules(self, many: Sequence[Params], fidelity: Fidelity) -> NDArray[np.float64]:
        """Median joules of many trials [n]; NaN = unknown, see `Projection`."""
        fit = self._fit("joules")
        return fit.medians(many, fidelity) if fit else np.full(len(many), math.nan)

    def _checked(self, what: str, value: float | None) -> float | None:
        """A value that a trial can have cost, or None and a word in `ignored`."""
        reason = None
        if value is None:
            reason = f"its {what} are not known"
        elif not math.isfinite(value):
            reason = f"its {what} are no finite number"
        elif value <= 0:
            reason = f"its {what} are not above 0"
        elif value > LARGEST:
            reason = f"its {what} are above {LARGEST:g}"
        if reason is not None:
            self.ignored[reason] += 1
            return None
        return value

    def _basis(self, fidelity: Fidelity) -> str:
        kinds = self._kinds("joules") or self._kinds("seconds")
        if kinds:
            n, here = (sum(self._heard[k] for k in some) for some in (kinds, [k for k in kinds if k[0] == fidelity]))
            trials = f"{n} finished trial" + ("s" if n > 1 else "")
            return trials if here == n else f"{trials}, {here} of them at this fidelity"
        if self._prior is None or self._workload is None:
            return "no trial yet, and nothing to guess from"
        return f"no trial yet: a guess from the speed of {self._prior.name}, within a factor of {self._prior.factor:g}"

    def _kinds(self, what: str) -> list[tuple[Fidelity, str | None, bool, bool]]:
        """The piles to learn a quantity from; joules from those of the most frequent method alone."""
        if what == "seconds":
            return [kind for kind in self._heard if kind[3]]
        methods: Counter[str | None] = Counter()
        for kind, n in self._heard.items():
            methods[kind[1]] += n if kind[2] else 0
        usual = max(methods, key=lambda method: (methods[method], method or ""), default=None)
        return [kind for kind in self._heard if kind[2] and kind[1] == usual]

    def _fit(self, what: str) -> _Fit | None:
        """The fit to all observations so far, made when it is first asked for."""
        if what not in self._fits:
            rows = _some_of([self._piles[kind] for kind in self._kinds(what)])
            if not rows and (self._prior is None or self._workload is None):
                return None
            self._fits[what] = _Fit(what, rows, self._workload, self._space, self._prior)
        return self._fits[what]


class _Fit:
    """One of the two quantities, fitted to some observations."""

    def __init__(
        self,
        what: str,
        rows: list[_Row],
        workload: Callable[[Params, Fidelity], Workload] | None,
        space: Mapping[str, RangeParameter | ChoiceParameter] | None,
        prior: DevicePrior | None,
    ) -> None:
        self._what, self._workload = what, workload
        self._prior = prior or ANY_DEVICE
        self._encoding = Encoding((row.params for row in rows), space)
        values = np.log([float(getattr(row, what)) for row in rows])
        self._n_terms = OWN_TERMS if workload is None else len(TERM_DOUBTS)
        # All structures, where a user's model says no number, are taken to be as many as were ever named.
        self._all_structures = max((row.fidelity.structures or 1 for row in rows), default=1)
        terms = [self._terms(row.workload, row.fidelity, row.share) for row in rows]
        fidelity = [self._extent(row.workload, row.fidelity, row.share) for row in rows]
        seen = Rows(
            np.array(terms, dtype=np.float64).reshape(len(rows), self._n_terms),
            self._encoding([row.params for row in rows]),
            np.array(fidelity, dtype=np.float64).reshape(len(rows), 2),
        )
        # Of work that is not known, nothing is known of the scale that all trials have in common.
        spread = math.log(UNKNOWN_SCALE if workload is None else self._prior.factor)
        own = math.log(UNKNOWN_RATIO if workload is None else self._prior.factor)
        doubts = np.array(TERM_DOUBTS if workload is not None else (1.0,) * OWN_TERMS)
        self._regression = CostRegression(seen, values, COMMON_SHARE * spread, OWN_SHARE * own * doubts)

    def interval(self, params: Params, fidelity: Fidelity) -> tuple[float, float, float]:
        """Median and the ends of the interval of 68 %."""
        place = self._places([params], fidelity)
        mean, deviation = float(self._regression.log_mean(place)[0]), float(self._regression.log_deviation(place)[0])
        return _exp(mean), _exp(mean - deviation), _exp(mean + deviation)

    def medians(self, many: Sequence[Params], fidelity: Fidelity) -> NDArray[np.float64]:
        """Medians [n]."""
        return np.asarray(np.exp(np.minimum(self._regression.log_mean(self._places(many, fidelity)), 700.0)))

    def _places(self, many: Sequence[Params], fidelity: Fidelity) -> Rows:
        works = [self._workload(params, fidelity) if self._workload else None for params in many]
        terms = np.array([self._terms(work, fidelity, 1.0) for work in works]).reshape(len(many), self._n_terms)
        extents = np.array([self._extent(work, fidelity, 1.0) for work in works]).reshape(len(many), 2)
        return Rows(terms, self._encoding(many), extents)

    def _terms(self, work: Workload | None, fidelity: Fidelity, share: float) -> tuple[float, ...]:
        if work is not None:
            return self._prior.joules(work, share) if self._what == "joules" else self._prior.seconds(work, share)
        done = self._amount(fidelity) * share
        return (done, float(fidelity.ranks)) if self._what == "joules" else (done / fidelity.ranks, 1.0)

    def _extent(self, work: Workload | None, fidelity: Fidelity, share: float) -> tuple[float, float]:
        """Logarithms of the structures gone through, base e, and of ranks, base 2."""
        structures = self._amount(fidelity) if work is None else work.structures
        return math.log(structures * share), math.log2(fidelity.ranks)

    def _amount(self, fidelity: Fidelity) -> float:
        return float((fidelity.structures or self._all_structures) * max(1, fidelity.epochs))


def _some_of(piles: list[list[_Row]]) -> list[_Row]:
    """At most MOST_ROWS, shared out over fidelities as evenly as they allow; in the order of their keys."""
    by_fidelity: dict[Fidelity, list[_Row]] = {}
    for pile in piles:
        by_fidelity.setdefault(pile[0].fidelity, []).extend(pile)
    ordered = sorted(by_fidelity.values(), key=lambda rows: (len(rows), repr(rows[0].fidelity)))
    taken: list[_Row] = []
    for index, rows in enumerate(ordered):
        quota = (MOST_ROWS - len(taken)) // (len(ordered) - index)
        taken += sorted(rows, key=lambda row: row.key)[:quota]
    return sorted(taken, key=lambda row: row.key)


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))
