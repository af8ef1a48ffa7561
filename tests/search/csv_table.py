"""Reads a table from a CSV, and refuses one that is not sound, in a line that says where, what and what to do."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from search.space import Params
from search.tables import TableProblem, as_epochs, inferred_space

from wattier.errors import UserError, did_you_mean

FIDELITY, LOSS = ("fidelity", "epoch", "epochs"), ("loss", "val_loss")
JOULES, REPEAT = ("joules", "energy_joules"), ("seed", "repeat")
MOST_WORDS = 100


class _Row(NamedTuple):
    line: int
    config: tuple[Any, ...]
    repeat: str
    fidelity: float
    loss: float
    joules: float


def read_table(path: Path) -> TableProblem:
    """A problem named after the file.

    Raises:
        UserError: the file is no such table; the message says why in one line.
    """
    header, lines = _cells(path)
    known = {
        kind[0]: _column(path, header, kind, required=kind is not REPEAT) for kind in (FIDELITY, LOSS, JOULES, REPEAT)
    }
    names = [name for name in header if name not in known.values()]
    if not names:
        _refuse(path, "has no column of a hyper-parameter, but must have one or more. Add them")
    values = {name: _hyper_parameter(path, name, header.index(name), lines) for name in names}
    rows = [
        _Row(
            number,
            tuple(values[name][i] for name in names),
            cells[header.index(known["seed"])] if known["seed"] else "",
            *(
                _number(path, number, known[kind], cells[header.index(known[kind])])
                for kind in ("fidelity", "loss", "joules")
            ),
        )
        for i, (number, cells) in enumerate(lines)
    ]
    return _problem(path, names, rows)


def _problem(path: Path, names: list[str], rows: list[_Row]) -> TableProblem:
    curves: dict[tuple[Any, ...], dict[str, dict[float, _Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        _check(path, row)
        earlier = curves[row.config][row.repeat].setdefault(row.fidelity, row)
        if earlier is not row:
            what = f"repeats line {earlier.line}: the same configuration at fidelity {row.fidelity:g}"
            _refuse(f"{path}:{row.line}", f"{what}, but must not. Remove one, or number repeats in a column `seed`")
    if len(curves) == 1:
        _refuse(path, "holds one configuration, but must hold two or more, or there is nothing to search")
    fidelities = sorted({row.fidelity for row in rows})
    trainings = [list(by_fidelity.values()) for by_repeat in curves.values() for by_fidelity in by_repeat.values()]
    for training in trainings:
        _check_training(path, names, training, fidelities, rows)
    shape = (len(curves), max(map(len, curves.values())), len(fidelities))
    losses, energies = np.full(shape, np.nan), np.full(shape, np.nan)
    for i, by_repeat in enumerate(curves.values()):
        for j, by_fidelity in enumerate(by_repeat.values()):
            losses[i, j] = [by_fidelity[f].loss for f in fidelities]
            energies[i, j] = [by_fidelity[f].joules for f in fidelities]
    configs: list[Params] = [dict(zip(names, config, strict=True)) for config in curves]
    space = inferred_space({name: [config[name] for config in configs] for name in names})
    return TableProblem(path.stem, space, as_epochs(fidelities), configs, losses, energies)


def _check(path: Path, row: _Row) -> None:
    if row.fidelity <= 0:
        _refuse(f"{path}:{row.line}", f"fidelity is {row.fidelity:g}, but must be above 0. Correct it")
    if row.joules <= 0:
        _refuse(f"{path}:{row.line}", f"joules are {row.joules:g}, but must be above 0. Correct them")


def _check_training(
    path: Path, names: list[str], training: list[_Row], fidelities: list[float], rows: list[_Row]
) -> None:
    """A training has all fidelities, and joules that never fall."""
    ordered = sorted(training, key=lambda row: row.fidelity)
    missing = sorted(set(fidelities) - {row.fidelity for row in ordered})
    if missing:
        what = "of the highest fidelity, " if missing[-1] == fidelities[-1] else "of fidelity "
        _refuse(
            f"{path}:{ordered[0].line}",
            f"this configuration has no row {what}{missing[-1]:g}, but must have one at each of the table's "
            f"{len(fidelities)} fidelities. Add it, or remove the configuration{_hint(names, rows)}",
        )
    for before, after in pairwise(ordered):
        if after.joules < before.joules:
            _refuse(
                f"{path}:{after.line}",
                f"joules fall from {before.joules:g} at fidelity {before.fidelity:g} to {after.joules:g} at "
                f"{after.fidelity:g}, but must be cumulative from the start of the training. Add them up",
            )


def _hint(names: list[str], rows: list[_Row]) -> str:
    """A column that is no hyper-parameter but an outcome splits trainings apart: it has about a value a row."""
    for i, name in enumerate(names):
        if len({row.config[i] for row in rows}) > 0.9 * len(rows) > 10:
            return f". Column {name!r} differs in nearly every row: remove it if it is an outcome"
    return ""


def _cells(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and each further line that is not blank with its number."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            found = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
    except OSError as error:
        _refuse(path, f"cannot be read: {error.strerror}. Give the path of a CSV")
    except UnicodeDecodeError:
        _refuse(path, "is not text in UTF-8, but must be a CSV. Export it as one")
    except csv.Error as error:
        _refuse(path, f"is not a CSV: {error}. Export it anew, commas between cells")
    if not found:
        _refuse(path, "is empty, but must be a CSV with a header. Export it anew")
    header = found[0][1]
    if "" in header or len(set(header)) < len(header):
        _refuse(f"{path}:1", "has a column without a name or two of one name, but each must have its own. Rename them")
    for number, cells in found[1:]:
        if any("\0" in cell for cell in cells):
            _refuse(f"{path}:{number}", "holds NUL bytes, but must be text. Export it anew")
        if len(cells) != len(header):
            _refuse(
                f"{path}:{number}", f"has {len(cells)} cells, but must have {len(header)} as the header. Correct it"
            )
    if len(found) == 1:
        _refuse(path, "has a header and no rows, but must have a row a configuration and fidelity. Export it anew")
    return header, found[1:]


def _column(path: Path, header: list[str], kind: tuple[str, ...], *, required: bool) -> str:
    found = [name for name in kind if name in header]
    words = " or ".join(f"`{name}`" for name in kind)
    if len(found) > 1:
        _refuse(
            path, f"has columns {' and '.join(f'`{name}`' for name in found)}, but must have one of them. Remove one"
        )
    if not found and required:
        near = did_you_mean(kind[0], header)
        _refuse(path, f"has no column {words}, but must have one. Name it so{'.' + near if near else ''}")
    return found[0] if found else ""


def _hyper_parameter(path: Path, name: str, place: int, lines: list[tuple[int, list[str]]]) -> list[Any]:
    """Numbers if all cells are, else words."""
    cells = [cells[place] for _, cells in lines]
    if "" in cells:
        _refuse(f"{path}:{lines[cells.index('')][0]}", f"column {name!r} is empty, but must hold a value. Fill it in")
    try:
        numbers = [float(cell) for cell in cells]
    except ValueError:
        if len(set(cells)) > MOST_WORDS:
            what = f"column {name!r} holds {len(set(cells))} different words, but must hold at most {MOST_WORDS}"
            _refuse(path, f"{what}. Remove it if it is the trials' name")
        return cells
    for (line, _), cell, number in zip(lines, cells, numbers, strict=True):
        if not math.isfinite(number):
            _refuse(f"{path}:{line}", f"column {name!r} is {cell[:20]}, but must be a finite number. Correct it")
    return [int(number) for number in numbers] if all(number.is_integer() for number in numbers) else numbers


def _number(path: Path, line: int, name: str, cell: str) -> float:
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        shown = repr(cell if len(cell) <= 20 else cell[:20] + "...")
        _refuse(f"{path}:{line}", f"column {name!r} is {shown}, but must be a finite number. Correct or remove the row")
    return number


def _refuse(where: object, what: str) -> NoReturn:
    raise UserError(f"{where}: {what}.")
