"""What a run will cost, before it starts: trials, joules, device-hours and disk, phase by phase."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wattier.config import RunConfig
from wattier.costs import SAMPLED, Costs, fidelity_of, full_fidelity
from wattier.funnel import is_over
from wattier.records import Fidelity
from wattier.rundir import FULL_STAGE, RunDir
from wattier.space import random_points, typed_space
from wattier.workload import disk_bytes, workload_of
from wattier_gnn.store import Store


class PlannedPhase(NamedTuple):
    """What is left of one phase.

    Attributes:
        phase: ``search:<stage>`` or ``full training``.
        trials: that are left to start, none of them stopped.
        fidelity: how far each is trained.
        joules, joules_low, joules_high: of all of them; None = nobody can say before the first has run.
        device_hours: ranks times hours, of all of them.
        disk_bytes: checkpoints of all of them; None = your own function's.
        stops: whether a scheduler will stop some of them.
    """

    phase: str
    trials: int
    fidelity: Fidelity
    joules: float | None
    joules_low: float | None
    joules_high: float | None
    device_hours: float | None
    disk_bytes: float | None
    stops: bool


class PlanInfo(NamedTuple):
    """All phases, what they rest on, and what may be spent."""

    phases: tuple[PlannedPhase, ...]
    total: PlannedPhase
    basis: str
    search_joules: float | None  # budget of the search, and of full training; None = no limit
    full_joules: float | None


def store_for_plan(run: RunDir, config: RunConfig) -> Store | None:
    """The data that decide the price: the run's store, or a shared one; None = they are not prepared yet."""
    if config.trial is not None:
        return None
    if run.store_manifest_path.exists():
        return Store(run.store_path)
    return None if config.data.store is None else Store(Path(config.data.store).expanduser())


def plan_info(run: RunDir, config: RunConfig, costs: Costs, store: Store | None) -> PlanInfo:
    """What is left to do, and what it will cost if no trial is stopped early and no budget ends it.

    Trials that are not chosen yet count as the average over the search space; the bounds are those of the energy model,
    taken to be wrong for all trials alike.
    """
    phases = []
    for stage in config.search.stages:
        left = 0 if is_over(run, config, stage) else stage.trials - len(run.trials(stage.name))
        phase = f"search:{stage.name}"
        stops = stage.reduction_factor is not None
        phases.append(_planned(phase, left, fidelity_of(stage), config, costs, store, stops=stops))
    members = config.select.accurate + config.select.balanced if config.trial is None else 0
    done = sum(result.status == "complete" for result in run.trials(FULL_STAGE))
    if members:
        left = max(0, members - done)
        phases.append(_planned("full training", left, full_fidelity(config), config, costs, store, stops=True))
    point = random_points(typed_space(config), 1, config.seed)[0]
    basis = costs.model.project(point, fidelity_of(config.search.stages[0])).basis
    if store is None and config.trial is None:
        basis += "; the data are not prepared, so structures are taken to be as their sources are known to be"
    budgets = [None if b is None else b.energy_joules for b in (config.search.budget, config.full_training.budget)]
    return PlanInfo(tuple(phases), _total(phases), basis, budgets[0], budgets[1])


def _planned(  # noqa: PLR0913, PLR0917
    phase: str, trials: int, fidelity: Fidelity, config: RunConfig, costs: Costs, store: Store | None, *, stops: bool
) -> PlannedPhase:
    points = random_points(typed_space(config), SAMPLED, config.seed)
    disk = None
    if config.trial is None:
        workload, averaged = workload_of(config, store), config.training.ema_decay > 0
        sizes = [disk_bytes(workload(point, fidelity).parameters, averaged=averaged) for point in points]
        disk = trials * float(np.mean(sizes))
    known = [costs.project(point, fidelity) for point in points]
    every = [projection for projection in known if projection is not None]
    if len(every) < len(points):
        return PlannedPhase(phase, trials, fidelity, None, None, None, None, disk, stops)
    joules, low, high, seconds = (
        trials * float(np.mean([getattr(projection, name) for projection in every]))
        for name in ("joules", "joules_low", "joules_high", "seconds")
    )
    return PlannedPhase(phase, trials, fidelity, joules, low, high, fidelity.ranks * seconds / 3600, disk, stops)


def _total(phases: list[PlannedPhase]) -> PlannedPhase:
    def total(name: str) -> float | None:
        return _sum_known([getattr(phase, name) for phase in phases])

    return PlannedPhase(
        "total",
        sum(phase.trials for phase in phases),
        Fidelity("total", None, 0, 0),
        total("joules"),
        total("joules_low"),
        total("joules_high"),
        total("device_hours"),
        total("disk_bytes"),
        any(phase.stops for phase in phases),
    )


def _sum_known(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == len(values) else None
