"""Any extended XYZ file that ASE reads, with energy and forces; read one frame at a time."""

from __future__ import annotations

from collections.abc import Iterator
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io.extxyz import read_xyz
from numpy.typing import NDArray

from wattier_gnn.datasets.shard import (
    STREAM_ERRORS,
    Reader,
    cell_or_none,
    checked_array,
    find_shards,
    open_text,
    shard_error,
)
from wattier_gnn.structure import Structure


def shards(path: Path) -> list[Path]:
    """The extended XYZ files under `path` (see `find_shards`)."""
    return find_shards(path, (".extxyz", ".xyz", ".extxyz.xz", ".xyz.xz", ".extxyz.gz", ".xyz.gz"))


def read(path: Path) -> Iterator[Structure]:
    """All frames; ``group=...`` in the comment line names the group, the formula does otherwise.

    Raises:
        ShardError: the file is truncated, malformed, or a frame has no energy.
    """
    for index, atoms in enumerate(iterate_frames(path)):
        energy_ev, forces = labels(path, index, atoms)
        yield Structure(
            numbers=atoms.numbers.astype(np.int64),
            positions_angstrom=atoms.positions.astype(np.float64),
            cell_angstrom=cell_or_none(np.array(atoms.cell, dtype=np.float64)),
            pbc=tuple(atoms.pbc.tolist()),
            energy_ev=energy_ev,
            forces_ev_per_angstrom=forces,
            source="extxyz",
            group=str(atoms.info.get("group", atoms.symbols.get_chemical_formula())),
            key=f"{path.name}/{index}",
        )


def labels(path: Path, index: int, atoms: Atoms) -> tuple[float, NDArray[np.float64] | None]:
    """The energy [eV] and forces [N, 3] [eV/Å] of a frame, raw: constraints do not zero the forces of fixed atoms.

    Raises:
        ShardError: there is no energy, or a label has the wrong shape.
    """
    results: dict[str, Any] = atoms.calc.results if atoms.calc is not None else {}
    if "energy" not in results:
        raise shard_error(path, f"frame {index}", "has no energy", "labelled: energy=<eV> in the comment line")
    energy = checked_array(path, f"frame {index}: energy", results["energy"], (), np.float64)
    if "forces" not in results:
        return float(energy), None
    forces = checked_array(path, f"frame {index}: forces", results["forces"], (len(atoms), 3), np.float64)
    return float(energy), forces


def iterate_frames(path: Path) -> Iterator[Atoms]:
    """The frames one by one, parsed by ASE.

    Raises:
        ShardError: the file is truncated or a frame cannot be parsed.
    """
    for index, text in enumerate(frame_texts(path)):
        try:
            # One frame at a time: given the file, ASE seeks back after each frame, which unpacks an xz file anew
            # (measured on 1,313 frames of OC20: over a minute instead of 0.7 s).
            yield next(read_xyz(StringIO(text), index=slice(None)))
        except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, StopIteration) as error:
            raise shard_error(path, f"frame {index}", f"ASE says {error!r}", "an extended XYZ frame") from error


def frame_texts(path: Path) -> Iterator[str]:
    """The text of each frame: the line with the number of atoms, the comment line, one line an atom.

    Raises:
        ShardError: the file ends within a frame, cannot be unpacked, or has no number where one is due.
    """
    index = 0
    try:
        with open_text(path) as stream:
            while (first := stream.readline()).strip():
                n_atoms = int(first) if first.strip().isdecimal() else -1
                if n_atoms < 0:
                    raise shard_error(path, f"frame {index}", f"starts with {first[:40]!r}", "a number of atoms")
                lines = list(islice(stream, n_atoms + 1))
                if len(lines) < n_atoms + 1 or (n_atoms > 0 and not lines[-1].strip()):
                    is_so = f"ends after {len(lines)} of {n_atoms + 1} lines"
                    raise shard_error(path, f"frame {index}", is_so, "whole")
                yield first + "".join(lines)
                index += 1
    except STREAM_ERRORS as error:
        raise shard_error(path, f"frame {index}", f"cannot be read: {error}", "a whole file") from error


READER = Reader("extxyz", shards, read, "energy (total, eV) and forces (eV/Å) as written in the file")
