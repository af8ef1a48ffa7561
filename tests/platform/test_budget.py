"""What a search spends: never more than its budget and what the last projections were short by."""

import math
import random

import pytest

from wattier.budget import Budget, Verdict
from wattier.config import RunConfig
from wattier.config_search import BudgetSection
from wattier.costs import Costs, refuse_small_budget
from wattier.energy_model import EnergyModel
from wattier.errors import UserError
from wattier.launch import LATER
from wattier.policy import SearchPolicy
from wattier.records import Fidelity, TrialResult
from wattier.rundir import RunDir, append_json_line
from wattier.space import typed_space
from wattier_telemetry import EnergyReport, Share

RUNS = 30


def config_of(path, *, budget=None, trials=40, sampler="random", **stage):
    return RunConfig.model_validate(
        {
            "name": "demo",
            "run_dir": str(path),
            "trial": "mine:train",
            "search": {
                "sampler": sampler,
                "space": {"width": {"low": 1, "high": 64}, "rate": {"low": 1e-3, "high": 1.0, "log": True}},
                "stages": [{"name": "only", "trials": trials, "epochs": 4, "reduction_factor": None, **stage}],
                "budget": budget,
            },
        }
    )


def result_of(proposal, joules, *, status="complete", start=0.0, seconds=1.0, epochs_done=4):
    share = Share(f"d-{proposal.trial_id}", "gpu", start, start + seconds, 1.0, joules, "counter")
    return TrialResult(
        "demo", proposal.trial_id, proposal.params, Fidelity("only", None, 4, 1), status, 0.5, {}, epochs_done, 40,
        seconds, EnergyReport.of([share]), projected_joules=proposal.projected_joules,
    )  # fmt: skip


class Concurrent:
    """Trials that run at once and end in a random order, each with joules of its own."""

    def __init__(self, policy, workers, joules_of, rng):
        self.policy, self.workers, self.joules_of, self.rng = policy, workers, joules_of, rng
        self.spent, self.short, self.ended, self.waited = 0.0, 0.0, 0, 0

    def run(self):
        active, over = [], False
        at_last_start = []
        while True:
            while not over and len(active) < self.workers:
                proposal = self.policy.propose()
                if proposal is LATER:
                    assert active, "LATER while nothing runs would wait for ever"
                    self.waited += 1
                    break
                if proposal is None:
                    over = True
                    break
                active.append((proposal, self.joules_of(proposal.params)))
                at_last_start = list(active)
            if not active:
                break
            proposal, joules = active.pop(self.rng.randrange(len(active)))
            self.policy.on_result(result_of(proposal, joules))
            self.spent += joules
            self.ended += 1
        self.short = math.fsum(max(0.0, joules - (p.projected_joules or 0.0)) for p, joules in at_last_start)
        return self


@pytest.mark.parametrize("seed", range(RUNS))
def test_no_more_is_spent_than_the_budget_and_what_projections_were_short_by(tmp_path, seed):
    rng = random.Random(seed)
    noise = rng.choice([0.0, 0.1, 0.5])

    def joules_of(params):
        return 3.0 * params["width"] * math.exp(rng.gauss(0, noise))

    limit = rng.uniform(100, 2000)
    config = config_of(tmp_path / "run", budget={"joules": limit}, trials=rng.choice([10, 40]))
    run = RunDir.create(config)
    costs = Costs(EnergyModel(None, typed_space(config)))
    budget = Budget(config.search.budget, run, ["only"])
    policy = SearchPolicy(config, config.search.stages[0], run=run, budget=budget, costs=costs)
    seen = Concurrent(policy, rng.choice([1, 2, 6]), joules_of, rng).run()
    assert seen.ended > 0
    assert seen.spent <= limit + seen.short + 1e-9
    assert budget.spent().joules == pytest.approx(seen.spent)
    if seen.ended < len(policy.trials) + len(policy.free_ids):
        assert budget.refused
        assert "J" in budget.refused


def test_a_trial_waits_while_those_that_run_may_turn_out_cheaper(tmp_path):
    config = config_of(tmp_path / "run", budget={"joules": 100})
    budget = Budget(config.search.budget, RunDir.create(config), ["only"])
    assert budget.verdict("only", "a", 60.0, None) is Verdict.START
    budget.opened("only", "a", 60.0)
    assert budget.joules_left == pytest.approx(40)
    assert budget.verdict("only", "b", 60.0, None) is Verdict.LATER
    assert budget.verdict("only", "b", 101.0, None) is Verdict.STOP
    assert budget.verdict("only", "b", 30.0, None) is Verdict.START
    cheap = result_of(type("P", (), {"trial_id": "a", "params": {}, "projected_joules": 60.0}), 20.0)
    budget.ended(cheap)
    assert budget.verdict("only", "b", 60.0, None) is Verdict.START


def test_what_nobody_can_project_runs_alone(tmp_path):
    budget = Budget(BudgetSection(joules=100), RunDir.create(config_of(tmp_path / "run")), ["only"])
    assert budget.verdict("only", "a", None, None) is Verdict.START
    budget.opened("only", "a", None)
    assert budget.verdict("only", "b", None, None) is Verdict.LATER


def test_totals_hold_over_restarts(tmp_path):
    config = config_of(tmp_path / "run", budget={"joules": 100, "seconds": 1000, "trials": 3})
    run = RunDir.create(config)
    for index, (start, seconds) in enumerate([(0.0, 10.0), (5.0, 10.0)]):  # at once for five seconds
        proposal = type("P", (), {"trial_id": f"only-{index:03d}", "params": {}, "projected_joules": None})
        append_json_line(run.trials_path, result_of(proposal, 40.0, start=start, seconds=seconds).to_dict())
    budget = Budget(config.search.budget, run, ["only"])
    spent = budget.spent()
    assert spent.joules == pytest.approx(80)
    assert spent.trials == 2
    assert spent.seconds == pytest.approx(15, abs=1)
    assert budget.verdict("only", "only-002", 30.0, None) is Verdict.STOP
    assert budget.verdict("only", "only-002", 20.0, 2000.0) is Verdict.STOP
    assert budget.verdict("only", "only-002", 20.0, 2.0) is Verdict.START
    budget.opened("only", "only-002", 20.0)
    assert budget.verdict("only", "only-003", 0.0, 2.0) is Verdict.STOP
    assert "3 trials" in budget.refused


def test_a_stage_leaves_later_ones_their_share(tmp_path):
    run = RunDir.create(config_of(tmp_path / "run"))
    budget = Budget(BudgetSection(joules=100), run, ["only"], share=0.4)
    assert budget.verdict("only", "a", 50.0, None) is Verdict.STOP
    assert budget.verdict("only", "a", 40.0, None) is Verdict.START


@pytest.mark.parametrize(
    ("budget", "what"),
    [
        ({"joules": 0.0}, "search.budget.joules: is 0, but the cheapest trial of stage 'only' needs about"),
        ({"joules": -5.0}, "search.budget.joules: is -5, but"),
        ({"joules": 1.0}, "search.budget.joules: is 1, but the cheapest trial"),
        ({"kilowatt_hours": 1e-9}, "search.budget.kilowatt_hours: is 1e-09, but the cheapest trial"),
        ({"trials": 0}, "search.budget.trials: is 0, but the cheapest trial of stage 'only' needs about 1 trial"),
        ({"seconds": -1.0}, "search.budget.seconds: is -1, but"),
    ],
)
def test_a_budget_below_one_trial_is_refused_with_the_figure_needed(tmp_path, budget, what):
    config = config_of(tmp_path / "run", budget=budget)
    model = EnergyModel(None, typed_space(config))
    for width in (1, 8, 64):
        model.observe({"width": width, "rate": 0.1}, Fidelity("only", None, 4, 1), joules=30.0 * width, seconds=width)
    with pytest.raises(UserError) as refusal:
        refuse_small_budget(config, Costs(model))
    assert str(refusal.value).startswith(what)


def test_without_a_projection_a_budget_must_be_above_zero(tmp_path):
    config = config_of(tmp_path / "run", budget={"joules": 0.0})
    with pytest.raises(UserError, match=r"search\.budget\.joules: is 0, but must be above 0"):
        refuse_small_budget(config, Costs(EnergyModel(None, typed_space(config))))


@pytest.mark.parametrize("budget", [{"joules": math.nan}, {"joules": math.inf}, {"joules": "many"}, {"watts": 3}])
def test_a_budget_of_no_number_is_refused(tmp_path, budget):
    with pytest.raises(ValueError, match="budget"):
        config_of(tmp_path / "run", budget=budget)


def test_joules_and_kilowatt_hours_are_not_both_given(tmp_path):
    with pytest.raises(ValueError, match="joules and kilowatt_hours are both given"):
        config_of(tmp_path / "run", budget={"joules": 3.0, "kilowatt_hours": 1.0})
