"""A search space as a mapping: {"low", "high", "log"} or {"choices"}; and the same space in other libraries' words.

A range between two whole numbers holds whole numbers. Choices that are all numbers, in ascending order, have an order
that counts, and every library is told so.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Params = dict[str, Any]
Space = dict[str, dict[str, Any]]
Array = NDArray[np.float64]


def is_whole(entry: dict[str, Any]) -> bool:
    """Whether a range holds whole numbers only."""
    return isinstance(entry["low"], int) and isinstance(entry["high"], int)


def is_ordered(entry: dict[str, Any]) -> bool:
    """Whether choices are numbers in ascending order."""
    values = entry["choices"]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return numbers and all(a < b for a, b in pairwise(values))


def decoded(space: Space, unit: Array) -> dict[str, Array]:
    """Columns of values of [n, d] points in the unit cube; a choice is its index."""
    columns = {}
    for name, u in zip(space, unit.T, strict=True):
        entry = space[name]
        if "choices" in entry:
            n = len(entry["choices"])
            columns[name] = np.minimum(np.floor(u * n), n - 1)
            continue
        low, high = entry["low"], entry["high"]
        values = low * (high / low) ** u if entry.get("log") else low + (high - low) * u
        columns[name] = np.rint(values) if is_whole(entry) else values
    return columns


def from_unit(space: Space, point: Array) -> Params:
    """One point of the unit cube as hyper-parameters."""
    columns = decoded(space, point[None])
    params: Params = {}
    for name, entry in space.items():
        value = float(columns[name][0])
        if "choices" in entry:
            params[name] = entry["choices"][int(value)]
        else:
            params[name] = int(value) if is_whole(entry) else min(max(value, entry["low"]), entry["high"])
    return params


def to_unit(space: Space, params: Params) -> Array:
    """[d] place of hyper-parameters in the unit cube; a choice is the middle of its share."""
    point = []
    for name, entry in space.items():
        value = params[name]
        if "choices" in entry:
            point.append((entry["choices"].index(value) + 0.5) / len(entry["choices"]))
            continue
        low, high = entry["low"], entry["high"]
        if low == high:
            point.append(0.0)
        elif entry.get("log"):
            point.append(math.log(value / low) / math.log(high / low))
        else:
            point.append((value - low) / (high - low))
    return np.array(point)


def draw(space: Space, rng: np.random.Generator) -> Params:
    """One configuration, uniform in the unit cube."""
    return from_unit(space, rng.random(len(space)))


def optuna_space(space: Space) -> dict[str, Any]:
    """Optuna's distributions; ordered choices are whole numbers, their indices."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for name, entry in space.items():
        if "choices" in entry:
            n = len(entry["choices"])
            found[name] = IntDistribution(0, n - 1) if is_ordered(entry) else CategoricalDistribution(entry["choices"])
        else:
            kind = IntDistribution if is_whole(entry) else FloatDistribution
            found[name] = kind(entry["low"], entry["high"], log=entry.get("log", False))
    return found


def from_optuna(space: Space, params: Params) -> Params:
    """What Optuna asked for, with the values of ordered choices."""
    return {name: _chosen(space[name], params[name]) for name in space}


def syne_tune_space(space: Space) -> dict[str, Any]:
    """syne-tune's domains; ordered choices are its `ordinal`."""
    from syne_tune import config_space as cs

    found: dict[str, Any] = {}
    for name, entry in space.items():
        if "choices" in entry:
            values = entry["choices"]
            found[name] = cs.ordinal(values, kind="equal") if is_ordered(entry) else cs.choice(values)
        elif is_whole(entry):
            found[name] = (cs.lograndint if entry.get("log") else cs.randint)(entry["low"], entry["high"])
        else:
            found[name] = (cs.loguniform if entry.get("log") else cs.uniform)(entry["low"], entry["high"])
    return found


def _chosen(entry: dict[str, Any], value: Any) -> Any:
    return entry["choices"][int(value)] if "choices" in entry and is_ordered(entry) else value
