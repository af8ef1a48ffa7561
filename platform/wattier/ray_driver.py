"""Between Tune and a policy: a thin searcher, a thin scheduler, a watch over what runs. One thread calls it all."""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wattier.departure import LEFT_RESULT, LeaveNote, NotFinishedError
from wattier.errors import UserError
from wattier.launch import NOTHING_RUNS, NotNow, OnResult, Policy, Stage, note_stop, runs_here, write_left
from wattier.outcome import (
    LONGEST_ERROR,
    LONGEST_REASON,
    RAY_MEMORY,
    TrialFailedError,
    read_reason,
    reason_of_death,
    shortened,
    write_reason,
)
from wattier.ray_cluster import Bundle, own_node_lives, what_is_missing
from wattier.records import EpochRecord, Proposal, TrialResult
from wattier.stall import StallWatch
from wattier.trial_context import left_result
from wattier.trial_output import output_name

log = logging.getLogger(__name__)
RESULT_WAIT_SECONDS = 60.0  # a stopped trial unwinds, and a shared file system may show its result late
PLACE_LOOK_SECONDS = 2.0
RAY_LOST = "its owner has died"  # in what Ray says of a trial's process: the owner is this command's own connection
TELL_SECONDS = 60.0
SHORTEST_STUCK_SECONDS = 300.0  # a process may take a minute to leave its last trial, and another to begin the next
NO_PROCESS = "it never began: the process it was to have took too long to leave its last trial"
# How Ray's exceptions begin to tell that a process is gone, and not that it raised something.
DEATHS = ("ActorDiedError", "ActorUnavailableError", "WorkerCrashedError", "The actor ", RAY_MEMORY)


@dataclass
class _Ended:
    """A trial that Tune is done with: why it failed, if it did, and how long its result is waited for."""

    error: str | None
    deadline: float


@dataclass
class Driver:
    """Turns Tune's endings into our results, once the trial's own processes have written their last word."""

    stage: Stage
    policy: Policy
    on_result: OnResult
    bundle: Bundle
    problem: Exception | None = None  # what ends the stage, and is no trial's failure
    started: dict[str, Proposal] = field(default_factory=dict)
    unwinding: dict[str, _Ended] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # of the last failure of each trial
    no_place_since: float | None = None
    waits_since: float | None = None
    has_told: bool = False
    tunes_search: Any = None  # what Tune has put around our searcher
    look_at: float = 0.0

    def __post_init__(self) -> None:
        self.watch = StallWatch(self.stage.config.resources.stall_seconds)
        self.leave = LeaveNote(self.stage.run)

    def folder(self, tune_id: str) -> Path:
        """Where a trial writes."""
        return self.stage.run.trial_folder(self.stage.fidelity.stage, self.started[tune_id].trial_id)

    def propose(self, tune_id: str) -> dict[str, Any] | None:
        """Tune's config of the next trial, an empty one for later, None when there is none left."""
        self.collect()
        proposal = self.policy.propose()
        if isinstance(proposal, NotNow):
            if not self.started:
                self.problem = RuntimeError(NOTHING_RUNS)
                raise self.problem
            return {}
        if proposal is None:
            return None
        self.started[tune_id] = proposal
        return {"spec": self.stage.open_trial(proposal)}

    def ended(self, tune_id: str, *, error: bool) -> None:
        """Tune is done with a trial; a stopped one may still be unwinding."""
        self.watch.ended(tune_id)
        if self.problem is not None:  # nothing is recorded any more; the next command takes it up again
            return
        reason = self.reasons.pop(tune_id, "the trial's process died") if error else None
        if reason is not None and (told := self.leave.due()) is not None:  # it did not get away in time: no failure
            spec = self.stage.spec(self.started[tune_id])
            write_left(left_result(spec, self.stage.run, told), self.folder(tune_id))
            reason = None
        self.unwinding[tune_id] = _Ended(reason, time.monotonic() + RESULT_WAIT_SECONDS)
        self.collect()

    def failed(self, tune_id: str, message: str) -> None:
        """An attempt failed, whether another one follows or not; `message` is Ray's."""
        if RAY_LOST in message:  # no trial's failure: it is interrupted, and the next command takes it up
            self._ray_is_lost()
        self.watch.ended(tune_id)
        folder = self.folder(tune_id)
        if tune_id in self.reasons:  # it was killed for stalling
            return
        said = read_reason(folder) or _said(message)  # the trial removes what an earlier attempt said
        self.reasons[tune_id] = said or reason_of_death(folder / output_name(0), message)
        if not read_reason(folder):
            write_reason(folder, self.reasons[tune_id], message)

    def begins(self, tune_id: str) -> None:
        """An attempt of a trial begins."""
        self.reasons.pop(tune_id, None)
        self.waits_since = None
        self.watch.started(tune_id, self.folder(tune_id))

    def stops(self, tune_id: str) -> None:
        """The policy stops a trial."""
        note_stop(self.folder(tune_id))

    def collect(self, *, wait: bool = False) -> None:
        """Record every ended trial whose result is there, or whose result will not come."""
        while self.unwinding and self.problem is None:
            for tune_id, ended in list(self.unwinding.items()):
                is_there = any((self.folder(tune_id) / name).exists() for name in ("result.json", LEFT_RESULT))
                if is_there or ended.error is not None or time.monotonic() >= ended.deadline:
                    del self.unwinding[tune_id]
                    self._tell(self.stage.outcome(self.started.pop(tune_id), ended.error))
            if not wait:
                return
            time.sleep(0.05)

    def _tell(self, result: TrialResult) -> None:
        try:
            self.policy.on_result(result)
            self.on_result(result)
        except Exception as problem:  # as of a full disk: Tune goes on asking while it ends its trials
            self.problem = problem
            raise

    def look_after(self, trials: list[Any]) -> None:
        """Kill what has stalled; give up when the cluster has lost what trials need."""
        self.collect()
        self._end_forgotten(trials)
        stalled = self.watch.stalled()
        for trial in trials if stalled else ():
            if trial.trial_id in stalled and trial.temporary_state.ray_actor is not None:
                reason = (
                    f"it stalled: no epoch and no checkpoint for {self.watch.stall_seconds:g} s "
                    "(resources.stall_seconds), so its processes were killed"
                )
                self.reasons[trial.trial_id] = reason
                write_reason(self.folder(trial.trial_id), reason)
                log.warning("%s: %s", self.started[trial.trial_id].trial_id, reason)
                _kill(trial.temporary_state.ray_actor)
        self._look_for_a_place(trials)

    def _end_forgotten(self, trials: list[Any]) -> None:
        """End trials that Tune gave up without a word: the process they were to have was still leaving its last one.

        By way of Tune's own search, which counts how many run.
        """
        open_ids = self.started.keys() - self.unwinding.keys()
        for trial in trials:
            if trial.status == "ERROR" and trial.trial_id in open_ids:
                self.reasons.setdefault(trial.trial_id, NO_PROCESS)
                self.tunes_search.on_trial_complete(trial.trial_id, error=True)

    def _ray_is_lost(self) -> None:
        self.problem = UserError(
            f"stage {self.stage.fidelity.stage!r}: Ray itself was lost: the node by which this command is connected "
            "has ended. Start the same command again; it goes on from here."
        )
        raise self.problem

    def _look_for_a_place(self, trials: list[Any]) -> None:
        if not any(trial.status == "RUNNING" for trial in trials) and (reason := self.leave.due()) is not None:
            raise NotFinishedError(reason)  # what waits for a place is not started any more
        longest, now = self.watch.stall_seconds or math.inf, time.monotonic()
        if now < self.look_at:
            return
        self.look_at = now + min(PLACE_LOOK_SECONDS, longest / 4)
        waits = any(trial.status == "PENDING" for trial in trials)
        if not waits or any(trial.status == "RUNNING" for trial in trials):
            self.no_place_since = self.waits_since = None
            return
        if not own_node_lives():
            self._ray_is_lost()
        missing = what_is_missing(self.bundle, self.stage.fidelity.ranks)
        if missing is None:
            self.no_place_since = None
            self._wait_for_others(now, longest)
            return
        if self.no_place_since is None:
            self.no_place_since = now
            log.warning("stage %r: a trial %s. Waiting for nodes", self.stage.fidelity.stage, missing)
        if now - self.no_place_since >= longest:
            self.problem = UserError(
                f"stage {self.stage.fidelity.stage!r}: {missing}, for {longest:g} s now (resources.stall_seconds): a "
                "node was lost, or left. Add nodes; the same command goes on from here."
            )
            raise self.problem

    def _wait_for_others(self, now: float, longest: float) -> None:
        """Say once that the cluster is busy with somebody else's work; give up where there is nobody else."""
        if self.waits_since is None:
            self.waits_since, self.has_told = now, False
        alone = runs_here(self.stage.config)
        longest = max(longest, SHORTEST_STUCK_SECONDS)
        if alone and now - self.waits_since >= longest:
            self.problem = UserError(
                f"stage {self.stage.fidelity.stage!r}: no trial has begun for {longest:g} s, though this machine's Ray "
                "runs nothing else: it is stuck. Start the same command again; it goes on from here."
            )
            raise self.problem
        if now - self.waits_since >= TELL_SECONDS and not self.has_told:
            self.has_told = True
            log.warning(
                "stage %r: no trial runs, and one waits since %g s for %d ranks of %s: the cluster has them, but %s",
                self.stage.fidelity.stage,
                TELL_SECONDS,
                self.stage.fidelity.ranks,
                self.bundle,
                "Ray has begun no process for it" if alone else "others hold them",
            )


def _kill(actor: Any) -> None:
    """End rank 0; the actors of the other ranks are its own, and end with it."""
    import ray

    ray.kill(actor)


def _last_failure(path: Path) -> str:
    """What Tune wrote down of a trial's last failure, which is the text of Ray's exception."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LONGEST_ERROR))
        return file.read().decode(errors="replace").rpartition("Failure # ")[2].strip()


def _said(message: str) -> str | None:
    """What a trial's process said of its failure; None = it died without a word."""
    last = message.splitlines()[-1] if message else ""
    if f"{TrialFailedError.__name__}: " in last:
        return last.partition(f"{TrialFailedError.__name__}: ")[2]
    is_death = not message or any(word in message for word in DEATHS)
    return None if is_death else shortened(last, LONGEST_REASON)


def searcher_of(driver: Driver) -> Any:
    """What Tune asks for the next trial. What Tune pickles of it is empty, and its copies are itself."""
    from ray.tune.search import Searcher

    class PolicySearcher(Searcher):
        def suggest(self, trial_id: str) -> dict[str, Any] | Any:
            config = driver.propose(trial_id)
            return Searcher.FINISHED if config is None else config or None

        def on_trial_complete(
            self,
            trial_id: str,
            result: dict[str, Any] | None = None,  # noqa: ARG002
            error: bool = False,
        ) -> None:
            driver.ended(trial_id, error=error)

        def save(self, checkpoint_path: str) -> None:
            """Nothing: the run directory is the state."""

        def restore(self, checkpoint_path: str) -> None:
            """Nothing: the run directory is the state."""

        def __reduce__(self) -> tuple[Any, ...]:
            return (Searcher, ())

        def __deepcopy__(self, memo: dict[int, Any]) -> PolicySearcher:
            return self

    return PolicySearcher()


def scheduler_of(driver: Driver) -> Any:
    """What Tune asks after each epoch whether a trial goes on; pickled and copied as the searcher is."""
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler

    class PolicyScheduler(FIFOScheduler):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ARG002
            driver.collect()
            if "record_json" not in result:
                return str(TrialScheduler.CONTINUE)
            driver.watch.heard(trial.trial_id)
            record = EpochRecord.from_dict(json.loads(result["record_json"]))
            go_on = driver.policy.on_epoch(driver.started[trial.trial_id].trial_id, record)
            if not go_on:
                driver.stops(trial.trial_id)
            return str(TrialScheduler.CONTINUE if go_on else TrialScheduler.STOP)

        def on_trial_error(self, tune_controller: Any, trial: Any) -> None:  # noqa: ARG002
            driver.failed(trial.trial_id, _last_failure(Path(trial.error_file)))

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            driver.tunes_search = tune_controller.search_alg
            super().on_trial_add(tune_controller, trial)

        def __reduce__(self) -> tuple[Any, ...]:
            return (FIFOScheduler, ())

        def __deepcopy__(self, memo: dict[int, Any]) -> PolicyScheduler:
            return self

    return PolicyScheduler()  # type: ignore[no-untyped-call]


def callback_of(driver: Driver) -> Any:
    """What Tune tells of attempts and of the passing of time; pickled and copied as the searcher is.

    To be called before Tune runs: it gives SIGUSR1 back to whoever hears it now.
    """
    from ray.tune import Callback

    on_main_thread = threading.current_thread() is threading.main_thread()
    on_usr1 = signal.getsignal(signal.SIGUSR1) if on_main_thread else None

    class Watch(Callback):
        def setup(self, *args: Any, **info: Any) -> None:  # noqa: ARG002
            if on_main_thread:
                signal.signal(signal.SIGUSR1, on_usr1)  # Tune puts in one that ends all trials, and says nothing

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
            driver.begins(trial.trial_id)

        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:  # noqa: ARG002
            driver.look_after(trials)

        def __reduce__(self) -> tuple[Any, ...]:
            return (Callback, ())

        def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
            return self

    return Watch()
