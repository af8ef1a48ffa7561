"""What an epoch draws and how it is cut into steps: against greedy loops, counts in closed form, brute force."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wattier_gnn.batching import StepLimits, cut_into_steps, split_over_ranks
from wattier_gnn.sampling import Sampler, choose_subset, source_shares
from wattier_gnn.structure import DataError

FEW = settings(max_examples=60, deadline=None)
SOURCE_INDEX = np.repeat([0, 1, 2], [90, 8, 30])
ALL = np.arange(128)


def sampler(mixture: Any, n_draws: int | None = None, seed: int = 0, **options: Any) -> Sampler:
    """Over three sources of 90, 8 and 30 structures."""
    counts = np.bincount(SOURCE_INDEX)
    shares = source_shares(counts, "abc", mixture, options.get("temperature", 2.0), options.get("weights"))
    return Sampler(ALL, seed=seed, source_index=SOURCE_INDEX, shares=shares, n_draws=n_draws)


def drawn_by_source(epoch: Any) -> list[int]:
    return np.bincount(SOURCE_INDEX[epoch], minlength=3).tolist()


def test_a_subset_takes_evenly_from_sources() -> None:
    subset = choose_subset(ALL, SOURCE_INDEX, 40, seed=1)
    assert np.bincount(SOURCE_INDEX[subset]).tolist() == [16, 8, 16]
    assert len(set(subset.tolist())) == 40
    assert (choose_subset(ALL, SOURCE_INDEX, 40, seed=1) == subset).all()
    assert (choose_subset(ALL, SOURCE_INDEX, None, seed=1) == ALL).all()
    assert (choose_subset(ALL, SOURCE_INDEX, 999, seed=1) == ALL).all()


def test_a_larger_subset_holds_the_smaller() -> None:
    """A promoted trial has seen its data before: stages of a funnel are nested."""
    source_index = np.array([0] * 50 + [1] * 50)
    small, large = (set(choose_subset(np.arange(100), source_index, n, seed=2).tolist()) for n in (10, 40))
    assert small < large


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), part=st.floats(0, 1))
@FEW
def test_a_subset_is_dealt_one_by_one(sizes: list[int], part: float) -> None:
    """To the pile that gave least and has some left, the first of equals."""
    source_index = np.repeat(np.arange(len(sizes)), sizes)
    n = int(part * (sum(sizes) - 1))
    taken = [0] * len(sizes)
    for _ in range(n):
        room = [k for k in range(len(sizes)) if taken[k] < sizes[k]]
        taken[min(room, key=lambda k: taken[k])] += 1
    subset = choose_subset(np.arange(sum(sizes)), source_index, n, seed=3)
    assert np.bincount(source_index[subset], minlength=len(sizes)).tolist() == taken


@pytest.mark.parametrize(
    ("mixture", "options", "expected"),
    [
        ("natural", {}, [90, 8, 30]),
        ("uniform", {}, [43, 43, 42]),
        ("temperature", {"temperature": 1.0}, [90, 8, 30]),
        # 128 sqrt(n) / (9.487 + 2.828 + 5.477): 68.2, 20.3 and 39.4
        ("temperature", {"temperature": 2.0}, [68, 20, 40]),
        ("weights", {"weights": {"a": 2.0, "b": 1.0, "c": 1.0}}, [64, 32, 32]),
    ],
)
def test_shares_of_the_sources(mixture: Any, options: dict[str, Any], expected: list[int]) -> None:
    for number in range(3):
        assert drawn_by_source(sampler(mixture, **options).epoch(number)) == expected


def test_a_high_temperature_is_uniform() -> None:
    assert source_shares(np.array([90, 8, 30]), "abc", "temperature", 1e9, None) == pytest.approx([1 / 3] * 3)


def test_an_absent_source_has_no_share_and_a_present_one_needs_a_weight() -> None:
    shares = source_shares(np.array([5, 0, 5]), "abc", "uniform", 1.0, None)
    assert shares.tolist() == [0.5, 0.0, 0.5]
    assert source_shares(np.array([5, 0, 5]), "abc", "weights", 1.0, {"a": 3.0, "c": 1.0}).tolist() == [0.75, 0, 0.25]
    with pytest.raises(DataError, match=r"source_weights has no weight for c"):
        source_shares(np.array([5, 0, 5]), "abc", "weights", 1.0, {"a": 3.0})


def test_nothing_to_draw_from_is_said() -> None:
    with pytest.raises(DataError, match="no training structures"):
        Sampler(np.array([], dtype=np.int64), seed=0)


@pytest.mark.parametrize(("mixture", "n_draws"), [("natural", 128), ("natural", 50), ("natural", 300), ("uniform", 99)])
def test_a_source_is_exhausted_before_it_is_shuffled_anew(mixture: str, n_draws: int) -> None:
    """However many epochs have passed, no structure of a source was seen twice more often than another."""
    reader = sampler(mixture, n_draws)
    seen = np.zeros(128, dtype=int)
    for number in range(12):
        epoch = reader.epoch(number)
        assert len(epoch) == n_draws
        np.add.at(seen, epoch, 1)
        piles = [ALL] if mixture == "natural" else [np.flatnonzero(s == SOURCE_INDEX) for s in range(3)]
        for pile in piles:
            assert np.ptp(seen[pile]) <= 1


@pytest.mark.parametrize("mixture", ["natural", "uniform"])
def test_an_epoch_depends_on_seed_and_number_alone(mixture: str) -> None:
    reader = sampler(mixture, 50)
    epochs = [reader.epoch(number).tolist() for number in range(6)]
    assert sampler(mixture, 50).epoch(4).tolist() == epochs[4]
    assert reader.epoch(1).tolist() == epochs[1]
    assert sampler(mixture, 50, seed=1).epoch(4).tolist() != epochs[4]
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_sources_are_mixed_within_an_epoch() -> None:
    """Every tenth of an epoch of 2,000 draws holds each source about as often: within five standard deviations."""
    epoch = sampler("uniform", 2000).epoch(0)
    for tenth in np.split(epoch, 10):
        assert (np.abs(np.array(drawn_by_source(tenth)) - 200 / 3) < 5 * np.sqrt(200 * 2 / 9)).all()


SIZES = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 200)), min_size=1, max_size=40)
LIMITS = st.tuples(st.integers(1, 12), st.none() | st.integers(1, 80), st.none() | st.integers(1, 600))


@given(sizes=SIZES, limits=LIMITS, seed=st.integers(0, 9))
@FEW
def test_steps_hold_what_the_limits_allow(sizes: list[tuple[int, int]], limits: Any, seed: int) -> None:
    n_atoms, n_edges = np.array(sizes).T
    order = np.random.default_rng(seed).permutation(len(sizes))
    structures, atoms, edges = limits
    expected: list[list[int]] = []
    room = (0, 0, 0)
    for k in order.tolist():
        room = (room[0] - 1, room[1] - n_atoms[k], room[2] - n_edges[k])
        if min(room) < 0:
            expected.append([])
            room = (structures - 1, (atoms or 10**9) - n_atoms[k], (edges or 10**9) - n_edges[k])
        expected[-1].append(k)
    steps = [step.tolist() for step in cut_into_steps(order, StepLimits(*limits), n_atoms, n_edges)]
    assert steps == expected


@given(work=st.lists(st.integers(0, 1000), min_size=1, max_size=40), n_ranks=st.integers(1, 7))
@FEW
def test_ranks_get_about_the_same_work(work: list[int], n_ranks: int) -> None:
    step = np.random.default_rng(0).permutation(100)[: len(work)]
    amounts = dict(zip(step.tolist(), work, strict=True))
    parts = split_over_ranks(step, np.array(work), n_ranks)
    assert len(parts) == n_ranks
    assert sorted(np.concatenate(parts)) == sorted(step)
    sums = [sum(amounts[k] for k in part.tolist()) for part in parts]
    counts = [len(part) for part in parts]
    assert max(sums) - min(sums) <= max(work)
    assert max(counts) - min(counts) <= 1


def test_the_split_is_near_the_best_there_is() -> None:
    """Six structures on two ranks, all ways tried: Graham's bound for two ranks is 7/6; equal numbers add a little."""
    rng = np.random.default_rng(5)
    for _ in range(50):
        work = rng.integers(1, 1000, 6)
        chosen = (np.isin(np.arange(6), c) for n in range(7) for c in itertools.combinations(range(6), n))
        best = min(max(work[c].sum(), work[~c].sum()) for c in chosen)
        assert max(work[part].sum() for part in split_over_ranks(np.arange(6), work, 2)) <= 4 / 3 * best


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_ranks_share_the_same_global_batches(n_ranks: int) -> None:
    """Every structure of an epoch once, in the steps that one rank would take, whatever the number of ranks."""
    n_atoms, n_edges = np.random.default_rng(0).integers(1, 30, (2, 128))
    epoch = sampler("natural").epoch(2)
    steps = list(cut_into_steps(epoch, StepLimits(16, atoms=150), n_atoms, n_edges))
    parts = [split_over_ranks(step, n_edges[step], n_ranks) for step in steps]
    assert [sorted(np.concatenate(part).tolist()) for part in parts] == [sorted(step.tolist()) for step in steps]
    assert sorted(np.concatenate(steps)) == ALL.tolist()
