"""What a search is made of: stages, objectives, limits and budgets."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from wattier.config_space import Parameter, PathText, Positive, PositiveFloat, Section
from wattier.storage_url import check_url

Objective = Literal["val_loss", "energy_joules", "joules_per_structure", "projected_joules"]


class BudgetSection(Section):
    """What may be spent, as totals over restarts; null = no limit. One of joules and kilowatt_hours, not both.

    A trial whose projected cost would break the budget is not started; what has begun is ended.
    """

    joules: Annotated[float, Field(allow_inf_nan=False)] | None = None
    kilowatt_hours: Annotated[float, Field(allow_inf_nan=False)] | None = None
    seconds: Annotated[float, Field(allow_inf_nan=False)] | None = None
    trials: int | None = None

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if self.joules is not None and self.kilowatt_hours is not None:
            raise ValueError("joules and kilowatt_hours are both given, but they say the same. Remove one of them")
        return self

    @property
    def energy_joules(self) -> float | None:
        """The limit on energy, J."""
        return self.joules if self.kilowatt_hours is None else 3.6e6 * self.kilowatt_hours


class ConstraintsSection(Section):
    """What a trial may use at most; one that used more is on no front and in no tier. null = no limit.

    memory_bytes: the peak of its largest rank, on the GPU where it runs on one. wall_seconds: from start to end.
    mean_watts: of all of its ranks together, over the trial.
    """

    memory_bytes: PositiveFloat | None = None
    wall_seconds: PositiveFloat | None = None
    mean_watts: PositiveFloat | None = None

    def limits(self) -> dict[str, float]:
        """Those that are set."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


class StageSection(Section):
    """One rung of the funnel. structures: null = all training structures. promote: trials of the stage before that run
    again at this fidelity; `trials` counts them too. reduction_factor: null = no early stopping inside the stage."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=40)]
    trials: Annotated[int, Field(gt=0, le=100_000)]
    structures: Positive | None = None
    epochs: Positive = 1
    ranks: Positive = 1
    promote: Annotated[int, Field(ge=0)] = 0
    reduction_factor: Annotated[int, Field(ge=2)] | None = 3

    @model_validator(mode="after")
    def _promote_at_most_trials(self) -> Self:
        if self.promote > self.trials:
            raise ValueError(f"promote is {self.promote}, but must be at most trials, {self.trials}")
        return self


class SearchSection(Section):
    """The funnel of stages. All objectives are minimised, within one stage.

    sampler: mf_ehvi learns from all fidelities and weighs what a trial may gain against its joules; the others are
    Optuna's. scheduler: pareto stops a trial that is dominated in (loss, projected joules), asha one by its loss.
    objectives: two make a front, one makes a ranking. weights: their sum, so weighted, is the only objective.
    warm_start: run directories or CSV files whose trials are known from the start.
    storage: a database for optuna-dashboard, such as postgresql://host/name; null = a file in the run directory.
    """

    sampler: Literal["mf_ehvi", "tpe", "nsga2", "nsga3", "gp", "cmaes", "random"] = "mf_ehvi"
    scheduler: Literal["pareto", "asha"] = "pareto"
    objectives: list[Objective] = Field(default=["val_loss", "energy_joules"], min_length=1, max_length=2)
    weights: dict[Objective, PositiveFloat] | None = None
    constraints: ConstraintsSection = ConstraintsSection()
    budget: BudgetSection | None = None
    max_concurrent: Positive | None = None
    warm_start: list[PathText] = Field(default=[])
    storage: str | None = None
    space: dict[str, Parameter]
    stages: list[StageSection] = Field(min_length=1)

    @field_validator("storage")
    @classmethod
    def _without_password(cls, url: str | None) -> str | None:
        return url if url is None else check_url(url)

    @field_validator("objectives")
    @classmethod
    def _loss_among_them(cls, objectives: list[Objective]) -> list[Objective]:
        if "val_loss" not in objectives or len(set(objectives)) < len(objectives):
            raise ValueError(f"is {objectives}, but must name val_loss, and at most one other")
        return sorted(objectives, key=lambda name: name != "val_loss")  # a point is (loss, what it costs)

    @model_validator(mode="after")
    def _weights_of_objectives(self) -> Self:
        if self.weights is not None and set(self.weights) != set(self.objectives):
            raise ValueError(
                f"weights are of {', '.join(self.weights)}, but must be of the objectives, {', '.join(self.objectives)}"
            )
        return self

    @model_validator(mode="after")
    def _sampler_for_objectives(self) -> Self:
        if self.sampler == "cmaes" and self.n_objectives > 1:
            raise ValueError(
                "sampler is cmaes, which knows one objective only, but objectives are "
                f"{', '.join(self.objectives)}. Give weights, name val_loss alone, or take another sampler"
            )
        return self

    @property
    def n_objectives(self) -> int:
        """How many values of a trial are compared."""
        return 1 if self.weights is not None else len(self.objectives)

    @model_validator(mode="after")
    def _stage_names_differ(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names) or {"full"} & set(names):
            raise ValueError(f"stage names are {names}, but must all differ, and none may be 'full'")
        return self

    @model_validator(mode="after")
    def _promoted_exist(self) -> Self:
        trials = 0
        for stage in self.stages:
            if stage.promote > trials:
                raise ValueError(
                    f"stage {stage.name!r} promotes {stage.promote} trials of the stage before, but that has {trials}"
                )
            trials = stage.trials
        return self
