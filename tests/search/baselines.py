"""The searches that ours is held against, each the real library, told of simulated trials one at a time.

Single fidelity (every trial trained to the end): random search, Optuna's NSGA-II, TPE and Gaussian process, all on both
objectives. Several fidelities: Ray's ASHA on the loss with random proposals and with Optuna's TPE, and syne-tune's
MO-ASHA. Rungs stand at the problem's epochs, so the reduction factor is the factor between them.

syne-tune 0.16 ranks by `NonDominatedPriority`, whose docstring promises a priority for each item; what it returns is
the items' indices in sorted order, so a trial goes on or stops by another one's place. `mo-asha` is the class as
released, `mo-asha-ranked` the same scheduler with priorities as its papers describe: fronts, and within one an epsilon
net.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from search.account import Account, BudgetSpentError
from search.problems import reduction, reports
from search.space import Array, draw, from_optuna, optuna_space, syne_tune_space
from threadpoolctl import threadpool_limits

from wattier.pareto import non_dominated_ranks

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

Method = Callable[[Account, int], None]


def random_search(account: Account, seed: int) -> None:
    """Uniform configurations, each trained to the end."""
    rng = np.random.default_rng(seed)
    while True:
        account.open(draw(account.problem.space, rng)).run_to(account.problem.epochs[-1])


def nsga2(account: Account, seed: int) -> None:
    """Optuna's NSGA-II, with a population of 10: better here than 20, or its default of 50."""
    from optuna.samplers import NSGAIISampler

    _both_objectives(account, NSGAIISampler(population_size=10, seed=seed))


def tpe(account: Account, seed: int) -> None:
    """Optuna's TPE with two objectives (Ozaki et al. 2022), parameters sampled jointly: better here than one by one."""
    from optuna.samplers import TPESampler

    _both_objectives(account, TPESampler(multivariate=True, seed=seed))


def gp(account: Account, seed: int) -> None:
    """Optuna's Gaussian process; with two objectives it maximises the logarithm of the hypervolume's improvement."""
    import torch
    from optuna.samplers import GPSampler

    torch.set_num_threads(1)  # one process a core
    _both_objectives(account, GPSampler(seed=seed))


def asha(account: Account, seed: int) -> None:
    """Ray's ASHA on the loss, random proposals."""
    rng = np.random.default_rng(seed)
    space = account.problem.space
    _ray_asha(account, seed, lambda: (draw(space, rng), None), lambda _trial, _epoch, _loss, _state: None)


def asha_tpe(account: Account, seed: int) -> None:
    """Ray's ASHA on the loss, Optuna's TPE on the loss, which is told each rung; stopped trials are pruned ones."""
    import optuna

    space = account.problem.space
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(multivariate=True, seed=seed))
    distributions = optuna_space(space)

    def propose() -> tuple[dict[str, Any], Any]:
        trial = study.ask(distributions)
        return from_optuna(space, trial.params), trial

    def tell(trial: Any, epoch: int, loss: float, state: str) -> None:
        trial.report(loss, epoch)
        if state == "complete":
            study.tell(trial, loss)
        elif state == "stopped":
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)

    _ray_asha(account, seed, propose, tell)


def mo_asha(account: Account, seed: int) -> None:
    """syne-tune's MO-ASHA on loss and joules, as released; random proposals, its own."""
    _mo_asha(account, seed, None)


def mo_asha_ranked(account: Account, seed: int) -> None:
    """The same, ranked by front and within a front by syne-tune's own epsilon net."""
    from syne_tune.optimizer.schedulers.multiobjective.multiobjective_priority import MOPriority
    from syne_tune.optimizer.schedulers.multiobjective.non_dominated_priority import compute_epsilon_net

    class Ranked(MOPriority):  # type: ignore[misc]
        def priority_unsafe(self, objectives: Array) -> Array:
            fronts = non_dominated_ranks(objectives)
            own = fronts == fronts[-1]  # the newest trial's, the only one whose place is asked for
            priorities = fronts.astype(float) * len(objectives)
            priorities[own] += compute_epsilon_net(objectives[own], dim=0)
            return priorities

    _mo_asha(account, seed, Ranked())


def _mo_asha(account: Account, seed: int, priority: Any) -> None:
    from syne_tune.backend.trial_status import Trial
    from syne_tune.optimizer.scheduler import SchedulerDecision
    from syne_tune.optimizer.schedulers.multiobjective.moasha import MOASHA

    np.random.seed(seed)
    epochs = account.problem.epochs
    scheduler = MOASHA(
        syne_tune_space(account.problem.space), metrics=["loss", "joules"], time_attr="epoch", max_t=epochs[-1],
        grace_period=epochs[0], reduction_factor=reduction(account.problem), multiobjective_priority=priority,
        random_seed=seed,
    )  # fmt: skip
    trial_id = 0
    while (suggestion := scheduler.suggest()) is not None:
        told = Trial(trial_id=trial_id, config=suggestion.config, creation_time=None)
        scheduler.on_trial_add(told)
        trial = account.open(suggestion.config)
        for epoch in reports(account.problem):
            loss = trial.run_to(epoch)
            result = {"epoch": epoch, "loss": loss, "joules": trial.joules}
            if scheduler.on_trial_result(told, result) == SchedulerDecision.STOP:
                break
        trial_id += 1


def _both_objectives(account: Account, sampler: BaseSampler) -> None:
    import optuna

    space, last = account.problem.space, account.problem.epochs[-1]
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    distributions = optuna_space(space)
    while True:
        asked = study.ask(distributions)
        trial = account.open(from_optuna(space, asked.params))
        loss = trial.run_to(last)
        study.tell(asked, [loss, trial.joules])


def _ray_asha(
    account: Account,
    seed: int,
    propose: Callable[[], tuple[dict[str, Any], Any]],
    tell: Callable[[Any, int, float, str], None],
) -> None:
    """Ray's scheduler object is asked at each rung, as its controller would."""
    scheduler_class, stop = _ray_scheduler()
    np.random.seed(seed)
    epochs = account.problem.epochs
    scheduler = scheduler_class(
        time_attr="epoch", metric="loss", mode="min", max_t=epochs[-1], grace_period=epochs[0],
        reduction_factor=reduction(account.problem),
    )  # fmt: skip
    number = 0
    while True:
        params, asked = propose()
        told = SimpleNamespace(trial_id=str(number))
        scheduler.on_trial_add(None, told)
        trial = account.open(params)
        for epoch in reports(account.problem):
            loss = trial.run_to(epoch)
            stopped = scheduler.on_trial_result(None, told, {"epoch": epoch, "loss": loss}) == stop
            state = "complete" if epoch == epochs[-1] else "stopped" if stopped else "running"
            tell(asked, epoch, loss, state)
            if stopped:
                break
        number += 1


def _ray_scheduler() -> tuple[Any, str]:
    """The scheduler and its word for stop; beside an AMD binding that lacks its library, too."""
    from wattier.broken_amdsmi import hidden

    with tempfile.TemporaryDirectory() as folder, hidden(Path(folder) / "hidden"):
        from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
    return AsyncHyperBandScheduler, TrialScheduler.STOP


SINGLE_FIDELITY: dict[str, Method] = {"random": random_search, "nsga2": nsga2, "tpe": tpe, "gp": gp}
MULTI_FIDELITY: dict[str, Method] = {
    "asha": asha,
    "asha-tpe": asha_tpe,
    "mo-asha": mo_asha,
    "mo-asha-ranked": mo_asha_ranked,
}
BASELINES = SINGLE_FIDELITY | MULTI_FIDELITY


def run_method(method: Method, account: Account, seed: int) -> None:
    """Run until the budget is spent, or the method has nothing left to propose."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with threadpool_limits(1), contextlib.suppress(BudgetSpentError):  # one process a core is faster
        method(account, seed)
