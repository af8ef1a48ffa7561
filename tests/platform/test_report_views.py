"""The report's numbers: the funnel, the growth of the front, importance, power over time, details of a selection."""

import itertools
import json
import math
import random

import moocore
import numpy as np
import pytest

from wattier.errors import UserError
from wattier.figures_power import power_figure
from wattier.figures_search import importance_figure, parallel_figure
from wattier.findings import gather
from wattier.importance import importance_info
from wattier.power_trace import PowerTrace
from wattier.report_figures import drawings, power_table, tight
from wattier.report_summary import summary
from wattier.rundir import FULL_STAGE
from wattier.units import format_joules_alike
from wattier.views import pareto_info, trials_info
from wattier.views_evaluation import coverage_rows
from wattier.views_power import PowerInfo, TrialPower, power_info
from wattier.views_search import funnel_info, parallel_info, progress_info
from wattier.views_selection import NOTHING, details_of, selection_details
from wattier_telemetry import EnergyReport, Share

START = 1_760_000_000.0


def test_the_funnel_counts_every_trial_and_every_joule_once(whole_run, billed):
    info = funnel_info(whole_run, trials_info(whole_run), whole_run.selection())
    assert [stage.stage for stage in info.stages] == ["wide", "deep", FULL_STAGE]
    for stage in info.stages:
        folders = list((whole_run.path / "trials" / stage.stage).iterdir())
        assert stage.trials == sum(stage.counts.values()) == len(folders) == stage.carried + stage.fresh
        assert stage.total_joules == pytest.approx(math.fsum(billed(folder) for folder in folders))
        assert stage.total_joules == pytest.approx(math.fsum(j for j in stage.joules.values() if j is not None))
    deep = info.stages[1]
    assert deep.counts == {"complete": 7, "pruned": 3, "diverged": 1, "failed": 1, "interrupted": 1}
    assert (deep.planned, info.stages[2].planned) == (12, 3)
    assert deep.joules["failed"] == 300


def test_who_went_on_is_told_by_parameters(empty_run, trial):
    lines = []
    for stage, names in (("wide", "abcd"), ("deep", "bdx")):
        for number, name in enumerate(names):
            lines.append(trial(f"{stage}-{number}", stage=stage, params={"hidden_dim": ord(name)}).to_dict())
    empty_run.trials_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    wide, deep = funnel_info(empty_run, trials_info(empty_run), None).stages
    assert (wide.carried, wide.fresh, wide.went_on) == (0, 4, 2)
    assert (deep.carried, deep.fresh, deep.went_on) == (2, 1, 0)


def test_the_front_grows_as_moocore_says(empty_run, trial):
    noise = random.Random(4)
    rows = []
    for i in range(40):
        fate = "pruned" if i % 5 == 4 else "complete"
        rows.append(trial(f"t{i:02d}", val_loss=noise.random(), joules=100 * noise.random() + 1, status=fate))
    empty_run.trials_path.write_text("".join(json.dumps(row.to_dict()) + "\n" for row in rows))
    pareto = pareto_info(empty_run)
    info = progress_info(empty_run, pareto)
    assert info.joules[-1] == pytest.approx(sum(row.energy_joules for row in rows))
    points = []
    for row, ratio in zip(rows, info.hypervolume_ratio, strict=True):
        if row.status == "complete":
            points.append((row.val_loss, row.energy_joules))
        area = moocore.hypervolume(np.array(points), ref=np.array(pareto.reference_point)) if points else 0.0
        assert ratio == pytest.approx(area / pareto.hypervolume, abs=1e-12)
    assert info.hypervolume_ratio[-1] == pytest.approx(1)


def planted(trial, number, weights, *, noise=0.0):
    """Trials whose log loss is a sum of their parameters, each uniform; then fANOVA has a closed form."""
    draw = random.Random(7)
    found = []
    for i in range(number):
        params = {name: draw.random() for name in weights}
        value = sum(weight * params[name] for name, weight in weights.items()) + noise * draw.gauss(0, 1)
        joules = math.exp(3 * params["second"])
        found.append(trial(f"t{i}", val_loss=math.exp(value), joules=joules, params=params))
    return found


def test_importance_of_a_sum_is_the_square_of_its_weights(trial):
    info = importance_info(planted(trial, 240, {"first": 2.0, "second": 1.0, "third": 0.0}), "deep")
    loss, energy = info.objectives
    assert loss.shares["first"] == pytest.approx(4 / 5, abs=0.06)
    assert loss.shares["second"] == pytest.approx(1 / 5, abs=0.06)
    assert loss.explained_ratio > 0.8
    assert next(iter(energy.shares)) == "second"
    assert energy.shares["second"] > 0.95
    assert importance_figure(info) is not None


@pytest.mark.parametrize(("number", "noise", "why"), [(8, 0.0, "8 trials are too few to say"), (60, 50.0, "noise")])
def test_importance_that_nobody_can_tell_is_not_told(trial, number, noise, why):
    info = importance_info(planted(trial, number, {"first": 1.0, "second": 1.0}, noise=noise), "deep")
    assert info.objectives[0].shares == {}
    assert why in info.objectives[0].why_not
    if number < 10:
        assert importance_figure(info) is None


def test_importance_of_words_missing_values_and_one_value(trial):
    trials = [
        trial(
            f"t{i}", val_loss=1.0 + (i % 2), joules=5.0, params={"family": "ab"[i % 2], "depth": None if i % 3 else 2}
        )
        for i in range(40)
    ]
    loss, energy = importance_info(trials, "deep").objectives
    assert loss.shares["family"] > 0.9
    assert energy.why_not == "it is the same for all trials"
    assert importance_info([t for t in trials[:1] for _ in range(20)], "deep") is None


def test_parallel_axes_run_from_the_lowest_to_the_highest(whole_run):
    info = parallel_info(trials_info(whole_run), pareto_info(whole_run))
    assert [axis.name for axis in info.axes] == ["learning_rate", "hidden_dim", "validation loss", "energy"]
    loss = next(axis for axis in info.axes if axis.name == "validation loss")
    assert (min(loss.positions), max(loss.positions)) == (0, 1)
    assert info.kinds[info.trial_ids.index(whole_run.selection().picked[0])] == "accurate"
    assert info.kinds[-1] != "candidate"  # drawn on top
    drawn = parallel_figure(info).data
    assert sum(y is None for trace in drawn for y in trace.y) == len(info.trial_ids)


def traced(run, trial_id, *, attempt=1, gap=(), hot=(), start=START):
    """100 W for each second of a minute, but in a gap."""
    folder = run.trial_folder(FULL_STAGE, trial_id)
    trace = PowerTrace(folder / f"attempt{attempt}-rank0.trace.csv", {"GPU-0": "a device"})
    joules, unseen, capped = 0.0, 0.0, 0.0
    for second in range(1, 61):
        unseen += second in gap
        capped += second in hot
        joules += 0.0 if second in gap else 100.0
        throttled = {"power_cap": capped, "application_clocks": float(second)}
        share = Share("GPU-0", "gpu", start, start + second, 1.0, joules, "counter", 1 - unseen / second,
                      throttled_seconds=throttled)  # fmt: skip
        trace.add(EnergyReport.of([share]), 10**9 + second)


def test_power_shows_gaps_and_throttling_and_breaks_between_attempts(whole_run):
    first, second, _ = whole_run.selection().picked
    traced(whole_run, first, gap=range(20, 30), hot=range(40, 45))
    traced(whole_run, first, attempt=2, start=START + 1000)
    (whole_run.trial_folder(FULL_STAGE, second) / "attempt1-rank0.trace.csv").write_text(
        "time_seconds,device\nnonsense"
    )
    info = power_info(whole_run, trials_info(whole_run).rows)
    (shown,) = info.trials
    assert shown.trial_id == first
    assert shown.gap_seconds == pytest.approx(10)
    assert shown.throttled_seconds == {"power_cap": pytest.approx(5)}  # a chosen clock is no throttling
    assert shown.highest_watts == pytest.approx(100)
    assert shown.seconds == pytest.approx(1059)
    one, two = shown.lines
    assert one.watts.count(None) == 11  # the first moment has no step before it
    assert two.seconds[0] == pytest.approx(1000)
    figure = power_figure(shown)
    assert all(trace.connectgaps is False for trace in figure.data if trace.mode == "lines")
    assert [trace.name for trace in figure.data].count("throttled") == 1
    assert "10.0 s not measured; throttled by power_cap" in figure.layout.title.text
    assert info.without == 2
    assert len(info.unreadable) == 1


def test_a_step_that_nobody_looked_into_is_a_gap(whole_run):
    folder = whole_run.trial_folder(FULL_STAGE, whole_run.selection().picked[0])
    lines = ["time_seconds,device,power_watts,energy_joules"]
    times = [0, 1, 2, 3, 60, 61, 62]
    lines += [f"{START + t},GPU-0,50,{50 * t}" for t in times]
    (folder / "attempt1-rank0.trace.csv").write_text("\n".join(lines) + "\n")
    (shown,) = power_info(whole_run, trials_info(whole_run).rows).trials
    at = [time for time, watts in zip(shown.lines[0].seconds, shown.lines[0].watts, strict=True) if watts is None]
    assert at == [31.5]
    table = power_table(gather(whole_run))
    assert table.rows[0][table.head.index("Throttled")] == "unknown"  # nobody told


@pytest.mark.parametrize(("watts", "told"), [(8.123, "8.12 W"), (99.96, "100 W"), (1e3, "1,000 W"), (None, "unknown")])
def test_watts_are_told_as_numbers_that_people_write(whole_run, watts, told):
    findings = gather(whole_run)
    trial = TrialPower("full", "a", None, (), 1.0, watts, watts, 0.0, {}, None)
    table = power_table(findings._replace(power=PowerInfo((trial,), 0, (), 0)))
    assert table.rows[0][table.head.index("Mean power")] == told


def test_details_of_an_old_selection_are_empty_and_of_a_new_one_are_read(whole_run, empty_run):
    assert len(selection_details(whole_run).figures) == len(whole_run.selection().picked)
    pick = {"trial_id": "deep-10", "reason": "the lowest"}
    data = {"tiers": [{"name": "accurate", "rule": "lowest", "picks": [pick]}], "projected_joules": 2.0}
    plain = details_of(data)
    assert (plain.near_misses, plain.pinned, plain.noise, plain.saved_joules) == ((), (), None, None)
    assert plain.figures["deep-10"].val_loss is None
    data["tiers"][0]["picks"][0] |= {"val_loss_noise": 0.01, "projected_joules": 5.0, "flags": ["throttled"]}
    data["tiers"][0]["notes"] = ["One place stays free."]
    near = {"trial_id": "deep-11", "reason": "it is a copy", "tier": "balanced", "kind": "copy", "val_loss": 0.2}
    data |= {
        "near_misses": [near],
        "pinned": ["deep-04"],
        "noise": {"std": 0.0123, "trials": 5, "source": "late epochs"},
    }
    details = details_of(data)
    assert details.figures[data["tiers"][0]["picks"][0]["trial_id"]].flags == ("throttled",)
    assert details.near_misses[0].figures.val_loss == 0.2
    assert details.notes["accurate"] == ("One place stays free.",)
    assert "0.0123" in details.noise
    empty_run.selection_path.unlink()
    assert selection_details(empty_run) == NOTHING
    empty_run.selection_path.write_text("[]")
    with pytest.raises(UserError, match="holds no record of this version"):
        selection_details(empty_run)


def test_coverage_is_read_where_the_evaluation_has_it(whole_run):
    data = json.loads(whole_run.evaluation_path.read_text())
    part = {"n": 80, "observed": 0.7, "band_low": 0.8, "band_high": 0.97, "mean_half_width": 0.1}
    data["intervals"] = {"target": 0.9, "method": "m", "energy": {"pooled": part, "by_source": {"ani1x": part}}}
    whole_run.evaluation_path.write_text(json.dumps(data))
    findings = gather(whole_run)
    rows = coverage_rows(findings.evaluation)
    assert [(row.source, row.is_inside) for row in rows] == [("all sources", False), ("ani1x", False)]
    assert any("outside the 99 % binomial band" in text for text in summary(findings))
    assert {"coverage-energy"} <= set(drawings(findings))


def test_every_figure_says_in_words_what_it_shows(whole_run):
    for name, drawing in drawings(gather(whole_run)).items():
        assert drawing.title, name
        assert drawing.description.endswith(".")
        assert drawing.table or drawing.note, name
        assert json.loads(drawing.json)["layout"].get("title") is None


def test_units_of_a_column_are_those_of_its_largest_and_stay_with_their_number():
    assert format_joules_alike([5e6, None, 12_000.0]) == ["1.39 kWh", "unknown", "0.00333 kWh"]
    assert format_joules_alike([]) == []
    assert tight("6.6 % of 5.2 kJ in 3 trials") == "6.6\u00a0% of 5.2\u00a0kJ in 3 trials"


def test_rows_of_one_power_trace_grow(whole_run):
    first = whole_run.selection().picked[0]
    traced(whole_run, first)
    (shown,) = power_info(whole_run, trials_info(whole_run).rows).trials
    assert all(a < b for a, b in itertools.pairwise(shown.lines[0].seconds))
