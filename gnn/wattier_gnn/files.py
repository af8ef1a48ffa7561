"""Files that appear whole or not at all, their hashes, and a lock on the folder that holds them."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wattier_gnn.structure import DataError


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file under a temporary name, and give it its own once it is on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text whole or not at all."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless it is there.

    Raises:
        DataError: something else lies there, or above it, or it may not be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise DataError(
            f"{folder}: cannot be made ({error.strerror}), but must be a folder that can be written. Name another one."
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only process that writes to a folder, for the length of the block.

    Raises:
        DataError: another process holds it.
    """
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{folder}: is being written by another process, but one at a time may. Wait for it, or stop it."
            ) from error
        yield
