"""Small sound files of every released layout, for tests to spoil, and what reading a spoilt one must look like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wattier_gnn.datasets import READERS
from wattier_gnn.sample import layouts
from wattier_gnn.structure import BadRecord, DataError, ShardError, Structure

SOURCES = ("ani1x", "qm7x", "oc20", "oc22", "mptrj", "extxyz")
SUFFIXES = {"oc20": "*.extxyz.xz", "mptrj": "*.json.gz", "extxyz": "*.xyz", "ase_db": "*.db"}
NAMES = {"ani1x": "a.h5", "qm7x": "1000.hdf5", "oc22": "data.0000.lmdb", "mptrj": "a.json"}


def make(source: str, index: int) -> Structure:
    rng = np.random.default_rng(index)
    group, key = {
        "ani1x": ("CO", f"CO/{index}"),
        "qm7x": ("1", f"1/Geom-m1-i1-c1-{index}"),
        "oc20": ("random1", f"random1/frame{index}"),
        "oc22": ("1", f"1/{index}"),
        "mptrj": (f"mp-{index}", f"mp-{index}-0-0"),
    }[source]
    return Structure(
        numbers=np.array([6, 8], dtype=np.int64),
        positions_angstrom=rng.normal(size=(2, 3)),
        cell_angstrom=5 * np.eye(3),
        pbc=(True, True, True),
        energy_ev=-1.0,
        forces_ev_per_angstrom=rng.normal(size=(2, 3)),
        source=source,
        group=group,
        key=key,
    )


def write_good(folder: Path, source: str, n_structures: int = 8, given: list[Structure] | None = None) -> Path:
    structures = given or [make(source, index) for index in range(n_structures)]
    tags = [[1, 2]] * n_structures
    if source == "oc20":
        layouts.write_oc20(folder, 0, structures, tags, [[False, False]] * n_structures)
        return folder / "0.extxyz.xz"
    path = folder / NAMES[source]
    if source == "oc22":
        layouts.write_oc22(path, structures, tags)
    else:
        write: Callable[[Path, list[Structure]], None] = getattr(layouts, f"write_{source}")
        write(path, structures)
    return path


def fails(source: str, path: Path, kind: type[DataError] = ShardError) -> str:
    """The message of reading all of `path`: one line that names the file."""
    reader = READERS[source]
    with pytest.raises(DataError) as caught:
        for shard in reader.shards(path):
            list(reader.read(shard))
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert "must" in message
    return message


def survey(source: str, path: Path) -> tuple[list[str], list[str]]:
    """Keys of the sound structures, and the messages of the bad records: one line each, that names the file."""
    found = list(READERS[source].read(path))
    messages = [record.message for record in found if isinstance(record, BadRecord)]
    for message in messages:
        assert "\n" not in message
        assert str(path.parent) in message
        assert "must" in message
    return [record.key for record in found if isinstance(record, Structure)], messages
