"""Memory for work: keep what goes into a part of the network, and compute the rest of it again when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wattier_gnn.ops import positions_only, weights_are_wanted

Part = Callable[..., tuple[Tensor, ...]]


def recomputed(part: Part, parameters: Sequence[Tensor], *inputs: Tensor, twice: bool) -> tuple[Tensor, ...]:
    """``part(*inputs)``, of which only the inputs are kept.

    Args:
        part: Computes tensors from tensors; it may use `parameters`, and no other tensor that has a gradient.
        parameters: Weights inside it.
        inputs: What goes in.
        twice: Its derivative is differentiated again, as forces are. torch's checkpoint then keeps all that the first
            derivative had computed anew, which is everything.
    """
    if twice:
        outputs: tuple[Tensor, ...] = _Recomputed.apply(part, tuple(parameters), *inputs, *parameters)  # type: ignore[no-untyped-call]
    else:
        outputs = checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
    return outputs


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Part, parameters: tuple[Tensor, ...], *tensors: Tensor) -> Any:
        ctx.part, ctx.parameters = part, parameters
        inputs = tensors[: len(tensors) - len(parameters)]
        ctx.save_for_backward(*inputs)
        return part(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        found = _Derivative.apply(  # type: ignore[no-untyped-call]
            ctx.part, ctx.parameters, weights_are_wanted(), len(gradients), *gradients, *ctx.saved_tensors,
            *ctx.parameters,
        )  # fmt: skip
        return None, None, *found


class _Derivative(torch.autograd.Function):
    """Gradients of inputs and parameters from those of outputs, by going through the part once more."""

    @staticmethod
    def forward(
        ctx: Any, part: Part, parameters: tuple[Tensor, ...], weights: bool, n_given: int, *tensors: Tensor
    ) -> Any:
        ctx.part, ctx.parameters, ctx.weights, ctx.n_given = part, parameters, weights, n_given
        kept = tensors[: len(tensors) - len(parameters)]
        ctx.save_for_backward(*kept)
        gradients, inputs = _fresh(kept[:n_given]), _fresh(kept[n_given:])
        return _through(part, inputs, parameters, gradients, weights=weights, again=False)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> Any:
        gradients = _fresh(ctx.saved_tensors[: ctx.n_given])
        inputs = _fresh(ctx.saved_tensors[ctx.n_given :])
        first = _through(ctx.part, inputs, ctx.parameters, gradients, weights=ctx.weights, again=True)
        pairs = [(f, o) for f, o in zip(first, outer, strict=True) if f is not None and f.requires_grad]
        wanted = [t for t in (*gradients, *inputs, *ctx.parameters) if t.requires_grad]
        found = iter(torch.autograd.grad([f for f, _ in pairs], wanted, [o for _, o in pairs], allow_unused=True))
        second = [next(found) if t.requires_grad else None for t in (*gradients, *inputs, *ctx.parameters)]
        return None, None, None, None, *second


def _fresh(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers, with nothing before them."""
    return [t.detach().requires_grad_(t.requires_grad) for t in tensors]


def _through(  # noqa: PLR0913
    part: Part,
    inputs: Sequence[Tensor],
    parameters: tuple[Tensor, ...],
    gradients: Sequence[Tensor],
    *,
    weights: bool,
    again: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of inputs and, where `weights` are wanted, of parameters; None where there is none."""
    with torch.enable_grad(), positions_only(not weights):
        outputs = part(*inputs)
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
        all_of_them = (*inputs, *(parameters if weights else ()))
        wanted = [t for t in all_of_them if t.requires_grad]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=again, allow_unused=True
            )
        )
    result = [next(found) if t.requires_grad else None for t in all_of_them]
    return (*result, *(() if weights else (None,) * len(parameters)))
