"""Results of others as a CSV file: a header, then one trial a line. Everything wrong with it is told in one line."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from wattier.config_space import ChoiceParameter, RangeParameter
from wattier.errors import UserError, did_you_mean
from wattier.records import Params
from wattier.strict_yaml import describe

MAX_BYTES = 64_000_000
FIGURES = {
    "val_loss": "val_loss", "loss": "val_loss", "energy_joules": "energy_joules", "joules": "energy_joules",
    "structures": "structures", "epochs": "epochs",
}  # fmt: skip
Space = Mapping[str, RangeParameter | ChoiceParameter]


class TableRow(NamedTuple):
    """One trial of a table; a figure is None where its cell is empty or its column is not there."""

    line: int
    params: Params
    val_loss: float
    energy_joules: float | None
    structures: int | None
    epochs: int | None


def read_table(path: Path, space: Space, known: Collection[str]) -> list[TableRow]:
    """Read a table whose columns are parameters, ``val_loss`` (or ``loss``), ``energy_joules`` (or ``joules``), and
    perhaps ``structures`` and ``epochs``.

    Args:
        path: the file, UTF-8.
        space: the parameters that must each have a column.
        known: further settings that may have one.

    Raises:
        UserError: anything is wrong, with the line where it is.
    """
    rows = _rows(path)
    try:
        _, header = next(rows)
    except StopIteration:
        raise UserError(f"{path}: is empty, but must have a header and a trial a line. Is it the right file?") from None
    columns = _columns(path, header, space, known)
    trials = [_row(path, line, dict(zip(columns, cells, strict=True)), space) for line, cells in rows]
    if not trials:
        raise UserError(f"{path}: has a header and no trials. Is it the right file?")
    return trials


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each row that is not empty, all of one length."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    width = None
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num} is no CSV ({error}). Mend that line.") from error
        cells = [cell.strip() for cell in cells]
        if not any(cells):
            continue
        if width is not None and len(cells) != width:
            raise UserError(
                f"{path}: line {reader.line_num} has {len(cells)} cells, but the header has {width}. Mend that line."
            )
        width = len(cells)
        yield reader.line_num, cells


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            raise UserError(f"{path}: is no file. Give a run directory or a CSV file.")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path}: is {size} bytes, but a table must be under {MAX_BYTES}. Is it the right file?")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Mend that.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}). Save it as CSV in UTF-8.") from error
    if "\0" in text:
        raise UserError(f"{path}: is not text. Save it as CSV in UTF-8.")
    return text


def _columns(path: Path, header: list[str], space: Space, known: Collection[str]) -> list[str]:
    """The header, figures under one name each.

    Raises:
        UserError: a column is unknown, given twice or missing.
    """
    allowed = {*space, *known, *FIGURES}
    columns = [name if name in space else FIGURES.get(name, name) for name in header]
    for name, column in zip(header, columns, strict=True):
        if name not in allowed:
            hint = did_you_mean(name, allowed)
            if not hint and len(header) == 1 and (";" in name or "\t" in name):
                hint = " Cells must be separated by commas."
            raise UserError(
                f"{path}: column {describe(name)} is no parameter and no figure.{hint or ' Remove the column.'}"
            )
        if columns.count(column) > 1:
            raise UserError(f"{path}: column {column!r} is given twice. Remove one of them.")
    for name in (*space, "val_loss"):
        if name not in columns:
            raise UserError(f"{path}: has no column {name!r}. Add it, or remove the file from search.warm_start.")
    if "structures" in columns and "epochs" not in columns:
        raise UserError(f"{path}: has a column 'structures', but none 'epochs'. Add it, or remove structures.")
    return columns


def _row(path: Path, line: int, cells: dict[str, str], space: Space) -> TableRow:
    figures = {name: cells.pop(name) for name in ("val_loss", "energy_joules", "structures", "epochs") if name in cells}
    loss = _number(path, line, "val_loss", figures["val_loss"])
    joules, structures, epochs = (
        _number(path, line, name, figures[name]) if figures.get(name) else None
        for name in ("energy_joules", "structures", "epochs")
    )
    if joules is not None and joules <= 0:
        raise UserError(
            f"{path}: line {line}: energy_joules is {joules:g}, but must be above 0. Leave unknown ones empty."
        )
    for name, count in (("structures", structures), ("epochs", epochs)):
        if count is not None and (count < 1 or count != int(count)):
            raise UserError(f"{path}: line {line}: {name} is {count:g}, but must be a whole number from 1 on. Mend it.")
    if structures is not None and epochs is None:
        raise UserError(f"{path}: line {line}: structures is given and epochs is empty. Give both, or neither.")
    return TableRow(
        line,
        {name: _value(path, line, name, cell, space.get(name)) for name, cell in cells.items()},
        loss,
        joules,
        None if structures is None else int(structures),
        None if epochs is None else int(epochs),
    )


def _value(path: Path, line: int, name: str, cell: str, parameter: RangeParameter | ChoiceParameter | None) -> object:
    """A parameter's value: a number for a range, and what is written like a choice for choices."""
    if isinstance(parameter, RangeParameter):
        number = _number(path, line, name, cell)
        return int(number) if number == int(number) else number
    choices = parameter.choices if parameter else []
    if not cell and parameter is None:
        return None
    written = [choice for choice in choices if str(choice).lower() == cell.lower()]
    if written:
        return written[0]
    if cell.lower() in ("true", "false"):
        return cell.lower() == "true"
    try:
        number = float(cell)
    except ValueError:
        return cell
    return number if math.isfinite(number) else cell


def _number(path: Path, line: int, name: str, cell: str) -> float:
    try:
        number = float(cell) if "_" not in cell else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        shown = describe(cell) if cell else "empty"
        raise UserError(
            f"{path}: line {line}: {name} is {shown}, but must be a finite number. Mend it, or remove the line."
        )
    return number
