"""Which structures an epoch draws, in which order: by seed and epoch alone, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from wattier_gnn.structure import DataError

Mixture = Literal["natural", "uniform", "temperature", "weights"]
SHUFFLED_AT_ONCE = 1 << 16  # small sources are shuffled many times in one call


def choose_subset(indices: Any, source_index: Any, n_structures: int | None, seed: int) -> Any:
    """At most `n_structures` of `indices`, taken evenly over sources (small sources give all they have): int64 [n]."""
    if n_structures is None or n_structures >= len(indices):
        return np.sort(indices)
    rng = np.random.default_rng([seed, 1])
    sources = np.asarray(source_index)[indices]
    piles = [rng.permutation(indices[sources == s]) for s in np.unique(sources)]
    taken = _dealt_evenly([len(pile) for pile in piles], n_structures)
    return np.sort(np.concatenate([pile[:n] for pile, n in zip(piles, taken, strict=True)]))


def _dealt_evenly(sizes: Sequence[int], total: int) -> list[int]:
    """What each pile gives when they give one each in turn until `total` is reached; no pile gives more than it has."""
    level, left = 0, total
    for size in sorted(sizes):
        giving = sum(s > level for s in sizes)
        rounds = min(size - level, left // giving) if giving else 0
        level, left = level + rounds, left - rounds * giving
    taken = [min(size, level) for size in sizes]
    for k in [k for k, size in enumerate(sizes) if size > level][:left]:
        taken[k] += 1
    return taken


def source_shares(
    counts: Any, sources: Sequence[str], mixture: Mixture, temperature: float, weights: Mapping[str, float] | None
) -> Any:
    """Share of each source in what an epoch draws, float64 [S], summing to 1; None = natural, one pile of all.

    counts [S]: training structures of each source, n_s; a source without any has no share. uniform: all alike.
    temperature: proportional to n_s^(1/T), which is natural at T = 1 and uniform as T grows (Devlin et al., 2018).
    weights: as given.

    Raises:
        DataError: a source that has structures has no weight.
    """
    if mixture == "natural":
        return None
    present = np.asarray(counts) > 0
    if mixture == "weights":
        if missing := [s for s, here in zip(sources, present, strict=True) if here and s not in (weights or {})]:
            raise DataError(
                f"training.source_weights has no weight for {', '.join(missing)}, but every source must have one. "
                "Add it."
            )
        parts = np.array([float((weights or {}).get(source, 0.0)) for source in sources])
    else:
        exponent = 0.0 if mixture == "uniform" else 1.0 / temperature
        parts = np.asarray(counts, dtype=np.float64) ** exponent
    parts = np.where(present, parts, 0.0)
    return parts / parts.sum()


class Sampler:
    """Draws structures an epoch at a time, each source without replacement until it is exhausted, then shuffled anew.

    Where an epoch is shorter or longer than a source, the next one goes on where it ended. One shuffled pass of each
    pile is kept: 8 bytes a structure beside `indices`.
    """

    def __init__(
        self, indices: Any, *, seed: int, source_index: Any = None, shares: Any = None, n_draws: int | None = None
    ) -> None:
        """shares [S] as of `source_shares`, None = natural. n_draws: structures an epoch; None = as many as there are.

        Raises:
            DataError: there is nothing to draw from.
        """
        indices = np.asarray(indices)
        if not len(indices):
            raise DataError("there are no training structures, but there must be one. See the split and the removals.")
        self.n_draws = len(indices) if n_draws is None else n_draws
        if shares is None:
            self._piles, self._quotas = [indices], [self.n_draws]
        else:
            sources = np.asarray(source_index)[indices]
            self._piles = [indices[sources == s] for s in range(len(shares))]
            self._quotas = _largest_remainders(np.asarray(shares), self.n_draws)
        self._seed, self._natural = seed, shares is None
        self._kept: dict[int, tuple[int, Any]] = {}

    def epoch(self, number: int) -> Any:
        """Structures of one epoch in the order they are trained on: int64 [n_draws]."""
        drawn = [self._stretch(pile, number * quota, quota) for pile, quota in enumerate(self._quotas) if quota]
        if self._natural:
            return drawn[0]
        owner = np.repeat(np.arange(len(self._quotas), dtype=np.int16), self._quotas)
        np.random.default_rng([self._seed, number, 1]).shuffle(owner)
        order = np.empty(self.n_draws, dtype=np.int64)
        order[np.argsort(owner, kind="stable")] = np.concatenate(drawn)
        return order

    def _stretch(self, pile: int, start: int, length: int) -> Any:
        """Part of the endless sequence of a pile's shuffled passes."""
        parts = []
        while length > 0:
            number, offset = divmod(start, self._block_length(pile))
            part = self._block(pile, number)[offset : offset + length]
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _block_length(self, pile: int) -> int:
        n = len(self._piles[pile])
        return n if self._natural else n * max(1, SHUFFLED_AT_ONCE // n)

    def _block(self, pile: int, number: int) -> Any:
        """One shuffled pass over a pile, or many over a small one."""
        if self._kept.get(pile, (-1, None))[0] != number:
            structures = self._piles[pile]
            passes = self._block_length(pile) // len(structures)
            if self._natural:
                block = np.random.default_rng([self._seed, number]).permutation(structures)
            else:
                rng = np.random.default_rng([self._seed, number, 2, pile])
                block = rng.permuted(np.broadcast_to(structures, (passes, len(structures))), axis=1).ravel()
            self._kept[pile] = (number, block)
        return self._kept[pile][1]


def _largest_remainders(shares: Any, total: int) -> list[int]:
    """Whole numbers in proportion to shares [S] that sum to `total`."""
    exact = shares * total
    quotas = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(-(exact - quotas), kind="stable")
    quotas[order[: total - int(quotas.sum())]] += 1
    return [int(q) for q in quotas]
