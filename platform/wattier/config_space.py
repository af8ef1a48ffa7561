"""What a config is made of: sections without unknown keys, numbers with bounds, and parameters to search."""

from __future__ import annotations

import math
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Positive = Annotated[int, Field(gt=0, lt=2**31)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PathText = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A mapping whose keys are all known."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RangeParameter(Section):
    """Numbers from low to high, both included: whole ones where the parameter is a whole number."""

    low: int | float
    high: int | float
    log: bool = False
    step: Annotated[int | float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not (math.isfinite(self.low) and math.isfinite(self.high)) or self.low > self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}, but low must be at most high, both finite")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}, but must be above 0 on a log scale")
        if self.log and self.step is not None:
            raise ValueError("log and step are both given, but only one can be used. Remove one of them")
        if self.step is not None:
            _refuse_uneven_step(self.low, self.high, self.step)
        return self


def _refuse_uneven_step(low: float, high: float, step: float) -> None:
    steps = (high - low) / step
    if steps < 0.5 or not math.isclose(steps, round(steps), rel_tol=1e-9):
        raise ValueError(f"step is {step}, but must lead from low, {low}, to high, {high}, in whole steps")


class ChoiceParameter(Section):
    """One of some values."""

    choices: list[str | int | float | bool] = Field(min_length=1)


def _parameter_kind(value: Any) -> str:
    chosen = "choices" in value if isinstance(value, dict) else isinstance(value, ChoiceParameter)
    return "ChoiceParameter" if chosen else "RangeParameter"


Parameter = Annotated[
    Annotated[RangeParameter, Tag("RangeParameter")] | Annotated[ChoiceParameter, Tag("ChoiceParameter")],
    Discriminator(_parameter_kind),
]
