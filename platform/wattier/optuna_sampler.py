"""Optuna's samplers. What an earlier fidelity taught is told to them on the scale of the present one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from wattier.config_space import ChoiceParameter, RangeParameter
from wattier.pareto import non_dominated_ranks
from wattier.priors import corrected
from wattier.records import Params
from wattier.sampler import Ended, Known, Point
from wattier.space import Space, is_whole

optuna.logging.set_verbosity(optuna.logging.WARNING)
N_STARTUP_TRIALS = 4
POPULATION = 10  # a stage has tens of trials
LEARNS_FROM_PRIORS = ("tpe", "gp")  # the others breed from their own trials
REBUILT_AT_GROWTH = 1.25  # priors are mapped anew when so many more trials have finished
MOST_TRIALS = 500  # of a study: a suggestion of TPE takes time in proportion
_STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


class OptunaSampler:
    """A study of one stage, which holds this stage's trials and what earlier ones suggest.

    It is never the study that mirrors the run for optuna-dashboard.
    """

    repeats = True

    def __init__(self, name: str, space: Space, seed: int, n_objectives: int) -> None:
        self.name, self.n_objectives = name, n_objectives
        self.space = distributions(space)
        self.sampler = _sampler(name, seed)
        self._running: dict[str, optuna.Trial] = {}
        self._ended: list[FrozenTrial] = []
        self._mapped_at = 0
        self.study = self._new_study()

    def suggest(self, trial_id: str, known: Known) -> Params | None:
        """See `Sampler.suggest`; Optuna may suggest what was tried before."""
        self._take_in_priors(known)
        self._running[trial_id] = trial = self.study.ask(self.space)
        return dict(trial.params)

    def take(self, trial_id: str, params: Params) -> None:
        """See `Sampler.take`."""
        self.study.enqueue_trial({name: value for name, value in params.items() if name in self.space})
        self._running[trial_id] = self.study.ask(self.space)

    def drop(self, trial_id: str) -> None:
        """See `Sampler.drop`: Optuna leaves a failed trial out of account."""
        self.study.tell(self._running.pop(trial_id), state=TrialState.FAIL)

    def ended(self, trial: Ended) -> None:
        """Only what finished its stage is COMPLETE; what was stopped or diverged is PRUNED."""
        state = _STATES[trial.status] if trial.values is not None or trial.status != "complete" else TrialState.FAIL
        values = trial.values if state == TrialState.COMPLETE else None
        excess = {name: ratio - 1 for name, ratio in trial.limit_ratios.items()}
        if (asked := self._running.pop(trial.trial_id, None)) is not None:
            for name, value in excess.items():
                asked.set_constraint(name, value)
            if self.n_objectives == 1:
                for epoch, loss in trial.curve.items():
                    asked.report(loss, epoch)
            self.study.tell(asked, values, state=None if state == TrialState.COMPLETE else state)
        if set(trial.params) != set(self.space):
            return
        self._ended.append(
            create_trial(
                state=state,
                values=values,
                params=trial.params,
                distributions=self.space,
                constraints=excess,
                intermediate_values=dict(trial.curve) if self.n_objectives == 1 else None,
            )
        )
        if asked is None:
            self._add(self._ended[-1])

    def _add(self, trial: FrozenTrial) -> None:
        """A trial of an earlier process: samplers that breed number their generations when they are asked."""
        if self.name in LEARNS_FROM_PRIORS or self.name == "random" or trial.state != TrialState.COMPLETE:
            self.study.add_trial(trial)
            return
        self.study.enqueue_trial(trial.params)
        again = self.study.ask(self.space)
        for name, value in trial.constraints.items():
            again.set_constraint(name, value)
        self.study.tell(again, trial.values)

    def _take_in_priors(self, known: Known) -> None:
        """Map earlier values onto this stage's, whenever it has grown enough to say more about the map."""
        crowded = len(self.study.get_trials(deepcopy=False)) > MOST_TRIALS and self.name in LEARNS_FROM_PRIORS
        if not crowded:
            if self.name not in LEARNS_FROM_PRIORS or not known.earlier:
                return
            if self._mapped_at and len(known.finished) < REBUILT_AT_GROWTH * self._mapped_at:
                return
        self._mapped_at = max(1, len(known.finished))
        running = {trial_id: dict(trial.params) for trial_id, trial in self._running.items()}
        self.study = self._new_study()
        priors = [point for point in corrected(known.earlier, known.finished) if set(point.params) == set(self.space)]
        room = MOST_TRIALS // 2
        self.study.add_trials([self._prior(point) for point in priors[-room:]])
        self.study.add_trials(_kept(self._ended, room))
        for trial_id, params in running.items():
            self.take(trial_id, params)

    def _prior(self, point: Point) -> FrozenTrial:
        return create_trial(values=point.values, params=point.params, distributions=self.space)

    def _new_study(self) -> optuna.Study:
        return optuna.create_study(directions=["minimize"] * self.n_objectives, sampler=self.sampler)


def distributions(space: Mapping[str, RangeParameter | ChoiceParameter]) -> dict[str, BaseDistribution]:
    """A space of `typed_space` in Optuna's words."""
    return {name: _distribution(parameter) for name, parameter in space.items()}


def _distribution(parameter: RangeParameter | ChoiceParameter) -> BaseDistribution:
    if isinstance(parameter, ChoiceParameter):
        return CategoricalDistribution(parameter.choices)
    if is_whole(parameter):
        step = int(parameter.step or 1)
        return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log, step=step)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)


def _kept(ended: Sequence[FrozenTrial], count: int) -> list[FrozenTrial]:
    """Where there is room for so many only: the best of all, and the newest of the rest, in their order."""
    if len(ended) <= count:
        return list(ended)
    complete = [i for i, trial in enumerate(ended) if trial.state == TrialState.COMPLETE]
    values = [ended[i].values for i in complete]
    two = bool(values) and len(values[0]) == 2
    order = np.argsort(non_dominated_ranks(values) if two else [value[0] for value in values], kind="stable")
    best = {complete[i] for i in order[: count // 2]}
    newest = [i for i in range(len(ended) - 1, -1, -1) if i not in best][: count - len(best)]
    return [ended[i] for i in sorted(best | set(newest))]


def _sampler(name: str, seed: int) -> BaseSampler:
    if name == "random":
        return RandomSampler(seed=seed)
    if name == "nsga2":
        return NSGAIISampler(seed=seed, population_size=POPULATION)
    if name == "nsga3":
        with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore"):
            return NSGAIIISampler(seed=seed, population_size=POPULATION)
    if name == "gp":
        return GPSampler(seed=seed, n_startup_trials=N_STARTUP_TRIALS)
    if name == "cmaes":
        return CmaEsSampler(seed=seed, n_startup_trials=N_STARTUP_TRIALS, warn_independent_sampling=False)
    return TPESampler(seed=seed, n_startup_trials=N_STARTUP_TRIALS)
