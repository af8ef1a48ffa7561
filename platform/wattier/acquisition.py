"""What a trial is expected to add, in closed form: hypervolume for two objectives, improvement for one."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

Array = NDArray[np.float64]
SMALLEST_SD = 1e-12


class Marginal(Protocol):
    """What is believed of one objective at n candidates."""

    def shortfall(self, level: float) -> Array:
        """Expected amount by which each candidate stays below a level: E[max(level - X, 0)], [n]."""


class Normal(NamedTuple):
    """X is normal."""

    mean: Array
    sd: Array

    def shortfall(self, level: float) -> Array:
        """See `Marginal`; the expected improvement of Jones et al. 1998 (https://doi.org/10.1023/A:1008306431147)."""
        sd = np.maximum(self.sd, SMALLEST_SD)
        z = (level - self.mean) / sd
        density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return np.asarray(np.maximum(sd * (z * ndtr(z) + density), 0.0))


class ShiftedLogNormal(NamedTuple):
    """log(X - shift) is normal: the model sees logarithms, the hypervolume keeps the units of losses and joules."""

    log_mean: Array
    log_sd: Array
    shift: float | Array = 0.0

    def shortfall(self, level: float) -> Array:
        """See `Marginal`; the price of a put option (Black and Scholes 1973, https://doi.org/10.1086/260062)."""
        sd = np.maximum(self.log_sd, SMALLEST_SD)
        room = np.maximum(level - self.shift, 0.0)
        with np.errstate(divide="ignore"):  # no room: the logarithm is -inf, and the result 0
            z = (np.log(room) - self.log_mean) / sd
        below = ndtr(z - sd)
        mean = np.exp(np.minimum(self.log_mean + 0.5 * sd * sd, 700.0))
        # Far above the level `below` is 0 and the mean may be huge: their product is 0.
        return np.asarray(np.maximum(room * ndtr(z) - np.where(below > 0, mean * below, 0.0), 0.0))


def expected_improvement(best: float, loss: Marginal) -> Array:
    """Expected amount by which the loss of each candidate falls below the best one, [n]."""
    return loss.shortfall(best)


def expected_hypervolume_improvement(
    front: ArrayLike, reference_point: tuple[float, float], first: Marginal, second: Marginal
) -> Array:
    """Expected gain in the area that a front dominates, for two independent objectives, both minimised.

    The area below the reference point that the front does not dominate is cut into strips along the first objective.
    In a strip from a to b that is open up to h, an outcome (x, y) gains (max(b - x, 0) - max(a - x, 0)) max(h - y, 0);
    the expectation of a product of independent factors is the product of expectations, whatever the marginals
    (Emmerich et al. 2011, https://doi.org/10.1109/CEC.2011.5949880).

    Args:
        front: [m, 2] points, in any order; dominated ones do no harm.
        reference_point: the worst corner.
        first: belief about the first objective at n candidates.
        second: belief about the second one.

    Returns:
        [n] areas, none negative.
    """
    points = np.asarray(front, dtype=np.float64).reshape(-1, 2)
    corner = np.asarray(reference_point, dtype=np.float64)
    inside = points[(points < corner).all(axis=1)]
    inside = inside[np.lexsort((inside[:, 1], inside[:, 0]))]
    heights = np.minimum.accumulate(np.append(corner[1], inside[:, 1]))
    steps = np.flatnonzero(heights[1:] < heights[:-1])  # the front: where the sweep reaches a new low
    ends = [*inside[steps, 0], corner[0]]
    below = np.zeros_like(first.shortfall(float(corner[0])))
    gain = np.zeros_like(below)
    for end, height in zip(ends, [corner[1], *inside[steps, 1]], strict=True):
        up_to_end = first.shortfall(float(end))
        gain = gain + np.maximum(up_to_end - below, 0.0) * second.shortfall(float(height))
        below = up_to_end
    return np.asarray(gain, dtype=np.float64)
