"""A release comes back as it was written; and one that was damaged or means harm is refused in a line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
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


def refusal(folder: Path) -> str:
    """The line that every way of reading gives."""
    with pytest.raises(DataError) as loaded:
        load_release(folder)
    with pytest.raises(DataError) as verified:
        verify_release(folder)
    assert str(loaded.value)[:120] == str(verified.value)[:120]
    assert "\n" not in str(loaded.value)
    assert str(loaded.value).startswith(str(folder))
    return str(loaded.value)


class TestWhole:
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
                    assert str(path) in refusal(folder), (path, place)
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
            assert str(path) in (line := refusal(folder))
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
            assert "sha256 is" in refusal(folder)

    def test_a_folder_in_place_of_a_file(self, folder: Path) -> None:
        (folder / "README.md").unlink()
        (folder / "README.md").mkdir()
        assert "no regular file" in refusal(folder)

    def test_a_file_that_may_not_be_read(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def denied(*_: Any, **__: Any) -> int:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(release_files, "_descriptor", denied)
        assert "cannot be read (Permission denied)" in refusal(folder)


class TestSchema:
    def test_a_newer_one_names_the_version_to_install(self, folder: Path) -> None:
        fabricated.rewrite(folder, lambda m: {"schema_version": 3, "wattier_version": "0.9.1rc2", "files": m["files"]})
        assert "pip install 'wattier>=0.9.1rc2'" in (line := refusal(folder))
        assert "schema_version is 3, but must be one of 1, 2" in line

    @pytest.mark.parametrize("version", ["1'; rm -rf ~; '", "1.0 --index-url http://x", None, 7, "1.0\n", ["1.0"]])
    def test_nothing_from_a_hostile_manifest_becomes_a_command(self, version: Any, folder: Path) -> None:
        fabricated.rewrite(folder, lambda m: m | {"schema_version": 3, "wattier_version": version})
        assert refusal(folder).endswith("Install it: pip install --upgrade wattier")

    @pytest.mark.parametrize("version", [0, -1, None, "2", 2.0, True, [2], {}])
    def test_what_is_no_version(self, version: Any, folder: Path) -> None:
        fabricated.rewrite(folder, lambda m: m | {"schema_version": version})
        assert "schema_version is" in refusal(folder)


def without(key: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        del manifest[key]

    return change


def reference(value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["references_ev"][0][1] = value

    return change


def uncertainty(**blocks: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["uncertainty"] |= blocks

    return change


class TestHostileManifest:
    """Hashes and seal are right, and what the manifest says is not."""

    @pytest.mark.parametrize(
        "name",
        [
            "../outside", "/etc/passwd", "a/../../outside", "./README.md", "a//b", "a/", "", "..", ".hidden",
            "C:\\x", "a\\..\\..\\b", "a\0b", "ne\u0301", "README.md\u200b", "~root", "x" * 300, "manifest.json",
        ],
    )  # fmt: skip
    def test_a_path_that_leaves_the_folder(self, name: str, folder: Path) -> None:
        (folder.parent / "outside").write_text("x")
        digest = hashlib.sha256(b"x").hexdigest()
        fabricated.rewrite(folder, lambda m: m["files"].update({name: digest}))
        assert "but files must lie inside the release" in (line := refusal(folder)) or name == MANIFEST
        assert len(line) < 300 + len(str(folder))

    @pytest.mark.parametrize("name", ["../release/final-000", "final-000/.", "/tmp", "a/b", "..", "", "Final\u0130"])
    def test_a_member_that_is_elsewhere(self, name: str, folder: Path) -> None:
        def change(manifest: dict[str, Any]) -> None:
            manifest["members"][0] = name
            for file in ("config.json", "model.safetensors"):
                manifest["files"][f"{name}/{file}"] = manifest["files"][f"final-000/{file}"]

        fabricated.rewrite(folder, change)
        assert MANIFEST in refusal(folder)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda m: m | {"members": ["final-000", "final-000"]}, "names one twice"),
            (lambda m: m | {"members": ["final-000", "FINAL-000"]}, "where case does not count"),
            (lambda m: m | {"files": {**m["files"], "readme.MD": "0" * 64}}, "where case does not count"),
            (lambda m: m | {"members": []}, "must be a list of names"),
            (lambda m: m | {"members": "final-000"}, "must be a list of names"),
            (lambda m: m | {"members": [1]}, "must be a list of names"),
            (lambda m: m | {"members": [f"m{k}" for k in range(5000)]}, "at most 1000"),
            (lambda m: m | {"members": ["final-007"]}, "files does not name 'final-007/config.json'"),
            (lambda m: m | {"sources": ["oxides", "oxides"]}, "names one twice"),
            (lambda m: m | {"sources": ["molecules", "oxides"]}, "but the release has"),
            (lambda m: m | {"sources": ["oxides", "molecules", "more"]}, "references_ev has another shape"),
            (lambda m: m | {"sources": None}, "must be a list of names"),
            (lambda m: m | {"files": list(m["files"])}, "must be names with their sha256"),
            (lambda m: m | {"files": {**m["files"], "x": "0" * 63}}, "must be a sha256"),
            (lambda m: m | {"files": {**m["files"], "x": None}}, "must be a sha256"),
            (lambda m: m | {"references_ev": m["references_ev"][:1]}, "references_ev has another shape"),
            (lambda m: m | {"references_ev": [row[:-1] for row in m["references_ev"]]}, "another shape"),
            (lambda m: m | {"references_ev": {}}, "another shape"),
            (lambda m: m | {"uncertainty": [1]}, "must be a JSON object"),
            (uncertainty(weights=[0.5, 0.6]), "sum 1"), (uncertainty(weights=[1.0]), "one a member"),
            (uncertainty(weights=[2.0, -1.0]), "of 0 or more"), (uncertainty(weights="equal"), "must be 2 numbers"),
            (uncertainty(calibration=[]), "must be a mapping"), (uncertainty(calibration={}), "must be a list of 2"),
            (uncertainty(calibration={"coverage": 90}), "between 0 and 1"),
            (uncertainty(training_domain=1), "not readable"),
            (uncertainty(training_domain={"cutoff_angstrom": 3.0, "ranges": [{"600": [1] * 5}, {}]}), "elements"),
            (uncertainty(calibration={"energy_std_scale": -1.0, "forces_std_scale": 1.0}), "0 or more"),
            (lambda m: m | {"name": None}, "name is None"),
            (reference("1.0"), "must hold energies"), (reference(None), "must hold energies"),
            (reference(True), "must hold energies"), (reference(1e300), "must hold energies"),
            (reference(10**400), "is too large"), (reference([0.0]), "must hold energies"),
            *((without(key), f"'{key}' is missing") for key in ("members", "files", "sources", "references_ev")),
        ],
    )  # fmt: skip
    def test_what_says_something_else(self, change: Callable[[dict[str, Any]], Any], said: str, folder: Path) -> None:
        fabricated.rewrite(folder, change)
        assert said in refusal(folder)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"", "not readable JSON"), (b"{", "not readable JSON"), (b"[]", "must hold a JSON object"),
            (b"null", "must hold a JSON object"), (b"\xff\xfe{}", "not readable"), (b"\xef\xbb\xbf{}", "not readable"),
            (b'{"schema_version": 2, "x": "\xe9"}', "not readable JSON"), (b"[" * 200_000, "nested too deeply"),
            (b'{"a":' * 100_000, "nested too deeply"), (b'{"schema_version": NaN}', "NaN is no number"),
            (b'{"schema_version": 2, "x": -Infinity}', "-Infinity is no number"), (b'{"x": 1e999}', "is too large"),
            (b'{"schema_version": 2, "schema_version": 3}', "a key stands twice"),
            (b'{"x": ' + b"9" * 5000 + b"}", "not readable JSON"), (b'{"x": "' + bytes(9 << 20), "larger than 8"),
            (b"cos\nsystem\n(S'touch x'\ntR.", "not readable JSON"), (b"{}\0", "not readable JSON"),
        ],
    )  # fmt: skip
    def test_what_is_no_manifest(self, content: bytes, said: str, folder: Path) -> None:
        (folder / MANIFEST).write_bytes(content)
        assert said in (line := refusal(folder))
        assert len(line) < 500

    def test_a_file_that_does_not_end(self, folder: Path) -> None:
        """10 GB that take no room on the disk: what is too large is not read."""
        for path in (folder / MANIFEST, folder / "final-000" / "config.json"):
            content = path.read_bytes()
            with path.open("r+b") as file:
                file.truncate(10 << 30)
            assert "larger than 8 MiB" in refusal(folder)
            path.write_bytes(content)


class TestLinks:
    @pytest.fixture
    def outside(self, folder: Path, tmp_path: Path) -> Path:
        """The same release elsewhere, so that every hash would be right."""
        return Path(shutil.copytree(folder, tmp_path / "outside"))

    @pytest.mark.parametrize("name", ["README.md", MANIFEST, "final-000/model.safetensors", "final-000/config.json"])
    def test_a_file_that_is_a_link(self, name: str, folder: Path, outside: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(outside / name)
        assert "is or lies behind a link" in refusal(folder)

    def test_a_member_that_is_a_link(self, folder: Path, outside: Path) -> None:
        shutil.rmtree(folder / "final-000")
        (folder / "final-000").symlink_to(outside / "final-000")
        assert "is or lies behind a link" in refusal(folder)

    def test_links_within_the_release_and_to_nothing(self, folder: Path) -> None:
        (folder / "README.md").unlink()
        (folder / "README.md").symlink_to("final-000/config.json")
        assert "is or lies behind a link" in refusal(folder)
        (folder / "README.md").unlink()
        (folder / "README.md").symlink_to("README.md")
        assert "is or lies behind a link" in refusal(folder)

    def test_a_release_behind_a_link_is_one(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "latest").symlink_to(folder)
        assert load_release(tmp_path / "latest").members

    def test_what_blocks_a_reader(self, folder: Path) -> None:
        (folder / "README.md").unlink()
        os.mkfifo(folder / "README.md")
        assert "no regular file" in refusal(folder)


def lying(header: dict[str, Any], body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


class TestHostileMembers:
    """Hashes and seal are right, and what they cover is not."""

    @pytest.mark.parametrize(
        "changes",
        [
            {"hidden_dim": 10**6}, {"hidden_dim": 10**12}, {"n_layers": 10**9}, {"n_head_layers": 10**12},
            {"head_dim": 2**62}, {"n_radial": 10**15}, {"n_layers": -1}, {"hidden_dim": 0}, {"hidden_dim": 8.0},
            {"hidden_dim": "8"}, {"hidden_dim": True}, {"hidden_dim": None}, {"hidden_dim": [8]}, {"n_layers": 2},
            {"hidden_dim": 9}, {"family": "transformer"}, {"family": ["egnn"]}, {"forces": None}, {"precision": 32},
            {"cutoff_angstrom": 0}, {"cutoff_angstrom": -1.0}, {"cutoff_angstrom": "5"}, {"mean_neighbors": None},
            {"energy_scale_ev": [1.0]}, {"energy_scale_ev": [1.0, 0.0]}, {"energy_scale_ev": [1.0, -1.0]},
            {"energy_scale_ev": 1.0}, {"energy_scale_ev": ["1", "1"]}, {"sources": ["oxides"]}, {"sources": "oxides"},
            {"sources": ["molecules", "oxides"]}, {"sources": []}, {"sources": [1, 2]}, {"edge_chunk": "all"},
            {"edge_chunk": 0}, {"energy_variance": True}, {"energy_variance": "no"}, {"energy_variance": None},
            {"degree_histogram": [1.5]}, {"degree_histogram": 3}, {"unheard_of": 1}, {"activation_checkpointing": 1},
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("member", ["final-000", "final-001"])
    def test_configs(self, changes: dict[str, Any], member: str, folder: Path) -> None:
        fabricated.reconfigure(folder, member, **changes)
        assert f"{folder / member}: not a readable member" in (line := refusal(folder))
        assert len(line) < 500 + len(str(folder))

    def test_a_network_larger_than_its_weights_is_never_built(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("wattier_gnn.release_member.FoundationModel", lambda _: pytest.fail("was built"))
        fabricated.reconfigure(folder, hidden_dim=500)
        assert "parameters, but the weights are" in refusal(folder)

    @pytest.mark.parametrize(
        "content",
        [
            b"", b"\0" * 7, struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 50) + b"{}", lying({})[:-1],
            lying({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]}}, b"1234"),
            lying({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}),
            lying({"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}),
            lying({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
            lying({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"1234"),
            lying({"a": {"dtype": "F32", "shape": [1], "data_offsets": [2**60, 2**60 + 4]}}, b"1234"),
            lying({"a": {"dtype": "Q99", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
            lying({k: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for k in "ab"}, b"1234"),
            struct.pack("<Q", 10**6) + b"[" * 10**6, b"\x80\x04cos\nsystem\n.", b"PK\x03\x04" + b"\0" * 100,
        ],
    )  # fmt: skip
    def test_weights_that_are_none(self, content: bytes, folder: Path) -> None:
        fabricated.replace(folder, "final-000/model.safetensors", content)
        assert f"{folder / 'final-000'}: not a readable member" in refusal(folder)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda t, name: t.pop(name), "weights lack"),
            (lambda t, _: t.update(more=torch.ones(1)), "weights hold 'more'"),
            (lambda t, name: t.update({name: t[name].flatten()[:-1].clone()}), "but must be ["),
            (lambda t, name: t.update({name: t[name].long()}), "torch.int64, but must be torch.float"),
            (lambda t, name: t.update({name: torch.full_like(t[name], float("nan"))}), "NaN or infinite"),
            (lambda t, name: t[name].flatten()[-1:].fill_(float("inf")), "NaN or infinite"),
        ],
    )
    def test_weights_of_another_model(self, change: Callable[..., Any], said: str, folder: Path) -> None:
        path = folder / "final-000" / "model.safetensors"
        tensors = load_file(path)
        change(tensors, "energy_scale_ev" if "lack" in said else next(n for n, t in tensors.items() if t.dim() >= 2))
        fabricated.replace(folder, "final-000/model.safetensors", save(tensors))
        assert said in refusal(folder)

    def test_members_that_swapped_their_weights(self, folder: Path) -> None:
        one, other = ((folder / m / "model.safetensors").read_bytes() for m in ("final-000", "final-001"))
        fabricated.replace(folder, "final-000/model.safetensors", other)
        fabricated.replace(folder, "final-001/model.safetensors", one)
        assert "not a readable member" in refusal(folder)


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


@pytest.fixture(autouse=True)
def _nothing_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a file holds, nobody asks pickle about it."""
    import pickle

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("something was unpickled")

    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    yield
