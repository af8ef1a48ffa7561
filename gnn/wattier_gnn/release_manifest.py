"""``manifest.json`` of a release: what it must say, checked before anything else of the folder is read."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wattier_gnn.reference import MAX_ATOMIC_NUMBER
from wattier_gnn.release_files import PART, is_safe_name, parse_json_object, read_small, twins
from wattier_gnn.structure import DataError

SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)
MANIFEST = "manifest.json"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MAX_ENERGY_EV = 1e9  # of one atom; the heaviest all-electron atoms have about 1e6
MAX_MEMBERS = 1000
SEAL = "seal_sha256"  # of the manifest's own bytes with zeros in place of these digits
_ZEROS = b"0" * 64
_VERSION = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6}){0,4}((a|b|rc|\.post|\.dev)[0-9]{1,6})?", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True)
class ReleaseManifest:
    """A manifest that says what it must.

    uncertainty: blocks that say how sure the ensemble is, not yet looked at. data: all of the manifest. sha256: of its
    own bytes.
    """

    name: str
    sources: tuple[str, ...]
    members: tuple[str, ...]
    references_ev: Any  # float64 [S, 119]
    files: dict[str, str]
    uncertainty: dict[str, Any]
    data: dict[str, Any]
    sha256: str

    @property
    def member_files(self) -> tuple[str, ...]:
        """Names of the files that are read, not only hashed."""
        return tuple(f"{member}/{file}" for member in self.members for file in (CONFIG, WEIGHTS))


def read_manifest(folder: Path) -> ReleaseManifest:
    """Read the manifest of a release; no other file is looked at.

    Raises:
        DataError: there is none, it was made by a newer version, or it does not say what it must.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise DataError(f"{folder}: is no folder, but must be a release that `wattier export` made. Give its folder.")
    if not path.exists() and not path.is_symlink():
        raise DataError(f"{path}: does not exist, but every release has one. Give the folder of a Wattier release.")
    content = read_small(folder, MANIFEST)
    data = parse_json_object(path, content)
    _check_version(path, data)
    _check_seal(path, data, content)
    try:
        return _manifest(data, hashlib.sha256(content).hexdigest())
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path}: {reason}. Get the release anew, or do not use it.") from error


def seal(manifest: dict[str, Any]) -> bytes:
    """The bytes of a manifest with their own hash in them, so that no byte of it can change unseen.

    Raises:
        ValueError: it holds a number that is NaN or infinite.
    """
    text = json.dumps({SEAL: "0" * 64, **manifest}, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    blank = text.encode()
    return blank.replace(_ZEROS, hashlib.sha256(blank).hexdigest().encode(), 1)


def _check_seal(path: Path, data: dict[str, Any], content: bytes) -> None:
    digits = data.get(SEAL)
    if digits is None and data["schema_version"] == 1:
        return
    if not isinstance(digits, str) or not _SHA256.fullmatch(digits):
        raise DataError(f"{path}: {SEAL} is {digits!r:.80}, but must be a sha256. Get the release anew.")
    blank = content.replace(digits.encode(), _ZEROS, 1)
    if (found := hashlib.sha256(blank).hexdigest()) != digits:
        raise DataError(
            f"{path}: was changed: its sha256 is {found[:12]}..., but must be {digits[:12]}... Get the release anew."
        )


def _check_version(path: Path, data: dict[str, Any]) -> None:
    version, maker = data.get("schema_version"), data.get("wattier_version")
    if type(version) is int and version in READABLE_VERSIONS:
        return
    readable = f"must be one of {', '.join(map(str, READABLE_VERSIONS))}"
    if type(version) is not int or version < max(READABLE_VERSIONS):
        raise DataError(f"{path}: schema_version is {version!r:.40}, but {readable}. Get the release anew.")
    known = isinstance(maker, str) and _VERSION.fullmatch(maker)  # a shell command is made of it: nothing else will do
    install = f"pip install 'wattier>={maker}'" if known else "pip install --upgrade wattier"
    raise DataError(
        f"{path}: schema_version is {version}, but {readable}: the release was made by a newer wattier"
        f"{f' ({maker})' if known else ''}. Install it: {install}"
    )


def _manifest(data: dict[str, Any], sha256: str) -> ReleaseManifest:
    sources = _names(data, "sources")
    manifest = ReleaseManifest(
        name=_text(data, "name"),
        sources=sources,
        members=_members(data),
        references_ev=_references(data["references_ev"], len(sources)),
        files=_files(data["files"]),
        uncertainty=_uncertainty(data),
        data=data,
        sha256=sha256,
    )
    for name in manifest.member_files:
        if name not in manifest.files:
            raise ValueError(f"files does not name {name!r}, but every file of a member must have its hash")
    return manifest


def _text(data: dict[str, Any], key: str) -> str:
    if not isinstance(data[key], str):
        raise TypeError(f"{key} is {data[key]!r:.60}, but must be a text")
    return str(data[key])


def _names(data: dict[str, Any], key: str) -> tuple[str, ...]:
    """A list of texts, at least one, none empty, none twice."""
    found = data[key]
    if not isinstance(found, list) or not found or not all(isinstance(name, str) and name for name in found):
        raise TypeError(f"{key} is {found!r:.60}, but must be a list of names")
    if len(set(found)) != len(found):
        raise ValueError(f"{key} names one twice: {found!r:.200}")
    return tuple(found)


def _members(data: dict[str, Any]) -> tuple[str, ...]:
    members = _names(data, "members")
    if len(members) > MAX_MEMBERS:
        raise ValueError(f"members are {len(members)}, but must be at most {MAX_MEMBERS}")
    for name in members:
        if not PART.fullmatch(name) or not is_safe_name(name):
            raise ValueError(f"members names {name!r:.80}, but a member must be a folder inside the release")
    if pair := twins(members):
        raise ValueError(f"members names {pair[0]!r} and {pair[1]!r}, which are one folder where case does not count")
    return members


def _files(files: Any) -> dict[str, str]:
    if not isinstance(files, dict):
        raise TypeError(f"files is {files!r:.60}, but must be names with their sha256")
    for name, sha256 in files.items():
        if not is_safe_name(name):
            raise ValueError(f"names {name!r:.80}, but files must lie inside the release")
        if name == MANIFEST:
            raise ValueError(f"files names {MANIFEST}, which cannot hold its own hash")
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise ValueError(f"files.{name} is {sha256!r:.80}, but must be a sha256 of 64 hexadecimal digits")
    if pair := twins(files):
        raise ValueError(f"files names {pair[0]!r} and {pair[1]!r}, which are one file where case does not count")
    return files


def _uncertainty(data: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 had two scales of the spread, under another key."""
    blocks = {"calibration": data["calibration"]} if data["schema_version"] == 1 else data["uncertainty"]
    if not isinstance(blocks, dict):
        raise TypeError(f"uncertainty is {blocks!r:.60}, but must be a JSON object")
    return blocks


def _references(rows: Any, n_sources: int) -> Any:
    width = MAX_ATOMIC_NUMBER + 1
    if (
        not isinstance(rows, list)
        or len(rows) != n_sources
        or not all(isinstance(row, list) and len(row) == width for row in rows)
    ):
        raise ValueError(f"references_ev has another shape, but must be [{n_sources}, {width}], a row a source")
    for value in (value for row in rows for value in row):
        if type(value) not in (int, float) or not abs(value) <= MAX_ENERGY_EV:
            raise ValueError(f"references_ev holds {value!r:.40}, but must hold energies below {MAX_ENERGY_EV:g} eV")
    return np.array(rows, dtype=np.float64)
