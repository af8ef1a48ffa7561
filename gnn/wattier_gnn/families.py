"""SchNet and PNA of torch_geometric, the other families of the published search space, on our periodic edges.

torch_geometric takes a second to import, so it is only when one of them is built.
"""

from __future__ import annotations

import importlib
import math
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wattier_gnn.layers import PairMessages, RadialBasis
from wattier_gnn.ops import EdgeGraph
from wattier_gnn.recompute import recomputed
from wattier_gnn.structure import DataError

PNA_AGGREGATORS = ["mean", "min", "max", "std"]
PNA_SCALERS = ["identity", "amplification", "attenuation", "linear"]


class GeometricEncoder(nn.Module):
    """Embedded elements, then ``h + layer(h)`` for each layer; invariant, for only distances come in."""

    def __init__(  # noqa: PLR0913
        self,
        layers: list[nn.Module],
        *,
        hidden_dim: int,
        n_radial: int,
        cutoff_angstrom: float,
        compute: torch.dtype | None,
        checkpointing: bool,
        messages: bool,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(119, hidden_dim)
        self.basis = RadialBasis(n_radial, cutoff_angstrom)
        self.layers = nn.ModuleList(layers)
        self.messages = PairMessages(hidden_dim, n_radial) if messages else None
        self.compute, self.checkpointing = compute, checkpointing

    def forward(
        self, numbers: Tensor, vectors: Tensor, graph: EdgeGraph, readout: nn.Module | None
    ) -> tuple[Tensor, Tensor | None]:
        """h [N, H], and [E, C] that the readout makes of messages [E, H]."""
        h = self.embedding(numbers)
        distance = torch.linalg.vector_norm(vectors, dim=1)
        features = self.basis(distance) * self.basis.envelope(distance)[:, None]
        edges = torch.stack([graph.senders, graph.receivers])  # torch_geometric's order
        for layer in self.layers:
            part = partial(self._changed, layer, edges)
            if self.checkpointing:
                (h,) = recomputed(part, list(layer.parameters()), h, distance, features, twice=vectors.requires_grad)
            else:
                (h,) = part(h, distance, features)
        if self.messages is None or readout is None:
            return h, None
        low = self.compute or h.dtype
        return h, readout(self.messages(h.to(low), features.to(low), graph))

    def _changed(self, layer: nn.Module, edges: Tensor, h: Tensor, distance: Tensor, features: Tensor) -> tuple[Tensor]:
        with torch.autocast(h.device.type, dtype=self.compute, enabled=self.compute is not None):
            return (h + layer(h, edges, distance, features),)


class PNABlock(nn.Module):
    """Principal neighbourhood aggregation (Corso et al., NeurIPS 2020), with activation, without batch norm.

    Minimum and maximum have kinks where two neighbours are equally far, which in a symmetric crystal they are, and the
    mean and the scalers count neighbours, so that the energy jumps where one crosses the cutoff. Batch norm would make
    a structure's energy depend on its batch.
    """

    def __init__(self, hidden_dim: int, n_radial: int, degrees: Tensor) -> None:
        super().__init__()
        convolution = _torch_geometric("pna", "torch_geometric.nn", "PNAConv")
        self.conv = convolution(hidden_dim, hidden_dim, PNA_AGGREGATORS, PNA_SCALERS, degrees, edge_dim=n_radial)
        self.conv.register_message_forward_hook(_summed_in_float32)

    def forward(self, h: Tensor, edges: Tensor, _distance: Tensor, features: Tensor) -> Tensor:
        change: Tensor = nn.functional.silu(self.conv(h, edges, features))
        return change


def schnet_blocks(hidden_dim: int, n_layers: int, n_radial: int, cutoff_angstrom: float) -> list[nn.Module]:
    """Interaction blocks of SchNet (Schuett et al., NeurIPS 2017), whose filters end in a cosine at the cutoff."""
    block = _torch_geometric("schnet", "torch_geometric.nn.models.schnet", "InteractionBlock")
    blocks = [block(hidden_dim, n_radial, hidden_dim, cutoff_angstrom) for _ in range(n_layers)]
    for made in blocks:
        del made.mlp  # the very module conv.nn: safetensors refuses weights under two names
    return blocks


def pna_blocks(
    hidden_dim: int, n_layers: int, n_radial: int, mean_neighbors: float, degree_histogram: tuple[int, ...]
) -> list[nn.Module]:
    """PNA blocks; degree_histogram[k] is the number of training atoms with k neighbours, () = all with the mean."""
    degrees = torch.tensor(degree_histogram or [0] * max(1, math.floor(mean_neighbors + 0.5)) + [1])
    return [PNABlock(hidden_dim, n_radial, degrees) for _ in range(n_layers)]


def _summed_in_float32(_module: nn.Module, _inputs: Any, messages: Tensor) -> Tensor:
    return messages.float() if messages.dtype == torch.bfloat16 else messages


def _torch_geometric(family: str, module: str, name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it calls torch.jit.script when it is imported
            return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise DataError(
            f"model.family is '{family}', which needs torch_geometric ({error}). "
            'Install it: pip install "wattier[gnn]"; or set the family to egnn.'
        ) from error
