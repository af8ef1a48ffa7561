"""What came of a trial, in words: reasons of failures, and checks of what a trial reports and leaves behind.

A trial may be anybody's function, so nothing that it says is taken on trust; whatever it does, it ends as one row.
"""

from __future__ import annotations

import json
import math
import re
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from wattier.records import EpochRecord, Fidelity, Proposal, TrialResult, finite_or_none
from wattier.trial_output import OUT_OF_MEMORY_NOTE, being_written

ERROR_NAME = "error.txt"
LONGEST_REASON = 500  # characters of a row
LAST_WORDS_SECONDS = 10.0
LONGEST_ERROR = 64 * 1024  # characters of an error.txt
LONGEST_RESULT = 16 * 1024 * 1024  # bytes of a result.json
DIVERGED = "the validation loss is not finite"
NO_MEMORY = re.compile(r"out of memory|can.t allocate memory|cannot allocate memory|unable to allocate", re.IGNORECASE)
RAY_MEMORY = "how to address the out of memory issue"  # in what Ray says when its memory monitor killed a process
STATUSES = ("complete", "pruned", "failed", "interrupted")


class TrialFailedError(Exception):
    """How a trial's process says that it failed: the reason alone, since any exception may be huge or unpicklable."""


def reason_of(error: BaseException) -> str:
    """Type and message of an exception in one line, which says so where it is about memory."""
    name, message = type(error).__name__, " ".join(shortened(_message_of(error), 2 * LONGEST_REASON).split())
    if isinstance(error, SystemExit):
        name, message = "SystemExit", f"the trial called sys.exit({message})"
    text = shortened(f"{name}: {message}" if message else name, LONGEST_REASON)
    is_memory = isinstance(error, MemoryError) or name == "OutOfMemoryError" or NO_MEMORY.search(message)
    return f"out of memory ({text})" if is_memory and "out of memory" not in text.lower() else text


def _message_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as failure:  # noqa: BLE001  (its __str__ is a stranger's code)
        return f"its message cannot be read ({type(failure).__name__})"


def write_error(folder: Path, error: BaseException) -> str:
    """Put an exception's traceback into the trial's folder; returns the reason in one line, which is its last."""
    reason = reason_of(error)
    text = "".join(traceback.format_exception(error)).strip()
    folder.mkdir(parents=True, exist_ok=True)  # the trial may have removed it
    (folder / ERROR_NAME).write_text(f"{shortened(text, LONGEST_ERROR)}\n\n{reason}\n", errors="replace")
    return reason


def write_reason(folder: Path, reason: str, more: str = "") -> None:
    """Say why a trial failed that could not say it itself."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ERROR_NAME).write_text(f"{shortened(more, LONGEST_ERROR)}\n\n{reason}\n".lstrip(), errors="replace")


def read_reason(folder: Path) -> str | None:
    """The last line of the ``error.txt`` that a trial left."""
    path = folder / ERROR_NAME
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return shortened(lines[-1], LONGEST_REASON + 40) if lines else None


def reason_of_death(output: Path, message: str = "") -> str:
    """Why a process is gone that said nothing, as far as Ray's message and what it printed last can tell."""
    if "node" in message and ("its node has died" in message or "node was terminated" in message):
        return "its node was lost"
    if RAY_MEMORY in message:
        return "out of memory: Ray's memory monitor killed its process"
    deadline = time.monotonic() + LAST_WORDS_SECONDS  # what it printed last is written by another process
    while True:
        is_all = not being_written(output).exists() or time.monotonic() > deadline
        printed = _end_of(output)
        if OUT_OF_MEMORY_NOTE in printed:
            return "out of memory: the kernel killed its process"
        crash = re.search(r"Fatal Python error: ([^\n]{1,100})", printed)
        if crash:
            return f"its process crashed ({crash[1].strip()}); see {output.name}"
        if is_all:
            return "its process was killed (SIGKILL), most likely for memory"
        time.sleep(0.1)


def _end_of(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 16384))
        return file.read().decode(errors="replace")


def shortened(text: str, length: int) -> str:
    """The beginning and the end of a text that is too long."""
    return text if len(text) <= length else f"{text[: length // 2]} [...] {text[-length // 2 :]}"


def checked_record(record: Any) -> EpochRecord:
    """What a trial reports after an epoch, without NaN; raises where the trial can still be told.

    Raises:
        TypeError: it is no EpochRecord, or its numbers are none.
    """
    if not isinstance(record, EpochRecord):
        raise TypeError(f"report was given {shown(record)}, but must be given an EpochRecord")
    if not _is_number(record.epoch) or record.epoch != int(record.epoch) or record.epoch < 1:
        raise TypeError(f"epoch of an EpochRecord is {shown(record.epoch)}, but must be 1 or more")
    for name in ("val_loss", "train_loss", "energy_joules"):
        value = getattr(record, name)
        if value is not None and not _is_number(value, finite=False):
            raise TypeError(f"{name} of an EpochRecord is {shown(value)}, but must be a number or None")
    known = {name: finite_or_none(getattr(record, name)) for name in ("val_loss", "train_loss", "energy_joules")}
    return replace(record, **known)


def checked_return(returned: Any) -> TrialResult:
    """What a trial's function returned, where it left no ``result.json``.

    Raises:
        TypeError: it is no TrialResult.
    """
    if not isinstance(returned, TrialResult):
        raise TypeError(
            f"run_trial returned {shown(returned)} and left no result.json, but rank 0 must return a TrialResult"
        )
    return returned


def read_result(path: Path, proposal: Proposal, fidelity: Fidelity) -> TrialResult:
    """The result that a trial left; a loss that is not finite makes it a diverged one.

    Raises:
        ValueError: the file holds no result of this trial; the message is the reason.
    """
    if path.stat().st_size > LONGEST_RESULT:
        raise ValueError(f"result.json has {path.stat().st_size} bytes, but may have {LONGEST_RESULT}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        result = TrialResult.from_dict(data)
        _check_values(result)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"result.json holds no result ({shortened(str(error), 200)})") from error
    if (result.trial_id, result.fidelity.stage) != (proposal.trial_id, fidelity.stage):
        raise ValueError(f"result.json is of trial {shown(result.trial_id)} of {shown(result.fidelity.stage)}")
    return _without_nan(replace(result, params=proposal.params))


def _check_values(result: TrialResult) -> None:
    if result.status not in STATUSES:
        raise ValueError(f"status is {shown(result.status)}, but must be one of {', '.join(STATUSES)}")
    for name in ("epochs_done", "structures_seen", "attempts"):
        value = getattr(result, name)
        if not _is_number(value) or value != int(value) or value < 0:
            raise ValueError(f"{name} is {shown(value)}, but must be a whole number of 0 or more")
    if not _is_number(result.wall_seconds) or result.wall_seconds < 0:
        raise ValueError(f"wall_seconds is {shown(result.wall_seconds)}, but must be 0 or more")
    if result.val_loss is not None and not _is_number(result.val_loss, finite=False):
        raise ValueError(f"val_loss is {shown(result.val_loss)}, but must be a number or null")
    if not isinstance(result.val_by_source, dict):
        raise TypeError(f"val_by_source is {shown(result.val_by_source)}, but must be a mapping")


def _without_nan(result: TrialResult) -> TrialResult:
    result = replace(result, val_by_source=finite_or_none(result.val_by_source))
    is_finite = result.val_loss is not None and math.isfinite(result.val_loss)
    if is_finite or (result.val_loss is None and result.status != "complete"):
        return result
    status = "pruned" if result.status == "complete" else result.status
    return replace(result, val_loss=None, status=status, diverged=True, error=result.error or DIVERGED)


def _is_number(value: Any, *, finite: bool = True) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return not finite or math.isfinite(value)
    except OverflowError:
        return False


def shown(value: Any) -> str:
    """A stranger's value in a message."""
    try:
        return shortened(repr(value), 80)
    except Exception:  # noqa: BLE001  (its repr is a stranger's code)
        return f"a {type(value).__name__}"
