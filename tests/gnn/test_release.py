"""A release comes back as it was written; and one that was damaged or means harm is refused in a line."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import fabricated
import numpy as np
import pytest
import torch
from ase.build import molecule
from safetensors.torch import load_file, save

from wattier_gnn import release_files, release_writer
from wattier_gnn.calculator import WattierCalculator
from wattier_gnn.domain import ElementRange, TrainingDomain
from wattier_gnn.ensemble import ensemble_blocks
from wattier_gnn.intervals import EnsembleCalibration, QuantityCalibration
from wattier_gnn.release import load_release, other_files, read_release_manifest, verify_release
from wattier_gnn.release_manifest import MANIFEST, SEAL
from wattier_gnn.release_writer import write_release
from wattier_gnn.structure import DataError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: do not write to it."""
    return fabricated.release(tmp_path_factory.mktemp("whole") / "release")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A release to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "release"))


class TestWhole:
    @pytest.mark.parametrize("version", ["0.1.0", "1.2.3rc1", "0.1.dev5+g1a2b3c4.d20261126", "2.0.post1"])
    def test_versions_that_a_checkout_has(self, version: str, tmp_path: Path) -> None:
        release = fabricated.release(tmp_path / "release", 1, wattier_version=version)
        assert verify_release(release).wattier_version == version

    @pytest.mark.parametrize("n_members", [1, 15])
    def test_what_is_written_comes_back(self, n_members: int, tmp_path: Path) -> None:
        before = fabricated.ensemble(n_members)
        after = load_release(fabricated.release(tmp_path / "release", n_members))
        assert len(after.members) == n_members
        assert after.sources == fabricated.SOURCES
        assert np.array_equal(after.references_ev, before.references_ev)
        for one, other in zip(before.members, after.members, strict=True):
            assert one.config == other.config
            assert not other.training
            weights = other.state_dict()
            assert all(torch.equal(tensor, weights[name]) for name, tensor in one.state_dict().items())

    def test_how_sure_it_is_comes_back(self, tmp_path: Path) -> None:
        nothing = float("nan")
        energy = QuantityCalibration(2.0, (0.1, 0.2), (1.5, nothing), (2.5, nothing), (True, False))
        forces = QuantityCalibration(2.0, (0.3, 0.4), (1.25, 0.5), (nothing, 3.5), (False, True))
        domain = TrainingDomain(3.0, ({1: ElementRange(9, 0.9, 1.1, 1, 4)}, {}))
        before = replace(
            fabricated.ensemble(), weights=(0.25, 0.75), domain=domain,
            calibration=EnsembleCalibration(0.9, energy, forces),
        )  # fmt: skip
        after = load_release(write_release(tmp_path / "release", before, ["a", "b"], name="x", wattier_version="0.1.0"))
        assert ensemble_blocks(after) == ensemble_blocks(before)
        assert (after.weights, after.domain) == (before.weights, before.domain)
        assert after.calibration is not None
        assert after.calibration.coverage == 0.9
        assert after.calibration.forces.interval_factor[1] == 3.5

    def test_the_manifest_names_every_file_with_the_hash_that_another_program_finds(self, whole: Path) -> None:
        manifest = read_release_manifest(whole)
        on_disk = {p.relative_to(whole).as_posix() for p in whole.rglob("*") if p.is_file()} - {MANIFEST}
        assert set(manifest["files"]) == on_disk
        for name, digest in manifest["files"].items():
            assert hashlib.sha256((whole / name).read_bytes()).hexdigest() == digest
        blank = (whole / MANIFEST).read_text().replace(manifest[SEAL], "0" * 64)
        assert hashlib.sha256(blank.encode()).hexdigest() == manifest[SEAL]

    def test_nothing_in_it_is_a_pickle(self, whole: Path) -> None:
        assert {p.suffix for p in whole.rglob("*") if p.is_file()} == {".json", ".safetensors", ".md"}
        for path in whole.rglob("*.safetensors"):
            (length,) = struct.unpack("<Q", path.read_bytes()[:8])
            json.loads(path.read_bytes()[8 : 8 + length])

    def test_schema_1_is_still_read(self, folder: Path) -> None:
        def as_it_was(manifest: dict[str, Any]) -> dict[str, Any]:
            old = ("wattier_version", "name", "sources", "members", "references_ev", "files")
            return {
                "schema_version": 1, **{key: manifest[key] for key in old}, "metrics": {}, "energy_by_phase": [],
                "calibration": {"energy_std_scale": 2.0, "forces_std_scale": 3.0},
            }  # fmt: skip

        now = WattierCalculator(folder, source="molecules")
        fabricated.rewrite(folder, as_it_was)
        manifest = json.loads((folder / MANIFEST).read_text())
        del manifest[SEAL]
        (folder / MANIFEST).write_text(json.dumps(manifest))
        atoms = molecule("CH3OH")
        atoms.calc = now
        energy, std = atoms.get_potential_energy(), atoms.calc.results["energy_std"]
        atoms.calc = WattierCalculator(folder, source="molecules")
        assert atoms.get_potential_energy() == energy
        assert atoms.calc.results["energy_std"] == pytest.approx(2.0 * std)

    def test_weights_of_another_float_are_read_as_numbers(self, folder: Path) -> None:
        name = "final-000/model.safetensors"
        wide = {key: tensor.double() for key, tensor in load_file(folder / name).items()}
        before = load_release(folder).members[0].state_dict()
        fabricated.replace(folder, name, save(wide))
        after = load_release(folder).members[0].state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)

    def test_what_is_not_of_the_release_is_named_and_not_read(self, folder: Path) -> None:
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        (folder / "final-000" / "model.bin").symlink_to("/dev/zero")
        assert other_files(folder, verify_release(folder)) == [".gitattributes", "final-000/model.bin"]

    def test_what_is_loaded_is_what_was_hashed(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Somebody changes each file the moment after its hash was found to be right."""
        compare, before = release_files._compare, load_release(folder).members[0].state_dict()

        def then_change(path: Path, found: str, due: str) -> None:
            compare(path, found, due)
            path.write_bytes(b"{}")

        monkeypatch.setattr(release_files, "_compare", then_change)
        after = load_release(folder).members[0].state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)


class TestDamage:
    def test_one_changed_byte_anywhere(self, whole: Path, folder: Path) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        assert len(files) == 6
        for path in files:
            content = path.read_bytes()
            for place in sorted({0, 1, len(content) // 3, len(content) // 2, len(content) - 1}):
                for flip in (1, 0x80):
                    spoilt = bytearray(content)
                    spoilt[place] ^= flip
                    path.write_bytes(spoilt)
                    assert str(path) in fabricated.refusal(folder), (path, place)
            path.write_bytes(content)
        assert load_release(folder).members

    def test_any_byte_of_the_manifest(self, folder: Path) -> None:
        """The references stand there: another digit would be another energy."""
        path, rng = folder / MANIFEST, np.random.default_rng(0)
        content = path.read_bytes()
        for place in rng.integers(len(content), size=200):
            spoilt = bytearray(content)
            spoilt[place] ^= int(rng.integers(1, 256))
            path.write_bytes(spoilt)
            with pytest.raises(DataError, match=r"manifest\.json"):
                load_release(folder)

    def test_a_missing_file(self, whole: Path, folder: Path) -> None:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            content = path.read_bytes()
            path.unlink()
            assert str(path) in (line := fabricated.refusal(folder))
            assert "is missing" in line or "does not exist" in line
            path.write_bytes(content)
        for gone in (folder / "nowhere", folder / "README.md"):
            with pytest.raises(DataError, match="is no folder"):
                load_release(gone)

    def test_a_truncated_or_longer_file(self, folder: Path) -> None:
        path = folder / "final-001" / "model.safetensors"
        content = path.read_bytes()
        for spoilt in (content[:-1], content[: len(content) // 2], b"", content + b"\0"):
            path.write_bytes(spoilt)
            assert "sha256 is" in fabricated.refusal(folder)

    def test_a_folder_in_place_of_a_file(self, folder: Path) -> None:
        (folder / "README.md").unlink()
        (folder / "README.md").mkdir()
        assert "no regular file" in fabricated.refusal(folder)

    def test_a_file_that_may_not_be_read(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def denied(*_: Any, **__: Any) -> int:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(release_files, "_descriptor", denied)
        assert "cannot be read (Permission denied)" in fabricated.refusal(folder)


class TestSchema:
    def test_a_newer_one_names_the_version_to_install(self, folder: Path) -> None:
        fabricated.rewrite(folder, lambda m: {"schema_version": 3, "wattier_version": "0.9.1rc2", "files": m["files"]})
        assert "pip install 'wattier>=0.9.1rc2'" in (line := fabricated.refusal(folder))
        assert "schema_version is 3, but must be one of 1, 2" in line

    def test_a_version_of_a_checkout_is_named_as_pip_takes_it(self, folder: Path) -> None:
        fabricated.rewrite(folder, lambda m: m | {"schema_version": 3, "wattier_version": "0.9.1.dev3+gabc12.d2026"})
        assert fabricated.refusal(folder).endswith("Install it: pip install 'wattier>=0.9.1.dev3'")

    @pytest.mark.parametrize("version", ["1'; rm -rf ~; '", "1.0 --index-url http://x", None, 7, "1.0\n", ["1.0"]])
    def test_nothing_from_a_hostile_manifest_becomes_a_command(self, version: Any, folder: Path) -> None:
        fabricated.rewrite(folder, lambda m: m | {"schema_version": 3, "wattier_version": version})
        assert fabricated.refusal(folder).endswith("Install it: pip install --upgrade wattier")

    @pytest.mark.parametrize("version", [0, -1, None, "2", 2.0, True, [2], {}])
    def test_what_is_no_version(self, version: Any, folder: Path) -> None:
        fabricated.rewrite(folder, lambda m: m | {"schema_version": version})
        assert "schema_version is" in fabricated.refusal(folder)


class TestWriting:
    def test_an_older_release_stays_until_the_new_one_is_sound(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

        def is_unsound(_: Path) -> None:
            raise DataError("the disk gave back other bytes")

        monkeypatch.setattr(release_writer, "load_release", is_unsound)
        with pytest.raises(DataError, match="other bytes"):
            fabricated.release(folder, 1)
        assert {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
        assert [path.name for path in folder.parent.iterdir()] == ["release"]
        monkeypatch.undo()
        fabricated.release(folder, 1)
        assert len(load_release(folder).members) == 1
        assert [path.name for path in folder.parent.iterdir()] == ["release"]

    def test_the_older_one_comes_back_if_the_new_one_cannot_take_its_place(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rename = Path.rename

        def fails(self: Path, target: Path) -> Path:
            if target == folder and not self.name.endswith(".old.tmp"):
                raise OSError(5, "Input/output error")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fails)
        with pytest.raises(OSError, match="Input/output"):
            fabricated.release(folder, 1)
        assert len(load_release(folder).members) == 2

    def test_what_is_no_release_is_not_removed(self, folder: Path, tmp_path: Path) -> None:
        (folder / "notes.txt").write_text("mine")
        with pytest.raises(DataError, match=r"holds 'notes\.txt', which is no part of the release"):
            fabricated.release(folder)
        assert (folder / "notes.txt").read_text() == "mine"
        fabricated.release(folder, replace_any=True)
        assert not (folder / "notes.txt").exists()
        home = tmp_path / "home"
        home.mkdir()
        (home / "thesis.tex").write_text("mine")
        with pytest.raises(DataError, match="is there already and is no release"):
            fabricated.release(home)
        for bad in (home / "thesis.tex", Path("/")):
            with pytest.raises(DataError, match=r"is there already|is not a new folder"):
                fabricated.release(bad)
        assert (home / "thesis.tex").read_text() == "mine"

    @pytest.mark.parametrize(
        "names", [("a/b", "c"), ("..", "c"), ("", "c"), ("a", "A"), ("README.md", "c"), ("é", "c")]
    )
    def test_member_names(self, names: tuple[str, str], tmp_path: Path) -> None:
        with pytest.raises(DataError, match="name"):
            write_release(
                tmp_path / "release", fabricated.ensemble(), names, name="x", wattier_version="0.1.0",
                texts={"README.md": ""},
            )  # fmt: skip
        assert not list(tmp_path.iterdir())

    def test_numbers_that_are_none(self, tmp_path: Path) -> None:
        ensemble = fabricated.ensemble()
        ensemble.references_ev[0, 1] = np.nan
        with pytest.raises(DataError, match="NaN"):
            write_release(tmp_path / "release", ensemble, ["a", "b"], name="x", wattier_version="0.1.0")
        with pytest.raises(DataError, match="NaN"):
            fabricated.release(tmp_path / "release", about={"metrics": {"mae": float("inf")}})
        spoilt = fabricated.ensemble()
        with torch.no_grad():
            next(spoilt.members[1].parameters()).fill_(float("nan"))
        with pytest.raises(DataError, match="NaN"):
            write_release(tmp_path / "release", spoilt, ["a", "b"], name="x", wattier_version="0.1.0")
        assert not list(tmp_path.iterdir())

    def test_a_child_names_its_parent(self, whole: Path, tmp_path: Path) -> None:
        child = fabricated.release(tmp_path / "child", 1, name="tuned", parent=whole)
        assert verify_release(child).data["parent"] == {
            "name": "fabricated", "wattier_version": "0.1.0",
            "manifest_sha256": hashlib.sha256((whole / MANIFEST).read_bytes()).hexdigest(),
        }  # fmt: skip
        with pytest.raises(DataError, match="is no folder"):
            fabricated.release(tmp_path / "orphan", 1, parent=tmp_path / "nobody")
