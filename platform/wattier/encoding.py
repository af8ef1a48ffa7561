"""Hyper-parameters as numbers in [0, 1] and back: for models that measure distances."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from wattier.config_space import ChoiceParameter, RangeParameter
from wattier.records import Params

Array = NDArray[np.float64]
LOG_SPREAD = 10.0  # positive numeric choices that spread over more than this are spaced by their logarithm


class Encoder:
    """Translates configurations of a search space.

    A range is one column, linear or logarithmic; numeric choices are one column that keeps their order and spacing;
    other choices are a column each, scaled so that two different ones are at distance 1.

    Attributes:
        groups: [columns], the index of the hyper-parameter that each column belongs to.
    """

    def __init__(self, space: Mapping[str, RangeParameter | ChoiceParameter]) -> None:
        self.space = dict(space)
        widths = [_width(parameter) for parameter in self.space.values()]
        self.groups = np.repeat(np.arange(len(widths)), widths)

    def encode(self, configurations: Sequence[Params]) -> Array:
        """[n, columns]; a value outside the space (of a warm start) is moved to its edge or to no choice."""
        rows = np.zeros((len(configurations), len(self.groups)))
        if not configurations:
            return rows
        for index, (name, parameter) in enumerate(self.space.items()):
            rows[:, self.groups == index] = [_columns(parameter, params.get(name)) for params in configurations]
        return rows

    def at(self, unit: Array) -> Params:
        """The configuration at a point of the unit cube, one number for each hyper-parameter."""
        return {
            name: _value(parameter, float(u)) for (name, parameter), u in zip(self.space.items(), unit, strict=True)
        }

    def unit(self, params: Params) -> Array:
        """A point of the unit cube that `at` translates to these parameters: the middle of their cell."""
        return np.array([_unit(parameter, params[name]) for name, parameter in self.space.items()])

    def key(self, params: Params) -> tuple[object, ...]:
        """What tells one configuration from another."""
        return tuple(params.get(name) for name in self.space)

    def size(self, at_most: int) -> int | None:
        """Number of configurations of the space; None when there are more than `at_most`."""
        total = 1
        for parameter in self.space.values():
            count = _count(parameter)
            if count is None or total * count > at_most:
                return None
            total *= count
        return total

    def all(self) -> list[Params]:
        """Every configuration of a finite space."""
        counts = [range(_count(parameter) or 0) for parameter in self.space.values()]
        return [self.at((np.array(index) + 0.5) / [len(c) for c in counts]) for index in product(*counts)]


def is_whole(parameter: RangeParameter) -> bool:
    """Whether a range holds whole numbers: both ends, and the step if there is one, are written as such."""
    return all(isinstance(value, int) for value in (parameter.low, parameter.high, parameter.step or 1))


def _numbers(parameter: ChoiceParameter) -> list[float] | None:
    """Numeric choices, None when they are not numbers or not all different."""
    values = parameter.choices
    if any(isinstance(value, bool | str) for value in values) or len(set(values)) < len(values):
        return None
    return [float(value) for value in values]


def _width(parameter: RangeParameter | ChoiceParameter) -> int:
    if isinstance(parameter, ChoiceParameter) and _numbers(parameter) is None:
        return len(parameter.choices)
    return 1


def _count(parameter: RangeParameter | ChoiceParameter) -> int | None:
    """Number of different values; None for a continuum."""
    if isinstance(parameter, ChoiceParameter):
        return len(parameter.choices)
    if parameter.low == parameter.high:
        return 1
    if parameter.step is not None:
        return round((parameter.high - parameter.low) / parameter.step) + 1
    return int(parameter.high - parameter.low) + 1 if is_whole(parameter) else None


def _columns(parameter: RangeParameter | ChoiceParameter, value: object) -> list[float]:
    if isinstance(parameter, ChoiceParameter):
        numbers = _numbers(parameter)
        if numbers is None:
            return [math.sqrt(0.5) * (value == choice) for choice in parameter.choices]
        log = min(numbers) > 0 and max(numbers) > LOG_SPREAD * min(numbers)
        return [_share(min(numbers), max(numbers), value, log=log)]
    return [_share(parameter.low, parameter.high, value, log=parameter.log)]


def _share(low: float, high: float, value: object, *, log: bool) -> float:
    """Where a value lies between two ends, 0 to 1; the middle when it is no number."""
    if isinstance(value, str) or not isinstance(value, int | float) or not math.isfinite(value) or low == high:
        return 0.5
    clipped = min(max(float(value), low), high)
    if log:
        return (math.log(clipped) - math.log(low)) / (math.log(high) - math.log(low))
    return (clipped - low) / (high - low)


def _value(parameter: RangeParameter | ChoiceParameter, u: float) -> object:
    count = _count(parameter)
    if isinstance(parameter, ChoiceParameter):
        order = _order(parameter)
        return parameter.choices[order[min(int(u * len(order)), len(order) - 1)]]
    low, high = parameter.low, parameter.high
    if count is not None and not parameter.log:
        index = min(int(u * count), count - 1)
        value = low + index * (parameter.step or 1)
        return int(value) if is_whole(parameter) else min(float(value), float(high))
    if is_whole(parameter):  # cells of equal width around the logarithms would starve the ends: widen by half a number
        value = math.exp(math.log(low - 0.5) + u * (math.log(high + 0.5) - math.log(low - 0.5)))
        return min(max(round(value), int(low)), int(high))
    value = low * (high / low) ** u if parameter.log else low + u * (high - low)
    return min(max(float(value), float(low)), float(high))


def _unit(parameter: RangeParameter | ChoiceParameter, value: object) -> float:
    if isinstance(parameter, ChoiceParameter):
        order = _order(parameter)
        return (order.index(parameter.choices.index(value)) + 0.5) / len(order)  # type: ignore[arg-type]
    number, low, high = float(value), parameter.low, parameter.high  # type: ignore[arg-type]
    count = _count(parameter)
    if count is not None and not parameter.log:
        return (round((number - low) / (parameter.step or 1)) + 0.5) / count
    if is_whole(parameter):
        return (math.log(number) - math.log(low - 0.5)) / (math.log(high + 0.5) - math.log(low - 0.5))
    return _share(low, high, number, log=parameter.log)


def _order(parameter: ChoiceParameter) -> list[int]:
    """Indices of choices: numbers by size, so that a step in the unit cube is a step in value."""
    numbers = _numbers(parameter)
    return list(range(len(parameter.choices))) if numbers is None else list(np.argsort(numbers))
