"""Fronts and hypervolume: closed forms, properties, and Optuna's own code as a second opinion."""

import moocore
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna._hypervolume import compute_hypervolume

from wattier.pareto import hypervolume, hypervolume_contributions, non_dominated_ranks
from wattier.select import compare, split_candidates

CORNER = (11.0, 11.0)
# Few distinct values, so that ties and duplicates are common.
coarse = st.integers(0, 12).map(float)
fine = st.floats(0, 12, allow_subnormal=False)
point_lists = st.lists(st.tuples(coarse, coarse) | st.tuples(fine, fine), min_size=1, max_size=25)


def brute_ranks(points):
    left, ranks, rank = dict(enumerate(points)), {}, 0
    while left:
        front = [
            i for i, (a, b) in left.items() if not any(c <= a and d <= b and (c < a or d < b) for c, d in left.values())
        ]
        for i in front:
            ranks[i] = rank
            del left[i]
        rank += 1
    return [ranks[i] for i in range(len(points))]


def test_ranks_of_a_staircase():
    points = [(1, 4), (2, 2), (4, 1), (2, 4), (5, 5), (4, 2)]
    assert non_dominated_ranks(points).tolist() == [0, 0, 0, 1, 2, 1]


def test_equal_points_share_a_rank_and_equal_coordinates_do_not():
    assert non_dominated_ranks([(1, 1), (1, 1), (1, 2), (2, 1)]).tolist() == [0, 0, 1, 1]


def test_no_points():
    assert non_dominated_ranks([]).shape == (0,)
    assert hypervolume([], CORNER) == 0
    assert hypervolume_contributions([], CORNER).shape == (0,)


def test_hypervolume_in_closed_form():
    assert hypervolume([(1, 1)], (3, 4)) == 6
    assert hypervolume([(1, 2), (2, 1)], (3, 3)) == 3
    assert hypervolume([(1, 2), (2, 1), (2, 2), (3, 0), (9, 9)], (3, 3)) == 3


def test_contributions_in_closed_form():
    points = [(1, 3), (2, 2), (3, 1), (3, 3)]
    # The outer points keep a strip of 1 x 1, the middle one its square, the dominated one nothing.
    assert hypervolume_contributions(points, (4, 4)).tolist() == [1, 1, 1, 0]
    assert hypervolume_contributions([(1, 1), (1, 1)], (2, 2)).tolist() == [0, 0]
    # Without (1, 1) the point that it dominates would still cover 1 of its 4.
    assert hypervolume_contributions([(1, 1), (2, 2)], (3, 3)).tolist() == [3, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refuses_what_is_not_finite(bad):
    for function in (
        lambda p: hypervolume(p, CORNER),
        lambda p: hypervolume_contributions(p, CORNER),
        non_dominated_ranks,
    ):
        with pytest.raises(ValueError, match=r"point 1 is .* must be finite"):
            function([(0, 0), (1, bad)])
    with pytest.raises(ValueError, match="must be finite"):
        hypervolume([(0, 0)], (1, bad))


def test_refuses_three_objectives():
    with pytest.raises(ValueError, match=r"shape \[1, 3\], but must be \[n, 2\]"):
        non_dominated_ranks([(1, 2, 3)])


@given(point_lists)
@settings(max_examples=150, deadline=None)
def test_ranks_agree_with_the_definition(points):
    assert non_dominated_ranks(points).tolist() == brute_ranks(points)


@given(point_lists)
@settings(max_examples=100, deadline=None)
def test_hypervolume_agrees_with_optuna(points):
    inside = np.array([p for p in points if p[0] < 11 and p[1] < 11]).reshape(-1, 2)
    expected = compute_hypervolume(inside, np.array(CORNER)) if len(inside) else 0.0
    assert hypervolume(points, CORNER) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(point_lists, st.tuples(coarse, coarse), st.randoms())
@settings(max_examples=100, deadline=None)
def test_hypervolume_never_falls_and_knows_no_order(points, another, random):
    before = hypervolume(points, CORNER)
    assert hypervolume([*points, another], CORNER) >= before - 1e-12
    random.shuffle(points)
    assert hypervolume(points, CORNER) == pytest.approx(before, rel=1e-12)


@given(point_lists)
@settings(max_examples=100, deadline=None)
def test_contributions_are_what_removal_costs(points):
    values = np.array(points)
    contributions = hypervolume_contributions(values, CORNER)
    total = hypervolume(values, CORNER)
    assert (contributions >= 0).all()
    assert contributions.sum() <= total * (1 + 1e-9) + 1e-9
    assert (contributions[non_dominated_ranks(values) > 0] == 0).all()
    for i, contribution in enumerate(contributions):
        rest = hypervolume(np.delete(values, i, axis=0), CORNER)
        assert contribution == pytest.approx(total - rest, abs=1e-9)


@given(point_lists)
@settings(max_examples=50, deadline=None)
def test_ranks_ignore_units(points):
    values = np.array(points)
    assert (non_dominated_ranks(values * [1024.0, 0.25]) == non_dominated_ranks(values)).all()


def test_a_dominated_point_among_many_contributes_exactly_nothing():
    values = np.random.default_rng(1).random((300, 2))
    contributions = hypervolume_contributions(values, (1.1, 1.1))
    assert (contributions[non_dominated_ranks(values) > 0] == 0).all()


@given(point_lists)
@settings(max_examples=300, deadline=None)
def test_ranks_volume_and_contributions_agree_with_moocore(points):
    values = np.array(points)
    assert (non_dominated_ranks(values) == moocore.pareto_rank(values)).all()
    assert hypervolume(values, CORNER) == pytest.approx(moocore.hypervolume(values, ref=CORNER), rel=1e-12, abs=1e-12)
    expected = moocore.hv_contributions(values, ref=CORNER, ignore_dominated=False)
    assert hypervolume_contributions(values, CORNER) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_duplicate_takes_the_contribution_and_leaves_those_of_its_neighbours():
    front = [(1, 3), (2, 2), (3, 1)]
    assert hypervolume_contributions(front, (4, 4)).tolist() == [1, 1, 1]
    assert hypervolume_contributions([*front, (2, 2)], (4, 4)).tolist() == [1, 0, 1, 0]
    # On a line with a point of the front: (2, 3) is behind (2, 2) alone only in the part that (1, 3) leaves.
    assert hypervolume_contributions([*front, (2, 2.5)], (4, 4)).tolist() == [1, 0.5, 1, 0]
    assert hypervolume_contributions([*front, (2, 3)], (4, 4)).tolist() == [1, 1, 1, 0]


def test_a_point_on_or_beyond_the_corner_contributes_nothing():
    assert hypervolume_contributions([(1, 1), (4, 0), (0, 4), (5, -1)], (4, 4)).tolist() == [9, 0, 0, 0]
    assert hypervolume_contributions([(4, 4)], (4, 4)).tolist() == [0]


def test_five_thousand_points_of_one_front_or_as_many_fronts():
    x = np.sort(np.random.default_rng(0).random(5000))
    front = np.column_stack([x, 1 - x])
    assert (non_dominated_ranks(front) == 0).all()
    expected = moocore.hv_contributions(front, ref=(1.1, 1.1))
    assert hypervolume_contributions(front, (1.1, 1.1)) == pytest.approx(expected, rel=1e-9)
    chain = np.column_stack([x, x])
    assert (non_dominated_ranks(chain) == np.arange(5000)).all()
    assert hypervolume_contributions(chain, (1.1, 1.1))[1:].max() == 0


def random_set(seed):
    """Points on a coarse grid (ties, duplicates), or fine ones, some of them twice, or a single one."""
    rng = np.random.default_rng(seed)
    n = 1 if seed % 10 == 0 else int(rng.integers(2, 60))
    values = rng.integers(0, 12, (n, 2)).astype(float) if seed % 2 else rng.uniform(0, 12, (n, 2))
    return np.concatenate([values, values[rng.random(n) < 0.2]])


@pytest.mark.parametrize("block", range(5))
def test_500_random_sets_agree_with_moocore_and_nan_is_refused(block):
    kinds = {"single": 0, "tied": 0, "double": 0}
    for seed in range(100 * block, 100 * block + 100):
        values = random_set(seed)
        kinds["single"] += len(values) == 1
        kinds["double"] += len(np.unique(values, axis=0)) < len(values)
        kinds["tied"] += len(np.unique(values[:, 0])) < len(np.unique(values, axis=0))
        assert (non_dominated_ranks(values) == moocore.pareto_rank(values)).all()
        assert hypervolume(values, CORNER) == pytest.approx(moocore.hypervolume(values, ref=CORNER), rel=1e-12)
        theirs = moocore.hv_contributions(values, ref=CORNER, ignore_dominated=False)
        assert hypervolume_contributions(values, CORNER) == pytest.approx(theirs, rel=1e-9, abs=1e-9)
        place = seed % (len(values) + 1)
        damaged = np.insert(values, place, [np.nan, 1.0], axis=0)
        for function in (non_dominated_ranks, lambda p: hypervolume_contributions(p, CORNER)):
            with pytest.raises(ValueError, match=f"point {place} is .*nan.* must be finite"):
                function(damaged)
    assert min(kinds.values()) >= 5


def test_what_is_compared_has_no_nan_and_the_fronts_of_moocore(trial):
    """A trial whose loss is not a number is no candidate; the others stand as if it had never been."""
    for seed in range(1, 40):
        values = random_set(seed) + 0.5
        rows = [trial(f"t{i:03d}", val_loss=loss, joules=joules) for i, (loss, joules) in enumerate(values.tolist())]
        rows.insert(seed % len(rows), trial("nan", val_loss=float("nan"), joules=1.0))
        candidates, excluded = split_candidates(rows, stage="deep")
        assert list(excluded) == ["nan"]
        field = compare(candidates)
        assert [s.rank for s in field.standings] == moocore.pareto_rank(values).tolist()
        theirs = moocore.hypervolume(values, ref=field.reference_point)
        assert field.hypervolume == pytest.approx(theirs, rel=1e-12)
