"""The training loop: DDP, AdamW, plateau schedule, early stop, restart from the last finished epoch.

It knows nothing of searches or joules: whoever calls it listens through ``on_epoch`` and may say stop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from wattier_gnn import checkpoint
from wattier_gnn.distributed import World, all_sum, from_rank_zero
from wattier_gnn.loss import error_sums, loss_terms, metrics_by_source, weighted_loss
from wattier_gnn.model import FoundationModel
from wattier_gnn.sampling import epoch_batches
from wattier_gnn.store import Store
from wattier_gnn.structure import DataError


@dataclass(frozen=True)
class TrainConfig:
    """How to train. batch_structures counts structures of one step over all ranks.

    early_stop_patience: epochs without an improvement of min_improvement_ratio (relative) before training ends.
    ema_decay: decay a step of the weight average that is evaluated and released; 0 turns averaging off.
    val_energy_weight, val_force_weight: weights of the validation loss, if not those of training: trials that are
    compared by their validation loss must all be measured with the same ones.
    """

    epochs: int
    batch_structures: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    energy_weight: float = 1.0
    force_weight: float = 1.0
    gradient_clip_norm: float = 10.0
    early_stop_patience: int = 10
    min_improvement_ratio: float = 1e-3
    plateau_factor: float = 0.5
    plateau_patience: int = 5
    min_learning_rate: float = 1e-5
    ema_decay: float = 0.99
    val_energy_weight: float | None = None
    val_force_weight: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class EpochReport:
    """What one epoch left behind; `val_by_source` is that of `loss.metrics_by_source`."""

    epoch: int
    train_loss: float
    val_loss: float
    val_by_source: dict[str, dict[str, float]]
    structures_seen: int
    seconds: float
    learning_rate: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass
class TrainState:
    """What a restart needs beside the tensors."""

    epoch: int = 0
    best_val_loss: float = math.inf
    best_epoch: int = 0
    epochs_without_improvement: int = 0
    structures_seen: int = 0
    ended: str = ""  # "", "epochs", "early_stop", "stopped", "diverged"
    extra: dict[str, Any] = field(default_factory=dict)


OnEpoch = Callable[[EpochReport], bool]


class Trainer:
    """One training of one model in this process; the other ranks run the same code."""

    def __init__(  # noqa: PLR0913  (a training needs them all, and they come from different places)
        self,
        model: FoundationModel,
        store: Store,
        config: TrainConfig,
        *,
        train_indices: Any,
        val_indices: Any,
        folder: Path,
        device: torch.device,
        world: World | None = None,
    ) -> None:
        self.world = world or World()
        self.store, self.config, self.folder, self.device = store, config, folder, device
        self.train_indices, self.val_indices = train_indices, val_indices
        self.model = model.to(device)
        self.average = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=_warmed_average(config.ema_decay))
        self.wrapped: nn.Module = self.model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer,
            factor=config.plateau_factor,
            patience=config.plateau_patience,
            min_lr=config.min_learning_rate,
        )
        self.state = TrainState()

    @property
    def last_path(self) -> Path:
        """Checkpoint of the last finished epoch, for restart."""
        return self.folder / "last.pt"

    @property
    def best_path(self) -> Path:
        """Weights of the best epoch on validation."""
        return self.folder / "best.pt"

    def run(self, on_epoch: OnEpoch) -> TrainState:
        """Train from the last checkpoint, if there is one, until an end is reached; `on_epoch` is called on rank 0."""
        self._restore()
        if self.world.size > 1:
            self.wrapped = DistributedDataParallel(self.model)
        try:
            while not self.state.ended:
                self._epoch(on_epoch)
        finally:
            # Gone before the process group: as the group's last holder it would destroy it, and wait, holding the GIL,
            # for a thread that needs the GIL.
            self.wrapped = self.model
        return self.state

    def _epoch(self, on_epoch: OnEpoch) -> None:
        started = time.monotonic()
        train_loss = self._train_epoch(self.state.epoch)
        val_loss, by_source = self.validate()
        self.state.epoch += 1
        self.state.structures_seen += len(self.train_indices)
        self.plateau.step(val_loss)
        improved = self._note(train_loss, val_loss)
        report = EpochReport(
            self.state.epoch, train_loss, val_loss, by_source, self.state.structures_seen,
            time.monotonic() - started, self.optimizer.param_groups[0]["lr"],
        )  # fmt: skip
        # Reported first, saved second: a process killed between the two trains this epoch again and reports it
        # again, where the other order would lose the report.
        if not self._may_go_on(report, on_epoch) and not self.state.ended:
            self.state.ended = "stopped"
        self._save(improved=improved)

    def validate(self) -> tuple[float, dict[str, dict[str, float]]]:
        """Validation loss (mean over sources of scaled errors) and metrics by source, of the averaged weights."""
        sums = evaluate_sums(
            self.evaluated(), self.store, self.val_indices, self.config.batch_structures, self.device, self.world
        )
        by_source = metrics_by_source(sums, self.store.sources)
        scales = dict(zip(self.store.sources, self.model.config.energy_scale_ev, strict=True))
        energy, force = self.config.val_energy_weight, self.config.val_force_weight
        energy = self.config.energy_weight if energy is None else energy
        force = self.config.force_weight if force is None else force
        return weighted_loss(by_source, scales, energy, force), by_source

    def evaluated(self) -> FoundationModel:
        """The model whose metrics are reported and whose weights are kept."""
        model = self.average.module if self.config.ema_decay else self.model
        if not isinstance(model, FoundationModel):
            raise TypeError(f"averaged model is {type(model).__name__}, but must be FoundationModel")
        return model

    def _train_epoch(self, epoch: int) -> float:
        """Mean loss of the steps that were taken; NaN if there was none."""
        self.wrapped.train()
        total, steps = 0.0, 0
        for indices in epoch_batches(
            self.train_indices, self.config.batch_structures, seed=self.config.seed, epoch=epoch,
            rank=self.world.rank, world_size=self.world.size, shuffle=True,
        ):  # fmt: skip
            loss = self._step(indices)
            if math.isfinite(loss):
                total, steps = total + loss, steps + 1
        return total / steps if steps else math.nan

    def _step(self, indices: Any) -> float:
        """One optimiser step; the loss is the global batch's whatever the number of ranks."""
        batch = self.store.batch(indices).to(self.device)
        prediction = self.wrapped(batch)
        energy_sum, force_sum = loss_terms(
            prediction, batch, self.model.energy_scale_ev, self.config.energy_weight, self.config.force_weight
        )
        counts = all_sum(torch.tensor([len(indices), int(batch.force_mask.sum())], device=self.device))
        # DDP averages gradients over ranks: times the world size, over global counts, is the global batch's mean.
        loss = (energy_sum / counts[0].clamp(min=1) + force_sum / counts[1].clamp(min=1)) * self.world.size
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip_norm)
        value = float(all_sum(loss.detach() / self.world.size))
        # Both are the same on all ranks. The loss must be asked too: the gradient of |x - NaN| is 0.
        if math.isfinite(value) and torch.isfinite(norm):
            self.optimizer.step()
            self.average.update_parameters(self.model)
        return value

    def _note(self, train_loss: float, val_loss: float) -> bool:
        """Update the early-stop counters; True when this epoch is the best so far."""
        state = self.state
        if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
            state.ended = "diverged"
            return False
        improved = val_loss < state.best_val_loss
        significant = val_loss < state.best_val_loss * (1 - self.config.min_improvement_ratio)
        state.epochs_without_improvement = 0 if significant else state.epochs_without_improvement + 1
        if improved:
            state.best_val_loss, state.best_epoch = val_loss, state.epoch
        if state.epoch >= self.config.epochs:
            state.ended = "epochs"
        elif state.epochs_without_improvement >= self.config.early_stop_patience:
            state.ended = "early_stop"
        return improved

    def _may_go_on(self, report: EpochReport, on_epoch: OnEpoch) -> bool:
        """Rank 0 asks; the others hear the answer, also when asking ends in an exception."""
        if self.world.rank != 0:
            return from_rank_zero(0.0, self.device) > 0
        answer = False
        try:
            answer = on_epoch(report)
        finally:
            from_rank_zero(float(answer), self.device)
        return answer

    def _save(self, *, improved: bool) -> None:
        if self.world.rank != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if improved:
            weights = {"model": self.evaluated().state_dict(), "config": self.model.config.to_dict()}
            checkpoint.save_atomically(weights, self.best_path)
        checkpoint.save_atomically(
            {
                "model": self.model.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "plateau": self.plateau.state_dict(),
                "state": asdict(self.state),
            },
            self.last_path,
        )

    def _restore(self) -> None:
        found = from_rank_zero(float(self.last_path.exists()), self.device) > 0
        if not found:
            return
        saved = checkpoint.load(self.last_path, self.device)
        try:
            self.model.load_state_dict(saved["model"])
            self.average.load_state_dict(saved["average"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.plateau.load_state_dict(saved["plateau"])
            self.state = TrainState(**saved["state"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.last_path}: does not fit this model and trainer ({str(error).splitlines()[0]}), but must come "
                "from the same config. Remove the file to start over."
            ) from error
        if self.state.ended == "epochs" and self.state.epoch < self.config.epochs:
            self.state.ended = ""  # asked for more epochs than last time


def _warmed_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Exponential moving average whose decay grows as (1 + n) / (10 + n) up to `decay`: young weights do not linger."""

    @torch.no_grad()
    def update(averages: Any, values: Any, n_averaged: Any) -> None:
        n = float(n_averaged)
        for average, value in zip(averages, values, strict=True):
            average.lerp_(value, 1 - min(decay, (1 + n) / (10 + n)))

    return update


def evaluate_sums(  # noqa: PLR0913, PLR0917
    model: FoundationModel, store: Store, indices: Any, batch_structures: int, device: torch.device, world: World
) -> torch.Tensor:
    """Error sums [S, 5] over all ranks, see `loss.error_sums`."""
    model.eval()
    sums = torch.zeros(len(store.sources), 5, dtype=torch.float64, device=device)
    with torch.no_grad():
        for part in epoch_batches(
            indices, batch_structures, seed=0, epoch=0, rank=world.rank, world_size=world.size, shuffle=False
        ):
            if len(part):
                batch = store.batch(part).to(device)
                sums += error_sums(model(batch), batch, len(store.sources))
    return all_sum(sums)
