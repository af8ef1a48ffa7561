"""What the views say of a whole run, of a half-done one and of one that only has a config."""

import json
import math

import pytest

from wattier.errors import UserError
from wattier.views import (
    evaluation_info,
    learning_curves_info,
    ledger_info,
    pareto_info,
    selection_info,
    trials_info,
)

DRIVER_JOULES = 50 * 2.0


def joules_in(run, pattern, billed):
    return math.fsum(billed(folder) for folder in run.path.glob(pattern))


def test_the_ledger_adds_up_every_journal_in_the_order_of_the_funnel(whole_run, billed):
    ledger = ledger_info(whole_run)
    assert [p.phase for p in ledger.phases] == ["data", "search:wide", "search:deep", "full training", "evaluation"]
    joules = {p.phase: p.joules for p in ledger.phases}
    assert joules["data"] == pytest.approx(DRIVER_JOULES)
    assert joules["search:deep"] == pytest.approx(joules_in(whole_run, "trials/deep/*", billed))
    assert joules["full training"] == pytest.approx(joules_in(whole_run, "trials/full/*", billed))
    assert ledger.total.joules == pytest.approx(math.fsum(joules.values()))
    assert ledger.joules_by_domain["cpu"] == 2500


def test_the_ledger_bills_trials_however_they_ended(whole_run):
    by_status = {entry.status: entry for entry in ledger_info(whole_run).by_status}
    assert list(by_status) == ["complete", "pruned", "failed", "interrupted"]
    assert (by_status["failed"].trials, by_status["failed"].joules) == (1, 300)
    assert (by_status["interrupted"].trials, by_status["interrupted"].joules) == (1, 700)
    for journal in (whole_run.path / "trials" / "deep" / "deep-21").glob("*.energy.json"):
        journal.unlink()
    again = {entry.status: entry for entry in ledger_info(whole_run).by_status}
    recorded = next(t for t in whole_run.trials("deep") if t.trial_id == "deep-21").energy_joules
    assert again["failed"].joules == recorded, "its record still knows"
    trials = ledger_info(whole_run).total.trials
    assert trials == sum(entry.trials for entry in by_status.values()) == len(trials_info(whole_run).rows)


def test_the_ledger_names_methods_and_repeats_warnings(whole_run):
    ledger = ledger_info(whole_run)
    methods = {p.phase: p.method for p in ledger.phases}
    assert methods["data"] == "integrated"
    assert methods["search:wide"] == "counter"
    assert methods["evaluation"] == ledger.total.method == "estimated"
    assert "no counter: estimated" in ledger.total.warnings
    assert any("was not closed" in text for text in ledger.total.warnings)


def test_a_share_that_two_folders_claim_is_counted_once(searched_run):
    before = ledger_info(searched_run).total.joules
    copy = searched_run.phase_folder("wide")
    copy.mkdir(parents=True)
    original = searched_run.trial_folder("wide", "wide-00") / "rank0.energy.json"
    (copy / "driver.energy.json").write_bytes(original.read_bytes())
    ledger = ledger_info(searched_run)
    assert ledger.total.joules == pytest.approx(before)
    assert [p.phase for p in ledger.phases].count("search:wide") == 1


def test_a_trial_whose_folder_is_gone_is_still_billed(searched_run):
    before = ledger_info(searched_run).total.joules
    folder = searched_run.trial_folder("wide", "wide-00")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert ledger_info(searched_run).total.joules == pytest.approx(before)


def test_unknown_energy_stays_unknown(empty_run):
    assert ledger_info(empty_run).total.joules is None
    folder = empty_run.phase_folder("data")
    folder.mkdir(parents=True)
    (folder / "driver.energy.json").write_text("torn")
    phase = ledger_info(empty_run).phases[0]
    assert (phase.phase, phase.joules, phase.method, phase.coverage_ratio) == ("data", None, None, None)
    assert "torn" in phase.warnings[0]


def test_trials_come_stage_by_stage_with_tiers_and_notes(whole_run):
    info = trials_info(whole_run)
    stages = list(dict.fromkeys(row.stage for row in info.rows))
    assert stages == ["wide", "deep", "full"]
    assert info.param_names == ("learning_rate", "hidden_dim")
    rows = {(row.stage, row.trial_id): row for row in info.rows}
    assert rows["deep", "deep-20"].status == "diverged"
    assert rows["deep", "deep-21"].note == "failed: out of memory"
    killed = rows["deep", "deep-99"]
    assert (killed.status, killed.energy_joules, killed.epochs_done) == ("interrupted", 700, 2)
    picked = whole_run.selection().picked
    assert [rows["full", trial_id].tier for trial_id in picked] == ["accurate", "balanced", "balanced"]
    assert all(row.tier is None for row in info.rows if row.stage == "wide")


def test_pareto_shows_stopped_trials_off_the_front(whole_run):
    info = pareto_info(whole_run)
    assert info.stage == "deep"
    kinds = {point.kind for point in info.points}
    assert {"accurate", "balanced", "candidate", "pruned"} <= kinds
    assert not any(point.on_front for point in info.points if point.kind == "pruned")
    assert {p.trial_id for p in info.points if p.on_front} == set(whole_run.selection().front)
    joules = [point[1] for point in info.front]
    losses = [point[0] for point in info.front]
    assert joules == sorted(joules)
    assert losses == sorted(losses, reverse=True)
    assert info.hypervolume == pytest.approx(whole_run.selection().hypervolume)
    assert set(info.not_shown) == {"deep-20", "deep-21"}


def test_pareto_before_any_selection_takes_the_last_stage(searched_run, empty_run):
    assert pareto_info(searched_run).stage == "deep"
    searched_run.trials_path.unlink()
    assert pareto_info(empty_run) is None


def test_selection_joins_the_search_and_the_full_training(whole_run):
    info = selection_info(whole_run)
    assert [row.tier for row in info.rows] == ["accurate", "balanced", "balanced"]
    for row in info.rows:
        assert row.full.val_loss == pytest.approx(row.search.val_loss / 2)
        assert row.reason
    record = info.selection
    assert info.saved_joules == pytest.approx(record.projected_joules_all - record.projected_joules)
    assert ("deep-21", "failed: out of memory") in info.excluded


def test_curves_of_every_trial_with_an_epoch(whole_run):
    curves = {(curve.stage, curve.trial_id): curve for curve in learning_curves_info(whole_run)}
    killed = curves["deep", "deep-99"]
    assert (killed.status, killed.epochs) == ("interrupted", (1, 2))
    assert killed.energy_joules == (350, 700)
    assert curves["deep", "deep-20"].val_loss == (None, None, None)
    full = [curve for curve in curves.values() if curve.stage == "full"]
    assert {curve.tier for curve in full} == {"accurate", "balanced"}
    assert all(len(curve.epochs) == 40 for curve in full)


def test_evaluation_is_none_until_it_is_there_and_nulls_stay_null(searched_run, whole_run):
    info = evaluation_info(whole_run)
    assert info.sources["ani1x"]["energy_mae_ratio"] == 0.2
    assert info.sources["oc20"]["force_mae_ev_per_angstrom"] is None
    assert info.calibration["energy"]["coverage_68"] == 0.64
    assert [m["trial_id"] for m in info.members] == ["deep-10", "deep-07"]
    searched_run.evaluation_path.unlink()
    assert evaluation_info(searched_run) is None


def test_an_evaluation_with_nulls_for_parts_is_read(empty_run):
    empty_run.evaluation_path.write_text(
        json.dumps({"members": [], "sources": {}, "calibration": {"energy": None}, "parity": {}})
    )
    info = evaluation_info(empty_run)
    assert (info.members, info.sources, info.calibration, info.parity) == ((), {}, {}, {})
    empty_run.evaluation_path.write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        evaluation_info(empty_run)


def test_an_empty_run_has_nothing_to_say(empty_run):
    assert trials_info(empty_run).rows == ()
    assert selection_info(empty_run) is None
    assert learning_curves_info(empty_run) == ()
    assert ledger_info(empty_run).phases == ()
