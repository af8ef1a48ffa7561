"""Finished parts become one store: groups dealt into splits, columns joined in order, references fitted.

Every step may be killed: columns are cut back to the last commit, and a part is removed only behind one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wattier_gnn.arrays import unpack_texts
from wattier_gnn.columns import Appender
from wattier_gnn.files import write_file, write_text
from wattier_gnn.groups import GroupTable
from wattier_gnn.parts import finished_parts, part_tensors
from wattier_gnn.splits import element_masks

COMMIT_BYTES = 1 << 30  # between two commits: what may have to be merged again
STATE = "merge.json"
PART_COLUMNS = (
    "numbers", "positions", "forces", "force_mask", "receivers", "senders", "edge_shift", "cells", "pbc", "energy",
    "atom_offset", "edge_offset", "key_offset", "keys", "group", "group_names", "group_offset",
)  # fmt: skip


@dataclass(frozen=True)
class MergePlan:
    """What is to be merged, in order.

    Attributes:
        shards: folder name of the parts of each file, and the index of its source.
        rows: of the columns of the store so far; empty for a new one.
        groups: name of the store's table of groups so far; empty for a new one.
        split, seed: how groups are dealt.
    """

    shards: Sequence[tuple[str, int]]
    rows: Mapping[str, int]
    groups: str
    split: Mapping[str, float]
    seed: int

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Equal plans have equal ones, in JSON too."""
        return {
            "shards": [list(shard) for shard in self.shards],
            "rows": dict(self.rows),
            "groups": self.groups,
            "split": dict(self.split),
            "seed": self.seed,
        }


def merge(folder: Path, staging: Path, plan: MergePlan, sources: list[str]) -> tuple[dict[str, int], str]:
    """Append the parts of a plan to the columns of `folder`; goes on after the last commit of the same plan.

    Returns:
        The rows of each column, and the name of the new table of groups.

    Raises:
        DataError: a split of a source stays empty.
    """
    state_path = staging / STATE
    state = json.loads(state_path.read_text()) if state_path.exists() else {}
    if state.get("plan") != plan.fingerprint:
        table = _dealt(folder, staging, plan)
        table.refuse_empty_splits(sources)
        name = f"groups-{int(plan.groups.split('-')[1].split('.')[0]) + 1 if plan.groups else 0}.safetensors"
        write_file(folder / name, table.save)
        state = {"plan": plan.fingerprint, "groups": name, "done": 0, "rows": dict(plan.rows)}
        write_text(state_path, json.dumps(state))
    else:
        table = GroupTable.load(folder / state["groups"])
    with Appender(folder, state["rows"]) as appender:
        waiting, behind = 0, int(state["done"])
        for number in range(behind, len(plan.shards)):
            shard_id, source = plan.shards[number]
            for part in finished_parts(staging / shard_id):
                waiting += part.path.stat().st_size
                _append(appender, part.path, source, table)
            if waiting >= COMMIT_BYTES or number == len(plan.shards) - 1:
                appender.flush()
                state |= {"done": number + 1, "rows": dict(appender.rows)}
                write_text(state_path, json.dumps(state))
                for done, _ in plan.shards[behind : number + 1]:
                    _remove_parts(staging / done)
                waiting, behind = 0, number + 1
    return state["rows"], state["groups"]


def forget(staging: Path) -> None:
    """Undo a merge whose plan no longer holds: the files whose parts are gone must be converted again."""
    state_path = staging / STATE
    if state_path.exists():
        state = json.loads(state_path.read_text())
        for shard_id, _ in state["plan"]["shards"][: state["done"]]:
            shutil.rmtree(staging / shard_id, ignore_errors=True)
        state_path.unlink()


def _dealt(folder: Path, staging: Path, plan: MergePlan) -> GroupTable:
    table = GroupTable.load(folder / plan.groups) if plan.groups else GroupTable()
    for shard_id, source in plan.shards:
        for part in finished_parts(staging / shard_id):
            tensors = part_tensors(part.path, ("group", "group_names", "group_offset", "numbers", "atom_offset"))
            names = unpack_texts(tensors["group_names"], tensors["group_offset"])
            rows = table.rows(source, names)
            group_of_atom = np.repeat(tensors["group"], np.diff(tensors["atom_offset"]))
            table.count(
                rows,
                np.bincount(tensors["group"], minlength=len(names)),
                element_masks(group_of_atom, tensors["numbers"], len(names)),
            )
    table.deal(plan.split, plan.seed)
    return table


def _append(appender: Appender, path: Path, source: int, table: GroupTable) -> None:
    arrays = part_tensors(path, PART_COLUMNS)
    rows = table.rows(source, unpack_texts(arrays["group_names"], arrays["group_offset"]))
    group = rows[arrays["group"]]
    arrays |= {
        "group": group,
        "split": table.split[group],
        "source_index": np.full(len(group), source, dtype=np.int16),
    }
    appender.append(arrays)


def _remove_parts(place: Path) -> None:
    for path in place.glob("*.safetensors"):
        path.unlink()
