"""Losses and error sums against closed forms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from wattier_gnn.batch import Prediction
from wattier_gnn.loss import LossKind, error_sums, loss_terms, metrics_by_source, weighted_loss
from wattier_gnn.store import Store


def test_errors_are_summed_by_source_in_closed_form(emt_store: Store) -> None:
    batch = emt_store.batch(np.array([0, 1, 25]))
    prediction = Prediction(batch.energy + torch.tensor([1.0, -3.0, 0.5]), batch.forces + 0.25)
    sums = error_sums(prediction, batch, 3)
    metrics = metrics_by_source(sums, emt_store.sources)
    assert set(metrics) == {"cluster", "crystal"}
    expected = {
        "energy_mae_ev": 2.0, "energy_mae_ev_per_atom": 0.5, "force_mae_ev_per_angstrom": 0.25,
        "energy_rmse_ev_per_atom": math.sqrt((0.25**2 + 0.75**2) / 2), "force_rmse_ev_per_angstrom": 0.25,
    }  # fmt: skip
    assert metrics["cluster"] == pytest.approx(expected, rel=1e-5)
    assert metrics["crystal"]["energy_mae_ev"] == pytest.approx(0.5, rel=1e-5)
    loss = weighted_loss(metrics, {"cluster": 1.0, "crystal": 2.0}, 1.0, 10.0)
    assert loss == pytest.approx(((0.5 + 2.5) / 1 + (0.125 + 2.5) / 2) / 2, rel=1e-5)
    energy, force = loss_terms(prediction, batch, torch.tensor([1.0, 2.0, 1.0]), 1.0, 10.0)
    assert float(energy) == pytest.approx(0.25 + 0.75 + 0.125 / 2, rel=1e-5)
    assert float(force) == pytest.approx(10 * (8 * 0.25 + 4 * 0.25 / 2), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "penalty"),
    [
        ("mae", abs),
        ("mse", lambda x: x**2),
        ("huber", lambda x: x**2 / 2 if abs(x) <= 0.3 else 0.3 * (abs(x) - 0.15)),
    ],
)
def test_losses_in_closed_form(emt_store: Store, kind: LossKind, penalty: Callable[[float], float]) -> None:
    """Two clusters and a crystal of four atoms each; the scale of crystals is 2."""
    batch = emt_store.batch(np.array([0, 1, 25]))
    shift = torch.tensor([[0.25, -1.0, 0.5]])
    prediction = Prediction(batch.energy + torch.tensor([1.0, -3.0, 0.5]), batch.forces + shift)
    energy, force = loss_terms(prediction, batch, torch.tensor([1.0, 2.0, 1.0]), 2.0, 10.0, kind, 0.3)
    assert float(energy) == pytest.approx(2 * (penalty(0.25) + penalty(0.75) + penalty(0.0625)), rel=1e-4)
    atom = [sum(penalty(x / scale) for x in (0.25, -1.0, 0.5)) / 3 for scale in (1, 2)]
    assert float(force) == pytest.approx(10 * (8 * atom[0] + 4 * atom[1]), rel=1e-4)


def test_forces_that_are_unknown_do_not_count(emt_store: Store) -> None:
    batch = emt_store.batch(np.array([0, 1]))
    batch = dataclasses.replace(batch, force_mask=torch.zeros_like(batch.force_mask))
    prediction = Prediction(batch.energy, batch.forces + 7.0)
    assert float(loss_terms(prediction, batch, torch.ones(3), 1.0, 1.0)[1]) == 0.0
    metrics = metrics_by_source(error_sums(prediction, batch, 3), emt_store.sources)
    assert math.isnan(metrics["cluster"]["force_mae_ev_per_angstrom"])
    assert weighted_loss(metrics, {"cluster": 1.0}, 1.0, 1.0) == 0.0
