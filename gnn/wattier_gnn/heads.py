"""Readouts: energy heads over a shared encoder, and the two heads whose forces are not a gradient."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from wattier_gnn.layers import ToScalar
from wattier_gnn.ops import EdgeGraph, Linear, SiLU

N_DIRECTIONS = 16  # sums over neighbours that a direct force head is given


class SourceEnergyHeads(nn.Module):
    """Atomic energies from node features, by the network of the atom's own source: h [N, H] -> [N].

    The networks of all sources are stored in one tensor a layer, so that every parameter takes part in every step (a
    gradient of zero where a source is absent) and DistributedDataParallel has nothing to wait for.
    """

    def __init__(self, hidden_dim: int, head_dim: int, n_head_layers: int, n_sources: int) -> None:
        super().__init__()
        widths = [hidden_dim, *[head_dim] * n_head_layers]
        pairs = itertools.pairwise(widths)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.stack([nn.Linear(a, b).weight.detach().T for _ in range(n_sources)])) for a, b in pairs
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(n_sources, width)) for width in widths[1:])
        self.out = nn.Parameter(torch.randn(n_sources, widths[-1]) / widths[-1] ** 0.5)

    def forward(self, h: Tensor, atom_source: Tensor) -> Tensor:
        """Each source's network runs on that source's atoms only; atom_source int64 [N]."""
        energies = h.new_zeros(h.shape[0])
        for source in range(self.out.shape[0]):
            atoms = torch.nonzero(atom_source == source).squeeze(1)
            x = h[atoms]
            for weight, bias in zip(self.weights, self.biases, strict=True):
                x = nn.functional.silu(x @ weight[source] + bias[source])
            energies = energies.index_add(0, atoms, x @ self.out[source])
        return energies


class VectorForceHead(nn.Module):
    """Equivariant but not conservative forces: F_i = sum_j phi(m_ij) r_ij / |r_ij|; cheap, no second derivative."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.strength = nn.Sequential(Linear(hidden_dim, hidden_dim), SiLU(), ToScalar(hidden_dim))

    def forward(self, _h: Tensor, strengths: Tensor, directions: Tensor, graph: EdgeGraph) -> Tensor:
        """Forces [N, 3] in the network's unit, from strengths [E, 1] and directions [E, 3] that fade at the cutoff."""
        return graph.to_receivers(directions * strengths)


class DirectForceHead(nn.Module):
    """Three numbers an atom out of a network, as the published model has them: neither conservative nor equivariant.

    The published one is given x, y and z. This one is given h_i and some sums over neighbours
    v_i = sum_j phi(m_ij) r_ij / |r_ij|, so that forces do not depend on where the origin is, but nothing makes them
    turn with the structure.
    """

    def __init__(self, hidden_dim: int, head_dim: int) -> None:
        super().__init__()
        self.strength = nn.Sequential(
            Linear(hidden_dim, hidden_dim), SiLU(), Linear(hidden_dim, N_DIRECTIONS, bias=False)
        )
        self.force = nn.Sequential(
            nn.Linear(hidden_dim + 3 * N_DIRECTIONS, head_dim), nn.SiLU(), nn.Linear(head_dim, 3)
        )

    def forward(self, h: Tensor, strengths: Tensor, directions: Tensor, graph: EdgeGraph) -> Tensor:
        """Forces [N, 3] in the network's unit, from strengths [E, C] and directions [E, 3] that fade at the cutoff."""
        pulls = strengths.to(h.dtype)[:, :, None] * directions[:, None, :]
        forces: Tensor = self.force(torch.cat([h, graph.to_receivers(pulls.flatten(1))], dim=1))
        return forces
