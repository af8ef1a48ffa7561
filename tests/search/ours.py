"""Ours, through the seam that a user has: `wattier.search` over a function that reports what the problem says."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from search.account import Account
from search.baselines import Method
from search.problems import Problem, reduction, reports

IN_MEMORY = Path("/dev/shm")
MOST_TRIALS = 3000  # more than any budget here pays for


def ours(account: Account, seed: int) -> None:
    """One stage at the highest fidelity, whose scheduler stops trials early; the defaults of everything else."""
    last = account.problem.epochs[-1]
    stage = {"name": "search", "trials": MOST_TRIALS, "epochs": last, "reduction_factor": _factor(account.problem)}
    _search(account, seed, [stage])


def ours_funnel(account: Account, seed: int) -> None:
    """Stages at the last three fidelities, which pay for what is promoted anew, as stages on more data have to."""
    problem = account.problem
    trainings = max(6, round(account.budget_joules / problem.median_joules))
    stages: list[dict[str, Any]] = []
    for i, epochs in enumerate(problem.epochs[-3:]):
        promoted = trainings // 6 if i else 0
        trials = trainings * (3 if epochs < problem.epochs[-1] else 2)
        stages.append({"name": f"epochs{epochs}", "trials": trials, "epochs": epochs, "promote": promoted})
        stages[-1]["reduction_factor"] = _factor(problem)
    _search(account, seed, stages)


def _search(account: Account, seed: int, stages: list[dict[str, Any]]) -> None:
    import wattier

    def run_trial(trial: Any) -> None:
        simulated = account.open(trial.params)
        for epoch in reports(account.problem):
            if epoch > trial.epochs:
                break
            loss = simulated.run_to(epoch)
            if not trial.report(loss, epoch=epoch, energy_joules=simulated.joules, seconds=simulated.joules):
                break

    with tempfile.TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as folder:
        wattier.search(
            account.problem.space, run_trial, stages, budget={"joules": account.budget_joules},
            run_dir=Path(folder) / "run", seed=seed, launcher="inline", quiet=True, telemetry={"source": "stated"},
        )  # fmt: skip


def _factor(problem: Problem) -> int | None:
    return reduction(problem) if len(problem.epochs) > 1 else None


OURS: dict[str, Method] = {"ours": ours, "ours-funnel": ours_funnel}
