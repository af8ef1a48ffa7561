"""From released files to one store: read, clean, split by group, align, precompute neighbours."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wattier_gnn.cleaning import CleaningReport, read_clean
from wattier_gnn.datasets import READERS
from wattier_gnn.splits import SPLIT_NAMES, split_by_group
from wattier_gnn.store import Store, write_store
from wattier_gnn.structure import DataError, Structure


def ingest(  # noqa: PLR0913  (the whole recipe of a store)
    paths: Mapping[str, Path],
    folder: Path,
    *,
    cutoff_angstrom: float,
    max_force_ev_per_angstrom: float,
    on_bad: Literal["refuse", "skip"],
    split: Mapping[str, float],
    seed: int,
    say: Callable[[str], None],
) -> Store:
    """Read every source under `paths`, and write the store `folder` with a ``cleaning.json`` in it.

    Raises:
        DataError: a path holds nothing, a source has nothing left after cleaning, a split of a source stays empty, or
            a file is unreadable and `on_bad` is refuse.
    """
    report = CleaningReport()
    structures: list[Structure] = []
    splits = []
    for source, path in paths.items():
        kept = list(read_clean(READERS[source], path, max_force_ev_per_angstrom, report))
        if on_bad == "refuse" and report.bad_shards.get(source):
            raise DataError(
                f"{report.bad_shards[source][0]} Replace the file, or set data.on_bad: skip to go on without it."
            )
        if not kept:
            raise DataError(
                f"{path}: holds no usable {source} structure ({report.read[source]} read), but must hold some. "
                "Give another path for this source, or remove it from data.sources."
            )
        elements = [frozenset(s.numbers.tolist()) for s in kept]
        source_split = split_by_group([s.group for s in kept], elements, split, seed)
        _refuse_empty_splits(source, source_split)
        structures += kept
        splits.append(source_split)
        say(_summary(source, report))
    store = write_store(
        folder,
        structures,
        np.concatenate(splits),
        sources=list(paths),
        cutoff_angstrom=cutoff_angstrom,
        extra_files={"cleaning.json": json.dumps(report.to_dict(), indent=2)},
    )
    say(f"store: {len(store)} structures, {len(store.numbers)} atoms, {store.edge_offset[-1]} edges in {folder}")
    return store


def read_cleaning(store: Store) -> CleaningReport:
    """What was removed on the way into a store."""
    return CleaningReport.from_dict(json.loads((store.folder / "cleaning.json").read_text()))


def _refuse_empty_splits(source: str, split: Any) -> None:
    for index, name in enumerate(SPLIT_NAMES):
        if not (split == index).any():
            raise DataError(
                f"{source}: the {name} split is empty, but each split must hold a whole group. "
                "Give more groups (molecules, materials, systems), or a larger share in data.split."
            )


def _summary(source: str, report: CleaningReport) -> str:
    removed = ", ".join(f"{n} {reason}" for reason, n in report.removed.get(source, {}).items()) or "none"
    bad = len(report.bad_shards.get(source, ()))
    return f"{source}: {report.read[source]} read, {report.kept[source]} kept, removed: {removed}" + (
        f", {bad} unreadable file skipped" if bad == 1 else f", {bad} unreadable files skipped" if bad else ""
    )
