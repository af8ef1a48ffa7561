"""Small layers that every family uses."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from wattier_gnn.ops import EdgeGraph, Linear, silu


class RadialBasis(nn.Module):
    """c sin(k pi d / c) / d: [E] -> [E, n_radial].

    The spherical Bessel functions of Gasteiger et al. (ICLR 2020), in units in which they are of order one at bonding
    distances.
    """

    def __init__(self, n_radial: int, cutoff_angstrom: float) -> None:
        super().__init__()
        self.cutoff_angstrom = cutoff_angstrom
        self.register_buffer("frequency", torch.arange(1, n_radial + 1) * math.pi / cutoff_angstrom)

    frequency: Tensor

    def envelope(self, distance: Tensor) -> Tensor:
        """Polynomial cutoff 1 - 10 u^3 + 15 u^4 - 6 u^5: two continuous derivatives at u = d / c = 1; [E]."""
        u = (distance / self.cutoff_angstrom).clamp(max=1.0)
        return 1 + u**3 * (-10 + u * (15 - 6 * u))

    def forward(self, distance: Tensor) -> Tensor:
        safe = distance.clamp(min=1e-6)[:, None]
        return self.cutoff_angstrom * torch.sin(safe * self.frequency) / safe


class ToScalar(nn.Module):
    """Features [E, H] -> [E, 1] without a bias, in float32 at the least.

    The weight is a vector: of the gradient of a [1, H] matrix, with its odd strides, DistributedDataParallel warns.
    """

    def __init__(self, n_in: int, *, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in).uniform_(-gain * n_in**-0.5, gain * n_in**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.weight.dtype) @ self.weight)[:, None]


class PairMessages(nn.Module):
    """Messages [E, H] from node features [N, H] and distances, for families that have none of their own."""

    def __init__(self, hidden_dim: int, n_radial: int) -> None:
        super().__init__()
        self.receiver = Linear(hidden_dim, hidden_dim)
        self.sender = Linear(hidden_dim, hidden_dim, bias=False)
        self.radial = Linear(n_radial, hidden_dim, bias=False)

    def forward(self, h: Tensor, basis: Tensor, graph: EdgeGraph) -> Tensor:
        return silu(graph.of_pairs(self.receiver(h), self.sender(h)) + self.radial(basis))
