"""Fitted weights against a general solver, closed forms, and what they promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from wattier_gnn.weights import N_FOLDS, RIDGES, fit_weights, folds_of, simplex_weights


def gram_of(rng: Any, members: int, n: int = 200, shared: float = 1.0) -> Any:
    """Error products of members that err alike in part and each by an own amount."""
    errors = shared * rng.normal(size=n) + rng.uniform(0.3, 3.0, (members, 1)) * rng.normal(size=(members, n))
    return errors @ errors.T / n


@pytest.mark.parametrize("members", [2, 3, 6, 15])
@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_the_minimum_on_the_simplex_is_that_of_a_general_solver(members: int, ridge: float) -> None:
    rng = np.random.default_rng(members)
    for _ in range(5):
        gram = gram_of(rng, members)
        whole = gram + ridge * np.trace(gram) / members * np.eye(members)
        start = np.full(members, 1 / members)
        theirs = minimize(
            lambda w, g: w @ g @ w, start, args=(whole,), jac=lambda w, g: 2 * g @ w, method="SLSQP",
            bounds=[(0, 1)] * members, constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 1000},
        )  # fmt: skip
        ours = simplex_weights(gram, ridge)
        assert ours @ whole @ ours <= theirs.fun * (1 + 1e-8)
        np.testing.assert_allclose(ours, theirs.x, atol=1e-4)
        # Karush, Kuhn, Tucker: the gradient is the same of all members that count, and not less of the others.
        gradient = whole @ ours
        assert np.all(gradient >= gradient[ours > 1e-9].min() * (1 - 1e-9))
        np.testing.assert_allclose(gradient[ours > 1e-9], gradient[ours > 1e-9].mean())


def test_independent_errors_are_weighted_by_inverse_variance() -> None:
    variances = np.array([1.0, 2.0, 4.0])
    np.testing.assert_allclose(
        simplex_weights(np.diag(variances), 0.0), (1 / variances) / (1 / variances).sum(), rtol=1e-6
    )


@pytest.mark.parametrize("seed", range(20))
def test_never_worse_than_equal_on_the_errors_it_was_fitted_to(seed: int) -> None:
    rng = np.random.default_rng(seed)
    members = int(rng.integers(1, 9))
    grams = np.array([gram_of(rng, members, n=int(rng.integers(1, 12))) for _ in range(N_FOLDS)])
    found = fit_weights(grams)
    weights = np.array(found.weights)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    assert found.error_fitted <= found.error_equal * (1 + 1e-12)
    equal = np.full(members, 1 / members)
    assert found.error_equal == pytest.approx(np.sqrt(equal @ grams.sum(axis=0) @ equal))
    assert found.ridge in RIDGES


def test_a_member_that_only_disturbs_is_not_heard() -> None:
    rng = np.random.default_rng(0)
    errors = np.vstack([rng.normal(size=(3, 500)), 30 * rng.normal(size=500)])
    folds = np.arange(500) % N_FOLDS
    found = fit_weights(np.array([errors[:, folds == k] @ errors[:, folds == k].T for k in range(N_FOLDS)]) / 500)
    assert found.weights[3] < 0.02
    assert found.error_fitted < 0.2 * found.error_equal
    assert found.error_cross < 0.2 * found.error_equal


def test_where_there_is_nothing_to_learn_weights_stay_equal() -> None:
    """A dozen alike members and a handful of errors: what the best weights seem to be is chance."""
    rng, kept = np.random.default_rng(1), 0
    for _ in range(20):
        errors = rng.normal(size=(12, 15))
        found = fit_weights(np.array([errors[:, k::N_FOLDS] @ errors[:, k::N_FOLDS].T for k in range(N_FOLDS)]) / 15)
        kept += max(found.weights) < 0.25
    assert kept >= 16


@pytest.mark.parametrize("gram", [np.ones((3, 3)), np.zeros((3, 3))], ids=["alike", "without errors"])
def test_members_that_err_alike_are_weighted_alike(gram: Any) -> None:
    np.testing.assert_allclose(fit_weights(np.array([gram] * N_FOLDS)).weights, 1 / 3, atol=1e-6)


def test_folds_keep_groups_whole_and_are_always_the_same() -> None:
    groups = np.random.default_rng(2).integers(0, 30, 400) * 7
    folds = folds_of(groups)
    assert all(len(set(folds[groups == g])) == 1 for g in set(groups))
    assert set(folds) == set(range(N_FOLDS))
    np.testing.assert_array_equal(folds, folds_of(groups))
