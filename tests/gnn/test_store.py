"""Structures come back from the store as they went in; a damaged store says so."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wattier_gnn.arrays import COLUMNS
from wattier_gnn.columns import Appender
from wattier_gnn.splits import TEST, TRAIN, VAL
from wattier_gnn.store import Store, ragged, write_store
from wattier_gnn.structure import DataError, Structure

CUTOFF = 4.0
SOURCES = ["a", "b"]


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """These stores need not survive a power cut."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def structures(tools: Any) -> list[Structure]:
    """The three scenes with labels, and an isolated atom without forces."""
    rng = np.random.default_rng(3)
    labelled = [
        replace(s, energy_ev=-30_000.0 * k - 0.123, forces_ev_per_angstrom=rng.normal(size=s.positions_angstrom.shape))
        for k, s in enumerate(tools.scenes().values(), start=1)
    ]
    return [*labelled, tools.structure([6], [[0, 0, 0]], energy_ev=-1028.7, key="atom")]


@pytest.fixture
def folder(tmp_path: Path, structures: list[Structure]) -> Path:
    write(tmp_path / "store", structures)
    return tmp_path / "store"


def write(folder: Path, structures: list[Structure], split: Any = None) -> Store:
    split = np.zeros(len(structures), dtype=np.int8) if split is None else np.array(split, dtype=np.int8)
    return write_store(folder, structures, split, sources=SOURCES, cutoff_angstrom=CUTOFF)


@pytest.mark.usefixtures("float64")
def test_a_batch_is_what_was_written(folder: Path, structures: list[Structure], tools: Any) -> None:
    store = Store(folder)
    order = [2, 0, 3, 1]
    batch, expected = store.batch(order), tools.join([structures[k] for k in order])
    for name in ("numbers", "positions", "edge_index", "edge_shift", "structure_index", "source_index", "n_atoms"):
        torch.testing.assert_close(getattr(batch, name), getattr(expected, name), rtol=0, atol=1e-12)
    i, j = batch.edge_index
    lengths = torch.linalg.vector_norm(batch.positions[j] + batch.edge_shift - batch.positions[i], dim=1)
    assert lengths.min() > 0
    assert lengths.max() < CUTOFF
    forces = [s.forces_ev_per_angstrom for s in (structures[k] for k in order)]
    known = np.concatenate([f if f is not None else np.zeros((1, 3)) for f in forces])
    np.testing.assert_array_equal(batch.forces.numpy(), known)
    assert batch.force_mask.tolist() == [True] * 10 + [False] + [True] * 5


def test_the_default_is_float32(folder: Path) -> None:
    batch = Store(folder).batch([0, 1])
    assert {batch.positions.dtype, batch.edge_shift.dtype, batch.energy.dtype, batch.forces.dtype} == {torch.float32}
    assert {batch.numbers.dtype, batch.edge_index.dtype, batch.source_index.dtype} == {torch.int64}


def test_what_else_the_store_knows(folder: Path, structures: list[Structure]) -> None:
    store = Store(folder)
    assert len(store) == 4
    assert store.sources == ("a", "b")
    assert [store.key(k) for k in range(4)] == ["k", "k", "k", "atom"]
    assert [(store.groups.names[k], int(store.groups.source[k])) for k in store.columns["group"]] == [
        ("g", 0), ("g", 1), ("g", 0), ("g", 0),
    ]  # fmt: skip
    components = np.concatenate([structures[k].forces_ev_per_angstrom.ravel() for k in (0, 2)])  # type: ignore[union-attr]
    assert store.meta["energy_scale_ev"][0] == pytest.approx(np.sqrt((components**2).mean()))
    assert store.meta["mean_neighbors"] == pytest.approx(store.edge_offset[-1] / 16)


def test_energies_keep_their_digits_through_the_float32_cast(tmp_path: Path, tools: Any) -> None:
    """Total energies of -3e4 eV a structure lose 2e-3 eV in float32; aligned ones must not."""
    rng = np.random.default_rng(0)
    structures, residuals = [], rng.normal(0, 0.05, 40)
    for residual in residuals:
        numbers = rng.choice([1, 6, 17], 6)
        energy = sum({1: -13.6, 6: -1029.4, 17: -12522.3}[int(z)] for z in numbers) + residual
        structures.append(tools.structure(numbers, rng.random((6, 3)) * 5, energy_ev=float(energy)))
    store = write(tmp_path / "store", structures)
    assert store.energy.min() < -3e4
    indices = np.arange(40)
    exact = store.energy - store.baseline_ev(indices)
    assert np.abs(exact).max() < 0.3
    np.testing.assert_allclose(store.batch(indices).energy.numpy(), exact, rtol=0, atol=1e-6)
    restored = store.batch(indices).energy.double().numpy() + store.baseline_ev(indices)
    np.testing.assert_allclose(restored, [s.energy_ev for s in structures], rtol=0, atol=1e-3)


def test_references_and_scales_come_from_training_alone(tmp_path: Path, tools: Any) -> None:
    def atom(energy: float, force: float) -> Structure:
        found: Structure = tools.structure(
            [6], [[0, 0, 0]], energy_ev=energy, forces_ev_per_angstrom=np.full((1, 3), force)
        )
        return found

    store = write(tmp_path / "store", [atom(-5.0, 2.0), atom(-900.0, 50.0), atom(77.0, 9.0)], [TRAIN, VAL, TEST])
    assert store.references[0, 6] == pytest.approx(-5.0)
    assert store.meta["energy_scale_ev"] == [pytest.approx(2.0), 1.0]
    assert [store.indices(s).tolist() for s in (TRAIN, VAL, TEST)] == [[0], [1], [2]]


def test_a_store_of_isolated_atoms_has_no_edges(tmp_path: Path, tools: Any) -> None:
    store = write(tmp_path / "store", [tools.structure([6], [[0, 0, 0]], energy_ev=-1.0)] * 2)
    assert store.batch([0, 1]).edge_index.shape == (2, 0)


def test_an_empty_batch_is_a_batch(folder: Path) -> None:
    batch = Store(folder).batch(np.array([], dtype=np.int64))
    assert batch.energy.shape == (0,)
    assert batch.forces.shape == (0, 3)
    assert batch.edge_index.shape == (2, 0)


def test_ragged_rows() -> None:
    rows, owner = ragged(np.array([0, 2, 2, 5]), np.array([2, 1, 0]))
    assert rows.tolist() == [2, 3, 4, 0, 1]
    assert owner.tolist() == [0, 0, 0, 2, 2]


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_column_is_refused(folder: Path, name: str, keep: float) -> None:
    path = folder / f"{name}.bin"
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(DataError, match=r"not a readable store .* Remove the folder"):
        Store(folder)


def test_what_is_behind_the_rows_of_the_manifest_is_not_read(folder: Path) -> None:
    """Somebody is adding to the store, or was killed while doing so."""
    before = Store(folder).gather([0, 1, 2, 3])
    for name in COLUMNS:
        with (folder / f"{name}.bin").open("ab") as file:
            file.write(b"\x7f" * 1000)
    for name, values in Store(folder).gather([0, 1, 2, 3]).items():
        np.testing.assert_array_equal(values, before[name])


@pytest.mark.parametrize("name", ["atoms", "keys", "split", "edge_offset", "edges"])
@pytest.mark.parametrize("change", [-1, None, "4"])
def test_rows_that_contradict_each_other_are_refused(folder: Path, name: str, change: object) -> None:
    """Each would let a batch read rows that are not there, which kills a process."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["rows"][name] = manifest["rows"][name] + change if isinstance(change, int) else change
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="not a readable store"):
        Store(folder)


@pytest.mark.parametrize("version", [0, 1, 3, None, "2"])
def test_another_version_is_refused(folder: Path, version: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": version}))
    with pytest.raises(DataError, match="must be 2"):
        Store(folder)


def test_the_first_version_is_told_by_its_meta_file(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(DataError, match="store version is 1, but must be 2"):
        Store(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format_version": 2}', '{"format_version": 2, "rows": []}'])
def test_a_damaged_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="store"):
        Store(folder)


def test_a_missing_folder_or_file_is_refused(folder: Path) -> None:
    (folder / "edges.bin").unlink()
    with pytest.raises(DataError, match=r"edges\.bin"):
        Store(folder)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="not a readable store"):
        Store(folder)


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, structures: list[Structure], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def failing(self: Appender) -> None:
        raise error

    monkeypatch.setattr(Appender, "flush", failing)
    with pytest.raises(type(error)):
        write(tmp_path / "store", structures)
    assert list(tmp_path.iterdir()) == []


def test_a_second_write_replaces_the_first(folder: Path, structures: list[Structure]) -> None:
    assert len(write(folder, structures[:2])) == 2
    assert [p.name for p in folder.parent.iterdir()] == ["store"]


def test_one_atom_alone_makes_a_batch(tmp_path: Path, tools: Any) -> None:
    """A part of a step may be a single primitive cell; of one record numpy calls every view contiguous."""
    cell = 2.6 * np.eye(3)
    alone = tools.structure([29], [[0.1, 0.2, 0.3]], cell_angstrom=cell, pbc=(True, True, True))
    several = tools.structure([29, 13], [[0.0, 0.0, 0.0], [1.3, 1.3, 1.3]], cell_angstrom=cell, pbc=(True, True, True))
    split = np.array([TRAIN, TRAIN], dtype=np.int8)
    store = write_store(tmp_path / "store", [alone, several], split, sources=["a"], cutoff_angstrom=3.0)
    batch = store.batch(np.array([0]))
    assert batch.positions.tolist() == [pytest.approx([0.1, 0.2, 0.3])]
    assert len(batch.edge_index[0]) == 6
    assert batch.edge_shift.norm(dim=1).tolist() == pytest.approx([2.6] * 6)
