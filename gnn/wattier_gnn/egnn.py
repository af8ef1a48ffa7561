"""E(3)-equivariant graph network (Satorras, Hoogeboom, Welling, ICML 2021) for periodic atomistic graphs.

Differences from the paper, each for a physical reason: a Bessel radial basis and a smooth cutoff in the place of the
bare squared distance (forces stay continuous when a neighbour leaves), edge vectors carry lattice shifts, and
aggregated messages are divided by the square root of the mean number of neighbours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MESSAGE_GAIN = 2.0  # makes up for the spread that two SiLU lose, so that first messages are as large as the embedding


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
    """Features [E, H] -> [E, 1] without a bias.

    The weight is a vector: of the gradient of a [1, H] matrix, with its odd strides, DistributedDataParallel warns.
    """

    def __init__(self, n_in: int, *, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in).uniform_(-gain * n_in**-0.5, gain * n_in**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight)[:, None]


class EGNNLayer(nn.Module):
    """One round of messages. Scalars h [N, H] are invariant, edge vectors r [E, 3] equivariant.

    The first linear layer of the edge network acts on [h_i, h_j, basis(d)]; it is applied to nodes before the gather,
    which changes no number and removes most of the work on edges.
    """

    def __init__(self, hidden_dim: int, n_radial: int, *, moves_coordinates: bool) -> None:
        super().__init__()
        self.receiver = nn.Linear(hidden_dim, hidden_dim)
        self.sender = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.radial = nn.Linear(n_radial, hidden_dim, bias=False)
        self.message = nn.Linear(hidden_dim, hidden_dim)
        self.node = nn.Sequential(nn.Linear(2 * hidden_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim))
        # The last layer of an invariant readout has no use for moved coordinates: its weights would get no gradient
        # and DistributedDataParallel would refuse the second step.
        self.coordinate: nn.Sequential | None = None
        if moves_coordinates:
            push = ToScalar(hidden_dim, gain=2e-2)
            self.coordinate = nn.Sequential(nn.Linear(hidden_dim, hidden_dim), nn.SiLU(), push)

    def forward(  # noqa: PLR0913, PLR0917
        self, h: Tensor, vectors: Tensor, edge_index: Tensor, envelope: Tensor, basis: RadialBasis, norm: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """New h [N, H], new edge vectors [E, 3], messages [E, H]; envelope [E, 1] is that of the undisturbed edges."""
        i, j = edge_index
        distance = torch.linalg.vector_norm(vectors, dim=1)
        pair = self.receiver(h)[i] + self.sender(h)[j] + self.radial(basis(distance) * envelope)
        messages = nn.functional.silu(self.message(nn.functional.silu(pair))) * envelope
        gathered = torch.zeros_like(h).index_add(0, i, messages) / norm
        h = h + self.node(torch.cat([h, gathered], dim=1))
        if self.coordinate is not None:
            pushes = vectors / (distance[:, None] + 1) * self.coordinate(messages) * envelope
            moves = torch.zeros(h.shape[0], 3, dtype=h.dtype, device=h.device).index_add(0, i, -pushes) / norm
            vectors = vectors + moves[j] - moves[i]
        return h, vectors, messages


class EGNN(nn.Module):
    """Encoder: elements and geometry in, invariant node features h [N, H] and the last messages [E, H] out."""

    def __init__(
        self, *, hidden_dim: int, n_layers: int, n_radial: int, cutoff_angstrom: float, mean_neighbors: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(119, hidden_dim)
        self.basis = RadialBasis(n_radial, cutoff_angstrom)
        self.layers = nn.ModuleList(
            EGNNLayer(hidden_dim, n_radial, moves_coordinates=index < n_layers - 1) for index in range(n_layers)
        )
        self.register_buffer("mean_neighbors", torch.tensor(max(float(mean_neighbors), 1.0)))  # 0: isolated atoms only

    mean_neighbors: Tensor

    def forward(self, numbers: Tensor, vectors: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embedding(numbers)
        messages = vectors.new_zeros(vectors.shape[0], h.shape[1])
        norm = self.mean_neighbors.sqrt() / MESSAGE_GAIN
        # Of the undisturbed distance in every layer: that alone decides whether the edge is there at all.
        envelope = self.basis.envelope(torch.linalg.vector_norm(vectors, dim=1))[:, None]
        for layer in self.layers:
            h, vectors, messages = layer(h, vectors, edge_index, envelope, self.basis, norm)
        return h, messages
