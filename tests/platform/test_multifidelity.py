"""The sampler: inside the space, never twice, the same when resumed, robust, and far better than chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wattier.config_space import ChoiceParameter, RangeParameter
from wattier.encoding import Encoder
from wattier.multifidelity import MultiFidelitySampler, Observation
from wattier.pareto import hypervolume
from wattier.records import Params

SPACE: dict[str, RangeParameter | ChoiceParameter] = {
    "rate": RangeParameter(low=1e-4, high=1e-1, log=True),
    "width": RangeParameter(low=16, high=256, log=True),
    "depth": RangeParameter(low=2, high=10, step=2),
    "share": RangeParameter(low=0.0, high=1.0, step=0.25),
    "batch": ChoiceParameter(choices=[8, 32, 128]),
    "kind": ChoiceParameter(choices=["a", "b", "c"]),
}


def seen(
    params: Params, loss: float, joules: float | None = 1.0, fidelity: float = 1.0, **limits: float
) -> Observation:
    return Observation(params, fidelity, loss, joules, limits, fidelity == 1.0)


def measured(params: Params) -> tuple[float, float]:
    """A loss with its best rate, and joules: wide is good and dear."""
    width = params["width"]
    loss = (np.log10(params["rate"]) + 2.5) ** 2 + 30 / width + {"a": 0.0, "b": 0.3, "c": 0.6}[params["kind"]]
    return float(loss + 0.02 * params["depth"]), float(width * params["depth"])


def searched(seed: int, joules: float) -> list[tuple[float, float]]:
    """Outcomes of the sampler's trials that a budget of joules pays for."""
    sampler, observations, spent, found = MultiFidelitySampler(SPACE, seed), [], 0.0, []
    while True:
        params = sampler.suggest(observations)
        assert params is not None
        outcome = measured(params)
        spent += outcome[1]
        if spent > joules:
            return found
        found.append(outcome)
        observations.append(seen(params, *outcome))


@settings(deadline=None)
@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=6, max_size=6))
def test_a_configuration_survives_its_encoding(unit: list[float]) -> None:
    encoder = Encoder(SPACE)
    params = encoder.at(np.array(unit))
    again = encoder.at(encoder.unit(params))
    assert {k: v for k, v in again.items() if k != "rate"} == {k: v for k, v in params.items() if k != "rate"}
    assert again["rate"] == pytest.approx(params["rate"])
    assert [type(params[name]) for name in SPACE] == [float, int, int, float, int, str]
    assert 1e-4 <= params["rate"] <= 1e-1
    assert 16 <= params["width"] <= 256
    assert params["depth"] in (2, 4, 6, 8, 10)
    assert ((encoder.encode([params]) >= 0) & (encoder.encode([params]) <= 1)).all()


def test_it_beats_chance_by_far_at_equal_cost() -> None:
    corner, budget = (4.0, 2600.0), 5_000.0
    rng, ours, chance = np.random.default_rng(0), [], []
    encoder = Encoder(SPACE)
    for seed in range(2):
        ours.append(hypervolume(searched(seed, budget), corner))
        for _ in range(10):
            spent, points = 0.0, []
            while spent < 3 * budget:  # three times the joules
                points.append(measured(encoder.at(rng.random(6))))
                spent += points[-1][1]
            chance.append(hypervolume(points, corner))
    assert min(ours) > np.median(chance)


def test_what_is_known_decides_what_comes_next() -> None:
    sampler = MultiFidelitySampler(SPACE, 5)
    observations: list[Observation] = []
    for _ in range(14):
        params = sampler.suggest(observations)
        assert params is not None
        observations.append(seen(params, *measured(params)))
    resumed = MultiFidelitySampler(SPACE, 5).suggest(observations, pending=[observations[0].params])
    assert sampler.suggest(observations, pending=[observations[0].params]) == resumed


def test_a_finite_space_is_gone_through_once() -> None:
    space = {"a": ChoiceParameter(choices=["x", "y", "z"]), "b": RangeParameter(low=1, high=4)}
    sampler, observations, found = MultiFidelitySampler(space, 0), [], []
    while (params := sampler.suggest(observations)) is not None:
        found.append((params["a"], params["b"]))
        observations.append(seen(params, float(len(found)), 1.0 + params["b"]))
    assert sorted(found) == [(a, b) for a in "xyz" for b in (1, 2, 3, 4)]


def test_what_runs_is_not_proposed_again() -> None:
    space = {"a": ChoiceParameter(choices=[1, 2, 3])}
    sampler = MultiFidelitySampler(space, 0)
    assert sampler.suggest([seen({"a": 1}, 1.0)], pending=[{"a": 2}]) == {"a": 3}
    assert sampler.suggest([seen({"a": 1}, 1.0)], pending=[{"a": 2}], lost=[{"a": 3}]) is None


@pytest.mark.parametrize(
    "losses", [[1.0] * 8, [0.0] * 8, [1e300, -1e300] * 4, [1e-300] * 8, [-5.0, 3.0, 1e12, 0.0, 1.0, 2.0, 3.0, 4.0]]
)
@pytest.mark.parametrize("joules", [None, 1.0, 1e30])
def test_no_observation_is_too_odd(losses: list[float], joules: float | None) -> None:
    space = {"a": RangeParameter(low=0.0, high=1.0)}
    observations = [seen({"a": i / 10}, loss, joules, 0.1 if i % 2 else 1.0) for i, loss in enumerate(losses)]
    observations += observations[:2]
    params = MultiFidelitySampler(space, 0).suggest(observations)
    assert params is not None
    assert 0.0 <= params["a"] <= 1.0


def test_it_stays_away_from_what_diverges_and_from_limits() -> None:
    """Without either, the best lies at 0; half of the space diverges, or breaks a limit."""
    space = {"a": RangeParameter(low=0.0, high=1.0)}
    plain = [seen({"a": a}, 1 + a, None) for a in np.linspace(0.55, 1, 8).tolist()]
    lost = [{"a": a} for a in np.linspace(0.05, 0.45, 30).tolist()]
    low = MultiFidelitySampler(space, 0).suggest(plain)
    high = MultiFidelitySampler(space, 0).suggest(plain, lost=lost)
    limited = [seen({"a": a}, 1 + a, None, memory=1.5 - a) for a in np.linspace(0.0, 1, 11).tolist()]
    allowed = MultiFidelitySampler(space, 0).suggest(limited)
    assert low is not None and high is not None and allowed is not None
    assert low["a"] < 0.3
    assert high["a"] > low["a"]
    assert 0.4 < allowed["a"] < 0.65


def test_a_cost_model_keeps_the_first_trials_cheap() -> None:
    space = {"a": RangeParameter(low=0.0, high=1.0), "b": RangeParameter(low=0.0, high=1.0)}

    def cost(many: Any) -> np.ndarray:
        return np.array([10.0 ** (3 * params["a"]) for params in many])

    params = MultiFidelitySampler(space, 0).suggest([], cost=cost)
    assert params is not None
    assert params["a"] < 0.2


def test_a_hopeless_trial_is_not_worth_its_rest_and_a_promising_one_is() -> None:
    space = {"a": RangeParameter(low=0.0, high=1.0)}
    grid = np.linspace(0, 1, 9).tolist()
    observations = [seen({"a": a}, (2 - s) * (0.1 + (a - 0.3) ** 2), 5.0, s) for a in grid for s in (0.1, 0.3, 1.0)]
    sampler = MultiFidelitySampler(space, 0)
    good = [seen({"a": 0.31}, (2 - s) * 0.05, 5.0, s) for s in (0.1, 0.3)]
    bad = [seen({"a": 0.95}, (2 - s) * 0.9, 5.0, s) for s in (0.1, 0.3)]
    assert sampler.goes_on(observations, good)
    assert not sampler.goes_on(observations, bad)
