"""Expected improvements against Monte Carlo, quadrature, and another library's hypervolume."""

from __future__ import annotations

import moocore
import numpy as np
import pytest
from scipy import integrate, stats

from wattier.acquisition import Normal, ShiftedLogNormal, expected_hypervolume_improvement, expected_improvement

FRONT = np.array([[1.0, 5.0], [2.0, 3.0], [4.0, 1.0], [4.5, 4.0]])  # the last is dominated
CORNER = (6.0, 7.0)


def gain_of(point: np.ndarray) -> float:
    return moocore.hypervolume(np.vstack([FRONT, point]), ref=CORNER) - moocore.hypervolume(FRONT, ref=CORNER)


@pytest.mark.parametrize("point", [(0.5, 0.5), (1.5, 4.0), (3.0, 2.0), (5.0, 5.0), (0.5, 6.5), (9.0, 0.1)])
def test_a_certain_outcome_gains_the_difference_of_hypervolumes(point: tuple[float, float]) -> None:
    x, y = (np.array([value]) for value in point)
    gain = expected_hypervolume_improvement(FRONT, CORNER, Normal(x, np.zeros(1)), Normal(y, np.zeros(1)))
    assert gain[0] == pytest.approx(gain_of(np.array(point)), abs=1e-9)


def test_expected_gain_is_the_mean_over_outcomes() -> None:
    rng = np.random.default_rng(0)
    loss = ShiftedLogNormal(np.array([0.8]), np.array([0.5]), -1.0)
    joules = Normal(np.array([2.5]), np.array([1.5]))
    outcomes = np.column_stack(
        [np.exp(0.8 + 0.5 * rng.standard_normal(4000)) - 1, 2.5 + 1.5 * rng.standard_normal(4000)]
    )
    gains = np.array([gain_of(outcome) for outcome in outcomes])
    found = expected_hypervolume_improvement(FRONT, CORNER, loss, joules)[0]
    assert found == pytest.approx(gains.mean(), abs=4 * gains.std() / np.sqrt(len(gains)))


@pytest.mark.parametrize("level", [-0.5, 0.4, 2.0, 50.0])
def test_the_shortfall_of_a_shifted_log_normal_is_its_integral(level: float) -> None:
    belief = ShiftedLogNormal(np.array([0.3]), np.array([0.7]), -0.2)
    distribution = stats.lognorm(0.7, loc=-0.2, scale=np.exp(0.3))
    truth = integrate.quad(distribution.cdf, min(level, -0.2), level)[0]  # E[max(level - X, 0)] = integral of the cdf
    assert belief.shortfall(level)[0] == pytest.approx(truth, rel=1e-6, abs=1e-9)


def test_nothing_is_expected_of_what_is_huge() -> None:
    huge = ShiftedLogNormal(np.array([600.0]), np.array([20.0]))
    assert expected_improvement(1.0, huge)[0] == pytest.approx(0.0, abs=1e-9)


def test_without_a_front_the_gain_is_the_rectangle() -> None:
    sure = np.array([2.0]), np.zeros(1)
    gain = expected_hypervolume_improvement(np.empty((0, 2)), CORNER, Normal(*sure), Normal(*sure))
    assert gain[0] == pytest.approx(4.0 * 5.0)
