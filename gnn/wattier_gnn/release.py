"""A release: the folder that holds an ensemble, its references and a manifest with the hash of every file.

Hashes guard against accidents. Whoever means harm writes the hashes too, so what the files say is checked as well:
see `release_manifest`, `release_files` and `release_member`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wattier_gnn.ensemble import Ensemble
from wattier_gnn.model import FoundationModel
from wattier_gnn.release_files import read_verified
from wattier_gnn.release_manifest import CONFIG, MANIFEST, SCHEMA_VERSION, WEIGHTS, ReleaseManifest, read_manifest
from wattier_gnn.release_member import read_member
from wattier_gnn.release_uncertainty import ensemble_parts
from wattier_gnn.structure import DataError

__all__ = ["MANIFEST", "SCHEMA_VERSION", "load_release", "other_files", "read_release_manifest", "verify_release"]


def load_release(folder: Path | str) -> Ensemble:
    """Load a release, after checking the hash of every file it names; what is loaded are the bytes that were hashed.

    Raises:
        DataError: a file is missing or changed, lies elsewhere, or does not hold what it must; or the release was made
            by a newer version, which is named.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    content = read_verified(folder, manifest.files, frozenset(manifest.member_files))
    members = []
    for name in manifest.members:  # the bytes of a member go when it is read
        config, weights = (content.pop(f"{name}/{file}") for file in (CONFIG, WEIGHTS))
        members.append(read_member(folder / name, config, weights, manifest.sources))
    return _ensemble(folder, manifest, tuple(members))


def read_release_manifest(folder: Path | str) -> dict[str, Any]:
    """A release's manifest, once every file it names has the hash it states.

    Raises:
        DataError: no manifest, a newer schema, a missing or changed file, or a name that leaves the folder.
    """
    manifest = read_manifest(Path(folder))
    read_verified(Path(folder), manifest.files, ())
    return manifest.data


def verify_release(folder: Path | str) -> ReleaseManifest:
    """Check all that `load_release` does, and give the manifest.

    Raises:
        DataError: as `load_release`.
    """
    load_release(folder)
    return read_manifest(Path(folder))


def other_files(folder: Path, manifest: ReleaseManifest) -> list[str]:
    """Names of what lies in the folder and is no part of the release: nothing reads it, and its hash is unknown."""
    known = {*manifest.files, MANIFEST}
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    return sorted(set(found) - known)


def _ensemble(folder: Path, manifest: ReleaseManifest, members: tuple[FoundationModel, ...]) -> Ensemble:
    try:
        parts = ensemble_parts(manifest.uncertainty, manifest.sources, len(members))
    except DataError as error:
        raise DataError(f"{folder / MANIFEST}: {str(error).rstrip('.')}. Get the release anew.") from error
    return Ensemble(members, manifest.references_ev, **parts)
