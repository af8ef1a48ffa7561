"""An Optuna study a stage that mirrors a run, so that optuna-dashboard works on it unchanged.

The run directory is the truth: a mirror is made from it, is never read back into it, and may be lost at any time. What
differs from the truth is mended trial by trial where Optuna can (a trial that has not ended), or by making the study
anew where it cannot (a trial that has).
"""

from __future__ import annotations

import hashlib
import logging
import shlex
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from optuna.storages import BaseStorage
from optuna.trial import TrialState

from wattier.config import RunConfig
from wattier.errors import UserError
from wattier.mirror_storage import let_go, open_database, open_journal
from wattier.mirror_study import STATUS_KEY, MirroredStudy, Wanted, open_study, wanted_of_open, wanted_of_result
from wattier.optuna_sampler import distributions
from wattier.records import Proposal, TrialResult
from wattier.rundir import FULL_STAGE, RunDir, decode, hold_lock, read_json
from wattier.space import typed_space
from wattier.storage_url import STORAGE_VARIABLE, check_url, chosen_url, redacted, secrets_of

JOURNAL = "optuna-journal.log"
NO_TRIAL = ""  # of a stage that has none, whose study may be that of a run which was started over
CLOSE_SECONDS, REBUILD_SECONDS = 10.0, 600.0
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 300.0  # between two attempts to reach a storage

log = logging.getLogger(__name__)


class Mirror:
    """Keeps the studies of a run up to date, in a thread of its own: a search never waits for a database.

    Args:
        run: what is mirrored.
        config: the run's config, whose `search.storage` names a database; the environment's goes before it.
        storage: a database that goes before both.
        driver: whether this process runs the trials: it warns of a storage that fails, and its trials end with it.
        running: whether a trial without a record runs; otherwise it was interrupted, and will be run again.
    """

    def __init__(
        self, run: RunDir, config: RunConfig, *, storage: str | None = None, driver: bool = True, running: bool = True
    ) -> None:
        self.run, self.url = run, storage or chosen_url(config)
        self._name, self._driver, self._running = config.name, driver, running
        self._space = distributions(typed_space(config))
        self._sections = {stage.name: stage for stage in config.search.stages}
        self._wanted: dict[str, dict[str, Wanted]] = {}
        self._due: dict[tuple[str, str], None] = {}
        self._studies: dict[str, MirroredStudy] = {}
        self._storage: BaseStorage | None = None
        self._synced = 0
        self._changed = threading.Condition()
        self._busy, self._closing, self._failure, self._has_warned = False, False, "", False
        self._thread = threading.Thread(target=self._work, name="optuna-mirror", daemon=True)
        self.sync()
        self._thread.start()

    @property
    def where(self) -> str:
        """The journal's path, or the database's URL without its password."""
        return redacted(self.url, self.url) if self.url else str(self.run.path / JOURNAL)

    def started(self, stage: str, proposal: Proposal) -> None:
        """A trial runs."""
        self._want(stage, proposal.trial_id, wanted_of_open(proposal, self._space, running=True))

    def finished(self, result: TrialResult) -> None:
        """A trial ended, and its row is written; told twice, the last one counts."""
        self._want(result.fidelity.stage, result.trial_id, wanted_of_result(result, self._space))

    def sync(self) -> None:
        """Compare everything with the run directory.

        Raises:
            UserError: the run's records are damaged.
        """
        wanted: dict[str, dict[str, Wanted]] = {}
        for result in self.run.trials():
            wanted.setdefault(result.fidelity.stage, {})[result.trial_id] = wanted_of_result(result, self._space)
        for stage, proposal in _open_trials(self.run, wanted):
            ours = wanted_of_open(proposal, self._space, running=self._running)
            wanted.setdefault(stage, {})[proposal.trial_id] = ours
        with self._changed:
            self._wanted, self._studies = wanted, {}
            self._due = {(stage, trial_id): None for stage, trials in wanted.items() for trial_id in trials}
            self._due |= {(stage, NO_TRIAL): None for stage in (*self._sections, FULL_STAGE) if stage not in wanted}
            self._synced += 1
            self._changed.notify_all()

    def flush(self, timeout_seconds: float) -> str | None:
        """Wait until the storage holds everything; returns why it does not, None = it does."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_idle() or bool(self._failure), timeout_seconds)
            return None if self._is_idle() else self._failure or f"not written within {timeout_seconds:g} s"

    def counts(self) -> dict[str, Counter[str]]:
        """Trials by Optuna's state, of each study that was written."""
        with self._changed:
            return {
                study.name: Counter(trial.state.name for trial in self._wanted[stage].values())
                for stage, study in self._studies.items()
            }

    def close(self) -> None:
        """Write what is left, for a moment at most; a trial that still runs is one to be run again."""
        with self._changed:
            if self._driver:
                for stage, trials in self._wanted.items():
                    for trial_id, wanted in trials.items():
                        if wanted.state == TrialState.RUNNING:
                            interrupted = {**wanted.attributes, STATUS_KEY: "interrupted"}
                            trials[trial_id] = wanted._replace(state=TrialState.WAITING, attributes=interrupted)
                            self._due[stage, trial_id] = None
            self._closing = True
            self._changed.notify_all()
        self._thread.join(CLOSE_SECONDS)
        if not self._is_idle() and not self._has_warned:
            self._warn("not all was written in time")

    def _is_idle(self) -> bool:
        return not self._due and not self._busy

    def _want(self, stage: str, trial_id: str, wanted: Wanted) -> None:
        with self._changed:
            self._wanted.setdefault(stage, {})[trial_id] = wanted
            self._due[stage, trial_id] = None
            self._changed.notify_all()

    def _work(self) -> None:
        """Write what is due until the mirror is closed; after a failure ask again later, and once more at the end."""
        pause = PAUSE_SECONDS
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due or self._closing)
                is_last, due = self._closing, list(self._due)
                self._due.clear()
                self._busy = True
            failure = self._write(due)
            with self._changed:
                self._busy, self._failure = False, failure
                if failure:
                    self._due = {**dict.fromkeys(due), **self._due}
                self._changed.notify_all()
                done = is_last and (failure or not self._due)
                if failure and not done:
                    self._changed.wait_for(lambda: self._closing, pause)
                    pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                elif not failure:
                    pause, self._has_warned = PAUSE_SECONDS, False
            if done:
                self._forget_storage()
                return

    def _write(self, due: list[tuple[str, str]]) -> str:
        """Write some trials; returns why that failed, in one line, or nothing."""
        try:
            for stage, trial_id in due:
                self._write_one(stage, trial_id)
        except Exception as error:  # noqa: BLE001  (a database may fail in any way; the search goes on)
            self._forget_storage()
            text = str(error).partition("(Background on this error")[0]  # what SQLAlchemy adds
            reason = redacted(f"{type(error).__name__}: {text}", self.url or "")[:300]
            self._warn(reason)
            return reason
        return ""

    def _write_one(self, stage: str, trial_id: str) -> None:
        with self._changed:
            study, every = self._studies.get(stage), self._wanted.get(stage, {})
            wanted, as_of = every.get(trial_id), self._synced
        if study is None:
            study = self._open_study(stage, create=wanted is not None)
            if study is not None and study.holds_others_than(self._all_of(stage)):
                study = self._made_anew(stage, study)
        if study is not None and wanted is not None and not study.put(trial_id, wanted):
            study = self._made_anew(stage, study)
        with self._changed:
            if study is not None and as_of == self._synced:
                self._studies[stage] = study

    def _all_of(self, stage: str) -> dict[str, Wanted]:
        with self._changed:
            return dict(self._wanted.get(stage, {}))

    def _made_anew(self, stage: str, study: MirroredStudy) -> MirroredStudy | None:
        study.storage.delete_study(study.study_id)
        every = self._all_of(stage)
        anew = self._open_study(stage, create=bool(every))
        for trial_id, wanted in every.items():
            if anew is not None:
                anew.put(trial_id, wanted)
        return anew

    def _open_study(self, stage: str, *, create: bool) -> MirroredStudy | None:
        if self._storage is None:
            self._storage = self._open_storage()
        section = self._sections.get(stage)
        notes: dict[str, Any] = {"run_dir": str(self.run.path), "stage": stage}
        notes |= section.model_dump(include={"structures", "epochs", "ranks"}) if section else {}
        owner = hashlib.sha256(self.run.config_path.read_bytes()).hexdigest()
        name = f"{self._name}-{stage}"
        return open_study(self._storage, name, owner, space=self._space, notes=notes if create else None)

    def _open_storage(self) -> BaseStorage:
        if self.url is None:
            return open_journal(self.run.path / JOURNAL)
        return open_database(check_url(self.url, password_allowed=True))

    def _forget_storage(self) -> None:
        storage, self._storage = self._storage, None
        with self._changed:
            self._studies = {}
        with suppress(Exception):  # it may be what failed
            let_go(storage)

    def _warn(self, reason: str) -> None:
        if self._driver and not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s: the study for optuna-dashboard cannot be written (%s). The search goes on, and the study catches "
                "up when it can, or by: wattier study %s", self.where, reason, self.run.path,
            )  # fmt: skip


class Rebuilt(NamedTuple):
    """What `rebuild` did. counts: trials by Optuna's state, of each study; None = a search that runs does the work."""

    counts: dict[str, Counter[str]] | None
    command: str


def rebuild(run: RunDir, config: RunConfig, storage: str | None) -> Rebuilt:
    """Bring the studies of a run up to date, and say what shows them in a browser.

    Raises:
        UserError: the storage cannot be written, or its URL holds a password.
    """
    try:
        storage = check_url(storage) if storage else None
    except ValueError as error:
        raise UserError(f"--storage: {error}.") from None
    with hold_lock(run.path / "lock") as held:
        if not held and storage in (None, chosen_url(config)):
            return Rebuilt(None, _dashboard_command(run, chosen_url(config)))
        mirror = Mirror(run, config, storage=storage, driver=False, running=not held)
        reason = mirror.flush(REBUILD_SECONDS)
        counts = mirror.counts()
        mirror.close()
    if reason:
        raise UserError(f"{mirror.where}: the study cannot be written ({reason}). Nothing else is lost; try again.")
    return Rebuilt(counts, _dashboard_command(run, mirror.url))


def _dashboard_command(run: RunDir, url: str | None) -> str:
    """A URL with a password is left where it was read from."""
    if url and secrets_of(url):
        return f'optuna-dashboard "${STORAGE_VARIABLE}"'
    return f"optuna-dashboard {shlex.quote(url or str(run.path / JOURNAL))}"


def _open_trials(run: RunDir, recorded: Mapping[str, Mapping[str, Wanted]]) -> Iterator[tuple[str, Proposal]]:
    """Trials that have begun and have no record."""
    for path in sorted((run.path / "trials").glob("*/*/trial.json")):
        stage, trial_id = path.parent.parent.name, path.parent.name
        if trial_id not in recorded.get(stage, {}):
            yield stage, decode(path, lambda note: Proposal(note["trial_id"], dict(note["params"])), read_json(path))
