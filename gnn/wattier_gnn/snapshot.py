"""All that a training needs to go on where it was, in one file; and when to write that file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from wattier_gnn import checkpoint
from wattier_gnn.averaging import WeightAverage
from wattier_gnn.distributed import World, from_rank_zero, gather_bytes
from wattier_gnn.model import FoundationModel
from wattier_gnn.schedule import Schedule
from wattier_gnn.sharding import load_state, model_state, optimizer_state
from wattier_gnn.structure import DataError

MOST_STEPS_UNASKED = 1000
LONGEST_UNASKED_SECONDS = 1.0  # where somebody may ask the training to leave
SLOWEST_SAVE = 3.0  # times what the slowest one took until now: file systems have bad days

Leaves = Callable[[float], bool]  # whether to save and leave now, given how many seconds that will take


@dataclass
class TrainState:
    """Where a training is: what a restart needs beside the tensors.

    Attributes:
        epoch: epochs finished.
        step: steps of the next epoch that are done.
        steps: steps done in all.
        loss_sum, loss_steps: over the steps of that epoch which were taken; a step that is not finite is not.
        seconds, data_wait_seconds: spent on that epoch so far.
        anchor_val_loss: the best one at the last significant improvement, by which the next one is judged: many small
            steps add up to a significant one. None = the best one.
        save_seconds: what the slowest checkpoint took to write.
        ended: "" while it runs; "epochs", "early_stop", "stopped", "diverged"; "left" where it goes on another time.
        extra: whatever the caller hangs on a checkpoint.
    """

    epoch: int = 0
    step: int = 0
    steps: int = 0
    loss_sum: float = 0.0
    loss_steps: float = 0.0
    seconds: float = 0.0
    data_wait_seconds: float = 0.0
    best_val_loss: float = math.inf
    best_epoch: int = 0
    epochs_without_improvement: int = 0
    anchor_val_loss: float | None = None
    save_seconds: float = field(default=0.0, compare=False)
    structures_seen: int = 0
    ended: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """The file of one training, and the parts whose state it holds. Every rank must call `save` and `restore`.

    order_of_steps: by what the n-th step of an epoch is decided; another one would make `TrainState.step` point at
    other structures.
    """

    path: Path
    model: FoundationModel
    average: WeightAverage | None
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    order_of_steps: dict[str, Any]
    world: World
    device: torch.device

    def save(self, state: TrainState) -> None:
        """Write the file, on rank 0; the same whatever the sharding."""
        content: dict[str, Any] = {
            "model": model_state(self.model),
            "optimizer": optimizer_state(self.model, self.optimizer),
            "schedule": self.schedule.state_dict(),
            "state": asdict(state),
            "order_of_steps": self.order_of_steps,
            "random": [_generator_states(part) for part in gather_bytes(_own_generators(self.device), self.device)],
        }
        if self.average is not None:
            content |= {"average": model_state(self.average.model), "average_steps": self.average.n_steps.cpu()}
        if self.world.rank == 0:
            checkpoint.save_atomically(content, self.path)

    def restore(self) -> TrainState | None:
        """Put back what the file holds; None where there is none.

        Raises:
            DataError: the file is damaged, or of another model or trainer.
        """
        if from_rank_zero(float(self.path.exists()), self.device) == 0:
            return None
        saved = checkpoint.load(self.path)
        try:
            state = TrainState(**saved["state"])
            if state.step and saved["order_of_steps"] != self.order_of_steps:
                raise ValueError("it was saved within an epoch of other structures or batches")  # noqa: TRY301
            load_state(self.model, saved["model"], self.optimizer, saved["optimizer"])
            if self.average is not None:
                load_state(self.average.model, saved["average"])
                self.average.n_steps.copy_(saved["average_steps"])
            self.schedule.load_state_dict(saved["schedule"])
            if self.world.rank < len(saved["random"]):
                _set_generators(saved["random"][self.world.rank], self.device)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.path}: does not fit this model and trainer ({str(error).splitlines()[0]}), but must come "
                "from the same config. Remove the file to start over."
            ) from error
        return state


class Due(Enum):
    """What a training does after a step."""

    GO_ON = "go on"
    SAVE = "save"
    LEAVE = "leave"  # and save first


class CheckpointClock:
    """Says after which steps to save, about every `seconds`, and when to leave: alike on all ranks, by rank 0's word.

    Ranks agree by a message of rank 0, which is not worth one a step: each message also says how many steps to take
    before the next, half of what is left of the time.
    """

    def __init__(self, seconds: float, device: torch.device, leaves: Leaves | None = None) -> None:
        """leaves: asked on rank 0 about once a second; None = nobody ever asks this training to leave."""
        self._seconds, self._device, self._leaves = seconds, device, leaves
        self._saved_at = self._asked_at = time.monotonic()
        self._steps = self._ask_after = 1

    def after_step(self, save_seconds: float) -> Due:
        """Asked once after every step, on every rank; save_seconds: what the slowest checkpoint took until now."""
        self._steps -= 1
        if self._steps > 0:
            return Due.GO_ON
        now = time.monotonic()
        left = self._seconds - (now - self._saved_at)
        per_step = max((now - self._asked_at) / self._ask_after, 1e-6)
        due = left <= 0
        wait = self._seconds if due else left
        if self._leaves is not None:
            wait = min(wait, 2 * LONGEST_UNASKED_SECONDS)
        wanted = min(MOST_STEPS_UNASKED, max(1, int(wait / per_step / 2)))
        if self._leaves is not None and self._leaves(2 * wanted * per_step + SLOWEST_SAVE * save_seconds):
            wanted = 0
        answer = int(from_rank_zero(float(-wanted if due else wanted), self._device))
        self._steps = self._ask_after = max(1, abs(answer))
        self._asked_at = now
        if answer == 0:
            return Due.LEAVE
        return Due.SAVE if answer < 0 else Due.GO_ON

    def other_steps(self) -> None:
        """Steps of another length follow, as validation's do: ask after the first of them."""
        self._steps = self._ask_after = 1
        self._asked_at = time.monotonic()

    def saved(self) -> None:
        """Begin to count anew: there is a checkpoint, of the middle or of the end of an epoch."""
        self._saved_at = time.monotonic()


def _own_generators(device: torch.device) -> torch.Tensor:
    """The states of torch's generators that this process may draw from, one after the other: uint8 [n]."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def _generator_states(joined: torch.Tensor) -> dict[str, torch.Tensor]:
    length = len(torch.get_rng_state())
    return {"cpu": joined[:length].clone(), "device": joined[length:].clone()}


def _set_generators(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and len(states["device"]):
        torch.cuda.set_rng_state(states["device"], device)
