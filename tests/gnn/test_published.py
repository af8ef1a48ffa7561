"""The published layer algebra has the published sizes, the published numbers, and the published flaw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wattier.config import load_sizes
from wattier_gnn.model import count_parameters
from wattier_gnn.published import PublishedEGNN, PublishedSizes, count_closed_form

TALK = Path(__file__).parents[2] / "configs" / "talk_sizes.yaml"
PUBLISHED = {"SMALL": 58_404, "MEDIUM": 14_539_004, "LARGE": 163_129_004}
TINY = PublishedSizes(32, 3, (32, 24), (20,), (16,))


def count_built(sizes: PublishedSizes) -> int:
    with torch.device("meta"):
        return count_parameters(PublishedEGNN(sizes))


def test_the_sizes_of_the_talk() -> None:
    sizes = load_sizes(TALK).sizes
    assert set(sizes) == set(PUBLISHED)
    for name, size in sizes.items():
        published = PublishedSizes(
            size.hidden_dim, size.n_layers, tuple(size.shared), tuple(size.energy_head), tuple(size.force_head)
        )
        assert count_built(published) == count_closed_form(published) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("hidden_dim", "n_layers", "head", "expected"),
    [
        (866, 4, (889, 889, 889), 22_065_718),  # the released GFM260
        (100, 2, (300, 300), 337_604),  # the corners of the published search space
        (2000, 6, (1000, 1000, 1000), 158_278_604),
    ],
)
def test_released_models_keep_a_shared_mlp_of_two_by_fifty(
    hidden_dim: int, n_layers: int, head: tuple[int, ...], expected: int
) -> None:
    sizes = PublishedSizes(hidden_dim, n_layers, (50, 50), head, head)
    assert count_built(sizes) == count_closed_form(sizes) == expected


def test_forward_gives_one_energy_a_structure_and_one_force_an_atom(tools: Any) -> None:
    structures = list(tools.scenes().values())
    prediction = PublishedEGNN(TINY).double()(tools.join(structures))
    assert prediction.energy.shape == (3,)
    assert prediction.forces.shape == (15, 3)
    (prediction.energy.sum() + prediction.forces.sum()).backward()


@pytest.mark.parametrize("scene", ["molecule", "skew", "small"])
@pytest.mark.parametrize("sizes", [TINY, PublishedSizes(9, 2, (8,), (7, 6), (5, 4))], ids=["three", "two"])
def test_it_equals_a_dense_implementation_of_the_published_equations(
    scene: str, sizes: PublishedSizes, tools: Any
) -> None:
    structure = tools.scenes()[scene]
    torch.manual_seed(2)
    published = PublishedEGNN(sizes).double()
    with torch.no_grad():
        for layer in published.layers:
            if layer.coord_mlp is not None:
                layer.coord_mlp[2].weight.mul_(100_000)  # else coordinates move by less than one would see
    prediction = published(tools.join([structure]))
    weights = {name: tensor.numpy() for name, tensor in published.state_dict().items()}
    energy, forces, moved = dense(structure, weights, sizes.n_layers, tools.cutoff_angstrom)
    assert moved > 0.02
    np.testing.assert_allclose(prediction.energy.detach().numpy(), energy, rtol=1e-10)
    np.testing.assert_allclose(prediction.forces.detach().numpy(), forces, rtol=1e-10, atol=1e-12)


def dense(structure: Any, weights: dict[str, Any], n_layers: int, cutoff: float) -> tuple[float, Any, float]:
    """Energy, forces [N, 3] and the longest way an atom was moved, over all pairs and images: [N, N, images, ...].

    m_ij = phi_e(x_i, x_j, |r_i - r_j|^2, d_ij), r_i += mean_j clamp((r_i - r_j) / (|r_i - r_j| + 1) phi_r(m_ij)),
    x_i = relu(phi_x(x_i, sum_j m_ij)); d_ij is the first distance. Energy per atom of the mean of x, forces of each x.
    """

    def mlp(x: Any, prefix: str, n_linear: int, *, last: Any = lambda y: y) -> Any:
        for k in range(n_linear):
            x = np.einsum("...a,ba->...b", x, weights[f"{prefix}.{2 * k}.weight"])
            x = x + weights.get(f"{prefix}.{2 * k}.bias", 0.0)
            x = np.maximum(x, 0) if k < n_linear - 1 else last(x)
        return x

    def n_linear(prefix: str) -> int:
        return sum(name.startswith(prefix) and name.endswith("weight") for name in weights)

    def relu(x: Any) -> Any:
        return np.maximum(x, 0)

    r = structure.positions_angstrom.copy()
    n, cell = len(r), structure.cell_angstrom
    steps = np.stack(np.meshgrid(*[np.arange(-3, 4)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    shifts = np.zeros((1, 3)) if cell is None else steps @ cell
    home = (shifts == 0).all(axis=1)

    def apart() -> Any:
        return r[:, None, None] - r[None, :, None] - shifts

    first = np.linalg.norm(apart(), axis=-1)
    linked = (first < cutoff) & ~(np.eye(n, dtype=bool)[:, :, None] & home)
    x = np.concatenate([structure.numbers[:, None].astype(float), r], axis=1)
    for k in range(n_layers):
        away = apart()
        squared = (away**2).sum(axis=-1)
        ends = (
            np.broadcast_to(x[:, None, None], (n, n, len(shifts), x.shape[1])),
            np.broadcast_to(x[None, :, None], (n, n, len(shifts), x.shape[1])),
        )
        pair = np.concatenate([*ends, squared[..., None], first[..., None]], axis=-1)
        m = mlp(pair, f"layers.{k}.edge_mlp", 2, last=relu) * linked[..., None]
        if k < n_layers - 1:
            push = away / (np.sqrt(squared)[..., None] + 1) * mlp(m, f"layers.{k}.coord_mlp", 2, last=np.tanh)
            push = np.clip(push, -100, 100) * linked[..., None]
            r = r + push.sum(axis=(1, 2)) / np.maximum(linked.sum(axis=(1, 2)), 1)[:, None]
        x = relu(mlp(np.concatenate([x, m.sum(axis=(1, 2))], axis=1), f"layers.{k}.node_mlp", 2))
    shared = relu(mlp(x.mean(axis=0), "shared.0", n_linear("shared.0")))
    per_atom = mlp(shared, "energy_head", n_linear("energy_head"))[0]
    moved = np.abs(r - structure.positions_angstrom).max()
    return n * per_atom, mlp(x, "force_head", n_linear("force_head")), moved


def test_it_is_not_invariant_to_translation_and_ours_is(tools: Any) -> None:
    molecule = tools.scenes()["molecule"]
    moved = tools.structure(molecule.numbers, molecule.positions_angstrom + 10.0)
    torch.manual_seed(0)
    published, ours = PublishedEGNN(TINY).double(), tools.model()
    batches = [tools.join([molecule]), tools.join([moved])]
    a, b = (float(published(batch).energy.detach()) for batch in batches)
    assert abs(a - b) > 1e-3
    a, b = (float(ours(batch).energy) for batch in batches)
    assert a == pytest.approx(b, rel=1e-12)


@pytest.mark.parametrize("changes", [{"n_layers": 1}, {"shared": ()}])
def test_sizes_outside_the_algebra_are_refused(changes: dict[str, Any]) -> None:
    good = {"hidden_dim": 8, "n_layers": 3, "shared": (6,), "energy_head": (7,), "force_head": (9,)}
    with pytest.raises(ValueError, match="but must"):
        PublishedSizes(**{**good, **changes})
