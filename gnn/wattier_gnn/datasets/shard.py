"""What all dataset readers share: the record of a reader, the search for its files, checks of what they hold."""

from __future__ import annotations

import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

import h5py
import numpy as np
from numpy.typing import NDArray

from wattier_gnn.structure import DataError, ShardError, Structure

COMPRESSIONS = (".xz", ".gz")

# What a damaged or truncated stream raises under lzma, gzip and text decoding (UnicodeDecodeError is a ValueError).
STREAM_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError)

Shape = tuple[int | str, ...]


class Reader(NamedTuple):
    """How one dataset is read.

    Attributes:
        name: the dataset's name, which becomes ``Structure.source``.
        shards: the files of a dataset, given one file or their folder, in a fixed order.
        read: the structures of one file. May raise ShardError after having yielded some; those are sound.
        energy: which of the dataset's energies and forces are taken, in words.
    """

    name: str
    shards: Callable[[Path], list[Path]]
    read: Callable[[Path], Iterator[Structure]]
    energy: str


def find_shards(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """The file itself, or the files of a folder (not of folders inside it) with one of the suffixes, 2 before 10.

    Folders inside are left alone: they tend to be ``train`` and ``val``, which must not be mixed by accident. Of a file
    that lies there both packed and unpacked only the unpacked one is taken.

    Raises:
        DataError: the path does not exist, or the folder holds no such file.
    """
    wanted = " or ".join(f"*{suffix}" for suffix in suffixes)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: does not exist, but must be a file or a folder of {wanted}. Check the path")
    found: dict[str, Path] = {}
    for suffix in sorted(suffixes, key=lambda suffix: suffix.endswith(COMPRESSIONS)):
        for file in path.glob(f"*{suffix}"):
            if file.is_file():
                found.setdefault(_unpacked_name(file), file)
    if not found:
        raise DataError(
            f"{path}: holds no file {wanted}, but must hold at least one (folders inside it are not searched). "
            "Give the folder that holds the files, or one file"
        )
    return sorted(found.values(), key=_natural_order)


def shard_error(path: Path, inside: str, what_is: str, what_must_be: str) -> ShardError:
    """The one-line report of a file that cannot be used."""
    where = f"{path}: {inside}" if inside else str(path)
    return ShardError(
        f"{where}: {what_is}, but must be {what_must_be}. "
        "Fetch the file again, or take it away if it belongs to another dataset"
    )


def checked_array(path: Path, inside: str, value: Any, shape: Shape, dtype: type[np.generic]) -> NDArray[Any]:
    """`value` as an array of `dtype` and `shape`; a word in `shape` stands for any length.

    Raises:
        ShardError: not numeric, another shape, or numbers that are no integers where integers are due.
    """
    must_be = f"numbers [{', '.join(map(str, shape))}]"
    try:
        array = np.asarray(value)
        if array.dtype == object:  # JSON null among numbers
            array = array.astype(np.float64)
    except (ValueError, TypeError) as error:
        raise shard_error(path, inside, str(error), must_be) from error
    fits = array.ndim == len(shape) and all(
        isinstance(due, str) or due == length for due, length in zip(shape, array.shape, strict=True)
    )
    if array.dtype.kind not in "iuf" or not fits:
        raise shard_error(path, inside, f"is {array.dtype} {list(array.shape)}", must_be)
    if np.issubdtype(dtype, np.integer) and array.dtype.kind == "f" and not (array == np.rint(array)).all():
        raise shard_error(path, inside, "holds fractions or NaN", f"whole {must_be}")
    return array.astype(dtype, copy=False)


def open_hdf5(path: Path) -> h5py.File:
    """The file, opened for reading.

    Raises:
        ShardError: HDF5 cannot open it (truncated, or no HDF5 at all).
    """
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise shard_error(path, "", f"HDF5 says {error}", "a whole HDF5 file") from error


def hdf5_group(path: Path, parent: h5py.Group, name: str) -> h5py.Group:
    """The group `name` inside `parent`.

    Raises:
        ShardError: it is something else or cannot be read.
    """
    inside = f"{parent.name.rstrip('/')}/{name}"
    try:
        group = parent[name]
    except (KeyError, OSError, RuntimeError) as error:
        raise shard_error(path, inside, f"HDF5 says {error}", "a group") from error
    if not isinstance(group, h5py.Group):
        raise shard_error(path, inside, f"is a {type(group).__name__}", "a group")
    return group


def hdf5_array(path: Path, group: h5py.Group, name: str, shape: Shape, dtype: type[np.generic]) -> NDArray[Any]:
    """The dataset `name` of `group`, checked as by `checked_array`.

    Raises:
        ShardError: it is missing, cannot be read, or has another shape or type.
    """
    inside = f"{group.name}/{name}"
    try:
        values = group[name][()]
    except (KeyError, OSError, RuntimeError, AttributeError, TypeError) as error:
        must_be = f"a dataset [{', '.join(map(str, shape))}]"
        raise shard_error(path, inside, f"HDF5 says {error}", must_be) from error
    return checked_array(path, inside, values, shape, dtype)


def open_text(path: Path) -> TextIO:
    """The file as text, unpacked on the way when its name ends in .xz or .gz."""
    if path.suffix == ".xz":
        return cast(TextIO, lzma.open(path, "rt", encoding="utf-8"))
    if path.suffix == ".gz":
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8"))
    return path.open(encoding="utf-8")


def cell_or_none(cell: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """The cell [3, 3]; None for the all-zero cell by which several formats say that there is none."""
    return cell if cell.any() else None


def _unpacked_name(file: Path) -> str:
    return file.name.removesuffix(file.suffix) if file.suffix in COMPRESSIONS else file.name


def _natural_order(file: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", file.name)]
