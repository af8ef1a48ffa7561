"""A search over a model of your own: all that Wattier needs is a function that trains it and reports epochs.

def run_trial(trial):
    model = MyModel(width=trial.params["width"])
    for _ in range(trial.epochs):
        loss = model.train_one_epoch(trial.params["learning_rate"])
        if not trial.report(loss):
            return

found = wattier.search(space, run_trial, stages, budget={"kilowatt_hours": 1.0}, run_dir="runs/mine")
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from wattier.departure import MARGIN_SECONDS, note_of
from wattier.errors import UserError
from wattier.metering import metered
from wattier.outcome import reason_of, shown
from wattier.peak_memory import peak_memory_bytes, reset_peak_memory
from wattier.records import EpochRecord, Params, Status, TrialResult, finite_or_none
from wattier.rundir import RunDir, append_json_line, write_json
from wattier.trial_context import RunTrial, TrialContext, ended_result, own_folder, registered
from wattier_telemetry import EnergyReport, Share, TrialRegistration, bill
from wattier_telemetry.journal import Journal

STATED = "stated"


class StopTrial(Exception):  # noqa: N818  (it is no error)
    """Raised by `Trial.report` when it is called again after it said that the trial is over."""


class Trial:
    """One trial as your function sees it.

    Attributes:
        params: hyper-parameters by name.
        structures: how much of the data to train on, as the stage says; None = all of it.
        seed: for initial weights and the order of the data.
        rank, ranks: this process among those of the trial; address and port are those of rank 0.
        folder: the trial's own, for checkpoints; it is there again when the trial is resumed.
        left: why `report` said that the trial is over, where it is over for this command alone: walltime or a signal.
            The next one calls your function again.
        reported_epochs: epochs that an earlier attempt reported. Go on behind them if you saved a checkpoint, and pass
            `epoch` to `report`; or begin anew, and they are replaced.
    """

    def __init__(self, context: TrialContext, reported: list[EpochRecord], energy: _Energy) -> None:
        spec = context.spec
        self.params: Params = dict(spec.proposal.params)
        self.structures, self.ranks = spec.fidelity.structures, context.world.size
        self.seed, self.rank = spec.seed, context.world.rank
        self.address, self.port = context.world.address, context.world.port
        self.folder = context.folder
        self.reported_epochs = reported[-1].epoch if reported else 0
        self.last: EpochRecord | None = None
        self.stopped = False
        self.left: str | None = None
        self._leave = note_of(spec.run_dir)
        self._context, self._energy = context, energy
        self._epoch_began = time.monotonic()

    @property
    def epochs(self) -> int:
        """How many to train at this stage; not to be set, since trials of a stage must be alike."""
        return self._context.spec.fidelity.epochs

    def report(  # noqa: PLR0913
        self,
        val_loss: float,
        *,
        epoch: int | None = None,
        train_loss: float | None = None,
        structures_seen: int | None = None,
        energy_joules: float | None = None,
        seconds: float | None = None,
    ) -> bool:
        """Report an epoch; False = the trial is over, return. Other ranks than 0 report nothing, and are told True.

        Args:
            val_loss: what is minimised; not finite = the training diverged.
            epoch: counted from 1; the one after the last where it is not given.
            train_loss: for the record.
            structures_seen: examples since the trial began, for joules a structure.
            energy_joules: since the trial began, where `telemetry.source` is `stated`: nothing is measured then.
            seconds: since the trial began, with stated joules.

        Raises:
            TypeError: a figure is no number or is missing, or joules are stated that are measured.
            ValueError: a stated figure is negative or not finite, or the epoch is none of this stage's.
            StopTrial: it was said before that the trial is over.
        """
        if self.rank != 0:
            return True
        if self.stopped:
            raise StopTrial
        number = (self.last.epoch + 1 if self.last else 1) if epoch is None else _count("epoch", epoch)
        if not 1 <= number <= self.epochs:
            raise ValueError(f"report: epoch is {number}, but must be 1 to {self.epochs}, the stage's epochs")
        if structures_seen is None and "joules_per_structure" in self._context.config.search.objectives:
            raise TypeError("report: structures_seen is not given, but the objective joules_per_structure needs it")
        joules = self._energy.now(energy_joules, seconds)
        loss = finite_or_none(_real("val_loss", val_loss))
        now = time.monotonic()
        self.last = EpochRecord(
            epoch=number,
            train_loss=None if train_loss is None else finite_or_none(_real("train_loss", train_loss)),
            val_loss=loss,
            val_by_source={},
            structures_seen=0 if structures_seen is None else _count("structures_seen", structures_seen),
            seconds=now - self._epoch_began,
            learning_rate=None,
            energy_joules=joules,
            time_seconds=time.time(),
        )
        self._epoch_began = now
        append_json_line(self.folder / "epochs.jsonl", self.last.to_dict())
        try:
            go_on = self._context.report(self.last) and loss is not None and number < self.epochs
        except SystemExit:  # how Ray Tune tells a function that its scheduler stopped it
            self.stopped = True
            raise
        if go_on and (reason := self._leave.due(MARGIN_SECONDS + self.last.seconds)) is not None:
            self.left, go_on = reason, False  # the next epoch would end too late
        self.stopped = not go_on
        return go_on


class OwnTrial:
    """Makes a `RunTrial` of a function of one `Trial`: under the meter, registered, resumed, recorded."""

    def __init__(self, function: Callable[[Trial], Any]) -> None:
        self.function = function

    def __call__(self, context: TrialContext) -> TrialResult | None:
        """Run the function on this rank; the result on rank 0, which is also in ``result.json``."""
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        device = torch.device("cuda", 0) if context.gpus and torch.cuda.is_available() else torch.device("cpu")
        with ExitStack() as stack:
            if context.world.rank == 0:
                stack.enter_context(own_folder(context.folder))
            energy = stack.enter_context(_energy_of(context))
            reset_peak_memory(device)
            trial = Trial(context, _reported(context), energy)
            stop: BaseException | None = None
            try:
                final = self.function(trial)
            except StopTrial:
                final = None
            except SystemExit as error:
                if not trial.stopped:  # the function's own sys.exit
                    raise
                final, stop = None, error
            energy.close()
            if context.world.rank != 0:
                return None
            if trial.last is None or (final is not None and not trial.stopped):
                _report_final(trial, final)
            result = _result(context, trial, started_at, peak_memory_bytes(device))
            if not result.goes_on:
                write_json(context.folder / "result.json", result.to_dict())
            if stop is not None:
                raise stop
            return result


def own_trial_of(name: str) -> RunTrial:
    """The trial of a config's ``trial: module:function``.

    Raises:
        UserError: there is no such function to import.
    """
    module_name, _, qualified = name.partition(":")
    if module_name == "__main__" or "<" in qualified:
        raise UserError(
            f"trial: {name!r} is known only to the script that called wattier.search. Start that script again; it goes "
            "on from here."
        )
    try:
        found: Any = importlib.import_module(module_name)
        for part in qualified.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"trial: {name!r} cannot be imported ({error}), but must be module:function, on the path of every process. "
            "Install its package, or set PYTHONPATH."
        ) from error
    except (Exception, SystemExit) as error:  # a module may do anything when it is imported
        raise UserError(f"trial: the module of {name!r} fails at import ({reason_of(error)}). Mend it.") from error
    if not callable(found):
        raise UserError(f"trial: {name!r} is a {type(found).__name__}, but must be a function of one trial. Name one.")
    return OwnTrial(found)


class _Energy:
    """Joules of this trial so far, over all attempts: measured, or as the function states them."""

    def __init__(self, context: TrialContext, *, stated: bool) -> None:
        self.context, self.stated = context, stated
        self.meter: Any = None
        self.registration: dict[str, Any] | None = None
        self._began = time.time()
        self._journal: Journal | None = None
        self._report = EnergyReport.empty()
        if stated and context.world.rank == 0:
            number = 1 + len(list(context.folder.glob("*rank0.energy.json")))
            self._journal = Journal(context.folder / f"attempt{number}-rank0.energy.json")

    def now(self, joules: float | None, seconds: float | None) -> float | None:
        if not self.stated:
            if joules is not None or seconds is not None:
                raise TypeError(
                    "report: energy_joules is stated, but this run measures it. Set telemetry.source to stated, or "
                    "leave energy_joules and seconds out"
                )
            self.meter.so_far()
        else:
            self._state(joules, seconds)
        total = bill(self.context.folder)
        if self.registration is not None:
            self.registration |= {"energy_joules": total.joules, "method": total.method}
            TrialRegistration(**self.registration).write()
        return total.joules

    def _state(self, joules: float | None, seconds: float | None) -> None:
        for name, value in (("energy_joules", joules), ("seconds", seconds)):
            if value is not None and not (math.isfinite(_real(name, value)) and value >= 0):
                raise ValueError(f"report: {name} is {value}, but must be finite and not negative")
        end = self._began + (time.time() - self._began if seconds is None else seconds)
        uuid = f"{STATED}:{self.context.spec.fidelity.stage}:{self.context.spec.proposal.trial_id}"
        share = Share(uuid, "node", self._began, end, 1.0, None if joules is None else float(joules), "estimated")
        self._report = EnergyReport.of([share])
        if self._journal is not None:
            self._journal.write(self._report)

    def close(self) -> None:
        """The bill of this attempt is final."""
        if self.meter is not None:
            self.meter.close()
        if self._journal is not None:
            self._journal.finish(self._report)
            self._journal = None


@contextmanager
def _energy_of(context: TrialContext) -> Iterator[_Energy]:
    telemetry, rank = context.config.telemetry, context.world.rank
    if telemetry.source == STATED:
        energy = _Energy(context, stated=True)
        try:
            yield energy
        finally:
            energy.close()
        return
    with (
        metered(
            context.folder,
            f"rank{rank}",
            telemetry,
            on_gpu=context.gpus > 0,
            fraction=context.device_fraction,
            counted_by_parent=context.counted_by_parent,
            traced=True,
        ) as (meter, source),
        registered(context, source) as registration,
    ):
        energy = _Energy(context, stated=False)
        energy.meter, energy.registration = meter, registration
        yield energy


def _reported(context: TrialContext) -> list[EpochRecord]:
    run = RunDir(Path(context.spec.run_dir))
    return run.epochs(context.spec.fidelity.stage, context.spec.proposal.trial_id)


def _report_final(trial: Trial, final: Any) -> None:
    """A function may return its final loss in the place of reports."""
    if final is None:
        raise TypeError(
            "run_trial ended without a report, but must call trial.report(val_loss) once an epoch, or return its final "
            "loss"
        )
    trial.report(_real("the returned loss", final), epoch=trial.epochs)


def _result(context: TrialContext, trial: Trial, started_at: str, memory_bytes: int | None) -> TrialResult:
    """The record of a function that ended or was stopped."""
    last = trial.last
    if last is None:
        raise RuntimeError("a trial without a report has no result")
    diverged = last.val_loss is None
    if last.epoch < trial.epochs and not trial.stopped:
        raise RuntimeError(
            f"run_trial returned after epoch {last.epoch} of {trial.epochs}, though report() said to go on; trials of "
            "a stage must be alike. Train all epochs, or return the final loss"
        )
    status: Status = "complete" if last.epoch >= trial.epochs and not diverged else "pruned"
    if trial.left is not None:
        status = "interrupted"
    return ended_result(
        context,
        bill(context.folder),
        status=status,
        val_loss=last.val_loss,
        val_by_source={},
        epochs_done=last.epoch,
        structures_seen=last.structures_seen,
        started_at=started_at,
        diverged=diverged,
        peak_memory_bytes=memory_bytes,
        ended=trial.left,
    )


def _real(name: str, value: Any) -> float:
    """A number as a float, NumPy's and torch's included."""
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError(f"a {type(value).__name__}")  # noqa: TRY301  (float() would take it)
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(f"report: {name} is {shown(value)}, but must be a number") from error


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < 0:
        raise TypeError(f"report: {name} is {shown(value)}, but must be a whole number, not negative")
    return int(value)
