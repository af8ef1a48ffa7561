"""How trials are run: a launcher asks a policy what to try, runs it, and tells the policy what came of it."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import torch

from wattier.config import RunConfig
from wattier.departure import LEFT_RESULT, note_of
from wattier.errors import UserError
from wattier.node_exporters import ExporterPlan, NodeExporters, ThisNode
from wattier.outcome import (
    ERROR_NAME,
    checked_record,
    checked_return,
    read_result,
    reason_of,
    write_error,
    write_reason,
)
from wattier.ports import free_port
from wattier.records import EpochRecord, Fidelity, Proposal, TrialResult, finite_or_none
from wattier.rundir import RunDir, decode, read_json, write_json
from wattier.trial_context import RunTrial, TrialContext, TrialSpec, failed_result, judged, left_result
from wattier_gnn.distributed import World

STOPPED_NAME = "stopped.json"  # in the folder of a trial that the policy stopped
NOTHING_RUNS = "the policy answered LATER while no trial runs, so that nothing would ever change: a bug in the policy"


class NotNow(Enum):
    """The answer of a policy that has trials left and will not start one now."""

    LATER = "later"


LATER = NotNow.LATER


class Policy(Protocol):
    """What to try next, and whether to go on with it. One thread calls it."""

    def propose(self) -> Proposal | NotNow | None:
        """The next trial to start, None when there is none left, or LATER.

        LATER means: nothing until a trial that runs now has ended. It is never the answer while none runs, since
        nothing would ever change; a launcher raises RuntimeError then.
        """

    def on_epoch(self, trial_id: str, record: EpochRecord) -> bool:
        """Whether a trial may go on after an epoch; told the same epoch twice it gives the same answer."""

    def on_result(self, result: TrialResult) -> None:
        """Hear how a trial ended."""


@dataclass(frozen=True)
class Stage:
    """One fidelity, and what all its trials have in common."""

    run: RunDir
    config: RunConfig
    fidelity: Fidelity
    n_trials: int
    early_stop_patience: int | None = None
    warm_start_from: str | None = None  # stage whose weights the trials of the same ids begin with
    seeds: Mapping[str, int] = field(default_factory=dict)  # trial id -> seed, where it is not the config's

    def spec(self, proposal: Proposal) -> TrialSpec:
        """What one trial's processes need to know."""
        return TrialSpec(
            str(self.run.path),
            proposal,
            self.fidelity,
            self.early_stop_patience,
            self.warm_start_from,
            self.seeds.get(proposal.trial_id, self.config.seed),
        )

    def open_trial(self, proposal: Proposal) -> TrialSpec:
        """Make the trial's folder and note what runs in it, so that a killed run knows what to take up again."""
        folder = self.run.trial_folder(self.fidelity.stage, proposal.trial_id)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (ERROR_NAME, "result.json", LEFT_RESULT, STOPPED_NAME):  # of an attempt that counts no more
            (folder / name).unlink(missing_ok=True)
        spec = self.spec(proposal)
        write_json(folder / "trial.json", finite_or_none(asdict(proposal)) | {"seed": spec.seed})
        return spec

    def outcome(self, proposal: Proposal, error: str | None) -> TrialResult:
        """The result that a trial left, or the record of one that left none, or none that can be read."""
        folder = self.run.trial_folder(self.fidelity.stage, proposal.trial_id)
        path = folder / "result.json"
        if path.exists():
            try:
                return judged(read_result(path, proposal, self.fidelity), self.config)
            except ValueError as problem:
                error = str(problem)
        left = folder / LEFT_RESULT
        if left.exists() and error is None:
            try:
                return judged(read_result(left, proposal, self.fidelity), self.config)
            except ValueError as problem:
                error = str(problem)
        error = error or "the trial ended without a result"
        if not (folder / ERROR_NAME).exists():
            write_reason(folder, error)
        return failed_result(self.spec(proposal), self.run, error)

    def recorded(self, path: Path) -> TrialResult:
        """What the ``result.json`` of a trial holds that was opened by an earlier process."""
        note = path.with_name("trial.json")
        if note.exists():
            proposal = decode(note, _noted_proposal, read_json(note))
        else:
            left = decode(path, TrialResult.from_dict, read_json(path))
            proposal = Proposal(path.parent.name, left.params)
        return self.outcome(proposal, None)


def _noted_proposal(note: Any) -> Proposal:
    """The proposal that a ``trial.json`` holds, whichever fields that version noted."""
    return Proposal(**{f.name: note[f.name] for f in fields(Proposal) if f.name in note})


OnResult = Callable[[TrialResult], None]


class Launcher(Protocol):
    """Runs the trials of a stage until the policy has no more; every result reaches `on_result` once.

    dashboard_url: where a person can watch its processes; None = nowhere, or not yet.
    """

    dashboard_url: str | None

    def run(self, stage: Stage, policy: Policy, run_trial: RunTrial, on_result: OnResult) -> None:
        """Block until the stage is finished.

        Raises:
            UserError: the stage asks for more than the machine has.
        """

    def close(self) -> None:
        """Let go of what outlives a stage."""


class InlineLauncher:
    """One trial after the other in this process, further ranks in child processes: for tests and debugging.

    It narrows no process's view of the devices: on a machine with several GPUs each rank is billed all of them. What a
    trial prints goes where this process prints, and a trial that hangs, or kills its process, takes it along.
    """

    dashboard_url: str | None = None

    def __init__(self) -> None:
        self._exporters = NodeExporters(ThisNode())

    def run(self, stage: Stage, policy: Policy, run_trial: RunTrial, on_result: OnResult) -> None:
        """See `Launcher.run`."""
        check_local_resources(stage)
        self._exporters.ensure(ExporterPlan.of(stage.run, stage.config.telemetry))
        while (proposal := policy.propose()) is not None:
            if isinstance(proposal, NotNow):
                raise RuntimeError(NOTHING_RUNS)  # noqa: TRY004  (not its type is wrong, but its moment)
            spec = stage.open_trial(proposal)
            error = self._run_one(stage, spec, policy, run_trial)
            result = stage.outcome(proposal, error)
            policy.on_result(result)
            on_result(result)

    def close(self) -> None:
        """End the exporter, if there is one."""
        self._exporters.close()

    def _run_one(self, stage: Stage, spec: TrialSpec, policy: Policy, run_trial: RunTrial) -> str | None:
        if too_late(spec):
            return None
        size, port = spec.fidelity.ranks, free_port()
        gpus = gpus_per_rank(stage.config.resources.gpus_per_rank, size, float(torch.cuda.device_count()))
        spawn = multiprocessing.get_context("spawn")
        others = [
            spawn.Process(
                target=_run_rank, args=(run_trial, spec, stage.config, World(rank, size, port=port), gpus), daemon=True
            )
            for rank in range(1, size)
        ]
        for process in others:
            process.start()

        def report(record: EpochRecord) -> bool:
            goes_on = policy.on_epoch(spec.proposal.trial_id, checked_record(record))
            if not goes_on:
                note_stop(stage.run.trial_folder(spec.fidelity.stage, spec.proposal.trial_id))
            return goes_on

        error = None
        for attempt in range(stage.config.resources.retries + 1):
            context = TrialContext(spec, stage.config, World(0, size, port=port), gpus, report)
            try:
                run_rank_zero(run_trial, context)
            except (Exception, SystemExit) as failure:  # noqa: BLE001  (a trial may fail in any way; the search goes on)
                error = write_error(context.folder, failure)
                if size > 1 or attempt == stage.config.resources.retries:
                    break
            else:
                error = None
                break
        for process in others:
            process.join(timeout=30)
            if process.is_alive():
                process.kill()
        return error


def usable_cpus() -> int:
    """CPUs that this process may run on: fewer than the machine's inside an allocation of a job."""
    return len(os.sched_getaffinity(0))


def gpus_per_rank(wanted: float | None, ranks: int, available: float) -> float:
    """What the config says; without a word a GPU a rank, or equal parts where there are fewer, or none."""
    return min(1.0, math.floor(1e4 * available / ranks) / 1e4) if wanted is None else wanted


def never_stop(_: EpochRecord) -> bool:
    """The report of a rank that nobody listens to."""
    return True


def run_rank_zero(run_trial: RunTrial, context: TrialContext) -> None:
    """Run a trial's function on rank 0, and see to it that it leaves a result.

    Raises:
        TypeError: it left none, and returned none.
        Exception: whatever the function raises.
    """
    returned: Any = run_trial(context)
    if isinstance(returned, TrialResult) and returned.goes_on:
        write_left(returned, context.folder)
        return
    path = context.folder / "result.json"
    if not path.exists():
        result = checked_return(returned)
        try:
            write_json(path, finite_or_none(result.to_dict()))
        except (TypeError, ValueError) as error:
            raise TypeError(f"run_trial returned a TrialResult that is no JSON ({reason_of(error)})") from error


def too_late(spec: TrialSpec) -> bool:
    """Whether the command leaves before this trial could begin, for which it may have waited; asked before any rank."""
    reason, run = note_of(spec.run_dir).due(), RunDir(Path(spec.run_dir))
    if reason is not None:
        folder = run.trial_folder(spec.fidelity.stage, spec.proposal.trial_id)
        write_left(left_result(spec, run, reason), folder)
    return reason is not None


def note_stop(folder: Path) -> None:
    """Note that the policy stops a trial, before the trial hears of it.

    Tune stops its trials in the same way when the command breaks off, and they leave the same result.
    """
    write_json(folder / STOPPED_NAME, {})


def was_cut_off(folder: Path, result: TrialResult) -> bool:
    """Whether a trial that left a result as one that was stopped was not stopped by its policy: it is to go on."""
    return result.status == "pruned" and not result.diverged and not (folder / STOPPED_NAME).exists()


def write_left(result: TrialResult, folder: Path) -> None:
    """Leave the record of a trial that goes on in the next command: it is no result yet, and gets no row."""
    write_json(folder / LEFT_RESULT, finite_or_none(result.to_dict()))


def runs_here(config: RunConfig) -> bool:
    """Whether trials run on this machine alone, not on a Ray cluster that the config or the environment names."""
    joined = config.resources.address is not None or "RAY_ADDRESS" in os.environ
    return config.launcher == "inline" or not joined


def check_local_resources(stage: Stage) -> None:
    """Refuse a stage that could never start on this machine.

    Raises:
        UserError: it asks for more cores than there are.
    """
    wanted = stage.fidelity.ranks * stage.config.resources.cpus_per_rank
    have = usable_cpus()
    if wanted > have:
        raise UserError(
            f"stage {stage.fidelity.stage!r}: asks for {stage.fidelity.ranks} ranks of "
            f"{stage.config.resources.cpus_per_rank} CPUs each, {wanted} in all, but this machine has {have}. "
            "Lower ranks or resources.cpus_per_rank, or set resources.address to a Ray cluster."
        )


def _run_rank(run_trial: RunTrial, spec: TrialSpec, config: RunConfig, world: World, gpus: float) -> None:
    run_trial(TrialContext(spec, config, world, gpus, never_stop, counted_by_parent=True))
