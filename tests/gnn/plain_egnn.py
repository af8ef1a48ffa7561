"""Our EGNN written the plain way, with the weights of a fast one: what the fast one must equal, and is timed against.

Edges carry [h_i, h_j, basis] through one linear layer and ``index_add`` sums them: torch's own operations only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wattier_gnn.batch import Batch, Prediction
from wattier_gnn.model import FoundationModel


def linear_like(fast: nn.Module, n_in: int, n_out: int, *, bias: bool = True) -> nn.Linear:
    """In the type of the fast module's weights: float32 cannot hold what they are in float64."""
    return nn.Linear(n_in, n_out, bias=bias, dtype=next(fast.parameters()).dtype)


class PlainLayer(nn.Module):
    def __init__(self, fast: nn.Module) -> None:
        super().__init__()
        hidden_dim, n_radial = fast.radial.weight.shape
        self.first = linear_like(fast, 2 * hidden_dim + n_radial, hidden_dim)
        self.second = linear_like(fast, hidden_dim, hidden_dim)
        self.node = nn.Sequential(
            linear_like(fast, 2 * hidden_dim, hidden_dim), nn.SiLU(), linear_like(fast, hidden_dim, hidden_dim)
        )
        self.coordinate = plain_branch(fast.coordinate) if fast.coordinate is not None else None
        with torch.no_grad():
            self.first.weight.copy_(torch.cat([fast.receiver.weight, fast.sender.weight, fast.radial.weight], dim=1))
            self.first.bias.copy_(fast.receiver.bias)
            self.second.load_state_dict(fast.message.state_dict())
            self.node.load_state_dict(fast.node.state_dict())

    def forward(
        self, h: Tensor, vectors: Tensor, edges: Tensor, envelope: Tensor, k: Tensor, cutoff: float, norm: float
    ):
        i, j = edges
        distance = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        basis = cutoff * torch.sin(k * distance) / distance * envelope
        messages = F.silu(self.second(F.silu(self.first(torch.cat([h[i], h[j], basis], dim=1))))) * envelope
        gathered = torch.zeros_like(h).index_add(0, i, messages) / norm
        h = h + self.node(torch.cat([h, gathered], dim=1))
        if self.coordinate is not None:
            pushes = -vectors / (distance + 1) * self.coordinate(messages) * envelope
            moves = h.new_zeros(len(h), 3).index_add(0, i, pushes) / norm
            vectors = vectors + moves[j] - moves[i]
        return h, vectors, messages


class PlainEGNN(nn.Module):
    """The model of `fast`, with per-source heads of its own and conservative or vector forces."""

    def __init__(self, fast: FoundationModel) -> None:
        super().__init__()
        self.config = fast.config
        self.embedding = nn.Embedding.from_pretrained(fast.encoder.embedding.weight.detach().clone(), freeze=False)
        self.layers = nn.ModuleList(PlainLayer(layer) for layer in fast.encoder.layers)
        self.strength = plain_branch(fast.force_head.strength) if fast.force_head is not None else None
        self.heads = nn.ModuleList(plain_head(fast.energy_heads, s) for s in range(len(fast.config.sources)))
        self.register_buffer("k", fast.encoder.basis.frequency.clone())  # k pi / c, in the type it is stored in
        self.to(fast.energy_scale_ev.dtype)

    def forward(self, batch: Batch) -> Prediction:
        positions = batch.positions
        if self.strength is None:
            positions = positions.detach().requires_grad_(True)
        energy, messages, vectors, envelope = self.energy(batch, positions)
        if self.strength is None:
            (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=self.training)
            return Prediction(energy, -gradient)
        pulls = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True) * self.strength(messages) * envelope
        forces = torch.zeros_like(positions).index_add(0, batch.edge_index[0], pulls)
        return Prediction(energy, forces * self.scales(batch)[:, None])

    def energy(self, batch: Batch, positions: Tensor):
        i, j = batch.edge_index
        first_vectors = vectors = positions[j] + batch.edge_shift - positions[i]
        u = torch.linalg.vector_norm(vectors, dim=1, keepdim=True) / self.config.cutoff_angstrom
        envelope = 1 - 10 * u**3 + 15 * u**4 - 6 * u**5
        h = self.embedding(batch.numbers)
        norm, cutoff = max(self.config.mean_neighbors, 1.0) ** 0.5 / 2.0, self.config.cutoff_angstrom
        for layer in self.layers:
            h, vectors, messages = layer(h, vectors, batch.edge_index, envelope, self.k, cutoff, norm)
        each = torch.stack([head(h).squeeze(1) for head in self.heads], dim=1)
        source = batch.source_index[batch.structure_index]
        atomic = each.gather(1, source[:, None]).squeeze(1) * self.scales(batch)
        energy = torch.zeros_like(batch.energy).index_add(0, batch.structure_index, atomic)
        return energy, messages, first_vectors, envelope

    def scales(self, batch: Batch) -> Tensor:
        """eV a unit, of each atom's source."""
        scales = batch.positions.new_tensor(self.config.energy_scale_ev)
        return scales[batch.source_index[batch.structure_index]]


def plain_branch(fast: nn.Sequential) -> nn.Sequential:
    """Linear, SiLU, and a scalar without bias."""
    hidden_dim = fast[0].in_features
    plain = nn.Sequential(
        linear_like(fast, hidden_dim, hidden_dim), nn.SiLU(), linear_like(fast, hidden_dim, 1, bias=False)
    )
    with torch.no_grad():
        plain[0].load_state_dict(fast[0].state_dict())
        plain[2].weight.copy_(fast[2].weight[None])
    return plain


def plain_head(fast: nn.Module, source: int) -> nn.Sequential:
    """The energy network of one source."""
    modules: list[nn.Module] = []
    with torch.no_grad():
        for weight, bias in zip(fast.weights, fast.biases, strict=True):
            layer = linear_like(fast, weight.shape[1], weight.shape[2])
            layer.weight.copy_(weight[source].T)
            layer.bias.copy_(bias[source])
            modules += [layer, nn.SiLU()]
        out = linear_like(fast, fast.out.shape[1], 1, bias=False)
        out.weight.copy_(fast.out[source][None])
    return nn.Sequential(*modules, out)
