"""From runs to curves: hypervolume against joules, and the joules at which one method has what another has in the end.

Hypervolume is that of the configurations evaluated at the highest fidelity so far, by their loss without noise and
their joules, over the hypervolume of the true front; a run's curve is a step function that never falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from search.problems import Problem, reference_point, true_hypervolume
from search.space import Array

from wattier.pareto import hypervolume

FRACTIONS = tuple(round(0.05 * k, 2) for k in range(1, 21))
CENSORED = 1.01  # stands for "not within the budget" where an order counts and the value does not


@dataclass(frozen=True)
class Run:
    """One method, one problem, one seed.

    Attributes:
        finished: (joules spent by then, loss without noise, joules) of each trial at the highest fidelity, in order.
        steps: how often each fidelity was reached.
        spent_joules: all of it; above the budget only where a method does not keep to it.
    """

    problem: str
    method: str
    seed: int
    budget_joules: float
    spent_joules: float
    wall_seconds: float
    finished: list[tuple[float, float, float]]
    steps: dict[str, int]


@dataclass(frozen=True)
class Trace:
    """Hypervolume of one run: it becomes levels[i] at the fraction spent[i] of the budget."""

    spent: Array
    levels: Array

    def at(self, fraction: float) -> float:
        """Hypervolume once this fraction is spent."""
        reached = int(np.searchsorted(self.spent, fraction, side="right"))
        return float(self.levels[reached - 1]) if reached else 0.0

    def reaches(self, level: float) -> float:
        """Fraction of the budget at which a level above 0 is reached; CENSORED when it is not within the budget."""
        first = int(np.searchsorted(self.levels, level, side="left"))
        return float(self.spent[first]) if first < len(self.levels) and self.spent[first] <= 1.0 else CENSORED


@dataclass(frozen=True)
class Duel:
    """One of our methods against a baseline on one problem.

    Attributes:
        level: the baseline's median hypervolume with the full budget.
        fraction: of the budget, at which the median run of ours reaches that level; CENSORED when it does not.
        lower, upper: quartiles of it over seeds.
        ours_final: our own median hypervolume with the full budget.
    """

    problem: str
    ours: str
    baseline: str
    level: float
    fraction: float
    lower: float
    upper: float
    ours_final: float


def trace(run: Run, problem: Problem) -> Trace:
    """Normalised hypervolume of a run, trial by trial."""
    corner, whole = reference_point(problem.front), true_hypervolume(problem.front)
    points = [row[1:] for row in run.finished]
    levels = [hypervolume(points[: i + 1], corner) / whole for i in range(len(points))]
    return Trace(np.array([row[0] / run.budget_joules for row in run.finished]), np.maximum.accumulate([*levels]))


def quartiles(traces: Sequence[Trace]) -> dict[str, list[float]]:
    """Median and quartiles over seeds at each of FRACTIONS."""
    values = np.array([[t.at(fraction) for fraction in FRACTIONS] for t in traces])
    low, mid, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
    return {"q25": low.tolist(), "median": mid.tolist(), "q75": high.tolist()}


def duel(problem: str, ours: str, ours_traces: Sequence[Trace], baseline: str, others: Sequence[Trace]) -> Duel | None:
    """None where the median run of the baseline found nothing better than the reference point."""
    level = median(t.at(1.0) for t in others)
    if level <= 0:
        return None
    low, mid, high = np.quantile([t.reaches(level) for t in ours_traces], [0.25, 0.5, 0.75], method="higher")
    final = median(t.at(1.0) for t in ours_traces)
    return Duel(problem, ours, baseline, level, float(mid), float(low), float(high), final)


def best(finals: dict[str, float], names: Sequence[str]) -> str | None:
    """The method of a group with the highest final median."""
    present = [name for name in names if name in finals]
    return max(present, key=lambda name: finals[name], default=None)


def as_dict(run: Run) -> dict[str, Any]:
    """For JSON."""
    return {**run.__dict__, "finished": [list(row) for row in run.finished]}


def from_dict(row: dict[str, Any]) -> Run:
    """The other way."""
    return Run(**{**row, "finished": [(a, b, c) for a, b, c in row["finished"]]})
