"""What any interatomic potential must keep: each promise a model makes is kept, and those it does not make are not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from wattier_gnn.properties import PROPERTIES
from wattier_gnn.published import PublishedEGNN, PublishedSizes
from wattier_gnn.structure import Structure

FAMILIES = ["egnn", "schnet", "pna"]
HEADS = ["per_source", "shared", "both"]
FORCES = ["conservative", "vector", "direct"]
KINDS = [*itertools.product(FAMILIES, HEADS, FORCES), ("published", "", "")]
OURS = list(itertools.product(FAMILIES, ["both"], FORCES))
TIGHT = 1e-10
OFFSET_ANGSTROM = np.array([7.3, -11.1, 3.9])


def named(kinds: list[tuple[str, str, str]]) -> Any:
    return pytest.mark.parametrize("kind", kinds, ids=["-".join(filter(None, kind)) for kind in kinds])


@pytest.fixture
def model(kind: tuple[str, str, str], tools: Any) -> Any:
    family, heads, forces = kind
    if family == "published":
        torch.manual_seed(0)
        return PublishedEGNN(PublishedSizes(12, 3, (10, 10), (10,), (10,))).double().eval()
    return tools.model(family=family, energy_heads=heads, forces=forces)


def scenes_of(model: Any, tools: Any) -> dict[str, Structure]:
    """In "small" neighbours are equally far, which not all models can bear; see test_continuous_forces."""
    scenes: dict[str, Structure] = tools.scenes()
    if "continuous_forces" not in model.properties:
        del scenes["small"]
    return scenes


@contextmanager
def as_promised(model: Any, name: str) -> Iterator[None]:
    """What is checked inside must hold if the model promises it, and must not if it does not."""
    if name not in PROPERTIES:
        raise ValueError(f"there is no property {name!r}")
    if name in model.properties:
        yield
    else:
        with pytest.raises(AssertionError):
            yield


def orthogonal(determinant: int, seed: int = 5) -> Any:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q[0] *= determinant * np.sign(np.linalg.det(q))
    return q


def turned(scene: Structure, q: Any) -> Structure:
    cell = scene.cell_angstrom
    return replace(
        scene, positions_angstrom=scene.positions_angstrom @ q.T, cell_angstrom=None if cell is None else cell @ q.T
    )


def evaluate(model: Any, tools: Any, *structures: Structure) -> tuple[Any, Any]:
    """Energies [B] and forces [N, 3]."""
    with torch.no_grad():
        prediction = model(tools.join(structures))
    return prediction.energy.numpy(), prediction.forces.numpy()


def assert_close(a: Any, b: Any, tolerance: float = TIGHT) -> None:
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, np.abs(b).max()))


@named(KINDS)
class TestPromises:
    """One test a property; each is asked of every model."""

    def test_permutation(self, model: Any, tools: Any) -> None:
        with as_promised(model, "permutation"):
            for scene in scenes_of(model, tools).values():
                order = np.random.default_rng(2).permutation(len(scene.numbers))
                shuffled = replace(
                    scene, numbers=scene.numbers[order], positions_angstrom=scene.positions_angstrom[order]
                )
                energy, forces = evaluate(model, tools, scene)
                assert np.abs(forces).max() > 1e-3  # nothing is proved by zeros
                shuffled_energy, shuffled_forces = evaluate(model, tools, shuffled)
                assert_close(shuffled_energy, energy)
                assert_close(shuffled_forces, forces[order])

    def test_translation(self, model: Any, tools: Any) -> None:
        with as_promised(model, "translation"):
            for scene in scenes_of(model, tools).values():
                moved = replace(scene, positions_angstrom=scene.positions_angstrom + OFFSET_ANGSTROM)
                images = [moved]
                if scene.cell_angstrom is not None:
                    positions = scene.positions_angstrom.copy()
                    positions[0] += np.array([2, -1, 3]) @ scene.cell_angstrom
                    images.append(replace(scene, positions_angstrom=positions))
                for same, (a, b) in itertools.product(images, [evaluate(model, tools, scene)]):
                    energy, forces = evaluate(model, tools, same)
                    assert_close(energy, a)
                    assert_close(forces, b)

    @pytest.mark.parametrize("determinant", [1, -1], ids=["rotation", "reflection"])
    def test_invariant_energy(self, model: Any, tools: Any, determinant: int) -> None:
        with as_promised(model, "invariant_energy"):
            for scene in scenes_of(model, tools).values():
                there = evaluate(model, tools, turned(scene, orthogonal(determinant)))[0]
                assert_close(there, evaluate(model, tools, scene)[0])

    @pytest.mark.parametrize("determinant", [1, -1], ids=["rotation", "reflection"])
    def test_equivariant_forces(self, model: Any, tools: Any, determinant: int) -> None:
        q = orthogonal(determinant)
        with as_promised(model, "equivariant_forces"):
            for scene in scenes_of(model, tools).values():
                assert_close(evaluate(model, tools, turned(scene, q))[1], evaluate(model, tools, scene)[1] @ q.T)

    def test_conservative(self, model: Any, tools: Any) -> None:
        step = 1e-4
        with as_promised(model, "conservative"):
            for scene in scenes_of(model, tools).values():
                moves = step * np.eye(scene.positions_angstrom.size).reshape(-1, *scene.positions_angstrom.shape)
                moved = [
                    replace(scene, positions_angstrom=scene.positions_angstrom + sign * move)
                    for move in moves
                    for sign in (1, -1)
                ]
                energies = evaluate(model, tools, *moved)[0].reshape(-1, 3, 2)
                numeric = -(energies[..., 0] - energies[..., 1]) / (2 * step)
                _, forces = evaluate(model, tools, scene)
                np.testing.assert_allclose(forces, numeric, rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(forces.sum(axis=0), 0, atol=1e-10)

    def test_smooth_cutoff(self, model: Any, tools: Any) -> None:
        """The first two atoms push each other, so in later layers the third is not where it was; it must not matter."""
        step, cutoff = 1e-7, tools.cutoff_angstrom
        cells = [{}, {"cell_angstrom": np.diag([20.0, 3.9, 20.0]), "pbc": (True, True, True)}]
        with as_promised(model, "smooth_cutoff"):
            for direction, cell in itertools.product((1, -1), cells):
                inside, outside = (
                    tools.structure([6, 8, 1], [[0, 0, 0], [direction * 1.2, 0, 0], [cutoff + sign, 0, 0]], **cell)
                    for sign in (-step, step)
                )
                n_edges = [tools.join([scene]).edge_index.shape[1] for scene in (inside, outside)]
                if n_edges[0] <= n_edges[1]:
                    raise RuntimeError("no neighbour crosses the cutoff")
                (energy, forces), (energy_out, forces_out) = (evaluate(model, tools, s) for s in (inside, outside))
                np.testing.assert_allclose(energy, energy_out, rtol=0, atol=1e-8)
                np.testing.assert_allclose(forces, forces_out, rtol=0, atol=1e-5)

    def test_continuous_forces(self, model: Any, tools: Any) -> None:
        scene = tools.scenes()["small"]
        nudge = 1e-9 * np.random.default_rng(7).normal(size=scene.positions_angstrom.shape)
        here, there = (replace(scene, positions_angstrom=scene.positions_angstrom + sign * nudge) for sign in (1, -1))
        with as_promised(model, "continuous_forces"):
            assert_close(evaluate(model, tools, here)[1], evaluate(model, tools, there)[1], 1e-7)

    def test_extensive(self, model: Any, tools: Any) -> None:
        scenes = scenes_of(model, tools)
        with as_promised(model, "extensive"):
            for scene in scenes.values():
                if scene.cell_angstrom is None:
                    continue
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

    def test_extensive_far_apart(self, model: Any, tools: Any) -> None:
        one = tools.scenes()["molecule"]
        other = tools.structure([8, 1, 1], [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
        both = tools.structure(
            np.concatenate([one.numbers, other.numbers]),
            np.concatenate([one.positions_angstrom, other.positions_angstrom + 50.0]),
        )
        with as_promised(model, "extensive"):
            energy, forces = evaluate(model, tools, both)
            singles = [evaluate(model, tools, s) for s in (one, other)]
            assert_close(energy, singles[0][0] + singles[1][0])
            assert_close(forces, np.concatenate([singles[0][1], singles[1][1]]))

    def test_batch_independent(self, model: Any, tools: Any) -> None:
        scenes = list(scenes_of(model, tools).values())
        with as_promised(model, "batch_independent"):
            energy, forces = evaluate(model, tools, *scenes)
            singles = [evaluate(model, tools, scene) for scene in scenes]
            assert_close(energy, np.concatenate([e for e, _ in singles]))
            assert_close(forces, np.concatenate([f for _, f in singles]))


def test_what_each_model_promises(tools: Any) -> None:
    """Written out, so that a promise withdrawn is seen."""
    assert tools.model(forces="conservative").properties == PROPERTIES
    assert tools.model(forces="vector").properties == PROPERTIES - {"conservative"}
    assert tools.model(forces="direct").properties == PROPERTIES - {"conservative", "equivariant_forces"}
    assert tools.model(family="schnet").properties == PROPERTIES
    assert tools.model(family="pna").properties == PROPERTIES - {"smooth_cutoff", "continuous_forces"}
    assert tools.model(family="pna", forces="vector").properties == PROPERTIES - {"smooth_cutoff", "conservative"}
    assert PublishedEGNN.properties == {"permutation", "continuous_forces", "batch_independent"}


@named(OURS)
def test_energy_is_invariant_in_float32(model: Any, tools: Any) -> None:
    model = model.float()
    for scene in tools.scenes().values():
        energies = []
        for structure in (scene, turned(scene, orthogonal(1))):
            batch = tools.join([structure])
            batch = replace(
                batch,
                positions=batch.positions.float(),
                edge_shift=batch.edge_shift.float(),
                energy=batch.energy.float(),
            )
            energies.append(float(model(batch).energy.detach()))
        assert energies[1] == pytest.approx(energies[0], rel=1e-5, abs=1e-5)


@named(OURS)
def test_training_mode_predicts_the_same(model: Any, tools: Any) -> None:
    scenes = list(tools.scenes().values())
    energy, forces = evaluate(model, tools, *scenes)
    prediction = model.train()(tools.join(scenes))
    assert_close(prediction.energy.detach().numpy(), energy)
    assert_close(prediction.forces.detach().numpy(), forces)
    assert prediction.forces.requires_grad


@named(OURS)
@pytest.mark.parametrize("pbc", [False, True])
def test_an_isolated_atom(model: Any, tools: Any, pbc: bool) -> None:
    cell = {"cell_angstrom": 20.0 * np.eye(3), "pbc": (True, True, True)} if pbc else {}
    atom = tools.structure([6], [[1.0, 2.0, 3.0]], **cell)
    energy, forces = evaluate(model, tools, atom)
    assert np.isfinite(energy).all()
    assert np.isfinite(forces).all()
    if "equivariant_forces" in model.properties:
        assert not forces.any()
    prediction = model.train()(tools.join([atom]))
    (prediction.energy.sum() + prediction.forces.sum()).backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_isolated_atoms_only(tools: Any, family: str) -> None:
    energy, _ = evaluate(tools.model(family=family, mean_neighbors=0.0), tools, tools.scenes()["molecule"])
    assert np.isfinite(energy).all()


@named(KINDS[:-1])
@pytest.mark.parametrize("n_layers", [1, 2])
def test_every_parameter_takes_part_in_every_step(kind: tuple[str, str, str], tools: Any, n_layers: int) -> None:
    """Else DistributedDataParallel would refuse the second step; source b is absent here."""
    family, heads, forces = kind
    model = tools.model(family=family, energy_heads=heads, forces=forces, n_layers=n_layers).train()
    prediction = model(tools.join([tools.scenes()["molecule"]]))
    (prediction.energy.sum() + prediction.forces.square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("forces", FORCES)
@pytest.mark.parametrize("heads", HEADS)
def test_sources_have_energies_of_their_own_unless_all_share_one(tools: Any, heads: str, forces: str) -> None:
    model = tools.model(energy_heads=heads, forces=forces)
    scene = tools.scenes()["molecule"]
    energy, forces_of = evaluate(model, tools, scene, replace(scene, source="b"))
    first, second = forces_of[: len(scene.numbers)], forces_of[len(scene.numbers) :]
    if heads == "shared":
        assert energy[0] == energy[1]
        np.testing.assert_array_equal(first, second)
    else:
        assert abs(energy[0] - energy[1]) > 1e-3


def test_both_heads_are_the_sum_of_the_two(tools: Any) -> None:
    scenes = list(tools.scenes().values())
    both = tools.model(energy_heads="both")
    one, other = tools.model(energy_heads="per_source"), tools.model(energy_heads="shared")
    for model in (one, other):
        model.encoder.load_state_dict(both.encoder.state_dict())
    one.energy_heads.load_state_dict(both.energy_heads.state_dict())
    other.energy_heads.load_state_dict(both.shared_head.state_dict())
    for total, a, b in zip(*(evaluate(m, tools, *scenes) for m in (both, one, other)), strict=True):
        assert_close(total, a + b)
