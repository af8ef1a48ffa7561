"""Packed files of releases, unpacked whole or not at all: xz and gzip, of one file or of a tar archive."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import BinaryIO, cast

from wattier_gnn.structure import DataError

_BLOCK_BYTES = 1 << 20
_XZ, _GZIP, _HDF5 = b"\xfd7zXZ\x00", b"\x1f\x8b", b"\x89HDF\r\n\x1a\n"
_TAR_MAGIC_AT, _TAR_MAGIC = 257, b"ustar"
MUST_BE = "packed with xz or gzip, a tar archive, or HDF5"
_DAMAGE = (lzma.LZMAError, zlib.error, gzip.BadGzipFile, tarfile.TarError, EOFError)


def what_else(packed: Path) -> str | None:
    """What `packed` starts with when `unpack` knows no such file (the page of a login, say); None when it does."""
    with packed.open("rb") as file:
        first = file.read(_TAR_MAGIC_AT + len(_TAR_MAGIC))
    known = first.startswith((_XZ, _GZIP, _HDF5)) or first[_TAR_MAGIC_AT:] == _TAR_MAGIC
    return None if known else f"starts with {first[:20]!r}"


def unpack(packed: Path, target: Path) -> Path:
    """Unpack `packed` into `target`: a folder for a tar archive, a file otherwise; what it is, its bytes tell.

    An HDF5 file that is not packed, whatever its name says, is the file itself.

    Raises:
        DataError: it is none of these, it is damaged, an archive holds what must not be unpacked (links, devices, paths
            that leave the folder), or the disk has less room than the packed file takes.
    """
    if what_is := what_else(packed):
        raise DataError(f"{packed}: {what_is}, but must be {MUST_BE}. Remove it and fetch it again")
    free, size = shutil.disk_usage(target.parent).free, packed.stat().st_size
    if free < size:
        raise DataError(
            f"{target.parent}: has {free / 1e9:.1f} GB free, but must have at least {size / 1e9:.1f} GB to unpack "
            f"{packed.name}. Make room; the same command goes on from here"
        )
    temporary = target.with_name(f".{target.name}.unpacking")
    _remove(temporary)
    try:
        with _opened(packed) as stream:
            first = stream.read(_TAR_MAGIC_AT + len(_TAR_MAGIC))
        with _opened(packed) as stream:
            if first[_TAR_MAGIC_AT:] == _TAR_MAGIC:
                _unpack_tar(packed, stream, temporary)
            else:
                with temporary.open("wb") as file:
                    shutil.copyfileobj(stream, file, _BLOCK_BYTES)
                    file.flush()
                    os.fsync(file.fileno())
    except _DAMAGE as error:
        raise DataError(
            f"{packed}: cannot be unpacked ({error}), but must be a whole archive. Remove it and fetch it again"
        ) from error
    else:
        _the_file_itself(temporary, target.name).rename(target)
    finally:
        _remove(temporary)
    return target


def _unpack_tar(packed: Path, stream: BinaryIO, folder: Path) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise DataError(f"{packed}: must be unpacked by Python 3.11.4 or newer, which can do it safely")
    folder.mkdir()
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            if not member.isfile() and not member.isdir():
                raise DataError(
                    f"{packed}: holds {member.name!r}, but must hold files and folders only. Do not trust it"
                )
            archive.extract(member, folder, filter="data")
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _the_file_itself(unpacked: Path, name: str) -> Path:
    """Some publishers put a single file into an archive: it is then what is wanted, not a folder around it."""
    files = [path for path in unpacked.rglob("*") if path.is_file()]
    return files[0] if len(files) == 1 and files[0].name == name else unpacked


def _opened(packed: Path) -> BinaryIO:
    with packed.open("rb") as file:
        magic = file.read(6)
    if magic == _XZ:
        return cast(BinaryIO, lzma.open(packed, "rb"))
    return cast(BinaryIO, gzip.open(packed, "rb")) if magic[:2] == _GZIP else packed.open("rb")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
