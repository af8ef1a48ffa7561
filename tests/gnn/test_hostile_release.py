"""Releases whose hashes are right and which mean harm all the same: each is refused in a line, and nothing is built."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fabricated
import pytest
import torch
from safetensors.torch import load_file, save

from wattier_gnn.release import load_release
from wattier_gnn.release_manifest import MANIFEST


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: do not write to it."""
    return fabricated.release(tmp_path_factory.mktemp("whole") / "release")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A release to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "release"))


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
        assert "but files must lie inside the release" in (line := fabricated.refusal(folder)) or name == MANIFEST
        assert len(line) < 300 + len(str(folder))

    @pytest.mark.parametrize("name", ["../release/final-000", "final-000/.", "/tmp", "a/b", "..", "", "Final\u0130"])
    def test_a_member_that_is_elsewhere(self, name: str, folder: Path) -> None:
        def change(manifest: dict[str, Any]) -> None:
            manifest["members"][0] = name
            for file in ("config.json", "model.safetensors"):
                manifest["files"][f"{name}/{file}"] = manifest["files"][f"final-000/{file}"]

        fabricated.rewrite(folder, change)
        assert MANIFEST in fabricated.refusal(folder)

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
            (lambda m: m | {"name": None}, "name is None"), (lambda m: m | {"name": "x\x1b[2J"}, "a line of text"),
            (lambda m: m | {"name": "x\n"}, "line of text"), (lambda m: m | {"sources": ["a\r", "b"]}, "list of names"),
            (lambda m: m | {"wattier_version": "1.0\r\nX-Evil: 1"}, "must be a version"),
            (lambda m: m | {"wattier_version": 1.0}, "must be a version"),
            (reference("1.0"), "must hold energies"), (reference(None), "must hold energies"),
            (reference(True), "must hold energies"), (reference(1e300), "must hold energies"),
            (reference(10**400), "is too large"), (reference([0.0]), "must hold energies"),
            *((without(key), f"'{key}' is missing") for key in ("members", "files", "sources", "references_ev")),
        ],
    )  # fmt: skip
    def test_what_says_something_else(self, change: Callable[[dict[str, Any]], Any], said: str, folder: Path) -> None:
        fabricated.rewrite(folder, change)
        assert said in fabricated.refusal(folder)

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
        assert said in (line := fabricated.refusal(folder))
        assert len(line) < 500

    def test_a_file_that_does_not_end(self, folder: Path) -> None:
        """10 GB that take no room on the disk: what is too large is not read."""
        for path in (folder / MANIFEST, folder / "final-000" / "config.json"):
            content = path.read_bytes()
            with path.open("r+b") as file:
                file.truncate(10 << 30)
            assert "larger than 8 MiB" in fabricated.refusal(folder)
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
        assert "is or lies behind a link" in fabricated.refusal(folder)

    def test_a_member_that_is_a_link(self, folder: Path, outside: Path) -> None:
        shutil.rmtree(folder / "final-000")
        (folder / "final-000").symlink_to(outside / "final-000")
        assert "is or lies behind a link" in fabricated.refusal(folder)

    def test_links_within_the_release_and_to_nothing(self, folder: Path) -> None:
        (folder / "README.md").unlink()
        (folder / "README.md").symlink_to("final-000/config.json")
        assert "is or lies behind a link" in fabricated.refusal(folder)
        (folder / "README.md").unlink()
        (folder / "README.md").symlink_to("README.md")
        assert "is or lies behind a link" in fabricated.refusal(folder)

    def test_a_release_behind_a_link_is_one(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "latest").symlink_to(folder)
        assert load_release(tmp_path / "latest").members

    def test_what_blocks_a_reader(self, folder: Path) -> None:
        (folder / "README.md").unlink()
        os.mkfifo(folder / "README.md")
        assert "no regular file" in fabricated.refusal(folder)


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
            {"cutoff_angstrom": 0}, {"cutoff_angstrom": -1.0}, {"cutoff_angstrom": "5"}, {"cutoff_angstrom": 1e3},
            {"mean_neighbors": None},
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
        assert f"{folder / member}: not a readable member" in (line := fabricated.refusal(folder))
        assert len(line) < 500 + len(str(folder))

    def test_a_network_larger_than_its_weights_is_never_built(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("wattier_gnn.release_member.FoundationModel", lambda _: pytest.fail("was built"))
        fabricated.reconfigure(folder, hidden_dim=500)
        assert "parameters, but the weights are" in fabricated.refusal(folder)

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
        assert f"{folder / 'final-000'}: not a readable member" in fabricated.refusal(folder)

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
        assert said in fabricated.refusal(folder)

    def test_members_that_swapped_their_weights(self, folder: Path) -> None:
        one, other = ((folder / m / "model.safetensors").read_bytes() for m in ("final-000", "final-001"))
        fabricated.replace(folder, "final-000/model.safetensors", other)
        fabricated.replace(folder, "final-001/model.safetensors", one)
        assert "not a readable member" in fabricated.refusal(folder)
