"""The meter's write-ahead journal: what a killed process still owes, in a file that is never torn.

A journal is one JSON line. While the meter runs, the line holds the energy so far plus a reservation for the moments
until the next write, and says ``"final": false``. On close the exact report replaces it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from wattier_telemetry.records import EnergyReport, Share

SUFFIX = ".energy.json"
# A write inside one page is not torn by SIGKILL: the kernel looks for a fatal signal only between pages.
PAGE_BYTES = 4096
_READ_ATTEMPTS = 5


class Journal:
    """One file that always holds a whole report.

    If the path is taken, by an attempt that was killed, a free name beside it is used (``name.2.energy.json``): what
    the killed attempt owes must outlive the next one.

    Raises:
        ValueError: If the name does not end in ``.energy.json``.
        OSError: If the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        if not path.name.endswith(SUFFIX):
            raise ValueError(f"{path}: a journal's name must end in {SUFFIX}, so that bill() finds it")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = _claim(path)
        self._descriptor: int | None = None

    def write(self, report: EnergyReport) -> None:
        """Write what is owed if the process dies now. No fsync: it survives the process, not the machine."""
        line = _line(report, final=False)
        if self._descriptor is not None and len(line) == PAGE_BYTES:
            os.pwrite(self._descriptor, line, 0)
            return
        self._release()
        self._replace(line)
        if len(line) == PAGE_BYTES:
            self._descriptor = os.open(self.path, os.O_WRONLY)

    def finish(self, report: EnergyReport) -> None:
        """Write the exact report, down to the disk."""
        self._release()
        self._replace(_line(report, final=True), sync=True)

    def _replace(self, line: bytes, *, sync: bool = False) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            file.write(line)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(self.path)

    def _release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read_journal(path: Path) -> EnergyReport:
    """Read one journal, finished or not; of an unfinished one the report carries a warning that says so.

    Raises:
        ValueError: If the file cannot be read or is not a journal; the message names the path.
    """
    problem = ""
    for attempt in range(_READ_ATTEMPTS):
        if attempt:
            time.sleep(0.01)  # a reader may catch a page half copied: look again before calling it corrupt
        try:
            data: Any = json.loads(path.read_bytes())
            break
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            problem = str(error)
    else:
        raise ValueError(f"{path}: is torn or no energy journal: {problem}")
    if not isinstance(data, dict) or not isinstance(data.get("final"), bool) or "report" not in data:
        raise ValueError(f"{path}: is no energy journal: it must hold 'final' and 'report'")
    try:
        report = EnergyReport.from_dict(data["report"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if data["final"]:
        return report
    return report + EnergyReport.of((), [f"{path.name}: was not closed; billed up to the end it had reserved"])


def bill(folder: Path) -> EnergyReport:
    """Add up every ``*.energy.json`` in a folder; a missing folder owes nothing, a corrupt file becomes a warning."""
    shares: list[Share] = []
    warnings: list[str] = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            report = read_journal(path)
        except ValueError as error:
            warnings.append(str(error))
        else:
            shares.extend(report.shares)
            warnings.extend(report.warnings)
    return EnergyReport.of(shares, warnings)  # in one go: a sum after each of a thousand ranks takes quadratic time


def _claim(path: Path) -> Path:
    stem, number, candidate = path.name.removesuffix(SUFFIX), 1, path
    while True:
        with contextlib.suppress(FileExistsError):
            candidate.open("xb").close()
            return candidate
        number += 1
        candidate = path.with_name(f"{stem}.{number}{SUFFIX}")


def _line(report: EnergyReport, *, final: bool) -> bytes:
    """Return the JSON line, padded with blanks to whole pages so that a shorter one leaves nothing of a longer one."""
    text = json.dumps({"final": final, "report": report.to_dict()}, allow_nan=False).encode()
    pages = len(text) // PAGE_BYTES + 1
    return text.ljust(pages * PAGE_BYTES - 1) + b"\n"
