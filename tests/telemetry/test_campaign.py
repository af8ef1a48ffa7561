"""What a driver says of its campaign: the file, and the series that the exporter makes of it as long as it lives."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from wattier_telemetry.campaign import (
    MOST_TRIALS,
    BudgetStanding,
    CampaignRegistration,
    EndedTrial,
    Forecast,
    PhaseStanding,
    StageStanding,
    load_campaign,
    parse_campaign,
    read_campaigns,
)
from wattier_telemetry.exporter import ServeOptions, start
from wattier_telemetry.exporter.campaigns import CAMPAIGN, MOST_CAMPAIGNS, Campaigns, campaign_points
from wattier_telemetry.exporter.metrics import expose
from wattier_telemetry.registration import MOST_BYTES, read_registrations
from wattier_telemetry.sources.replay import ReplaySource

FULL = CampaignRegistration(
    run="night",
    pid=os.getpid(),
    phase="search:scout",
    started_seconds=1.7e9,
    updated_seconds=1.7e9 + 5,
    report="file:///runs/night/report.html",
    ray_dashboard="http://127.0.0.1:8265",
    stages=(StageStanding("scout", 12, {"waiting": 3, "running": 9}, {"killed": 1}, 0.4, 1.5e3),),
    phases=(PhaseStanding("search:scout", 100.0, 98.0, 103.0), PhaseStanding("data")),
    budgets=(BudgetStanding("search", 1000.0, 100.0, {"joules": 0.1, "seconds": 0.2}),),
    forecasts=(Forecast("search", 900.0, 1.7e9 + 60), Forecast("full_training")),
    trials=(EndedTrial("scout", "scout-0", "complete", 0.4, 8.0), EndedTrial("scout", "scout-1", "failed")),
)


def shown(campaign):
    points = campaign_points(campaign)
    return {(p.name.removeprefix("wattier_campaign_"), *dict(p.labels).values()): p.value for p in points}


class TestFile:
    def test_there_and_back(self, tmp_path):
        path = FULL.write(tmp_path)
        assert load_campaign(path) == FULL
        assert read_campaigns(tmp_path) == [FULL]
        assert read_registrations(tmp_path) == []  # nobody takes it for a trial
        FULL.withdraw(tmp_path)
        FULL.withdraw(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_what_is_not_finite_is_unknown(self, tmp_path):
        bad = replace(FULL.stages[0], best_val_loss=float("nan"), hypervolume=float("inf"))
        found = load_campaign(replace(FULL, stages=(bad,), started_seconds=float("-inf")).write(tmp_path))
        assert found.started_seconds is None
        assert (found.stages[0].best_val_loss, found.stages[0].hypervolume) == (None, None)

    def test_no_two_runs_share_a_file(self, tmp_path):
        names = ["a/b", "a_b", "a.b", "../../etc/passwd", "ü" * 300, "ü" * 301]
        paths = {replace(FULL, run=name).write(tmp_path) for name in names}
        assert len(paths) == len(names) and {path.parent for path in paths} == {tmp_path}
        assert sorted(campaign.run for campaign in read_campaigns(tmp_path)) == sorted(names)

    def test_a_later_version_may_say_more(self):
        data = json.loads(json.dumps(asdict(FULL)))
        data["stages"][0]["colour"] = data["mood"] = "blue"
        assert parse_campaign(data) == FULL

    @pytest.mark.parametrize(
        "fault",
        [
            {"run": 3},
            {"run": None},
            {"pid": "1"},
            {"pid": -1},
            {"pid": True},
            {"pid": 2**40},
            {"started_seconds": "now"},
            {"started_seconds": float("nan")},
            {"stages": {}},
            {"stages": [3]},
            {"stages": [{"stage": "s"}]},
            {"stages": [{"stage": "s", "planned": -1}]},
            {"stages": [{"stage": "s", "planned": 1, "statuses": {"happy": 1}}]},
            {"stages": [{"stage": "s", "planned": 1, "statuses": {"running": "1"}}]},
            {"stages": [{"stage": "s", "planned": 1, "failures": {"boredom": 1}}]},
            {"stages": [{"stage": f"s{i}", "planned": 1} for i in range(101)]},
            {"budgets": [{"budget": "b", "used_ratios": {"hope": 0.5}}]},
            {"trials": [{"stage": "s", "trial": str(i), "status": "complete"} for i in range(MOST_TRIALS + 1)]},
            {"trials": [{"stage": "s", "trial": "t", "status": "complete", "val_loss": []}]},
        ],
    )
    def test_nonsense_is_refused(self, tmp_path, fault):
        data = {**json.loads(json.dumps(asdict(FULL))), **fault}
        path = tmp_path / "bad.campaign"
        path.write_text(json.dumps(data))
        with pytest.raises((TypeError, ValueError)):
            load_campaign(path)
        assert read_campaigns(tmp_path) == [] and Campaigns(tmp_path).refresh() == ()

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"run": "r"}', "[" * 100_000, '{"pid": 1e999}', "\0"])
    def test_torn_and_hostile_files(self, tmp_path, text):
        (tmp_path / "bad.campaign").write_text(text)
        FULL.write(tmp_path)
        assert Campaigns(tmp_path).refresh() == (FULL,)

    def test_what_is_no_file_is_not_waited_for(self, tmp_path):
        outside = tmp_path / "outside"
        FULL.write(outside)
        folder = tmp_path / "registry"
        folder.mkdir()
        os.mkfifo(folder / "pipe.campaign")
        (folder / "link.campaign").symlink_to(next(outside.iterdir()))
        (folder / "folder.campaign").mkdir()
        (folder / "huge.campaign").write_bytes(b" " * (MOST_BYTES + 1))
        assert Campaigns(folder).refresh() == ()


class TestSeries:
    def test_each_figure(self):
        found = shown(FULL)
        assert found["info", "night", "search:scout", FULL.report, FULL.ray_dashboard] == 1
        assert found["trials_planned", "night", "scout"] == 12
        assert found["trials", "night", "scout", "running"] == 9
        assert found["failures", "night", "scout", "killed"] == 1
        assert found["energy_joules", "night", "search:scout"] == 100
        assert found["energy_low_joules", "night", "search:scout"] == 98
        assert found["energy_high_joules", "night", "search:scout"] == 103
        assert found["budget_used_ratio", "night", "search", "seconds"] == 0.2
        assert found["projected_joules", "night", "search"] == 900
        assert found["completion_timestamp_seconds", "night", "search"] == 1.7e9 + 60
        assert found["trial_joules", "night", "scout", "scout-0", "complete"] == 8

    def test_unknown_has_no_series(self):
        unknown = {"scout-1", "data", "full_training"}
        assert [name for name, *labels in shown(FULL) if unknown & set(labels)] == []

    def test_every_metric_is_shown_as_the_table_says(self):
        points = list(campaign_points(FULL))
        table = {metric.name: metric.labels for metric in CAMPAIGN}
        assert {point.name for point in points} == set(table)
        assert all(tuple(dict(point.labels)) == table[point.name] for point in points)
        assert expose(points, CAMPAIGN).count(b"# HELP") == len(CAMPAIGN)

    def test_their_number_is_bounded(self):
        """As docs/metrics.md says: 2,000 of ended trials, and some 20 a stage."""
        trials = tuple(EndedTrial("scout", f"t{i}", "complete", 0.1, 1.0) for i in range(MOST_TRIALS))
        assert len(shown(replace(FULL, trials=trials))) <= 2 * MOST_TRIALS + 20 + 20


class TestRoster:
    def test_a_series_is_on_the_page_once(self, tmp_path):
        """A file that somebody copied, or that names a trial twice, must not make the page one that is refused."""
        path = FULL.write(tmp_path)
        path.with_name("copy.campaign").write_text(path.read_text().replace('"waiting": 3', '"waiting": 2'))
        assert len(Campaigns(tmp_path).refresh()) == 1
        twice = asdict(replace(FULL, trials=(*FULL.trials, EndedTrial("scout", "scout-1", "complete"))))
        with pytest.raises(ValueError, match="trials of a campaign names one twice"):
            parse_campaign(twice)

    def test_of_many_a_few_are_shown(self, tmp_path):
        for i in range(MOST_CAMPAIGNS + 5):
            replace(FULL, run=f"r{i}").write(tmp_path)
        assert len(Campaigns(tmp_path).refresh()) == MOST_CAMPAIGNS

    def test_other_hosts_are_left_to_their_exporters(self, tmp_path):
        path = replace(FULL, host="elsewhere", pid=1).write(tmp_path)
        assert Campaigns(tmp_path).refresh() == () and path.exists()

    def test_a_folder_that_is_not_there_yet(self, tmp_path, monkeypatch):
        monkeypatch.setattr("wattier_telemetry.exporter.campaigns._PAUSE_SECONDS", 0.0)
        roster = Campaigns(tmp_path / "later")
        assert roster.refresh() == ()
        FULL.write(tmp_path / "later")
        first = roster.refresh()
        assert first == (FULL,) and roster.refresh() is first
        FULL.withdraw(tmp_path / "later")
        assert roster.refresh() == ()

    def test_a_whole_exporter_until_the_driver_is_killed(self, tmp_path):
        """Its series go with it, though nobody withdrew them."""
        trace = tmp_path / "trace.csv"
        trace.write_text("time_seconds,device,power_watts\n0,g,100\n")
        driver = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        registry = tmp_path / "registry"
        path = replace(FULL, pid=driver.pid).write(registry)
        options = ServeOptions(sources=(ReplaySource(trace),), port=0, registry=registry, spool=tmp_path / "spool")
        running = start(options)
        try:
            running_trials = b'wattier_campaign_trials{run="night",stage="scout",status="running"} 9.0'
            self._until(running, lambda text: running_trials in text)
            driver.kill()
            driver.wait()
            self._until(running, lambda text: b"wattier_campaign_trials{" not in text)
            assert not path.exists()
        finally:
            driver.kill()
            driver.wait()
            running.close()

    @staticmethod
    def _until(running, good):
        import urllib.request

        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with urllib.request.urlopen(running.url, timeout=10) as answer:
                if good(answer.read()):
                    return
            time.sleep(0.1)
        pytest.fail("it did not happen in time")
