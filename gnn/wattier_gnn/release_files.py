"""Files of a release, read so that no name, link or change in between makes other bytes count than those hashed."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Never

from wattier_gnn.structure import DataError

MAX_JSON_BYTES = 8 << 20
MAX_NAME_LENGTH = 200
MAX_DIGITS = 19  # with the sign: what 64 bits hold, so that no number overflows where it is used
CHUNK_BYTES = 1 << 20
# One part of a path: no separator, no leading dot, nothing that a file system folds but case.
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*", re.ASCII)
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def is_safe_name(name: str) -> bool:
    """Whether a name is a relative path of plain parts that stays in its folder on any file system."""
    return len(name) <= MAX_NAME_LENGTH and all(PART.fullmatch(part) for part in name.split("/"))


def twins(names: Iterable[str]) -> tuple[str, str] | None:
    """Two names that are one file where case does not count."""
    seen: dict[str, str] = {}
    for name in names:
        if name.lower() in seen:
            return seen[name.lower()], name
        seen[name.lower()] = name
    return None


def check_hash(folder: Path, name: str, due: str) -> None:
    """Hash a file of a release without keeping it.

    Raises:
        DataError: it is missing, changed, a link, or no file at all.
    """
    digest = hashlib.sha256()
    with open_inside(folder, name) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    _compare(folder / name, digest.hexdigest(), due)


def read_small(folder: Path, name: str) -> bytes:
    """A file that holds JSON, which is small.

    Raises:
        DataError: it is missing, a link, no file at all, or larger than JSON may be.
    """
    with open_inside(folder, name) as file:
        content: bytes = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise DataError(
            f"{folder / name}: is larger than {MAX_JSON_BYTES >> 20} MiB, but must not be. Do not use this release."
        )
    return content


def read_verified(folder: Path, name: str, due: str, *, small: bool = False) -> bytes:
    """The very bytes of a file that were hashed.

    Raises:
        DataError: as `check_hash`; or it should be small and is not.
    """
    if small:
        content = read_small(folder, name)
    else:
        with open_inside(folder, name) as file:
            content = file.read()
    _compare(folder / name, hashlib.sha256(content).hexdigest(), due)
    return content


def _compare(path: Path, found: str, due: str) -> None:
    if found != due:
        raise DataError(f"{path}: sha256 is {found[:12]}..., but must be {due[:12]}... Get the release anew.")


@contextmanager
def open_inside(folder: Path, name: str) -> Iterator[IO[bytes]]:
    """Open a regular file below a folder without following any link on the way.

    Raises:
        DataError: it is missing, a link, no regular file, or may not be read.
    """
    path = folder / name
    try:
        descriptor = _descriptor(folder, name)
    except FileNotFoundError as error:
        raise DataError(f"{path}: is missing, but the manifest names it. Get the release anew.") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise _is_link(path) from error
        raise DataError(f"{path}: cannot be read ({error.strerror}), but must be. Get the release anew.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{path}: is no regular file, but must be one. Do not use this release.")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def _descriptor(folder: Path, name: str) -> int:
    *parents, last = name.split("/")
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parents:
            below = os.open(part, _FLAGS | os.O_DIRECTORY, dir_fd=at)
            os.close(at)
            at = below
        return os.open(last, _FLAGS, dir_fd=at)
    finally:
        os.close(at)


def _is_link(path: Path) -> DataError:
    return DataError(
        f"{path}: is or lies behind a link, but must be a file of the release's own folder. Copy the release with its "
        "files (cp -rL), if you trust where it links to."
    )


def read_json_object(path: Path, file: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """A JSON object from a file that may hold anything, and its bytes.

    Raises:
        DataError: it is too large, no UTF-8, no JSON, nested too deeply, or holds a number that is none.
    """
    content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise DataError(f"{path}: is larger than {MAX_JSON_BYTES >> 20} MiB, but must not be. Do not use this release.")
    return parse_json_object(path, content), content


def parse_json_object(path: Path, content: bytes) -> dict[str, Any]:
    """A JSON object from bytes, see `read_json_object`."""
    try:
        data = json.loads(
            content.decode("utf-8"),
            parse_constant=_no_number,
            parse_float=_finite,
            parse_int=_small,
            object_pairs_hook=_once,
        )
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise DataError(f"{path}: is not readable JSON ({reason}), but must be. Get the release anew.") from error
    if not isinstance(data, dict):
        raise DataError(f"{path}: holds a {type(data).__name__}, but must hold a JSON object. Get the release anew.")
    return data


def _no_number(text: str) -> Never:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large")
    return value


def _small(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"{text[:20]}... is too large")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that stands twice: two readers would take two values for it."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found
