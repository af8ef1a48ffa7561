"""Intervals: what they promise, in closed form and in simulated worlds; what is refused of a release's calibration."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from wattier_gnn.ensemble import degrees_of_freedom, spread
from wattier_gnn.intervals import (
    PRIOR_DOF,
    EnsembleCalibration,
    QuantityCalibration,
    Said,
    conformal_quantile,
    fit_calibration,
    plain_scale,
)
from wattier_gnn.structure import DataError
from wattier_gnn.uncertainty import binomial_band

ONE = (False,)


def said(spreads: Any, dof: float = 2.0, source: Any = 0, size: Any = 1.0, aleatoric: Any = math.nan) -> Said:
    n = len(spreads)
    return Said(np.asarray(spreads, float), dof, np.full(n, aleatoric), np.full(n, source), np.full(n, float(size)))


def world(rng: Any, n: int, members: int = 3, bias: float = 1.0, unlike: float = 0.7) -> tuple[Any, Any, Any]:
    """Errors, spreads and sizes of members that share an error the spread cannot show, on structures of many sizes."""
    size = rng.integers(2, 60, n)
    noise = 0.02 * size * np.exp(rng.normal(0, 0.6, n))
    shared = bias * noise * rng.standard_t(4, n)
    said_by = shared + unlike * noise * rng.normal(size=(members, n))
    return said_by.mean(axis=0), spread(said_by), size


@pytest.mark.parametrize("n", [1, 8, 9, 10, 19, 99, 100])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.95])
def test_the_conformal_quantile_by_its_definition(n: int, share: float) -> None:
    """The smallest score that at least ceil((n + 1) c) scores do not exceed, in exact arithmetic."""
    scores = np.random.default_rng(n).permutation(n) + 1.0
    rank = math.ceil((n + 1) * Fraction(str(share)))
    expected = [s for s in sorted(scores) if np.sum(scores <= s) >= rank]
    found = conformal_quantile(scores, share)
    assert found == expected[0] if expected else math.isnan(found)


def test_the_mean_coverage_over_calibrations_is_the_closed_form() -> None:
    """With n calibration scores the next one is covered with probability ceil((n + 1) c) / (n + 1), exactly."""
    rng, n, repeats = np.random.default_rng(0), 25, 20_000
    scores = rng.standard_cauchy((repeats, n + 1)) ** 2
    limits = np.array([conformal_quantile(row[:n], 0.9) for row in scores])
    low, high = binomial_band(repeats, 24 / 26)
    assert low <= np.mean(scores[:, n] <= limits) <= high


@pytest.mark.parametrize("members", [2, 3, 8])
def test_ninety_per_cent_intervals_cover_ninety_per_cent_of_a_world_with_heavy_tails(members: int) -> None:
    rng = np.random.default_rng(members)
    errors, spreads, size = world(rng, 20_000, members)
    half = len(errors) // 2
    first, second = (Said(spreads[s], members - 1.0, np.full(half, np.nan), np.zeros(half, int), size[s])
                     for s in (slice(0, half), slice(half, None)))  # fmt: skip
    found = fit_calibration(errors[:half], first, 1, 0.9, ONE)
    sure = found.sureness(second)
    within = np.abs(errors[half:]) <= sure.half_width
    # Both halves have binomial noise, so the band is that of half as many.
    low, high = binomial_band(half // 2, 0.9)
    assert low <= within.mean() <= high
    assert np.mean(np.abs(errors[half:]) <= sure.std) == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.02)
    small = spreads[half:] < np.quantile(spreads[half:] / size[half:], 0.05) * size[half:]
    assert within[small].mean() > 0.8, "nor is it sure where the members agree by chance"


def test_without_moderation_chance_agreement_would_be_certainty() -> None:
    """The same world by the plain spread: of the cases with the least spread it covers far fewer."""
    errors, spreads, size = world(np.random.default_rng(3), 20_000)
    factor = conformal_quantile(np.abs(errors) / spreads, 0.9)
    small = spreads < np.quantile(spreads / size, 0.05) * size
    assert np.mean(np.abs(errors) <= factor * spreads) == pytest.approx(0.9, abs=1e-3)
    assert np.mean((np.abs(errors) <= factor * spreads)[small]) < 0.6


def test_moderation_is_the_weighted_mean_of_variances() -> None:
    found = QuantityCalibration(PRIOR_DOF, (0.5,), (2.0,), (3.0,), ONE).sureness(said([1.0, 0.0], dof=4.0, size=10))
    variance = (4.0 * np.array([1.0, 0.0]) + PRIOR_DOF * 5.0**2) / (4.0 + PRIOR_DOF)
    np.testing.assert_allclose(found.std, 2.0 * np.sqrt(variance))
    np.testing.assert_allclose(found.half_width, 3.0 * np.sqrt(variance))
    np.testing.assert_allclose(found.epistemic, found.std)
    assert np.isnan(found.aleatoric).all()


def test_what_members_disagree_on_and_what_they_expect_add_up() -> None:
    found = QuantityCalibration(0.0, (0.0,), (1.5,), (1.0,), ONE).sureness(said([3.0], aleatoric=4.0))
    assert (found.epistemic[0], found.aleatoric[0]) == pytest.approx((4.5, 6.0))
    assert found.std[0] == pytest.approx(7.5)
    assert found.half_width[0] == pytest.approx(5.0)


def test_a_source_with_enough_of_its_own_has_its_own_factors() -> None:
    """The spread of the second source tells a fifth of its errors: only factors of its own cover it."""
    rng = np.random.default_rng(5)
    spreads, source = rng.uniform(0.5, 1.5, 4000), np.repeat([0, 1], 2000)
    errors = rng.normal(size=4000) * spreads * np.where(source == 0, 1.0, 5.0)
    all_of_it = Said(spreads, 1e6, np.full(4000, np.nan), source, 1.0)
    low, high = binomial_band(1000, 0.9)
    for own, is_covered in (((True, True), True), ((False, False), False)):
        found = fit_calibration(errors, all_of_it, 2, 0.9, own)
        within = np.abs(errors) <= found.sureness(all_of_it).half_width
        assert within.mean() == pytest.approx(0.9, abs=1e-3)
        assert all(low <= within[source == s].mean() <= high for s in (0, 1)) is is_covered
        assert found.is_own == own


def test_one_member_has_no_deviation_but_an_interval_of_one_width_by_size_and_source() -> None:
    rng = np.random.default_rng(6)
    size, source = rng.integers(1, 50, 4000), np.repeat([0, 1], 2000)
    errors = rng.laplace(size=4000) * size * np.where(source == 0, 0.01, 0.3)
    unknown = np.full(4000, np.nan)
    single = Said(unknown, 0.0, unknown, source, size)
    found = fit_calibration(errors, single, 2, 0.9, (False, False))
    sure = found.sureness(single)
    assert np.isnan(sure.std).all()
    within = np.abs(errors) <= sure.half_width
    widths = [np.unique((sure.half_width / size)[source == s].round(12)) for s in (0, 1)]
    assert [len(w) for w in widths] == [1, 1]
    # Of a Laplace distribution of scale b, |x| <= b ln 10 holds 90 %.
    assert widths[0][0] == pytest.approx(0.01 * math.log(10), rel=0.06)
    assert widths[1][0] == pytest.approx(0.3 * math.log(10), rel=0.06)
    assert all(within[source == s].mean() == pytest.approx(0.9, abs=0.02) for s in (0, 1))


def test_one_member_with_a_head_of_its_own_says_what_it_expects() -> None:
    expects = np.array([0.1, 1.0])
    single = Said(np.full(2, np.nan), 0.0, expects, np.zeros(2, int), np.ones(2))
    sure = QuantityCalibration(PRIOR_DOF, (0.7,), (2.0,), (3.0,), ONE).sureness(single)
    np.testing.assert_allclose(sure.std, 2 * np.sqrt(expects**2 + 0.7**2), err_msg="with its source's usual error")
    np.testing.assert_allclose(sure.half_width, 3 * np.sqrt(expects**2 + 0.7**2))
    np.testing.assert_allclose(sure.aleatoric, 2 * expects)
    assert np.isnan(sure.epistemic).all(), "one member cannot say what others would"


def test_too_few_to_know_is_not_known() -> None:
    found = fit_calibration(np.ones(8), said(np.ones(8)), 1, 0.9, ONE)
    assert math.isnan(found.interval_factor[0])
    assert np.isnan(found.sureness(said([1.0])).half_width).all()
    empty = fit_calibration(np.empty(0), said([]), 1, 0.9, ONE)
    assert np.isnan(empty.sureness(said([1.0])).std).all()
    again = QuantityCalibration.from_dict(json.loads(json.dumps(empty.to_dict())), 1, "energy")
    assert math.isnan(again.std_scale[0])


def test_a_source_without_validation_is_measured_by_the_others() -> None:
    rng = np.random.default_rng(8)
    spreads = rng.uniform(1, 2, 300)
    found = fit_calibration(rng.normal(size=300) * spreads, said(spreads), 2, 0.9, (True, False))
    assert found.prior_std[1] == pytest.approx(np.median(spreads))
    assert found.interval_factor[0] == found.interval_factor[1]


def test_members_that_agree_in_all_are_not_certain_without_bound() -> None:
    found = fit_calibration(np.ones(50), said(np.zeros(50)), 1, 0.9, ONE)
    assert found.sureness(said([0.0])).half_width[0] == pytest.approx(1.0)


def test_weights_of_members_decide_the_freedom_of_their_spread() -> None:
    values = np.random.default_rng(0).normal(size=(4, 9))
    equal = np.full(4, 0.25)
    np.testing.assert_allclose(spread(values, equal), values.std(axis=0, ddof=1))
    assert degrees_of_freedom(equal) == pytest.approx(3)
    two = np.array([0.5, 0.0, 0.5, 0.0])
    np.testing.assert_allclose(spread(values, two), values[[0, 2]].std(axis=0, ddof=1))
    assert degrees_of_freedom(two) == pytest.approx(1)
    alone = np.array([0.0, 1.0, 0.0, 0.0])
    assert np.isnan(spread(values, alone)).all()
    assert degrees_of_freedom(alone) == 0
    nearly = np.array([1e-13, 1.0, 0.0, 0.0])  # both know of rounding, or the deviation would be NaN and not unknown
    assert np.isnan(spread(values, nearly)).all()
    assert degrees_of_freedom(nearly) == 0


def whole() -> dict[str, Any]:
    quantity = QuantityCalibration(2.0, (0.1, 0.2), (1.0, math.nan), (2.0, 3.0), (True, False))
    return EnsembleCalibration(0.9, quantity, quantity).to_dict()


def test_a_calibration_is_the_same_after_json() -> None:
    assert EnsembleCalibration.from_dict(json.loads(json.dumps(whole())), 2).to_dict() == whole()


def test_the_two_factors_of_an_earlier_release_multiply_the_plain_spread() -> None:
    found = EnsembleCalibration.from_dict({"energy_std_scale": 1.7, "forces_std_scale": 2.5}, 2)
    assert found.coverage is None
    assert found.energy == plain_scale(1.7, 2)
    sure = found.energy.sureness(said([2.0], source=1))
    assert sure.std[0] == pytest.approx(3.4)
    assert np.isnan(sure.half_width).all()
    again = EnsembleCalibration.from_dict(json.loads(json.dumps(found.to_dict())), 2)  # exported anew, as schema 2
    assert again.coverage is None
    assert again.to_dict() == found.to_dict()


def broken(**changes: Any) -> dict[str, Any]:
    data = whole()
    for key, value in changes.items():
        if key in data:
            data[key] = value
        else:
            data["energy"][key] = value
    return data


@pytest.mark.parametrize("data", [
    None, [], "x", {}, {"energy_std_scale": math.nan, "forces_std_scale": 1.0}, {"energy_std_scale": 1.0},
    broken(coverage=0.0), broken(coverage=1.0), broken(coverage="0.9"), broken(energy=None), broken(forces=[1]),
    broken(prior_std=[0.1]), broken(prior_std=[0.1, -1.0]), broken(prior_std=[0.1, None]), broken(prior_dof=math.inf),
    broken(std_scale=[1.0, math.nan]), broken(interval_factor="22"), broken(interval_factor=[True, 1.0]),
    broken(is_own=[1, 0]), broken(is_own={}), broken(prior_std=[0.1] * 10**5),
])  # fmt: skip
def test_a_calibration_that_is_none_is_refused(data: Any) -> None:
    with pytest.raises(DataError, match="calibration"):
        EnsembleCalibration.from_dict(data, 2)
