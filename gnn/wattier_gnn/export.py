"""A store as a data release of its own: a folder that says what it holds, where that is from, and how to check it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wattier_gnn.arrays import COLUMNS
from wattier_gnn.columns import column_path
from wattier_gnn.data_card import data_card
from wattier_gnn.datasets.write_extxyz import readable, write_frames
from wattier_gnn.files import make_folder, sha256_of, write_text
from wattier_gnn.manifest import MANIFEST, read_manifest
from wattier_gnn.splits import SPLIT_NAMES
from wattier_gnn.store import Store
from wattier_gnn.structure import DataError

Format = Literal["store", "extxyz"]
FRAMES_A_FILE = 10_000
CHUNK_STRUCTURES = 500
CHUNK_BYTES = 16 << 20


def export_store(store: Store, folder: Path, form: Format, say: Callable[[str], None]) -> Path:
    """Write a store as a release, whole or not at all.

    Args:
        store: what to release.
        folder: to make; must not be there, or be empty.
        form: store keeps the columns, so that it opens as a `Store`; extxyz is for other tools.
        say: hears lines of text.

    Raises:
        DataError: the folder is there and holds something, or cannot be made.
    """
    if not folder.name:
        raise DataError(f"{folder}: is not a new folder, but must be one. Name it, such as {folder / 'release'}.")
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise DataError(f"{folder}: is there already, but must be a new folder. Name another one, or remove it.")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(folder.parent)
    make_folder(temporary)
    try:
        files = dict((_columns if form == "store" else _frames)(store, temporary))
        card = data_card(store.meta, folder.name, form)
        write_text(temporary / "README.md", card)
        files["README.md"] = _entry(temporary / "README.md")
        manifest = {**_without_paths(store.meta), "release": {"format": form, "files": files}}
        write_text(temporary / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False) + "\n")
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    n_bytes = sum(entry["bytes"] for entry in files.values())
    say(f"{folder}: {len(store)} structures in {len(files)} files, {n_bytes} bytes, each with its sha256")
    return folder


def verify(folder: Path) -> str:
    """Check a release against its hashes, or a store against the sizes in its manifest; one line of what was found.

    Raises:
        DataError: a file is missing or changed, or lies outside of the folder.
    """
    manifest = read_manifest(folder)
    release = manifest.get("release")
    if release is None:
        store = Store(folder)
        return f"{folder}: {len(store)} structures, all files have their size (a store has no hashes, an export has)"
    try:
        form, n_structures = release["format"], manifest["rows"]["energy"]
        hashes = {name: entry["sha256"] for name, entry in release["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: not a readable release ({MANIFEST}: {error!r}). Get the release anew.") from error
    for name, due in hashes.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{folder}: names {name!r}, but files must lie inside of it. Do not use this release.")
        if not path.is_file():
            raise DataError(f"{path}: is missing, but the manifest names it. Get the release anew.")
        if (found := sha256_of(path)) != due:
            raise DataError(f"{path}: sha256 is {found[:12]}..., but must be {due[:12]}... Get the release anew.")
    if form == "store":
        Store(folder)
    return f"{folder}: {n_structures} structures, all {len(hashes)} files have their sha256"


def _columns(store: Store, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Copy what the manifest names of each column; somebody may be adding more behind it."""
    for name, column in COLUMNS.items():
        source, target = column_path(store.folder, name), column_path(folder, name)
        yield target.name, _copy(source, target, store.meta["rows"][name] * column.row_bytes)
    groups = store.meta["groups"]
    yield groups, _copy(store.folder / groups, folder / groups, (store.folder / groups).stat().st_size)


def _copy(source: Path, target: Path, n_bytes: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    with source.open("rb") as reading, target.open("wb") as writing:
        for first in range(0, n_bytes, CHUNK_BYTES):
            chunk = reading.read(min(CHUNK_BYTES, n_bytes - first))
            digest.update(chunk)
            writing.write(chunk)
        writing.flush()
        os.fsync(writing.fileno())
    return {"bytes": n_bytes, "sha256": digest.hexdigest()}


def _frames(store: Store, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Extended XYZ files of some thousands of frames each."""
    for number, first in enumerate(range(0, len(store), FRAMES_A_FILE)):
        path, stop = folder / f"frames-{number:05d}.extxyz", min(first + FRAMES_A_FILE, len(store))
        with path.open("w", encoding="utf-8") as file:
            for start in range(first, stop, CHUNK_STRUCTURES):
                indices = np.arange(start, min(start + CHUNK_STRUCTURES, stop))
                write_frames(file, store.gather(indices, edges=False), _comments(store, indices))
            file.flush()
            os.fsync(file.fileno())
        yield path.name, _entry(path)


def _comments(store: Store, indices: Any) -> dict[str, Any]:
    return {
        "aligned_energy": (store.energy[indices] - store.baseline_ev(indices)).tolist(),
        "source": [store.sources[k] for k in store.source_index[indices]],
        "group": [readable(store.groups.names[k]) for k in store.columns["group"][indices]],
        "split": [SPLIT_NAMES[k] for k in store.split[indices]],
        "key": [readable(store.key(int(k))) for k in indices],
    }


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _without_paths(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest without what is true on this machine only."""
    files = {name: about["files"] for name, about in manifest["by_source"].items()}
    cleaning = {
        **manifest["cleaning"],
        **{
            kind: {
                name: [_named_only(text, files.get(name, ())) for text in messages]
                for name, messages in manifest["cleaning"][kind].items()
            }
            for kind in ("bad_shards", "bad_records")
        },
    }
    by_source = {
        name: {**about, "files": [_portable(file) for file in about["files"]]}
        for name, about in manifest["by_source"].items()
    }
    return {**{k: v for k, v in manifest.items() if k != "release"}, "by_source": by_source, "cleaning": cleaning}


def _portable(file: Mapping[str, Any]) -> dict[str, Any]:
    there = {k: v for k, v in file.items() if k not in ("path", "modified_ns")}
    return there | ({"beside": [_portable(other) for other in file["beside"]]} if "beside" in file else {})


def _named_only(message: str, files: Iterable[Mapping[str, Any]]) -> str:
    """A message with the names of files in the place of their paths, as `DataError` writes them."""
    for file in files:
        for about in (file, *file.get("beside", ())):
            if "path" in about:
                message = message.replace(str(DataError(about["path"])), about["name"])
    return message
