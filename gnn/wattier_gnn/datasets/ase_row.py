"""One row of an ASE database, as JSON or as a record of columns, turned into a structure without ASE's own decoder.

ASE allocates whatever shape a row announces before it looks at the numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from ase.symbols import Symbols
from numpy.typing import NDArray

from wattier_gnn.datasets.shard import Identity, cell_or_none, checked_array, shard_error
from wattier_gnn.structure import Structure

Row = Mapping[str, Any]
SYMBOLS: tuple[str, ...] = tuple(chemical_symbols)  # by atomic number; 0 is no element


def parse_row(path: Path, inside: str, text: str | bytes) -> Row:
    """The row that a JSON text holds; empty for an empty text.

    Raises:
        ShardError: it is no JSON object.
    """
    try:
        row = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise shard_error(path, inside, f"is no JSON ({error})", "a row of an ASE database") from error
    if not isinstance(row, dict):
        raise shard_error(path, inside, f"is a {type(row).__name__}", "a row of an ASE database")
    return row


def row_structure(path: Path, inside: str, row: Row, identity: Identity) -> Structure:
    """The structure of a row: its energy, and its forces before constraints.

    Args:
        path: the file, for messages.
        inside: the row, for messages.
        row: ``numbers``, ``positions``, ``energy``; where known ``cell``, ``pbc``, ``forces``.
        identity: what it is to be called.

    Raises:
        ShardError: a field is missing or has the wrong shape.
    """
    for name in ("numbers", "positions", "energy"):
        if row.get(name) is None:
            raise shard_error(path, inside, f"has no {name}", "a row with numbers, positions and energy")
    numbers = row_array(path, f"{inside}: numbers", row["numbers"], ("atoms",), np.int64)
    shape = (len(numbers), 3)
    cell, forces = row.get("cell"), row.get("forces")
    return Structure(
        numbers=numbers,
        positions_angstrom=row_array(path, f"{inside}: positions", row["positions"], shape, np.float64),
        cell_angstrom=None if cell is None else cell_or_none(row_array(path, f"{inside}: cell", cell, (3, 3))),
        pbc=_pbc(path, f"{inside}: pbc", row.get("pbc")),
        energy_ev=float(row_array(path, f"{inside}: energy", row["energy"], ())),
        forces_ev_per_angstrom=None if forces is None else row_array(path, f"{inside}: forces", forces, shape),
        source=identity.source,
        group=formula(numbers) if identity.group is None else identity.group,
        key=identity.key,
    )


def row_array(
    path: Path, inside: str, value: Any, shape: tuple[int | str, ...], dtype: type[np.generic] = np.float64
) -> NDArray[Any]:
    """A field of a row: plain JSON, or ASE's ``{"__ndarray__": [shape, dtype, numbers]}``.

    Raises:
        ShardError: as for `checked_array`, or it announces more numbers than it holds.
    """
    if isinstance(value, Mapping):
        value = value.get("array", value)  # a cell object
    if isinstance(value, Mapping):
        value = _announced(path, inside, value.get("__ndarray__"))
    if shape and isinstance(value, list | np.ndarray) and len(value) == 0 and shape[0] in (0, "atoms"):
        value = np.empty([0, *shape[1:]])  # JSON has no empty [0, 3]
    return checked_array(path, inside, value, shape, dtype)


def formula(numbers: NDArray[np.int64]) -> str:
    """The chemical formula in Hill's order, which groups rows that name no group."""
    try:
        return str(Symbols(numbers).get_chemical_formula())
    except (IndexError, KeyError):
        return "unknown element"


def _announced(path: Path, inside: str, parts: Any) -> NDArray[Any]:
    match parts:
        case [list() as shape, str(), list() as flat] if all(isinstance(n, int) and n >= 0 for n in shape):
            if prod(shape) == len(flat):
                return np.array(flat).reshape(shape)
            raise shard_error(path, inside, f"announces {shape} and holds {len(flat)} numbers", "whole")
        case _:
            raise shard_error(path, inside, "is no array", "[shape, type, numbers]")


def _pbc(path: Path, inside: str, value: Any) -> tuple[bool, bool, bool]:
    if value is None:
        return (False, False, False)
    if isinstance(value, Mapping):
        value = _announced(path, inside, value.get("__ndarray__"))
    flags = [value] * 3 if isinstance(value, bool) else list(value) if isinstance(value, list | np.ndarray) else []
    if len(flags) != 3 or any(flag not in (0, 1) for flag in flags):
        raise shard_error(path, inside, f"is {value!r:.40}", "three booleans")
    return (bool(flags[0]), bool(flags[1]), bool(flags[2]))
