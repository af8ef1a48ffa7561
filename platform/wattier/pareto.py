"""Two objectives, both minimised: fronts and hypervolume, in closed form and in numpy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = NDArray[np.float64]


def non_dominated_ranks(points: ArrayLike) -> NDArray[np.int64]:
    """Number of the front each point lies on: 0 is the Pareto front, 1 the front once that is taken away, and so on.

    Points that are equal dominate one another in nothing, so they share a rank (Deb et al. 2002,
    https://doi.org/10.1109/4235.996017).

    Args:
        points: [n, 2], both columns minimised.

    Returns:
        [n] ranks.

    Raises:
        ValueError: a number is not finite, or the shape is not [n, 2].
    """
    values = _checked(points)
    ranks = np.zeros(len(values), dtype=np.int64)
    left = np.arange(len(values))
    rank = 0
    while len(left):
        on_front = _on_front(values[left])
        ranks[left[on_front]] = rank
        left, rank = left[~on_front], rank + 1
    return ranks


def hypervolume(points: ArrayLike, reference_point: Sequence[float]) -> float:
    """Area dominated by the points and bounded by the reference point, in the product of the objectives' units.

    A point that is not better than the reference point in both objectives adds nothing.

    Args:
        points: [n, 2], both columns minimised.
        reference_point: the worst corner.

    Raises:
        ValueError: a number is not finite, or a shape is wrong.
    """
    return _area(_checked(points), _checked([reference_point])[0])


def hypervolume_contributions(points: ArrayLike, reference_point: Sequence[float]) -> Points:
    """What the hypervolume would lose without each point; 0 for a dominated point and for each of two equal ones.

    Args:
        points: [n, 2], both columns minimised.
        reference_point: the worst corner.

    Returns:
        [n] areas, none negative.

    Raises:
        ValueError: a number is not finite, or a shape is wrong.
    """
    values, corner = _checked(points), _checked([reference_point])[0]
    total = _area(values, corner)
    losses = [total - _area(np.delete(values, i, axis=0), corner) for i in range(len(values))]
    return np.maximum(np.array(losses, dtype=np.float64), 0.0)  # rounding must not make a loss negative


def _on_front(values: Points) -> NDArray[np.bool_]:
    """Whether no other point is at least as good in both and better in one; a sweep along the first objective."""
    order = np.lexsort((values[:, 1], values[:, 0]))
    ordered = values[order]
    best_before = np.concatenate(([np.inf], np.minimum.accumulate(ordered[:, 1])[:-1]))
    fresh = ordered[:, 1] < best_before
    # A duplicate of a front point follows it in the order: it belongs to the front as well.
    last_fresh = np.maximum.accumulate(np.where(fresh, np.arange(len(ordered)), 0))
    on_front = np.empty(len(values), dtype=np.bool_)
    on_front[order] = (ordered == ordered[last_fresh]).all(axis=1)
    return on_front


def _area(values: Points, corner: Points) -> float:
    inside = values[(values < corner).all(axis=1)]
    ordered = inside[np.lexsort((inside[:, 1], inside[:, 0]))]
    if not len(ordered):
        return 0.0
    lowest = np.minimum.accumulate(ordered[:, 1])
    heights = np.concatenate(([corner[1]], lowest[:-1])) - lowest
    # fsum rounds once: a dominated point, whose strip has no height, changes no digit.
    return math.fsum((corner[0] - ordered[:, 0]) * heights)


def _checked(points: ArrayLike) -> Points:
    values = np.asarray(points, dtype=np.float64)
    if values.size == 0 and values.ndim <= 2:
        return np.empty((0, 2))
    if values.ndim != 2 or values.shape[1] != 2:
        raise ValueError(f"points have shape {list(values.shape)}, but must be [n, 2]")
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise ValueError(f"point {row} is {values[row].tolist()}, but must be finite")
    return values
