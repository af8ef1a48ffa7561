"""What finished in earlier stages, on the scale of the present one: samplers of one fidelity learn from it too."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wattier.records import Params
from wattier.sampler import Point

LEAST_PAIRS_FOR_SLOPE = 5
SLOPES = (0.3, 3.0)  # a map keeps the order of trials, so that the best of before stay the best
LEAST_TO_COMPARE = 3


def corrected(earlier: Sequence[Point], finished: Sequence[Point]) -> list[Point]:
    """Earlier points as this stage would have valued them; those that it tried itself are left out.

    Each objective is mapped by an increasing line, through its logarithms where all are positive: fitted to the
    configurations that both have tried, which are the promoted ones; where there are none, from median to median.
    """
    tried = {key_of(point.params): point.values for point in finished}
    latest = {key_of(point.params): point for point in earlier}
    rest = [point for key, point in latest.items() if key not in tried]
    if not rest:
        return []
    old = np.array([point.values for point in rest])
    pairs = [(point.values, tried[key]) for key, point in latest.items() if key in tried]
    columns = []
    for objective in range(old.shape[1]):
        before = np.array([pair[0][objective] for pair in pairs])
        after = np.array([pair[1][objective] for pair in pairs])
        here = np.array([point.values[objective] for point in finished])
        columns.append(_mapped(old[:, objective], before, after, here))
    mapped = np.stack(columns, axis=1)
    return [Point(point.params, tuple(map(float, row))) for point, row in zip(rest, mapped, strict=True)]


def key_of(params: Params) -> str:
    """Hyper-parameters as one comparable text."""
    return json.dumps(params, sort_keys=True)


def _mapped(
    old: NDArray[np.float64], before: NDArray[np.float64], after: NDArray[np.float64], here: NDArray[np.float64]
) -> NDArray[np.float64]:
    """One objective of the points that were not tried again, [n], from those that were, [p] each, and from all here."""
    if all(bool((values > 0).all()) for values in (old, before, after, here)):
        return np.exp(_line(np.log(old), np.log(before), np.log(after), np.log(here)))
    return _line(old, before, after, here)


def _line(
    old: NDArray[np.float64], before: NDArray[np.float64], after: NDArray[np.float64], here: NDArray[np.float64]
) -> NDArray[np.float64]:
    if len(before):
        slope = 1.0
        if len(before) >= LEAST_PAIRS_FOR_SLOPE and np.ptp(before) > 0:
            slope = float(np.clip(np.polyfit(before, after, 1)[0], *SLOPES))
        return np.asarray(slope * old + np.median(after - slope * before))
    shift = np.median(here) - np.median(old) if len(here) >= LEAST_TO_COMPARE else 0.0
    return np.asarray(old + shift)
