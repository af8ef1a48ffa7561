"""Two tests on the losses of many trials: which group stands out from all others, and who is as good as the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from wattier.pareto import non_dominated_ranks
from wattier.select_noise import Noise

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


class Ordered(NamedTuple):
    """Losses from the lowest to the highest, [n] each: with their variances and the degrees of freedom of these.

    total: the degrees of freedom that all variances have together, above which no comparison has more.
    """

    losses: Array
    variances: Array
    freedoms: Array
    total: float

    @classmethod
    def of(cls, losses: Sequence[tuple[str, float]], noise: Noise) -> Self:
        """From trial ids with their losses, the lowest first."""
        ids = [trial_id for trial_id, _ in losses]
        return cls(
            np.array([loss for _, loss in losses]),
            np.array([noise.variance[i] for i in ids]),
            np.array([noise.freedom[i] for i in ids]),
            noise.total,
        )


def chances(table: Ordered, lower: Indices, upper: Indices) -> tuple[Array, Array]:
    """Welch's t of losses that are `upper` against those that are `lower`, and the chance of it or more, one-sided.

    Args:
        table: of n losses.
        lower: [a] indices.
        upper: [b] indices.

    Returns:
        t and chance, [a, b] each.
    """
    from scipy.special import stdtr

    first, second = table.variances[lower][:, None], table.variances[upper][None, :]
    total = first + second
    t = (table.losses[upper][None, :] - table.losses[lower][:, None]) / np.sqrt(total)
    shares = (first / total) ** 2 / table.freedoms[lower][:, None] + (second / total) ** 2 / table.freedoms[upper]
    freedom = np.minimum(1 / shares, table.total)
    return t, stdtr(freedom, -t)


def of_many(chance: Array, comparisons: float) -> Array:
    """The chance that the smallest of so many chances is this small or smaller (Sidak 1967)."""
    with np.errstate(divide="ignore"):
        return -np.expm1(comparisons * np.log1p(-np.minimum(chance, 1.0)))


def clear_group(table: Ordered, at_most: int, level: float) -> tuple[int, float] | None:
    """How many of the lowest losses are clearly below all others, and by what chance that could be luck.

    A group is clear if each of its trials is below each of the others by more than noise does, in a two-sided test
    that counts the comparisons of all pairs: the group is seen only after looking. Of several clear groups the one with
    the widest margin, in standard deviations of a difference, is it.

    Args:
        table: of n losses, the lowest first.
        at_most: the largest group.
        level: the chance at which luck is ruled out.

    Returns:
        None where no group is clear.
    """
    n = len(table.losses)
    sizes = min(at_most, n - 1)
    t, chance = chances(table, np.arange(sizes), np.arange(n))
    t, chance = np.minimum.accumulate(t, axis=0), np.maximum.accumulate(chance, axis=0)
    weakest = np.array([t[size - 1, size:].min() for size in range(1, sizes + 1)])
    likeliest = np.array([chance[size - 1, size:].max() for size in range(1, sizes + 1)])
    by_luck = of_many(2 * likeliest, n * (n - 1) / 2)
    clear = np.flatnonzero(by_luck < level)
    if not len(clear):
        return None
    widest = int(clear[np.argmax(weakest[clear])])
    return widest + 1, float(by_luck[widest])


def not_worse(table: Ordered) -> Array:
    """For each loss the chance that, were it truly the lowest, another one would still be as far below it, [n].

    Whoever has less than `level` is clearly not the best; the truly best trial is among the rest with a probability
    of at least 1 - `level` (subset selection, Gupta 1965, https://doi.org/10.1080/00401706.1965.10490251; multiple
    comparisons with the best, Hsu 1984, https://doi.org/10.1214/aos/1176346732). It is held against those that no other
    beats in both loss and noise: the lowest of all may be a lucky one.
    """
    rivals = np.flatnonzero(non_dominated_ranks(np.stack([table.losses, table.variances], axis=1)) == 0)
    _, chance = chances(table, rivals, np.arange(len(table.losses)))
    chance[rivals[:, None] == np.arange(len(table.losses))] = 1.0  # nobody is a rival of his own
    return of_many(chance.min(axis=0), len(table.losses) - 1)
