"""One member of a release from the bytes of its two files, which may hold anything: nothing is built on their word."""

from __future__ import annotations

import math
import types
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from wattier_gnn.model import FoundationModel, ModelConfig
from wattier_gnn.release_files import parse_json_object
from wattier_gnn.structure import DataError
from wattier_gnn.workload import n_parameters

MAX_CUTOFF_ANGSTROM = 100.0  # a crystal has a million neighbours within that, and a billion within ten times that


def weights_bytes(model: FoundationModel) -> bytes:
    """The weights in the format of safetensors, the same for the same weights."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})


def read_member(folder: Path, config: bytes, weights: bytes, sources: tuple[str, ...]) -> FoundationModel:
    """The model of a config and its weights.

    Args:
        folder: of the member, for messages.
        config: bytes of its ``config.json``.
        weights: bytes of its ``model.safetensors``.
        sources: that the release has, in their order.

    Raises:
        DataError: one of the two is damaged, they do not belong together, or a weight is NaN or infinite.
    """
    data = parse_json_object(folder / "config.json", config)
    try:
        tensors = _load(weights)
        model = FoundationModel(_config(data, tensors, sources))
        _check(model, tensors)
        model.load_state_dict(tensors)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{folder}: not a readable member ({reason}). Get the release anew.") from error
    return model.eval()


def _load(weights: bytes) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = load(weights)
    except (
        SafetensorError,
        KeyError,
        ValueError,
        TypeError,
        OverflowError,
    ) as error:  # KeyError: no such number format
        raise ValueError(f"model.safetensors: {error}") from error
    return tensors


def _config(data: dict[str, Any], tensors: dict[str, torch.Tensor], sources: tuple[str, ...]) -> ModelConfig:
    """The config, once every value has its type and the network is no larger than the file with its weights."""
    hints = get_type_hints(ModelConfig)
    n_values = sum(tensor.numel() for tensor in tensors.values())
    for field in fields(ModelConfig):
        if field.name not in data:
            continue
        value, kind = data[field.name], hints[field.name]
        if not _fits(value, kind):
            raise ValueError(f"{field.name} is {value!r:.60}, but must be {_in_words(kind)}")
        if type(value) is int and kind is not float and value < 1:
            raise ValueError(f"{field.name} is {value!r:.40}, but must be 1 or more")
        # Layers are built one by one, so their number must be credible before any is.
        largest = len(tensors) if field.name.endswith("layers") else n_values
        if kind is int and value > largest:
            raise ValueError(f"{field.name} is {value!r:.40}, but the weights are of at most {largest}")
    config = ModelConfig.from_dict(data)
    if config.sources != sources:
        raise ValueError(f"sources are {list(config.sources)!r:.200}, but the release has {list(sources)!r:.200}")
    if config.cutoff_angstrom > MAX_CUTOFF_ANGSTROM:
        raise ValueError(f"cutoff_angstrom is {config.cutoff_angstrom:g}, but must be {MAX_CUTOFF_ANGSTROM:g} at most")
    if len(config.energy_scale_ev) != len(config.sources) or min(config.energy_scale_ev) <= 0:
        raise ValueError("energy_scale_ev must hold one number above 0 a source")
    if (n := n_parameters(config)) > n_values:
        raise ValueError(f"the config has {n} parameters, but the weights are {n_values}")
    return config


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is of a config's type; True and False are no numbers."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in arguments
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is tuple:
        return isinstance(value, list) and all(_fits(one, arguments[0]) for one in value)
    if kind is type(None):
        return value is None
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def _in_words(kind: Any) -> str:
    return (
        " or ".join(map(repr, get_args(kind))) if get_origin(kind) is Literal else getattr(kind, "__name__", str(kind))
    )


def _check(model: FoundationModel, tensors: dict[str, torch.Tensor]) -> None:
    """Names, shapes and values of the weights; a wider or narrower float is taken as what the model computes in."""
    due = model.state_dict()
    if missing := sorted(set(due) - set(tensors)):
        raise ValueError(f"weights lack {missing[0]!r}")
    if extra := sorted(set(tensors) - set(due)):
        raise ValueError(f"weights hold {extra[0]!r:.80}, which the model does not have")
    for name, tensor in tensors.items():
        if tensor.shape != due[name].shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, but must be {list(due[name].shape)}")
        if tensor.is_floating_point() != due[name].is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, but must be {due[name].dtype}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds a number that is NaN or infinite")
