"""Recording: every device of some sources, again and again, into a CSV or Parquet file."""

from __future__ import annotations

import csv
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

from wattier_telemetry.recording.trace import (
    COLUMNS,
    NUMBERS,
    Sample,
    TraceError,
    TrialPart,
    arrow_modules,
    cells,
    csv_rows,
    number,
)
from wattier_telemetry.records import Device, Reading
from wattier_telemetry.registration import TrialRegistration, read_registrations
from wattier_telemetry.source import PowerSource

_FLUSH_SECONDS = 1.0
_TRIALS_SECONDS = 0.5  # registrations are files: at 100 readings a second they are not worth as many looks
_BATCH_ROWS = 20_000


class TraceWriter:
    """Writes samples to a file that is named ``.csv`` or ``.parquet``.

    Parquet cannot be read before its end is written. So a CSV beside it grows first, which survives a kill, and
    becomes the Parquet file when the writer is closed.

    Args:
        path: File to make.

    Raises:
        TraceError: If the name ends otherwise, the file is there already, or pyarrow is missing.
        OSError: If it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix not in (".csv", ".parquet"):
            raise TraceError(f"{path}: a recording must be named .csv or .parquet")
        if path.suffix == ".parquet":
            arrow_modules()
        self.path = path
        self.growing = path if path.suffix == ".csv" else path.with_name(f"{path.name}.partial.csv")
        for file in (path, self.growing):
            if file.exists():
                raise TraceError(f"{file} exists already; choose another name, or move it away")
        self._file = self.growing.open("x", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file, lineterminator="\n")
        self._rows.writerow(COLUMNS)
        self._file.flush()
        self._flushed = time.monotonic()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Finish the file."""
        self.close()

    def add(self, samples: Sequence[Sample]) -> None:
        """Write samples; at most a second of them is lost to a kill."""
        self._rows.writerows(map(cells, samples))
        if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Finish the file. Closing twice is harmless."""
        if self._file.closed:
            return
        self._file.close()
        if self.growing != self.path:
            _to_parquet(self.growing, self.path)
            self.growing.unlink()


def _to_parquet(source: Path, target: Path) -> None:
    arrow, parquet = arrow_modules()
    schema = arrow.schema([(name, arrow.float64() if name in NUMBERS else arrow.string()) for name in COLUMNS])
    temporary = target.with_name(f".{target.name}.tmp")
    rows = csv_rows(source, lambda _: None)
    with parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for columns in _batches(rows):
            writer.write_table(arrow.table(columns, schema=schema))
    temporary.replace(target)


def _batches(rows: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, list[Any]]]:
    while batch := list(islice(rows, _BATCH_ROWS)):
        columns: dict[str, list[Any]] = {}
        for name in COLUMNS:
            if name in NUMBERS:
                columns[name] = [number(where, name, row[name]) for where, row in batch]
            else:
                columns[name] = [row[name] or None for _, row in batch]
        yield columns


class Owners:
    """Which trials own which device, asked of the registry a few times a second.

    Args:
        folder: Where trials register. None = the default folder of this user.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._asked = float("-inf")
        self.registrations: list[TrialRegistration] = []
        self._parts: dict[str, tuple[TrialPart, ...]] = {}

    def of(self, device: Device) -> tuple[TrialPart, ...]:
        """Return the trials that own a device now."""
        self.look()
        return self._parts.get(device.uuid, ())

    def look(self) -> list[TrialRegistration]:
        """Return the running trials, at most half a second old."""
        now = time.monotonic()
        if now - self._asked >= _TRIALS_SECONDS:
            self._asked = now
            try:
                self.registrations = read_registrations(self._folder)
            except OSError:  # no folder, no trials
                self.registrations = []
            self._parts = {}
            for trial in self.registrations:
                fraction = trial.fraction if 0 < trial.fraction <= 1 else 1.0
                part = TrialPart(trial.run, trial.stage, trial.trial, trial.rank, float(fraction))
                for uuid in trial.device_uuids:
                    self._parts[uuid] = (*self._parts.get(uuid, ()), part)
        return self.registrations


@dataclass
class Recording:
    """How far a recording has come.

    Attributes:
        seconds: Since it began, s.
        samples: Lines written.
        failures: Readings that failed, by device.
        reasons: The latest reason why, by device.
    """

    seconds: float = 0.0
    samples: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def record(  # noqa: PLR0913  (three of them are for whoever waits)
    sources: Sequence[PowerSource],
    writer: TraceWriter,
    *,
    period_seconds: float,
    duration_seconds: float = float("inf"),
    registry: Path | None = None,
    stop: threading.Event,
    progress: Callable[[Recording], None] = lambda _: None,
) -> Recording:
    """Read all devices each period until the duration is over or ``stop`` is set.

    Times are the wall clock at the start plus a clock that never jumps: a wall clock that is set back in the middle
    would make energy from nothing.
    """
    owners, state = Owners(registry), Recording()
    began, wall = time.monotonic(), time.time()
    while True:
        samples = []
        for source in sources:
            for device in source.devices():
                reading = _read(source, device, wall - began, state)
                if reading is not None:
                    samples.append(Sample(device, reading, source.name, owners.of(device)))
        writer.add(samples)
        state.samples += len(samples)
        state.seconds = time.monotonic() - began
        progress(state)
        # The next slot of the grid, so that late readings shift no later one.
        due = (int(state.seconds / period_seconds) + 1) * period_seconds
        if due > duration_seconds + 1e-9 or stop.wait(max(0.0, began + due - time.monotonic())):
            return state


def _read(source: PowerSource, device: Device, shift: float, state: Recording) -> Reading | None:
    before = time.monotonic()
    try:
        reading = source.read(device)
    except Exception as error:  # noqa: BLE001  (a broken device, whatever it raises, must not end the recording)
        state.failures[device.uuid] = state.failures.get(device.uuid, 0) + 1
        state.reasons[device.uuid] = " ".join(str(error).split())
        return None
    return replace(reading, time_seconds=(before + time.monotonic()) / 2 + shift)
