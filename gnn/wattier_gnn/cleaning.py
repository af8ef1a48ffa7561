"""What is removed before training, why, and how much of it: nothing leaves the data uncounted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wattier_gnn.datasets import Reader
from wattier_gnn.structure import BadRecord, ShardError, Structure

HEAVIEST_ELEMENT = 118
# No structure is a tenth of a millimetre wide; beyond, neighbour search would count cells until memory ends.
MAX_POSITION_ANGSTROM = 1e6
# Lattice vectors this close to lying in a plane hold no atoms, and a cutoff spans a hundred of their images.
MIN_CELL_ANGSTROM = 0.1
# Diamond has 0.18; a cell in the wrong unit would have so many edges that memory ends.
MAX_ATOMS_PER_CUBIC_ANGSTROM = 5.0
# Where nothing repeats, atoms are counted in boxes this wide: a molecule may have 40 in one. A cubic lattice as close
# as the atoms of H2 (0.74 Å) has 27 there; wider boxes would hide a clump in the emptiness around it.
BOX_ANGSTROM = 2.0
UNREADABLE = "unreadable record"
MAX_MESSAGES = 20  # kept of the bad records of a source; all are counted

ForceNorm = Literal["per_atom", "frobenius"]


def removal_reason(
    structure: Structure, max_force_ev_per_angstrom: float, force_norm: ForceNorm = "per_atom"
) -> str | None:
    """Why a structure must not be trained on; None when it may.

    Args:
        structure: what a reader yielded.
        max_force_ev_per_angstrom: a structure goes when its force norm is this or larger.
        force_norm: per_atom takes the largest L2 norm of the force on an atom (the published code), frobenius the norm
            over all atoms together (the published words), which removes large structures first.
    """
    forces = structure.forces_ev_per_angstrom
    if len(structure.numbers) == 0:
        return "no atoms"
    if structure.numbers.min() < 1 or structure.numbers.max() > HEAVIEST_ELEMENT:
        return "unknown element"
    if reason := geometry_reason(structure):
        return reason
    if not np.isfinite(structure.energy_ev) or (forces is not None and not np.isfinite(forces).all()):
        return "nan label"
    if forces is not None and _force_norm(forces, force_norm) >= max_force_ev_per_angstrom:
        return "force above threshold"
    return None


def geometry_reason(structure: Structure) -> str | None:
    """What is wrong with where the atoms, at least one, are said to be; None when nothing is."""
    cell, positions = structure.cell_angstrom, structure.positions_angstrom
    if not np.isfinite(positions).all() or (cell is not None and not np.isfinite(cell).all()):
        return "nan position"
    if np.abs(positions).max() > MAX_POSITION_ANGSTROM:
        return "position out of range"
    lengths, open_axes = np.ones(0), np.eye(3)
    if any(structure.pbc):
        if cell is None:
            return "cell without volume"
        _, lengths, axes = np.linalg.svd(cell[list(structure.pbc)])  # of the box that the vectors span
        if lengths[-1] < MIN_CELL_ANGSTROM:
            return "cell without volume"
        open_axes = axes[len(lengths) :]
    return "impossible density" if _is_too_dense(positions, lengths.prod(), open_axes) else None


def _is_too_dense(positions: Any, repeats: float, open_axes: Any) -> bool:
    """Whether a box holds more atoms than can be; it is as large as the cell, and BOX_ANGSTROM wide along open axes.

    Args:
        positions: [N, 3], in Å.
        repeats: length, area or volume (Å, Å² or Å³) that the lattice vectors span; 1 without any.
        open_axes: unit vectors [0 to 3, 3] at right angles to the lattice vectors.
    """
    most = MAX_ATOMS_PER_CUBIC_ANGSTROM * repeats * BOX_ANGSTROM ** len(open_axes)
    if len(positions) <= most:  # of nearly all structures: were all atoms in one box, they would not be too many
        return False
    if len(open_axes) == 0:
        return True
    boxes = np.floor(positions @ open_axes.T / BOX_ANGSTROM)
    return bool(np.unique(boxes, axis=0, return_counts=True)[1].max() > most)


def _force_norm(forces: Any, force_norm: ForceNorm) -> float:
    square = np.einsum("ax,ax->a", forces, forces)
    return float(np.sqrt(square.max() if force_norm == "per_atom" else square.sum()))


@dataclass
class CleaningReport:
    """Structures by source: read = kept + removed, removed by reason, and the files not read to their end.

    Attributes:
        read: source -> structures read, bad records among them.
        kept: source -> structures kept.
        removed: source -> reason -> structures removed.
        bad_shards: source -> one message for each file that could not be read to its end.
        bad_records: source -> the first messages of records that could not be used.
    """

    read: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    removed: dict[str, Counter[str]] = field(default_factory=dict)
    bad_shards: dict[str, list[str]] = field(default_factory=dict)
    bad_records: dict[str, list[str]] = field(default_factory=dict)

    def count(self, source: str, reason: str | None) -> None:
        """Count one structure: kept when `reason` is None, removed for it otherwise."""
        self.read[source] += 1
        if reason is None:
            self.kept[source] += 1
        else:
            self.removed.setdefault(source, Counter())[reason] += 1

    def count_bad_record(self, source: str, message: str) -> None:
        """Count one record that could not be used."""
        self.count(source, UNREADABLE)
        messages = self.bad_records.setdefault(source, [])
        if len(messages) < MAX_MESSAGES:
            messages.append(message)

    def count_bad_shard(self, source: str, message: str) -> None:
        """Record a file that could not be read to its end."""
        self.bad_shards.setdefault(source, []).append(message)

    def add(self, other: CleaningReport) -> None:
        """Count what another report counted."""
        self.read.update(other.read)
        self.kept.update(other.kept)
        for source, reasons in other.removed.items():
            self.removed.setdefault(source, Counter()).update(reasons)
        for source, messages in other.bad_shards.items():
            self.bad_shards.setdefault(source, []).extend(messages)
        for source, messages in other.bad_records.items():
            mine = self.bad_records.setdefault(source, [])
            mine.extend(messages[: MAX_MESSAGES - len(mine)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {
            "read": dict(self.read),
            "kept": dict(self.kept),
            "removed": {source: dict(reasons) for source, reasons in self.removed.items()},
            "bad_shards": {source: list(messages) for source, messages in self.bad_shards.items()},
            "bad_records": {source: list(messages) for source, messages in self.bad_records.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CleaningReport:
        """The report that `to_dict` was called on."""
        return cls(
            read=Counter(values["read"]),
            kept=Counter(values["kept"]),
            removed={source: Counter(reasons) for source, reasons in values["removed"].items()},
            bad_shards={source: list(messages) for source, messages in values["bad_shards"].items()},
            bad_records={source: list(messages) for source, messages in values["bad_records"].items()},
        )


def read_clean(
    reader: Reader,
    path: Path,
    max_force_ev_per_angstrom: float,
    report: CleaningReport,
    force_norm: ForceNorm = "per_atom",
) -> Iterator[Structure]:
    """The structures under `path` that may be trained on; all others, and unreadable files, are counted in `report`.

    Raises:
        DataError: there is nothing under `path`, or a file asks for something that must not be done.
    """
    for shard in reader.shards(path):
        try:
            for item in reader.read(shard):
                if isinstance(item, BadRecord):
                    report.count_bad_record(reader.name, item.message)
                    continue
                reason = removal_reason(item, max_force_ev_per_angstrom, force_norm)
                report.count(reader.name, reason)
                if reason is None:
                    yield item
        except ShardError as error:
            report.count_bad_shard(reader.name, str(error))
