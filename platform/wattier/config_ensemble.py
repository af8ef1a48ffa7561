"""What a run is told of its second half: the tiers, and the training of the chosen ones to an ensemble."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from wattier.config_search import BudgetSection
from wattier.config_space import Positive, PositiveFloat, Section

TrialId = Annotated[str, Field(min_length=1, max_length=100)]


class SelectSection(Section):
    """How the finished trials of the last stage become tiers; it may change from one command to the next.

    accurate: trials with a clear advantage in accuracy, at most. accurate_rule: significance = those that stand out
    from the rest, or cannot be told from the best, against the noise of losses; gap = those before the largest relative
    gap; lowest = the lowest losses. confidence: of the test.
    balanced: trials with the best trade-off. balanced_rule: knee = farthest below the straight line between the most
    accurate trial and the cheapest; fronts = by successive fronts and hypervolume contribution.
    max_energy_joules, max_energy_ratio: what a balanced trial may have cost in its stage, in J and as a ratio of what
    the most accurate one did. min_distance: between any two picks, as a share of the search space's diagonal.
    flagged: whether throttled and partly measured trials may be balanced ones.
    pin, veto: ids that are picked, or are not, whatever the rules say.
    """

    accurate: Annotated[int, Field(ge=0)] = 1
    balanced: Annotated[int, Field(ge=0)] = 2
    accurate_rule: Literal["significance", "gap", "lowest"] = "significance"
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    balanced_rule: Literal["knee", "fronts"] = "knee"
    max_energy_joules: PositiveFloat | None = None
    max_energy_ratio: PositiveFloat | None = None
    min_distance: Annotated[float, Field(ge=0, lt=1)] = 0.05
    flagged: Literal["keep", "leave_out"] = "keep"
    pin: list[TrialId] = Field(default=[])
    veto: list[TrialId] = Field(default=[])

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.accurate + self.balanced < 1:
            raise ValueError("both tiers are empty, but at least one trial must be picked")
        return self

    @model_validator(mode="after")
    def _one_word_a_trial(self) -> Self:
        if both := sorted(set(self.pin) & set(self.veto)):
            raise ValueError(f"pin and veto both name {both[0]!r}, but a trial can be one of them only. Remove one")
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
