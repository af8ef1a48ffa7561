"""The Gaussian process against scikit-learn's and against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import approx_fprime
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from wattier.surrogate import JITTER, GaussianProcess, Kernel, _Objective, prior_mean, squared_differences

GROUPS = np.arange(3)


def data(n: int = 30) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(1).random((n, 3))
    return x, np.sin(4 * x[:, 0]) + x[:, 1] ** 2 + 5


def test_at_one_fidelity_it_is_scikit_learns() -> None:
    x, y = data()
    lengths = np.array([0.3, 0.7, 1.5])
    kernel = Kernel(np.log(lengths), -60.0, math.log(1.3), 0.0, 0.0, 0.0, math.log(0.01))
    new = np.random.default_rng(2).random((20, 3))
    mean, sd = GaussianProcess(x, np.zeros(len(x)), y, GROUPS, kernel).predict(new)
    theirs = GaussianProcessRegressor(
        1.3 * Matern(lengths, nu=2.5) + ConstantKernel(1.0), alpha=0.01 + JITTER, optimizer=None
    ).fit(x, (y - y.mean()) / y.std())
    their_mean, their_sd = theirs.predict(new, return_std=True)
    np.testing.assert_allclose(mean, y.mean() + y.std() * their_mean, rtol=1e-6)
    np.testing.assert_allclose(sd, y.std() * their_sd, rtol=1e-5)
    assert WhiteKernel  # noise is `alpha` here: predictions are of the value without noise, in both


def test_the_gradient_is_that_of_the_density() -> None:
    rng = np.random.default_rng(0)
    x, y = data()
    z = rng.choice([0.0, 0.5, 1.0], len(x))
    objective = _Objective(squared_differences(x, x, GROUPS), z, (y - y.mean()) / y.std())
    vector = prior_mean(3).to_vector() + 0.3 * rng.standard_normal(9)
    numeric = approx_fprime(vector, lambda at: objective(at)[0], 1e-6)
    np.testing.assert_allclose(objective(vector)[1], numeric, rtol=1e-3, atol=1e-3)


def test_cheap_fidelities_tell_of_the_full_one() -> None:
    """Where only low fidelities were seen, the prediction at full fidelity is better than without them."""
    rng = np.random.default_rng(3)
    x = rng.random((40, 1))
    truth = np.sin(6 * x[:, 0])
    z = np.where(np.arange(40) < 6, 0.0, 1.0)
    y = truth + z * (1.0 + 0.3 * x[:, 0])
    new = np.linspace(0, 1, 50)[:, None]
    errors = []
    for rows in (slice(0, 6), slice(None)):
        process, _ = GaussianProcess.fit(x[rows], z[rows], y[rows], np.zeros(1, dtype=int))
        errors.append(np.abs(process.predict(new)[0] - np.sin(6 * new[:, 0])).mean())
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("y", [np.zeros(5), np.full(5, 1e90), np.array([1.0, 1.0, 1.0, 1.0, 1e80])])
def test_what_is_degenerate_is_fitted_all_the_same(y: np.ndarray) -> None:
    process, _ = GaussianProcess.fit(np.full((5, 2), 0.3), np.zeros(5), y, np.arange(2))
    mean, sd = process.predict(np.random.default_rng(0).random((4, 2)))
    assert np.isfinite(mean).all()
    assert np.isfinite(sd).all()
