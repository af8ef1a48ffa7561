"""Whether a value that somebody else tried lies in this run's space, and how it is written there."""

from __future__ import annotations

import math
from enum import Enum
from typing import Any

from wattier.config import field_type
from wattier.config_space import ChoiceParameter, RangeParameter


class _Outside(Enum):
    OUTSIDE = "outside"


OUTSIDE = _Outside.OUTSIDE


def as_in_space(name: str, parameter: RangeParameter | ChoiceParameter, value: Any) -> Any:
    """The value as the parameter has it (64.0 is 64 where it is a whole number), or OUTSIDE."""
    if isinstance(parameter, ChoiceParameter):
        same = [choice for choice in parameter.choices if _is_same(choice, value)]
        return same[0] if same else OUTSIDE
    if isinstance(value, bool) or not isinstance(value, int | float):
        return OUTSIDE
    if not parameter.low <= value <= parameter.high:  # nor is NaN
        return OUTSIDE
    if is_whole(name, parameter):
        if value != int(value):
            return OUTSIDE
        value = int(value)
    else:
        value = float(value)
    if parameter.step is not None:
        steps = (value - parameter.low) / parameter.step
        return value if math.isclose(steps, round(steps), abs_tol=1e-9) else OUTSIDE
    return value


def is_whole(name: str, parameter: RangeParameter) -> bool:
    """Whether a parameter is a whole number, as Wattier's setting is, or, in a model of one's own, as its ends are."""
    try:
        return field_type(name) is int
    except KeyError:
        return isinstance(parameter.low, int) and isinstance(parameter.high, int)


def _is_same(choice: Any, value: Any) -> bool:
    """Equal, and not merely because Python takes True for 1."""
    return isinstance(choice, bool) == isinstance(value, bool) and bool(choice == value)
