"""What all dataset readers share: the record of a reader, the search for its files, checks of what they hold."""

from __future__ import annotations

import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from wattier_gnn.structure import BadRecord, DataError, ShardError, Structure

COMPRESSIONS = (".xz", ".gz")
BUFFER_BYTES = 1 << 20
# No released structure has a thousand atoms; a file that announces more than this is damaged, or wants our memory.
MOST_ATOMS = 1_000_000
# No record of a release is near this large; what unpacks to more is a bomb.
MOST_RECORD_BYTES = 64 << 20

# What a damaged or truncated stream raises under lzma, gzip and text decoding (UnicodeDecodeError is a ValueError).
STREAM_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError)

Shape = tuple[int | str, ...]


class Reader(NamedTuple):
    """How one dataset is read.

    Attributes:
        name: the dataset's name, which becomes ``Structure.source``.
        shards: the files of a dataset, given one file or their folder, in a fixed order.
        read: the structures of one file, and in the place of one that is damaged a BadRecord. Raises ShardError where
            the file cannot be read on; what it has yielded until then is sound.
        energy: which of the dataset's energies and forces are taken, in words; they belong together.
        method: the level of theory; None where every file may have another.
        licence: of the release; None where it is not known.
        citation: what to cite; None where it is not known.
        one_layout: all files must have one suffix, since another layout holds the same frames under other names.
        beside: the other files that reading a file takes, as far as they are there.
    """

    name: str
    shards: Callable[[Path], list[Path]]
    read: Callable[[Path], Iterator[Structure | BadRecord]]
    energy: str
    method: str | None = None
    licence: str | None = None
    citation: str | None = None
    one_layout: bool = False
    beside: Callable[[Path], list[Path]] = lambda _path: []


class Identity(NamedTuple):
    """What a structure is to be called.

    Attributes:
        source: name of the dataset.
        group: see ``Structure.group``; None for the one the record itself names, or its chemical formula.
        key: names the structure within its source.
    """

    source: str
    group: str | None
    key: str


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
        what_is = "is neither file nor folder" if path.is_symlink() or path.exists() else "does not exist"
        raise DataError(f"{path}: {what_is}, but must be a file or a folder of {wanted}. Check the path")
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


def one_layout(path: Path, files: list[Path]) -> list[Path]:
    """`files`, when they are all of one layout: the same frames in two layouts would be read twice.

    Raises:
        DataError: they are not.
    """
    layouts = sorted({Path(_unpacked_name(file)).suffix for file in files})
    if len(layouts) > 1:
        raise DataError(
            f"{path}: holds {' and '.join(f'*{layout}' for layout in layouts)}, but must hold one layout of a dataset: "
            "the same frames would be read twice. Give one file, or a folder with one layout"
        )
    return files


def shard_error(path: Path, inside: str, what_is: str, what_must_be: str) -> ShardError:
    """The one-line report of a file that cannot be used."""
    where = f"{path}: {inside}" if inside else str(path)
    return ShardError(
        f"{where}: {what_is}, but must be {what_must_be}. "
        "Fetch the file again, or take it away if it belongs to another dataset"
    )


def or_bad(path: Path, make: Callable[[], Structure]) -> Structure | BadRecord:
    """What `make` returns, or its complaint about the record of `path` it was to be made of."""
    try:
        structure = make()
        f"{structure.group}{structure.key}".encode()  # JSON may hold half of a surrogate pair
    except UnicodeEncodeError:
        return BadRecord(str(shard_error(path, f"{structure.group}/{structure.key}", "is no text", "named in Unicode")))
    except DataError as error:
        return BadRecord(str(error))
    return structure


def checked_array(path: Path, inside: str, value: Any, shape: Shape, dtype: type[np.generic]) -> NDArray[Any]:
    """`value` as an array of `dtype` and `shape`; a word in `shape` stands for any length up to `MOST_ATOMS`.

    Raises:
        ShardError: not numeric, another shape, or numbers that are no integers where integers are due.
    """
    must_be = f"numbers [{', '.join(map(str, shape))}]"
    try:
        array = np.asarray(value)
        # Before any copy is made: an array that is a view of one number may announce any shape.
        fits = array.ndim == len(shape) and all(
            length <= MOST_ATOMS if isinstance(due, str) else due == length
            for due, length in zip(shape, array.shape, strict=True)
        )
        if array.dtype == object and fits:  # JSON null among numbers
            array = array.astype(np.float64)
    except (ValueError, TypeError, MemoryError, OverflowError, RecursionError) as error:
        raise shard_error(path, inside, str(error) or type(error).__name__, must_be) from error
    if array.dtype.kind not in "iuf" or not fits:
        raise shard_error(path, inside, f"is {array.dtype} {list(array.shape)}", must_be)
    if np.issubdtype(dtype, np.integer) and array.dtype.kind == "f" and not (array == np.rint(array)).all():
        raise shard_error(path, inside, "holds fractions or NaN", f"whole {must_be}")
    with np.errstate(invalid="ignore", over="ignore"):  # 1e300 as an atomic number: cleaning sees nonsense, not a crash
        return array.astype(dtype, copy=False)


def open_binary(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked on the way when its name ends in .xz or .gz."""
    if path.suffix not in COMPRESSIONS:
        return path.open("rb")
    unpacker: Any = lzma.LZMAFile if path.suffix == ".xz" else gzip.GzipFile
    return io.BufferedReader(unpacker(path), BUFFER_BYTES)  # their own readline is Python, and slow


def open_text(path: Path) -> TextIO:
    """The file as text in UTF-8, unpacked as by `open_binary`."""
    return io.TextIOWrapper(open_binary(path), encoding="utf-8")


def cell_or_none(cell: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """The cell [3, 3]; None for the all-zero cell by which several formats say that there is none."""
    return cell if cell.any() else None


def _unpacked_name(file: Path) -> str:
    return file.name.removesuffix(file.suffix) if file.suffix in COMPRESSIONS else file.name


def _natural_order(file: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", file.name)]
