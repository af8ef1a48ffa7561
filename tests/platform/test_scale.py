"""What would take the square of the number of ranks or trials is counted, not timed."""

import math
from pathlib import Path

import pytest

from wattier import ledger
from wattier.config import TelemetrySection
from wattier.console import running_table
from wattier.ledger import ledger_info
from wattier.metering import metered
from wattier.rundir import append_json_line
from wattier_telemetry import EnergyReport, Share, bill, journal
from wattier_telemetry.journal import Journal, read_journal

INTERVAL_SECONDS, WATTS = 0.01, 50.0


def telemetry(tmp_path, **more):
    trace = tmp_path / "watts.csv"
    trace.write_text(f"time_seconds,device,power_watts\n0,GPU-0,{WATTS}\n")
    return TelemetrySection(source=f"replay:{trace}", interval_seconds=INTERVAL_SECONDS, **more)


def rank_report(rank, joules=10.0):
    return EnergyReport.of([Share(f"GPU-{rank}", "gpu", 1e9, 1e9 + 60, 1.0, joules, "counter")], [f"warning {rank}"])


def test_a_bill_of_many_ranks_is_added_up_once_and_is_the_sum(tmp_path, monkeypatch):
    reports = [rank_report(rank, joules=rank + 0.1) for rank in range(60)]
    for rank, report in enumerate(reports):
        Journal(tmp_path / f"attempt1-rank{rank:02d}.energy.json").finish(report)
    (tmp_path / "attempt1-rank60.energy.json").write_text("{")
    expected = EnergyReport.empty()
    for report in reports:
        expected += report
    added, of = [], EnergyReport.of
    monkeypatch.setattr(
        EnergyReport, "of", lambda shares, warnings=(): added.append(list(shares)) or of(added[-1], warnings)
    )
    total = bill(tmp_path)
    assert len(added) == 1
    assert total.shares == expected.shares
    assert total.warnings[:-1] == expected.warnings
    assert "rank60" in total.warnings[-1]
    assert total.joules == pytest.approx(math.fsum(rank + 0.1 for rank in range(60)), rel=1e-15)


def test_the_ledger_reads_no_journals_of_trials_whose_record_is_the_last_word(searched_run, monkeypatch):
    before, read = ledger_info(searched_run), []
    monkeypatch.setattr(ledger, "bill", lambda folder: read.append(folder.name) or bill(folder))
    assert ledger_info(searched_run) == before
    assert sorted(read) == ["data", "deep-21", "deep-99"]  # a phase, a failed trial, one without a record


def test_ranks_that_outlived_the_record_of_a_failed_trial_are_billed(searched_run):
    before = ledger_info(searched_run).total.joules
    late = searched_run.trial_folder("deep", "deep-21") / "attempt1-rank1.energy.json"
    Journal(late).finish(rank_report(1, joules=123.0))
    assert ledger_info(searched_run).total.joules == pytest.approx(before + 123.0)


def test_a_trial_of_ones_own_without_journals_is_billed_by_its_record(empty_run, trial):
    result = trial("deep-01", joules=321.0)
    empty_run.trial_folder("deep", "deep-01").mkdir(parents=True)
    append_json_line(empty_run.trials_path, result.to_dict())
    assert ledger_info(empty_run).total.joules == 321.0


def test_attempts_are_numbered_without_a_list_of_the_folder(tmp_path, monkeypatch):
    folder = tmp_path / "start-up"
    folder.mkdir()
    for rank in range(30):
        (folder / f"attempt1-rank{rank}.energy.json").touch()
    monkeypatch.setattr(Path, "glob", lambda *_: pytest.fail("the folder was listed"))
    monkeypatch.setattr(Path, "iterdir", lambda *_: pytest.fail("the folder was listed"))
    for expected in ("attempt2-rank3.energy.json", "attempt3-rank3.energy.json"):
        with metered(folder, "rank3", telemetry(tmp_path), on_gpu=False) as (meter, _):
            assert meter.journal.name == expected
    with metered(folder, "rank30", telemetry(tmp_path), on_gpu=False) as (meter, _):
        assert meter.journal.name == "attempt1-rank30.energy.json"


def test_a_journal_that_is_written_seldom_has_reserved_until_the_next_time(tmp_path, monkeypatch):
    written, write = [], journal.Journal.write
    monkeypatch.setattr(journal.Journal, "write", lambda me, report: written.append(report) or write(me, report))
    with metered(tmp_path, "seldom", telemetry(tmp_path, journal_seconds=30), on_gpu=False) as (meter, source):
        device = source.devices()[0]
        for _ in range(200_000):  # until the thread has read often: it is the readings that must not write
            if meter._sampled_at > meter._opened_at + 20 * INTERVAL_SECONDS:
                break
            source.read(device)
        assert meter._sampled_at > meter._opened_at + 20 * INTERVAL_SECONDS
        assert len(written) == 2  # before the window, and with its first reading
        owed = read_journal(meter.journal)
        assert owed.joules >= 30 * WATTS  # what it would owe if it were killed right before the next write
        assert meter.so_far().joules < 30 * WATTS
        assert len(written) == 3
    assert meter.report.joules < 30 * WATTS
    assert read_journal(meter.journal) == meter.report


@pytest.mark.parametrize("bad", [0, -1, float("inf"), float("nan")])
def test_journal_seconds_must_be_a_time(tmp_path, bad):
    with pytest.raises(ValueError, match="journal_seconds"):
        telemetry(tmp_path, journal_seconds=bad)


def test_the_live_table_looks_once_into_a_trial_that_has_ended(empty_run, monkeypatch):
    for name in ("a", "b", "c"):
        folder = empty_run.trial_folder("deep", name)
        folder.mkdir(parents=True)
        (folder / "trial.json").write_text("{}")
    ended_folder, ended = empty_run.trial_folder("deep", "b"), set()
    (ended_folder / "result.json").write_text("{}")
    assert running_table(empty_run.path, ended).row_count == 2
    asked, exists = [], Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: asked.append(path.parent) or exists(path))
    assert running_table(empty_run.path, ended).row_count == 2
    assert ended == {ended_folder}
    assert ended_folder not in asked
