"""Calibration against closed forms and against uncertainty-toolbox."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from wattier_gnn.ensemble import spread
from wattier_gnn.uncertainty import calibration, fit_scale, rank_correlation

RNG = np.random.default_rng(0)


def test_scale_recovers_a_known_overconfidence() -> None:
    stds = RNG.uniform(0.1, 2.0, size=200_000)
    errors = RNG.normal(scale=3.0 * stds)
    assert fit_scale(errors, stds) == pytest.approx(3.0, rel=0.01)


def test_scale_is_not_inflated_by_outliers() -> None:
    stds = np.ones(10_000)
    errors = RNG.normal(size=10_000)
    errors[:100] = 1e6
    assert fit_scale(errors, stds) == pytest.approx(1.0, rel=0.05)


def test_scale_of_one_member_is_one() -> None:
    assert fit_scale(np.ones(5), np.zeros(5)) == 1.0
    assert fit_scale(np.empty(0), np.empty(0)) == 1.0


def test_perfect_calibration_lies_on_the_diagonal() -> None:
    stds = RNG.uniform(0.5, 1.5, size=100_000)
    found = calibration(RNG.normal(scale=stds), stds, scale=1.0)
    assert np.allclose(found.expected, found.observed, atol=0.01)
    assert found.miscalibration_area < 0.005
    assert found.coverage_68 == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.01)
    assert found.coverage_95 == pytest.approx(math.erf(2 / math.sqrt(2)), abs=0.01)


def test_miscalibration_area_agrees_with_uncertainty_toolbox() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import uncertainty_toolbox
    true, predicted = RNG.normal(size=3000), RNG.normal(size=3000) * 0.3
    stds = RNG.uniform(0.3, 0.9, size=3000)
    ours = calibration(predicted - true, stds, scale=1.0)
    theirs = uncertainty_toolbox.metrics_calibration.miscalibration_area(predicted, stds, true, num_bins=21)
    assert ours.miscalibration_area == pytest.approx(theirs, abs=0.01)


def test_rank_correlation() -> None:
    assert rank_correlation(np.arange(10.0), np.arange(10.0) ** 3) == pytest.approx(1.0)
    assert rank_correlation(np.arange(10.0), np.zeros(10)) is None
    assert rank_correlation(np.arange(2.0), np.arange(2.0)) is None


def test_spread_is_the_unbiased_standard_deviation() -> None:
    values = RNG.normal(size=(5, 7))
    mean = values.sum(axis=0) / 5
    assert np.allclose(spread(values), np.sqrt(((values - mean) ** 2).sum(axis=0) / 4))
    assert np.isnan(spread(values[:1])).all(), "one member cannot say how sure it is"


def test_without_spread_nothing_is_said_of_calibration() -> None:
    found = calibration(np.ones(5), np.full(5, np.nan), scale=1.0)
    assert found.expected == found.observed == ()
    assert math.isnan(found.coverage_68)
    assert math.isnan(found.miscalibration_area)
