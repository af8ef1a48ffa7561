"""The foundation model: an encoder, energy heads, forces; ``model(batch) -> Prediction``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from wattier_gnn.batch import Batch, Prediction
from wattier_gnn.egnn import EGNN
from wattier_gnn.families import GeometricEncoder, pna_blocks, schnet_blocks
from wattier_gnn.heads import DirectForceHead, SourceEnergyHeads, VectorForceHead
from wattier_gnn.ops import EdgeGraph, positions_only
from wattier_gnn.properties import Property, promised

Family = Literal["egnn", "schnet", "pna"]
ForceMode = Literal["conservative", "vector", "direct"]
EnergyHeads = Literal["per_source", "shared", "both"]
Precision = Literal["float32", "bfloat16"]
USUAL_PRECISION = 3.0  # a deviation head begins at a twentieth of the energy scale


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build the network anew; saved beside the weights.

    energy_scale_ev: one unit of the network's output for each source, the root mean square force [eV/Angstrom] of its
    training structures taken as eV. mean_neighbors: edges an atom within the cutoff. cutoff_angstrom: batches must have
    no longer edges, see `Store`.
    energy_heads: a network a source, one for all sources, or the sum of the two.
    precision: of the linear layers of the encoder; sums over neighbours, positions, energies and heads stay in float32.
    activation_checkpointing, edge_chunk: less memory for more work, see `EGNN`; they change no number. Families other
    than egnn hold all edges of a layer whatever edge_chunk says.
    energy_variance: one more network beside the energy heads, which says by how much the energy will err.
    degree_histogram: for pna, the number of training atoms with 0, 1, 2, ... neighbours; () = all with the mean.
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
    family: Family = "egnn"
    energy_heads: EnergyHeads = "per_source"
    precision: Precision = "float32"
    activation_checkpointing: bool = False
    edge_chunk: int | None = None
    degree_histogram: tuple[int, ...] = ()
    energy_variance: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`; what an older version did not write has its default.

        Raises:
            ValueError: a key is unknown or missing, or a choice is none.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"model config has unknown keys {unknown}; known are {sorted(known)}")
        try:
            arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
            return cls(**arguments)
        except TypeError as error:
            raise ValueError(f"model config is incomplete: {error}") from error

    def __post_init__(self) -> None:
        """Raises ValueError where a choice is none, or the cutoff is no length."""
        choices = {"family": Family, "forces": ForceMode, "energy_heads": EnergyHeads, "precision": Precision}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(get_args(kind))}")
        if not 0 < self.cutoff_angstrom < math.inf:
            raise ValueError(f"cutoff_angstrom is {self.cutoff_angstrom!r}, but must be a number above 0")


class FoundationModel(nn.Module):
    """Energies and forces for structures of several sources; `properties` says what they keep."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        n_heads = 1 if config.energy_heads == "shared" else len(config.sources)
        self.energy_heads = SourceEnergyHeads(config.hidden_dim, config.head_dim, config.n_head_layers, n_heads)
        self.force_head: VectorForceHead | DirectForceHead | None = None
        if config.forces == "vector":
            self.force_head = VectorForceHead(config.hidden_dim)
        elif config.forces == "direct":
            self.force_head = DirectForceHead(config.hidden_dim, config.head_dim)
        self.shared_head: SourceEnergyHeads | None = None
        if config.energy_heads == "both":
            self.shared_head = SourceEnergyHeads(config.hidden_dim, config.head_dim, config.n_head_layers, 1)
        self.deviation_head: SourceEnergyHeads | None = None
        if config.energy_variance:
            self.deviation_head = SourceEnergyHeads(config.hidden_dim, config.head_dim, config.n_head_layers, n_heads)
        self.register_buffer("energy_scale_ev", torch.tensor(config.energy_scale_ev, dtype=torch.get_default_dtype()))
        # What all sources share has one unit, or one structure would have as many energies as there are sources.
        self.shared_scale_ev = math.exp(sum(map(math.log, config.energy_scale_ev)) / len(config.energy_scale_ev))

    energy_scale_ev: Tensor

    @property
    def properties(self) -> frozenset[Property]:
        """What this model promises."""
        return promised(self.config.family, self.config.forces)

    def forward(self, batch: Batch) -> Prediction:
        """Energies [B] in eV relative to each source's composition reference, forces [N, 3] in eV/Angstrom."""
        i, j = batch.edge_index
        graph = EdgeGraph.of(i, j, len(batch.numbers), len(batch.numbers))
        vectors = batch.positions[j] + batch.edge_shift - batch.positions[i]
        if self.force_head is not None:
            return self._with_force_head(batch, graph, vectors, self.force_head)
        with torch.enable_grad():
            vectors = vectors.detach().requires_grad_(True)
            h, _ = self.encoder(batch.numbers, vectors, graph, None)
            energy = self._energy(batch, h)
            with positions_only():
                (gradient,) = torch.autograd.grad(energy.sum(), vectors, create_graph=self.training)
            forces = graph.to_receivers(gradient) - graph.to_senders(gradient)
        if self.training:
            return Prediction(energy, forces, energy_std=self._energy_std(batch, h))
        with torch.no_grad():
            return Prediction(energy.detach(), forces.detach(), energy_std=self._energy_std(batch, h))

    def _with_force_head(
        self, batch: Batch, graph: EdgeGraph, vectors: Tensor, head: VectorForceHead | DirectForceHead
    ) -> Prediction:
        h, strengths = self.encoder(batch.numbers, vectors, graph, head.strength)
        distance = torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp(min=1e-6)
        directions = vectors * (self.encoder.basis.envelope(distance) / distance)
        forces = head(h, strengths, directions, graph)
        scale: Tensor | float = self.shared_scale_ev
        if self.config.energy_heads != "shared":
            scale = self.energy_scale_ev[batch.source_index[batch.structure_index]][:, None]
        return Prediction(self._energy(batch, h), forces * scale, energy_std=self._energy_std(batch, h))

    def _energy(self, batch: Batch, h: Tensor) -> Tensor:
        atom_source = batch.source_index[batch.structure_index]
        if self.config.energy_heads == "shared":
            atomic = self.energy_heads(h, torch.zeros_like(atom_source)) * self.shared_scale_ev
        else:
            atomic = self.energy_heads(h, atom_source) * self.energy_scale_ev[atom_source]
        if self.shared_head is not None:
            atomic = atomic + self.shared_head(h, torch.zeros_like(atom_source)) * self.shared_scale_ev
        return torch.zeros_like(batch.energy).index_add(0, batch.structure_index, atomic)

    def _energy_std(self, batch: Batch, h: Tensor) -> Tensor | None:
        """By how much energies [B] will err: the sum of what atoms expect, as the errors of a structure's atoms agree.

        The head reads the encoder but does not teach it, so that a model with it has the energies and forces of one
        without (Stirn et al., "Faithful heteroscedastic regression with neural networks", AISTATS 2023).
        """
        if self.deviation_head is None:
            return None
        atom_source = batch.source_index[batch.structure_index]
        if self.config.energy_heads == "shared":
            raw = self.deviation_head(h.detach(), torch.zeros_like(atom_source))
            atomic = nn.functional.softplus(raw - USUAL_PRECISION) * self.shared_scale_ev
        else:
            raw = self.deviation_head(h.detach(), atom_source)
            atomic = nn.functional.softplus(raw - USUAL_PRECISION) * self.energy_scale_ev[atom_source]
        return torch.zeros_like(batch.energy).index_add(0, batch.structure_index, atomic)


def build_encoder(config: ModelConfig) -> EGNN | GeometricEncoder:
    """The encoder of a family: (numbers [N], vectors [E, 3], graph, readout) -> h [N, H], readout's [E, C].

    Raises:
        DataError: the family needs a package that is not installed.
    """
    shape = (config.hidden_dim, config.n_layers, config.n_radial)
    common: dict[str, Any] = {
        "hidden_dim": config.hidden_dim,
        "n_radial": config.n_radial,
        "cutoff_angstrom": config.cutoff_angstrom,
        "compute": torch.bfloat16 if config.precision == "bfloat16" else None,
        "checkpointing": config.activation_checkpointing,
    }
    if config.family == "egnn":
        return EGNN(
            n_layers=config.n_layers, mean_neighbors=config.mean_neighbors, edge_chunk=config.edge_chunk, **common
        )
    if config.family == "schnet":
        blocks = schnet_blocks(*shape, config.cutoff_angstrom)
    else:
        blocks = pna_blocks(*shape, config.mean_neighbors, config.degree_histogram)
    return GeometricEncoder(blocks, messages=config.forces != "conservative", **common)


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
