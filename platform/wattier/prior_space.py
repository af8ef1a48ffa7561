"""Whether a value that somebody else tried lies in this run's space, and how it is written there."""

from __future__ import annotations

import math
from enum import Enum
from typing import Any

from wattier.config_space import ChoiceParameter, RangeParameter
from wattier.space import is_whole


class _Outside(Enum):
    OUTSIDE = "outside"


OUTSIDE = _Outside.OUTSIDE


def as_in_space(parameter: RangeParameter | ChoiceParameter, value: Any) -> Any:
    """The value as a parameter of `typed_space` has it (64.0 is 64 where it is a whole number), or OUTSIDE."""
    if isinstance(parameter, ChoiceParameter):
        same = [choice for choice in parameter.choices if _is_same(choice, value)]
        return same[0] if same else OUTSIDE
    if isinstance(value, bool) or not isinstance(value, int | float):
        return OUTSIDE
    if not parameter.low <= value <= parameter.high:  # nor is NaN
        return OUTSIDE
    if is_whole(parameter):
        if value != int(value):
            return OUTSIDE
        value = int(value)
    else:
        value = float(value)
    if parameter.step is not None:
        steps = (value - parameter.low) / parameter.step
        return value if math.isclose(steps, round(steps), abs_tol=1e-9) else OUTSIDE
    return value


def _is_same(choice: Any, value: Any) -> bool:
    """Equal, and not merely because Python takes True for 1."""
    return isinstance(choice, bool) == isinstance(value, bool) and bool(choice == value)
