"""The energy card of recordings whose energy is known by a closed form."""

import itertools
import json

import pytest

from wattier_telemetry.recording.card import make_card
from wattier_telemetry.recording.card_text import figure, render, span
from wattier_telemetry.recording.trace import TraceError

PLAIN = "time_seconds,device,power_watts"


@pytest.fixture
def card(trace):
    """Return a function that makes the card of some lines."""

    def make(*lines, header=PLAIN, **options):
        return make_card(trace(*lines, header=header), **options)

    return make


def only(card):
    (device,) = card.devices
    return device


class TestEnergy:
    def test_constant_power(self, card):
        found = card(*(f"{t},g,100" for t in range(11)))
        bill = only(found).bill
        assert (bill.joules, bill.seconds, bill.method, bill.coverage_ratio) == (1000, 10, "integrated", 1)
        assert bill.kwh == pytest.approx(1000 / 3.6e6)
        assert (bill.metrics["power_watts"].mean, bill.metrics["power_watts"].max) == (100, 100)
        assert (found.job.joules, found.unattributed_joules, found.joules_by_domain) == (1000, 1000, {"gpu": 1000})

    def test_triangle_of_power_with_uneven_steps(self, card):
        times = [0, 0.5, 3, 7, 9.25, 10, 12, 13, 19, 20]
        bill = only(card(*(f"{t},g,{200 - 20 * abs(t - 10)}" for t in times))).bill
        assert bill.joules == pytest.approx(20 * 200 / 2)
        assert (bill.metrics["power_watts"].mean, bill.metrics["power_watts"].max) == (pytest.approx(100), 200)

    def test_bursts_shorter_than_a_second_keep_their_timestamps(self, card):
        # 200 ms at 500 W in each second, 50 W otherwise, seen every 100 ms. Power runs straight between two samples.
        watts = [500 if step % 10 in (3, 4) else 50 for step in range(101)]
        truth = sum((a + b) / 2 * 0.1 for a, b in itertools.pairwise(watts))
        assert only(card(*(f"{1e9 + step / 10},g,{w}" for step, w in enumerate(watts)))).bill.joules == pytest.approx(
            truth
        )

    def test_counter_is_believed_before_power(self, card):
        lines = [f"{t},g,200,{1000 + 190 * t}" for t in range(21)]
        bill = only(card(*lines, header=f"{PLAIN},energy_joules")).bill
        assert (bill.joules, bill.method) == (pytest.approx(3800), "counter")

    def test_counter_that_stepped_back_is_bridged_by_power(self, card):
        counter = [0, 100, 200, 300, 50, 150, 250, 0, 100, 200, 300]  # 100 W throughout, one step back and one reset
        found = card(*(f"{t},g,100,{j}" for t, j in enumerate(counter)), header=f"{PLAIN},energy_joules")
        assert found.job.joules == pytest.approx(1000)
        assert found.job.method == "integrated"
        assert "went backward 2 time(s)" in "".join(found.warnings)

    def test_counter_alone_needs_no_power(self, card):
        found = card("0,g,7", "5,g,507", "30,g,3007", header="time_seconds,device,energy_joules")
        assert (found.job.joules, found.job.seconds, found.job.metrics) == (3000, 30, {})

    def test_thirty_hours_are_thirty_hours(self, card):
        found = card(*(f"{60 * minute},g,100" for minute in range(30 * 60 + 1)))
        assert found.job.seconds == 30 * 3600
        assert found.job.kwh == pytest.approx(3.0)
        assert found.job.coverage_ratio == 1  # lines a minute apart are this recording's rhythm, and no gap
        assert "30 h 00 min 00 s (108000.000 s)" in render(found)

    def test_gap_is_billed_but_not_called_measured(self, card):
        times = [*range(11), *range(100, 111)]
        found = card(*(f"{t},g,100" for t in times))
        assert found.job.joules == pytest.approx(110 * 100)
        assert found.job.coverage_ratio == pytest.approx(20 / 110)

    def test_counter_sees_through_a_gap(self, card):
        times = [*range(11), *range(100, 111)]
        found = card(*(f"{t},g,100,{100 * t}" for t in times), header=f"{PLAIN},energy_joules")
        assert (found.job.joules, found.job.coverage_ratio) == (pytest.approx(11000), 1)

    def test_means_ignore_what_nobody_saw(self, card):
        seen = [(t, 50) for t in range(11)] + [(t, 90) for t in range(100, 106)]
        found = card(*(f"{t},g,100,{celsius}" for t, celsius in seen), header=f"{PLAIN},temperature_celsius")
        assert found.job.metrics["temperature_celsius"].mean == pytest.approx((10 * 50 + 5 * 90) / 15)

    def test_means_are_weighted_by_time_and_pass_over_empty_cells(self, card):
        lines = ["0,g,100,50", "1,g,100,50", "2,g,100,50", "3,g,100,70", "4,g,100,", "5,g,100,90"]
        spread = only(card(*lines, header=f"{PLAIN},temperature_celsius")).bill.metrics["temperature_celsius"]
        assert (spread.mean, spread.max) == (pytest.approx((50 + 50 + 60) / 3), 90)

    def test_estimate_stays_an_estimate(self, card):
        lines = [f"{t},c,cpu,estimated,{5 * t}" for t in range(5)]
        found = card(*lines, header="time_seconds,device,domain,method,energy_joules")
        assert (found.job.joules, found.job.method) == (20, "estimated")

    def test_one_line_measures_nothing(self, card):
        found = card("0,g,100")
        assert (found.job.joules, found.job.kwh, found.job.seconds) == (None, None, 0)
        assert "not measured" in render(found)

    def test_devices_add_up_by_domain(self, card):
        lines = [f"{t},{name}" for t in range(11) for name in ("a,100,gpu", "b,50,gpu", "c,20,cpu", "d,5,dram")]
        found = card(*lines, header=f"{PLAIN},domain")
        assert found.joules_by_domain == {"gpu": 1500, "cpu": 200, "dram": 50}
        assert found.job.joules == pytest.approx(1750)

    def test_what_is_measured_twice_is_added_once(self, card):
        rows = ["gpu0,100,gpu,nvml", "cray-accel0,110,gpu,cray", "cray-cpu,40,cpu,cray", "cray-node,500,node,cray"]
        found = card(*(f"{t},{row}" for t in range(11) for row in rows), header=f"{PLAIN},domain,source")
        assert found.job.joules == pytest.approx(10 * (100 + 40))
        assert [device.in_total for device in found.devices] == [True, False, True, False]
        assert found.devices[3].bill.joules == pytest.approx(5000)

    def test_carbon_follows_the_stated_intensity_alone(self, card):
        lines = [f"{60 * minute},g,100" for minute in range(30 * 60 + 1)]
        assert card(*lines, grid_grams_co2_per_kwh=400).job.grams_co2 == pytest.approx(1200)
        assert card(*lines).job.grams_co2 is None
        assert "gCO2 at the stated 400 gCO2/kWh" in render(card(*lines, grid_grams_co2_per_kwh=400))
        assert "CO2" not in render(card(*lines))


class TestTrials:
    HEADER = f"{PLAIN},trials"

    def joules(self, found):
        return {trial.trial: trial.bill.joules for trial in found.trials}

    def test_shares_of_one_device_and_the_rest_add_up(self, card):
        owners = "run/s1/a/0:0.5;run/s1/b/0:0.25"
        found = card(*(f"{t},g,400,{owners}" for t in range(11)), header=self.HEADER)
        assert self.joules(found) == pytest.approx({"a": 2000, "b": 1000})
        assert found.unattributed_joules == pytest.approx(1000)
        assert only(found).unattributed_joules == pytest.approx(1000)
        assert found.trials[0].bill.seconds == 10

    def test_trials_in_turn_pay_for_their_own_watts(self, card):
        # a has 100 W for 10 s, then b 300 W for 10 s, then nobody 50 W for 10 s; the counter is read each second.
        watts = [100] * 10 + [300] * 10 + [50] * 10
        owner = ["r/s/a/0:1"] * 10 + ["r/s/b/0:1"] * 10 + ["none"] * 11
        lines = [f"{t},g,{sum(watts[:t])},{owner[t]}" for t in range(31)]
        found = card(*lines, header="time_seconds,device,energy_joules,trials")
        assert self.joules(found) == pytest.approx({"a": 1000, "b": 3000})
        assert found.unattributed_joules == pytest.approx(500)
        assert [trial.bill.seconds for trial in found.trials] == [10, 10]

    def test_ranks_and_devices_of_one_trial_are_one_bill(self, card):
        rows = ["g0,100,r/s/a/0:1", "g1,200,r/s/a/1:0.5", "c,30,"]
        found = card(*(f"{t},{row}" for t in range(11) for row in rows), header=self.HEADER)
        (trial,) = found.trials
        assert (trial.run, trial.stage, trial.trial, trial.ranks) == ("r", "s", "a", (0, 1))
        assert trial.joules_by_device == pytest.approx({"g0": 1000, "g1": 1000})
        assert trial.bill.joules == pytest.approx(2000)
        assert trial.bill.seconds == 10
        assert trial.bill.metrics["power_watts"].max == 200
        assert found.unattributed_joules == pytest.approx(1000 + 300)

    def test_claims_beyond_the_whole_device_are_scaled_down_and_said(self, card):
        found = card(*(f"{t},g,100,r/s/a/0:1;r/s/b/0:1" for t in range(11)), header=self.HEADER)
        assert self.joules(found) == pytest.approx({"a": 500, "b": 500})
        assert found.unattributed_joules == pytest.approx(0)
        assert any("claimed more than the whole device" in warning for warning in found.warnings)

    def test_reset_while_trials_run_changes_no_sum(self, card):
        lines = [f"{t},g,100,{100 * (t % 7)},r/s/{'a' if t < 10 else 'b'}/0:1" for t in range(21)]
        found = card(*lines, header=f"{PLAIN},energy_joules,trials")
        assert self.joules(found) == pytest.approx({"a": 1000, "b": 1000})

    def test_throttling_is_counted_by_reason_for_the_trial_that_had_it(self, card):
        lines = []
        for t in range(21):
            owner, capped = ("a", min(t, 10)) if t < 10 else ("b", 10)
            lines.append(f"{t},g,100,r/s/{owner}/0:1,power_cap:{capped}|thermal:0|application_clocks:{t}")
        found = card(*lines, header=f"{PLAIN},trials,throttle_seconds")
        a, b = (trial.bill for trial in found.trials)
        assert (a.throttled_seconds, a.throttled_ratio) == ({"power_cap": 10}, 1)
        assert (b.throttled_seconds, b.throttled_ratio) == ({}, 0)
        assert (found.job.throttled_seconds, found.job.throttled_ratio) == ({"power_cap": 10}, 0.5)
        assert render(found).count("do not compare its joules") == 1

    def test_throttling_by_what_was_seen_where_nothing_counts_it(self, card):
        lines = [f"{t},g,100,{'power_cap|thermal' if 5 <= t < 8 else 'none'}" for t in range(11)]
        found = card(*lines, header=f"{PLAIN},throttle_reasons")
        assert found.job.throttled_seconds == {"power_cap": 3, "thermal": 3}
        assert found.job.throttled_ratio == pytest.approx(0.3)

    def test_silence_about_throttling_is_not_freedom_from_it(self, card):
        bill = card("0,g,100", "1,g,100").job
        assert (bill.throttled_seconds, bill.throttled_ratio) == (None, None)


class TestFaces:
    def test_text_fits_80_columns_and_obeys_no_escape(self, card):
        name = "\x1b[2J" + "long" * 30
        lines = [f'{t},"{name}",100,r/s/{"t" * 200}/0:1' for t in range(3)]
        text = render(card(*lines, header=f"{PLAIN},trials"))
        assert "\x1b" not in text
        assert all(len(line) <= 80 for line in text.splitlines())

    def test_json_holds_every_figure(self, card):
        found = card(*(f"{t},g,100,r/s/a/0:1" for t in range(11)), header=f"{PLAIN},trials")
        data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert (
            data["job"]["joules"] == data["trials"][0]["bill"]["joules"] == data["devices"][0]["bill"]["joules"] == 1000
        )
        assert data["job"]["metrics"]["power_watts"] == {"mean": 100, "max": 100}

    def test_killed_recording_says_so(self, trace):
        path = trace(*(f"{t},g,100" for t in range(11)))
        path.write_text(path.read_text() + "11,g")
        found = make_card(path)
        assert found.job.joules == pytest.approx(1000)
        assert "cut off" in "".join(found.warnings)

    def test_bad_line_is_named(self, card):
        with pytest.raises(TraceError, match="line 3: power_watts is 'x'"):
            card("0,g,1", "1,g,x")

    def test_numbers_and_durations(self):
        assert [figure(value) for value in (0, 0.00012345678, 3.14159, 1234.56, 123456.7, 2e20)] == [
            "0",
            "0.00012346",
            "3.1416",
            "1,234.6",
            "123,457",
            "2.0000e+20",
        ]
        assert [span(seconds) for seconds in (0, 59.6, 3661, 360000)] == [
            "0 h 00 min 00 s",
            "0 h 01 min 00 s",
            "1 h 01 min 01 s",
            "100 h 00 min 00 s",
        ]
