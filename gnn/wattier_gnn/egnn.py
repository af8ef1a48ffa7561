"""E(3)-equivariant graph network (Satorras, Hoogeboom, Welling, ICML 2021) for periodic atomistic graphs.

Differences from the paper, each for a physical reason: a Bessel radial basis and a smooth cutoff in the place of the
bare squared distance (forces stay continuous when a neighbour leaves), edge vectors carry lattice shifts, and
aggregated messages are divided by the square root of the mean number of neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from wattier_gnn.layers import RadialBasis, ToScalar
from wattier_gnn.ops import EdgeGraph, Linear, SiLU, silu
from wattier_gnn.recompute import recomputed

MESSAGE_GAIN = 2.0  # makes up for the spread that two SiLU lose, so that first messages are as large as the embedding


@dataclass(frozen=True)
class Frame:
    """What all layers have in common in one pass.

    Attributes:
        graph: who sends to whom.
        chunks: parts of the graph to go through one by one; none = all at once.
        basis: distances to features.
        norm: what sums of messages are divided by.
        compute: type of the linear layers.
        twice: derivatives will be differentiated again.
    """

    graph: EdgeGraph
    chunks: list[tuple[slice, slice, EdgeGraph]]
    basis: RadialBasis
    norm: Tensor
    compute: torch.dtype
    twice: bool


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

    def forward(
        self, h: Tensor, vectors: Tensor, envelope: Tensor, frame: Frame, readout: nn.Module | None
    ) -> tuple[Tensor, ...]:
        """New h [N, H], new edge vectors [E, 3], and what the readout, if any, says of each edge; envelope [E, 1] is
        that of the undisturbed edges. Linear layers work in `compute`; h, vectors and sums keep the type of h."""
        low = h.to(frame.compute)
        to_receiver, to_sender = self.receiver(low), self.sender(low)
        if not frame.chunks:
            gathered, *said = self._edges(frame.graph, frame, readout, to_receiver, to_sender, vectors, envelope)
        else:
            weights = [p for module in (self.radial, self.message, self.coordinate, readout) if module is not None
                       for p in module.parameters()]  # fmt: skip
            parts = [
                recomputed(
                    partial(self._edges, part, frame, readout), weights, to_receiver[atoms], to_sender, vectors[edges],
                    envelope[edges], twice=frame.twice,
                )
                for atoms, edges, part in frame.chunks
            ]  # fmt: skip
            gathered, *said = (torch.cat(column) for column in zip(*parts, strict=True))
        h = h + self.node(torch.cat([low, (gathered / frame.norm).to(frame.compute)], dim=1))
        if self.coordinate is not None:
            moves = said.pop(0) / -frame.norm
            vectors = vectors + frame.graph.of_senders(moves) - frame.graph.of_receivers(moves)
        return h, vectors, *said

    def _edges(  # noqa: PLR0913, PLR0917
        self,
        graph: EdgeGraph,
        frame: Frame,
        readout: nn.Module | None,
        to_receiver: Tensor,
        to_sender: Tensor,
        vectors: Tensor,
        envelope: Tensor,
    ) -> tuple[Tensor, ...]:
        """Sums of messages [N, H], sums of pushes [N, 3] if there are, the readout's [E, C] if there is one."""
        distance = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        radial = self.radial((frame.basis(distance.squeeze(1)) * envelope).to(to_sender.dtype))
        pair = graph.of_pairs(to_receiver, to_sender).add_(radial)
        messages = silu(self.message(silu(pair))) * envelope.to(pair.dtype)
        out = [graph.to_receivers(messages)]
        if self.coordinate is not None:
            out.append(graph.to_receivers(vectors * (self.coordinate(messages) * envelope / (distance + 1))))
        if readout is not None:
            out.append(readout(messages))
        return tuple(out)


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
        self, numbers: Tensor, vectors: Tensor, graph: EdgeGraph, readout: nn.Module | None
    ) -> tuple[Tensor, Tensor | None]:
        """h [N, H], and [E, C] that the readout makes of the last messages [E, H]."""
        h = self.embedding(numbers)
        frame = Frame(
            graph=graph,
            chunks=graph.chunks(self.edge_chunk) if self.edge_chunk else [],
            basis=self.basis,
            norm=self.mean_neighbors.sqrt() / MESSAGE_GAIN,
            compute=self.compute or h.dtype,
            twice=vectors.requires_grad,
        )
        # Of the undisturbed distance in every layer: that alone decides whether the edge is there at all.
        envelope = self.basis.envelope(torch.linalg.vector_norm(vectors, dim=1))[:, None]
        said: list[Tensor] = []
        for layer in self.layers:
            last = readout if layer is self.layers[-1] else None
            if self.checkpointing:
                weights = [*layer.parameters(), *(last.parameters() if last is not None else ())]
                part = partial(layer, frame=frame, readout=last)
                h, vectors, *said = recomputed(part, weights, h, vectors, envelope, twice=frame.twice)
            else:
                h, vectors, *said = layer(h, vectors, envelope, frame, last)
        return h, said[0] if said else None
