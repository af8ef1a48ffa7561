"""What trials cost, from what they cost so far: a sum of physical terms times what hyper-parameters do besides.

    log y = log sum_k F_k exp(m_k)  +  g(z)  +  noise

F_k are the terms (products, memory traffic, operators, ...) in the unit of y as a guess has them, m_k how wrong the
guess is, g a Gaussian process over encoded hyper-parameters and fidelity. Coefficients exp(m_k) are positive, so the
sum grows with each term. The sum is linearised at its best m (Gauss-Newton), which makes all of it one Gaussian
process: its covariance is J P J' + K + N, its leave-one-out residuals have a closed form (Rasmussen and Williams 2006,
5.4.2), and a new place's variance holds what is not known of the coefficients. Outliers are given more noise
(Student's t, by reweighting).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.special import stdtrit

Array = NDArray[np.float64]

FREEDOM = 4.0  # of the Student t that errors are taken to have: some trials were tried again, or throttled
GAUSS_NEWTON_STEPS = 25
REWEIGHTINGS = 4
LARGEST_STEP = 1.5
# What is tried of each scale of g and of the noise, as deviations of log y, and what is thought of it beforehand.
GRID = {
    "linear": (0.0, 0.03, 0.1, 0.3, 1.0, 3.0),
    "smooth": (0.0, 0.02, 0.05, 0.15, 0.5, 1.5),
    "length": (0.35, 0.8, 2.0),
    "noise": (0.003, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6),
}
NOISE_GUESS, NOISE_GUESS_SPREAD = 0.12, 1.5
SCALE_PENALTY = 0.25  # of log evidence, for each step of a scale above 0: a simpler g where data do not ask
ROUNDS = 3
ROWS_FOR_SCALES = 64
ONE_DEVIATION = 0.8413  # of a normal distribution lies below
FIRST_NOISE, JITTER = 0.2, 1e-10
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

    def __init__(self, rows: Rows, log_y: Array, common_deviation: float, own_deviation: Array) -> None:
        """common_deviation: of the logarithm of a factor that all terms have in common; own_deviation [K]: of each."""
        k = rows.terms.shape[1]
        self._prior = np.diag(own_deviation**2) + common_deviation**2 * np.ones((k, k))
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
            mean = mean + self._covariance(places, self._rows) @ self._alpha
        return mean

    def log_deviation(self, places: Rows) -> Array:
        """Deviation of log y of a new trial around `log_mean` [m], its own noise included."""
        slopes = _slopes(places.terms, self.log_coefficients)
        own = np.einsum("mk,kl,ml->m", slopes, self._prior, slopes)
        if not len(self._log_y):
            return np.asarray(np.sqrt(own))
        own = own + self._own_variance(places)
        cross = self._covariance(places, self._rows) + slopes @ self._prior @ self._slopes.T
        explained = np.einsum("mn,nm->m", cross, cho_solve(self._factor, cross.T))
        variance = np.maximum(own - explained, 0.0) + self.scales.noise**2
        return np.asarray(self.calibration * np.sqrt(variance))

    def _fit(self) -> None:
        self._coefficients_alone()
        for _ in range(REWEIGHTINGS):
            self.scales = self._best_scales()
            self._coefficients(self._covariance(self._rows, self._rows) + np.diag(self._noise()))
            errors = self._conditioned()
            weights = _weights_of(errors)
            if np.allclose(weights, self._weights, atol=0.02):
                break
            self._weights = weights
        n = len(errors)
        seen = float(np.quantile(np.abs(errors), 2 * ONE_DEVIATION - 1))
        # A deviation found on few trials is uncertain itself: Student's quantile in the place of the normal one, with
        # half of the trials for the scales that were found on them.
        student = float(stdtrit(max(1.0, n / 2), ONE_DEVIATION))
        self.calibration = student * (CALIBRATION_PRIOR + n * seen) / (CALIBRATION_PRIOR + n)

    def _coefficients_alone(self) -> None:
        """A first fit without g: what is far from most is given little weight."""
        for _ in range(REWEIGHTINGS):
            self._coefficients(np.diag(FIRST_NOISE**2 / self._weights))
            residual = self._log_y - _log_sum(self._rows.terms, self.log_coefficients)
            spread = max(1.4826 * float(np.median(np.abs(residual - np.median(residual)))), 0.02)
            self._weights = _weights_of(residual / spread)

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

    def _conditioned(self) -> Array:
        """Condition on the observations; returns leave-one-out errors [n] in units of the deviation stated for them."""
        self._slopes = _slopes(self._rows.terms, self.log_coefficients)
        total = self._covariance(self._rows, self._rows) + self._slopes @ self._prior @ self._slopes.T
        self._factor = cho_factor(total + np.diag(self._noise()), lower=True)
        self._alpha = cho_solve(self._factor, self._linearised())
        precision = np.diag(cho_solve(self._factor, np.eye(len(self._log_y))))
        stated = 1 / precision - self._noise() + self.scales.noise**2  # an outlier's own noise is not stated
        return np.asarray(self._alpha / precision / np.sqrt(stated))

    def _linearised(self) -> Array:
        """What the guess, corrected by nothing, would leave over if the sum were linear in m [n]."""
        residual = self._log_y - _log_sum(self._rows.terms, self.log_coefficients)
        return np.asarray(residual + self._slopes @ self.log_coefficients)

    def _best_scales(self) -> Scales:
        """The scales of the highest evidence, one after the other, on some of the rows."""
        self._slopes = _slopes(self._rows.terms, self.log_coefficients)
        evidence = self._evidence_on(slice(0, ROWS_FOR_SCALES))
        best = self.scales
        highest = evidence(best)
        for _ in range(ROUNDS):
            before = best
            for name, values in GRID.items():
                for tried in (best._replace(**{name: value}) for value in values):
                    if tried != best and (found := evidence(tried)) > highest + 1e-9:
                        best, highest = tried, found
            if best == before:
                break
        return best

    def _evidence_on(self, some: slice) -> Callable[[Scales], float]:
        """What gives the logarithm of the marginal likelihood of some rows, with what is thought of the scales."""
        residual, slopes, weights = self._linearised()[some], self._slopes[some], self._weights[some]
        rows = Rows(*(part[some] for part in self._rows))
        product, squares = _geometry(rows.inputs, rows.inputs)
        fixed = slopes @ self._prior @ slopes.T + self._of_fidelity(rows, rows)
        smooth = {length: np.exp(-squares / (2 * length**2)) for length in GRID["length"]}

        def evidence(scales: Scales) -> float:
            total = fixed + scales.linear**2 * product + scales.smooth**2 * smooth[scales.length]
            total.flat[:: len(total) + 1] += scales.noise**2 / weights + JITTER
            factor = np.linalg.cholesky(total)
            white = solve_triangular(factor, residual, lower=True, check_finite=False)
            beforehand = 0.5 * (math.log(scales.noise / NOISE_GUESS) / NOISE_GUESS_SPREAD) ** 2 + SCALE_PENALTY * (
                GRID["linear"].index(scales.linear) + GRID["smooth"].index(scales.smooth)
            )
            return float(-0.5 * white @ white - np.log(factor.diagonal()).sum() - beforehand)

        return evidence

    def _noise(self) -> Array:
        return np.asarray(self.scales.noise**2 / self._weights + JITTER)

    def _covariance(self, left: Rows, right: Rows) -> Array:
        """K: of g and of what a change of fidelity may bring, between places [m, n]."""
        scales, (product, squares) = self.scales, _geometry(left.inputs, right.inputs)
        g = scales.linear**2 * product + scales.smooth**2 * np.exp(-squares / (2 * scales.length**2))
        return np.asarray(g + self._of_fidelity(left, right))

    def _of_fidelity(self, left: Rows, right: Rows) -> Array:
        return np.asarray(self._distance(left) @ self._distance(right).T)

    def _distance(self, rows: Rows) -> Array:
        """From the middle of what was seen, in deviations of log y [n, 2]."""
        return np.asarray((rows.fidelity - self._centre) * (AMOUNT_DEVIATION, RANKS_DEVIATION))

    def _own_variance(self, places: Rows) -> Array:
        """The diagonal of K between places and themselves [m]."""
        inputs = places.inputs - 0.5
        g = self.scales.linear**2 * (inputs**2).sum(axis=1) + self.scales.smooth**2
        return np.asarray(g + (self._distance(places) ** 2).sum(axis=1))


def _geometry(left: Array, right: Array) -> tuple[Array, Array]:
    """Inner products around the middle of the range, and squared distances [m, n]."""
    a, b = left - 0.5, right - 0.5
    product = a @ b.T
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None, :] - 2 * product
    return product, np.maximum(squares, 0.0)


def _weights_of(errors: Array) -> Array:
    """Weights of a Student t (Lange, Little and Taylor 1989), given errors in units of their deviation; at most 1."""
    return np.asarray(np.minimum(1.0, (FREEDOM + 1) / (FREEDOM + errors**2)))


def _log_sum(terms: Array, m: Array) -> Array:
    return np.asarray(np.log(np.maximum(terms @ np.exp(m), 1e-300)))


def _slopes(terms: Array, m: Array) -> Array:
    """Derivatives of the logarithm of the sum by m_k: each term's share of it [n, K]."""
    parts: Any = terms * np.exp(m)
    return np.asarray(parts / np.maximum(parts.sum(axis=1, keepdims=True), 1e-300))
