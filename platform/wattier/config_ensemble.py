"""What a run is told of its second half: the tiers, and the training of the chosen ones to an ensemble."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from wattier.config_search import BudgetSection
from wattier.config_space import Positive, Section


class SelectSection(Section):
    """Sizes of the tiers: accurate = lowest loss, balanced = best trade-off between loss and joules."""

    accurate: Annotated[int, Field(ge=0)] = 1
    balanced: Annotated[int, Field(ge=0)] = 2

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.accurate + self.balanced < 1:
            raise ValueError("both tiers are empty, but at least one trial must be picked")
        return self


class FullTrainingSection(Section):
    """Training of the picked trials to convergence on all training structures.

    early_stop_patience: epochs without an improvement of training.min_improvement_ratio before a member has converged.
    warm_start: begin from the best weights that the trial had in the last stage, whose joules are already paid.
    budget: what all members together may cost, apart from the search; null = no limit.
    keep_checkpoints: all, or needed = once the members are trained, those go that no later command could need.
    """

    epochs: Positive = 1000
    early_stop_patience: Positive = 10
    ranks: Positive = 1
    warm_start: bool = False
    budget: BudgetSection | None = None
    keep_checkpoints: Literal["needed", "all"] = "needed"


class EnsembleSection(Section):
    """How the trained members become one answer, and how sure it says it is; may change after training.

    weights: equal, or fitted to validation errors (never below 0, drawn towards equal, the same for all sources).
    coverage: the share of errors that intervals are meant to cover.
    """

    weights: Literal["equal", "fitted"] = "equal"
    coverage: Annotated[float, Field(ge=0.5, le=0.99)] = 0.9
