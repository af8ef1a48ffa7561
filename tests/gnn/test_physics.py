"""What any interatomic potential must keep: symmetries, forces, smoothness, separation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from wattier_gnn.structure import Structure

SCENES = ["molecule", "skew", "small"]
FORCES = ["conservative", "vector"]
TIGHT = 1e-10


@pytest.fixture(params=FORCES)
def model(request: pytest.FixtureRequest, tools: Any) -> Any:
    return tools.model(forces=request.param)


@pytest.fixture(params=SCENES)
def scene(request: pytest.FixtureRequest, tools: Any) -> Structure:
    found: Structure = tools.scenes()[request.param]
    return found


def orthogonal(determinant: int, seed: int = 5) -> Any:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q[0] *= determinant * np.sign(np.linalg.det(q))
    return q


def evaluate(model: Any, tools: Any, *structures: Structure) -> tuple[Any, Any]:
    """Energies [B] and forces [N, 3]."""
    with torch.no_grad():
        prediction = model(tools.join(structures))
    return prediction.energy.numpy(), prediction.forces.numpy()


def assert_close(a: Any, b: Any, tolerance: float = TIGHT) -> None:
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("determinant", [1, -1], ids=["rotation", "reflection"])
def test_rotation_and_reflection(model: Any, scene: Structure, tools: Any, determinant: int) -> None:
    q = orthogonal(determinant)
    cell = scene.cell_angstrom
    turned = replace(
        scene,
        positions_angstrom=scene.positions_angstrom @ q.T,
        cell_angstrom=None if cell is None else cell @ q.T,
    )
    energy, forces = evaluate(model, tools, scene)
    turned_energy, turned_forces = evaluate(model, tools, turned)
    assert np.abs(forces).max() > 1e-3  # nothing is proved by zeros
    assert_close(turned_energy, energy)
    assert_close(turned_forces, forces @ q.T)


def test_translation(model: Any, scene: Structure, tools: Any) -> None:
    moved = replace(scene, positions_angstrom=scene.positions_angstrom + np.array([7.3, -11.1, 3.9]))
    for a, b in zip(evaluate(model, tools, moved), evaluate(model, tools, scene), strict=True):
        assert_close(a, b)


def test_permutation(model: Any, scene: Structure, tools: Any) -> None:
    order = np.random.default_rng(2).permutation(len(scene.numbers))
    shuffled = replace(scene, numbers=scene.numbers[order], positions_angstrom=scene.positions_angstrom[order])
    energy, forces = evaluate(model, tools, scene)
    shuffled_energy, shuffled_forces = evaluate(model, tools, shuffled)
    assert_close(shuffled_energy, energy)
    assert_close(shuffled_forces, forces[order])


@pytest.mark.parametrize("name", ["skew", "small"])
def test_an_atom_may_be_given_by_any_of_its_images(model: Any, tools: Any, name: str) -> None:
    scene = tools.scenes()[name]
    positions = scene.positions_angstrom.copy()
    positions[0] += np.array([2, -1, 3]) @ scene.cell_angstrom
    wrapped = replace(scene, positions_angstrom=positions)
    for a, b in zip(evaluate(model, tools, wrapped), evaluate(model, tools, scene), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", ["skew", "small"])
def test_a_supercell_has_the_energy_of_its_cells(model: Any, tools: Any, name: str) -> None:
    scene = tools.scenes()[name]
    double = replace(
        scene,
        numbers=np.tile(scene.numbers, 2),
        positions_angstrom=np.concatenate(
            [scene.positions_angstrom, scene.positions_angstrom + scene.cell_angstrom[0]]
        ),
        cell_angstrom=scene.cell_angstrom * np.array([[2.0], [1.0], [1.0]]),
    )
    energy, forces = evaluate(model, tools, scene)
    double_energy, double_forces = evaluate(model, tools, double)
    assert_close(double_energy, 2 * energy)
    assert_close(double_forces, np.tile(forces, (2, 1)))


def test_energy_is_invariant_in_float32(model: Any, scene: Structure, tools: Any) -> None:
    q = orthogonal(1)
    cell = scene.cell_angstrom
    turned = replace(
        scene, positions_angstrom=scene.positions_angstrom @ q.T, cell_angstrom=None if cell is None else cell @ q.T
    )
    model = model.float()
    energies = []
    for structure in (scene, turned):
        batch = tools.join([structure])
        batch = replace(
            batch, positions=batch.positions.float(), edge_shift=batch.edge_shift.float(), energy=batch.energy.float()
        )
        energies.append(float(model(batch).energy.detach()))
    assert energies[1] == pytest.approx(energies[0], rel=1e-5, abs=1e-5)


def test_conservative_forces_are_minus_the_gradient(scene: Structure, tools: Any) -> None:
    model, step = tools.model(), 1e-4
    displaced = []
    for atom in range(len(scene.numbers)):
        for axis in range(3):
            for sign in (1, -1):
                positions = scene.positions_angstrom.copy()
                positions[atom, axis] += sign * step
                displaced.append(replace(scene, positions_angstrom=positions))
    energies = evaluate(model, tools, *displaced)[0].reshape(-1, 3, 2)
    numeric = -(energies[..., 0] - energies[..., 1]) / (2 * step)
    _, forces = evaluate(model, tools, scene)
    np.testing.assert_allclose(forces, numeric, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(forces.sum(axis=0), 0, atol=1e-10)


def test_a_batch_is_its_structures(model: Any, tools: Any) -> None:
    scenes = list(tools.scenes().values())
    energy, forces = evaluate(model, tools, *scenes)
    singles = [evaluate(model, tools, scene) for scene in scenes]
    assert_close(energy, np.concatenate([e for e, _ in singles]))
    assert_close(forces, np.concatenate([f for _, f in singles]))


def test_training_mode_predicts_the_same(model: Any, scene: Structure, tools: Any) -> None:
    energy, forces = evaluate(model, tools, scene)
    prediction = model.train()(tools.join([scene]))
    assert_close(prediction.energy.detach().numpy(), energy)
    assert_close(prediction.forces.detach().numpy(), forces)
    assert prediction.forces.requires_grad


def test_far_molecules_do_not_feel_each_other(model: Any, tools: Any) -> None:
    scene = tools.scenes()["molecule"]
    other = tools.structure([8, 1, 1], [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    both = tools.structure(
        np.concatenate([scene.numbers, other.numbers]),
        np.concatenate([scene.positions_angstrom, other.positions_angstrom + 50.0]),
    )
    energy, forces = evaluate(model, tools, both)
    singles = [evaluate(model, tools, s) for s in (scene, other)]
    assert_close(energy, singles[0][0] + singles[1][0])
    assert_close(forces, np.concatenate([singles[0][1], singles[1][1]]))


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("periodic", [False, True])
def test_a_neighbour_crosses_the_cutoff_smoothly(model: Any, tools: Any, direction: int, periodic: bool) -> None:
    """The first two atoms push each other, so in later layers the third is not where it was; it must not matter."""

    def scene(distance: float) -> Structure:
        positions = [[0, 0, 0], [direction * 1.2, 0, 0], [distance, 0, 0]]
        cell = {"cell_angstrom": np.diag([20.0, 3.9, 20.0]), "pbc": (True, True, True)} if periodic else {}
        found: Structure = tools.structure([6, 8, 1], positions, **cell)
        return found

    step = 1e-7
    cutoff = tools.cutoff_angstrom
    inside, outside = (evaluate(model, tools, scene(cutoff + sign * step)) for sign in (-1, 1))
    n_edges = [tools.join([scene(cutoff + sign * step)]).edge_index.shape[1] for sign in (-1, 1)]
    assert n_edges[0] > n_edges[1]
    np.testing.assert_allclose(inside[0], outside[0], rtol=0, atol=1e-9)
    np.testing.assert_allclose(inside[1], outside[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pbc", [False, True])
def test_an_isolated_atom(model: Any, tools: Any, pbc: bool) -> None:
    cell = {"cell_angstrom": 20.0 * np.eye(3), "pbc": (True, True, True)} if pbc else {}
    atom = tools.structure([6], [[1.0, 2.0, 3.0]], **cell)
    energy, forces = evaluate(model, tools, atom)
    assert np.isfinite(energy).all()
    assert not forces.any()
    prediction = model.train()(tools.join([atom]))
    (prediction.energy.sum() + prediction.forces.sum()).backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


def test_a_model_of_isolated_atoms_only(tools: Any) -> None:
    energy, _ = evaluate(tools.model(mean_neighbors=0.0), tools, tools.scenes()["molecule"])
    assert np.isfinite(energy).all()


@pytest.mark.parametrize("n_layers", [1, 2])
def test_every_parameter_takes_part_in_every_step(model: Any, tools: Any, n_layers: int) -> None:
    """Else DistributedDataParallel would refuse the second step; source b is absent here."""
    model = tools.model(forces=model.config.forces, n_layers=n_layers).train()
    prediction = model(tools.join([tools.scenes()["molecule"]]))
    (prediction.energy.sum() + prediction.forces.square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_sources_have_energies_of_their_own(model: Any, tools: Any) -> None:
    scene = tools.scenes()["molecule"]
    energy, _ = evaluate(model, tools, scene, replace(scene, source="b"))
    assert abs(energy[0] - energy[1]) > 1e-3
