"""What trials of one stage are compared by: one value or two, all minimised."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from wattier.config_search import Objective, SearchSection
from wattier.records import Params, TrialResult

Converge = Callable[[Params, float], float | None]  # hyper-parameters and joules a structure -> joules to convergence


def _not_known(_params: Params, _joules_per_structure: float) -> float | None:
    return None


@dataclass(frozen=True)
class Objectives:
    """How what a trial has reached becomes the values it is compared by.

    Attributes:
        names: what is compared.
        weights: of the sum that is compared instead, one a name; None = each by itself.
        converge: joules that training such a model to convergence would cost, for `projected_joules`.
    """

    names: tuple[Objective, ...]
    weights: tuple[float, ...] | None = None
    converge: Converge = _not_known

    @classmethod
    def of(cls, search: SearchSection, converge: Converge = _not_known) -> Objectives:
        """Those of a config."""
        weights = None if search.weights is None else tuple(search.weights[name] for name in search.objectives)
        return cls(tuple(search.objectives), weights, converge)

    @property
    def count(self) -> int:
        """How many values a trial has."""
        return 1 if self.weights is not None else len(self.names)

    @property
    def second(self) -> Objective | None:
        """What is compared beside the loss; None = nothing is."""
        return self.names[1] if self.count > 1 else None

    def of_result(self, result: TrialResult) -> tuple[float, ...] | None:
        """The values of a finished trial; None where one of them is not known."""
        return self.values(result.params, result.val_loss, result.energy_joules, result.structures_seen)

    def values(
        self, params: Params, val_loss: float | None, energy_joules: float | None, structures_seen: float
    ) -> tuple[float, ...] | None:
        """The values of a trial that has reached a loss with some joules over some structures.

        Returns:
            One value an objective, all finite; None where one of them is not known.
        """
        per_structure = None if energy_joules is None or not structures_seen else energy_joules / structures_seen
        figures = {
            "val_loss": val_loss,
            "energy_joules": energy_joules,
            "joules_per_structure": per_structure,
            "projected_joules": None if per_structure is None else self.converge(params, per_structure),
        }
        known = [v for name in self.names if (v := figures[name]) is not None and math.isfinite(v)]
        if len(known) < len(self.names):
            return None
        if self.weights is None:
            return tuple(known)
        return (math.fsum(weight * value for weight, value in zip(self.weights, known, strict=True)),)
