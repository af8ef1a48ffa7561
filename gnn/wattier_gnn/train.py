"""The training loop: several ranks, early stop, restart from the last checkpoint, which may lie within an epoch.

It knows nothing of searches or joules: whoever calls it listens through ``on_epoch`` and may say stop.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wattier_gnn import checkpoint
from wattier_gnn.averaging import WeightAverage
from wattier_gnn.batch import Batch
from wattier_gnn.batching import cut_into_steps, edges_to_cut_by, split_over_ranks
from wattier_gnn.distributed import World, all_sum, from_rank_zero
from wattier_gnn.loss import N_SUMS, error_sums, loss_terms, metrics_by_source, weighted_loss
from wattier_gnn.model import FoundationModel
from wattier_gnn.prefetch import Loader
from wattier_gnn.sampling import Sampler, source_shares
from wattier_gnn.schedule import Schedule
from wattier_gnn.sharding import clip_gradients, model_state, spread_over_ranks
from wattier_gnn.snapshot import CheckpointClock, Due, Leaves, Snapshot, TrainState
from wattier_gnn.store import Store
from wattier_gnn.structure import DataError
from wattier_gnn.train_config import EpochReport, TrainConfig

__all__ = ["EpochReport", "OnEpoch", "TrainConfig", "TrainState", "Trainer"]

OnEpoch = Callable[[EpochReport], bool]
GO_ON, STOP, GONE = 1.0, 0.0, -1.0  # answers after an epoch; GONE: rank 0 is leaving with an exception


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
        before_save: Callable[[TrainState], None] | None = None,
        leaves: Leaves | None = None,
    ) -> None:
        """Build what a training needs.

        before_save: called on rank 0 before each checkpoint, to hang something on its `extra`. leaves: asked on rank 0
        about once a second, with the seconds that saving will take: True = save and leave, within the epoch.

        Raises:
            DataError: the store's batches have longer edges than the model takes.
        """
        _refuse_longer_edges(model, store)
        self.world = world or World()
        self.store, self.config, self.folder, self.device = store, config, folder, device
        self.train_indices, self.val_indices = train_indices, val_indices
        all_indices = np.concatenate([train_indices, val_indices])
        self.n_edges = edges_to_cut_by(store, all_indices, config.limits, self.world, device)
        self.state, self._before_save, self._leaves = TrainState(), before_save, leaves
        self.model = model.to(device)
        self.average = WeightAverage(self.model, config.ema_decay) if config.ema_decay else None
        self._is_spread = config.sharding == "fsdp" and self.world.size > 1
        for network in (self.model, *([self.average.model] if self.average else [])):
            if self._is_spread:
                spread_over_ranks(network, self.world, device)
        self.wrapped: nn.Module = self.model
        self.optimizer = _SkippingAdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.schedule = Schedule(
            self.optimizer, kind=config.schedule, epochs=config.epochs, warmup_steps=config.warmup_steps,
            warmup_epochs=config.warmup_epochs, min_learning_rate=config.min_learning_rate,
            plateau_factor=config.plateau_factor, plateau_patience=config.plateau_patience,
        )  # fmt: skip
        self.sampler = _sampler(store, train_indices, config)
        self.loader = Loader(store, self.world.rank, device, config.prefetch_batches)
        chosen = np.asarray(train_indices)
        self.snapshot = Snapshot(
            self.last_path, self.model, self.average, self.optimizer, self.schedule,
            config.order_of_steps | {"structures": len(chosen), "sum": int(chosen.sum())}, self.world, device,
        )  # fmt: skip

    @property
    def last_path(self) -> Path:
        """The last checkpoint, for restart."""
        return self.folder / "last.pt"

    @property
    def best_path(self) -> Path:
        """Weights of the best epoch on validation."""
        return self.folder / "best.pt"

    def run(self, on_epoch: OnEpoch) -> TrainState:
        """Train from the last checkpoint, if there is one, until an end is reached; `on_epoch` is called on rank 0."""
        self.state = self.snapshot.restore() or self.state
        if self.state.ended == "epochs" and self.state.epoch < self.config.epochs:
            self.state.ended = ""  # asked for more epochs than last time
        if self.world.size > 1 and not self._is_spread:
            self.wrapped = DistributedDataParallel(self.model)
        self.clock = self._new_clock()
        try:
            while not self.state.ended:
                if not self._left_before_epoch():
                    self._epoch(on_epoch)
        finally:
            # Gone before the process group: as the group's last holder it would destroy it, and wait, holding the GIL,
            # for a thread that needs the GIL.
            self.wrapped = self.model
        return self.state

    def _epoch(self, on_epoch: OnEpoch) -> None:
        state = self.state
        started = time.monotonic() - state.seconds
        try:
            train_loss = self._train_epoch(started)
            val_loss, by_source = self.validate()
        except _LeftError:
            state.seconds = time.monotonic() - started
            self._save()  # with the place within the epoch, or its end, where only validation is left to do
            state.ended = "left"
            return
        state.epoch += 1
        state.structures_seen += self.sampler.n_draws
        learning_rate = self.schedule.learning_rate  # of its last step
        self.schedule.after_epoch(val_loss)
        improved = self._note(train_loss, val_loss)
        report = EpochReport(
            state.epoch, train_loss, val_loss, by_source, state.structures_seen, time.monotonic() - started,
            learning_rate, state.data_wait_seconds,
        )  # fmt: skip
        state.step, state.loss_sum, state.loss_steps, state.seconds, state.data_wait_seconds = 0, 0.0, 0.0, 0.0, 0.0
        if improved:
            self._save_best()  # before anybody hears of its loss
        # Reported first, saved second: a process killed between the two trains the end of this epoch again and reports
        # it again, where the other order would lose the report.
        answer = self._answer(report, on_epoch)
        if answer != GO_ON and not state.ended:
            state.ended = "stopped"
        if answer == GONE:
            return
        self._save()

    def _new_clock(self) -> CheckpointClock:
        return CheckpointClock(self.config.checkpoint_seconds, self.device, self._leaves)

    def _other_steps(self) -> None:
        if self._leaves is not None:
            self.clock.other_steps()

    def _left_before_epoch(self) -> bool:
        """Whether to leave before the next epoch begins: where it does, the last checkpoint is of this very moment."""
        if self._leaves is None:
            return False
        self.clock.other_steps()
        if self.clock.after_step(self.state.save_seconds) is Due.LEAVE:
            self.state.ended = "left"
        return self.state.ended == "left"

    def _train_epoch(self, started: float) -> float:
        """Mean loss of the steps that were taken; NaN if there was none."""
        self.wrapped.train()
        state = self.state
        totals = torch.tensor([state.loss_sum, state.loss_steps], dtype=torch.float64, device=self.device)
        waited = self.loader.wait_seconds - state.data_wait_seconds
        steps = self._cut(self.sampler.epoch(state.epoch))
        drawn = sum(len(step) for step in itertools.islice(steps, state.step))
        with self.loader.reading(self._split(steps)) as batches:
            for parts, batch in batches:
                self.schedule.before_step(state.steps, state.epoch + drawn / self.sampler.n_draws)
                n_structures = sum(len(part) for part in parts)
                totals += self._step(batch, n_structures)
                drawn, state.step, state.steps = drawn + n_structures, state.step + 1, state.steps + 1
                state.data_wait_seconds = self.loader.wait_seconds - waited
                due = self.clock.after_step(state.save_seconds)
                if due is not Due.GO_ON:
                    state.loss_sum, state.loss_steps = totals.tolist()
                if due is Due.LEAVE:
                    raise _LeftError
                if due is Due.SAVE:
                    state.seconds = time.monotonic() - started
                    self._save()
        loss_sum, loss_steps = state.loss_sum, state.loss_steps = totals.tolist()
        return loss_sum / loss_steps if loss_steps else math.nan

    def _step(self, batch: Batch, n_structures: int) -> Tensor:
        """One step of all ranks with n_structures in all: float64 [2], its loss and 1, or 0 and 0 if not finite.

        Nothing here waits for the device: whether the step is taken is decided there.
        """
        config = self.config
        prediction = self.wrapped(batch)
        energy_sum, force_sum = loss_terms(
            prediction, batch, self.model.energy_scale_ev, config.energy_weight, config.force_weight, config.loss,
            config.huber_delta,
        )  # fmt: skip
        n_forces = all_sum(batch.force_mask.sum())
        # Gradients are averaged over ranks: times the world size, over global counts, is the global batch's mean.
        loss = (energy_sum / n_structures + force_sum / n_forces.clamp(min=1)) * self.world.size
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = clip_gradients(self.model, config.gradient_clip_norm)
        value = all_sum(loss.detach() / self.world.size)
        # Both are the same on all ranks. The loss must be asked too: the gradient of |x - NaN| is 0.
        taken = torch.isfinite(value) & torch.isfinite(norm)
        self.optimizer.found_inf = (~taken).float()
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, taken)
        return torch.stack([torch.where(taken, value, 0.0), taken]).double()

    def validate(self) -> tuple[float, dict[str, dict[str, float]]]:
        """Validation loss (mean over sources of scaled errors) and metrics by source, of the averaged weights."""
        by_source = metrics_by_source(self._error_sums(self.evaluated(), self.val_indices), self.store.sources)
        scales = dict(zip(self.store.sources, self.model.config.energy_scale_ev, strict=True))
        energy, force = self.config.val_energy_weight, self.config.val_force_weight
        energy = self.config.energy_weight if energy is None else energy
        force = self.config.force_weight if force is None else force
        return weighted_loss(by_source, scales, energy, force), by_source

    def evaluated(self) -> FoundationModel:
        """The model whose metrics are reported and whose weights are kept."""
        if self.average is None:
            return self.model
        self.average.follow_buffers(self.model)
        return self.average.model

    def _error_sums(self, model: FoundationModel, indices: Any) -> Tensor:
        """Error sums [S, 7] over all ranks, see `loss.error_sums`."""
        model.eval()
        sums = torch.zeros(len(self.store.sources), N_SUMS, dtype=torch.float64, device=self.device)
        self._other_steps()
        with torch.no_grad(), self.loader.reading(self._split(self._cut(np.asarray(indices)))) as batches:
            for _, batch in batches:
                if len(batch.n_atoms) or self._is_spread:  # the weights of a spread model are gathered by all ranks
                    sums += error_sums(model(batch), batch, len(sums))
                if self._leaves is not None and self.clock.after_step(self.state.save_seconds) is Due.LEAVE:
                    raise _LeftError
        self._other_steps()
        return all_sum(sums)

    def _cut(self, order: Any) -> Iterator[Any]:
        return cut_into_steps(order, self.config.limits, self.store.n_atoms, self.n_edges)

    def _split(self, steps: Iterable[Any]) -> Iterator[list[Any]]:
        """Every rank's part of each step; an edge is as much work as an atom has besides its edges."""
        for step in steps:
            work = self.n_edges[step] + self.store.n_atoms[step]
            yield split_over_ranks(step, work, self.world.size)

    def _note(self, train_loss: float, val_loss: float) -> bool:
        """Update the early-stop counters; True when this epoch is the best so far."""
        state = self.state
        if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
            state.ended = "diverged"
            return False
        improved = val_loss < state.best_val_loss
        anchor = state.best_val_loss if state.anchor_val_loss is None else state.anchor_val_loss
        significant = val_loss < anchor * (1 - self.config.min_improvement_ratio)
        state.epochs_without_improvement = 0 if significant else state.epochs_without_improvement + 1
        state.anchor_val_loss = val_loss if significant else anchor
        if improved:
            state.best_val_loss, state.best_epoch = val_loss, state.epoch
        if state.epoch >= self.config.epochs:
            state.ended = "epochs"
        elif state.epochs_without_improvement >= self.config.early_stop_patience:
            state.ended = "early_stop"
        return improved

    def _answer(self, report: EpochReport, on_epoch: OnEpoch) -> float:
        """Rank 0 asks; the others hear the answer, also when asking ends in an exception: there is no saving then."""
        if self.world.rank != 0:
            return from_rank_zero(GONE, self.device)
        answer = GONE
        try:
            answer = GO_ON if on_epoch(report) else STOP
        finally:
            from_rank_zero(answer, self.device)
        return answer

    def _save(self) -> None:
        if self.world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._before_save is not None:
                self._before_save(self.state)
        began = time.monotonic()
        self.snapshot.save(self.state)
        self.state.save_seconds = max(self.state.save_seconds, time.monotonic() - began)
        self.clock.saved()

    def _save_best(self) -> None:
        weights = {"model": model_state(self.evaluated()), "config": self.model.config.to_dict()}
        if self.world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.save_atomically(weights, self.best_path)


class _LeftError(Exception):
    """Raised on all ranks after the same step: this training goes on another time."""


class _SkippingAdamW(torch.optim.AdamW):
    """AdamW whose fused step does nothing where `found_inf` [] is 1: the seam of torch.amp.GradScaler."""

    found_inf: Tensor


def _refuse_longer_edges(model: FoundationModel, store: Store) -> None:
    if (cutoff := model.config.cutoff_angstrom) < store.cutoff_angstrom:
        raise DataError(
            f"the model's cutoff_angstrom is {cutoff:g}, but batches of {store.folder} have edges up to "
            f"{store.cutoff_angstrom:g}. Open it as Store(folder, {cutoff:g})."
        )


def _sampler(store: Store, indices: Any, config: TrainConfig) -> Sampler:
    counts = np.bincount(store.source_index[indices], minlength=len(store.sources))
    shares = source_shares(
        counts, store.sources, config.mixture, config.mixture_temperature, config.source_weights
    )  # fmt: skip
    return Sampler(
        indices, seed=config.seed, source_index=store.source_index, shares=shares, n_draws=config.epoch_structures
    )
