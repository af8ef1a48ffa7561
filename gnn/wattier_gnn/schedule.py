"""The learning rate over a training: warm-up, then a plateau rule or a cosine."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

ScheduleKind = Literal["plateau", "cosine"]


class Schedule:
    """Sets the optimizer's learning rate: `before_step` of every step, `after_epoch` of every epoch.

    plateau: falls by a factor when the validation loss has not improved for some epochs. cosine: falls from the full
    rate to the least one over all epochs (Loshchilov, Hutter, ICLR 2017, without restarts). Both are multiplied by a
    warm-up that rises linearly from 1 / steps, or from 0 at the first structure, to 1.
    """

    def __init__(  # noqa: PLR0913  (all are keywords)
        self,
        optimizer: torch.optim.Optimizer,
        *,
        kind: ScheduleKind,
        epochs: int,
        warmup_steps: int,
        warmup_epochs: float,
        min_learning_rate: float,
        plateau_factor: float,
        plateau_patience: int,
    ) -> None:
        self._optimizer, self._kind, self._epochs = optimizer, kind, epochs
        self._warmup_steps, self._warmup_epochs = warmup_steps, warmup_epochs
        self._full_rate = float(optimizer.param_groups[0]["lr"])
        self._least_rate = min(min_learning_rate, self._full_rate)
        self._plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=plateau_factor, patience=plateau_patience, min_lr=min_learning_rate
        )
        self._plateau_rate = self._full_rate

    @property
    def learning_rate(self) -> float:
        """The present one."""
        return float(self._optimizer.param_groups[0]["lr"])

    def before_step(self, steps_done: int, epochs_done: float) -> None:
        """The rate of the next step. epochs_done: whole ones, and the share of the present one's structures."""
        rate = self._plateau_rate
        if self._kind == "cosine":
            way = min(1.0, epochs_done / self._epochs)
            rate = self._least_rate + (self._full_rate - self._least_rate) * (1 + math.cos(math.pi * way)) / 2
        self._set(rate * self._warmup(steps_done, epochs_done))

    def after_epoch(self, val_loss: float) -> None:
        """Judge an epoch by its validation loss."""
        if self._kind == "plateau":
            self._set(self._plateau_rate)  # the rule knows nothing of the warm-up
            self._plateau.step(val_loss)
            self._plateau_rate = self.learning_rate

    def state_dict(self) -> dict[str, Any]:
        """Numbers and strings, for a checkpoint."""
        return {"plateau": self._plateau.state_dict(), "plateau_rate": self._plateau_rate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._plateau.load_state_dict(state["plateau"])
        self._plateau_rate = float(state["plateau_rate"])

    def _warmup(self, steps_done: int, epochs_done: float) -> float:
        by_steps = (steps_done + 1) / self._warmup_steps if self._warmup_steps else 1.0
        by_epochs = epochs_done / self._warmup_epochs if self._warmup_epochs else 1.0
        return min(1.0, by_steps, by_epochs)

    def _set(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
