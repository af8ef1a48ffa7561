"""A release: the folder that holds an ensemble, its references and a manifest with the hash of every file.

Hashes guard against accidents. Whoever means harm writes the hashes too, so what the files say is checked as well:
see `release_manifest`, `release_files` and `release_member`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wattier_gnn.ensemble import Ensemble, ensemble_parts
from wattier_gnn.model import FoundationModel
from wattier_gnn.release_files import check_hash, read_verified
from wattier_gnn.release_manifest import CONFIG, MANIFEST, SCHEMA_VERSION, WEIGHTS, ReleaseManifest, read_manifest
from wattier_gnn.release_member import read_member
from wattier_gnn.structure import DataError

__all__ = ["MANIFEST", "SCHEMA_VERSION", "load_release", "other_files", "read_release_manifest", "verify_release"]


def load_release(folder: Path | str) -> Ensemble:
    """Load a release, after checking the hash of every file it names; what is loaded are the bytes that were hashed.

    Raises:
        DataError: a file is missing or changed, lies elsewhere, or does not hold what it must; or the release was made
            by a newer version, which is named.
    """
    folder = Path(folder)
    return _load(folder, read_manifest(folder))


def read_release_manifest(folder: Path | str) -> dict[str, Any]:
    """A release's manifest, once every file it names has the hash it states.

    Raises:
        DataError: no manifest, a newer schema, a missing or changed file, or a name that leaves the folder.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, due in manifest.files.items():
        check_hash(folder, name, due)
    return manifest.data


def verify_release(folder: Path | str) -> ReleaseManifest:
    """Check all that `load_release` does, and give the manifest.

    Raises:
        DataError: as `load_release`.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _load(folder, manifest)
    return manifest


def _load(folder: Path, manifest: ReleaseManifest) -> Ensemble:
    """What is not read is hashed first; then one member after the other, since together they may be large."""
    for name in sorted(set(manifest.files) - set(manifest.member_files)):
        check_hash(folder, name, manifest.files[name])
    members = tuple(_member(folder, manifest, name) for name in manifest.members)
    try:
        parts = ensemble_parts(manifest.uncertainty, len(manifest.sources), len(members))
    except DataError as error:
        raise DataError(f"{folder / MANIFEST}: {error}") from error
    return Ensemble(members, manifest.references_ev, **parts)


def _member(folder: Path, manifest: ReleaseManifest, name: str) -> FoundationModel:
    config, weights = f"{name}/{CONFIG}", f"{name}/{WEIGHTS}"
    return read_member(
        folder / name,
        read_verified(folder, config, manifest.files[config], small=True),
        read_verified(folder, weights, manifest.files[weights]),
        manifest.sources,
    )


def other_files(folder: Path, manifest: ReleaseManifest) -> list[str]:
    """Names of what lies in the folder and is no part of the release: nothing reads it, and its hash is unknown."""
    known = {*manifest.files, MANIFEST}
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    return sorted(set(found) - known)
