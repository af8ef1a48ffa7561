"""How an epoch is cut into steps and a step is split over ranks: the same steps for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from wattier_gnn.distributed import World, all_sum
from wattier_gnn.store import Store


@dataclass(frozen=True)
class StepLimits:
    """The most that one step over all ranks may hold; None = unbounded.

    A structure that alone exceeds a limit is a step of its own: refusing it would end a training of days for one large
    cell. So the most memory a step can need is that of the limits or of the largest structure.
    """

    structures: int
    atoms: int | None = None
    edges: int | None = None


def cut_into_steps(order: Any, limits: StepLimits, n_atoms: Any, n_edges: Any) -> Iterator[Any]:
    """Consecutive parts of `order` (int64 [n]), each as long as the limits allow; n_atoms, n_edges int64 [B]."""
    budgets: list[tuple[Any, int]] = []
    if limits.atoms is not None:
        budgets.append((n_atoms, limits.atoms))
    if limits.edges is not None:
        budgets.append((n_edges, limits.edges))
    # No more can fit than there are atoms: a count left high for the atoms to decide costs no look far ahead.
    ahead = min(limits.structures, limits.atoms or limits.structures)
    start = 0
    while start < len(order):
        step = order[start : start + ahead]
        length = len(step)
        for sizes, limit in budgets:
            length = min(length, int(np.searchsorted(np.cumsum(sizes[step]), limit, side="right")))
        step = step[: max(1, length)]
        yield step
        start += len(step)


def edges_to_cut_by(store: Store, indices: Any, limits: StepLimits, world: World, device: torch.device) -> Any:
    """Edges of each structure as steps are cut and split by them, right for those at `indices`: int [B].

    Of a store with a narrowed cutoff they are counted, by all ranks together, where that decides anything. It costs
    one reading of the data: nothing less makes the steps those of a store of that cutoff.
    """
    if not store.is_narrowed or (limits.edges is None and world.size == 1):
        return store.n_edges
    indices = np.unique(indices)
    mine = np.array_split(np.arange(len(indices)), world.size)[world.rank]
    counts = torch.zeros(len(indices), dtype=torch.int32)
    counts[torch.from_numpy(mine)] = torch.from_numpy(store.count_edges(indices[mine])).to(torch.int32)
    n_edges = np.zeros(len(store), dtype=np.int32)
    n_edges[indices] = all_sum(counts.to(device)).cpu().numpy()
    return n_edges


def split_over_ranks(step: Any, work: Any, n_ranks: int) -> list[Any]:
    """Each rank's part of a step, about equal in work and, but for one, in number; empty where there are too few.

    Longest processing time first (Graham, 1969), a row of `n_ranks` structures at a time: the largest of a row goes to
    the rank with the least. The ranks' sums then differ by at most the largest structure. work int64 [n] belongs to
    step int64 [n].
    """
    if n_ranks == 1:
        return [step]
    largest_first = np.argsort(-work, kind="stable")
    owner = np.empty(len(step), dtype=np.int64)
    loads = np.zeros(n_ranks, dtype=np.int64)
    for start in range(0, len(step), n_ranks):
        row = largest_first[start : start + n_ranks]
        ranks = np.argsort(loads, kind="stable")[: len(row)]
        owner[row] = ranks
        loads[ranks] += work[row]
    by_owner = np.argsort(owner, kind="stable")
    return np.split(step[by_owner], np.cumsum(np.bincount(owner, minlength=n_ranks))[:-1])
