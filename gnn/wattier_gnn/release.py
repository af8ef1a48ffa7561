"""A release: the folder that holds an ensemble, its references and a manifest with the hash of every file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from wattier_gnn.ensemble import Ensemble, ensemble_parts
from wattier_gnn.files import sha256_of
from wattier_gnn.model import FoundationModel, ModelConfig
from wattier_gnn.reference import MAX_ATOMIC_NUMBER
from wattier_gnn.structure import DataError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


def load_release(folder: Path | str) -> Ensemble:
    """Load a release, after checking the hash of every file it names.

    Raises:
        DataError: a file is missing or changed, or the release was made by a newer version.
    """
    folder = Path(folder)
    manifest = read_release_manifest(folder)
    members = tuple(_load_member(folder, member) for member in manifest["members"])
    references = np.array(manifest["references_ev"], dtype=np.float64)
    if references.shape != (len(members[0].config.sources), MAX_ATOMIC_NUMBER + 1):
        raise DataError(f"{folder}: references_ev is {list(references.shape)}, but must be [S, 119]. Get it anew.")
    blocks = manifest.get("uncertainty") or {"calibration": manifest["calibration"]}
    return Ensemble(members, references, **ensemble_parts(blocks, len(references), len(members)))


def read_release_manifest(folder: Path) -> dict[str, Any]:
    """A release's manifest, once every file it names has the hash it states.

    Raises:
        DataError: no manifest, a newer schema, a missing or changed file, or a name that leaves the folder.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        version, files = manifest["schema_version"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a readable manifest ({error}). Give the folder of a Wattier release.") from error
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path}: schema_version is {version}, but must be {SCHEMA_VERSION}. "
            f"Install the wattier that made it: pip install 'wattier=={manifest.get('wattier_version')}'."
        )
    for name, expected in files.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{path}: names {name!r}, but files must lie inside the release. Do not use this release.")
        if not file.is_file():
            raise DataError(f"{file}: is missing, but the manifest names it. Get the release anew.")
        if (found := sha256_of(file)) != expected:
            raise DataError(f"{file}: sha256 is {found[:12]}..., but must be {expected[:12]}... Get the release anew.")
    return manifest


def _load_member(folder: Path, name: str) -> FoundationModel:
    try:
        model = FoundationModel(ModelConfig.from_dict(json.loads((folder / name / "config.json").read_text())))
        model.load_state_dict(load_file(folder / name / "model.safetensors"))
    except Exception as error:  # safetensors, json and torch each have their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{folder / name}: not a readable member ({reason}). Get the release anew.") from error
    return model.eval()
