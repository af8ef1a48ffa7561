"""Releases of tiny untrained members, and what a hostile hand can do to them: the hashes are made to fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wattier_gnn.ensemble import Ensemble
from wattier_gnn.model import ModelConfig, build_model
from wattier_gnn.release import load_release, verify_release
from wattier_gnn.release_manifest import MANIFEST, SEAL, seal
from wattier_gnn.release_writer import write_release
from wattier_gnn.structure import DataError

SOURCES = ("oxides", "molecules")
ELEMENTS = (1, 6, 8)


def ensemble(n_members: int = 2, **changes: Any) -> Ensemble:
    """Members of each family in turn, which have seen H, C and O; of `oxides` H and O alone."""
    values: dict[str, Any] = {
        "sources": SOURCES, "energy_scale_ev": (1.5, 0.5), "mean_neighbors": 4.0, "cutoff_angstrom": 3.0,
        "hidden_dim": 8, "n_layers": 1, "n_radial": 4, "head_dim": 8, "n_head_layers": 1,
    }  # fmt: skip
    families = ("egnn", "schnet", "pna")
    members = tuple(
        build_model(ModelConfig(**{**values, "family": families[k % 3], **changes}), seed=k).eval()
        for k in range(n_members)
    )
    references = np.zeros((2, 119))
    references[0, [1, 8]] = -13.6, -2041.8
    references[1, list(ELEMENTS)] = -13.6, -1029.9, -2041.8
    return Ensemble(members, references)


def release(folder: Path, n_members: int = 2, **changes: Any) -> Path:
    """A whole release."""
    return write_release(
        folder, ensemble(n_members), [f"final-{k:03d}" for k in range(n_members)],
        **{"name": "fabricated", "wattier_version": "0.1.0", "texts": {"README.md": "# fabricated\n"}, **changes},
    )  # fmt: skip


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest, and seal it again; `change` may give another one instead."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.pop(SEAL, None)
    manifest = change(manifest) or manifest
    (folder / MANIFEST).write_bytes(seal(manifest))


def replace(folder: Path, name: str, content: bytes) -> None:
    """Change a file, and its hash with it."""
    (folder / name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    rewrite(folder, lambda manifest: manifest["files"].update({name: digest}))


def reconfigure(folder: Path, member: str = "final-000", **changes: Any) -> None:
    """Change a member's config, and its hash with it."""
    config = json.loads((folder / member / "config.json").read_text())
    replace(folder, f"{member}/config.json", json.dumps({**config, **changes}).encode())


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
