"""The rules of the tiers: what each of them picks, what keeps a trial out, and that neither order nor units matter."""

import dataclasses
import math
import random

import numpy as np
import pytest

from wattier.choices import Choices
from wattier.config_ensemble import SelectSection
from wattier.config_space import ChoiceParameter, RangeParameter
from wattier.errors import UserError
from wattier.objectives import Objectives
from wattier.records import EpochRecord, Selection
from wattier.select import NEAR, select_trials
from wattier.spacing import Spacing
from wattier_telemetry import EnergyReport, Share

SPACE = {
    "width": RangeParameter(low=10, high=1000, log=True),
    "depth": RangeParameter(low=0, high=10),
    "kind": ChoiceParameter(choices=["a", "b"]),
    "fixed": RangeParameter(low=3, high=3),
}

FRONT = {"a": (1.0, 1000.0), "k": (1.2, 300.0), "c": (2.0, 100.0), "m": (1.6, 150.0), "x": (1.9, 900.0)}


def select(trials, *, project=lambda t: t.energy_joules, **arguments):
    known = {"objectives", "curves", "space", "choices"}
    beside = {k: arguments.pop(k) for k in list(arguments) if k in known}
    return select_trials(trials, SelectSection(**arguments), stage="deep", project=project, **beside)


def ids(selection, tier):
    return [p.trial_id for t in selection.tiers if t.name == tier for p in t.picks]


def tier(selection, name):
    return next(t for t in selection.tiers if t.name == name)


def misses(selection):
    return {(m.tier, m.trial_id): m.kind for m in selection.near_misses}


@pytest.fixture
def points(trial):
    """Trials with given losses and joules: ``points(a=(0.1, 1000), ...)``."""
    return lambda **of: [
        trial(name, val_loss=loss, joules=joules, params={"name": name}) for name, (loss, joules) in of.items()
    ]


def steady(noise, seed=0):
    """Epochs of a training that has ended: its loss, with some noise."""
    rng = np.random.default_rng(seed)

    def curves(trial):
        losses = trial.val_loss + noise * rng.standard_normal(12)
        return [EpochRecord(e, None, float(loss), {}, e, 1.0, None) for e, loss in enumerate(losses, start=1)]

    return curves


class TestAccurate:
    def test_a_group_that_stands_out_is_the_tier_and_no_larger(self, trial):
        losses = [1.0, 1.01, 1.02, 1.6, 1.61, 1.7, 1.8, 1.9]
        trials = [trial(f"t{i}", val_loss=loss, params={"x": i}) for i, loss in enumerate(losses)]
        chosen = select(trials, accurate=6, balanced=0, curves=steady(0.02))
        assert ids(chosen, "accurate") == ["t0", "t1", "t2"]
        assert tier(chosen, "accurate").clear is True
        assert misses(chosen) == {("accurate", f"t{i}"): "clearly_worse" for i in (3, 4, 5)}
        assert (
            "one of 3 with a clear advantage over the other 5 (p < 0.001)" in tier(chosen, "accurate").picks[1].reason
        )
        assert "clearly above the 3 most accurate (p < 0.001)" in chosen.near_misses[0].reason
        assert chosen.noise.std == pytest.approx(0.02, rel=0.3)
        assert tier(chosen, "accurate").picks[0].val_loss_noise == pytest.approx(0.02, rel=0.6)
        assert "validation loss 1.01 ± 0.0" in tier(chosen, "accurate").picks[1].reason

    def test_where_nobody_stands_out_it_is_who_cannot_be_told_from_the_best(self, trial):
        losses = [1.0, 1.01, 1.02, 1.03, 1.04, 9.0]
        trials = [trial(f"t{i}", val_loss=loss, params={"x": i}) for i, loss in enumerate(losses)]
        chosen = select(trials, accurate=3, balanced=0, curves=steady(0.1))
        assert ids(chosen, "accurate") == ["t0", "t1", "t2"]
        assert tier(chosen, "accurate").clear is False
        assert tier(chosen, "accurate").notes == (
            "no trial or group of trials stands out: 4 of the other 5 are not clearly worse than the best",
        )
        assert misses(chosen) == {
            ("accurate", "t3"): "next", ("accurate", "t4"): "next", ("accurate", "t5"): "clearly_worse",
        }  # fmt: skip

    def test_without_noise_the_largest_gap_decides_and_the_tier_says_so(self, points):
        trials = points(a=(1.0, 1), b=(1.1, 1), c=(1.5, 1), d=(1.6, 1), e=(9.0, 1))
        for how in ({"curves": None}, {"curves": lambda _: []}, {"accurate_rule": "gap"}):
            chosen = select(trials, accurate=3, balanced=0, **how)
            assert ids(chosen, "accurate") == ["a", "b"]
            assert ("cannot be estimated" in str(tier(chosen, "accurate").notes)) == ("curves" in how)
            assert "before a gap of 36 % in loss, with 1 other" in tier(chosen, "accurate").picks[0].reason
            assert chosen.noise is None
        assert ids(select(trials, accurate=4, balanced=0), "accurate") == ["a", "b", "c", "d"]

    def test_losses_below_zero_have_gaps_too(self, points):
        trials = points(a=(-5.0, 1), b=(-4.9, 1), c=(-1.0, 1), d=(0.0, 1))
        assert ids(select(trials, accurate=3, balanced=0), "accurate") == ["a", "b"]
        chosen = select(trials, accurate=3, balanced=0, curves=steady(0.1))
        assert ids(chosen, "accurate") == ["a", "b"]

    def test_equal_losses_are_one_group(self, points):
        trials = points(a=(1.0, 3), b=(1.0, 2), c=(1.0, 1))
        assert ids(select(trials, accurate=2, balanced=0), "accurate") == ["c", "b"]
        assert ids(select(trials, accurate=2, balanced=0, curves=steady(0.0)), "accurate") == ["c", "b"]

    def test_a_single_trial(self, points):
        for rule in ("significance", "gap", "lowest"):
            chosen = select(points(a=(1.0, 3)), accurate=2, accurate_rule=rule, curves=steady(0.1))
            assert chosen.picked == ("a",)
            assert chosen.near_misses == ()


class TestKnee:
    def test_its_number_is_the_share_saved_less_the_share_given_up(self, points):
        chosen = select(points(**FRONT), accurate=1, balanced=2, accurate_rule="lowest")
        assert ids(chosen, "balanced") == ["k", "m"]
        assert tier(chosen, "balanced").picks[0].trade_off == pytest.approx(700 / 900 - 0.2)
        assert "trade-off +0.58 between a and c" in tier(chosen, "balanced").picks[0].reason
        assert [(m.trial_id, m.trade_off) for m in chosen.near_misses if m.tier == "balanced"] == [
            ("c", pytest.approx(0.0)), ("x", pytest.approx(100 / 900 - 0.9)),
        ]  # fmt: skip
        # The distance from (0.2, 2/9) to the line x + y = 1 is this number over the square root of 2 (Das 1999).
        line, point = np.array([1.0, 1.0]) / math.sqrt(2), np.array([0.2, 200 / 900])
        assert tier(chosen, "balanced").picks[0].trade_off / math.sqrt(2) == pytest.approx(
            1 / math.sqrt(2) - line @ point
        )

    def test_one_that_diverged_nearly_does_not_shrink_the_front_to_a_point(self, points):
        trials = points(**FRONT, n=(1.5, 500.0), o=(1.7, 600.0), z=(1e6, 50.0))
        assert ids(select(trials, balanced=2), "balanced") == ["k", "m"]
        assert "between a, the most accurate, and c, the cheapest" in tier(select(trials), "balanced").rule

    def test_where_the_best_is_the_cheapest_nothing_is_traded(self, points):
        trials = points(a=(1.0, 100.0), b=(1.5, 150.0), c=(1.1, 300.0), d=(3.0, 500.0))
        chosen = select(trials, balanced=2)
        assert ids(chosen, "balanced") == ["b", "c"] or ids(chosen, "balanced") == ["c", "b"]
        assert "a is the most accurate and the cheapest" in tier(chosen, "balanced").notes[0]

    def test_equal_trials_have_no_scale_and_go_by_id(self, points):
        assert select(points(c=(1.0, 5.0), b=(1.0, 5.0), a=(1.0, 5.0))).picked == ("a", "b", "c")


class TestCeiling:
    def test_in_joules_or_as_a_ratio_and_only_of_the_balanced_tier(self, points):
        trials = points(**FRONT)
        for rule in ("knee", "fronts"):
            chosen = select(trials, balanced=2, balanced_rule=rule, max_energy_joules=200.0)
            assert ids(chosen, "accurate") == ["a"]
            assert sorted(ids(chosen, "balanced")) == ["c", "m"]
            assert misses(chosen)["balanced", "k"] == "ceiling"
        chosen = select(trials, balanced=4, max_energy_ratio=0.3)
        assert ids(chosen, "balanced") == ["k", "m", "c"]
        why = next(m.reason for m in chosen.near_misses if m.kind == "ceiling")
        assert "dearer than the energy ceiling of 300 J, 30 % of the joules of a" in why
        assert tier(chosen, "balanced").notes == ("1 of 4 places in balanced stay free: 1 above the energy ceiling",)

    def test_unknown_joules_are_not_below_a_ceiling(self, trial):
        trials = [trial("a"), trial("b", val_loss=0.2), trial("c", val_loss=0.3, joules=None)]
        chosen = select(trials, objectives=Objectives(("val_loss",)), max_energy_joules=1e9)
        assert ids(chosen, "balanced") == ["b"]
        assert misses(chosen)["balanced", "c"] == "ceiling"


class TestDistance:
    def params(self, width=100, depth=5, kind="a"):
        return {"width": width, "depth": depth, "kind": kind, "fixed": 3}

    def test_is_the_share_of_the_diagonal(self, trial):
        rows = [
            trial("o", params=self.params(width=10, depth=0)),
            trial("w", params=self.params(width=100, depth=0)),
            trial("d", params=self.params(width=10, depth=4)),
            trial("k", params=self.params(width=10, depth=0, kind="b")),
            trial("far", params=self.params(width=1000, depth=10, kind="b")),
        ]
        spacing = Spacing(SPACE, rows)
        far = {name: spacing.nearest(name, ["o"])[1] for name in ("w", "d", "k", "far")}
        assert far == pytest.approx({"w": 0.5 / 3**0.5, "d": 0.4 / 3**0.5, "k": 1 / 3**0.5, "far": 1.0})
        assert spacing.nearest("o", ["far", "k", "d"]) == ("d", pytest.approx(0.4 / 3**0.5))
        assert spacing.nearest("o", []) is None
        assert Spacing({"fixed": SPACE["fixed"]}, rows).nearest("o", ["w"]) is None

    def test_a_copy_of_a_pick_gives_its_place_to_the_next(self, trial):
        rows = [
            trial("a", val_loss=1.0, joules=1000.0, params=self.params()),
            trial("b", val_loss=1.2, joules=300.0, params=self.params(depth=1)),
            trial("b2", val_loss=1.21, joules=305.0, params=self.params(width=101, depth=1)),
            trial("a2", val_loss=1.22, joules=310.0, params=self.params()),
            trial("c", val_loss=1.5, joules=250.0, params=self.params(kind="b")),
            trial("z", val_loss=2.0, joules=100.0, params=self.params(width=900, kind="b")),
        ]
        chosen = select(rows, balanced=2, space=SPACE)
        assert chosen.picked == ("a", "b", "c")
        kinds = misses(chosen)
        assert (kinds["balanced", "a2"], kinds["balanced", "b2"]) == ("copy", "copy")
        why = {m.trial_id: m.reason for m in chosen.near_misses}
        assert "its hyper-parameters are 0 from those of a, nearer than 0.05" in why["a2"]
        assert "its hyper-parameters are 0.0012 from those of b, nearer than 0.05" in why["b2"]
        assert select(rows, balanced=2, space=SPACE, min_distance=0.0).picked == ("a", "b", "b2")
        alone = select(rows[:3], balanced=5, space=SPACE)
        assert tier(alone, "balanced").notes == ("4 of 5 places in balanced stay free: 1 too near to a pick",)

    def test_it_holds_in_the_accurate_tier_too(self, trial):
        rows = [
            trial(n, val_loss=loss, params=self.params(depth=d))
            for n, loss, d in (("a", 1.0, 5), ("b", 1.001, 5), ("c", 1.002, 1))
        ]
        assert ids(select(rows, accurate=2, balanced=0, accurate_rule="lowest", space=SPACE), "accurate") == ["a", "c"]


class TestFlags:
    def rows(self, trial):
        hot = dataclasses.replace(trial("hot", val_loss=0.12, joules=300.0), throttled=True, throttled_ratio=0.4)
        blind = EnergyReport.of([Share("GPU-0", "gpu", 0.0, 60.0, 1.0, 400.0, "counter", 0.5)])
        partly = dataclasses.replace(trial("partly", val_loss=0.13), energy=blind)
        return [trial("a"), hot, partly, trial("c", val_loss=0.2, joules=100.0)]

    def test_they_are_said_wherever_the_trial_is_named(self, trial):
        chosen = select(self.rows(trial), balanced=1)
        assert tier(chosen, "balanced").picks[0].flags == ("throttled",)
        assert next(m for m in chosen.near_misses if m.trial_id == "partly").flags == ("partly_measured",)
        assert "measured during 50 % of the time only" in chosen.near_misses[0].reason

    def test_they_can_be_left_out_of_what_joules_decide_and_not_of_what_the_loss_does(self, trial):
        rows = self.rows(trial)
        chosen = select(rows, balanced=3, flagged="leave_out")
        assert ids(chosen, "balanced") == ["c"]
        assert {m.trial_id for m in chosen.near_misses if m.kind == "flagged"} == {"hot", "partly"}
        assert "left out since it is partly measured" in str(chosen.near_misses)
        best = dataclasses.replace(rows[0], throttled=True, throttled_ratio=0.9)
        assert ids(select([best, *rows[1:]], flagged="leave_out"), "accurate") == ["a"]


class TestByHand:
    def test_a_pin_is_picked_and_takes_nobodys_place(self, points):
        trials = points(**FRONT)
        chosen = select(trials, balanced=1, choices=Choices(pinned=("x",)))
        assert chosen.picked == ("a", "k", "x")
        assert (tier(chosen, "pinned").rule_name, chosen.pinned) == ("hand", ("x",))
        assert tier(chosen, "pinned").picks[0].flags == ("pinned",)
        assert "pinned by hand" in tier(chosen, "pinned").picks[0].reason
        assert chosen.projected_joules == 1000 + 300 + 900

    def test_a_pin_that_a_rule_picks_stays_in_its_tier(self, points):
        chosen = select(points(**FRONT), balanced=1, choices=Choices(pinned=("k",)))
        assert [t.name for t in chosen.tiers] == ["accurate", "balanced"]
        assert tier(chosen, "balanced").picks[0].flags == ("pinned",)
        assert "; pinned by hand" in tier(chosen, "balanced").picks[0].reason

    def test_one_that_was_stopped_may_be_pinned(self, points, trial):
        stopped = trial("s", status="pruned", val_loss=3.0, joules=5.0, epochs_done=2)
        chosen = select([*points(**FRONT), stopped], choices=Choices(pinned=("s",)))
        assert chosen.picked[-1] == "s"
        pick = tier(chosen, "pinned").picks[0]
        assert pick.reason.startswith("pinned by hand, though it was not compared (pruned after 2 epochs); 5.00 J")
        assert (pick.energy_joules, pick.projected_joules, pick.front) == (5.0, 5.0, None)

    def test_a_veto_moves_the_others_up_and_changes_no_fact(self, points):
        trials = points(**FRONT)
        before, after = select(trials), select(trials, choices=Choices(vetoed=("a", "k")))
        assert (ids(before, "accurate"), ids(after, "accurate")) == (["a"], ["m"])
        assert not {"a", "k"} & set(after.picked)
        assert (after.front, after.hypervolume, after.candidates) == (
            before.front,
            before.hypervolume,
            before.candidates,
        )
        vetoed = [m for m in after.near_misses if m.kind == "veto"]
        assert [m.trial_id for m in vetoed] == ["a", "k"]
        assert "validation loss 1, 38 % below the best" in vetoed[0].reason
        assert "ruled out by hand" in vetoed[0].reason

    def test_all_vetoed(self, points):
        with pytest.raises(UserError, match=r"all 2 trials .* ruled out by hand\. Give one back: .*--free ID"):
            select(points(a=(1, 1), b=(2, 2)), choices=Choices(vetoed=("a", "b")))


class TestObjectives:
    def test_of_the_loss_alone_joules_need_not_be_known(self, trial):
        rows = [trial(n, val_loss=v, joules=None) for n, v in (("c", 0.3), ("a", 0.1), ("b", 0.2), ("d", 0.4))]
        chosen = select(rows, balanced=2, objectives=Objectives(("val_loss",)))
        assert chosen.picked == ("a", "b", "c")
        assert (chosen.hypervolume, chosen.reference_point, chosen.front) == (None, None, ("a",))
        assert (tier(chosen, "balanced").rule_name, tier(chosen, "balanced").picks[0].front) == ("objective", None)
        assert "validation loss 0.2, 100 % above the best" in tier(chosen, "balanced").picks[0].reason
        assert Selection.from_dict(chosen.to_dict()) == chosen

    def test_of_a_weighted_sum_the_sum_is_the_trade_off(self, points):
        weighted = Objectives(("val_loss", "energy_joules"), (1.0, 0.001))
        chosen = select(points(**FRONT), balanced=2, objectives=weighted)
        assert ids(chosen, "accurate") == ["a"]
        assert ids(chosen, "balanced") == ["k", "m"]  # 1.5 and 1.75; c has 2.1
        assert "weighted sum of val_loss and energy_joules 1.5" in tier(chosen, "balanced").picks[0].reason

    def test_joules_a_structure_are_compared_where_the_search_does(self, trial):
        rows = [
            dataclasses.replace(trial(n, val_loss=v, joules=j), structures_seen=s)
            for n, v, j, s in (("a", 1.0, 100.0, 100), ("b", 1.1, 900.0, 9000), ("c", 2.0, 90.0, 1800))
        ]
        chosen = select(rows, balanced=1, objectives=Objectives(("val_loss", "joules_per_structure")))
        assert ids(chosen, "balanced") == ["b"]
        assert ids(select(rows, balanced=1), "balanced") == ["c"]
        assert "0.1 joules a structure" in tier(chosen, "balanced").picks[0].reason
        unseen = dataclasses.replace(rows[2], structures_seen=0)
        left = select([*rows[:2], unseen], objectives=Objectives(("val_loss", "joules_per_structure")))
        assert left.excluded == {"c": "its joules_per_structure is not known"}


def world(seed, factor=1.0):
    """Random trials with ties, copies, flags, and epochs; joules in another unit where a factor is given."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 40))
    grid = rng.random() < 0.5
    losses = rng.integers(1, 8, n) / 4 if grid else rng.lognormal(0, 0.5, n)
    joules = rng.integers(1, 8, n) * 100.0 if grid else rng.lognormal(5, 1, n)
    return n, losses, joules * factor, rng.random(n) < 0.1, rng.integers(0, 4, n), rng.normal(0, 0.05, (n, 8))


def campaign(trial, seed, factor=1.0):
    n, losses, joules, hot, depth, noise = world(seed, factor)
    rows = [
        dataclasses.replace(
            trial(f"t{i:02d}", val_loss=float(losses[i]), joules=float(joules[i]),
                  params={"width": 10 + 3 * i, "depth": int(depth[i]), "kind": "ab"[i % 2], "fixed": 3}),
            throttled=bool(hot[i]), throttled_ratio=0.5,
        )
        for i in range(n)
    ]  # fmt: skip

    def curves(of):
        i = int(of.trial_id[1:])
        return [EpochRecord(e, None, float(losses[i] + noise[i, e]), {}, e, 1.0, None) for e in range(8)]

    return rows, curves


RULES = [
    {"accurate_rule": accurate, "balanced_rule": balanced} | more
    for accurate in ("significance", "gap", "lowest")
    for balanced in ("knee", "fronts")
    for more in ({}, {"max_energy_ratio": 0.7}, {"min_distance": 0.2, "flagged": "leave_out"})
]


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: " ".join(map(str, rules.values())))
def test_neither_the_order_of_trials_nor_the_unit_of_joules_changes_who_is_picked(trial, rules):
    for seed in range(6):
        settings = {"accurate": 3, "balanced": 5, "space": SPACE, **rules}
        rows, curves = campaign(trial, seed)
        first = select(rows, curves=curves, **settings)
        random.Random(seed).shuffle(rows)
        assert select(rows, curves=curves, **settings) == first
        for factor in (1 / 3.6e6, 7.3, 1e3):
            scaled = select(campaign(trial, seed, factor)[0], curves=curves, **settings)
            assert outline(scaled) == outline(first), (seed, factor)
            assert scaled.hypervolume == pytest.approx(first.hypervolume * factor)
        assert len(first.picked) == len(set(first.picked)) <= 8
        named = {m.trial_id for m in first.near_misses}
        assert not named & set(first.picked)
        for name in ("accurate", "balanced"):
            near = [
                m for m in first.near_misses if m.tier == name and m.kind in ("next", "clearly_worse", "behind_gap")
            ]
            assert len(near) <= NEAR
        assert Selection.from_dict(first.to_dict()) == first


def outline(selection):
    """All that must not depend on the unit."""
    return (
        [(t.name, [p.trial_id for p in t.picks], t.clear) for t in selection.tiers],
        [(m.tier, m.trial_id, m.kind) for m in selection.near_misses],
        selection.front,
        selection.excluded,
    )


def test_a_selection_from_before_there_were_rules_still_reads():
    old = {
        "stage": "deep", "tiers": [{"name": "accurate", "rule": "lowest", "picks": [{"trial_id": "a", "reason": "r"}]}],
        "front": ["a"], "hypervolume": 1.0, "reference_point": [1.0, 2.0], "candidates": ["a"], "excluded": {},
        "projected_joules": None, "projected_joules_all": None,
    }  # fmt: skip
    read = Selection.from_dict(old)
    assert read.picked == ("a",)
    assert (read.near_misses, read.noise, read.pinned, read.tiers[0].clear) == ((), None, (), None)
    assert Selection.from_dict(read.to_dict() | {"of_a_newer_version": 1}) == read
