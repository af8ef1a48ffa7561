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
from wattier_gnn.parts import DONE, Part, finished_parts, part_tensors
from wattier_gnn.splits import element_masks
from wattier_gnn.structure import DataError

COMMIT_BYTES = 1 << 30  # between two commits: what may have to be merged again
STATE, INPUTS = "merge.json", "inputs.json"
PART_COLUMNS = (
    "atoms", "edges", "cells", "pbc", "energy", "atom_offset", "edge_offset", "key_offset", "keys", "group",
    "group_names", "group_offset",
)  # fmt: skip


@dataclass(frozen=True)
class MergePlan:
    """What is to be merged, in order.

    Attributes:
        files: (id of the parts, index of the source) of each.
        rows: of the columns of the store so far; empty for a new one.
        groups: name of the store's table of groups so far; empty for a new one.
        split, seed: how groups are dealt.
        may_be_empty: a source may lack a split.
    """

    files: Sequence[tuple[str, int]]
    rows: Mapping[str, int]
    groups: str
    split: Mapping[str, float]
    seed: int
    may_be_empty: bool


def merge(folder: Path, staging: Path, plan: MergePlan, sources: list[str]) -> tuple[dict[str, int], GroupTable, str]:
    """Append the parts of a plan to the columns of `folder`; goes on after the last commit.

    Returns:
        The rows of each column, the new table of groups, and its name.

    Raises:
        DataError: a split of a source stays empty, and may not; or a part is gone.
    """
    state_path = staging / STATE
    if state_path.exists():
        state = json.loads(state_path.read_text())
        table = GroupTable.load(folder / state["groups"])
    else:
        table = _dealt(folder, staging, plan)
        if not plan.may_be_empty:
            table.refuse_empty_splits(sources)
        number = int(plan.groups.removeprefix("groups-").removesuffix(".safetensors")) + 1 if plan.groups else 0
        name = f"groups-{number}.safetensors"
        write_file(folder / name, table.save)
        state = {"groups": name, "done": 0, "rows": dict(plan.rows)}
        write_text(state_path, json.dumps(state))
    with Appender(folder, state["rows"]) as appender:
        waiting, behind = 0, int(state["done"])
        for number in range(behind, len(plan.files)):
            shard_id, source = plan.files[number]
            for part in _whole(staging / shard_id):
                waiting += part.path.stat().st_size
                _append(appender, part.path, source, table)
            if waiting >= COMMIT_BYTES or number == len(plan.files) - 1:
                appender.flush()
                state |= {"done": number + 1, "rows": dict(appender.rows)}
                write_text(state_path, json.dumps(state))
                for done, _ in plan.files[behind : number + 1]:
                    _remove_parts(staging / done)
                waiting, behind = 0, number + 1
    return state["rows"], table, state["groups"]


def begin(staging: Path, inputs: Mapping[str, Any]) -> None:
    """Forget a merge that was begun with other inputs: what lost its parts to it must be converted again."""
    path, due = staging / INPUTS, json.dumps(inputs)
    if not path.exists() or path.read_text() != due:
        path.unlink(missing_ok=True)  # first: they would vouch for parts that went into a state that is gone
        (staging / STATE).unlink(missing_ok=True)
    if not (staging / STATE).exists():
        for record in staging.glob(f"*/{DONE}"):
            if len(finished_parts(record.parent)) != json.loads(record.read_text())["parts"]:
                shutil.rmtree(record.parent)
    write_text(path, due)


def _dealt(folder: Path, staging: Path, plan: MergePlan) -> GroupTable:
    table = GroupTable.load(folder / plan.groups) if plan.groups else GroupTable()
    for shard_id, source in plan.files:
        for part in _whole(staging / shard_id):
            tensors = part_tensors(part.path, ("group", "group_names", "group_offset", "atoms", "atom_offset"))
            names = unpack_texts(tensors["group_names"], tensors["group_offset"])
            rows = table.rows(source, names)
            group_of_atom = np.repeat(tensors["group"], np.diff(tensors["atom_offset"]))
            table.count(
                rows,
                np.bincount(tensors["group"], minlength=len(names)),
                element_masks(group_of_atom, tensors["atoms"]["numbers"], len(names)),
            )
    table.deal(plan.split, plan.seed)
    return table


def _whole(place: Path) -> list[Part]:
    """All parts of a file; raises DataError where one is gone, or its structures would be lost in silence."""
    parts, due = finished_parts(place), json.loads((place / DONE).read_text())["parts"]
    if len(parts) != due:
        raise DataError(
            f"{place}: holds {len(parts)} parts, but must hold {due}. Remove this folder and run the same command "
            "again: its file is then converted anew."
        )
    return parts


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
