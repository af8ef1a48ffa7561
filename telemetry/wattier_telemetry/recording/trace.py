"""Recordings: a table with one line for each device and sample, written and read as CSV or Parquet.

Only ``time_seconds`` and ``device`` must be there, and ``power_watts`` or ``energy_joules``; `COLUMNS` is what
`wattier-telemetry record` writes. An empty cell is "unknown". Columns of a kind of their own:

    trials            who owned the device from this sample on: ``run/stage/trial/rank:fraction;...`` with names
                      percent-encoded, or ``none``
    throttle_reasons  ``power_cap|software_thermal``, or ``none``
    throttle_seconds  ``power_cap:12.5|software_thermal:0.0``, or ``none``
"""

from __future__ import annotations

import csv
import difflib
import importlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote

from wattier_telemetry.records import DOMAINS, METHODS, Device, Reading

_NO_FIGURES = ("time_seconds", "throttle_reasons", "throttle_seconds", "errors_by_block")
FIGURES = tuple(item.name for item in fields(Reading) if item.name not in _NO_FIGURES)
_DEVICE_TEXTS = ("name", "domain", "method", "package_uuid")
_DEVICE_NUMBERS = ("counter_refresh_seconds", "power_average_seconds")
_HEAD = ("time_seconds", "device", "source", *_DEVICE_TEXTS, *_DEVICE_NUMBERS, "trials")
COLUMNS = (*_HEAD, *FIGURES, "throttle_reasons", "throttle_seconds")
NUMBERS = ("time_seconds", *_DEVICE_NUMBERS, *FIGURES)
_MAY_BE_NEGATIVE = ("time_seconds", "energy_joules", "temperature_celsius", "memory_temperature_celsius")
_BATCH_ROWS = 20_000

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class TraceError(ValueError):
    """A recording cannot be read; the message is one line that names the file, the line and the fault."""


class TrialPart(NamedTuple):
    """One rank of a trial, and the part of the device it owned.

    Attributes:
        run: Name of the run.
        stage: Name of the stage.
        trial: Id of the trial.
        rank: Rank inside the trial.
        fraction: Part of the device, above 0 and up to 1.
    """

    run: str
    stage: str
    trial: str
    rank: int
    fraction: float


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of a recording.

    Attributes:
        device: Who was read; ``index`` is the order in which the file first names it.
        source: Power source that read it; empty = the file does not say.
        reading: What it said.
        trials: Which trials owned it from then on; None = nobody wrote that down.
        known_method: Whether the file says how the joules are known.
    """

    device: Device
    reading: Reading
    source: str = ""
    trials: tuple[TrialPart, ...] | None = None
    known_method: bool = True


def cells(sample: Sample) -> list[str]:
    """Return a sample as the cells of `COLUMNS`."""
    device, reading = sample.device, sample.reading
    row: list[Any] = [reading.time_seconds, device.uuid, sample.source]
    row += [getattr(device, name) for name in (*_DEVICE_TEXTS, *_DEVICE_NUMBERS)]
    row.append(None if sample.trials is None else ";".join(map(_trial_text, sample.trials)) or "none")
    row += [getattr(reading, name) for name in FIGURES]
    reasons, seconds = reading.throttle_reasons, reading.throttle_seconds
    row.append(None if reasons is None else "|".join(reasons) or "none")
    row.append(None if seconds is None else "|".join(f"{key}:{value!r}" for key, value in seconds.items()) or "none")
    return ["" if cell is None else str(cell) for cell in row]


def _trial_text(part: TrialPart) -> str:
    names = "/".join(quote(str(name), safe="") for name in part[:4])
    return f"{names}:{part.fraction!r}"


def read_trace(path: Path, *, warn: Callable[[str], None] = _log.warning) -> Iterator[Sample]:
    """Yield the samples of a recording in the file's order, without holding it in memory.

    Args:
        path: A Parquet file if it ends in ``.parquet``, otherwise a CSV.
        warn: Told, in one line, that the last line was cut off by a kill and left out.

    Raises:
        TraceError: If it cannot be read; the message is one line that names the line (in Parquet the row).
    """
    rows = _parquet_rows(path) if path.suffix == ".parquet" else csv_rows(path, warn)
    last: dict[str, float] = {}
    known: dict[str, Device] = {}
    for where, row in rows:
        sample = _sample(where, row, known)
        uuid, now = sample.device.uuid, sample.reading.time_seconds
        if uuid in last and now <= last[uuid]:
            raise TraceError(f"{where}: time_seconds of {uuid} must grow from line to line")
        last[uuid] = now
        yield sample
    if not last:
        raise TraceError(f"{path}: line 2: the trace is empty; give at least one line of power")


def csv_rows(path: Path, warn: Callable[[str], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each line of a CSV stands, and its cells by column."""
    try:
        with path.open("rb") as file:
            lines = _Lines(file)
            reader = csv.reader(lines, strict=True)
            header = [cell.strip() for cell in next(reader, [])]
            _check_header(f"{path}: line 1", header)
            ours = tuple(header) == COLUMNS
            for row in reader:
                where = f"{path}: line {reader.line_num}"
                if lines.cut and (ours or len(row) != len(header)):
                    warn(f"{where} was cut off when the recording was killed; it is left out")
                    return
                if row and len(row) != len(header):
                    wanted = ",".join(header)
                    raise TraceError(f"{where} has {len(row)} cells, but must have {len(header)}: {wanted}")
                if row:
                    yield where, dict(zip(header, row, strict=True))
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: cannot be read: it holds bytes that are no text (UTF-8)") from error
    except csv.Error as error:
        if lines.cut:  # inside a quoted name
            warn(f"{path}: the last line was cut off when the recording was killed; it is left out")
            return
        raise TraceError(f"{path}: line {reader.line_num}: cannot be read: {error}") from error
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror or error}") from error


@dataclass
class _Lines:
    """The lines of a file as text; ``cut`` tells whether the latest one lacks its end."""

    file: Any
    cut: bool = field(default=False, init=False)
    first: bool = field(default=True, init=False)

    def __iter__(self) -> Iterator[str]:
        for line in self.file:
            self.cut = not line.endswith(b"\n")
            # A letter of several bytes may be cut as well.
            yield line.decode("utf-8-sig" if self.first else "utf-8", "replace" if self.cut else "strict")
            self.first = False


def _check_header(where: str, header: Sequence[str]) -> None:
    absent = [name for name in ("time_seconds", "device") if name not in header]
    if absent or not {"power_watts", "energy_joules"} & set(header):
        shown = ",".join(header)[:200]
        raise TraceError(f"{where} is '{shown}', but must be time_seconds,device,power_watts[,energy_joules][,...]")
    for name in header:
        if name not in COLUMNS:
            close = difflib.get_close_matches(name, COLUMNS, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise TraceError(f"{where}: unknown column '{name[:60]}'.{hint}")
        if list(header).count(name) > 1:
            raise TraceError(f"{where}: column {name} is there twice")


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    arrow, parquet = arrow_modules()
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_header(f"{path}: columns", names)
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise TraceError(f"{path}: cannot be read: {reason}") from error


def arrow_modules() -> tuple[ModuleType, ModuleType]:
    """Return pyarrow and its Parquet module.

    Raises:
        TraceError: If it is not installed.
    """
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise TraceError("Parquet needs pyarrow: pip install pyarrow, or use a file that ends in .csv") from error


def _sample(where: str, row: Mapping[str, Any], known: dict[str, Device]) -> Sample:
    numbers = {name: number(where, name, row[name]) for name in NUMBERS if name in row}
    now = numbers["time_seconds"]
    if now is None:  # an empty cell of Parquet
        raise TraceError(f"{where}: time_seconds is empty")
    uuid = _text(where, row, "device")
    if not uuid:
        raise TraceError(f"{where}: device is empty")
    device = known.get(uuid) or _device(where, uuid, row, numbers, len(known))
    known[uuid] = device
    figures: dict[str, Any] = {name: numbers.get(name) for name in FIGURES}
    reading = Reading(
        now,
        **figures,
        throttle_reasons=_listed(_text(where, row, "throttle_reasons"), str),
        throttle_seconds=_throttle_seconds(where, _text(where, row, "throttle_seconds")),
    )
    trials = _listed(_text(where, row, "trials"), lambda text: _trial(where, text), mark=";")
    return Sample(device, reading, _text(where, row, "source"), trials, bool(_text(where, row, "method")))


def _device(where: str, uuid: str, row: Mapping[str, Any], numbers: Mapping[str, float | None], index: int) -> Device:
    domain, method = _text(where, row, "domain") or "gpu", _text(where, row, "method") or "counter"
    for name, value, allowed in (("domain", domain, DOMAINS), ("method", method, METHODS)):
        if value not in allowed:
            raise TraceError(f"{where}: {name} is '{value[:60]}', but must be one of {', '.join(allowed)}")
    return Device(
        uuid,
        _text(where, row, "name") or uuid,
        domain,  # type: ignore[arg-type]  # just checked
        index,
        method=method,  # type: ignore[arg-type]
        package_uuid=_text(where, row, "package_uuid") or None,
        **{name: numbers.get(name) or 0.0 for name in _DEVICE_NUMBERS},  # type: ignore[arg-type]
    )


def number(where: str, name: str, cell: Any) -> float | None:
    """Return a cell of one of `NUMBERS`, or None if it is empty."""
    if cell in (None, "") and name != "time_seconds":
        return None
    try:
        value = math.nan if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise TraceError(f"{where}: {name} is '{str(cell).strip()[:60]}', but must be a finite number")
    if value < 0 and name not in _MAY_BE_NEGATIVE:
        raise TraceError(f"{where}: {name} is {value:g}, but must not be negative")
    return value


def _text(where: str, row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise TraceError(f"{where}: {name} is '{str(value)[:60]}', but must be text")
    return (value or "").strip()


def _listed(text: str, parse: Callable[[str], _T], *, mark: str = "|") -> tuple[_T, ...] | None:
    if not text:
        return None
    return () if text == "none" else tuple(parse(part) for part in text.split(mark))


def _throttle_seconds(where: str, text: str) -> dict[str, float] | None:
    parts = _listed(text, lambda part: part.rpartition(":"))
    if parts is None:
        return None
    return {reason: number(where, "throttle_seconds", seconds or "''") or 0.0 for reason, _, seconds in parts}


def _trial(where: str, text: str) -> TrialPart:
    names, _, fraction = text.rpartition(":")
    parts = [unquote(name) for name in names.split("/")]
    try:
        part = TrialPart(parts[0], parts[1], parts[2], int(parts[3]), float(fraction))
        good = len(parts) == 4 and 0 < part.fraction <= 1
    except (ValueError, IndexError):
        good = False
    if not good:
        raise TraceError(f"{where}: trials holds '{text[:60]}', but must hold run/stage/trial/rank:fraction")
    return part
