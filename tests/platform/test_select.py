"""Tiers: who may be compared, who is picked, and what the reasons say."""

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wattier.config_ensemble import SelectSection
from wattier.errors import UserError
from wattier.pareto import hypervolume, non_dominated_ranks
from wattier.records import Selection
from wattier.select import select_trials
from wattier.units import format_joules, format_ratio, format_seconds
from wattier_telemetry import EnergyReport, Share

CURVE = {"a": (0.1, 1000.0), "b": (0.12, 400.0), "c": (0.2, 100.0), "d": (0.13, 900.0), "e": (0.3, 950.0)}


@pytest.fixture
def curve(trial):
    """Three trials on the front, and two behind it."""
    return [trial(name, val_loss=loss, joules=joules) for name, (loss, joules) in CURVE.items()]


def select(trials, accurate=1, balanced=2, project=lambda t: 10 * t.energy_joules, stage="deep", **rules):
    """By the simple rules, where no other is named: the lowest losses, and successive fronts."""
    settings = {"accurate_rule": "lowest", "balanced_rule": "fronts"} | rules
    return select_trials(
        trials, SelectSection(accurate=accurate, balanced=balanced, **settings), stage=stage, project=project
    )


def ids(selection, tier):
    return [pick.trial_id for t in selection.tiers if t.name == tier for pick in t.picks]


def reason(selection, trial_id):
    return next(p.reason for t in selection.tiers for p in t.picks if p.trial_id == trial_id)


def test_accurate_is_the_lowest_loss_and_balanced_follows_the_fronts(curve):
    selection = select(curve, balanced=3)
    assert ids(selection, "accurate") == ["a"]
    assert ids(selection, "balanced") == ["b", "c", "d"]  # d is on the second front
    assert selection.front == ("a", "b", "c")
    assert selection.picked == ("a", "b", "c", "d")
    assert selection.excluded == {}


def test_numbers_of_the_reasons(curve):
    selection = select(curve, balanced=3)
    assert reason(selection, "a").startswith(
        "validation loss 0.1, the lowest of 5 candidates, for 1.00 kJ (counter); number 1 by loss; on the Pareto front"
    )
    text = reason(selection, "b")
    assert (
        "validation loss 0.12, 20 % above the best, for 400 J (counter), 40 % of the joules of the most accurate"
        in text
    )
    assert "on front 2" in reason(selection, "d")
    # Scaled to ranges, the front is (0, 1), (.1, 1/3), (.5, 0); the corner (1.1, 1.1).
    total = 0.1 * 0.1 + 0.4 * (1.1 - 1 / 3) + 0.6 * 1.1
    alone = 0.4 * (1 - 1 / 3)
    assert f"loses {format_ratio(alone / total)} of its hypervolume" in text
    every = 10 * sum(joules for _, joules in CURVE.values())
    assert text.endswith(f"to convergence 4.00 kJ, {format_ratio(4000 / every)} of what training all 5 would take")
    pick = selection.tiers[1].picks[0]
    assert (pick.val_loss, pick.energy_joules, pick.energy_method, pick.projected_joules) == (0.12, 400, "counter", 4e3)
    assert (pick.front, pick.contribution_ratio, pick.flags) == (1, pytest.approx(alone / total), ())
    assert selection.saved_joules == pytest.approx(every - 10 * (1000 + 400 + 100 + 900))


def test_the_reference_point_and_hypervolume_are_in_the_objectives_units(curve):
    selection = select(curve)
    assert selection.reference_point == pytest.approx((0.1 + 1.1 * 0.2, 100 + 1.1 * 900))
    front = [CURVE[name] for name in "abc"]
    assert selection.hypervolume == pytest.approx(hypervolume(front, selection.reference_point))
    assert "reference point 1.1 in each" in selection.tiers[1].rule


def test_projection_counts_every_pick_once_and_unknown_stays_unknown(curve):
    selection = select(curve)
    assert selection.projected_joules == pytest.approx(10 * (1000 + 400 + 100))
    assert selection.projected_joules_all == pytest.approx(10 * sum(j for _, j in CURVE.values()))
    unknown = select(curve, project=lambda t: None if t.trial_id == "e" else 1.0)
    assert unknown.projected_joules == 3
    assert unknown.projected_joules_all is None


def test_a_stopped_trial_is_never_on_the_front(curve, trial):
    cheap = trial("z", status="pruned", val_loss=0.01, joules=1.0, epochs_done=2)
    selection = select([*curve, cheap])
    assert selection.front == ("a", "b", "c")
    assert selection.excluded == {"z": "stopped by the scheduler after 2 of 6 epochs: its joules are not comparable"}


def test_every_other_exclusion_has_its_words(curve, trial):
    zero = trial("zero", joules=0.0)
    selection = select(
        [
            *curve,
            trial("div", status="pruned", diverged=True, val_loss=None, epochs_done=3),
            trial("nan", val_loss=float("nan")),
            trial("fail", status="failed", val_loss=None, error="out of memory"),
            trial("int", status="interrupted", epochs_done=1),
            trial("dark", joules=None),
            zero,
            trial("other", stage="wide", val_loss=0.001, joules=1.0),
        ]
    )
    assert selection.excluded == {
        "div": "diverged after 3 of 6 epochs",
        "nan": "diverged: its validation loss is not a number",
        "fail": "failed: out of memory",
        "int": "interrupted after 1 of 6 epochs: it never finished",
        "dark": "energy unknown: nothing could be measured",
        "zero": "energy unknown: its meter counted 0 J",
    }
    assert selection.candidates == ("a", "b", "c", "d", "e")


def test_energy_known_in_two_ways_is_never_compared(curve, trial):
    selection = select([*curve, trial("guess", val_loss=0.01, joules=1.0, method="estimated")])
    assert "estimated (gpu)" in selection.excluded["guess"]
    assert "not comparable" in selection.excluded["guess"]
    assert selection.picked == ("a", "b", "c")


def test_between_equal_numbers_the_stronger_method_stays(trial):
    selection = select([trial("guess", val_loss=0.01, method="estimated"), trial("known", method="counter")])
    assert selection.candidates == ("known",)
    assert list(selection.excluded) == ["guess"]


def test_gpu_joules_and_gpu_plus_cpu_joules_are_no_fair_comparison(curve):
    cpu = Share("CPU-0", "cpu", 0.0, 60.0, 1.0, 500.0, "counter")
    wider = dataclasses.replace(curve[0], trial_id="w", energy=curve[0].energy + EnergyReport.of([cpu]))
    selection = select([*curve, wider])
    assert "counter (cpu + gpu), those of the others counter (gpu)" in selection.excluded["w"]


def test_fewer_candidates_than_asked_fill_what_there_is(trial):
    selection = select([trial("a"), trial("b", val_loss=0.2, joules=10.0)], accurate=1, balanced=5)
    assert ids(selection, "accurate") == ["a"]
    assert ids(selection, "balanced") == ["b"]
    alone = select([trial("a")], accurate=3, balanced=3)
    assert ids(alone, "accurate") == ["a"]
    assert ids(alone, "balanced") == []


def test_a_tier_may_be_empty(curve):
    assert ids(select(curve, accurate=0, balanced=1), "balanced") == ["b"]
    assert ids(select(curve, accurate=2, balanced=0), "accurate") == ["a", "b"]


def test_no_candidate_counts_the_reasons_and_says_what_to_do(trial):
    trials = [trial(f"p{i}", status="pruned", epochs_done=1 + i) for i in range(3)]
    trials.append(trial("x", diverged=True, status="pruned"))
    with pytest.raises(UserError) as error:
        select(trials)
    message = str(error.value)
    assert "none of the 4 trials of stage 'deep'" in message
    assert "3 stopped by the scheduler, 1 diverged" in message
    assert "reduction_factor" in message
    with pytest.raises(UserError, match=r"has no trials yet\. Run the search first"):
        select([], stage="deep")


def test_equal_trials_are_told_apart_by_id(trial):
    twins = [trial(name) for name in "dbca"]
    selection = select(twins, accurate=1, balanced=2)
    assert selection.picked == ("a", "b", "c")


def test_low_coverage_is_said(trial):
    blind = Share("GPU-1", "gpu", 0.0, 60.0, 1.0, 10.0, "counter", 0.5)
    row = dataclasses.replace(trial("a"), energy=EnergyReport.of([blind]))
    assert "measured during 50 % of the time only" in reason(select([row]), "a")


@given(
    st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-3, 1e9)), min_size=1, max_size=20),
    st.integers(0, 4),
    st.integers(1, 4),
    st.randoms(),
)
@settings(max_examples=60, deadline=None)
def test_any_trials_give_a_sound_selection_in_any_order(make_trials, points, accurate, balanced, shuffler):
    trials = make_trials(points)
    selection = select(trials, accurate, balanced)
    shuffler.shuffle(trials)
    assert select(trials, accurate, balanced) == selection
    assert len(selection.picked) == min(len(points), accurate + balanced)
    ranks = non_dominated_ranks(points)
    assert set(selection.front) == {f"t{i:02d}" for i in range(len(points)) if ranks[i] == 0}
    taken = {f"t{i:02d}": ranks[i] for i in range(len(points))}
    order = [taken[i] for i in ids(selection, "balanced")]
    assert order == sorted(order)
    assert Selection.from_dict(selection.to_dict()) == selection


@pytest.fixture(scope="module")
def make_trials():
    """Complete trials t00, t01, ... with given losses and joules."""
    from wattier.records import Fidelity, TrialResult

    def make(points):
        rows = []
        for i, (loss, joules) in enumerate(points):
            energy = EnergyReport.of([Share("GPU-0", "gpu", 100.0 * i, 100.0 * i + 60, 1.0, joules, "counter")])
            common = {"val_by_source": {}, "epochs_done": 6, "structures_seen": 1, "wall_seconds": 60.0}
            fidelity = Fidelity("deep", None, 6, 1)
            rows.append(TrialResult("r", f"t{i:02d}", {}, fidelity, "complete", loss, energy=energy, **common))
        return rows

    return make


@pytest.mark.parametrize(
    ("joules", "text"),
    [
        (None, "unknown"),
        (0.0, "0 J"),
        (0.5, "0.500 J"),
        (12.34, "12.3 J"),
        (999.4, "999 J"),
        (999.9, "1.00 kJ"),
        (45_310, "45.3 kJ"),
        (1.234e6, "1.23 MJ"),
        (3.599e6, "1.00 kWh"),
        (3.6e6, "1.00 kWh"),
        (1.8e8, "50.0 kWh"),
        (3.6e10, "10,000 kWh"),
        (float("nan"), "unknown"),
    ],
)
def test_joules_in_words(joules, text):
    assert format_joules(joules) == text


def test_ratios_and_times_in_words():
    assert [format_ratio(x) for x in (None, 0.0, 0.0001, 0.034, 0.5, 1.0, 12.0)] == [
        "unknown", "0.0 %", "< 0.1 %", "3.4 %", "50 %", "100 %", "1,200 %",
    ]  # fmt: skip
    assert [format_seconds(x) for x in (None, 3.0, 300.0, 36_000.0)] == ["unknown", "3.00 s", "5.00 min", "10.0 h"]


def test_order_of_trials_changes_nothing(curve):
    shuffled = curve[:]
    random.Random(1).shuffle(shuffled)
    assert select(shuffled, balanced=3) == select(curve, balanced=3)
