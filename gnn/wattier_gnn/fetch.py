"""Downloads of releases: resumed where they stopped, and checked before they get their name."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from fnmatch import fnmatch
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO, NamedTuple

from wattier_gnn.datasets import Reader
from wattier_gnn.datasets.releases import RELEASES, Release, ReleaseFile
from wattier_gnn.structure import DataError
from wattier_gnn.unpack import MUST_BE, unpack, what_else

Progress = Callable[[str, int, int | None], None]  # name, bytes so far, bytes in all

CHUNK_BYTES = 1 << 20
ATTEMPTS = 6  # without a byte of progress between them
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
TIMEOUT_SECONDS = 60.0
SPARE_BYTES = 64 << 20  # a disk is full before its last byte
_WORTH_ANOTHER_TRY = {408, 425, 429, 500, 502, 503, 504}


class Fetched(NamedTuple):
    """What came of one file.

    Attributes:
        path: the file or folder to read.
        was_there: nothing had to be done.
        checked: ``md5``, ``size``, or None where the publisher states neither.
    """

    path: Path
    was_there: bool
    checked: str | None


def choose_files(name: str, patterns: list[str]) -> tuple[Release, list[ReleaseFile]]:
    """The release of a dataset, and its files whose names match one of the patterns (all files without patterns).

    Raises:
        DataError: there is no such release, no such file, or the release comes in parts and none was chosen.
    """
    if name not in RELEASES:
        raise DataError(f"{name}: has no known release, but must be one of {', '.join(RELEASES)}. Check the name")
    release = RELEASES[name]
    parts = ", ".join(f"{file.name} ({_size_in_words(file)})" for file in release.files)
    if release.in_parts and not patterns:
        raise DataError(f"{name}: is released in parts, of which you must say which you want: --files NAME of {parts}")
    chosen = [file for file in release.files if not patterns or any(fnmatch(file.name, p) for p in patterns)]
    missed = [p for p in patterns if not any(fnmatch(file.name, p) for file in release.files)]
    if missed:
        raise DataError(f"{name}: has no file {missed[0]!r}, but must be asked for one of {parts}")
    return release, chosen


def from_elsewhere(files: list[ReleaseFile], url: str) -> list[ReleaseFile]:
    """The same files from another address: one that ends in a slash holds them all, any other is the file itself.

    Raises:
        DataError: one address for several files, or no HTTP address.
    """
    if not url.startswith(("http://", "https://")):
        raise DataError(f"{url}: is no web address, but must start with https:// or http://. Check --url")
    if url.endswith("/"):
        return [file._replace(url=url + file.name) for file in files]
    if len(files) > 1:
        raise DataError(f"{url}: is one file for {len(files)}, but must end in a slash, or choose one with --files")
    return [files[0]._replace(url=url)]


def fetch(file: ReleaseFile, folder: Path, on_progress: Progress) -> Fetched:
    """Bring one file of a release into `folder`, unpacked where readers need that; the packed file is then removed.

    Raises:
        DataError: the server refuses, the file is not the published one, another file has its name, or the disk is too
            small. What was downloaded is kept as ``<name>.part`` when another try can use it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / file.name
    if file.unpacks_to and (folder / file.unpacks_to).exists():
        target.unlink(missing_ok=True)  # a process was killed after it had unpacked it
        return Fetched(folder / file.unpacks_to, was_there=True, checked=None)
    was_there = target.exists()
    checked = _check(file, target, refuse=True) if was_there else _download(file, target, on_progress)
    if file.unpacks_to is None:
        return Fetched(target, was_there, checked)
    unpacked = unpack(target, folder / file.unpacks_to)
    target.unlink(missing_ok=True)  # another process may have found it unpacked
    return Fetched(unpacked, was_there=False, checked=checked)


def _download(file: ReleaseFile, target: Path, on_progress: Progress) -> str | None:
    part, notes = target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")
    with part.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{part}: is being written by another process. Wait for it, or give another --to") from None
        _transfer(file, _Transfer(stream, notes), on_progress)
        stream.flush()
        os.fsync(stream.fileno())
        checked = _check(file, part, refuse=False)
        part.rename(target)
    notes.unlink(missing_ok=True)
    _sync_folder(target.parent)
    return checked


class _Transfer(NamedTuple):
    stream: BinaryIO
    notes: Path

    def validator(self, url: str) -> str | None:
        """What the server called this version of the file, when the part on disk is of it."""
        try:
            noted = json.loads(self.notes.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return noted.get("validator") if isinstance(noted, dict) and noted.get("url") == url else None

    def start_over(self) -> None:
        """Forget what has been downloaded."""
        self.stream.truncate(0)
        self.notes.unlink(missing_ok=True)


def _transfer(file: ReleaseFile, transfer: _Transfer, on_progress: Progress) -> None:
    """Download what is missing, in as many attempts as make progress."""
    failures, wait = 0, FIRST_WAIT_SECONDS
    while True:
        before = os.fstat(transfer.stream.fileno()).st_size
        try:
            _attempt(file, transfer, on_progress)
        except urllib.error.HTTPError as error:
            with error:
                if error.code not in _WORTH_ANOTHER_TRY:
                    raise _refusal(file, f"the server says {error.code} {error.reason}") from error
            problem, asked = f"the server says {error.code} {error.reason}", error.headers.get("Retry-After", "")
            wait = max(wait, min(float(asked), LONGEST_WAIT_SECONDS) if asked.isdigit() else 0.0)
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
            problem = str(getattr(error, "reason", "") or error or type(error).__name__)
        else:
            return
        if os.fstat(transfer.stream.fileno()).st_size > before:
            failures, wait = 0, FIRST_WAIT_SECONDS
        failures += 1
        if failures >= ATTEMPTS:
            raise _refusal(file, f"{problem}, {failures} times in a row")
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)


def _attempt(file: ReleaseFile, transfer: _Transfer, on_progress: Progress) -> None:
    have = os.fstat(transfer.stream.fileno()).st_size
    validator = transfer.validator(file.url)
    if have and validator is None:  # nobody could tell whether the rest belongs to it
        transfer.start_over()
        have = 0
    headers = {"User-Agent": "wattier", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": str(validator)}
    try:
        response: HTTPResponse = urllib.request.urlopen(
            urllib.request.Request(file.url, headers=headers), timeout=TIMEOUT_SECONDS
        )
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        with error:
            if error.headers.get("Content-Range", "") == f"bytes */{have}":
                return  # all of it is there
        transfer.start_over()
        raise ConnectionError("the server has fewer bytes than were downloaded") from error
    with response:
        _receive(file, transfer, response, have, on_progress)


def _receive(file: ReleaseFile, transfer: _Transfer, response: HTTPResponse, have: int, on_progress: Progress) -> None:
    resumed = response.status == 206 and str(response.headers.get("Content-Range")).startswith(f"bytes {have}-")
    if response.status == 206 and not resumed:
        transfer.start_over()
        raise ConnectionError(f"the server sent {response.headers.get('Content-Range')} where byte {have} was due")
    if have and not resumed:  # the server cannot resume, or the file has changed since
        transfer.start_over()
        have = 0
    length = response.headers.get("Content-Length", "")
    total = have + int(length) if length.isdigit() else None
    _check_announced(file, transfer, total, have)
    etag = response.headers.get("ETag", "")
    validator = etag if etag.startswith('"') else response.headers.get("Last-Modified")
    transfer.notes.write_text(json.dumps({"url": file.url, "validator": validator}), encoding="utf-8")
    on_progress(file.name, have, total)
    while chunk := response.read1(CHUNK_BYTES):  # what is there, not only whole chunks
        transfer.stream.write(chunk)
        transfer.stream.flush()
        have += len(chunk)
        on_progress(file.name, have, total)
    if total is not None and have < total:
        raise ConnectionError(f"the connection ended after {have:,} of {total:,} bytes")


def _check_announced(file: ReleaseFile, transfer: _Transfer, total: int | None, have: int) -> None:
    if total is not None and file.size_bytes not in (None, total):
        raise _refusal(file, f"the server offers {total:,} bytes where the release has {file.size_bytes:,}")
    missing = ((total or file.size_bytes or have) - have) + SPARE_BYTES
    free = shutil.disk_usage(transfer.notes.parent).free
    if free < missing:
        raise DataError(
            f"{transfer.notes.parent}: has {free / 1e9:.1f} GB free, but must have {missing / 1e9:.1f} GB for "
            f"{file.name}. Make room, or give another folder with --to"
        )


def _check(file: ReleaseFile, path: Path, *, refuse: bool) -> str | None:
    """How `path` is known to be the published file: ``md5``, ``size``, or None where neither is published.

    Raises:
        DataError: it is another one. A download (`refuse` False) is removed: it cannot be resumed.
    """
    size = path.stat().st_size
    what_is = f"has {size:,} bytes" if file.size_bytes not in (None, size) else ""
    must_be = f"{file.size_bytes:,} bytes" if what_is else f"md5 {file.md5}"
    if not what_is and file.md5 is not None:
        with path.open("rb") as stream:
            md5 = hashlib.file_digest(stream, "md5").hexdigest()
        what_is = f"has md5 {md5}" if md5 != file.md5 else ""
    if not what_is and file.md5 is None and file.unpacks_to and (other := what_else(path)):
        what_is, must_be = other, MUST_BE
    # A packed file tells by itself whether it is whole.
    if not what_is and refuse and file.md5 is None and file.size_bytes is None and file.unpacks_to is None:
        what_is, must_be = "is there and no checksum is published that could tell what it is", "absent"
    if what_is:
        if not refuse:
            path.unlink()
        advice = "Move it away, or give another --to" if refuse else "It was removed; try again, or another --url"
        raise DataError(f"{path}: {what_is}, but must be the published {file.name} ({must_be}). {advice}")
    return "md5" if file.md5 else "size" if file.size_bytes else None


def _refusal(file: ReleaseFile, problem: str) -> DataError:
    return DataError(
        f"{file.url}: {problem}, but must serve {file.name}. What has been downloaded is kept: the same command goes "
        "on from there. See the release's page, or give another address with --url"
    )


def _size_in_words(file: ReleaseFile) -> str:
    return file.roughly if file.size_bytes is None else f"{file.size_bytes / 1e9:.1f} GB"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def readable_folders(reader: Reader, path: Path) -> list[Path]:
    """The folders that `reader` can be given: of a file its own, of an unpacked archive those inside that hold data."""
    folders = [path.parent] if path.is_file() else sorted(p for p in (path, *path.rglob("*")) if p.is_dir())
    found = []
    for folder in folders:
        try:
            reader.shards(folder)
        except DataError:
            continue
        found.append(folder)
    return found
