"""Leak-free splits: all structures of one group (molecule, material, trajectory) fall on one side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

TRAIN, VAL, TEST = 0, 1, 2
SPLIT_NAMES = ("train", "val", "test")


def split_by_group(
    groups: Sequence[str], elements: Sequence[frozenset[int]], fractions: Mapping[str, float], seed: int
) -> Any:
    """One of 0 (train), 1 (val), 2 (test) for each structure of one source: int8 [B].

    Groups are shuffled, then dealt out until every split has its share of structures. A group that holds an element not
    yet in training goes to training: a composition baseline for an element never seen would be a guess.
    """
    names = sorted(set(groups))
    members: dict[str, list[int]] = {name: [] for name in names}
    for index, name in enumerate(groups):
        members[name].append(index)
    held_out = {VAL: fractions["val"] * len(groups), TEST: fractions["test"] * len(groups)}
    order = np.random.default_rng(seed).permutation(len(names))
    covered: set[int] = set()
    dealt = []
    for name in (names[k] for k in order):
        present = frozenset[int]().union(*(elements[i] for i in members[name]))
        if not present <= covered:
            covered |= present
        else:
            dealt.append(name)
    split = np.zeros(len(groups), dtype=np.int8)
    filled = {VAL: 0, TEST: 0}
    for name in dealt:
        for part in (TEST, VAL):
            if filled[part] < held_out[part]:
                split[members[name]] = part
                filled[part] += len(members[name])
                break
    return split
