"""The networks of named model sizes, as a file such as ``configs/talk_sizes.yaml`` lists them."""

from __future__ import annotations

import torch
from torch import nn

from wattier.config import ModelSection, ReferenceSize
from wattier.trial import model_config
from wattier_gnn.model import ModelConfig, build_model, count_parameters
from wattier_gnn.published import PublishedEGNN, PublishedSizes
from wattier_gnn.sample import SAMPLE_SOURCES
from wattier_gnn.store import Store

Size = ReferenceSize | ModelSection


def build_size(size: Size, store: Store, device: torch.device, seed: int) -> nn.Module:
    """The network of a size for the data of a store, with its weights on a device."""
    if isinstance(size, ModelSection):
        return build_model(model_config(store, size), seed).to(device)
    with torch.device(device):
        torch.manual_seed(seed)
        return PublishedEGNN(_published(size))


def count_size(size: Size, store: Store | None = None) -> int:
    """Parameters of a size, from the module built without memory; without a store, with heads for five sources."""
    with torch.device("meta"):
        if not isinstance(size, ModelSection):
            return count_parameters(PublishedEGNN(_published(size)))
        return count_parameters(build_model(model_config(store, size) if store else _for_sample(size), 0))


def _published(size: ReferenceSize) -> PublishedSizes:
    return PublishedSizes(
        size.hidden_dim, size.n_layers, tuple(size.shared), tuple(size.energy_head), tuple(size.force_head)
    )


def _for_sample(size: ModelSection) -> ModelConfig:
    """As many heads as the sample corpus needs; scales and cutoff change no number of parameters."""
    sources = tuple(SAMPLE_SOURCES)
    settings = size.model_dump(exclude={"cutoff_angstrom"})
    return ModelConfig(sources=sources, energy_scale_ev=(1.0,) * len(sources), mean_neighbors=1.0, **settings)
