"""Readouts: one energy head a source over a shared encoder, forces by gradient or by an equivariant vector head."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from wattier_gnn.egnn import ToScalar


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
        self.strength = nn.Sequential(nn.Linear(hidden_dim, hidden_dim), nn.SiLU(), ToScalar(hidden_dim))

    def forward(self, messages: Tensor, vectors: Tensor, envelope: Tensor, receivers: Tensor, n_atoms: int) -> Tensor:
        """Forces [N, 3] in units of the source's scale; `vectors` [E, 3] are the undisturbed edge vectors."""
        directions = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp(min=1e-6)
        pulls = directions * self.strength(messages) * envelope[:, None]
        return torch.zeros(n_atoms, 3, dtype=vectors.dtype, device=vectors.device).index_add(0, receivers, pulls)
