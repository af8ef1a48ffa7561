"""Two objectives, both minimised: fronts and hypervolume, in closed form and in numpy alone."""

from __future__ import annotations

import math
from bisect import bisect_right
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
    values = _checked(points) + 0.0  # -0.0 and 0.0 are one number
    distinct, place = np.unique(values, axis=0, return_inverse=True)
    # Sorted by the first objective, a point is dominated by a front if the lowest second objective of that front so
    # far is not above its own; these lowest values rise from front to front, so the first that lets it in is bisected.
    lowest: list[float] = []
    ranks = np.empty(len(distinct), dtype=np.int64)
    for index, second in enumerate(distinct[:, 1].tolist()):
        rank = bisect_right(lowest, second)
        lowest[rank : rank + 1] = [second]
        ranks[index] = rank
    return ranks[place.reshape(-1)]


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
    losses = np.zeros(len(values))
    order = np.flatnonzero((values < corner).all(axis=1))
    order = order[np.lexsort((values[order, 1], values[order, 0]))]
    inside = values[order]
    if not len(inside):
        return losses
    lowest = np.minimum.accumulate(inside[:, 1])
    front = np.flatnonzero(np.concatenate(([True], inside[1:, 1] < lowest[:-1])))
    # A point of the front rules alone in the box up to its neighbours, less what points behind it cover of that box.
    right = np.concatenate((inside[front[1:], 0], corner[:1]))
    top = np.concatenate((corner[1:], inside[front[:-1], 1]))
    losses[order[front]] = (right - inside[front, 0]) * (top - inside[front, 1])
    behind = np.setdiff1d(np.arange(len(inside)), front)
    box = np.searchsorted(front, behind) - 1  # in the order of the sweep a box's points follow its own
    in_box = inside[behind, 1] < top[box]
    boxes, starts = np.unique(box[in_box], return_index=True)
    for index, covering in zip(boxes, np.split(behind[in_box], starts)[1:], strict=True):
        covered = _area(inside[covering], np.array([right[index], top[index]]))
        own = order[front[index]]
        losses[own] = max(losses[own] - covered, 0.0)  # rounding must not make a loss negative
    return losses


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
