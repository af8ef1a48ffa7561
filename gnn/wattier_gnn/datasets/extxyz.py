"""Any extended XYZ file that ASE reads, with energy and forces; read one frame at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from ase import Atoms
from ase.io.extxyz import read_xyz
from numpy.typing import NDArray

from wattier_gnn.datasets.shard import (
    MOST_ATOMS,
    MOST_RECORD_BYTES,
    STREAM_ERRORS,
    Identity,
    Reader,
    cell_or_none,
    checked_array,
    find_shards,
    open_binary,
    or_bad,
    shard_error,
)
from wattier_gnn.structure import BadRecord, Structure

LONGEST_LINE_BYTES = 1 << 20
MOST_COLUMNS = 1000

_PROPERTIES = re.compile(rb"Properties\s*=\s*[\"']?([^\s\"']*)")
_PARSER_ERRORS = (
    OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration, RuntimeError, AssertionError,
    ArithmeticError, MemoryError,
)  # fmt: skip


def shards(path: Path) -> list[Path]:
    """The extended XYZ files under `path` (see `find_shards`)."""
    return find_shards(path, (".extxyz", ".xyz", ".extxyz.xz", ".xyz.xz", ".extxyz.gz", ".xyz.gz"))


def read(path: Path) -> Iterator[Structure | BadRecord]:
    """All frames; ``group=...`` in the comment line names the group, the formula does otherwise.

    Raises:
        ShardError: the file is truncated, or has no number of atoms where one is due.
    """
    for index, text in enumerate(frame_texts(path)):
        yield or_bad(
            path, partial(frame_structure, path, index, text, Identity("extxyz", None, f"{path.name}/{index}"))
        )


def frame_structure(path: Path, index: int, text: bytes, identity: Identity) -> Structure:
    """The structure of one frame with its energy and forces, raw: constraints do not zero those of fixed atoms.

    Args:
        path: the file, for messages.
        index: which frame, for messages.
        text: the frame.
        identity: what it is to be called.

    Raises:
        ShardError: the frame cannot be parsed, has no energy, or a label has the wrong shape.
    """
    atoms = parse_frame(path, index, text)
    energy_ev, forces = _labels(path, index, atoms)
    group = identity.group
    if group is None:
        named = atoms.info.get("group")  # 0 and F are names too
        group = atoms.symbols.get_chemical_formula() if named is None else str(named)
    return Structure(
        numbers=atoms.numbers.astype(np.int64),
        positions_angstrom=atoms.positions.astype(np.float64),
        cell_angstrom=cell_or_none(np.array(atoms.cell, dtype=np.float64)),
        pbc=tuple(atoms.pbc.tolist()),
        energy_ev=energy_ev,
        forces_ev_per_angstrom=forces,
        source=identity.source,
        group=group,
        key=identity.key,
    )


def frame_texts(path: Path) -> Iterator[bytes]:
    """The text of each frame: the line with the number of atoms, the comment line, one line an atom.

    Raises:
        ShardError: the file ends within a frame, cannot be unpacked, or has no number where one is due.
    """
    index = 0
    try:
        with open_binary(path) as stream:
            while (first := stream.readline(LONGEST_LINE_BYTES)).strip():
                yield first + b"".join(_frame_lines(path, index, stream, first))
                index += 1
    except STREAM_ERRORS as error:
        raise shard_error(path, f"frame {index}", f"cannot be read: {error}", "a whole file") from error


def _frame_lines(path: Path, index: int, stream: BinaryIO, first: bytes) -> Iterator[bytes]:
    inside = f"frame {index}"
    n_atoms = int(first) if first.strip().isdigit() and len(first) < 100 else -1
    if n_atoms < 0:
        raise shard_error(path, inside, f"starts with {first[:40]!r}", "a number of atoms")
    if n_atoms > MOST_ATOMS:
        raise shard_error(path, inside, f"announces {n_atoms:,} atoms", f"of {MOST_ATOMS:,} at most")
    size = 0
    for number in range(n_atoms + 1):
        line = stream.readline(LONGEST_LINE_BYTES)
        size += len(line)
        # A blank line where an atom is due: the frame that follows would be taken for atoms of this one.
        if not line or (number == n_atoms > 0 and not line.strip()):
            raise shard_error(path, inside, f"ends after {number} of {n_atoms + 1} lines", "whole")
        if len(line) == LONGEST_LINE_BYTES or size > MOST_RECORD_BYTES:
            raise shard_error(path, inside, f"goes on after {size:,} bytes", "shorter")
        yield line


def parse_frame(path: Path, index: int, text: bytes) -> Atoms:
    """What ASE makes of one frame.

    Raises:
        ShardError: it is no frame.
    """
    inside, must_be = f"frame {index}", "an extended XYZ frame"
    comment = text.split(b"\n", 2)[1]
    announced = _PROPERTIES.search(comment)
    counts = announced.group(1).split(b":")[2::3] if announced else []
    if (n_columns := sum(int(n[:9]) for n in counts if n.isdigit())) > MOST_COLUMNS:
        raise shard_error(path, inside, f"announces {n_columns:,} columns", f"of {MOST_COLUMNS:,} at most")
    try:
        # One frame at a time: given the file, ASE seeks back after each frame, which unpacks an xz file anew
        # (measured on 1,313 frames of OC20: over a minute instead of 0.7 s).
        return next(read_xyz(StringIO(text.decode("utf-8")), index=slice(None)))
    except _PARSER_ERRORS as error:
        raise shard_error(path, inside, f"ASE says {error!r}", must_be) from error


def _labels(path: Path, index: int, atoms: Atoms) -> tuple[float, NDArray[np.float64] | None]:
    results: dict[str, Any] = atoms.calc.results if atoms.calc is not None else {}
    if "energy" not in results:
        raise shard_error(path, f"frame {index}", "has no energy", "labelled: energy=<eV> in the comment line")
    energy = checked_array(path, f"frame {index}: energy", results["energy"], (), np.float64)
    if "forces" not in results:
        return float(energy), None
    forces = checked_array(path, f"frame {index}: forces", results["forces"], (len(atoms), 3), np.float64)
    return float(energy), forces


READER = Reader("extxyz", shards, read, "energy (total, eV) and forces (eV/Å) as written in the file")
