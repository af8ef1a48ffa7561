"""The price of a run's trials before they run, learned from those that ended."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from wattier.config import RunConfig
from wattier.config_search import BudgetSection, StageSection
from wattier.device_prior import prior_of
from wattier.energy_model import EnergyModel, Projection
from wattier.errors import UserError
from wattier.records import Fidelity, Params, TrialResult
from wattier.rundir import FULL_STAGE, RunDir
from wattier.space import random_points, typed_space
from wattier.units import format_joules, format_seconds
from wattier.workload import workload_of
from wattier_gnn.store import Store

SAMPLED = 128  # points of the space that stand for all of it


class Costs:
    """An energy model that hears of every trial once."""

    def __init__(self, model: EnergyModel, ended: Iterable[TrialResult] = ()) -> None:
        self.model = model
        self._heard: set[tuple[str, str]] = set()
        for result in ended:
            self.learn(result)

    def project(self, params: Params, fidelity: Fidelity) -> Projection | None:
        """Joules and seconds of a whole trial; None = nobody can say yet."""
        projection = self.model.project(params, fidelity)
        return projection if math.isfinite(projection.joules) else None

    def joules(self, many: Sequence[Params], fidelity: Fidelity) -> NDArray[np.float64] | None:
        """Joules of whole trials, [n]; None = nobody can say yet."""
        joules = self.model.joules(many, fidelity)
        return joules if bool(np.isfinite(joules).all()) else None

    def learn(self, result: TrialResult) -> None:
        """A trial ended. One that failed, or needed several attempts, paid for more than it shows."""
        if result.status not in ("complete", "pruned") or result.attempts > 1 or not result.epochs_done:
            return
        key = (result.fidelity.stage, result.trial_id)
        if key in self._heard:
            return
        self._heard.add(key)
        self.model.observe(
            result.params,
            result.fidelity,
            joules=result.energy_joules,
            seconds=result.wall_seconds,
            share=min(1.0, result.epochs_done / result.fidelity.epochs),
            method=result.energy.method,
        )

    def of_space(self, config: RunConfig, fidelity: Fidelity) -> NDArray[np.float64] | None:
        """Joules of trials drawn evenly from the search space, sorted; None = nobody can say yet."""
        joules = self.joules(random_points(typed_space(config), SAMPLED, config.seed), fidelity)
        return None if joules is None else np.sort(joules)


def fidelity_of(section: StageSection) -> Fidelity:
    """How far the trials of a stage are trained."""
    return Fidelity(section.name, section.structures, section.epochs, section.ranks)


def full_fidelity(config: RunConfig) -> Fidelity:
    """How far the picked trials are trained."""
    return Fidelity(FULL_STAGE, None, config.full_training.epochs, config.full_training.ranks)


def joules_to_convergence(run: RunDir, config: RunConfig, store: Store, stage: str) -> dict[str, float]:
    """Joules of training each trial of a stage for all epochs of full training, on its ranks, by trial id.

    An early stop makes the truth smaller. It rests on the search's trials, and no device is asked, so that the same
    trials have the same figures each time. Where the model has learned of none there are none.
    """
    ended = [result for result in run.trials() if result.fidelity.stage != FULL_STAGE]
    costs = Costs(EnergyModel(workload_of(config, store), typed_space(config)), ended)
    asked = [result for result in ended if result.fidelity.stage == stage]
    joules = costs.joules([result.params for result in asked], full_fidelity(config)) if asked else None
    if joules is None:
        return {}
    return {result.trial_id: float(f"{each:.4g}") for result, each in zip(asked, joules, strict=True)}


def costs_of(run: RunDir, config: RunConfig, store: Store | None) -> Costs:
    """The costs of a run as far as its trials, and the physics of Wattier's own models, can tell.

    store: None = the data are not prepared yet, so what their structures are like is a guess.
    """
    if config.trial is not None:
        return Costs(EnergyModel(None, typed_space(config)), run.trials())
    return Costs(EnergyModel(workload_of(config, store), typed_space(config), prior_of(config)), run.trials())


def refuse_small_budget(config: RunConfig, costs: Costs) -> None:
    """Refuse a budget of which not even the cheapest trial of the first stage could be paid.

    Raises:
        UserError: with the figure that is needed.
    """
    section, budget = config.search.stages[0], config.search.budget
    if budget is None:
        return
    fidelity = fidelity_of(section)
    points = random_points(typed_space(config), SAMPLED, config.seed)
    trial = f"the cheapest trial of stage {section.name!r}"
    _refuse_small("search.budget", budget, trial, _cheapest(costs, points, fidelity))


def refuse_small_training_budget(
    run: RunDir, config: RunConfig, costs: Costs, picked: Sequence[Params], fidelity: Fidelity
) -> None:
    """The same of full training, whose trials are known: before the first of them, the cheapest must fit.

    Raises:
        UserError: with the figure that is needed.
    """
    budget = config.full_training.budget
    if budget is not None and picked and not run.trials(fidelity.stage):
        _refuse_small("full_training.budget", budget, "the cheapest member", _cheapest(costs, picked, fidelity))


def _refuse_small(place: str, budget: BudgetSection, trial: str, cheapest: tuple[float | None, float | None]) -> None:
    joules, seconds = cheapest
    for name, limit, needed, text in (
        ("joules", budget.joules, joules, format_joules(joules)),
        ("kilowatt_hours", budget.kilowatt_hours, None if joules is None else joules / 3.6e6, format_joules(joules)),
        ("seconds", budget.seconds, seconds, format_seconds(seconds)),
        ("trials", budget.trials, 1.0, "1 trial"),
    ):
        if limit is None or (limit > 0 and (needed is None or limit >= needed)):
            continue
        need = f"{trial} needs about {text}" if needed else "must be above 0"
        figure = "" if needed is None else f" ({needed:.3g})"
        raise UserError(f"{place}.{name}: is {limit:g}, but {need}{figure}. Give more, or lower epochs or structures.")


def mean_joules(config: RunConfig, costs: Costs | None, section: StageSection) -> float | None:
    """What a trial of a stage costs on average over the search space, J; None = nobody can say yet."""
    fidelity = fidelity_of(section)
    joules = None if costs is None else costs.of_space(config, fidelity)
    return None if joules is None else float(joules.mean())


def _cheapest(costs: Costs, points: Sequence[Params], fidelity: Fidelity) -> tuple[float | None, float | None]:
    """Joules and seconds of that one of some trials that needs the fewest joules; None = nobody can say yet."""
    joules = costs.joules(points, fidelity)
    if joules is None:
        return None, None
    cheapest = costs.project(points[int(joules.argmin())], fidelity)
    seconds = None if cheapest is None or not math.isfinite(cheapest.seconds) else cheapest.seconds
    return float(joules.min()), seconds
