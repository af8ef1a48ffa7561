"""The installed sample: all planted defects are found, and the files are those that SOURCE.md describes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import write as ase_write

from wattier_gnn.cleaning import CleaningReport, read_clean
from wattier_gnn.datasets import READERS
from wattier_gnn.sample import SAMPLE_FOLDER, SAMPLE_SOURCES, sample_path
from wattier_gnn.sample.recipe.__main__ import main
from wattier_gnn.structure import DataError, Structure

LARGEST_SAMPLE_BYTES = 6_000_000
PLANTED = {
    "ani1x": {"nan label": 3, "force above threshold": 2},
    "qm7x": {"force above threshold": 1},
    "oc20": {"force above threshold": 1},
    "oc22": {"nan label": 1, "force above threshold": 1},
    "mptrj": {"nan label": 1, "force above threshold": 1},
}


@pytest.fixture(scope="module")
def corpus() -> tuple[dict[str, list[Structure]], CleaningReport]:
    report = CleaningReport()
    kept = {source: list(read_clean(READERS[source], sample_path(source), 100.0, report)) for source in SAMPLE_SOURCES}
    return kept, report


def counts_in_source_note() -> dict[str, tuple[int, int]]:
    note = (SAMPLE_FOLDER / "SOURCE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \|", note, flags=re.MULTILINE)
    return {source: (int(frames), int(groups)) for source, frames, groups in rows}


def test_every_planted_defect_is_found(corpus: tuple[dict[str, list[Structure]], CleaningReport]) -> None:
    _, report = corpus
    assert report.removed == PLANTED
    assert list(report.bad_shards) == ["oc20"]
    (message,) = report.bad_shards["oc20"]
    assert str(sample_path("oc20") / "2.extxyz.xz") in message


def test_counts_are_those_of_the_source_note(corpus: tuple[dict[str, list[Structure]], CleaningReport]) -> None:
    kept, report = corpus
    counts = counts_in_source_note()
    assert set(counts) == set(SAMPLE_SOURCES) == set(kept)
    for source, structures in kept.items():
        n_frames, n_groups = counts[source]
        assert report.read[source] == n_frames
        assert len(structures) == n_frames - sum(PLANTED[source].values())
        assert len({structure.group for structure in structures}) == n_groups
        assert len({structure.key for structure in structures}) == len(structures)


def test_labels_are_physical(corpus: tuple[dict[str, list[Structure]], CleaningReport]) -> None:
    kept, _ = corpus
    for source, structures in kept.items():
        for structure in structures:
            forces = structure.forces_ev_per_angstrom
            assert forces is not None
            assert np.linalg.norm(forces, axis=1).max() <= 60.01
            # No outer field: forces add up to zero, but for the integration grid of density functional theory.
            assert np.abs(forces.sum(axis=0)).max() < 0.1
            assert structure.pbc == ((False,) * 3 if source in ("ani1x", "qm7x") else (True,) * 3)
            assert (structure.cell_angstrom is None) is (source in ("ani1x", "qm7x"))


def test_files_are_those_of_the_source_note() -> None:
    note = (SAMPLE_FOLDER / "SOURCE.md").read_text(encoding="utf-8")
    listed = {name: (sha, int(size)) for sha, size, name in re.findall(r"^([0-9a-f]{64})  (\d+)  (.+)$", note, re.M)}
    files = {
        path.relative_to(SAMPLE_FOLDER).as_posix(): path.read_bytes()
        for source in SAMPLE_SOURCES
        for path in sample_path(source).iterdir()
    }
    assert listed == {name: (hashlib.sha256(data).hexdigest(), len(data)) for name, data in files.items()}
    assert sum(map(len, files.values())) <= LARGEST_SAMPLE_BYTES


def test_an_unknown_source_is_named() -> None:
    with pytest.raises(DataError, match="has no source 'oc23', but must be asked for one of ani1x, qm7x"):
        sample_path("oc23")


def test_the_recipe_writes_all_layouts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    prefixes = {"ani1x": "", "qm7x": "", "oc20": "alloy", "oc22": "oxide", "mptrj": "mp-"}
    for source, prefix in prefixes.items():
        crystal = source not in ("ani1x", "qm7x")
        for index in range(10):
            atoms = Atoms("H2O", rng.normal(size=(3, 3)), cell=[5, 5, 5] if crystal else None, pbc=crystal)
            atoms.info |= {"key": f"{prefix}{index}-0", "group": f"{index}", "label_energy": -1.0}
            atoms.arrays["label_forces"] = np.full((3, 3), 100.0 if index == 9 else 0.0)
            ase_write(tmp_path / f"{source}.xyz", atoms, append=True)
    out = tmp_path / "out"
    assert main(["write", "--work", str(tmp_path), "--out", str(out)]) == 0
    for source in prefixes:
        report = CleaningReport()
        list(read_clean(READERS[source], out / source, 100.0, report))
        assert report.removed == {source: PLANTED[source]}
        assert report.read[source] == (7 if source == "oc20" else 9)  # one left out, two in the truncated shard
    assert "sha256" in (out / "SOURCE.md").read_text(encoding="utf-8")


def test_the_recipe_says_what_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["write", "--work", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert f"{tmp_path / 'ani1x.xyz'}: does not exist" in caplog.text
