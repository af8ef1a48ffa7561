"""Leak-free splits: all structures of one group (molecule, material, trajectory) fall on one side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

TRAIN, VAL, TEST = 0, 1, 2
SPLIT_NAMES = ("train", "val", "test")
UNDEALT = -1


def deal_groups(  # noqa: PLR0913  (most are keywords)
    names: Sequence[str], sizes: Any, elements: Any, dealt: Any, *, fractions: Mapping[str, float], seed: int
) -> Any:
    """One of 0 (train), 1 (val), 2 (test) for each group of one source: int8 [G].

    Groups are shuffled. One that holds an element not yet in training goes to training: a composition baseline for an
    element never seen would be a guess. The others are shuffled anew, and dealt out until val and test have their share
    of structures; in the first order rare elements come late, and the split that is dealt last would get more of them.
    So val and test are alike but for chance, which intervals that are calibrated on one and hold on the other rest on.
    A group larger than a whole share goes to training, unless val or test would stay empty.

    Args:
        names: of the groups; the shuffle depends on them and on the seed, not on their order here.
        sizes: int64 [G], structures of each.
        elements: uint64 [G, 2], bit Z of these 128 is set where the group holds element Z.
        dealt: int8 [G], the split of a group that was dealt before and stays, or `UNDEALT`.
        fractions: shares of the structures.
        seed: of the shuffle.
    """
    split = np.array(dealt, dtype=np.int8)
    n_structures = int(np.sum(sizes))
    held_out = {part: fractions[SPLIT_NAMES[part]] * n_structures for part in (TEST, VAL)}
    filled = {part: int(np.sum(sizes[split == part])) for part in (TEST, VAL)}
    masks = [low | high << 64 for low, high in elements.tolist()]
    covered = 0
    for mask in (masks[k] for k in np.flatnonzero(split == TRAIN)):
        covered |= mask
    fresh = sorted(np.flatnonzero(split == UNDEALT).tolist(), key=names.__getitem__)
    random = np.random.default_rng(seed)
    rest = []
    for group in (fresh[k] for k in random.permutation(len(fresh))):
        if masks[group] & ~covered:
            covered |= masks[group]
            split[group] = TRAIN
        else:
            rest.append(group)
    rest = [rest[k] for k in random.permutation(len(rest))]
    for group in rest:
        room = (part for part in (TEST, VAL) if filled[part] < held_out[part] and sizes[group] <= held_out[part])
        split[group] = part = next(room, TRAIN)
        if part != TRAIN:
            filled[part] += int(sizes[group])
    spare = sorted((group for group in rest if split[group] == TRAIN), key=lambda group: int(sizes[group]))
    for part, group in zip((part for part in (TEST, VAL) if filled[part] == 0), spare, strict=False):
        split[group] = part
    return split


def element_masks(group: Any, numbers: Any, n_groups: int) -> Any:
    """The elements of groups as `deal_groups` takes them: uint64 [n_groups, 2], from group and number of each atom."""
    masks = np.zeros((n_groups, 2), dtype=np.uint64)
    pairs = np.unique(np.asarray(group, dtype=np.int64) * 128 + numbers)
    owner, z = pairs // 128, pairs % 128
    np.bitwise_or.at(masks, (owner, z // 64), np.uint64(1) << (z % 64).astype(np.uint64))
    return masks
