"""The layer algebra of the published HydraGNN-2024 EGNN, for parity and parameter counts only.

Own code, written from a description of that model. It reproduces the sizes of the talk to the last parameter; for
training use `wattier_gnn.model`, which is what this one is not: equivariant.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from wattier_gnn.batch import Batch, Prediction
from wattier_gnn.properties import Property

N_FEATURES = 4  # atomic number, x, y, z
N_EDGE_FEATURES = 1  # length
LARGEST_MOVE_ANGSTROM = 100.0


@dataclass(frozen=True)
class PublishedSizes:
    """Widths of all layers; `shared`, `energy_head` and `force_head` are the hidden layers of three MLPs."""

    hidden_dim: int
    n_layers: int
    shared: tuple[int, ...]
    energy_head: tuple[int, ...]
    force_head: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raises ValueError where the published algebra does not reach."""
        if self.n_layers < 2:
            raise ValueError(f"n_layers is {self.n_layers}, but must be at least 2: first and last layer differ")
        for name in ("shared", "energy_head", "force_head"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty, but must hold at least one width")


class PublishedLayer(nn.Module):
    """One message-passing layer: node features [N, n_in] -> [N, H]; all but the last move the coordinates [N, 3]."""

    def __init__(self, n_in: int, hidden_dim: int, *, moves_coordinates: bool) -> None:
        super().__init__()
        self.edge_mlp = nn.Sequential(
            nn.Linear(2 * n_in + 1 + N_EDGE_FEATURES, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
        )
        self.node_mlp = nn.Sequential(
            nn.Linear(hidden_dim + n_in, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim)
        )
        self.coord_mlp: nn.Sequential | None = None
        if moves_coordinates:
            last = nn.Linear(hidden_dim, 1, bias=False)
            nn.init.xavier_uniform_(last.weight, gain=1e-3)
            self.coord_mlp = nn.Sequential(nn.Linear(hidden_dim, hidden_dim), nn.ReLU(), last, nn.Tanh())

    def forward(
        self, x: Tensor, positions: Tensor, edge_index: Tensor, edge_shift: Tensor, length: Tensor
    ) -> tuple[Tensor, Tensor]:
        """New features and positions; `length` [E, 1] is that of the undisturbed edges, the squared distance is not."""
        i, j = edge_index
        away = positions[i] - positions[j] - edge_shift
        squared = away.square().sum(dim=1, keepdim=True)
        messages = self.edge_mlp(torch.cat([x[i], x[j], squared, length], dim=1))
        gathered = x.new_zeros(x.shape[0], messages.shape[1]).index_add(0, i, messages)
        if self.coord_mlp is not None:
            moves = away / (squared.sqrt() + 1) * self.coord_mlp(messages)
            moves = moves.clamp(-LARGEST_MOVE_ANGSTROM, LARGEST_MOVE_ANGSTROM)
            neighbors = torch.bincount(i, minlength=x.shape[0]).clamp(min=1)[:, None]
            positions = positions + torch.zeros_like(positions).index_add(0, i, moves) / neighbors
        return self.node_mlp(torch.cat([x, gathered], dim=1)), positions


class PublishedEGNN(nn.Module):
    """The published network: ``model(batch) -> Prediction``.

    NOT equivariant, and not even invariant to translation, in spite of its layers: Cartesian x, y, z are node features
    beside the atomic number. Forces come from a head of their own and are not the gradient of the energy. The energy
    head sees the mean over atoms and is taken as energy an atom, so that `Prediction.energy` [B] is in eV.
    """

    # Coordinates are features, the mean over atoms feeds a network, and an edge at the cutoff counts like any other.
    properties: ClassVar[frozenset[Property]] = frozenset({"permutation", "continuous_forces", "batch_independent"})

    def __init__(self, sizes: PublishedSizes) -> None:
        super().__init__()
        last = sizes.n_layers - 1
        self.layers = nn.ModuleList(
            PublishedLayer(sizes.hidden_dim if k else N_FEATURES, sizes.hidden_dim, moves_coordinates=k < last)
            for k in range(sizes.n_layers)
        )
        self.shared = nn.Sequential(_mlp([sizes.hidden_dim, *sizes.shared]), nn.ReLU())
        self.energy_head = _mlp([sizes.shared[-1], *sizes.energy_head, 1])
        self.force_head = _mlp([sizes.hidden_dim, *sizes.force_head, 3])

    def forward(self, batch: Batch) -> Prediction:
        """Energies [B] in eV and forces [N, 3] in eV/Angstrom."""
        i, j = batch.edge_index
        positions = batch.positions
        edges = positions[j] + batch.edge_shift - positions[i]
        length = torch.linalg.vector_norm(edges, dim=1, keepdim=True)
        x = torch.cat([batch.numbers[:, None].to(positions.dtype), positions], dim=1)
        for layer in self.layers:
            x, positions = layer(x, positions, batch.edge_index, batch.edge_shift, length)
            x = torch.relu(x)
        summed = x.new_zeros(batch.n_atoms.shape[0], x.shape[1]).index_add(0, batch.structure_index, x)
        pooled = summed / batch.n_atoms[:, None]
        energy_per_atom = self.energy_head(self.shared(pooled)).squeeze(1)
        return Prediction(energy_per_atom * batch.n_atoms, self.force_head(x))


def count_closed_form(sizes: PublishedSizes) -> int:
    """Number of parameters, by arithmetic: (7L - 4) h^2 + (8L + 10) h for the layers, plus three MLPs."""
    h, n_layers = sizes.hidden_dim, sizes.n_layers
    encoder = (7 * n_layers - 4) * h**2 + (8 * n_layers + 10) * h
    mlps = (
        [h, *sizes.shared],
        [sizes.shared[-1], *sizes.energy_head, 1],
        [h, *sizes.force_head, 3],
    )
    return encoder + sum((a + 1) * b for widths in mlps for a, b in itertools.pairwise(widths))


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them, none after the last."""
    modules: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        modules += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*modules[:-1])
