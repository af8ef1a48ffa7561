"""Frames of any file that ASE reads without running what is in it, one at a time."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from ase import Atoms
from ase.io import iread
from ase.io.formats import UnknownFileTypeError, filetype
from ase.io.trajectory import TrajectoryReader

from wattier_gnn.datasets.extxyz import frame_texts, parse_frame
from wattier_gnn.structure import BadRecord, DataError, ShardError

# Formats of ASE whose readers parse text, or numbers of a stated type: none of them unpickles, evaluates, or asks a
# server, as others do (gpw, postgresql, old trajectories), and plug-ins of other packages may.
FORMATS = frozenset({
    "aims", "aims-output", "castep-castep", "castep-cell", "castep-geom", "castep-md", "cfg", "cif", "crystal", "cube",
    "db", "dftb", "dlp4", "dmol-car", "espresso-in", "espresso-out", "extxyz", "gaussian-in", "gaussian-out", "gen",
    "gromacs", "json", "lammps-data", "lammps-dump-text", "magres", "mol", "nwchem-in", "nwchem-out", "orca-output",
    "proteindatabank", "res", "rmc6f", "sdf", "siesta-xv", "struct", "traj", "turbomole", "vasp", "vasp-out",
    "vasp-xdatcar", "vasp-xml", "xsd", "xsf", "xyz",
})  # fmt: skip
SQLITE = b"SQLite format 3\0"


class Frame(NamedTuple):
    """One structure of a file."""

    path: Path
    number: int
    atoms: Atoms

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.path}: frame {self.number}"


def frames(path: Path) -> Iterator[Frame | BadRecord]:
    """All frames of a file, and in the place of one that cannot be read a BadRecord, where those after it can.

    Raises:
        DataError: no such file, a format that is unknown or not safe to read, or one whose rest cannot be read.
    """
    kind = format_of(path)
    if kind in ("extxyz", "xyz"):
        yield from _of_xyz(path)
    elif kind == "traj" and path.suffix == ".traj":
        yield from _of_trajectory(path)
    else:
        if kind == "db":
            _refuse_other_databases(path)
        yield from _of_ase(path, kind)


def format_of(path: Path) -> str:
    """ASE's name of a file's format.

    Raises:
        DataError: no such file, or a format that is unknown or not safe to read.
    """
    if not path.is_file():
        what_is = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path}: {what_is}, but must be a file of structures. Check the path.")
    try:
        kind = str(filetype(str(path)))
    except (UnknownFileTypeError, OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: has no format that ASE knows ({error}). Write it as .xyz, .cif or .traj.") from error
    if kind not in FORMATS:
        raise DataError(
            f"{path}: is of the format {kind!r}, but must be one that is read as plain text or numbers, such as "
            "extxyz, traj, cif or vasp. Convert it where you trust it: ase convert FILE out.xyz."
        )
    return kind


def _of_xyz(path: Path) -> Iterator[Frame | BadRecord]:
    for index, text in enumerate(frame_texts(path)):
        try:
            yield Frame(path, index, parse_frame(path, index, text))
        except ShardError as error:
            yield BadRecord(str(error))


def _of_trajectory(path: Path) -> Iterator[Frame | BadRecord]:
    try:
        reader = TrajectoryReader(str(path))
    except Exception as error:  # ASE's readers have no error of their own
        raise _unreadable(path, None, error) from error
    with reader:
        for index in range(len(reader)):
            try:
                frame = Frame(path, index, reader[index])
            except Exception as error:  # noqa: BLE001
                yield BadRecord(str(_unreadable(path, index, error)))
            else:
                yield frame


def _of_ase(path: Path, kind: str) -> Iterator[Frame]:
    found = iread(path, index=":", format=kind, do_not_split_by_at_sign=True)
    index = 0
    while True:
        try:
            atoms = next(found)
        except StopIteration:
            break
        except Exception as error:
            raise _unreadable(path, index, error) from error
        yield Frame(path, index, atoms)
        index += 1
    if not index:
        raise DataError(f"{path}: holds no structure, but must hold at least one. Check the path.")


def _refuse_other_databases(path: Path) -> None:
    """ASE makes its tables in an SQLite file that has none, and takes another suffix for another kind of database."""
    with path.open("rb") as file:
        is_sqlite = file.read(len(SQLITE)) == SQLITE
    try:
        if is_sqlite:
            with closing(sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True)) as database:
                database.execute("SELECT id FROM systems LIMIT 1")
            return
    except sqlite3.Error as error:
        raise _unreadable(path, None, error) from error
    raise DataError(f"{path}: is no SQLite file, but a .db must be one of ASE. Write it as .xyz, .cif or .traj.")


def _unreadable(path: Path, index: int | None, error: Exception) -> DataError:
    where = path if index is None else f"{path}: frame {index}"
    return DataError(
        f"{where}: cannot be read ({type(error).__name__}: {str(error)[:200]}), but must be whole. Get or write the "
        "file again."
    )
