"""What the driver tells the exporter of its campaign is what the run's records say, and never in the run's way."""

import json
import logging
import math
import time
from dataclasses import replace

import pytest

import wattier
from wattier.campaign import campaign_shown
from wattier.campaign_reasons import reason_class
from wattier.campaign_standing import CampaignStanding
from wattier.config_search import BudgetSection
from wattier.launch import Stage
from wattier.outcome import reason_of, reason_of_death
from wattier.records import Fidelity, Proposal
from wattier.rundir import append_json_line
from wattier.views import ledger_info
from wattier_telemetry import Share
from wattier_telemetry.campaign import REASONS, STATUSES, read_campaigns
from wattier_telemetry.journal import Journal

BEGAN = 2_000_000_000.0


def look(run, *, config=None, after=100.0, expected=None, phase="search"):
    return CampaignStanding(run, config or run.config(), BEGAN, expected or {}).look(phase, BEGAN + after)


def by_stage(registration):
    return {stage.stage: stage for stage in registration.stages}


class TestStanding:
    def test_joules_by_phase_are_the_ledgers(self, whole_run):
        found = {phase.phase: phase for phase in look(whole_run).phases}
        ledger = {phase.phase: phase for phase in ledger_info(whole_run).phases}
        assert found.keys() == ledger.keys()
        for name, phase in ledger.items():
            assert found[name].joules == pytest.approx(phase.joules)
            assert found[name].joules_low == pytest.approx(phase.joules_low)
            assert found[name].joules_high == pytest.approx(phase.joules_high)

    def test_stages(self, whole_run):
        """Counted by hand in `search_specs`: 14 of wide; of deep 10, one diverged, one failed, one left no record."""
        stages = by_stage(look(whole_run))
        assert stages["wide"].statuses == dict(zip(STATUSES, (0, 0, 10, 4, 0, 0), strict=True))
        assert stages["deep"].statuses == dict(zip(STATUSES, (0, 0, 7, 4, 1, 1), strict=True))
        assert stages["deep"].failures == {"diverged": 1, "out_of_memory": 1}
        selection = whole_run.selection()
        assert stages["full"].planned == len(selection.picked) == stages["full"].statuses["complete"]
        assert stages["deep"].hypervolume == pytest.approx(selection.hypervolume)
        losses = [t.val_loss for t in whole_run.trials("deep") if t.status == "complete"]
        assert stages["deep"].best_val_loss == min(losses)

    def test_ended_trials(self, whole_run):
        found = {(t.stage, t.trial): (t.status, t.val_loss, t.joules) for t in look(whole_run).trials}
        rows = {(t.fidelity.stage, t.trial_id): (t.status, t.val_loss, t.energy_joules) for t in whole_run.trials()}
        assert found == rows

    def test_an_empty_run(self, empty_run):
        registration = look(empty_run, after=0.0)
        assert [stage.statuses["waiting"] for stage in registration.stages] == [12, 12]
        assert registration.phases == () and registration.trials == () and registration.budgets == ()
        assert registration.phase == "search:wide"
        assert registration.forecasts[0].joules is None  # nobody knows what a trial costs

    def test_what_runs_and_what_was_interrupted(self, searched_run):
        """A trial that this driver has opened runs; one that another left waits to be taken up again."""
        stage = Stage(searched_run, searched_run.config(), Fidelity("deep", None, 6, 1), 12)
        stage.open_trial(Proposal("deep-50", {}))
        standing = CampaignStanding(searched_run, searched_run.config(), time.time(), {})
        found = by_stage(standing.look("search", time.time()))["deep"].statuses
        assert (found["running"], found["interrupted"]) == (1, 1)
        later = CampaignStanding(searched_run, searched_run.config(), time.time() + 60, {})
        found = by_stage(later.look("search", time.time()))["deep"].statuses
        assert (found["running"], found["interrupted"]) == (0, 2)

    def test_a_row_that_comes_later_is_seen(self, empty_run, trial):
        standing = CampaignStanding(empty_run, empty_run.config(), BEGAN, {})
        assert by_stage(standing.look("search", BEGAN))["wide"].hypervolume is None
        for i in range(3):
            append_json_line(
                empty_run.trials_path, trial(f"w{i}", stage="wide", joules=10.0 + i, val_loss=1.0 - 0.1 * i).to_dict()
            )
        found = by_stage(standing.look("search", BEGAN + 1))["wide"]
        assert found.statuses["complete"] == 3 and found.hypervolume > 0


class TestForecast:
    """A simulated search: trials of 100 J one after the other, 10 s each, so 10 W."""

    def _searched(self, run, trial, count):
        for i in range(count):
            append_json_line(run.trials_path, trial(f"w{i}", stage="wide", joules=100.0).to_dict())

    def test_is_the_truth_where_trials_are_alike(self, empty_run, trial):
        standing = CampaignStanding(empty_run, empty_run.config(), BEGAN, {"wide": 55.0, "deep": 300.0})
        (first,) = standing.look("search", BEGAN).forecasts
        assert first.joules == pytest.approx(12 * 55 + 12 * 300)  # nothing has run: the energy model's word
        assert first.ends_seconds is None
        self._searched(empty_run, trial, 6)
        (found,) = standing.look("search", BEGAN + 60).forecasts
        assert found.joules == pytest.approx(12 * 100 + 12 * 300)  # what trials took goes before what was expected
        assert found.ends_seconds == pytest.approx(BEGAN + 60 + (6 * 100 + 12 * 300) / 10)

    def test_counts_what_an_earlier_driver_spent_but_not_its_speed(self, empty_run, trial):
        self._searched(empty_run, trial, 6)
        standing = CampaignStanding(empty_run, empty_run.config(), BEGAN, {"deep": 300.0})
        assert standing.look("search", BEGAN).forecasts[0].joules == pytest.approx(12 * 100 + 12 * 300)
        for i in range(6, 8):
            append_json_line(empty_run.trials_path, trial(f"w{i}", stage="wide", joules=100.0).to_dict())
        (found,) = standing.look("search", BEGAN + 20).forecasts
        assert found.ends_seconds == pytest.approx(BEGAN + 20 + (4 * 100 + 12 * 300) / 10)

    def test_a_stage_that_the_budget_ended_takes_nothing_more(self, searched_run):
        (found,) = look(searched_run).forecasts
        spent = math.fsum(p.joules for p in ledger_info(searched_run).phases if p.phase.startswith("search"))
        assert found.joules == pytest.approx(spent) and found.ends_seconds is None

    def test_of_full_training(self, whole_run):
        forecasts = {one.forecast: one for one in look(whole_run).forecasts}
        full = next(p.joules for p in ledger_info(whole_run).phases if p.phase == "full training")
        assert forecasts["full_training"].joules == pytest.approx(full)  # it is over


class TestBudget:
    def test_shares_of_each_limit(self, searched_run):
        limits = BudgetSection(joules=2e6, trials=100, seconds=1e6)
        config = searched_run.config()
        config = config.model_copy(update={"search": config.search.model_copy(update={"budget": limits})})
        (budget,) = look(searched_run, config=config).budgets
        (later,) = look(searched_run, config=config, phase="evaluation").budgets
        spent = math.fsum(p.joules for p in ledger_info(searched_run).phases if p.phase.startswith("search"))
        assert budget.joules == 2e6
        assert budget.spent_joules == pytest.approx(spent)  # with the trial that was killed and left no record
        trials = len(searched_run.trials()) + 1
        # Each of them has a share of 60 s, begun 100 s after the one before; nothing overlaps.
        ratios = {"joules": spent / 2e6, "trials": trials / 100, "seconds": 60.0 * trials / 1e6}
        assert budget.used_ratios == pytest.approx(ratios, rel=1e-2)
        assert set(later.used_ratios) == {"joules", "trials"}


class TestReasons:
    @pytest.mark.parametrize(
        ("error", "wanted"),
        [
            (reason_of(MemoryError("numpy")), "out_of_memory"),
            (reason_of(RuntimeError("CUDA out of memory. Tried to allocate")), "out_of_memory"),
            (reason_of(ZeroDivisionError("x")), "error"),
            ("it stalled: no epoch for 600 s (resources.stall_seconds), so its processes were killed", "stalled"),
            ("not started: 2 of 2 are spent (full_training.budget)", "over_budget"),
            (None, "error"),
        ],
    )
    def test_of_a_failed_trial(self, trial, error, wanted):
        assert reason_class(trial("t", status="failed", error=error)) == wanted in REASONS

    def test_of_a_death(self, trial, tmp_path, monkeypatch):
        monkeypatch.setattr("wattier.outcome.LAST_WORDS_SECONDS", 0.0)
        killed = reason_of_death(tmp_path / "output.txt")
        lost = reason_of_death(tmp_path / "output.txt", "The actor died because its node has died.")
        classes = [reason_class(trial("t", status="failed", error=error)) for error in (killed, lost)]
        assert classes == ["killed", "node_lost"]

    def test_a_trial_that_ended_well_has_none(self, trial):
        assert reason_class(trial("t")) is None
        assert reason_class(trial("t", status="pruned")) is None
        assert reason_class(trial("t", status="pruned", diverged=True)) == "diverged"


@pytest.fixture
def registry(tmp_path, monkeypatch):
    monkeypatch.setenv("WATTIER_REGISTRY", str(tmp_path / "registry"))
    return tmp_path / "registry"


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    return condition()


class TestShown:
    def test_a_search_shows_itself_and_withdraws(self, registry, tmp_path):
        """From within its own trial: it runs, the other waits; and after the search nothing is left."""
        seen = []

        def statuses(campaign):
            return by_stage(campaign)["only"].statuses

        def trial(one):
            wanted = {"running": 1, "complete": len(seen)}
            seen.append(
                until(lambda: [c for c in read_campaigns(registry) if wanted.items() <= statuses(c).items()])[0]
            )
            one.report(0.5, energy_joules=10.0, seconds=1.0)

        wattier.search(
            {"width": {"low": 8, "high": 64}}, trial, [{"name": "only", "trials": 2, "epochs": 1}],
            run_dir=tmp_path / "run", telemetry={"source": "stated"}, launcher="inline", quiet=True, sampler="random",
            budget={"joules": 100.0},
        )  # fmt: skip
        assert [statuses(campaign)["waiting"] for campaign in seen] == [1, 0]
        assert seen[0].phase == "search:only" and seen[0].budgets[0].joules == 100
        assert not list(registry.iterdir())

    def test_a_registry_that_cannot_be_written_is_told_once(self, registry, empty_run, caplog, monkeypatch):
        monkeypatch.setattr("wattier.campaign.PERIOD_SECONDS", 0.01)
        registry.write_text("a file, where a folder should be")
        with caplog.at_level(logging.WARNING), campaign_shown(empty_run, empty_run.config(), "search"):
            until(lambda: caplog.records)
            time.sleep(0.1)
        assert [record.levelname for record in caplog.records] == ["WARNING"]

    def test_records_that_are_damaged_do_not_stop_the_run(self, registry, empty_run, caplog):
        empty_run.trials_path.write_text("{}\n{}\n")
        with caplog.at_level(logging.WARNING), campaign_shown(empty_run, empty_run.config(), "search"):
            assert until(lambda: caplog.records)
        assert not registry.exists() or not list(registry.iterdir())

    def test_of_many_trials_the_newest_are_told(self, empty_run, trial):
        with empty_run.trials_path.open("a") as file:
            for i in range(2000):
                row = trial(f"w{i}", stage="wide", joules=100.0 + i % 7, val_loss=1.0 + i % 11).to_dict()
                file.write(json.dumps(row) + "\n")
        standing = CampaignStanding(empty_run, empty_run.config(), BEGAN, {})
        registration = standing.look("search", BEGAN)
        assert len(registration.trials) == 1000 and registration.not_shown == 1000
        assert registration.trials[-1].trial == "w1999"


def test_shares_of_two_domains_are_one_bill(empty_run, trial):
    """GPU and CPU joules of a trial add up, with their bounds."""
    result = trial("w0", stage="wide")
    shares = [
        Share("g", "gpu", 0.0, 60.0, 1.0, 100.0, "counter", 1.0, joules_low=95.0, joules_high=105.0),
        Share("c", "cpu", 0.0, 60.0, 1.0, 10.0, "counter", 1.0, joules_low=9.0, joules_high=12.0),
    ]
    energy = type(result.energy).of(shares)
    append_json_line(empty_run.trials_path, replace(result, energy=energy).to_dict())
    journal = Journal(empty_run.phase_folder("data") / "driver.energy.json")
    journal.finish(type(result.energy).of([Share("g", "gpu", 0.0, 1.0, 1.0, 5.0, "counter", 1.0)]))
    phases = {phase.phase: phase for phase in look(empty_run).phases}
    wide = phases["search:wide"]
    assert (wide.joules, wide.joules_low, wide.joules_high) == pytest.approx((110, 104, 117))
    assert phases["data"].joules == 5
