"""The run directory: the only state there is. Every verb reads it and writes it, and the same command resumes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from wattier.config import RunConfig, load_config
from wattier.config_ensemble import SelectSection
from wattier.errors import UserError
from wattier.json_lines import GrowingLines, append_json_line, read_json_lines
from wattier.records import EpochRecord, Selection, TrialResult

FULL_STAGE = "full"
LEAVE_NAME = "leave.json"  # when the trials of the command that runs here must be gone, see `departure`
START_UP_PHASE = "start-up"  # what processes do once, before their first trial
RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set in the driver of a submitted job
T = TypeVar("T")
__all__ = [
    "FULL_STAGE",
    "LEAVE_NAME",
    "RAY_JOB_VARIABLE",
    "START_UP_PHASE",
    "RunDir",
    "append_json_line",
    "decode",
    "hold_lock",
    "read_json",
    "read_json_lines",
    "sweep_temporary_files",
    "write_json",
    "write_text",
]
_MAY_CHANGE = {
    "search": ("budget", "max_concurrent", "storage"),
    "select": tuple(SelectSection.model_fields),  # looked at, and chosen again
    "full_training": ("budget", "keep_checkpoints"),
    "ensemble": ("weights", "coverage"),
    "resources": ("address", "retries", "walltime_seconds"),
}


class RunDir:
    """Paths and records of one run.

    ``config.yaml``, ``trials.jsonl`` (written by the driver alone), ``choices.json``, ``selection.json``,
    ``evaluation.json``, ``report.html``, ``release/``, ``data/store/``, ``phases/<phase>/*.energy.json``, and a folder
    a trial: ``trials/<stage>/<trial>/`` with ``epochs.jsonl``, ``last.pt``, ``best.pt``, ``result.json``,
    ``*.energy.json``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.config_path = self.path / "config.yaml"
        self.trials_path = self.path / "trials.jsonl"
        self.search_path = self.path / "search.json"
        self.selection_path = self.path / "selection.json"
        self.choices_path = self.path / "choices.json"  # trials that a person picked or ruled out
        self.evaluation_path = self.path / "evaluation.json"
        self.report_path = self.path / "report.html"
        self.release_path = self.path / "release"
        self.store_path = self.path / "data" / "store"
        self.store_manifest_path = self.store_path / "manifest.json"  # there when the store is finished
        self._rows = _TrialRows(self.trials_path)

    @classmethod
    def create(cls, config: RunConfig) -> RunDir:
        """The directory of a config, made if it is not there.

        Raises:
            UserError: it holds a run of another config, cannot be written, or must be changed while a run goes on here.
        """
        run = cls(Path(config.run_dir).expanduser())
        if RAY_JOB_VARIABLE in os.environ and not Path(config.run_dir).expanduser().is_absolute():
            raise UserError(
                f"run_dir: is {config.run_dir!r}, but must be an absolute path in a Ray job, which runs in a copy of "
                "the working directory that is thrown away. Give a path that all nodes share."
            )
        text = config.to_yaml()
        if run.config_path.exists():
            there = run.config_path.read_text(encoding="utf-8", errors="replace")
            if there != text and run.has_begun() and not _is_same(run.config_path, config):
                raise UserError(
                    f"{run.path}: holds a run of another config{_first_difference(there, text)}. "
                    "Set another run_dir, or remove the folder to start over."
                )
            if there == text:
                return run
        try:
            with run.lock():  # trials of a run that goes on read it
                write_text(run.config_path, text)  # a new run, or the same in other words, or with another budget
        except OSError as error:
            raise UserError(f"{run.path}: cannot be written ({error.strerror}). Set another run_dir.") from error
        return run

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """An existing run.

        Raises:
            UserError: the folder is no run directory.
        """
        run = cls(path)
        if not run.config_path.is_file():
            raise UserError(f"{path}: is no run directory (it has no config.yaml). Give one that `wattier run` made.")
        return run

    def has_begun(self) -> bool:
        """Whether anything was made from the config; until then a mended config may replace it."""
        return self.store_path.exists() or self.trials_path.exists() or (self.path / "trials").exists()

    def config(self) -> RunConfig:
        """The config that the run was made with."""
        return load_config(self.config_path)

    def trial_folder(self, stage: str, trial_id: str) -> Path:
        """Where a trial writes; nobody else writes there."""
        return self.path / "trials" / stage / trial_id

    def phase_folder(self, phase: str) -> Path:
        """Where the driver's own energy journals of a phase lie."""
        return self.path / "phases" / phase

    def trials(self, stage: str | None = None) -> list[TrialResult]:
        """All finished trials, in order of finishing; of one id the last row counts. A row is parsed once."""
        return self._rows.read(stage)

    def epochs(self, stage: str, trial_id: str) -> list[EpochRecord]:
        """A trial's epochs; of one epoch reported by two attempts the last counts."""
        path = self.trial_folder(stage, trial_id) / "epochs.jsonl"
        records = [decode(path, EpochRecord.from_dict, line) for line in read_json_lines(path)]
        return sorted({record.epoch: record for record in records}.values(), key=lambda record: record.epoch)

    def selection(self) -> Selection | None:
        """The chosen trials, once there are any."""
        if not self.selection_path.exists():
            return None
        return decode(self.selection_path, Selection.from_dict, read_json(self.selection_path))

    def evaluation(self) -> dict[str, Any] | None:
        """What `evaluate_run` found, once it ran.

        Raises:
            UserError: the file is damaged.
        """
        if not self.evaluation_path.exists():
            return None
        return decode(self.evaluation_path, _checked_evaluation, read_json(self.evaluation_path))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Only one driver at a time.

        Raises:
            UserError: another process is running in this directory.
        """
        with hold_lock(self.path / "lock") as held:
            if not held:
                raise UserError(f"{self.path}: another wattier is running here. Wait for it, or stop it.")
            for folder in (self.path, self.store_path.parent):
                sweep_temporary_files(folder)
            (self.path / LEAVE_NAME).unlink(missing_ok=True)  # it was of another command
            try:
                yield
            finally:
                (self.path / LEAVE_NAME).unlink(missing_ok=True)


class _TrialRows:
    """The rows of ``trials.jsonl``, kept, so that a driver that looks after each trial parses each row once."""

    def __init__(self, path: Path) -> None:
        self._lines = GrowingLines(path)
        self._by_stage: dict[str | None, dict[tuple[str, str], TrialResult]] = {}  # None = all stages

    def read(self, stage: str | None) -> list[TrialResult]:
        try:
            news = self._lines.read()
            if news.anew:
                self._by_stage = {}
            for row in map(self._decoded, news.records):
                self._put(self._by_stage, row)
            if not news.unended:
                return list(self._by_stage.get(stage, {}).values())
            # A last line without its end is told again by the next reading, perhaps as another one.
            with_it = {name: dict(rows) for name, rows in self._by_stage.items()}
            for row in map(self._decoded, news.unended):
                self._put(with_it, row)
            return list(with_it.get(stage, {}).values())
        except UserError:
            self._lines.forget()
            raise

    def _decoded(self, data: Any) -> TrialResult:
        return decode(self._lines.path, TrialResult.from_dict, data)

    @staticmethod
    def _put(by_stage: dict[str | None, dict[tuple[str, str], TrialResult]], row: TrialResult) -> None:
        for name in (None, row.fidelity.stage):
            by_stage.setdefault(name, {})[row.fidelity.stage, row.trial_id] = row


@contextmanager
def hold_lock(path: Path) -> Iterator[bool]:
    """Try to hold an exclusive lock, which the system takes back when the process dies; yields whether it is held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def sweep_temporary_files(folder: Path) -> None:
    """Remove what a killed process left half-written; only for who holds the folder's lock."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file whole or not at all; NaN is refused, since JSON has none."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not readable JSON ({error}). Remove the file; it will be made again.") from error


def decode(path: Path, decoder: Callable[[Any], T], data: Any) -> T:
    """A record of what a file held.

    Raises:
        UserError: it is JSON, but not such a record.
    """
    try:
        return decoder(data)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: holds no record of this version ({error!r}). Restore the file, or remove it."
        ) from error


def _checked_evaluation(data: Any) -> dict[str, Any]:
    """An evaluation that has all of its parts; raises as `decode` expects."""
    evaluation: dict[str, Any] = {key: data[key] for key in ("members", "sources", "calibration", "parity")} | data
    if not all(member["trial_id"] for member in evaluation["members"]):
        raise ValueError("a member without a trial_id")
    return evaluation


def _is_same(path: Path, config: RunConfig) -> bool:
    """Whether a file says the same in other words, as one does that an earlier version wrote, with fewer settings.

    What may be spent, on which machine, and how the tiers are chosen, does not make another run of it.
    """
    try:
        return _essence(load_config(path)) == _essence(config)
    except UserError:
        return False


def _essence(config: RunConfig) -> dict[str, Any]:
    values = config.model_dump()
    for section, names in _MAY_CHANGE.items():
        for name in names:
            del values[section][name]
    return values


def _first_difference(old: str, new: str) -> str:
    for before, after in zip_longest(old.splitlines(), new.splitlines(), fillvalue=""):
        if before != after:
            return f" (there: {before.strip()!r}, here: {after.strip()!r})"
    return ""
