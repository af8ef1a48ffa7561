"""How well an ensemble's standard deviations tell its errors.

The calibration curve and the miscalibration area follow Kuleshov, Fenner, Ermon (ICML 2018); the negative log
likelihood and the continuous ranked probability score are those of a normal distribution (Gneiting and Raftery, JASA
102, 359 (2007), equations 5 and 21); sharpness is the root mean square deviation, as uncertainty-toolbox has it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from scipy.special import erf
from scipy.stats import binom, spearmanr

N_LEVELS = 21
SMALLEST_STD = 1e-9
ONE_STD = math.erf(1 / math.sqrt(2))  # 68.27 %: what one standard deviation covers
BAND = 0.99  # of binomial bands around a coverage


class Calibration(NamedTuple):
    """Observed against expected coverage of central intervals of a normal distribution, and what a forecast is worth.

    n: errors that were judged. nll: mean negative log likelihood. crps, sharpness: in the unit of the errors. spearman:
    rank correlation of |error| and standard deviation.
    """

    scale: float
    expected: tuple[float, ...]
    observed: tuple[float, ...]
    miscalibration_area: float
    coverage_68: float
    coverage_95: float
    n: int
    nll: float
    crps: float
    sharpness: float
    spearman: float | None


class Coverage(NamedTuple):
    """How many errors lay within intervals that were meant to cover a share `target` of them.

    n: errors; n_groups: groups that they are of, whose members err alike. band_low, band_high: within which 99 % of
    observed shares lie where every one of `n_independent` errors is covered with exactly the target's probability by
    itself. standard_error_by_group: of `observed`, if only groups are independent.
    """

    target: float
    n: int
    n_independent: int
    n_groups: int
    observed: float
    band_low: float
    band_high: float
    standard_error_by_group: float
    mean_half_width: float


def fit_scale(errors: Any, stds: Any) -> float:
    """The factor by which a central 68.27 % interval covers that share of the errors: outliers do not inflate it."""
    if not len(errors) or not np.any(stds > SMALLEST_STD):
        return 1.0
    stds = np.nan_to_num(stds)
    return float(np.quantile(np.abs(errors) / np.maximum(stds, SMALLEST_STD), ONE_STD))


def calibration(errors: Any, scaled_stds: Any, scale: float) -> Calibration:
    """Coverage of the central intervals at 21 levels from 0 to 1, for errors [n] and calibrated stds [n].

    Where there is no spread to judge (one member, no data) the curve is empty and the figures are NaN: unknown.
    """
    n = len(errors)
    if not n or not np.any(scaled_stds > SMALLEST_STD):
        nan = math.nan
        return Calibration(scale, (), (), nan, nan, nan, n, nan, nan, nan, None)
    expected = np.linspace(0.0, 1.0, N_LEVELS)
    stds = np.maximum(scaled_stds, SMALLEST_STD)
    # |error| / std has the distribution function erf(z / sqrt 2): the level at which an error is just covered.
    z = np.abs(errors) / stds
    level = erf(z / math.sqrt(2))
    observed = np.array([(level <= p).mean() for p in expected])
    area = float(np.trapezoid(np.abs(observed - expected), expected))
    within = [float((z <= k).mean()) for k in (1.0, 2.0)]
    return Calibration(
        scale, tuple(expected.tolist()), tuple(observed.tolist()), area, within[0], within[1], n,
        nll=float(np.mean(0.5 * np.log(2 * math.pi * stds**2) + 0.5 * z**2)),
        crps=float(np.mean(_crps(z, stds))),
        sharpness=float(np.sqrt(np.mean(stds**2))),
        spearman=rank_correlation(np.abs(errors), scaled_stds),
    )  # fmt: skip


def _crps(z: Any, stds: Any) -> Any:
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return stds * (z * erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))


def coverage(errors: Any, half_widths: Any, groups: Any, target: float, n_independent: int | None = None) -> Coverage:
    """What intervals of half_widths [n] around predictions cover of errors [n] that come in groups [n].

    n_independent: for the band, where fewer than n are independent, such as structures for components of forces.
    """
    n, nan = len(errors), math.nan
    if not n or np.isnan(half_widths).any():
        return Coverage(target, n, 0, 0, nan, nan, nan, nan, nan)
    covered = np.abs(errors) <= half_widths
    observed = float(covered.mean())
    _, which = np.unique(groups, return_inverse=True)
    independent = n if n_independent is None else n_independent
    low, high = binomial_band(independent, target)
    residuals = np.bincount(which, weights=covered - observed)
    return Coverage(
        target, n, independent, len(residuals), observed, low, high, float(np.sqrt(np.square(residuals).sum())) / n,
        float(np.mean(half_widths)),
    )  # fmt: skip


def binomial_band(n: int, share: float, level: float = BAND) -> tuple[float, float]:
    """The central band of a binomial share: of n draws with probability `share`, the observed share lies within it."""
    low, high = binom.ppf([(1 - level) / 2, (1 + level) / 2], n, share) / n
    return float(low), float(high)


def rank_correlation(first: Any, second: Any) -> float | None:
    """Spearman's rank correlation of two series [n]; None where one of them is constant."""
    if len(first) < 3 or not np.ptp(first) > 0 or not np.ptp(second) > 0:
        return None
    return float(spearmanr(first, second).statistic)
