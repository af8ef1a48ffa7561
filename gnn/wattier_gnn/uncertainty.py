"""How well an ensemble's spread tells its error: one scale factor fitted on validation data, checked on test data.

The scale is a split-conformal one (Vovk et al. 2005; Angelopoulos and Bates 2021, section 2.3): the quantile of error
over spread that covers one standard deviation's share. The calibration curve and the miscalibration area follow
Kuleshov, Fenner, Ermon (ICML 2018).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

N_LEVELS = 21
SMALLEST_STD = 1e-9


class Calibration(NamedTuple):
    """Observed against expected coverage of central intervals of a normal distribution."""

    scale: float
    expected: tuple[float, ...]
    observed: tuple[float, ...]
    miscalibration_area: float
    coverage_68: float
    coverage_95: float


def fit_scale(errors: Any, stds: Any) -> float:
    """The factor by which a central 68.27 % interval covers that share of the errors: outliers do not inflate it."""
    if not len(errors) or not np.any(stds > SMALLEST_STD):
        return 1.0
    stds = np.nan_to_num(stds)
    return float(np.quantile(np.abs(errors) / np.maximum(stds, SMALLEST_STD), math.erf(1 / math.sqrt(2))))


def calibration(errors: Any, scaled_stds: Any, scale: float) -> Calibration:
    """Coverage of the central intervals at 21 levels from 0 to 1, for errors [n] and calibrated stds [n].

    Where there is no spread to judge (one member, no data) the curve is empty and the figures are NaN: unknown.
    """
    if not len(errors) or not np.any(scaled_stds > SMALLEST_STD):
        return Calibration(scale, (), (), math.nan, math.nan, math.nan)
    expected = np.linspace(0.0, 1.0, N_LEVELS)
    # |error| / std has the distribution function erf(z / sqrt 2): the level at which an error is just covered.
    z = np.abs(errors) / np.maximum(scaled_stds, SMALLEST_STD)
    level = np.array([math.erf(value / math.sqrt(2)) for value in z])
    observed = np.array([(level <= p).mean() for p in expected])
    area = float(np.trapezoid(np.abs(observed - expected), expected))
    within = [float((z <= k).mean()) for k in (1.0, 2.0)]
    return Calibration(scale, tuple(expected.tolist()), tuple(observed.tolist()), area, *within)


def rank_correlation(first: Any, second: Any) -> float | None:
    """Spearman's rank correlation of two series [n]; None where one of them is constant."""
    if len(first) < 3 or not np.ptp(first) > 0 or not np.ptp(second) > 0:
        return None
    return float(spearmanr(first, second).statistic)
