"""What trials cost, from what they cost so far: a sum of physical terms times what hyper-parameters do besides.

    log y = log sum_k F_k exp(m_k)  +  g(z)  +  noise

F_k are the terms (products, memory traffic, operators, ...) in the unit of y as a guess has them, m_k how wrong the guess
is, g a Gaussian process over encoded hyper-parameters and fidelity. Coefficients exp(m_k) are positive, so the sum grows
with each term. The sum is linearised at its best m (Gauss-Newton), which makes all of it one Gaussian process: its
covariance is J P J' + K + N, its leave-one-out residuals have a closed form (Rasmussen and Williams 2006, 5.4.2), and
a new place's variance holds what is not known of the coefficients. Outliers are given more noise (Huber's weights).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

Array = NDArray[np.float64]

HUBER_DEVIATIONS = 2.5
GAUSS_NEWTON_STEPS = 25
REWEIGHTINGS = 3
LARGEST_STEP = 1.5
# What is tried of each scale of g and of the noise, as deviations of log y, and what is thought of it beforehand.
GRID = {
    "linear": (0.0, 0.03, 0.1, 0.3, 1.0, 3.0),
    "smooth": (0.0, 0.02, 0.05, 0.15, 0.5, 1.5),
    "length": (0.35, 0.8, 2.0),
    "noise": (0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6),
}
NOISE_GUESS, NOISE_GUESS_SPREAD = 0.08, 1.5
SCALE_PENALTY = 0.25  # of log evidence, for each step of a scale above 0: a simpler g where data do not ask
ROUNDS = 3
# Deviations of log y that a change of fidelity may bring which the terms do not know of: a factor e of the amount of
# training, a doubling of ranks.
AMOUNT_DEVIATION, RANKS_DEVIATION = 0.1, 0.3
CALIBRATION_PRIOR = 8.0  # trials that the stated deviation is worth beside those that it is held against


class Rows(NamedTuple):
    """Places: terms [n, K] >= 0, encoded hyper-parameters [n, d], and fidelity [n, 2] (log amount, log2 ranks)."""

    terms: Array
    inputs: Array
    fidelity: Array


class Scales(NamedTuple):
    """Deviations of log y: of g's linear and smooth part, over what `length`, and of the noise."""

    linear: float = 0.1
    smooth: float = 0.05
    length: float = 0.8
    noise: float = NOISE_GUESS


class CostRegression:
    """The model above, fitted once to some rows; log y [n].

    Attributes:
        log_coefficients: m_k.
        scales: what was found of g and the noise.
        calibration: by what the stated deviations are multiplied, so that leave-one-out errors have them.
    """

    def __init__(self, rows: Rows, log_y: Array, common_deviation: float, own_deviation: float) -> None:
        """common_deviation: of the logarithm of a factor that all terms have in common; own_deviation: of each."""
        k = rows.terms.shape[1]
        self._prior = own_deviation**2 * np.eye(k) + common_deviation**2 * np.ones((k, k))
        self._rows, self._log_y = rows, log_y
        self._centre = rows.fidelity.mean(axis=0) if len(log_y) else np.zeros(2)
        self.log_coefficients = np.zeros(k)
        self.scales, self.calibration = Scales(), 1.0
        self._weights = np.ones(len(log_y))
        if len(log_y):
            self._fit()

    def log_mean(self, places: Rows) -> Array:
        """log of the median of y at some places [m]."""
        mean = _log_sum(places.terms, self.log_coefficients)
        if len(self._log_y):
            mean = mean + self._covariance(places, self._rows, self.scales) @ self._alpha
        return mean

    def log_deviation(self, places: Rows) -> Array:
        """Deviation of log y of a new trial around `log_mean` [m], its own noise included."""
        slopes = _slopes(places.terms, self.log_coefficients)
        own = np.einsum("mk,kl,ml->m", slopes, self._prior, slopes) + self._own_variance(places)
        if not len(self._log_y):
            return np.asarray(np.sqrt(own))
        cross = self._covariance(places, self._rows, self.scales) + slopes @ self._prior @ self._slopes.T
        explained = np.einsum("mn,nm->m", cross, cho_solve(self._factor, cross.T))
        variance = np.maximum(own - explained, 0.0) + self.scales.noise**2
        return np.asarray(self.calibration * np.sqrt(variance))

    def _fit(self) -> None:
        self._coefficients_alone()
        for _ in range(REWEIGHTINGS):
            self.scales = self._best_scales()
            self._coefficients(self._covariance(self._rows, self._rows, self.scales) + self._noise(self.scales))
            errors = self._condition()
            weights = np.minimum(1.0, HUBER_DEVIATIONS / np.maximum(np.abs(errors), 1e-12))
            if np.allclose(weights, self._weights, atol=1e-3):
                break
            self._weights = weights
        n = len(errors)
        seen = float(np.quantile(np.abs(errors), 0.683))
        self.calibration = (CALIBRATION_PRIOR + n * seen) / (CALIBRATION_PRIOR + n)

    def _coefficients_alone(self) -> None:
        """A first fit without g: what is far from most is given little weight."""
        for _ in range(REWEIGHTINGS):
            self._coefficients(self._noise(Scales(noise=0.2)))
            residual = self._log_y - _log_sum(self._rows.terms, self.log_coefficients)
            spread = max(1.4826 * float(np.median(np.abs(residual - np.median(residual)))), 0.02)
            self._weights = np.minimum(1.0, 3.0 / np.maximum(np.abs(residual) / spread, 1e-12))

    def _coefficients(self, covariance: Array) -> None:
        """The most likely m_k, given g's and the noise's covariance [n, n]."""
        terms, prior, m = self._rows.terms, self._prior, self.log_coefficients.copy()
        factor, prior_inverse = cho_factor(covariance, lower=True), np.linalg.inv(prior)
        for _ in range(GAUSS_NEWTON_STEPS):
            slopes = _slopes(terms, m)
            weighted = cho_solve(factor, np.column_stack([slopes, self._log_y - _log_sum(terms, m)]))
            curvature = slopes.T @ weighted[:, :-1] + prior_inverse
            step = np.linalg.solve(curvature, slopes.T @ weighted[:, -1] - prior_inverse @ m)
            largest = float(np.abs(step).max())
            m += step * min(1.0, LARGEST_STEP / max(largest, 1e-12))
            if largest < 1e-7:
                break
        self.log_coefficients = m

    def _condition(self) -> Array:
        """Condition on the observations; returns leave-one-out errors in units of their deviation [n]."""
        self._slopes = _slopes(self._rows.terms, self.log_coefficients)
        residual = self._linearised()
        self._factor = cho_factor(self._total(self.scales, slice(None)), lower=True)
        self._alpha = cho_solve(self._factor, residual)
        precision = np.diag(cho_solve(self._factor, np.eye(len(residual))))
        return np.asarray(self._alpha / np.sqrt(precision))

    def _linearised(self) -> Array:
        """What the guess, corrected by nothing, would leave over if the sum were linear in m [n]."""
        residual = self._log_y - _log_sum(self._rows.terms, self.log_coefficients)
        return np.asarray(residual + self._slopes @ self.log_coefficients)

    def _best_scales(self) -> Scales:
        """The scales of the highest evidence, one after the other, on some of the rows."""
        self._slopes = _slopes(self._rows.terms, self.log_coefficients)
        some = slice(0, 96)
        best, best_evidence = self.scales, self._evidence(self.scales, some)
        for _ in range(ROUNDS):
            before = best
            for name in ("noise", "linear", "smooth", "length"):
                for value in GRID[name]:
                    tried = best._replace(**{name: value})
                    if tried != best and (evidence := self._evidence(tried, some)) > best_evidence + 1e-9:
                        best, best_evidence = tried, evidence
            if best == before:
                break
        return best

    def _evidence(self, scales: Scales, some: slice) -> float:
        """Logarithm of the marginal likelihood, with what is thought of the scales beforehand."""
        residual = self._linearised()[some]
        factor = np.linalg.cholesky(self._total(scales, some))
        white = np.linalg.solve(factor, residual)
        beforehand = -0.5 * (math.log(scales.noise / NOISE_GUESS) / NOISE_GUESS_SPREAD) ** 2
        beforehand -= SCALE_PENALTY * (GRID["linear"].index(scales.linear) if scales.linear in GRID["linear"] else 2)
        beforehand -= SCALE_PENALTY * (GRID["smooth"].index(scales.smooth) if scales.smooth in GRID["smooth"] else 2)
        return float(beforehand - 0.5 * white @ white - np.log(np.diag(factor)).sum())

    def _total(self, scales: Scales, some: slice) -> Array:
        rows = Rows(*(part[some] for part in self._rows))
        slopes = self._slopes[some]
        return self._covariance(rows, rows, scales) + slopes @ self._prior @ slopes.T + self._noise(scales)[some, some]

    def _noise(self, scales: Scales) -> Array:
        return np.diag(scales.noise**2 / self._weights + 1e-10)

    def _covariance(self, left: Rows, right: Rows, scales: Scales) -> Array:
        """K: of g between places [m, n]."""
        a, b = left.inputs - 0.5, right.inputs - 0.5
        product = a @ b.T
        squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None, :] - 2 * product
        k = scales.linear**2 * product + scales.smooth**2 * np.exp(np.minimum(-squares / (2 * scales.length**2), 0.0))
        far = np.array([AMOUNT_DEVIATION, RANKS_DEVIATION])
        return np.asarray(k + ((left.fidelity - self._centre) * far) @ ((right.fidelity - self._centre) * far).T)

    def _own_variance(self, places: Rows) -> Array:
        a, scales = places.inputs - 0.5, self.scales
        far = (places.fidelity - self._centre) * np.array([AMOUNT_DEVIATION, RANKS_DEVIATION])
        if not len(self._log_y):
            return np.zeros(len(a))
        return np.asarray(scales.linear**2 * (a**2).sum(axis=1) + scales.smooth**2 + (far**2).sum(axis=1))


def _log_sum(terms: Array, m: Array) -> Array:
    return np.asarray(np.log(np.maximum(terms @ np.exp(m), 1e-300)))


def _slopes(terms: Array, m: Array) -> Array:
    """Derivatives of the logarithm of the sum by m_k: each term's share of it [n, K]."""
    parts: Any = terms * np.exp(m)
    return np.asarray(parts / np.maximum(parts.sum(axis=1, keepdims=True), 1e-300))
