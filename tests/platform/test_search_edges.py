"""Searches at their edges: trials that come to nothing, budgets that change, configurations that come twice."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import wattier
from wattier import run as steps
from wattier.budget import Budget, Verdict
from wattier.config import RunConfig
from wattier.config_search import BudgetSection
from wattier.costs import Costs, refuse_small_training_budget
from wattier.energy_model import EnergyModel
from wattier.errors import UserError
from wattier.fulltrain import train_members
from wattier.funnel import what_was_before
from wattier.launch import LATER
from wattier.ledger import ledger_info
from wattier.multifidelity import MultiFidelitySampler, Observation
from wattier.objectives import Objectives
from wattier.optuna_sampler import MOST_TRIALS, OptunaSampler
from wattier.peak_memory import peak_memory_bytes, reset_peak_memory
from wattier.policy import SearchPolicy
from wattier.records import EpochRecord, Fidelity, TrialResult
from wattier.rundir import FULL_STAGE, RunDir, append_json_line, write_json
from wattier.sampler import Ended, Known
from wattier.select import select_trials
from wattier.space import random_points, typed_space
from wattier.warm_start import PriorTrial
from wattier_telemetry import EnergyReport, Share
from wattier_telemetry.journal import Journal

SPACE = {"width": {"low": 1.0, "high": 8.0}, "kind": {"choices": ["a", "b"]}}
FULL = Fidelity(FULL_STAGE, None, 4, 1)


def config_of(path, stages=None, **search):
    search = {"space": SPACE, "stages": stages or [{"name": "only", "trials": 8, "epochs": 4}], **search}
    return RunConfig.model_validate({"name": "demo", "run_dir": str(path), "trial": "mine:train", "search": search})


def row(trial_id, width, *, stage="only", status="complete", joules=10.0, loss=0.5, epochs=4, **more):
    shares = [] if joules is None else [Share(f"d{trial_id}", "gpu", 0.0, 1.0, 1.0, joules, "counter")]
    return TrialResult(
        "demo", trial_id, {"width": width, "kind": "a"}, Fidelity(stage, None, epochs, 1), status, loss, {}, epochs, 40,
        1.0, EnergyReport.of(shares), **more,
    )  # fmt: skip


def search(path, train, stages, **more):
    given = {"space": SPACE, "launcher": "inline", "quiet": True, "telemetry": {"source": "stated"}, **more}
    return wattier.search(run_trial=train, stages=stages, run_dir=path, resources={"retries": 0}, **given)


def costing(joules):
    """A training whose every epoch costs so many joules, of its parameters."""

    def train(trial):
        for epoch in range(1, trial.epochs + 1):
            if not trial.report(
                trial.params["width"] / epoch, energy_joules=joules(trial.params) * epoch, seconds=epoch
            ):
                return

    return train


class TestWhatCameToNothing:
    @pytest.mark.parametrize("sampler", ["mf_ehvi", "tpe"])
    def test_what_raises_is_not_tried_again(self, tmp_path, sampler):
        def out_of_memory(_):
            raise MemoryError

        found = search(tmp_path / "run", out_of_memory, [{"name": "only", "trials": 6}], sampler=sampler)
        assert len({json.dumps(trial.params) for trial in found.trials}) == 6

    def test_what_cannot_be_compared_is_not_tried_again(self, tmp_path):
        def without_joules(trial):
            trial.report(trial.params["width"])

        found = search(tmp_path / "run", without_joules, [{"name": "only", "trials": 6}])
        assert len({json.dumps(trial.params) for trial in found.trials}) == 6
        assert found.front == []

    def test_a_finite_space_whose_trials_all_fail_ends_with_a_note(self, tmp_path):
        def out_of_memory(_):
            raise MemoryError

        space = {"kind": {"choices": ["a", "b", "c"]}}
        stages = [{"name": "scout", "trials": 5}, {"name": "final", "trials": 2, "promote": 1}]
        found = search(tmp_path / "run", out_of_memory, stages, space=space)
        assert [(trial.fidelity.stage, trial.status) for trial in found.trials] == [("scout", "failed")] * 3
        notes = json.loads((tmp_path / "run" / "search.json").read_text())
        assert [notes[name]["missing"] for name in ("scout", "final")] == [2, 2]  # nor in the stage behind it

    def test_later_stages_and_later_campaigns_know_of_it(self, tmp_path):
        stages = [{"name": "only", "trials": 3, "epochs": 2}, {"name": "final", "trials": 3, "epochs": 4}]
        config = config_of(tmp_path / "run", stages)
        run = RunDir.create(config)
        append_json_line(run.trials_path, row("only-000", 2.0, status="failed", loss=None).to_dict())
        append_json_line(run.trials_path, row("only-001", 3.0, status="pruned", loss=None, diverged=True).to_dict())
        append_json_line(run.trials_path, row("only-002", 4.0).to_dict())
        prior = PriorTrial({"width": 5.0, "kind": "a"}, None, None, 3.0, "pruned", "elsewhere")
        objectives = Objectives.of(config.search)
        before = what_was_before(run, config, config.search.stages[1], objectives, None, None, [prior])
        assert sorted(params["width"] for params in before.lost) == [2.0, 3.0, 5.0]
        assert [point.params["width"] for point in before.points] == [4.0]


def test_a_region_where_trials_are_lost_is_soon_left_alone():
    """The largest models are the best, and do not fit: fewer are lost than where nobody learns, 27 of 80."""
    space = typed_space(
        config_of("/nowhere", space={"width": {"low": 1.0, "high": 8.0}, "depth": {"low": 1, "high": 6}})
    )
    lost_in_all = 0
    for seed in range(4):
        sampler, seen, lost = MultiFidelitySampler(space, seed), [], []
        for _ in range(20):
            params = sampler.suggest(seen, lost=lost)
            size = params["width"] * params["depth"]
            loss = 1 / params["width"] + 0.3 / params["depth"]
            if size > 20:
                lost.append(params)
            else:
                seen.append(Observation(params, 1.0, loss, size, {}, True))
        assert min(o.loss for o in seen) < 0.4
        lost_in_all += len(lost)
    assert lost_in_all <= 16


def test_joules_of_a_longer_trial_elsewhere_are_those_of_a_shorter_one_here(tmp_path):
    """80 J for 8 epochs are 10 J for one, though no fidelity is above this stage's."""
    stages = [{"name": "scout", "trials": 3, "epochs": 1, "structures": 100}]
    config = config_of(tmp_path / "run", stages)
    prior = PriorTrial({"width": 5.0, "kind": "a"}, Fidelity("final", 100, 8, 1), 0.3, 80.0, "complete", "elsewhere")
    objectives, run = Objectives.of(config.search), RunDir.create(config)
    before = what_was_before(run, config, config.search.stages[0], objectives, None, 100, [prior])
    assert [(o.joules, o.fidelity < 1) for o in before.observations] == [(pytest.approx(10.0), True)]


class TestPromotion:
    def test_another_budget_may_promote_others_and_repeats_none(self, tmp_path):
        """`only-000` ran the configuration that is now the second best; the best has not run."""
        config = config_of(tmp_path / "run", sampler="random")
        run = RunDir.create(config)
        append_json_line(run.trials_path, row("only-000", 2.0).to_dict())
        promoted = [{"width": width, "kind": "a"} for width in (1.0, 2.0, 3.0)]
        policy = SearchPolicy(config, config.search.stages[0], run=run, promoted=promoted)
        proposals = [policy.propose() for _ in range(7)]
        assert [p.params["width"] for p in proposals[:2]] == [1.0, 3.0]
        assert all(p.params["width"] not in (1.0, 2.0, 3.0) for p in proposals[2:])
        assert [p.trial_id for p in proposals] == [f"only-00{i}" for i in range(1, 8)]
        assert policy.propose() is None

    def test_a_configuration_that_ran_twice_is_promoted_once(self, tmp_path):
        def train(trial):
            for epoch in range(1, trial.epochs + 1):
                if not trial.report(0.5 + "abc".index(trial.params["kind"]), energy_joules=3.0 * epoch):
                    return

        stages = [{"name": "scout", "trials": 12, "reduction_factor": None},
                  {"name": "final", "trials": 3, "epochs": 2, "promote": 3, "reduction_factor": None}]  # fmt: skip
        found = search(tmp_path / "run", train, stages, space={"kind": {"choices": ["a", "b", "c"]}}, sampler="random")
        assert sorted(t.params["kind"] for t in found.trials if t.fidelity.stage == "final") == ["a", "b", "c"]


@pytest.mark.parametrize("scheduler", ["asha", "pareto"])
@pytest.mark.parametrize("resumed", [False, True])
def test_what_used_more_than_is_allowed_stops_nobody(tmp_path, scheduler, resumed):
    config = config_of(tmp_path / "run", [{"name": "only", "trials": 20, "epochs": 9}], scheduler=scheduler,
                       sampler="random", constraints={"memory_bytes": 1e9})  # fmt: skip
    run = RunDir.create(config)

    def policy_now():
        return SearchPolicy(config, config.search.stages[0], run=run)

    def epoch(number, loss, joules):
        return EpochRecord(number, loss, loss, {}, 10 * number, 1.0, None, number * joules, 1.0 + number)

    policy = policy_now()
    for _ in range(8):
        proposal = policy.propose()
        run.trial_folder("only", proposal.trial_id).mkdir(parents=True)
        for number in range(1, 10):
            record = epoch(number, 0.1 / number, 1.0)
            policy.on_epoch(proposal.trial_id, record)
            append_json_line(run.trial_folder("only", proposal.trial_id) / "epochs.jsonl", record.to_dict())
        greedy = replace(
            row(proposal.trial_id, 1.0, epochs=9, loss=0.01), params=proposal.params,
            limit_ratios={"memory_bytes": 2.0},
        )  # fmt: skip
        policy.on_result(greedy)
        append_json_line(run.trials_path, greedy.to_dict())
    if resumed:
        policy = policy_now()
    modest = policy.propose()
    assert all(policy.on_epoch(modest.trial_id, epoch(number, 5.0 / number, 3.0)) for number in range(1, 10))


def test_a_loss_comes_first_in_whatever_order_objectives_are_named(tmp_path):
    config = config_of(tmp_path / "run", objectives=["energy_joules", "val_loss"])
    assert Objectives.of(config.search).of_result(row("only-000", 1.0)) == (0.5, 10.0)
    swapped = config_of(tmp_path / "run", objectives=["energy_joules", "val_loss"],
                        weights={"energy_joules": 0.1, "val_loss": 2.0})  # fmt: skip
    assert Objectives.of(swapped.search).of_result(row("only-000", 1.0)) == pytest.approx((2.0,))


class TestBudget:
    def test_a_member_that_was_not_paid_has_not_started(self, tmp_path):
        run = RunDir.create(config_of(tmp_path / "run"))
        for number in range(3):
            folder = run.trial_folder(FULL_STAGE, f"only-00{number}")
            folder.mkdir(parents=True)
            (folder / "error.txt").write_text("not started")
            refused = row(folder.name, 1.0, stage=FULL_STAGE, status="failed", joules=None)
            append_json_line(run.trials_path, refused.to_dict())
        write_json(run.trial_folder(FULL_STAGE, "only-000") / "trial.json", {"trial_id": "only-000", "params": {}})
        budget = Budget(BudgetSection(trials=2), run, [FULL_STAGE])
        assert budget.spent().trials == 1
        budget.opened(FULL_STAGE, "only-001", None)
        assert budget.verdict(FULL_STAGE, "only-002", None, None).value == "stop"

    def test_it_says_what_the_ledger_says(self, tmp_path):
        """A rank that went on after its trial was given up is in its journal, and not in the trial's row."""
        config = config_of(tmp_path / "run")
        run = RunDir.create(config)
        folder = run.trial_folder("only", "only-000")
        folder.mkdir(parents=True)
        failed = row("only-000", 1.0, status="failed", joules=10.0)
        append_json_line(run.trials_path, failed.to_dict())
        journal = Journal(folder / "attempt1-rank0.energy.json")
        journal.finish(EnergyReport.of([Share("donly-000", "gpu", 0.0, 2.0, 1.0, 15.0, "counter")]))
        assert Budget(None, run, ["only"]).spent().joules == ledger_info(run).total.joules == pytest.approx(15.0)

    def test_a_larger_one_lets_an_early_stage_go_on_whatever_later_ones_spent(self, tmp_path):
        stages = [{"name": "scout", "trials": 12, "reduction_factor": None},
                  {"name": "final", "trials": 4, "epochs": 4, "promote": 3, "reduction_factor": None}]  # fmt: skip
        train = costing(lambda params: 10 - params["width"])
        path = tmp_path / "run"
        first = search(path, train, stages, budget={"joules": 90.0}, sampler="random")
        count = sum(trial.fidelity.stage == "scout" for trial in first.trials)
        assert count < 12
        assert "for the stages up to this one" in json.loads((path / "search.json").read_text())["scout"]["reason"]
        found = search(path, train, stages, budget={"joules": 1000.0}, sampler="random")
        assert len(found.trials) == 16
        finals = [json.dumps(t.params) for t in found.trials if t.fidelity.stage == "final"]
        assert len(set(finals)) == 4
        assert search(path, train, stages, budget={"joules": 50.0}, sampler="random").spent.trials == 16

    def test_a_stage_may_start_one_trial_whatever_its_share(self, tmp_path):
        run = RunDir.create(config_of(tmp_path / "run"))
        budget = Budget(BudgetSection(joules=100.0, seconds=100.0), run, ["scout", "final"], 0.1, ["scout"])
        assert budget.verdict("scout", "a", 20.0, 20.0) is Verdict.START
        assert budget.verdict("scout", "a", 101.0, 20.0) is Verdict.STOP
        assert budget.verdict("scout", "a", 20.0, 101.0) is Verdict.STOP
        budget.opened("scout", "a", 20.0)
        assert budget.verdict("scout", "b", 20.0, 1.0) is Verdict.STOP
        assert "of the 10.0 J for the stages up to this one" in budget.refused

    def test_a_stage_on_all_data_is_not_taken_for_one_on_none(self, tmp_path):
        stages = [{"name": "scout", "trials": 12, "structures": 100, "reduction_factor": None},
                  {"name": "final", "trials": 3, "epochs": 10, "promote": 1, "reduction_factor": None}]  # fmt: skip
        found = search(tmp_path / "run", costing(lambda _: 1.0), stages, budget={"joules": 21.0}, sampler="random")
        assert found.front
        assert found.spent.joules <= 21.0

    @pytest.mark.parametrize(
        ("budget", "what"),
        [({"trials": 0}, r"full_training\.budget\.trials: is 0, but the cheapest member needs about 1 trial"),
         ({"seconds": -1.0}, r"full_training\.budget\.seconds: is -1, but must be above 0"),
         ({"joules": 5.0}, r"full_training\.budget\.joules: is 5, but the cheapest member needs about")],
    )  # fmt: skip
    def test_one_of_full_training_that_pays_for_nobody_is_refused(self, tmp_path, budget, what):
        config = config_of(tmp_path / "run")
        full = config.full_training.model_copy(update={"budget": BudgetSection(**budget)})
        config = config.model_copy(update={"full_training": full})
        model = EnergyModel(None, typed_space(config))
        for width in (1.0, 4.0, 8.0):
            model.observe({"width": width, "kind": "a"}, FULL, joules=30.0 * width, seconds=None)
        picked = [{"width": 2.0, "kind": "a"}]
        with pytest.raises(UserError, match=what):
            refuse_small_training_budget(RunDir(tmp_path / "run"), config, Costs(model), picked, FULL)

    def test_what_full_training_does_not_pay_for_is_one_row_however_often_it_is_asked(self, tmp_path):
        class NothingStarts:
            def run(self, stage, policy, run_trial, on_result):
                assert policy.propose() is None

        config = RunConfig.model_validate(
            {
                "name": "demo",
                "run_dir": str(tmp_path / "run"),
                "data": {"sources": {"ani1x": "sample"}},
                "search": {"space": {"hidden_dim": {"low": 8, "high": 16}}, "stages": [{"name": "only", "trials": 3}]},
                "full_training": {"budget": {"trials": 0}},
            }
        )
        run = RunDir.create(config)
        for number in range(3):
            append_json_line(run.trials_path, row(f"only-00{number}", 1.0 + number, loss=0.5 - 0.1 * number).to_dict())
        selection = select_trials(run.trials(), config.select, stage="only", project=lambda _: None)
        write_json(run.selection_path, selection.to_dict())
        for _ in range(2):
            heard = []
            with pytest.raises(UserError, match=r"not started: 0 trials have started, of 0"):
                train_members(run, config, NothingStarts(), None, heard.append)
            assert [result.trial_id for result in heard] == list(selection.picked)
            assert len(run.trials_path.read_text().splitlines()) == 3 + len(selection.picked)

    def test_a_last_stage_that_it_left_empty_is_named_as_such(self, tmp_path):
        stages = [{"name": "scout", "trials": 3}, {"name": "final", "trials": 2, "promote": 1}]
        search(tmp_path / "run", costing(lambda _: 1.0), stages, budget={"trials": 3})
        run = RunDir.open(tmp_path / "run")
        with pytest.raises(UserError, match=r"no trial of stage 'final' was started: 3 trials .* Raise search\.budget"):
            steps.select(run, run.config(), listener=None)


class TestWhatIsLeft:
    """Of a budget: what is compared may be joules a structure, what is left is joules."""

    def cost_of(self, many):
        return np.exp([params["width"] for params in many])

    def test_the_first_trials_are_such_as_can_be_paid(self):
        sampler = MultiFidelitySampler(typed_space(config_of("/nowhere")), 0)
        cheap = [{"width": width, "kind": kind} for width in (1.0, 1.5, 2.0, 2.5) for kind in ("a", "b")]
        params = sampler.suggest([], pending=cheap, cost=self.cost_of, affordable_joules=20.0)
        assert math.exp(params["width"]) <= 20.0

    def test_and_so_are_later_ones_whatever_is_compared(self):
        space = typed_space(config_of("/nowhere"))
        points = random_points(space, 14, 1)
        seen = [Observation(p, 1.0, 9 - p["width"], math.exp(p["width"]) / 1000, {}, True) for p in points]
        params = MultiFidelitySampler(space, 0).suggest(seen, cost=self.cost_of, affordable_joules=8.0)
        assert math.exp(params["width"]) <= 8.0


def test_a_study_of_trials_that_were_all_stopped_is_bounded_too():
    space = typed_space(config_of("/nowhere"))
    sampler = OptunaSampler("tpe", space, seed=1, n_objectives=2)
    for index, params in enumerate(random_points(space, MOST_TRIALS + 10, 7)):
        sampler.ended(Ended(f"t{index}", params, "pruned", None, {}, {}))
    assert sampler.suggest("new", Known()) is not None
    assert len(sampler.study.trials) <= MOST_TRIALS


def test_costs_hear_of_each_trial_once_and_of_those_that_were_adopted(tmp_path):
    config = config_of(tmp_path / "run", sampler="random")
    run = RunDir.create(config)
    costs = Costs(EnergyModel(None, typed_space(config)))
    adopted = row("only-000", 2.0)
    append_json_line(run.trials_path, adopted.to_dict())  # after the costs were read
    policy = SearchPolicy(config, config.search.stages[0], run=run, costs=costs)
    known = costs.project({"width": 2.0, "kind": "a"}, adopted.fidelity)
    assert known is not None
    for _ in range(5):
        costs.learn(adopted)
    assert costs.project({"width": 2.0, "kind": "a"}, adopted.fidelity) == known
    assert policy.propose() is not LATER


def test_a_config_is_not_replaced_while_a_run_goes_on(tmp_path):
    run = RunDir.create(config_of(tmp_path / "run", budget={"joules": 10.0}))
    (run.path / "trials").mkdir()
    before = run.config_path.read_text()
    with run.lock(), pytest.raises(UserError, match="another wattier is running here"):
        RunDir.create(config_of(tmp_path / "run", budget={"joules": 20.0}))
    assert run.config_path.read_text() == before
    RunDir.create(config_of(tmp_path / "run", budget={"joules": 20.0}))
    assert run.config_path.read_text() != before


def test_the_peak_of_a_trial_is_not_that_of_the_one_before_it_in_the_same_process(monkeypatch):
    """On a GPU torch keeps what was freed, and a peak begins at what is kept."""
    gpu = SimpleNamespace(used=0, kept=0, peak=0)

    def train(size):
        gpu.kept = max(gpu.kept, gpu.used + size)
        gpu.peak = max(gpu.peak, gpu.kept)

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(gpu, "kept", gpu.used))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: setattr(gpu, "peak", gpu.kept))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: gpu.peak)
    device, peaks = torch.device("cuda", 0), []
    for size in (1000, 10):
        reset_peak_memory(device)
        train(size)
        peaks.append(peak_memory_bytes(device))
    assert peaks == [1000, 10]
