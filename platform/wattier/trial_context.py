"""What a trial is told, how it makes itself known, and the record it leaves: the same for our models and for yours."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wattier.config import RunConfig
from wattier.errors import UserError
from wattier.outcome import DIVERGED
from wattier.power_cap import cap_ratio
from wattier.records import EpochRecord, Fidelity, Proposal, TrialResult
from wattier.rundir import RunDir, hold_lock, sweep_temporary_files
from wattier_gnn.distributed import World
from wattier_telemetry import EnergyReport, TrialRegistration, bill
from wattier_telemetry.source import PowerSource

ORPHAN_WAIT_SECONDS = 30


@dataclass(frozen=True)
class TrialSpec:
    """What to train, in plain picklable values. early_stop_patience None = train all epochs of the fidelity.

    warm_start_from: stage whose best weights of the same trial the training begins with.
    seed: of the initial weights and the order of structures; members of an ensemble have different ones.
    """

    run_dir: str
    proposal: Proposal
    fidelity: Fidelity
    early_stop_patience: int | None = None
    warm_start_from: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class TrialContext:
    """A trial as one of its processes sees it.

    Attributes:
        spec: what to train.
        config: the run's config.
        world: this process's rank among the trial's ranks.
        gpus: the part of a GPU that is this rank's, 0 on a CPU.
        counted_by_parent: this process is a child of rank 0's, whose estimate counts the time of its children.
        report: rank 0 calls it after each epoch; False means stop.
    """

    spec: TrialSpec
    config: RunConfig
    world: World
    gpus: float
    report: Callable[[EpochRecord], bool]
    counted_by_parent: bool = False

    @property
    def device_fraction(self) -> float:
        """The part of each metered device that this rank owns: of its GPU, or of the machine's cores."""
        return min(1.0, self.gpus or self.config.resources.cpus_per_rank / (os.cpu_count() or 1))

    @property
    def folder(self) -> Path:
        """The only place this trial writes to."""
        run = RunDir(Path(self.spec.run_dir))
        return run.trial_folder(self.spec.fidelity.stage, self.spec.proposal.trial_id)


RunTrial = Callable[[TrialContext], TrialResult | None]


@contextmanager
def registered(context: TrialContext, source: PowerSource) -> Iterator[dict[str, Any]]:
    """Make this rank visible to the node's exporter for as long as it lives; yields the fields to update."""
    spec = context.spec
    fields: dict[str, Any] = {
        "run": context.config.name,
        "stage": spec.fidelity.stage,
        "trial": spec.proposal.trial_id,
        "rank": context.world.rank,
        "pid": os.getpid(),
        "device_uuids": tuple(device.uuid for device in source.devices()),
        "fraction": context.device_fraction,
        "epochs": spec.fidelity.epochs,
    }
    first = TrialRegistration(**fields)
    first.write()
    try:
        yield fields
    finally:
        first.withdraw()


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Wait until an orphan of a killed run has left the folder."""
    for _ in range(ORPHAN_WAIT_SECONDS * 10):
        with hold_lock(folder / "lock") as held:
            if held:
                sweep_temporary_files(folder)
                yield
                return
        time.sleep(0.1)
    raise TimeoutError(f"{folder} is still in use by another process after {ORPHAN_WAIT_SECONDS} s")


def ended_result(context: TrialContext, energy: EnergyReport, **reached: Any) -> TrialResult:
    """The record of a trial that ended by itself or was stopped, held against what the config allows.

    Args:
        context: rank 0's.
        energy: the whole bill.
        reached: the fields of a `TrialResult` that say how far it came.
    """
    spec = context.spec
    result = TrialResult(
        run=context.config.name,
        trial_id=spec.proposal.trial_id,
        params=spec.proposal.params,
        fidelity=spec.fidelity,
        wall_seconds=energy.seconds,
        energy=energy,
        devices=tuple(sorted({share.device_uuid for share in energy.shares})),
        error=DIVERGED if reached["diverged"] else None,
        attempts=count_attempts(context.folder),
        projected_joules=spec.proposal.projected_joules,
        **reached,
    )
    return judged(result, context.config)


def failed_result(spec: TrialSpec, run: RunDir, error: str) -> TrialResult:
    """The record of a trial that left no ``result.json``: rebuilt from its epochs and its energy journals."""
    folder, config = run.trial_folder(spec.fidelity.stage, spec.proposal.trial_id), run.config()
    try:
        epochs = run.epochs(spec.fidelity.stage, spec.proposal.trial_id)
    except UserError as damage:  # a stranger's trial may write anything
        epochs, error = [], f"{error}; and {damage}"
    last = epochs[-1] if epochs else None
    energy = bill(folder)
    result = TrialResult(
        run=config.name,
        trial_id=spec.proposal.trial_id,
        params=spec.proposal.params,
        fidelity=spec.fidelity,
        status="failed",
        val_loss=last.val_loss if last else None,
        val_by_source=last.val_by_source if last else {},
        epochs_done=last.epoch if last else 0,
        structures_seen=last.structures_seen if last else 0,
        wall_seconds=energy.seconds,
        energy=energy,
        error=error,
        attempts=count_attempts(folder),
        projected_joules=spec.proposal.projected_joules,
    )
    return judged(result, config)


def left_result(spec: TrialSpec, run: RunDir, reason: str) -> TrialResult:
    """The record of a trial that was told to leave before it could say anything itself."""
    return replace(failed_result(spec, run, ""), status="interrupted", ended=reason, error=None)


def judged(result: TrialResult, config: RunConfig) -> TrialResult:
    """The same result, held against what the config allows."""
    return result.flagged(
        config.telemetry.throttled_share,
        limits=config.search.constraints.limits(),
        capped=cap_ratio(config, result.params) is not None,
    )


def count_attempts(folder: Path) -> int:
    """How often a trial was begun."""
    return max(1, len(list(folder.glob("*rank0.energy.json"))))
