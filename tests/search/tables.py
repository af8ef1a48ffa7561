"""A measured table as a problem: configuration x fidelity -> loss and joules.

The CSV's columns: `fidelity` (or `epoch`, `epochs`), `loss` (or `val_loss`), `joules` (or `energy_joules`, cumulative
from the start of a training), if there are repeats `seed` (or `repeat`), and one a hyper-parameter, numbers or words.
Each training has a row at each fidelity. The space is inferred, and a proposal becomes the nearest configuration of the
table, for every method alike.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from search.problems import non_dominated
from search.space import Array, Params, Space, is_ordered

N_CHOICES = 12  # numbers with at most so many values are ordered choices, others a range
LOG_SPREAD = 20.0  # a positive range whose ends are further apart than this factor is searched on a log scale
MOST_EPOCHS = 1000


@dataclass(frozen=True)
class TableProblem:
    """A table of trainings.

    Attributes:
        rows: configurations, each once.
        losses: [configurations, repeats, fidelities]; rows without a repeat hold NaN.
        energies: the same shape, cumulative joules.
    """

    name: str
    space: Space
    epochs: tuple[int, ...]
    rows: list[Params]
    losses: Array
    energies: Array
    _places: dict[tuple[Any, ...], int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        places = {self._key(row): i for i, row in reversed(list(enumerate(self.rows)))}
        object.__setattr__(self, "_places", places)

    def snap(self, params: Params) -> Params:
        """The nearest row in normalised coordinates; two different words are as far apart as a range's ends."""
        return self.rows[self._place(params)]

    def loss(self, params: Params, epoch: int, seed: int) -> float:
        """Of one of the configuration's repeats, which one follows from the seed; between fidelities, interpolated."""
        place = self._place(params)
        repeats = np.flatnonzero(~np.isnan(self.losses[place, :, 0]))
        key = zlib.crc32(repr((place, seed)).encode())
        curve = self.losses[place, repeats[key % len(repeats)]]
        return float(np.interp(math.log(epoch), np.log(self.epochs), curve))

    def joules(self, params: Params, epoch: int) -> float:
        """Mean over repeats; between fidelities, and down to 0 epochs, interpolated."""
        curve = np.nanmean(self.energies[self._place(params)], axis=0)
        return float(np.interp(epoch, (0, *self.epochs), (0.0, *curve)))

    def truth(self, params: Params) -> tuple[float, float]:
        """Means over repeats at the highest fidelity."""
        loss, joules = self._outcomes[self._place(params)]
        return float(loss), float(joules)

    @cached_property
    def front(self) -> Array:
        """Of all rows."""
        return non_dominated(self._outcomes)

    @cached_property
    def median_joules(self) -> float:
        """Over all configurations."""
        return float(np.median(self._outcomes[:, 1]))

    @cached_property
    def _outcomes(self) -> Array:
        last = [np.nanmean(values[:, :, -1], axis=1) for values in (self.losses, self.energies)]
        return np.column_stack(last)

    def _place(self, params: Params) -> int:
        exact = self._places.get(self._key(params))
        if exact is not None:
            return exact
        here = {name: _coordinates(self.space[name], [params[name]]) for name in self.space}
        distance = sum(_squared(self._coordinates[name], here[name]) for name in self.space)
        return int(np.argmin(distance))

    @cached_property
    def _coordinates(self) -> dict[str, Any]:
        return {name: _coordinates(entry, [row[name] for row in self.rows]) for name, entry in self.space.items()}

    def _key(self, params: Params) -> tuple[Any, ...]:
        return tuple(params[name] for name in self.space)


def _squared(columns: Any, here: Any) -> Any:
    """Squared distances along one hyper-parameter."""
    return (columns != here).astype(float) if columns.dtype == object else (columns - here) ** 2


def _coordinates(entry: dict[str, Any], values: Sequence[Any]) -> Any:
    """[n] numbers between 0 and 1, or words."""
    if "choices" in entry:
        if not is_ordered(entry):
            return np.array(values, dtype=object)
        places = {value: i / max(1, len(entry["choices"]) - 1) for i, value in enumerate(entry["choices"])}
        return np.array([places[value] for value in values])
    scale: Callable[[Any], Any] = np.log if entry.get("log") else np.asarray
    low, high = scale(entry["low"]), scale(entry["high"])
    return (scale(np.array(values, dtype=float)) - low) / (high - low)


def inferred_space(columns: dict[str, list[Any]]) -> Space:
    """Of columns of numbers or words; a column that never changes is no hyper-parameter.

    Args:
        columns: a value a configuration.
    """
    space: Space = {}
    for name, values in columns.items():
        distinct = sorted(set(values), key=lambda value: (isinstance(value, str), value))
        if len(distinct) == 1:
            continue
        if isinstance(distinct[-1], str) or len(distinct) <= N_CHOICES:
            space[name] = {"choices": distinct}
            continue
        space[name] = {"low": distinct[0], "high": distinct[-1]}
        if distinct[0] > 0 and distinct[-1] / distinct[0] > LOG_SPREAD:
            space[name]["log"] = True
    return space


def as_epochs(fidelities: Sequence[float]) -> tuple[int, ...]:
    """Fidelities as whole epochs: multiples of the lowest where they are that, else 1, 2, 3 ..."""
    ratios = [value / fidelities[0] for value in fidelities]
    whole = [round(ratio) for ratio in ratios]
    if whole[-1] <= MOST_EPOCHS and all(abs(a - b) < 1e-6 * b for a, b in zip(ratios, whole, strict=True)):
        return tuple(whole)
    return tuple(range(1, len(fidelities) + 1))
