"""Optuna's samplers behind the seam: what they are told, and what earlier stages teach them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from wattier.config import RunConfig
from wattier.optuna_sampler import MOST_TRIALS, OptunaSampler
from wattier.priors import corrected, key_of
from wattier.sampler import Ended, Known, Point
from wattier.space import contains, random_points, typed_space

SPACE = {
    "width": {"low": 8, "high": 64, "step": 8},
    "rate": {"low": 1e-4, "high": 1e-1, "log": True},
    "kind": {"choices": ["a", "b"]},
    "share": {"low": 0, "high": 1.0},
}


def space_of(space=SPACE):
    return typed_space(
        RunConfig.model_validate(
            {
                "name": "demo",
                "run_dir": "/nowhere",
                "trial": "mine:train",
                "search": {"space": space, "stages": [{"name": "only", "trials": 3}]},
            }
        )
    )


def ended(trial_id, params, values=None, *, status="complete", ratios=None, curve=None):
    return Ended(trial_id, params, status, values, ratios or {}, curve or {})


def loss_of(params):
    return (math.log10(params["rate"]) + 2.5) ** 2 + abs(params["width"] - 32) / 32 + (params["kind"] == "b")


BOTH = [(name, count) for name in ("tpe", "nsga2", "nsga3", "gp", "random") for count in (1, 2)]


@pytest.mark.parametrize(("name", "n_objectives"), [*BOTH, ("cmaes", 1)])
def test_every_sampler_stays_in_the_space_and_is_told_what_happened(name, n_objectives):
    space = space_of()
    sampler = OptunaSampler(name, space, seed=1, n_objectives=n_objectives)
    states = []
    for index in range(14):
        trial_id = f"only-{index:03d}"
        params = sampler.suggest(trial_id, Known())
        assert contains(space, params)
        status = "pruned" if index % 5 == 4 else "failed" if index % 7 == 6 else "complete"
        values = (loss_of(params), float(params["width"]))[:n_objectives] if status == "complete" else None
        sampler.ended(ended(trial_id, params, values, status=status, curve={1: 3.0}))
        states.append(status)
    told = [trial.state for trial in sampler.study.trials]
    expected = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    assert told == [expected[status] for status in states]


def test_a_trial_without_values_is_not_complete_for_optuna():
    sampler = OptunaSampler("tpe", space_of(), seed=1, n_objectives=2)
    params = sampler.suggest("a", Known())
    sampler.ended(ended("a", params, None))
    assert [trial.state for trial in sampler.study.trials] == [TrialState.FAIL]


def test_a_limit_that_was_broken_reaches_optuna():
    sampler = OptunaSampler("tpe", space_of(), seed=1, n_objectives=2)
    params = sampler.suggest("a", Known())
    sampler.ended(ended("a", params, (1.0, 2.0), ratios={"memory_bytes": 1.5}))
    sampler.ended(ended("earlier", random_points(space_of(), 1, 3)[0], (1.0, 2.0), ratios={"memory_bytes": 0.5}))
    assert [trial.constraints for trial in sampler.study.trials] == [{"memory_bytes": 0.5}, {"memory_bytes": -0.5}]


@pytest.mark.parametrize("name", ["tpe", "gp"])
def test_what_an_earlier_stage_found_moves_the_first_suggestions(name):
    space = space_of()
    rng = np.random.default_rng(0)
    earlier = [Point(p, (loss_of(p) + 0.01 * rng.normal(), p["width"] * 10.0)) for p in random_points(space, 60, 5)]

    def first_losses(known):
        losses = []
        for seed in range(12):
            sampler = OptunaSampler(name, space, seed=seed, n_objectives=1)
            losses.append(loss_of(sampler.suggest("a", known)))
        return np.median(losses)

    single = [Point(point.params, point.values[:1]) for point in earlier]
    assert first_losses(Known(earlier=single)) < 0.7 * first_losses(Known())


def test_priors_are_mapped_anew_as_the_stage_grows():
    space = space_of()
    earlier = [Point(p, (loss_of(p), 10.0 * p["width"])) for p in random_points(space, 20, 5)]
    sampler = OptunaSampler("tpe", space, seed=1, n_objectives=2)
    finished = []
    for index, promoted in enumerate(earlier[:6]):
        sampler.take(f"p{index}", promoted.params)
        values = (promoted.values[0] / 2, promoted.values[1] * 8)  # half the loss and eight times the joules here
        sampler.ended(ended(f"p{index}", promoted.params, values))
        finished.append(Point(promoted.params, values))
    sampler.suggest("new", Known(earlier=earlier, finished=finished))
    stored = {key_of(t.params): t.values for t in sampler.study.trials if t.state == TrialState.COMPLETE}
    assert len(stored) == 20
    for point in earlier[6:]:
        assert stored[key_of(point.params)] == pytest.approx([point.values[0] / 2, point.values[1] * 8])


def test_a_study_is_bounded_and_keeps_its_front():
    space = space_of()
    sampler = OptunaSampler("tpe", space, seed=1, n_objectives=2)
    points = random_points(space, MOST_TRIALS + 50, 7)
    for index, params in enumerate(points):
        best = index == 3
        sampler.ended(ended(f"t{index}", params, (-1.0, -1.0) if best else (1.0 + index, 2.0)))
    sampler.suggest("new", Known())
    assert len(sampler.study.trials) <= MOST_TRIALS
    assert [-1.0, -1.0] in [trial.values for trial in sampler.study.trials]


class TestCorrected:
    def test_with_pairs_a_power_law_is_undone_exactly(self):
        earlier = [Point({"x": i}, (0.1 * (i + 1), 2.0 * (i + 1))) for i in range(10)]
        finished = [Point(p.params, (0.5 * p.values[0] ** 0.8, 16 * p.values[1])) for p in earlier[:6]]
        for point, mapped in zip(earlier[6:], corrected(earlier, finished), strict=True):
            assert mapped.values == pytest.approx((0.5 * point.values[0] ** 0.8, 16 * point.values[1]))

    def test_without_pairs_medians_are_laid_on_one_another(self):
        earlier = [Point({"x": i}, (float(i + 1),)) for i in range(5)]
        finished = [Point({"x": 10 + i}, (30.0 * (i + 1),)) for i in range(5)]
        assert [point.values[0] for point in corrected(earlier, finished)] == pytest.approx([30, 60, 90, 120, 150])

    @given(
        earlier=st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(1e-6, 1e9)), min_size=1, max_size=12),
        finished=st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(1e-6, 1e9)), max_size=12),
    )
    @settings(max_examples=100, deadline=None)
    def test_the_order_of_earlier_trials_is_kept(self, earlier, finished):
        before = [Point({"x": i}, values) for i, values in enumerate(earlier)]
        mapped = corrected(before, [Point({"x": i}, values) for i, values in enumerate(finished)])
        left = [point for point in before if point.params["x"] >= len(finished)]
        assert [point.params for point in mapped] == [point.params for point in left]
        for objective in (0, 1):
            old = [point.values[objective] for point in left]
            new = [point.values[objective] for point in mapped]
            assert all(math.isfinite(value) for value in new)
            for i in range(len(old)):
                for j in range(len(old)):
                    assert new[i] <= new[j] or old[i] > old[j] or math.isclose(new[i], new[j], rel_tol=1e-9)
