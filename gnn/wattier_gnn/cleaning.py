"""What is removed before training, why, and how much of it: nothing leaves the data uncounted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wattier_gnn.datasets import Reader
from wattier_gnn.structure import BadRecord, ShardError, Structure

HEAVIEST_ELEMENT = 118


def removal_reason(structure: Structure, max_force_ev_per_angstrom: float) -> str | None:
    """Why a structure must not be trained on; None when it may.

    Args:
        structure: what a reader yielded.
        max_force_ev_per_angstrom: a structure goes when the force on any of its atoms has this L2 norm or a larger one
            (the published rule; the norm over all atoms together would remove large structures first).
    """
    forces = structure.forces_ev_per_angstrom
    if len(structure.numbers) == 0:
        return "no atoms"
    if structure.numbers.min() < 1 or structure.numbers.max() > HEAVIEST_ELEMENT:
        return "unknown element"
    cell = structure.cell_angstrom
    if not np.isfinite(structure.positions_angstrom).all() or (cell is not None and not np.isfinite(cell).all()):
        return "nan position"
    if not np.isfinite(structure.energy_ev) or (forces is not None and not np.isfinite(forces).all()):
        return "nan label"
    if forces is not None and np.linalg.norm(forces, axis=1).max() >= max_force_ev_per_angstrom:
        return "force above threshold"
    return None


@dataclass
class CleaningReport:
    """Structures by source: read = kept + removed, removed by reason, and the files not read to their end.

    Attributes:
        read: source -> structures read.
        kept: source -> structures kept.
        removed: source -> reason -> structures removed.
        bad_shards: source -> one message for each file that could not be read to its end.
    """

    read: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    removed: dict[str, Counter[str]] = field(default_factory=dict)
    bad_shards: dict[str, list[str]] = field(default_factory=dict)

    def count(self, source: str, reason: str | None) -> None:
        """Count one structure: kept when `reason` is None, removed for it otherwise."""
        self.read[source] += 1
        if reason is None:
            self.kept[source] += 1
        else:
            self.removed.setdefault(source, Counter())[reason] += 1

    def count_bad_shard(self, source: str, message: str) -> None:
        """Record a file that could not be read to its end."""
        self.bad_shards.setdefault(source, []).append(message)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {
            "read": dict(self.read),
            "kept": dict(self.kept),
            "removed": {source: dict(reasons) for source, reasons in self.removed.items()},
            "bad_shards": {source: list(messages) for source, messages in self.bad_shards.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CleaningReport:
        """The report that `to_dict` was called on."""
        return cls(
            read=Counter(values["read"]),
            kept=Counter(values["kept"]),
            removed={source: Counter(reasons) for source, reasons in values["removed"].items()},
            bad_shards={source: list(messages) for source, messages in values["bad_shards"].items()},
        )


def read_clean(
    reader: Reader, path: Path, max_force_ev_per_angstrom: float, report: CleaningReport
) -> Iterator[Structure]:
    """The structures under `path` that may be trained on; all others, and unreadable files, are counted in `report`.

    Raises:
        DataError: there is nothing under `path`, or a file asks for something that must not be done.
    """
    for shard in reader.shards(path):
        try:
            for structure in reader.read(shard):
                if isinstance(structure, BadRecord):
                    report.count(reader.name, "unreadable record")
                    continue
                reason = removal_reason(structure, max_force_ev_per_angstrom)
                report.count(reader.name, reason)
                if reason is None:
                    yield structure
        except ShardError as error:
            report.count_bad_shard(reader.name, str(error))
