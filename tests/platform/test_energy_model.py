"""The energy model against a made-up device whose joules and seconds are known, and against files on the disk."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from wattier.config import RunConfig
from wattier.config_space import ChoiceParameter, RangeParameter
from wattier.device_prior import RATED_WATTS_PER_GPU, DevicePrior, prior_of, probe_device
from wattier.energy_model import MOST_ROWS, EnergyModel
from wattier.records import Fidelity
from wattier.workload import Workload

SPACE = {
    "hidden_dim": RangeParameter(low=16, high=512, log=True),
    "learning_rate": RangeParameter(low=1e-4, high=1e-2, log=True),
    "batch_structures": ChoiceParameter(choices=[8, 16, 32, 64]),
    "family": ChoiceParameter(choices=["egnn", "schnet"]),
}
SCOUT, FINAL = Fidelity("scout", 1000, 3, 1), Fidelity("final", 4000, 9, 1)
WIDE = Fidelity("wide", 4000, 9, 4)
PRIOR = DevicePrior("a made-up device", 200.0, 1e11, 1e10, 1e-5)
ATOMS, EDGES = 20.0, 300.0


def workload(params: dict, fidelity: Fidelity) -> Workload:
    """Products as h^2, traffic as h, operators as steps: not what gnn counts, but as independent of each other."""
    h, drawn = params["hidden_dim"], (fidelity.structures or 10_000) * fidelity.epochs
    steps = drawn / params["batch_structures"]
    dear = 1.0 if params["family"] == "egnn" else 1.6
    return Workload(
        flops=dear * drawn * EDGES * h**2 * 20, bytes_moved=drawn * EDGES * h * 400, operations=steps * 400,
        structures=drawn, steps=steps, epochs=fidelity.epochs, parameters=12 * h**2, ranks=fidelity.ranks,
    )  # fmt: skip


class Device(NamedTuple):
    """What a device truly takes, apart from noise."""

    joules_per_flop: float = 4e-10
    joules_per_byte: float = 9e-9
    joules_per_operation: float = 5e-3
    joules_per_process: float = 60.0
    watts: float = 150.0

    def joules(self, params: dict, fidelity: Fidelity, share: float = 1.0) -> float:
        work = workload(params, fidelity)
        amounts = (
            self.joules_per_flop * work.flops + self.joules_per_byte * work.bytes_moved
            + self.joules_per_operation * work.operations * work.ranks
        )  # fmt: skip
        return share * amounts + self.joules_per_process * work.ranks

    def seconds(self, params: dict, fidelity: Fidelity, share: float = 1.0) -> float:
        return self.joules(params, fidelity, share) / self.watts / fidelity.ranks


def draw(rng: random.Random) -> dict:
    return {
        "hidden_dim": round(math.exp(rng.uniform(math.log(16), math.log(512)))),
        "learning_rate": 10 ** rng.uniform(-4, -2),
        "batch_structures": rng.choice([8, 16, 32, 64]),
        "family": rng.choice(["egnn", "schnet"]),
    }


def observed(
    model: EnergyModel, n: int, rng: random.Random, noise: float = 0.0, fidelity: Fidelity = SCOUT,
    device: Device | None = None,
) -> EnergyModel:  # fmt: skip
    device = device or Device()
    for _ in range(n):
        params = draw(rng)
        model.observe(
            params, fidelity, joules=device.joules(params, fidelity) * math.exp(rng.gauss(0, noise)),
            seconds=device.seconds(params, fidelity) * math.exp(rng.gauss(0, noise)),
        )  # fmt: skip
    return model


def physical() -> EnergyModel:
    return EnergyModel(workload, SPACE, PRIOR)


def test_without_noise_the_truth_is_found_and_carries_to_a_fidelity_twenty_times_as_large() -> None:
    """At one fidelity alone, reading structures cannot be told from starting a process: so there are three."""
    model, rng = physical(), random.Random(0)
    for fidelity in (SCOUT, replace(SCOUT, epochs=1), Fidelity("half", 500, 4, 1)):
        observed(model, 20, rng, fidelity=fidelity)
    for _ in range(30):
        params = draw(rng)
        for fidelity in (SCOUT, FINAL):
            projection = model.project(params, fidelity)
            assert projection.joules == pytest.approx(Device().joules(params, fidelity), rel=0.01)
            assert projection.seconds == pytest.approx(Device().seconds(params, fidelity), rel=0.01)


def test_the_device_is_found_behind_the_noise() -> None:
    """Joules a FLOP, a byte and an operator, each read off a projection in which it is all the work."""
    model = observed(physical(), 150, random.Random(3), noise=0.05)
    (regression,) = [fit._regression for name, fit in [("joules", model._fit("joules"))] if fit]
    per_flop, per_byte, per_operation = np.exp(regression.log_coefficients[:3])
    watts = PRIOR.watts
    assert per_flop * watts / PRIOR.flops_per_second == pytest.approx(Device().joules_per_flop, rel=0.1)
    assert per_byte * watts / PRIOR.bytes_per_second == pytest.approx(Device().joules_per_byte, rel=0.25)
    assert per_operation * watts * PRIOR.seconds_per_operation == pytest.approx(Device().joules_per_operation, rel=0.1)


@pytest.mark.parametrize("n_seen", [5, 20, 80])
def test_two_thirds_of_trials_fall_into_the_interval(n_seen: int) -> None:
    """Of 40 worlds with 10 held-out trials each; a world's trials share its errors, so some slack is given."""
    inside, total = 0, 0
    for world in range(40):
        rng = random.Random(1000 * n_seen + world)
        noise = rng.choice([0.03, 0.1, 0.3])
        device = Device(*(value * math.exp(rng.gauss(0, 0.7)) for value in Device()))
        model = physical()
        for _ in range(n_seen):
            params = draw(rng)
            joules = device.joules(params, SCOUT) * math.exp(rng.gauss(0, noise))
            model.observe(params, SCOUT, joules=joules, seconds=None)
        for _ in range(10):
            params = draw(rng)
            truth = device.joules(params, SCOUT) * math.exp(rng.gauss(0, noise))
            projection = model.project(params, SCOUT)
            inside += projection.joules_low <= truth <= projection.joules_high
            total += 1
    low, high = binom.interval(0.9999, total // 3, 0.683)
    assert low / (total // 3) <= inside / total <= high / (total // 3), f"{inside} of {total}"


def test_more_work_never_costs_less() -> None:
    """Whatever was seen: without a residual that says otherwise, the sum grows with each of its terms."""
    model = observed(physical(), 25, random.Random(5), noise=0.1)
    params = {"learning_rate": 1e-3, "batch_structures": 16, "family": "egnn"}
    joules = model.joules([params | {"hidden_dim": h} for h in range(16, 513, 16)], SCOUT)
    assert np.all(np.diff(joules) > 0)
    for small, large in ((SCOUT, replace(SCOUT, epochs=4)), (SCOUT, replace(SCOUT, structures=2000))):
        a, b = (model.project(params | {"hidden_dim": 64}, fidelity) for fidelity in (small, large))
        assert b.joules > a.joules
        assert b.seconds > a.seconds


def test_ranks_that_were_never_seen_share_the_time_and_widen_the_bar() -> None:
    model, rng = observed(physical(), 40, random.Random(7), noise=0.02), random.Random(8)
    params = {"hidden_dim": 300, "learning_rate": 1e-3, "batch_structures": 64, "family": "egnn"}
    seen, unseen = model.project(params, FINAL), model.project(params, WIDE)
    assert 0.25 < unseen.seconds / seen.seconds < 0.35
    assert unseen.joules == pytest.approx(Device().joules(params, WIDE), rel=0.25)
    assert unseen.joules_high / unseen.joules > 1.4 * (seen.joules_high / seen.joules) ** 0.5
    for _ in range(4):
        other = draw(rng)
        model.observe(other, WIDE, joules=1.3 * Device().joules(other, WIDE), seconds=Device().seconds(other, WIDE))
    now = model.project(params, WIDE)
    assert now.joules == pytest.approx(1.3 * Device().joules(params, WIDE), rel=0.08)
    assert now.joules_high / now.joules < unseen.joules_high / unseen.joules
    assert model.project(params, FINAL).joules == pytest.approx(Device().joules(params, FINAL), rel=0.06)


def test_the_same_observations_in_any_order_give_the_same_projection() -> None:
    rng = random.Random(9)
    rows = [(draw(rng), rng.choice([SCOUT, FINAL])) for _ in range(MOST_ROWS + 40)]
    rows = [(p, f, Device().joules(p, f) * math.exp(rng.gauss(0, 0.1))) for p, f in rows]
    found = set()
    for order in range(3):
        shuffled = random.Random(order).sample(rows, len(rows))
        model = physical()
        for params, fidelity, joules in shuffled:
            model.observe(params, fidelity, joules=joules, seconds=joules / 100)
            if order == 1 and rng.random() < 0.02:
                model.project(params, fidelity)  # asking leaves no trace
        found.add(model.project(rows[0][0], FINAL))
    assert len(found) == 1


def test_a_trial_that_was_stopped_teaches_as_much_as_it_did() -> None:
    model, rng = physical(), random.Random(11)
    for _ in range(30):
        params, share = draw(rng), rng.choice([1 / 9, 3 / 9, 1.0])
        model.observe(
            params, FINAL, joules=Device().joules(params, FINAL, share), share=share,
            seconds=Device().seconds(params, FINAL, share),
        )  # fmt: skip
    params = draw(rng)
    assert model.project(params, FINAL).joules == pytest.approx(Device().joules(params, FINAL), rel=0.02)


@pytest.mark.parametrize("factor", [20.0, 0.05])
def test_a_few_wild_trials_do_not_matter(factor: float) -> None:
    """A trial that was tried again is billed all its attempts; a throttled one takes longer."""
    model, rng = observed(physical(), 36, random.Random(13), noise=0.05), random.Random(14)
    for _ in range(4):
        params = draw(rng)
        model.observe(params, SCOUT, joules=factor * Device().joules(params, SCOUT), seconds=1.0)
    errors = []
    for _ in range(40):
        params = draw(rng)
        errors.append(abs(model.project(params, SCOUT).joules / Device().joules(params, SCOUT) - 1))
    assert np.median(errors) < 0.06


def test_before_any_trial_there_is_the_device_or_nothing() -> None:
    params = draw(random.Random(0))
    guess = physical().project(params, SCOUT)
    assert guess.basis == "no trial yet: a guess from the speed of a made-up device, within a factor of 3"
    terms = PRIOR.joules(workload(params, SCOUT))
    assert guess.joules == pytest.approx(sum(terms))
    assert guess.joules_high / guess.joules == pytest.approx(guess.joules / guess.joules_low)
    assert 2 < guess.joules_high / guess.joules <= 3, "errors of several terms even out a little"
    assert guess.seconds == pytest.approx(sum(PRIOR.seconds(workload(params, SCOUT))))
    for blind in (EnergyModel(workload, SPACE), EnergyModel(None, SPACE), EnergyModel(None, SPACE, PRIOR)):
        nothing = blind.project(params, SCOUT)
        assert all(map(math.isnan, nothing[:6]))
        assert nothing.basis == "no trial yet, and nothing to guess from"
        assert np.isnan(blind.joules([params, params], SCOUT)).all()


@pytest.mark.parametrize("model", [physical, lambda: EnergyModel(workload), lambda: EnergyModel(None)])
def test_one_trial_is_enough_to_start_and_equal_trials_do_no_harm(model) -> None:
    params = draw(random.Random(0))
    one = model()
    one.observe(params, SCOUT, joules=500.0, seconds=10.0)
    first = one.project(params, SCOUT)
    assert first.joules == pytest.approx(500, rel=0.1)
    assert first.joules_low < 500 < first.joules_high
    assert first.basis == "1 finished trial"
    for _ in range(20):
        one.observe(params, SCOUT, joules=500.0, seconds=10.0)
    many = one.project(params, SCOUT)
    assert many.joules == pytest.approx(500, rel=0.01)
    assert many.joules_high / many.joules < first.joules_high / first.joules
    assert one.project(params, FINAL).basis == "21 finished trials, 0 of them at this fidelity"


NONSENSE = [None, 0.0, -5.0, math.nan, math.inf, 1e300]


@pytest.mark.parametrize("joules", NONSENSE)
def test_what_no_trial_can_cost_is_not_learned_from_and_counted(joules: float | None) -> None:
    model = observed(physical(), 5, random.Random(0))
    params = draw(random.Random(1))
    before = model.project(params, SCOUT)
    model.observe(params, SCOUT, joules=joules, seconds=joules)
    assert model.project(params, SCOUT) == before
    assert sum(model.ignored.values()) == 2
    model.observe(params, SCOUT, joules=joules, seconds=3.0)
    after = model.project(params, SCOUT)
    assert after.joules == before.joules
    assert after.seconds != before.seconds, "of a trial whose joules are unknown the time is known all the same"


@pytest.mark.parametrize("share", [0.0, -1.0, math.nan, 1.5])
def test_a_share_outside_of_0_to_1_is_not_learned_from(share: float) -> None:
    model = physical()
    model.observe(draw(random.Random(1)), SCOUT, joules=1.0, seconds=1.0, share=share)
    assert model.project(draw(random.Random(1)), SCOUT).basis.startswith("no trial yet")
    assert sum(model.ignored.values()) == 1


def test_work_that_is_not_known_is_not_learned_from() -> None:
    def unknown(params: dict, fidelity: Fidelity) -> Workload:
        return workload(params, fidelity)._replace(flops=math.nan)

    model = EnergyModel(unknown, SPACE, PRIOR)
    model.observe(draw(random.Random(1)), SCOUT, joules=1.0, seconds=1.0)
    assert model.ignored == {"its work is not known": 1}
    assert math.isnan(model.project(draw(random.Random(1)), SCOUT).joules)


def test_joules_of_different_methods_are_not_mixed() -> None:
    model, rng = physical(), random.Random(2)
    for k in range(20):
        params = draw(rng)
        estimated = k % 4 == 0
        joules = Device().joules(params, SCOUT) * (0.1 if estimated else 1)
        model.observe(
            params, SCOUT, joules=joules, seconds=Device().seconds(params, SCOUT),
            method="estimated" if estimated else "counter",
        )  # fmt: skip
    projection = model.project(params, SCOUT)
    assert projection.basis == "15 finished trials"
    assert projection.joules == pytest.approx(Device().joules(params, SCOUT), rel=0.03)


def test_a_model_of_ones_own_is_learned_from_its_hyper_parameters() -> None:
    """Cost as a power of width and linear in epochs, and a choice of words: nothing of it is said beforehand."""

    def cost(params: dict, epochs: int) -> float:
        return 3e-3 * params["width"] ** 1.7 * (2.0 if params["kind"] == "dear" else 1.0) * epochs

    rng, model = random.Random(4), EnergyModel(None)
    space = [{"width": rng.randint(10, 1000), "kind": rng.choice(["dear", "cheap"])} for _ in range(70)]
    fidelity = Fidelity("one", None, 9, 1)
    for params in space[:30]:
        noise = math.exp(rng.gauss(0, 0.05))
        model.observe(params, fidelity, joules=cost(params, 9) * noise, seconds=cost(params, 9) / 50)
    errors = [abs(model.project(p, fidelity).joules / cost(p, 9) - 1) for p in space[30:]]
    assert np.median(errors) < 0.06
    longer = [model.project(p, replace(fidelity, epochs=27)).joules / cost(p, 27) - 1 for p in space[30:]]
    assert np.median(np.abs(longer)) < 0.15
    unseen = model.project({"width": 300, "kind": "another"}, fidelity)
    assert math.isfinite(unseen.joules_high)


value = st.one_of(
    st.none(), st.booleans(), st.text(max_size=5), st.integers(-(10**9), 10**9),
    st.floats(allow_nan=True, allow_infinity=True), st.lists(st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from("abc"), value, max_size=3),
            st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True)),
            st.floats(allow_nan=True),
        ),
        max_size=8,
    ),
    st.dictionaries(st.sampled_from("abcd"), value, max_size=4),
)
def test_no_history_breaks_it(history: list, params: dict) -> None:
    model = EnergyModel(None)
    for seen, joules, share in history:
        model.observe(seen, SCOUT, joules=joules, seconds=joules, share=share)
    projection = model.project(params, FINAL)
    known = not math.isnan(projection.joules)
    assert known == (not projection.basis.startswith("no trial yet"))
    if known:
        assert 0 <= projection.joules_low <= projection.joules <= projection.joules_high


def test_thousands_of_trials_keep_what_a_few_hundred_taught() -> None:
    """What is learned from at once is bounded, and each fidelity keeps its share of it."""
    model = observed(physical(), 3000, random.Random(21), noise=0.1)
    observed(model, 20, random.Random(22), noise=0.1, fidelity=FINAL)
    params = draw(random.Random(23))
    assert model.project(params, FINAL).basis == "3020 finished trials, 20 of them at this fidelity"
    rows = model._fit("joules")._regression._rows.fidelity
    assert len(rows) <= MOST_ROWS
    assert len(np.unique(rows[:, 0])) == 2
    assert model.project(params, FINAL).joules == pytest.approx(Device().joules(params, FINAL), rel=0.1)


def test_all_structures_are_those_of_the_work_or_as_many_as_were_named() -> None:
    everything = replace(SCOUT, structures=None)
    params = draw(random.Random(0))
    known = observed(physical(), 40, random.Random(1)).project(params, everything)
    assert known.joules == pytest.approx(Device().joules(params, everything), rel=0.03)
    own = EnergyModel(None, SPACE)
    for epochs in (1, 2, 3):
        own.observe(params, replace(SCOUT, epochs=epochs), joules=100.0 * epochs, seconds=10.0)
    assert own.project(params, everything)[:6] == own.project(params, SCOUT)[:6]


def test_joules_may_be_unknown_for_good() -> None:
    model, params = physical(), draw(random.Random(0))
    model.observe(params, SCOUT, joules=None, seconds=12.0)
    projection = model.project(params, SCOUT)
    assert projection.seconds == pytest.approx(12, rel=0.1)
    blind = EnergyModel(None)
    blind.observe(params, SCOUT, joules=None, seconds=12.0)
    assert math.isnan(blind.project(params, SCOUT).joules)
    assert blind.project(params, SCOUT).basis == "1 finished trial"


def test_a_thousand_at_once_are_those_one_by_one() -> None:
    model = observed(physical(), 30, random.Random(0), noise=0.1)
    rng = random.Random(1)
    many = [draw(rng) for _ in range(50)]
    assert model.joules(many, FINAL) == pytest.approx([model.project(p, FINAL).joules for p in many])


def test_a_probe_measures_this_device() -> None:
    prior = probe_device("this CPU", watts=10.0)
    assert 1e8 < prior.flops_per_second < 1e13
    assert 1e8 < prior.bytes_per_second < 1e13
    assert 1e-7 < prior.seconds_per_operation < 1e-2
    assert prior.watts == 10.0
    assert prior.factor == 3.0


def config_of(**resources: object) -> RunConfig:
    return RunConfig.model_validate({
        "name": "p", "run_dir": "runs/p", "data": {"sources": {"qm7x": "sample"}}, "resources": resources,
        "telemetry": {"rated_watts_per_core": 7.0},
        "search": {"space": {"hidden_dim": {"low": 8, "high": 64}}, "stages": [{"name": "s", "trials": 1}]},
    })  # fmt: skip


def test_the_prior_of_a_run_is_this_machines_or_wider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    here = prior_of(config_of(gpus_per_rank=0, cpus_per_rank=2))
    assert (here.name, here.watts, here.factor) == ("this CPU", 14.0, 3.0)
    elsewhere = prior_of(config_of(gpus_per_rank=0, address="10.0.0.1:6379"))
    assert (elsewhere.watts, elsewhere.factor) == (7.0, 10.0)
    assert "need not be like" in elsewhere.name


def test_a_gpu_that_cannot_be_asked_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The question is asked by another process, which is given no GPU here."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    prior = prior_of(config_of(gpus_per_rank=0.5))
    assert (prior.name, prior.watts, prior.factor) == ("any GPU", RATED_WATTS_PER_GPU / 2, 10.0)
