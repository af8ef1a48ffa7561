"""The table of groups of a store: which there are, how large, which elements they hold, on which side they fall."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from wattier_gnn.arrays import pack_texts, unpack_texts
from wattier_gnn.splits import SPLIT_NAMES, TRAIN, UNDEALT, deal_groups
from wattier_gnn.structure import DataError


class GroupTable:
    """All groups of a store. A group belongs to one source; its row never changes.

    Attributes:
        names: of each group.
        source: int16 [G], split: int8 [G], n_structures: int64 [G], elements: uint64 [G, 2] (bit Z of 128).
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._rows: dict[tuple[int, str], int] = {}
        self._columns: dict[str, Any] = {
            "source": np.zeros(0, dtype=np.int16),
            "split": np.zeros(0, dtype=np.int8),
            "n_structures": np.zeros(0, dtype=np.int64),
            "elements": np.zeros((0, 2), dtype=np.uint64),
        }

    def __len__(self) -> int:
        return len(self.names)

    @property
    def source(self) -> Any:
        return self._columns["source"][: len(self)]

    @property
    def split(self) -> Any:
        return self._columns["split"][: len(self)]

    @property
    def n_structures(self) -> Any:
        return self._columns["n_structures"][: len(self)]

    @property
    def elements(self) -> Any:
        return self._columns["elements"][: len(self)]

    def rows(self, source: int, names: list[str]) -> Any:
        """The rows of some groups of one source, added where they are new: int64 [n]."""
        for name in names:
            if self._rows.setdefault((source, name), len(self.names)) == len(self.names):
                self.names.append(name)
        rows = np.array([self._rows[source, name] for name in names], dtype=np.int64)
        self._make_room()
        fresh = rows[self._columns["n_structures"][rows] == 0]
        self._columns["source"][fresh], self._columns["split"][fresh] = source, UNDEALT
        return rows

    def count(self, rows: Any, n_structures: Any, elements: Any) -> None:
        """Count structures and elements of groups, each of which is there once."""
        self._columns["n_structures"][rows] += n_structures
        self._columns["elements"][rows] |= elements

    def deal(self, fractions: Mapping[str, float], seed: int) -> None:
        """Put every group that has no split yet into one, source by source."""
        for source in np.unique(self.source):
            rows = np.flatnonzero(self.source == source)
            self._columns["split"][rows] = deal_groups(
                [self.names[k] for k in rows],
                self.n_structures[rows],
                self.elements[rows],
                self.split[rows],
                fractions=fractions,
                seed=seed,
            )

    def refuse_empty_splits(self, sources: list[str]) -> None:
        """Raises DataError where a source has no structure in one of the splits."""
        for index, source in enumerate(sources):
            for split, name in enumerate(SPLIT_NAMES):
                if not (self.split[self.source == index] == split).any():
                    raise DataError(
                        f"{source}: the {name} split is empty, but each split must hold a whole group. "
                        "Give more groups (molecules, materials, systems), or a larger share in data.split."
                    )

    def warnings(self, sources: list[str]) -> list[str]:
        """What is odd about the splits: one that is empty, an element that is held out but never trained on."""
        found = []
        for index, source in enumerate(sources):
            mine = self.source == index
            for split, name in enumerate(SPLIT_NAMES):
                if not (mine & (self.split == split)).any():
                    found.append(f"{source}: the {name} split is empty")
            trained = np.bitwise_or.reduce(self.elements[mine & (self.split == TRAIN)], axis=0)
            strange = int((self.elements[mine] & ~trained).any(axis=1).sum())
            if strange:
                found.append(f"{source}: {strange} held-out groups hold an element that is not in training")
        return found

    def save(self, path: Path) -> None:
        """Write the table; the caller sees to it that it appears whole."""
        data, offset = pack_texts(self.names)
        columns = {name: np.ascontiguousarray(column[: len(self)]) for name, column in self._columns.items()}
        path.write_bytes(save({"names": data, "offset": offset, **columns}))

    @classmethod
    def load(cls, path: Path) -> GroupTable:
        """Raises DataError where the file is missing or damaged."""
        try:
            columns = load_file(path)
            table = cls()
            table.names = unpack_texts(columns.pop("names"), columns.pop("offset"))
            table._columns = {name: columns[name] for name in table._columns}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DataError(
                f"{path}: not a readable table of groups ({error}). Remove the store and prepare the data again."
            ) from error
        table._rows = {(int(s), name): k for k, (s, name) in enumerate(zip(table.source, table.names, strict=True))}
        return table

    def _make_room(self) -> None:
        have, need = len(self._columns["source"]), len(self.names)
        if need > have:
            for name, column in self._columns.items():
                room = np.zeros((max(need, 2 * have) - have, *column.shape[1:]), dtype=column.dtype)
                self._columns[name] = np.concatenate([column, room])
