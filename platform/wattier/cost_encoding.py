"""Hyper-parameters as numbers, for what learns from trials."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wattier.config_space import ChoiceParameter, RangeParameter
from wattier.records import Params

LOG_WHERE_SPREAD = 3.0  # positive numbers whose largest is so many times the smallest are taken by their logarithm


class Encoding:
    """Params to [n, d] in 0 to 1: numbers by their place in the range, everything else one column a value.

    Where a range or choices are known they are used; else what the observed params hold. A value that was never seen
    lies outside of 0 to 1, or has none of the columns.
    """

    def __init__(
        self, params: Iterable[Params], space: Mapping[str, RangeParameter | ChoiceParameter] | None = None
    ) -> None:
        seen: dict[str, set[Any]] = {}
        for observed in params:
            for name, value in observed.items():
                seen.setdefault(name, set()).add(_hashable(value))
        for name, parameter in (space or {}).items():
            ends = [parameter.low, parameter.high] if isinstance(parameter, RangeParameter) else parameter.choices
            seen.setdefault(name, set()).update(map(_hashable, ends))
        log = {n for n, p in (space or {}).items() if isinstance(p, RangeParameter) and p.log}
        self._numbers: dict[str, tuple[float, float, bool]] = {}  # lowest, width, by logarithm
        self._choices: dict[str, list[Any]] = {}
        for name, values in sorted(seen.items()):
            numbers = [_number(value) for value in values]
            if not any(map(math.isnan, numbers)):
                low, high = min(numbers), max(numbers)
                by_log = low > 0 and (name in log or high / low >= LOG_WHERE_SPREAD)
                low, high = (math.log(low), math.log(high)) if by_log else (low, high)
                if high > low:
                    self._numbers[name] = (low, high - low, by_log)
            else:
                self._choices[name] = sorted(values, key=repr)
        self.width = len(self._numbers) + sum(map(len, self._choices.values()))

    def __call__(self, many: Sequence[Params]) -> NDArray[np.float64]:
        """[n, d]; a number that is missing or none is put in the middle."""
        columns: list[NDArray[np.float64]] = []
        for name, (low, width, by_log) in self._numbers.items():
            x = np.array([_number(values.get(name)) for values in many])
            if by_log:
                x = np.log(np.where(x > 0, x, math.nan))
            columns.append(np.clip(np.where(np.isfinite(x), (x - low) / width, 0.5), -1.0, 2.0))
        for name, choices in self._choices.items():
            raw = [_hashable(values.get(name)) for values in many]
            # Two values are as far apart as the ends of a range.
            columns += [0.5 + np.array([(v == c and type(v) is type(c)) / math.sqrt(2) for v in raw]) for c in choices]
        return np.stack(columns, axis=1) if columns else np.full((len(many), 1), 0.5)


def _number(value: Any) -> float:
    """NaN for what is no finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else math.nan


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
