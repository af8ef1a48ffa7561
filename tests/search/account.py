"""A simulated trial, step by step, and the joules of every step, whoever asked for it.

One trial runs at a time. Training that goes on from an epoch to a later one pays for the difference only, as a process
that was never stopped would. Every joule counts: low fidelities, trials that were stopped, duplicates of earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from search.problems import Problem
from search.space import Params


class BudgetSpentError(Exception):
    """The next step would cost more joules than are left; it was not made, and costs nothing."""


@dataclass
class Account:
    """Joules spent so far, and what they bought.

    Attributes:
        strict: refuse a step that the budget does not pay for; else a method keeps to it by itself, or is seen not to.
        finished: for each trial that reached the highest fidelity (joules spent by then, its loss without noise, its
            joules), in order.
        steps: how often each fidelity was reached.
    """

    problem: Problem
    budget_joules: float
    seed: int
    strict: bool = True
    spent_joules: float = 0.0
    finished: list[tuple[float, float, float]] = field(default_factory=list)
    steps: dict[int, int] = field(default_factory=dict)

    def open(self, params: Params) -> SimulatedTrial:
        """A new trial; nothing is spent yet."""
        return SimulatedTrial(self, self.problem.snap(params))


@dataclass
class SimulatedTrial:
    """One training; its epochs come in ascending order."""

    account: Account
    params: Params
    joules: float = 0.0

    def run_to(self, epoch: int) -> float:
        """Train on to the end of an epoch, and say the validation loss there.

        Raises:
            BudgetSpentError: what is left of the budget does not pay for it.
        """
        account, problem = self.account, self.account.problem
        joules = problem.joules(self.params, epoch)
        if account.strict and account.spent_joules + joules - self.joules > account.budget_joules:
            raise BudgetSpentError
        account.spent_joules += joules - self.joules
        self.joules = joules
        account.steps[epoch] = account.steps.get(epoch, 0) + 1
        if epoch == problem.epochs[-1]:
            account.finished.append((account.spent_joules, *problem.truth(self.params)))
        return problem.loss(self.params, epoch, account.seed)
