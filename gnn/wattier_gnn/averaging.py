"""The weights that are evaluated and released: an average over the steps of training."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from wattier_gnn.model import FoundationModel


class WeightAverage:
    """Exponential moving average whose decay grows as (1 + n) / (10 + n) up to `decay`: young weights do not linger.

    Attributes:
        model: the network that holds the average.
        n_steps: float32 [], steps that are in it.
    """

    def __init__(self, model: FoundationModel, decay: float) -> None:
        """Begin with a copy of the model; make it before the model's parameters are spread over ranks."""
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.n_steps = torch.zeros((), device=model.energy_scale_ev.device)
        self._decay = decay

    @torch.no_grad()
    def update(self, model: FoundationModel, taken: Tensor) -> None:
        """Add the weights after a step; taken bool []: False leaves all as it was, without asking the device."""
        young = (1 + self.n_steps) / (10 + self.n_steps)
        share = torch.where(self.n_steps > 0, 1 - young.clamp(max=self._decay), 1.0) * taken
        for mean, value in zip(self.model.parameters(), model.parameters(), strict=True):
            mean.lerp_(value, share.to(mean.dtype))
        self.n_steps += taken

    @torch.no_grad()
    def follow_buffers(self, model: FoundationModel) -> None:
        """Take over what is not learnt, such as running statistics."""
        for mine, value in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(value)
