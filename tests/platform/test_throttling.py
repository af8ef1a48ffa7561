"""A trial whose devices were throttled is flagged: in its record, in words where it is picked, in every face."""

import csv
import dataclasses
import io

import pytest
from rich.console import Console

from wattier.config import RunConfig
from wattier.config_ensemble import SelectSection
from wattier.console import RunConsole, print_status, print_tiers
from wattier.funnel import adopt_finished
from wattier.launch import Stage
from wattier.records import Fidelity, Proposal, TrialResult
from wattier.report import write_report
from wattier.rundir import append_json_line, write_json
from wattier.select import select_trials
from wattier.views import ledger_info
from wattier_telemetry import EnergyReport, Share


def hot(result, *, seconds, of=100.0, bounds=(None, None)):
    """A result whose device was under a power cap for some of its seconds."""
    shares = [
        Share("gpu-0", "gpu", s.start_seconds, s.start_seconds + of, 1.0, s.joules, s.method,
              joules_low=bounds[0], joules_high=bounds[1],
              throttled_seconds=None if seconds is None else {"power_cap": seconds, "software_thermal": seconds / 2})
        for s in result.energy.shares
    ]  # fmt: skip
    return dataclasses.replace(result, energy=EnergyReport.of(shares))


def printed(show, run):
    """What a function prints, on one line."""
    console = Console(file=io.StringIO(), width=200, highlight=False)
    show(run, console)
    return " ".join(console.file.getvalue().split())


@pytest.mark.parametrize(
    ("seconds", "ratio", "throttled"), [(None, None, False), (0.0, 0.0, False), (10.0, 0.1, False), (10.1, 0.101, True)]
)
def test_more_than_the_share_is_flagged(trial, seconds, ratio, throttled):
    result = hot(trial("a"), seconds=seconds).flagged(0.1)
    assert (result.throttled_ratio, result.throttled) == (pytest.approx(ratio), throttled)
    assert TrialResult.from_dict(result.to_dict()) == result


def test_rows_from_before_there_were_flags_load(trial):
    row = trial("a").to_dict()
    del row["throttled_ratio"], row["throttled"]
    result = TrialResult.from_dict(row)
    assert (result.throttled_ratio, result.throttled) == (None, False)
    assert result == trial("a")


@pytest.mark.parametrize("way", ["told", "adopted"])
def test_the_driver_flags_what_a_trial_of_the_users_own_left(empty_run, trial, way):
    config = RunConfig.model_validate(
        empty_run.config().model_dump() | {"telemetry": {"throttled_share": 0.3}}, strict=False
    )
    for name, seconds in (("hot", 40.0), ("warm", 20.0)):
        folder = empty_run.trial_folder("deep", name)
        folder.mkdir(parents=True)
        write_json(folder / "result.json", hot(trial(name), seconds=seconds).to_dict())
    stage = Stage(empty_run, config, Fidelity("deep", None, 6, 1), 2)
    if way == "adopted":
        adopt_finished(stage)
        results = empty_run.trials("deep")
    else:
        results = [stage.outcome(Proposal(name, {}), None) for name in ("hot", "warm")]
    assert {r.trial_id: (r.throttled_ratio, r.throttled) for r in results} == {"hot": (0.4, True), "warm": (0.2, False)}


class TestFaces:
    @pytest.fixture
    def run(self, whole_run):
        """The whole run, whose most accurate trial was throttled for 40 % of its time."""
        best = whole_run.selection().tiers[0].picks[0].trial_id
        row = next(t for t in whole_run.trials("deep") if t.trial_id == best)
        self.best = hot(row, seconds=40.0).flagged(0.1)
        append_json_line(whole_run.trials_path, self.best.to_dict())
        return whole_run

    def test_it_is_picked_all_the_same_and_the_reason_says_so(self, run):
        before = run.selection()
        after = select_trials(run.trials(), SelectSection(), stage="deep", project=lambda _: None)
        assert after.picked == before.picked
        reasons = {p.trial_id: p.reason for tier in after.tiers for p in tier.picks}
        ending = "(its devices were throttled during 40 % of the time: its joules and seconds are not comparable)"
        assert [name for name, text in reasons.items() if text.endswith(ending)] == [self.best.trial_id]

    def test_the_console_marks_it_and_says_what_the_mark_means(self, run):
        text = printed(print_tiers, run)
        assert text.count("*") == 2
        assert "* throttled: " in text
        assert text.endswith("its joules and seconds are not comparable.")
        assert "1 throttled" in printed(print_status, run)
        console = Console(file=io.StringIO(), width=300)
        RunConsole(run, console).trial(self.best, 1, 2)
        assert "throttled 40 % of the time: not comparable" in console.file.getvalue()

    def test_the_report_marks_it_and_says_why(self, run):
        text = write_report(run).read_text(encoding="utf-8")
        assert text.count('<span class="tag throttled">') == 2  # of the tiers and of the trials
        assert "1 trial was throttled</b> for more than 10 % of the time" in text
        assert "its joules and seconds are not comparable" in text

    def test_where_nothing_was_throttled_nothing_is_said(self, whole_run):
        assert "throttled" not in printed(print_tiers, whole_run) + printed(print_status, whole_run)
        assert 'class="tag throttled"' not in write_report(whole_run).read_text(encoding="utf-8")


@pytest.mark.parametrize(("bounds", "shown"), [((98.0, 103.0), "± 3.0 %"), ((99.6, 100.4), None), ((None, None), None)])
def test_the_report_states_how_far_the_total_may_be_off(empty_run, trial, bounds, shown):
    result = hot(trial("a", joules=100.0), seconds=None, bounds=bounds)
    append_json_line(empty_run.trials_path, result.to_dict())
    text = write_report(empty_run).read_text(encoding="utf-8")
    assert ledger_info(empty_run).total.joules == 100.0
    assert ("±" in text.split("plotly")[0]) == (shown is not None)
    if shown:
        assert shown in text


def test_an_estimate_is_given_no_bounds(empty_run, trial):
    """Its bounds are those of the time it counted, to a hundredth of a percent, while nobody knows its watts."""
    result = trial("a", joules=100.0)
    share = dataclasses.replace(result.energy.shares[0], method="estimated", joules_low=99.99, joules_high=100.01)
    append_json_line(empty_run.trials_path, dataclasses.replace(result, energy=EnergyReport.of([share])).to_dict())
    text = write_report(empty_run).read_text(encoding="utf-8")
    energy = text[text.index('<section id="energy">') : text.index('<section id="power">')]
    assert energy.count("not stated") == 3, "of the phase, of the total, and of how it was measured"
    assert "99.99" not in (empty_run.path / "report.json").read_text(encoding="utf-8")
    (row,) = csv.DictReader((empty_run.path / "trials.csv").read_text(encoding="utf-8").splitlines())
    assert (row["energy_joules"], row["joules_low"], row["joules_high"]) == ("100.0", "", "")
