"""The head that says by how much the energy will err: it learns that, and leaves all else as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wattier_gnn.batch import Prediction
from wattier_gnn.ensemble import Ensemble, MemberNumbers, ensemble_blocks, ensemble_parts, what_is_said
from wattier_gnn.loss import deviation_loss, loss_terms
from wattier_gnn.model import FoundationModel, ModelConfig, build_model
from wattier_gnn.splits import TRAIN, VAL
from wattier_gnn.store import Store
from wattier_gnn.structure import DataError
from wattier_gnn.train import TrainConfig, Trainer


def test_a_checkpoint_of_before_has_no_such_head(tools: Any) -> None:
    old = tools.model().config.to_dict()
    del old["energy_variance"]
    model = FoundationModel(ModelConfig.from_dict(old))
    assert model.deviation_head is None


@pytest.mark.parametrize("forces", ["conservative", "vector"])
@pytest.mark.parametrize("heads", ["per_source", "shared", "both"])
def test_deviations_are_positive_and_extensive_and_turn_with_nothing(tools: Any, forces: str, heads: str) -> None:
    model = tools.model(forces=forces, energy_heads=heads, energy_variance=True)
    scenes = tools.scenes()
    crystal = scenes["skew"]
    twice = replace(
        crystal,
        numbers=np.tile(crystal.numbers, 2),
        positions_angstrom=np.vstack(
            [crystal.positions_angstrom, crystal.positions_angstrom + crystal.cell_angstrom[0]]
        ),
        cell_angstrom=crystal.cell_angstrom * np.array([[2.0], [1.0], [1.0]]),
    )
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turned = replace(
        crystal, positions_angstrom=crystal.positions_angstrom @ turn, cell_angstrom=crystal.cell_angstrom @ turn
    )
    found = model(tools.join([crystal, twice, turned, scenes["molecule"]])).energy_std
    assert found is not None
    assert (found > 0).all()
    assert found[1].item() == pytest.approx(2 * found[0].item(), rel=1e-9)
    assert found[2].item() == pytest.approx(found[0].item(), rel=1e-9)
    assert found[3].item() == pytest.approx(model(tools.join([scenes["molecule"]])).energy_std[0].item(), rel=1e-9)


@pytest.mark.parametrize("forces", ["conservative", "vector"])
def test_a_training_with_it_is_bit_for_bit_the_training_without(emt_store: Store, tmp_path: Path, forces: Any) -> None:
    found: dict[bool, tuple[dict[str, Any], float]] = {}
    for with_head in (False, True):
        config = ModelConfig(
            emt_store.sources, tuple(emt_store.meta["energy_scale_ev"]), emt_store.meta["mean_neighbors"],
            emt_store.meta["cutoff_angstrom"], hidden_dim=8, n_layers=2, n_radial=4, head_dim=8, forces=forces,
            energy_variance=with_head,
        )  # fmt: skip
        trainer = Trainer(
            build_model(config, seed=0), emt_store,
            TrainConfig(epochs=3, batch_structures=8, learning_rate=3e-3, gradient_clip_norm=1e9),
            train_indices=emt_store.indices(TRAIN), val_indices=emt_store.indices(VAL),
            folder=tmp_path / str(with_head), device=torch.device("cpu"),
        )  # fmt: skip
        state = trainer.run(lambda _: True)
        found[with_head] = (trainer.evaluated().state_dict(), state.best_val_loss)
    (without, loss), (with_it, same_loss) = found[False], found[True]
    assert same_loss == loss
    assert all(torch.equal(with_it[name], value) for name, value in without.items())
    new = set(with_it) - set(without)
    assert new
    assert all(name.startswith("deviation_head.") for name in new)
    start = build_model(config, seed=0).state_dict()
    assert not torch.equal(with_it["deviation_head.out"], start["deviation_head.out"]), "it learns"


@pytest.mark.parametrize("true_std", [0.02, 0.5])
def test_the_loss_pulls_towards_the_deviation_that_errors_have(true_std: float) -> None:
    errors = true_std * torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = errors.square().mean().sqrt().item()

    def pull(std: float) -> float:
        log_std = torch.tensor(std, dtype=torch.float64).log().requires_grad_()
        deviation_loss(errors, log_std.exp().expand(len(errors))).mean().backward()
        assert log_std.grad is not None
        return log_std.grad.item() / std

    assert pull(found) == pytest.approx(0, abs=1e-9)
    assert pull(0.5 * found) == pytest.approx(1 - 4)  # 1 - mean (error / std)^2
    assert pull(2 * found) == pytest.approx(1 - 1 / 4)


def test_an_absurd_error_has_a_gradient_of_its_size_and_teaches_the_energy_nothing() -> None:
    error = torch.tensor([1e3], requires_grad=True)
    std = torch.tensor([1e-2], requires_grad=True)
    deviation_loss(error, std).sum().backward()
    assert error.grad is None
    assert std.grad is not None
    plain = torch.tensor([1e-2], requires_grad=True)
    (plain.log() + 0.5 * (error.detach() / plain).square()).sum().backward()
    assert plain.grad is not None
    assert std.grad.item() == pytest.approx(plain.grad.item() * 1e-2, rel=1e-5)
    nothing = torch.zeros(1, requires_grad=True)
    deviation_loss(torch.zeros(1), nothing).sum().backward()
    assert torch.isfinite(nothing.grad).all()


def test_it_counts_in_the_energy_part_of_the_loss_by_atoms_and_scale(tools: Any) -> None:
    batch = tools.join([tools.scenes()["molecule"], tools.scenes()["skew"]])
    scale = torch.tensor([1.0, 2.0], dtype=torch.float64)
    energy = batch.energy + torch.tensor([3.0, -4.0], dtype=torch.float64)
    std = torch.tensor([1.6, 5.0], dtype=torch.float64)
    bare, _ = loss_terms(Prediction(energy, batch.forces), batch, scale, 2.0, 1.0)
    told, _ = loss_terms(Prediction(energy, batch.forces, energy_std=std), batch, scale, 2.0, 1.0)
    r, s = np.array([3 / 8, -4 / 5 / 2]), np.array([1.6 / 8, 5 / 5 / 2])
    assert (told - bare).item() == pytest.approx(2 * np.sum(s * (np.log(s) + 0.5 * (r / s) ** 2)))


def test_a_mixture_has_the_mean_variance_and_the_variance_of_means() -> None:
    """Of equal normal parts, by the moments of a large sample of each part."""
    rng = np.random.default_rng(0)
    means, stds = np.array([[1.0], [2.0], [4.0]]), np.array([[0.5], [1.0], [2.0]])
    nothing = np.zeros((3, 1, 3))
    said = MemberNumbers(means, nothing, np.array([1]), np.array([0]), stds)
    energy, _ = what_is_said(said, np.full(3, 1 / 3))
    sample = means + stds * rng.normal(size=(3, 400_000))
    total = energy.aleatoric[0] ** 2 + energy.spread[0] ** 2 * 2 / 3  # unbiased, by M - 1, against moments, by M
    assert total == pytest.approx(sample.var(), rel=0.01)


def ensemble_of(tools: Any, **changes: Any) -> Ensemble:
    references = np.zeros((2, 119))
    references[:, [1, 6, 7, 8]] = -1.0
    models = tuple(tools.model(energy_variance=v, **changes).float() for v in (True, True))
    with torch.no_grad():
        for weight in models[1].parameters():
            weight.add_(0.05)
    return Ensemble(models, references)


def test_a_prediction_tells_what_members_disagree_on_from_what_they_expect(tools: Any) -> None:
    ensemble = ensemble_of(tools)
    molecule = tools.scenes()["molecule"]
    found = ensemble.predict([molecule, molecule], "a")
    np.testing.assert_allclose(
        found.energy_std_ev**2, found.energy_epistemic_std_ev**2 + found.energy_aleatoric_std_ev**2
    )
    np.testing.assert_allclose(found.energy_epistemic_std_ev, found.member_energies_ev.std(axis=0, ddof=1))
    assert (found.energy_aleatoric_std_ev > 0).all()
    assert found.coverage is None
    assert np.isnan(found.energy_interval_ev).all()
    assert found.out_of_distribution is None


def test_members_without_the_head_leave_it_unknown(tools: Any) -> None:
    ensemble = ensemble_of(tools)
    with_it, other = ensemble.members
    without = tools.model().float()
    without.load_state_dict({k: v for k, v in other.state_dict().items() if not k.startswith("deviation_head.")})
    mixed = replace(ensemble, members=(with_it, without))
    found = mixed.predict([tools.scenes()["molecule"]], "a")
    assert np.isnan(found.energy_aleatoric_std_ev).all()
    np.testing.assert_allclose(found.energy_std_ev, found.member_energies_ev.std(axis=0, ddof=1))


def test_weights_of_members_make_the_mean_and_a_release_keeps_them(tools: Any) -> None:
    ensemble = replace(ensemble_of(tools), weights=(0.25, 0.75))
    found = ensemble.predict([tools.scenes()["molecule"]], "a")
    first, second = found.member_energies_ev[:, 0]
    assert found.energy_ev[0] == pytest.approx(0.25 * first + 0.75 * second)
    one, other = found.member_forces_ev_per_angstrom
    np.testing.assert_allclose(found.forces_ev_per_angstrom, 0.25 * one + 0.75 * other)
    again = Ensemble(ensemble.members, ensemble.references_ev, **ensemble_parts(ensemble_blocks(ensemble), 2, 2))
    assert again.weights == ensemble.weights


@pytest.mark.parametrize(
    "weights",
    ["ab", [0.5], [0.5, 0.6], [1.5, -0.5], [0.5, None], [[0.5, 0.5]], {"a": 1}, [float("nan"), 1.0], [1.0, "x"]],
)
def test_weights_that_are_none_are_refused(weights: Any) -> None:
    with pytest.raises(DataError, match="weights are"):
        ensemble_parts({"weights": weights}, 2, 2)


@pytest.mark.parametrize("blocks", [[], "x", 3])
def test_blocks_that_are_none_are_refused(blocks: Any) -> None:
    assert ensemble_parts({}, 2, 2) == {"weights": None, "calibration": None, "domain": None}
    with pytest.raises(DataError, match="uncertainty is a"):
        ensemble_parts(blocks, 2, 2)
