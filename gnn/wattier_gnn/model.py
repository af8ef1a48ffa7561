"""The foundation model: EGNN encoder, an energy head a source, forces; ``model(batch) -> Prediction``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wattier_gnn.batch import Batch, Prediction
from wattier_gnn.egnn import EGNN
from wattier_gnn.heads import SourceEnergyHeads, VectorForceHead

ForceMode = Literal["conservative", "vector"]


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build the network anew; saved beside the weights.

    energy_scale_ev: one unit of the network's output for each source, the root mean square force [eV/Angstrom] of its
    training structures taken as eV. mean_neighbors: edges an atom in the training structures.
    """

    sources: tuple[str, ...]
    energy_scale_ev: tuple[float, ...]
    mean_neighbors: float
    cutoff_angstrom: float = 5.0
    hidden_dim: int = 64
    n_layers: int = 3
    n_radial: int = 16
    head_dim: int = 64
    n_head_layers: int = 2
    forces: ForceMode = "conservative"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`.

        Raises:
            ValueError: a key is unknown or missing.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"model config has unknown keys {unknown}; known are {sorted(known)}")
        try:
            arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
            return cls(**arguments)
        except TypeError as error:
            raise ValueError(f"model config is incomplete: {error}") from error


class FoundationModel(nn.Module):
    """E(3)-equivariant energies and forces for structures of several sources."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = EGNN(
            hidden_dim=config.hidden_dim,
            n_layers=config.n_layers,
            n_radial=config.n_radial,
            cutoff_angstrom=config.cutoff_angstrom,
            mean_neighbors=config.mean_neighbors,
        )
        self.energy_heads = SourceEnergyHeads(
            config.hidden_dim, config.head_dim, config.n_head_layers, len(config.sources)
        )
        self.force_head = VectorForceHead(config.hidden_dim) if config.forces == "vector" else None
        self.register_buffer("energy_scale_ev", torch.tensor(config.energy_scale_ev, dtype=torch.get_default_dtype()))

    energy_scale_ev: Tensor

    def forward(self, batch: Batch) -> Prediction:
        """Energies [B] in eV relative to each source's composition reference, forces [N, 3] in eV/Angstrom."""
        if self.force_head is not None:
            return self._with_vector_head(batch, self.force_head)
        with torch.enable_grad():
            positions = batch.positions.detach().requires_grad_(True)
            energy, _, _ = self._energy(batch, positions)
            (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=self.training)
        return Prediction(energy if self.training else energy.detach(), -gradient)

    def _with_vector_head(self, batch: Batch, head: VectorForceHead) -> Prediction:
        energy, messages, vectors = self._energy(batch, batch.positions)
        envelope = self.encoder.basis.envelope(torch.linalg.vector_norm(vectors, dim=1))
        forces = head(messages, vectors, envelope, batch.edge_index[0], batch.numbers.shape[0])
        scale = self.energy_scale_ev[batch.source_index[batch.structure_index]]
        return Prediction(energy, forces * scale[:, None])

    def _energy(self, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        i, j = batch.edge_index
        vectors = positions[j] + batch.edge_shift - positions[i]
        h, messages = self.encoder(batch.numbers, vectors, batch.edge_index)
        atom_source = batch.source_index[batch.structure_index]
        atomic = self.energy_heads(h, atom_source) * self.energy_scale_ev[atom_source]
        energy = torch.zeros_like(batch.energy).index_add(0, batch.structure_index, atomic)
        return energy, messages, vectors


def count_parameters(model: nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def build_model(config: ModelConfig, seed: int) -> FoundationModel:
    """A model with reproducible initial weights (the global generator is left as it was)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FoundationModel(config)


def source_index_of(sources: Sequence[str], source: str) -> int:
    """Position of a source name.

    Raises:
        ValueError: the model was not trained on that source.
    """
    if source not in sources:
        raise ValueError(f"source is {source!r}, but must be one of {', '.join(sources)}")
    return list(sources).index(source)
