"""One training over several ranks: whole copies of the model (DDP) or a part of it on each rank (FSDP).

What is imported inside functions takes a second, which a command that does not train need not wait.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wattier_gnn.distributed import World
from wattier_gnn.model import FoundationModel
from wattier_gnn.structure import DataError

Sharding = Literal["none", "fsdp"]


def spread_over_ranks(model: FoundationModel, world: World, device: torch.device) -> None:
    """Keep on each rank its part of every parameter (FSDP2), gathered layer by layer while it is used; in place.

    Raises:
        DataError: the model's forces are gradients.
    """
    if model.config.forces == "conservative":
        # FSDP frees a layer's weights after its forward pass; the gradient that is the force needs them before it ends.
        raise DataError(
            "training.sharding is fsdp and model.forces is conservative, but forces by gradient need whole weights on "
            "every rank. Set training.sharding to none, or model.forces to vector."
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # A layer may hand on what it was given. No network here changes a tensor in place, which is what the warning is of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (world.size,))
    for layer in model.encoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def clip_gradients(model: nn.Module, largest_norm: float) -> Tensor:
    """Scale the gradients of the global batch down to a norm; the norm before that, the same on all ranks."""
    norm: Any = nn.utils.clip_grad_norm_(model.parameters(), largest_norm)
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole


def model_state(model: nn.Module) -> dict[str, Any]:
    """All weights by name, whole, on rank 0; every rank must call it. The same whatever the sharding."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by parameter name, whole, on rank 0; every rank must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_optimizer_state_dict(model, optimizer, options=options))


def load_state(
    model: nn.Module, state: Mapping[str, Any], optimizer: torch.optim.Optimizer | None = None, moments: Any = None
) -> None:
    """Put back `model_state`, and `optimizer_state` as `moments`; every rank gives all and keeps its part."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict

    whole = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, dict(state), options=whole)
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, moments, options=whole)
