"""A store leaves as a release that says what it is, and that nobody changes unnoticed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.io import read as ase_read
from toys import make, structure

from wattier_gnn import export as export_module
from wattier_gnn.datasets import READERS
from wattier_gnn.export import export_store, verify
from wattier_gnn.ingest import ingest, read_cleaning
from wattier_gnn.sample import sample_path
from wattier_gnn.splits import SPLIT_NAMES
from wattier_gnn.store import Store
from wattier_gnn.structure import BadRecord, DataError, ShardError

SETTINGS: dict[str, Any] = {
    "cutoff_angstrom": 2.5, "max_force_ev_per_angstrom": 100.0, "on_bad": "skip", "seed": 1, "workers": 1,
    "split": {"train": 0.8, "val": 0.1, "test": 0.1},
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("source") / "store"
    paths = {name: sample_path(name) for name in ("qm7x", "oc22")}
    return ingest(paths, folder, say=lambda _: None, **SETTINGS)


@pytest.fixture(scope="module")
def release(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_store(store, tmp_path_factory.mktemp("release") / "qm-and-oxides", "store", lambda _: None)


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release, tmp_path / "copy"))


def test_it_opens_as_the_store_it_was(release: Path, store: Store) -> None:
    opened, indices = Store(release), np.arange(len(store))
    for name, values in store.gather(indices).items():
        np.testing.assert_array_equal(opened.gather(indices)[name], values)
    assert [opened.key(k) for k in (0, 500, 900)] == [store.key(k) for k in (0, 500, 900)]
    assert opened.groups.names == store.groups.names


def test_every_file_is_named_with_its_hash(release: Path) -> None:
    files = json.loads((release / "manifest.json").read_text())["release"]["files"]
    assert {path.name for path in release.iterdir()} == {*files, "manifest.json"}
    for name, entry in files.items():
        data = (release / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_it_says_nothing_of_this_machine(release: Path, store: Store) -> None:
    for name in ("manifest.json", "README.md"):
        assert str(sample_path("qm7x").parent) not in (release / name).read_text()
    assert "modified_ns" in store.meta["by_source"]["qm7x"]["files"][0]
    assert "modified_ns" not in (release / "manifest.json").read_text()


def test_what_it_says_of_bad_files_names_no_folder(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    path = tmp_path / "toys" / "a.toy"
    toy("a", [BadRecord(f"{path}: 3: is bad"), structure(0), ShardError(f"{path}: ends early")])
    odd, _ = make(tmp_path / "s", {"toy": path}, may_be_empty=True)
    out = export_store(odd, tmp_path / "out", "store", lambda _: None)
    assert str(tmp_path) not in (out / "manifest.json").read_text()
    assert read_cleaning(Store(out)).bad_records == {"toy": ["a.toy: 3: is bad"]}
    assert read_cleaning(Store(out)).bad_shards == {"toy": ["a.toy: ends early"]}


def test_any_name_is_read_back_by_ase(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    names = ["", " ", "a\nb", 'q"x', "back\\", "a=b c", "{x}", "007", "T", "\u2028", "_JSON 1", "\\n", "CH4", "1 2"]
    path = toy("a", [structure(k, group=name, key=name) for k, name in enumerate(names)])
    odd, _ = make(tmp_path / "s", {"toy": path}, may_be_empty=True)
    out = export_store(odd, tmp_path / "out", "extxyz", lambda _: None)
    frames = ase_read(out / "frames-00000.extxyz", index=":")
    assert [atoms.info["group"] for atoms in frames] == names
    assert [atoms.info["key"] for atoms in frames] == names
    np.testing.assert_allclose([atoms.get_potential_energy() for atoms in frames], odd.energy, rtol=0, atol=1e-9)
    with pytest.raises(DataError, match=r"is a release of frames, .* as a source: extxyz="):
        Store(out)


@pytest.mark.parametrize(
    "change",
    [
        {"groups": "/etc/hostname"}, {"groups": "../groups-0.safetensors"}, {"groups": None}, {"sources": ["\x1b[2J"]},
        {"sources": "qm7x"}, {"rows": {"energy": "\x1b[2J"}}, {"rows": {"energy": -1}}, {"by_source": {"[/x]": {}}},
    ],
)  # fmt: skip
def test_a_manifest_that_names_what_it_must_not_is_refused(copy: Path, change: dict[str, Any]) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, **change}))
    for look in (verify, Store):
        with pytest.raises(DataError, match=rf"not a readable store \(manifest\.json: {next(iter(change))} ") as caught:
            look(copy)
        assert str(caught.value).isprintable()


def test_the_card_has_the_figures(release: Path, store: Store) -> None:
    card = (release / "README.md").read_text()
    assert card.startswith("---\nlicense: ")
    counts = np.bincount(store.split[store.source_index == 0])
    assert f"| qm7x | {counts[0]} | {counts[1]} | {counts[2]} |" in card
    assert "| source | read | kept |" in card
    assert "| qm7x | 508 | 507 | " in card
    assert READERS["qm7x"].energy in card
    assert "the force on any atom is 100 eV/Å or more" in card
    assert f"{store.meta['by_source']['qm7x']['residual_std_ev_per_atom']:.4g}" in card


def test_a_check_finds_nothing_wrong(release: Path, store: Store) -> None:
    assert verify(release).endswith("946 structures, all 16 files have their sha256")
    assert "946 structures, all files have their size" in verify(store.folder)


def test_a_changed_or_missing_file_is_found(copy: Path) -> None:
    data = bytearray((copy / "energy.bin").read_bytes())
    data[100] ^= 1
    (copy / "energy.bin").write_bytes(data)
    with pytest.raises(DataError, match=r"energy\.bin: sha256 is .*, but must be"):
        verify(copy)
    (copy / "energy.bin").unlink()
    with pytest.raises(DataError, match=r"energy\.bin: is missing"):
        verify(copy)


def test_a_name_that_leaves_the_folder_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["release"]["files"] = {"../copy/energy.bin/../../outside": {"bytes": 0, "sha256": ""}}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="must lie inside"):
        verify(copy)


def test_frames_are_read_by_ase_and_by_our_own_reader(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "FRAMES_A_FILE", 400)
    folder = export_store(store, tmp_path / "frames", "extxyz", lambda _: None)
    files = sorted(folder.glob("*.extxyz"))
    assert [path.name for path in files] == [f"frames-0000{k}.extxyz" for k in range(3)]
    frames = [atoms for path in files for atoms in ase_read(path, index=":")]
    assert len(frames) == len(store)
    indices = np.arange(len(store))
    aligned = store.energy - store.baseline_ev(indices)
    for k in (0, 399, 400, 507, 945):
        atoms, arrays = frames[k], store.gather([k])
        np.testing.assert_array_equal(atoms.numbers, arrays["numbers"])
        np.testing.assert_allclose(atoms.positions, arrays["positions"], rtol=0, atol=1e-8)
        np.testing.assert_allclose(atoms.get_forces(), arrays["forces"], rtol=0, atol=1e-8)
        np.testing.assert_allclose(atoms.cell.array, arrays["cells"][0], rtol=0, atol=1e-8)
        assert atoms.pbc.tolist() == arrays["pbc"][0].tolist()
        assert atoms.get_potential_energy() == pytest.approx(store.energy[k], abs=1e-9)
        assert atoms.info["aligned_energy"] == pytest.approx(aligned[k], abs=1e-9)
        said = {name: str(atoms.info[name]) for name in ("source", "group", "split", "key")}
        assert said == {
            "source": store.sources[store.source_index[k]], "group": store.groups.names[store.columns["group"][k]],
            "split": SPLIT_NAMES[store.split[k]], "key": store.key(k),
        }  # fmt: skip
    ours = [s for path in READERS["extxyz"].shards(folder) for s in READERS["extxyz"].read(path)]
    np.testing.assert_allclose([s.energy_ev for s in ours], store.energy, rtol=0, atol=1e-9)
    assert verify(folder).endswith("all 4 files have their sha256")


def test_it_is_whole_or_not_at_all(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="is there already"):
        export_store(store, tmp_path / "taken", "store", lambda _: None)

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        export_store(store, tmp_path / "new", "store", lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
