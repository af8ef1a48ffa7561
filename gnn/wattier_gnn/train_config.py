"""How to train, and what an epoch says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from wattier_gnn.batching import StepLimits
from wattier_gnn.loss import LossKind
from wattier_gnn.sampling import Mixture
from wattier_gnn.schedule import ScheduleKind
from wattier_gnn.sharding import Sharding


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    batch_structures, batch_atoms, batch_edges: the most that one step over all ranks may hold; None = unbounded.
    mixture: how the sources share an epoch, see `sampling.source_shares`; epoch_structures: draws an epoch, None = as
    many as there are training structures.
    loss: of scaled errors, see `loss.loss_terms`. The validation loss is always that of absolute errors.
    warmup_steps, warmup_epochs: the learning rate rises from 0 over so many; 0 = none.
    early_stop_patience: epochs without an improvement of min_improvement_ratio (relative) before training ends.
    ema_decay: decay a step of the weight average that is evaluated and released; 0 turns averaging off.
    val_energy_weight, val_force_weight: weights of the validation loss, if not those of training: trials that are
    compared by their validation loss must all be measured with the same ones.
    sharding: fsdp spreads the model over the ranks; for models that do not fit one device.
    checkpoint_seconds: time between two checkpoints within an epoch.
    prefetch_batches: batches read ahead in the background.
    """

    epochs: int
    batch_structures: int = 32
    batch_atoms: int | None = None
    batch_edges: int | None = None
    mixture: Mixture = "natural"
    mixture_temperature: float = 2.0
    source_weights: Mapping[str, float] | None = None
    epoch_structures: int | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    loss: LossKind = "mae"
    huber_delta: float = 0.1
    energy_weight: float = 1.0
    force_weight: float = 1.0
    gradient_clip_norm: float = 10.0
    early_stop_patience: int = 10
    min_improvement_ratio: float = 1e-3
    schedule: ScheduleKind = "plateau"
    warmup_steps: int = 0
    warmup_epochs: float = 0.0
    plateau_factor: float = 0.5
    plateau_patience: int = 5
    min_learning_rate: float = 1e-5
    ema_decay: float = 0.99
    val_energy_weight: float | None = None
    val_force_weight: float | None = None
    sharding: Sharding = "none"
    checkpoint_seconds: float = 300.0
    prefetch_batches: int = 2
    seed: int = 0

    @property
    def limits(self) -> StepLimits:
        """The bounds of a step."""
        return StepLimits(self.batch_structures, self.batch_atoms, self.batch_edges)

    @property
    def order_of_steps(self) -> dict[str, Any]:
        """All that decides which structures the n-th step of an epoch holds, besides the data."""
        names = (
            "batch_structures", "batch_atoms", "batch_edges", "mixture", "mixture_temperature", "epoch_structures",
            "seed",
        )  # fmt: skip
        weights = dict(self.source_weights) if self.source_weights else None
        return {name: getattr(self, name) for name in names} | {"source_weights": weights}


@dataclass(frozen=True)
class EpochReport:
    """What one epoch left behind; `val_by_source` is that of `loss.metrics_by_source`.

    seconds: time of training and validation, over all attempts. data_wait_seconds: what part of it training stood
    waiting for its batches on rank 0.
    """

    epoch: int
    train_loss: float
    val_loss: float
    val_by_source: dict[str, dict[str, float]]
    structures_seen: int
    seconds: float
    learning_rate: float
    data_wait_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)
