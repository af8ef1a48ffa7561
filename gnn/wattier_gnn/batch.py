"""What a model sees and what it says: the field list with every shape.

Legend: N atoms, E edges, B structures, S sources.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Some structures joined into one graph without edges between them.

    The energy is what the model must learn: the composition reference of the source is already subtracted, in float64
    before the cast.
    """

    numbers: Tensor  # int64 [N]
    positions: Tensor  # float [N, 3] Angstrom
    edge_index: Tensor  # int64 [2, E], rows (receiver, sender), sorted by receiver
    edge_shift: Tensor  # float [E, 3] Angstrom, added to the sender's position
    structure_index: Tensor  # int64 [N]
    source_index: Tensor  # int64 [B]
    n_atoms: Tensor  # int64 [B]
    energy: Tensor  # float [B] eV
    forces: Tensor  # float [N, 3] eV/Angstrom, 0 where unknown
    force_mask: Tensor  # bool [N]

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def double(self) -> Batch:
        """The same batch with floating-point fields in float64."""
        tensors = (getattr(self, f.name) for f in fields(self))
        return Batch(*(t.double() if t.is_floating_point() else t for t in tensors))


@dataclass(frozen=True)
class Prediction:
    """energy [B] eV relative to the source's composition reference; forces [N, 3] eV/Angstrom.

    energy_std [B] eV: by how much a model with a head for it expects its energy to err; None of other models.
    """

    energy: Tensor
    forces: Tensor
    energy_std: Tensor | None = None
