"""The few operations that take a model's time, each with the derivatives that suit it.

On a CPU, sums over neighbours go through ``embedding_bag``, which reads each row once; a gather's derivative is such a
sum over edges sorted by atom. All of it runs on any device.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

# Below, making a oneDNN kernel for yet another number of edges (0.4 ms) costs what the kernel saves.
SMALLEST_ONE_DNN_PRODUCT = 2**24
_THREAD = threading.local()


@dataclass(frozen=True)
class EdgeGraph:
    """Who sends to whom, and both ways to sort the edges by atom; N atoms receive, M atoms send.

    Attributes:
        receivers: int64 [E], ascending.
        senders: int64 [E].
        receiver_offsets: int64 [N + 1], first edge of each receiver.
        sender_order: int64 [E], edges sorted by sender.
        sender_offsets: int64 [M + 1], where each sender's edges begin in `sender_order`.
        all_edges: int64 [E], 0 to E - 1.
        pairs: int64 [E, 2], receiver and sender as rows of a table of N receivers, then M senders.
    """

    receivers: Tensor
    senders: Tensor
    receiver_offsets: Tensor
    sender_order: Tensor
    sender_offsets: Tensor
    all_edges: Tensor
    pairs: Tensor

    @classmethod
    def of(cls, receivers: Tensor, senders: Tensor, n_receivers: int, n_senders: int) -> EdgeGraph:
        """Sort once a batch; `receivers` must be ascending."""
        return cls(
            receivers,
            senders,
            _offsets(receivers, n_receivers),
            torch.argsort(senders, stable=True),
            _offsets(senders, n_senders),
            torch.arange(len(receivers), device=receivers.device),
            torch.stack([receivers, senders + n_receivers], dim=1),
        )

    def of_receivers(self, x: Tensor) -> Tensor:
        """Each edge's receiver's row: [N, H] -> [E, H]."""
        return _apply(_Gather, x, self.receivers, self.all_edges, self.receiver_offsets)

    def of_senders(self, x: Tensor) -> Tensor:
        """Each edge's sender's row: [M, H] -> [E, H]."""
        return _apply(_Gather, x, self.senders, self.sender_order, self.sender_offsets)

    def of_pairs(self, receiver_rows: Tensor, sender_rows: Tensor) -> Tensor:
        """Each edge's receiver's row plus its sender's: [N, H], [M, H] -> [E, H], without either of them [E, H]."""
        return _apply(_GatherPair, receiver_rows, sender_rows, self)

    def to_receivers(self, x: Tensor) -> Tensor:
        """Sum of the rows of each receiver's edges, in float32 at the least inside: [E, H] -> [N, H]."""
        return _apply(_Sum, x, self.receivers, self.all_edges, self.receiver_offsets)

    def to_senders(self, x: Tensor) -> Tensor:
        """Sum of the rows of each sender's edges: [E, H] -> [M, H]."""
        return _apply(_Sum, x, self.senders, self.sender_order, self.sender_offsets)

    def chunks(self, n_edges: int) -> list[tuple[slice, slice, EdgeGraph]]:
        """Atoms, edges and graph of successive ranges of receivers with at most `n_edges` edges, or one receiver."""
        offsets = self.receiver_offsets.tolist()
        parts, first = [], 0
        for atom in range(1, len(offsets)):
            if atom == len(offsets) - 1 or offsets[atom + 1] - offsets[first] > n_edges:
                edges = slice(offsets[first], offsets[atom])
                graph = EdgeGraph.of(
                    self.receivers[edges] - first, self.senders[edges], atom - first, len(self.sender_offsets) - 1
                )
                parts.append((slice(first, atom), edges, graph))
                first = atom
        return parts


@contextmanager
def positions_only(yes: bool = True) -> Iterator[None]:
    """Inside, a backward pass is for forces alone, and no gradient of weights in oneDNN is made.

    torch does not tell a function which of its gradients are wanted. This holds for one thread: on a CPU, torch goes
    backward in the thread that asked.
    """
    before = weights_are_wanted()
    _THREAD.weights_are_wanted = not yes
    try:
        yield
    finally:
        _THREAD.weights_are_wanted = before


def weights_are_wanted() -> bool:
    """False inside of `positions_only`."""
    return getattr(_THREAD, "weights_are_wanted", True)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times weight [H, K] transposed, in the type of x."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if _pays_in_one_dnn(x, weight):
        return _apply(_OneDnnLinear, x, weight, bias)
    return F.linear(x, weight, bias)


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)."""
    return _apply(_SiLU, x)


class Linear(nn.Linear):
    """A linear layer that computes in the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class SiLU(nn.Module):
    """x sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return silu(x)


def _apply(function: Any, *arguments: Any) -> Tensor:
    """`function.apply`, which has no types."""
    result: Tensor = function.apply(*arguments)
    return result


def _offsets(ascending_or_not: Tensor, n: int) -> Tensor:
    return F.pad(torch.bincount(ascending_or_not, minlength=n).cumsum(0), (1, 0))


def _pays_in_one_dnn(x: Tensor, weight: Tensor) -> bool:
    """float32 products on a CPU: as fast as MKL on Intel's, two to four times as fast on others."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[0] * weight.numel() >= SMALLEST_ONE_DNN_PRODUCT
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class _OneDnnLinear(torch.autograd.Function):
    """x W^T + b by oneDNN; its derivatives are linear layers too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wanted, weights = ctx.needs_input_grad, weights_are_wanted()
        return (
            linear(gradient, weight.T) if wanted[0] else None,
            linear(gradient.T, x.T) if wanted[1] and weights else None,
            gradient.sum(dim=0) if wanted[2] and weights else None,
        )


class _SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return _apply(_SiLUSlope, gradient, x)


class _SiLUSlope(torch.autograd.Function):
    """g f'(x) in one pass; torch's own second derivative makes two dozen."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor) -> Any:
        ctx.save_for_backward(gradient, x)
        return torch.ops.aten.silu_backward(gradient, x)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        """With s = sigmoid(x), f' = s (1 + x (1 - s)) and f'' = s (1 - s) (2 + x (1 - 2 s))."""
        gradient, x = ctx.saved_tensors
        s = torch.sigmoid(x)
        if torch.is_grad_enabled():  # somebody wants yet another derivative
            return outer * s * (1 + x * (1 - s)), outer * gradient * s * (1 - s) * (2 + x * (1 - 2 * s))
        for_gradient = torch.ops.aten.silu_backward(outer, x) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return for_gradient, None
        curved = torch.ops.aten.sigmoid_backward(outer * gradient, s)
        return for_gradient, curved.mul_(s.mul_(-2).add_(1).mul_(x).add_(2))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, order: Tensor, offsets: Tensor) -> Any:
        ctx.save_for_backward(index, order, offsets)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _apply(_Sum, gradient, *ctx.saved_tensors), None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, order: Tensor, offsets: Tensor) -> Any:
        ctx.save_for_backward(index, order, offsets)
        return _summed(order, x, offsets)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _apply(_Gather, gradient, *ctx.saved_tensors), None, None, None


class _GatherPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, receiver_rows: Tensor, sender_rows: Tensor, graph: EdgeGraph) -> Any:
        ctx.graph = graph
        return F.embedding_bag(graph.pairs, torch.cat([receiver_rows, sender_rows]), mode="sum")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.graph.to_receivers(gradient), ctx.graph.to_senders(gradient), None


def _summed(order: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return F.embedding_bag(order, x.contiguous(), offsets, mode="sum", include_last_offset=True)
