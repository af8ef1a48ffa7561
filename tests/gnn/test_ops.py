"""The fast operations are what they replace, and so are their derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from wattier_gnn import ops
from wattier_gnn.ops import EdgeGraph, linear, silu

RECEIVERS = torch.tensor([0, 0, 0, 2, 2, 3])  # atom 1 has no neighbour, atom 4 neither
SENDERS = torch.tensor([1, 3, 2, 0, 0, 2])
N = 5


def graph() -> EdgeGraph:
    return EdgeGraph.of(RECEIVERS, SENDERS, N, N)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gathers_and_sums_are_indexing_and_index_add(dtype: torch.dtype) -> None:
    h, x = normal(N, 4, dtype=dtype).detach(), normal(6, 4, dtype=dtype).detach()
    assert torch.equal(graph().of_receivers(h), h[RECEIVERS])
    assert torch.equal(graph().of_senders(h), h[SENDERS])
    torch.testing.assert_close(graph().of_pairs(h, -2 * h), h[RECEIVERS] - 2 * h[SENDERS])
    zeros = torch.zeros(N, 4, dtype=dtype)
    torch.testing.assert_close(graph().to_receivers(x), zeros.index_add(0, RECEIVERS, x))
    torch.testing.assert_close(graph().to_senders(x), zeros.index_add(0, SENDERS, x))


def test_sums_of_bfloat16_are_kept_in_float32() -> None:
    """In bfloat16 itself, 256 + 1 is 256."""
    many = EdgeGraph.of(torch.zeros(1000, dtype=torch.int64), torch.zeros(1000, dtype=torch.int64), 1, 1)
    assert float(many.to_receivers(torch.ones(1000, 8, dtype=torch.bfloat16))[0, 0]) == 1000.0


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda h: graph().of_receivers(h).tanh(), [(N, 3)]),
        (lambda h: graph().of_senders(h).tanh(), [(N, 3)]),
        (lambda a, b: graph().of_pairs(a, b).tanh(), [(N, 3), (N, 3)]),
        (lambda x: graph().to_receivers(x.tanh()), [(6, 3)]),
        (lambda x: graph().to_senders(x.tanh()), [(6, 3)]),
        (silu, [(4, 3)]),
    ],
)
def test_first_and_second_derivatives(function: Any, shapes: list[tuple[int, ...]]) -> None:
    inputs = [normal(*shape) for shape in shapes]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_no_edge() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    lonely = EdgeGraph.of(empty, empty, 2, 2)
    h = normal(2, 3)
    assert lonely.of_pairs(h, h).shape == (0, 3)
    assert torch.equal(lonely.to_receivers(lonely.of_senders(h)), torch.zeros(2, 3, dtype=torch.float64))


def test_third_derivative_of_silu() -> None:
    """Against torch's own, which builds it from elementary operations."""

    def third(function: Any) -> Any:
        x = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
        y = function(x)
        for _ in range(3):
            (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y

    torch.testing.assert_close(third(silu), third(F.silu))


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_in_one_dnn_is_the_same_to_its_second_derivatives(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "SMALLEST_ONE_DNN_PRODUCT", 1)
    x, weight, shift = (normal(*shape, dtype=torch.float32) for shape in ((9, 5), (7, 5), (7,)))
    inputs = [x, weight, *([shift] if bias else [])]

    def derivatives(product: Any) -> list[Any]:
        y = product(*inputs)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return [y, *first, *torch.autograd.grad(sum(g.tanh().sum() for g in first), inputs)]

    assert type(linear(*inputs).grad_fn).__name__ == "_OneDnnLinearBackward"
    for a, b in zip(derivatives(linear), derivatives(F.linear), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_edges", [1, 3, 4, 100])
def test_chunks_hold_every_edge_once_and_whole_receivers(n_edges: int) -> None:
    parts = graph().chunks(n_edges)
    assert [atom for atoms, _, _ in parts for atom in range(atoms.start, atoms.stop)] == list(range(N))
    assert torch.equal(torch.cat([RECEIVERS[edges] for _, edges, _ in parts]), RECEIVERS)
    for atoms, edges, part in parts:
        assert torch.equal(part.receivers + atoms.start, RECEIVERS[edges])
        assert torch.equal(part.senders, SENDERS[edges])
        assert edges.stop - edges.start <= n_edges or atoms.stop - atoms.start == 1
