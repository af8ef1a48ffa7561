"""The strain derivative of the energy is that of finite differences: every family, head, force mode, memory saver."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from wattier_gnn.structure import Structure

STEP = 1e-5
KINDS = list(itertools.product(["egnn", "schnet", "pna"], ["conservative", "vector", "direct"]))
named = pytest.mark.parametrize(("family", "forces"), KINDS, ids=["-".join(kind) for kind in KINDS])


def strained(structure: Structure, strain: Any) -> Structure:
    deform = np.eye(3) + strain
    cell = structure.cell_angstrom
    return replace(
        structure,
        positions_angstrom=structure.positions_angstrom @ deform,
        cell_angstrom=None if cell is None else cell @ deform,
    )


def numeric(model: Any, tools: Any, structure: Structure) -> Any:
    """dE/d(strain) [3, 3] by central differences of each of the nine components: also what is not symmetric shows."""
    moves = STEP * np.eye(9).reshape(9, 3, 3)
    moved = [strained(structure, sign * move) for move in moves for sign in (1, -1)]
    with torch.no_grad():
        energies = model(tools.join(moved)).energy.numpy().reshape(9, 2)
    return ((energies[:, 0] - energies[:, 1]) / (2 * STEP)).reshape(3, 3)


def scenes_of(model: Any, tools: Any) -> list[Structure]:
    scenes = tools.scenes()
    if "continuous_forces" not in tools.model(family=model.config.family).properties:
        del scenes["small"]  # where neighbours are equally far, a minimum has no derivative
    return list(scenes.values())


@named
@pytest.mark.parametrize("heads", ["per_source", "shared", "both"])
def test_it_is_the_derivative_of_the_energy(family: str, forces: str, heads: str, tools: Any) -> None:
    model = tools.model(family=family, forces=forces, energy_heads=heads)
    scenes = scenes_of(model, tools)
    found = model(tools.join(scenes), strain=True).strain_derivative.numpy()
    for scene, said in zip(scenes, found, strict=True):
        true = numeric(model, tools, scene)
        assert np.abs(true).max() > 1e-3  # nothing is proved by zeros
        np.testing.assert_allclose(said, true, rtol=0, atol=1e-6 * np.abs(true).max())
        np.testing.assert_array_equal(said, said.T)


@named
def test_asking_for_it_changes_nothing_else(family: str, forces: str, tools: Any) -> None:
    model = tools.model(family=family, forces=forces)
    batch = tools.join(list(tools.scenes().values()))
    with torch.no_grad():
        plain = model(batch)
    asked = model(batch, strain=True)
    assert plain.strain_derivative is None
    torch.testing.assert_close(asked.energy, plain.energy, rtol=0, atol=1e-12)
    torch.testing.assert_close(asked.forces, plain.forces, rtol=0, atol=1e-12)
    assert not any(tensor.requires_grad for tensor in (asked.energy, asked.forces, asked.strain_derivative))


@pytest.mark.parametrize("forces", ["conservative", "vector", "direct"])
@pytest.mark.parametrize(
    "changes",
    [
        {"activation_checkpointing": True},
        {"edge_chunk": 40},
        {"edge_chunk": 40, "activation_checkpointing": True},
        {"family": "schnet", "activation_checkpointing": True},
        {"family": "pna", "activation_checkpointing": True},
    ],
    ids=["checkpointing", "chunks", "both", "schnet", "pna"],
)
def test_less_memory_changes_no_number(forces: str, changes: dict[str, Any], tools: Any) -> None:
    batch = tools.join(list(tools.scenes().values()))
    frugal = tools.model(forces=forces, **changes)
    plain = tools.model(forces=forces, **({"family": changes["family"]} if "family" in changes else {}))
    for options in ({"strain": True}, {"strain": True, "conservative": True}):
        a, b = frugal(batch, **options), plain(batch, **options)
        torch.testing.assert_close(a.strain_derivative, b.strain_derivative, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(a.forces, b.forces, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["egnn", "schnet", "pna"])
@pytest.mark.parametrize("forces", ["vector", "direct"])
def test_forces_can_be_the_gradient_whatever_they_were_trained_as(family: str, forces: str, tools: Any) -> None:
    model = tools.model(family=family, forces=forces)
    scene = tools.scenes()["molecule"]
    moves = STEP * np.eye(24).reshape(24, 8, 3)
    moved = [replace(scene, positions_angstrom=scene.positions_angstrom + s * m) for m in moves for s in (1, -1)]
    with torch.no_grad():
        energies = model(tools.join(moved)).energy.numpy().reshape(8, 3, 2)
        head, gradient = (model(tools.join([scene]), conservative=c).forces.numpy() for c in (False, True))
    true = (energies[..., 1] - energies[..., 0]) / (2 * STEP)
    np.testing.assert_allclose(gradient, true, rtol=0, atol=1e-6 * np.abs(true).max())
    assert np.abs(head - true).max() > 0.01 * np.abs(true).max()


@pytest.mark.parametrize("family", ["egnn", "schnet", "pna"])
@pytest.mark.parametrize("forces", ["conservative", "vector"])
def test_in_bfloat16_it_is_as_near_as_forces_are(family: str, forces: str, tools: Any) -> None:
    batch = tools.join(list(tools.scenes().values()))
    floats = {f.name: t.float() for f in fields(batch) if (t := getattr(batch, f.name)).is_floating_point()}
    options = {"strain": True, "conservative": True}
    exact, rough = (
        tools.model(family=family, forces=forces, precision=precision).float()(replace(batch, **floats), **options)
        for precision in ("float32", "bfloat16")
    )
    for name in ("strain_derivative", "forces"):
        a, b = getattr(exact, name), getattr(rough, name)
        assert b.dtype == torch.float32
        assert 0 < float((a - b).norm() / a.norm()) < 0.1, name


@pytest.mark.parametrize("forces", ["conservative", "vector"])
@pytest.mark.parametrize("changes", [{}, {"edge_chunk": 40}, {"activation_checkpointing": True}], ids=str)
def test_a_model_can_be_trained_on_it(forces: str, changes: dict[str, Any], tools: Any) -> None:
    """In training its derivative with respect to the weights is that of finite differences."""
    model = tools.model(forces=forces, **changes).train()
    batch = tools.join([tools.scenes()["skew"]])
    weight = model.encoder.layers[0].message.weight

    def loss() -> Any:
        return model(batch, strain=True).strain_derivative.square().sum()

    (slope,) = torch.autograd.grad(loss(), weight)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * STEP * direction
        values.append(loss().item())
        with torch.no_grad():
            weight -= sign * STEP * direction
    assert (slope * direction).sum().item() == pytest.approx((values[0] - values[1]) / (2 * STEP), rel=1e-5)


def test_structures_of_a_batch_do_not_mix(tools: Any) -> None:
    model, scenes = tools.model(), list(tools.scenes().values())
    together = model(tools.join(scenes), strain=True).strain_derivative
    alone = torch.cat([model(tools.join([scene]), strain=True).strain_derivative for scene in scenes])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def test_an_atom_without_neighbours_has_none(tools: Any) -> None:
    for forces in ("conservative", "vector"):
        said = tools.model(forces=forces)(tools.join([tools.structure([6], [[0, 0, 0]])]), strain=True)
        assert not said.strain_derivative.any()
        assert not said.forces.any()
