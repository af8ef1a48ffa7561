"""Which structures make up which batch: the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


def choose_subset(indices: Any, source_index: Any, n_structures: int | None, seed: int) -> Any:
    """At most `n_structures` of `indices`, taken evenly over sources (small sources give all they have): int64 [n]."""
    if n_structures is None or n_structures >= len(indices):
        return np.sort(indices)
    rng = np.random.default_rng([seed, 1])
    piles = [rng.permutation(indices[source_index[indices] == s]) for s in np.unique(source_index[indices])]
    taken = [0] * len(piles)
    for _ in range(n_structures):
        room = [k for k in range(len(piles)) if taken[k] < len(piles[k])]
        taken[min(room, key=lambda k: taken[k])] += 1
    return np.sort(np.concatenate([pile[:n] for pile, n in zip(piles, taken, strict=True)]))


def epoch_batches(  # noqa: PLR0913  (most are keywords)
    indices: Any, batch_structures: int, *, seed: int, epoch: int, rank: int, world_size: int, shuffle: bool
) -> Iterator[Any]:
    """This rank's part of each global batch; a rank may get an empty part of the last one.

    The global batches depend on seed and epoch only, so that one rank and many ranks take the same steps.
    """
    order = np.random.default_rng([seed, epoch]).permutation(indices) if shuffle else np.asarray(indices)
    for start in range(0, len(order), batch_structures):
        yield order[start : start + batch_structures][rank::world_size]
