"""Calibration against closed forms and against uncertainty-toolbox."""

from __future__ import annotations

import math
import warnings
from statistics import NormalDist

import numpy as np
import pytest

from wattier_gnn.ensemble import spread
from wattier_gnn.uncertainty import binomial_band, calibration, coverage, fit_scale, rank_correlation

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


@pytest.fixture(scope="module")
def toolbox():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import uncertainty_toolbox
    return uncertainty_toolbox


def test_metrics_agree_with_uncertainty_toolbox(toolbox) -> None:
    rng = np.random.default_rng(11)
    true, predicted = rng.normal(size=3000), rng.normal(size=3000) * 0.3
    stds = rng.uniform(0.3, 0.9, size=3000)
    ours = calibration(predicted - true, stds, scale=1.0)
    theirs = toolbox.metrics_calibration.miscalibration_area(predicted, stds, true, num_bins=21)
    assert ours.miscalibration_area == pytest.approx(theirs, abs=0.01)
    assert ours.sharpness == pytest.approx(toolbox.metrics_calibration.sharpness(stds))
    assert ours.nll == pytest.approx(toolbox.metrics_scoring_rule.nll_gaussian(predicted, stds, true))
    assert ours.crps == pytest.approx(toolbox.metrics_scoring_rule.crps_gaussian(predicted, stds, true))
    expected, observed = toolbox.metrics_calibration.get_proportion_lists_vectorized(
        predicted, stds, true, num_bins=21, recal_model=None, prop_type="interval"
    )
    np.testing.assert_allclose(ours.expected, expected)
    np.testing.assert_allclose(ours.observed[:-1], observed[:-1], atol=1e-3)


@pytest.mark.parametrize("ratio", [0.25, 1.0, 3.0])
def test_metrics_of_gaussian_errors_with_known_deviations_are_the_closed_forms(ratio: float) -> None:
    """Errors of N(0, s^2) told with deviations of ratio * s; s from 0.5 to 1.5."""
    rng, n = np.random.default_rng(12), 400_000
    true_stds = rng.uniform(0.5, 1.5, size=n)
    told = ratio * true_stds
    found = calibration(rng.normal(size=n) * true_stds, told, scale=1.0)
    nll = 0.5 * math.log(2 * math.pi) + np.log(told).mean() + 0.5 / ratio**2
    assert found.nll == pytest.approx(nll, abs=0.005 * (1 + 1 / ratio**2))
    assert found.sharpness == pytest.approx(ratio * math.sqrt(1 + 1 / 12), rel=0.003)
    # E CRPS of N(0, r^2) against N(0, 1): E|X - Y| - E|X - X'| / 2, both of normal differences.
    crps = math.sqrt(2 / math.pi) * (math.sqrt(1 + ratio**2) - ratio / math.sqrt(2)) * true_stds.mean()
    assert found.crps == pytest.approx(crps, rel=0.01)
    levels = np.array(found.expected)
    normal = NormalDist()
    inner = [2 * normal.cdf(ratio * normal.inv_cdf((1 + p) / 2)) - 1 for p in levels[:-1]]
    np.testing.assert_allclose(found.observed[:-1], inner, atol=0.004)
    area = np.trapezoid(np.abs(np.array([*inner, 1.0]) - levels), levels)
    assert found.miscalibration_area == pytest.approx(area, abs=0.003)
    fine = np.linspace(0, 1, 2001)[:-1]  # 21 levels are near the whole curve
    whole = np.array([2 * normal.cdf(ratio * normal.inv_cdf((1 + p) / 2)) - 1 for p in fine])
    assert found.miscalibration_area == pytest.approx(np.abs(whole - fine).mean(), abs=0.02)


def test_coverage_its_band_and_its_standard_error() -> None:
    errors, widths = np.array([0.5, -2.0, 0.1, 3.0, 1.0, -1.0]), np.ones(6)
    found = coverage(errors, widths, np.array([7, 7, 7, 9, 9, 9]), 0.9)
    assert found.observed == pytest.approx(4 / 6)
    assert (found.n, found.n_groups, found.mean_half_width) == (6, 2, 1.0)
    # By the definition of a cluster-robust standard error of a mean.
    residuals = np.array([1, 0, 1, 0, 1, 1]) - 4 / 6
    by_hand = math.sqrt(residuals[:3].sum() ** 2 + residuals[3:].sum() ** 2) / 6
    assert found.standard_error_by_group == pytest.approx(by_hand)
    alone = coverage(errors, widths, np.arange(6), 0.9)
    assert alone.standard_error_by_group == pytest.approx(math.sqrt(4 / 6 * 2 / 6 / 6))
    assert math.isnan(coverage(errors, np.full(6, np.nan), np.arange(6), 0.9).observed)
    assert math.isnan(coverage(errors[:0], widths[:0], np.arange(0), 0.9).observed)


@pytest.mark.parametrize("n", [44, 263, 5000])
def test_a_binomial_band_holds_what_it_says(n: int) -> None:
    low, high = binomial_band(n, 0.9)
    counts = np.arange(n + 1)
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in counts]
    shares = np.exp(np.array(logs) + counts * math.log(0.9) + (n - counts) * math.log(0.1))
    inside = (counts / n >= low - 1e-12) & (counts / n <= high + 1e-12)
    assert shares[inside].sum() >= 0.99
    assert shares[counts / n < low - 1e-12].sum() <= 0.005
    assert shares[counts / n > high + 1e-12].sum() <= 0.005


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
    assert found.spearman is None
    for name in ("coverage_68", "miscalibration_area", "nll", "crps", "sharpness"):
        assert math.isnan(getattr(found, name))
