"""A Gaussian process over hyper-parameters and fidelity, fitted by its marginal likelihood."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize

Array = NDArray[np.float64]
SQRT5 = math.sqrt(5.0)
JITTER = 1e-6


class Kernel(NamedTuple):
    """Logarithms of the kernel's parameters; outputs have unit variance, inputs lie in [0, 1].

    k((x, z), (x', z')) = m(x, x') (signal + slope z z' + drift min(z, z')) + 1 + trend z z' + noise [same observation]

    m is Matern 5/2 with a length scale for each hyper-parameter, plus `additive` times the mean of one-dimensional
    ones: a sum of functions of one hyper-parameter each needs few trials. z is 0 at full fidelity and 1 at the
    lowest. `signal` is what configurations are worth at full fidelity, `slope` a bias of their own that grows along z
    (a curve's slope), `drift` one that forgets (an auto-regressive chain of fidelities, Kennedy and O'Hagan 2000,
    https://doi.org/10.1093/biomet/87.1.1), `trend` what all configurations gain by training on.
    """

    log_lengths: Array
    log_additive: float
    log_signal: float
    log_slope: float
    log_drift: float
    log_trend: float
    log_noise: float

    @classmethod
    def from_vector(cls, vector: Array) -> Kernel:
        """Inverse of `to_vector`."""
        return cls(vector[:-6], *(float(value) for value in vector[-6:]))

    def to_vector(self) -> Array:
        """[number of hyper-parameters + 6], for the optimiser."""
        return np.append(self.log_lengths, self[1:])


def prior_mean(n_parameters: int) -> Kernel:
    """Where the fit starts and is drawn to: smoother in many dimensions, as distances grow with their root.

    (Hvarfner et al. 2024, https://arxiv.org/abs/2402.02229.)
    """
    lengths = np.full(n_parameters, math.log(0.6 * math.sqrt(n_parameters)))
    return Kernel(lengths, 0.0, 0.0, math.log(0.1), math.log(0.05), math.log(0.5), math.log(0.003))


PRIOR_SD_LENGTH = 0.9
PRIOR_SD_VARIANCE = (1.5, 0.8, 1.5, 1.5, 1.5, 1.5)


def squared_differences(a: Array, b: Array, groups: NDArray[np.int64]) -> Array:
    """Squared distances by hyper-parameter.

    Args:
        a: [n, columns] encoded configurations.
        b: [m, columns].
        groups: [columns], the hyper-parameter each column belongs to (a categorical one has several).

    Returns:
        [hyper-parameters, n, m].
    """
    by_parameter = np.zeros((int(groups.max()) + 1, len(a), len(b)))
    for column, group in enumerate(groups):
        by_parameter[group] += (a[:, column, None] - b[None, :, column]) ** 2
    return by_parameter


def matern(r: Array) -> Array:
    """Matern 5/2 of scaled distances."""
    scaled = SQRT5 * r
    return np.asarray((1 + scaled * (1 + scaled / 3)) * np.exp(-scaled))


class GaussianProcess:
    """The posterior given observations; `fit` finds the kernel, `condition` keeps one that is known.

    Args:
        x: [n, columns] encoded configurations in [0, 1].
        z: [n] distance from full fidelity, 0 to 1.
        y: [n] observed values, finite.
        groups: [columns], the hyper-parameter of each column.
        kernel: parameters of the kernel.
    """

    def __init__(self, x: Array, z: Array, y: Array, groups: NDArray[np.int64], kernel: Kernel) -> None:
        self.x, self.z, self.groups, self.kernel = x, z, groups, kernel
        self.centre = float(np.mean(y))
        self.scale = float(np.std(y)) or 1.0
        self.targets = (y - self.centre) / self.scale
        covariance = _covariance(kernel, squared_differences(x, x, groups), z, z)
        self.factor = _factor(covariance, math.exp(kernel.log_noise))
        self.weights = cho_solve(self.factor, self.targets)

    @classmethod
    def fit(cls, x: Array, z: Array, y: Array, groups: NDArray[np.int64]) -> tuple[GaussianProcess, float]:
        """The posterior under the kernel of highest posterior density (marginal likelihood times the prior).

        Returns:
            The process, and the log of that density for y in its own units, up to a constant: it tells which of
            several scales of y fits better.
        """
        kernel = prior_mean(int(groups.max()) + 1)
        scale = float(np.std(y)) or 1.0
        objective = _Objective(squared_differences(x, x, groups), z, (y - np.mean(y)) / scale)
        begin = kernel.to_vector()
        bounds = [(value - 4.5, value + 4.5) for value in prior_mean(int(groups.max()) + 1).to_vector()]
        begin = np.clip(begin, *np.transpose(bounds))
        found = minimize(
            objective, begin, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 40, "maxfun": 60}
        )
        best = found.x if np.isfinite(found.fun) else begin
        evidence = -float(found.fun) - len(y) * math.log(scale) if np.isfinite(found.fun) else -math.inf
        return cls(x, z, y, groups, Kernel.from_vector(np.asarray(best))), evidence

    def predict(self, x: Array, z: Array | None = None) -> tuple[Array, Array]:
        """Mean and standard deviation of the value, without noise, at [m, columns] and z [m] (None = full fidelity)."""
        at = np.zeros(len(x)) if z is None else z
        cross = _covariance(self.kernel, squared_differences(x, self.x, self.groups), at, self.z)
        mean = cross @ self.weights
        half = solve_triangular(self.factor[0], cross.T, lower=True, check_finite=False)
        variance = _diagonal(self.kernel, at) - np.einsum("ij,ij->j", half, half)
        return self.centre + self.scale * mean, self.scale * np.sqrt(np.maximum(variance, 1e-10))


def _covariance(kernel: Kernel, differences: Array, z: Array, other: Array) -> Array:
    squared, apart = np.zeros(differences.shape[1:]), np.zeros(differences.shape[1:])
    for weight, difference in zip(np.exp(-2 * kernel.log_lengths), differences, strict=True):  # what the cache holds
        own = weight * difference
        squared += own
        apart += matern(np.sqrt(own))
    similarity = matern(np.sqrt(squared)) + math.exp(kernel.log_additive) / len(differences) * apart
    product, shared = np.outer(z, other), np.minimum.outer(z, other)
    by_fidelity = (
        math.exp(kernel.log_signal) + math.exp(kernel.log_slope) * product + math.exp(kernel.log_drift) * shared
    )
    return np.asarray(similarity * by_fidelity + 1.0 + math.exp(kernel.log_trend) * product)


def _diagonal(kernel: Kernel, z: Array) -> Array:
    own = math.exp(kernel.log_signal) + math.exp(kernel.log_slope) * z * z + math.exp(kernel.log_drift) * z
    return np.asarray((1.0 + math.exp(kernel.log_additive)) * own + 1.0 + math.exp(kernel.log_trend) * z * z)


def _factor(covariance: Array, noise: float) -> tuple[Array, bool]:
    """Cholesky factor; observations at one place need some jitter, more of it only where rounding demands it."""
    jitter = JITTER
    while True:
        try:
            factor = cho_factor(covariance + (noise + jitter) * np.eye(len(covariance)), lower=True, check_finite=False)
            return np.asarray(factor[0]), True
        except LinAlgError:
            jitter *= 10


class _Objective:
    """Minus the log posterior density of the kernel's parameters, and its gradient."""

    def __init__(self, differences: Array, z: Array, targets: Array) -> None:
        self.differences, self.targets = differences, targets
        self.product, self.shared = np.outer(z, z), np.minimum.outer(z, z)
        self.prior = prior_mean(len(differences)).to_vector()
        self.precision = np.append(np.full(len(differences), PRIOR_SD_LENGTH), PRIOR_SD_VARIANCE) ** -2.0

    def __call__(self, vector: Array) -> tuple[float, Array]:
        scaled = np.exp(-2 * vector[:-6])[:, None, None] * self.differences  # squared
        r, each = SQRT5 * np.sqrt(scaled.sum(axis=0)), SQRT5 * np.sqrt(scaled)
        decay, decays = np.exp(-r), np.exp(-each)
        additive, signal, slope, drift, trend, noise = np.exp(vector[-6:])
        apart = ((1 + each + each * each / 3) * decays).mean(axis=0)
        similarity = (1 + r + r * r / 3) * decay + additive * apart
        by_fidelity = signal + slope * self.product + drift * self.shared
        n = len(self.targets)
        try:
            covariance = similarity * by_fidelity + 1.0 + trend * self.product
            factor = cho_factor(covariance + (noise + JITTER) * np.eye(n), lower=True, check_finite=False)
        except LinAlgError:
            return math.inf, np.zeros_like(vector)
        inverse = cho_solve(factor, np.eye(n), check_finite=False)
        alpha = inverse @ self.targets
        from_prior = (vector - self.prior) * self.precision
        value = 0.5 * self.targets @ alpha + np.log(np.diag(factor[0])).sum() + 0.5 * (vector - self.prior) @ from_prior
        outer = 0.5 * (inverse - np.outer(alpha, alpha))  # d value / d covariance
        # dm / d log l = 5/3 (1 + sqrt5 r) exp(-sqrt5 r) (d / l)^2, in one dimension as in many
        by_similarity = outer * by_fidelity
        together = by_similarity * (5 / 3 * (1 + r) * decay)
        singly = by_similarity * (additive * 5 / 3 / len(scaled)) * (1 + each) * decays
        lengths = ((together + singly) * scaled).sum(axis=(1, 2))
        weighted = outer * similarity
        variances = (
            additive * np.vdot(by_similarity, apart),
            signal * weighted.sum(),
            slope * np.vdot(weighted, self.product),
            drift * np.vdot(weighted, self.shared),
            trend * np.vdot(outer, self.product),
            noise * np.trace(outer),
        )
        return float(value), np.append(lengths, variances) + from_prior
