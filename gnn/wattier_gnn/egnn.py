"""E(3)-equivariant graph network (Satorras, Hoogeboom, Welling, ICML 2021) for periodic atomistic graphs.

Differences from the paper, each for a physical reason: a Bessel radial basis and a smooth cutoff in the place of the
bare squared distance (forces stay continuous when a neighbour leaves), edge vectors carry lattice shifts, and
aggregated messages are divided by the square root of the mean number of neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wattier_gnn.layers import RadialBasis, ToScalar
from wattier_gnn.ops import EdgeGraph, Linear, SiLU, silu

MESSAGE_GAIN = 2.0  # makes up for the spread that two SiLU lose, so that first messages are as large as the embedding

Readout = Callable[[Tensor], Tensor]  # messages [E, H] -> [E, C], what a force head wants of each edge
Chunks = list[tuple[slice, slice, EdgeGraph]]


class EGNNLayer(nn.Module):
    """One round of messages. Scalars h [N, H] are invariant, edge vectors r [E, 3] equivariant.

    The first linear layer of the edge network acts on [h_i, h_j, basis(d)]; it is applied to nodes before the gather,
    which changes no number and removes most of the work on edges.
    """

    def __init__(self, hidden_dim: int, n_radial: int, *, moves_coordinates: bool) -> None:
        super().__init__()
        self.receiver = Linear(hidden_dim, hidden_dim)
        self.sender = Linear(hidden_dim, hidden_dim, bias=False)
        self.radial = Linear(n_radial, hidden_dim, bias=False)
        self.message = Linear(hidden_dim, hidden_dim)
        self.node = nn.Sequential(Linear(2 * hidden_dim, hidden_dim), SiLU(), Linear(hidden_dim, hidden_dim))
        # The last layer of an invariant readout has no use for moved coordinates: its weights would get no gradient
        # and DistributedDataParallel would refuse the second step.
        self.coordinate: nn.Sequential | None = None
        if moves_coordinates:
            push = ToScalar(hidden_dim, gain=2e-2)
            self.coordinate = nn.Sequential(Linear(hidden_dim, hidden_dim), SiLU(), push)

    def forward(  # noqa: PLR0913, PLR0917
        self,
        h: Tensor,
        vectors: Tensor,
        graph: EdgeGraph,
        chunks: Chunks,
        envelope: Tensor,
        basis: RadialBasis,
        norm: Tensor,
        compute: torch.dtype,
        readout: Readout | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """New h [N, H], new edge vectors [E, 3], what the readout says of each edge; envelope [E, 1] is that of the
        undisturbed edges. Linear layers work in `compute`; h, vectors and sums are kept in the type of h."""
        low = h.to(compute)
        to_receiver, to_sender = self.receiver(low), self.sender(low)
        if not chunks:
            parts = [self._edges(to_receiver, to_sender, vectors, envelope, graph, basis, readout)]
        else:
            parts = [
                checkpoint(
                    self._edges, to_receiver[atoms], to_sender, vectors[edges], envelope[edges], part, basis, readout,
                    use_reentrant=False, preserve_rng_state=False,
                )
                for atoms, edges, part in chunks
            ]  # fmt: skip
        gathered, pushed, said = (_joined(column) for column in zip(*parts, strict=True))
        h = h + self.node(torch.cat([low, (gathered / norm).to(compute)], dim=1))
        if pushed is not None:
            moves = pushed / -norm
            vectors = vectors + graph.of_senders(moves) - graph.of_receivers(moves)
        return h, vectors, said

    def _edges(  # noqa: PLR0913, PLR0917
        self,
        to_receiver: Tensor,
        to_sender: Tensor,
        vectors: Tensor,
        envelope: Tensor,
        graph: EdgeGraph,
        basis: RadialBasis,
        readout: Readout | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Sums of messages [N, H] and of pushes [N, 3], and the readout's [E, C]: nothing else leaves the edges."""
        distance = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        radial = self.radial((basis(distance.squeeze(1)) * envelope).to(to_sender.dtype))
        pair = graph.of_pairs(to_receiver, to_sender).add_(radial)
        messages = silu(self.message(silu(pair))) * envelope.to(pair.dtype)
        pushed = None
        if self.coordinate is not None:
            pushed = graph.to_receivers(vectors * (self.coordinate(messages) * envelope / (distance + 1)))
        return graph.to_receivers(messages), pushed, None if readout is None else readout(messages)


def _joined(parts: tuple[Any, ...]) -> Any:
    """One tensor of the chunks' tensors, or None of their None."""
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)


class EGNN(nn.Module):
    """Encoder: elements and geometry in, invariant node features h [N, H] and the readout's word on each edge out.

    Args:
        compute: type of the linear layers, float32 or bfloat16; None = that of the weights.
        checkpointing: keep only each layer's input for the backward pass and compute the rest again.
        edge_chunk: the same for the edges of a layer, so many at a time.
    """

    def __init__(  # noqa: PLR0913
        self,
        *,
        hidden_dim: int,
        n_layers: int,
        n_radial: int,
        cutoff_angstrom: float,
        mean_neighbors: float,
        compute: torch.dtype | None = None,
        checkpointing: bool = False,
        edge_chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(119, hidden_dim)
        self.basis = RadialBasis(n_radial, cutoff_angstrom)
        self.layers = nn.ModuleList(
            EGNNLayer(hidden_dim, n_radial, moves_coordinates=index < n_layers - 1) for index in range(n_layers)
        )
        self.register_buffer("mean_neighbors", torch.tensor(max(float(mean_neighbors), 1.0)))  # 0: isolated atoms only
        self.compute, self.checkpointing, self.edge_chunk = compute, checkpointing, edge_chunk

    mean_neighbors: Tensor

    def forward(
        self, numbers: Tensor, vectors: Tensor, graph: EdgeGraph, readout: Readout | None
    ) -> tuple[Tensor, Tensor | None]:
        h = self.embedding(numbers)
        norm = self.mean_neighbors.sqrt() / MESSAGE_GAIN
        # Of the undisturbed distance in every layer: that alone decides whether the edge is there at all.
        envelope = self.basis.envelope(torch.linalg.vector_norm(vectors, dim=1))[:, None]
        chunks = graph.chunks(self.edge_chunk) if self.edge_chunk else []
        said = None
        for layer in self.layers:
            last = readout if layer is self.layers[-1] else None
            rest = (graph, chunks, envelope, self.basis, norm, self.compute or h.dtype, last)
            if self.checkpointing:
                h, vectors, said = checkpoint(layer, h, vectors, *rest, use_reentrant=False, preserve_rng_state=False)
            else:
                h, vectors, said = layer(h, vectors, *rest)
        return h, said
