"""The search space with every number of the type that its parameter has."""

from __future__ import annotations

from typing import Any

import numpy as np

from wattier.config import RunConfig, field_type
from wattier.config_space import ChoiceParameter, Parameter, RangeParameter
from wattier.records import Params

Space = dict[str, RangeParameter | ChoiceParameter]


def typed_space(config: RunConfig) -> Space:
    """The space of a config: ranges of whole numbers have whole ends, all others are of real numbers.

    What a setting of ours is, its field says; of a parameter of your own, the ends do.
    """
    return {name: _typed(config, name, parameter) for name, parameter in config.search.space.items()}


def is_whole(parameter: RangeParameter) -> bool:
    """Whether a range of `typed_space` is one of whole numbers."""
    return isinstance(parameter.low, int) and isinstance(parameter.high, int)


def random_points(space: Space, count: int, seed: int) -> list[Params]:
    """Points drawn evenly from a space, on the scale of each parameter."""
    generator = np.random.default_rng(seed)
    return [{name: _drawn(parameter, generator) for name, parameter in space.items()} for _ in range(count)]


def _drawn(parameter: RangeParameter | ChoiceParameter, generator: np.random.Generator) -> Any:
    if isinstance(parameter, ChoiceParameter):
        return parameter.choices[int(generator.integers(len(parameter.choices)))]
    low, high = float(parameter.low), float(parameter.high)
    if parameter.log:
        value = float(np.exp(generator.uniform(np.log(low), np.log(high))))
    else:
        value = float(generator.uniform(low, high))
    if parameter.step is not None:
        value = low + round((value - low) / parameter.step) * parameter.step
    value = min(max(value, low), high)
    return round(value) if is_whole(parameter) else value


def contains(space: Space, params: Params) -> bool:
    """Whether a point gives each parameter a value that it can have, and names no other."""
    return set(params) == set(space) and all(_allows(space[name], value) for name, value in params.items())


def _allows(parameter: RangeParameter | ChoiceParameter, value: object) -> bool:
    if isinstance(parameter, ChoiceParameter):
        return any(type(value) is type(choice) and value == choice for choice in parameter.choices)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if is_whole(parameter) and not float(value).is_integer():
        return False
    return bool(parameter.low <= value <= parameter.high)


def _typed(config: RunConfig, name: str, parameter: Parameter) -> RangeParameter | ChoiceParameter:
    if isinstance(parameter, ChoiceParameter):
        return parameter
    if config.trial is None:
        whole = field_type(name) is int
    else:
        steps_whole = parameter.step is None or float(parameter.step).is_integer()
        whole = is_whole(parameter) and steps_whole
    number = int if whole else float
    step = None if parameter.step is None else number(parameter.step)
    return RangeParameter(low=number(parameter.low), high=number(parameter.high), log=parameter.log, step=step)
