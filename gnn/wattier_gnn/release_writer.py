"""Write a release: whole or not at all, and an older one in its place stays until the new one has been read back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from wattier_gnn.ensemble import Ensemble, ensemble_blocks
from wattier_gnn.files import make_folder, sha256_of
from wattier_gnn.release import load_release, other_files
from wattier_gnn.release_files import PART, is_safe_name, twins
from wattier_gnn.release_manifest import CONFIG, MANIFEST, SCHEMA_VERSION, WEIGHTS, read_manifest, seal
from wattier_gnn.release_member import weights_bytes
from wattier_gnn.structure import DataError


def write_release(  # noqa: PLR0913  (what a release says of itself)
    folder: Path,
    ensemble: Ensemble,
    member_names: Sequence[str],
    *,
    name: str,
    wattier_version: str,
    facts: Sequence[Mapping[str, Any]] = (),
    about: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
    parent: Path | None = None,
    replace_any: bool = False,
) -> Path:
    """Write an ensemble as a release that `load_release` gives back.

    Args:
        folder: to make; an older release there is replaced once the new one has been loaded from the disk.
        ensemble: members, references and how sure they are.
        member_names: one a member, in order; each becomes a folder.
        name: of the release.
        wattier_version: that writes it.
        facts: one dict a member, JSON-ready, or none.
        about: further keys of the manifest, JSON-ready: metrics, energy_by_phase, data.
        texts: further files by name: README.md, example.py.
        parent: the release that this one was made from; its manifest's hash is noted.
        replace_any: what is there now is ours whatever it holds.

    Raises:
        DataError: a name is no folder's, a number is NaN, the parent is no release, or the folder holds what no
            release does.
    """
    about, texts = dict(about or {}), dict(texts or {})
    _check_names(folder, ensemble, member_names, texts)
    if not replace_any:
        _refuse_what_is_no_release(folder)
    manifest: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "wattier_version": wattier_version,
        "name": name,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "parent": _parent(parent) if parent is not None else None,
        "sources": list(ensemble.sources),
        "members": list(member_names),
        "about_members": dict(zip(member_names, map(dict, facts), strict=True)) if facts else {},
        "references_ev": np.asarray(ensemble.references_ev, dtype=np.float64).tolist(),
        "uncertainty": ensemble_blocks(ensemble),
    }
    if taken := sorted(set(about) & {*manifest, "files"}):
        raise ValueError(f"about has the keys {taken}, which the manifest gives another meaning")
    with _replacing(folder) as temporary:
        files = _write_members(temporary, ensemble, member_names)
        files |= {file: _write(temporary / file, text.encode()) for file, text in texts.items()}
        manifest |= {**about, "files": dict(sorted(files.items()))}
        try:
            sealed = seal(manifest)
        except ValueError as error:
            raise DataError(f"{folder}: the manifest would hold a number that is NaN or infinite ({error}).") from error
        _write(temporary / MANIFEST, sealed)
        load_release(temporary)
    return folder


def _write_members(folder: Path, ensemble: Ensemble, names: Sequence[str]) -> dict[str, str]:
    files = {}
    for name, model in zip(names, ensemble.members, strict=True):
        (folder / name).mkdir()
        config = json.dumps(model.config.to_dict(), indent=2, allow_nan=False).encode()
        files[f"{name}/{CONFIG}"] = _write(folder / name / CONFIG, config)
        files[f"{name}/{WEIGHTS}"] = _write(folder / name / WEIGHTS, weights_bytes(model))
    return files


def _write(path: Path, content: bytes) -> str:
    """Write a file through to the disk; its hash is that of what lies there."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return sha256_of(path)


def _check_names(folder: Path, ensemble: Ensemble, names: Sequence[str], texts: Mapping[str, str]) -> None:
    if len(names) != len(ensemble.members):
        raise ValueError(f"member_names are {len(names)}, but must be one for each of {len(ensemble.members)} members")
    for name in names:
        if not PART.fullmatch(name) or not is_safe_name(name):
            raise DataError(f"{folder}: a member is called {name!r}, but must have a name that a folder can have.")
    if pair := twins([*names, *texts, MANIFEST]):
        raise DataError(f"{folder}: {pair[0]!r} and {pair[1]!r} are one name where case does not count. Rename one.")
    if bad := [name for name in texts if "/" in name or not is_safe_name(name)]:
        raise ValueError(f"texts names {bad[0]!r}, but a text must lie in the release itself")


def _parent(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    return {
        "name": manifest.name,
        "manifest_sha256": manifest.sha256,
        "wattier_version": manifest.data.get("wattier_version"),
    }


def _refuse_what_is_no_release(folder: Path) -> None:
    """Only what a release is made of may be removed to make room for another."""
    if not folder.name:
        raise DataError(f"{folder}: is not a new folder, but must be one. Name it, such as {folder / 'release'}.")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise DataError(f"{folder}: is there already and is no folder, but must be a new one. Name another one.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    try:
        others = other_files(folder, read_manifest(folder))
    except DataError as error:
        raise DataError(
            f"{folder}: is there already and is no release, but must be a new folder. Name another one, or remove it."
        ) from error
    if others:
        raise DataError(
            f"{folder}: holds {others[0]!r}, which is no part of the release there and would be lost. Name another "
            "folder, or move it away."
        )


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` when the block ends well."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    make_folder(folder.parent)
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(temporary)
    try:
        yield temporary
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        try:
            temporary.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
