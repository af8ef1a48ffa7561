"""The bench's problems: fronts, known minima, what a step costs."""

import math

import numpy as np
import pytest
from search.account import Account, BudgetSpentError
from search.functions import BUILT_IN, branin_currin, dtlz2, random_function, zdt
from search.problems import reduction, reference_point, reports, true_hypervolume
from search.space import decoded, draw, from_unit, to_unit

from wattier.pareto import hypervolume

QUICK = [name for name in BUILT_IN if not name.startswith("gp")]


@pytest.fixture(scope="module", params=[*QUICK, "gp1"])
def problem(request):
    return BUILT_IN[request.param]()


def test_a_front_is_better_than_a_big_random_sample(problem):
    sample = problem.outcomes(np.random.default_rng(1).random((40_000, len(problem.space))))
    corner = reference_point(problem.front)
    together = hypervolume(np.vstack([problem.front, sample]), corner)
    assert together <= 1.001 * true_hypervolume(problem.front)
    assert hypervolume(sample, corner) < true_hypervolume(problem.front)


def test_a_front_is_what_configurations_reach(problem):
    """Each of its points is an outcome: none may lie beyond what can be had."""
    truths = np.array([problem.truth(draw(problem.space, np.random.default_rng(seed))) for seed in range(50)])
    for loss, joules in truths:
        beaten = (problem.front[:, 0] <= loss + 1e-6 * abs(loss)) & (problem.front[:, 1] <= joules * (1 + 1e-6))
        near = np.abs(problem.front / (loss, joules) - 1).max(axis=1).min() < 0.02
        assert beaten.any() or near


@pytest.mark.parametrize("place", [(-math.pi, 12.275), (math.pi, 2.275), (9.42478, 2.475)])
def test_branin_has_its_published_minima(place):
    unit = {"x1": (place[0] + 5) / 15, "x2": place[1] / 15}
    assert branin_currin().truth(unit)[0] == pytest.approx(0.397887, abs=1e-4)


def test_zdt_and_dtlz_fronts_are_those_of_the_papers():
    f1 = np.linspace(0, 1, 200)
    front = zdt(1, 5).front
    assert np.interp(60 + 27 * (20 + 180 * f1), front[::-1, 1], front[::-1, 0]) == pytest.approx(
        2 - np.sqrt(f1), abs=1e-3
    )
    front = zdt(2, 2).front
    assert np.interp(60 + 27 * (20 + 180 * f1), front[::-1, 1], front[::-1, 0]) == pytest.approx(2 - f1**2, abs=1e-3)
    circle = np.column_stack([dtlz2(5).front[:, 0] - 0.1, (dtlz2(5).front[:, 1] - 40 - 27 * 15) / (27 * 120)])
    assert np.linalg.norm(circle, axis=1) == pytest.approx(np.ones(len(circle)), abs=1e-9)


def test_low_fidelity_misleads_and_is_noisy():
    """Otherwise there would be nothing to compare: its best configurations are not the best, and seeds differ."""
    problem = zdt(1, 5)
    columns = decoded(problem.space, np.random.default_rng(0).random((500, 5)))
    assert np.argmin(problem.curve(columns, 0.0)) != np.argmin(problem.curve(columns, 1.0))
    params = draw(problem.space, np.random.default_rng(0))
    assert problem.loss(params, 1, seed=0) == problem.loss(params, 1, seed=0) != problem.loss(params, 1, seed=1)


def test_joules_differ_by_several_times(problem):
    joules = problem.outcomes(np.random.default_rng(2).random((4000, len(problem.space))))[:, 1]
    low, high = np.quantile(joules, [0.05, 0.95])
    assert high / low > 2.5 and joules.min() > 0


def test_places_in_the_unit_cube_and_back(problem):
    rng = np.random.default_rng(3)
    for _ in range(50):
        params = draw(problem.space, rng)
        assert from_unit(problem.space, to_unit(problem.space, params)) == pytest.approx(params)


def test_a_trial_that_goes_on_pays_for_the_difference():
    problem = branin_currin()
    params = draw(problem.space, np.random.default_rng(0))
    account = Account(problem, 1e9, seed=0)
    trial = account.open(params)
    for epoch in (1, 3, 9, 27):
        trial.run_to(epoch)
        assert account.spent_joules == pytest.approx(problem.joules(params, epoch))
    assert account.finished == [(account.spent_joules, *problem.truth(params))]
    stopped = account.open(params)
    stopped.run_to(1)
    assert account.spent_joules == pytest.approx(problem.joules(params, 27) + problem.joules(params, 1))


def test_a_step_beyond_the_budget_is_not_made():
    problem = branin_currin()
    params = draw(problem.space, np.random.default_rng(0))
    account = Account(problem, 0.99 * problem.joules(params, 27), seed=0)
    with pytest.raises(BudgetSpentError):
        account.open(params).run_to(27)
    assert account.spent_joules == 0 and account.finished == []


def test_methods_are_asked_at_rungs():
    problem = random_function(3)
    assert reduction(problem) == 3 and reports(problem) == [1, 3, 9, 27]
