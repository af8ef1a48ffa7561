"""Successive halving by loss and energy as a scheduler of Ray Tune, for anybody's trainable.

    judge = ParetoHalving(epochs=27, reduction_factor=3)   # wattier.halving
    tune.Tuner(trainable, tune_config=tune.TuneConfig(scheduler=EnergyAwareHalving(judge), num_samples=64))

where the trainable reports ``{"epoch": 3, "val_loss": 0.2, "energy_joules": 1234.5}`` after each epoch, with the joules
of all its processes since its first. Wattier's own search judges by the same class, without this shell.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Protocol

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from wattier.records import EpochRecord

log = logging.getLogger(__name__)


class Judge(Protocol):
    """Who decides whether a trial is worth its next epoch; told the same epoch twice it gives the same answer."""

    def go_on(self, trial_id: str, record: EpochRecord) -> bool:
        """Whether a trial goes on after an epoch; val_loss None = not finite."""


class EnergyAwareHalving(FIFOScheduler):
    """Stops trials that a judge of loss and joules gives up.

    Unlike Tune's own schedulers it goes by the epoch that the trainable reports, not by `training_iteration`, which
    starts at 1 again when a trial is retried or restored, and it stops a trial whose loss is not finite. A judge that
    is asked again about an epoch answers as before, so that a retried trial is not judged twice. Tune never saves and
    never restores a scheduler's state: after `Tuner.restore`, `replay` what earlier trials reported, or the first ones
    to come would be judged against nobody.
    """

    def __init__(
        self, judge: Judge, *, loss: str = "val_loss", energy: str = "energy_joules", epoch: str = "epoch"
    ) -> None:
        """loss, energy, epoch: names in the reported results; epochs count from 1, joules from the trial's start."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._judge, self._loss, self._energy, self._epoch = judge, loss, energy, epoch
        self._told_of_missing: set[str] = set()
        self.stopped: dict[str, str] = {}  # trial id -> why

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:  # noqa: ARG002
        """Loss and joules are both minimised, whatever Tune is told of a metric for its own best result."""
        return True

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ARG002
        """Continue or stop."""
        return str(TrialScheduler.CONTINUE if self._goes_on(trial.trial_id, result) else TrialScheduler.STOP)

    def replay(self, trial_id: str, results: list[Mapping[str, Any]]) -> None:
        """Let the judge hear what a trial of an earlier process reported."""
        for result in results:
            self._goes_on(trial_id, result)

    def debug_string(self) -> str:
        """One line for Tune's status."""
        return f"Using EnergyAwareHalving: {len(self.stopped)} trials stopped early"

    def _goes_on(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        epoch, loss = _number(result.get(self._epoch)), _number(result.get(self._loss))
        if epoch is None or epoch < 1 or self._loss not in result:
            self._tell_of_missing(self._epoch if epoch is None or epoch < 1 else self._loss, result)
            return True
        if loss is None:
            self.stopped[trial_id] = f"{self._loss} is not finite in epoch {epoch:g}"
            self._judge.go_on(trial_id, _record(int(epoch), None, None))
            return False
        joules = _number(result.get(self._energy))
        if joules is None:
            self._tell_of_missing(self._energy, result)
        goes_on = self._judge.go_on(trial_id, _record(int(epoch), loss, joules))
        if not goes_on:
            self.stopped[trial_id] = f"given up after epoch {epoch:g}"
        return goes_on

    def _tell_of_missing(self, name: str, result: Mapping[str, Any]) -> None:
        if name not in self._told_of_missing:
            self._told_of_missing.add(name)
            log.warning(
                "EnergyAwareHalving: a trial reported no usable %r (it reported %s), and goes on unjudged by it. "
                "Report it, or name yours: EnergyAwareHalving(judge, loss=..., energy=..., epoch=...)",
                name,
                ", ".join(sorted(map(str, result)))[:300],
            )


def _record(epoch: int, loss: float | None, joules: float | None) -> EpochRecord:
    return EpochRecord(epoch, loss, loss, {}, 0, 0.0, 0.0, joules)


def _number(value: Any) -> float | None:
    """A finite number, also one of numpy or of torch; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
