"""Composition baselines and leak-free splits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wattier_gnn.reference import composition, fit_reference, fit_references
from wattier_gnn.splits import TEST, TRAIN, VAL, split_by_group

FRACTIONS = {"train": 0.8, "val": 0.1, "test": 0.1}


def random_counts(rng: Any, n: int, elements: list[int]) -> Any:
    counts = np.zeros((n, 119))
    counts[:, elements] = rng.integers(0, 20, (n, len(elements)))
    return counts


def test_composition_counts_every_element() -> None:
    counts = composition(np.array([1, 1, 8, 118]), np.array([3, 0, 1]))
    assert counts.shape == (3, 119)
    assert counts[0, 1] == 2
    assert counts[0, 8] == counts[2, 118] == 1
    assert counts.sum() == 4
    assert composition(np.array([], dtype=int), np.array([], dtype=int)).shape == (0, 119)


def test_exact_linear_data_is_recovered_at_total_energies_in_float64() -> None:
    """Total energies of -1e4 eV and more an atom; the coefficients come back to a micro-eV."""
    rng = np.random.default_rng(0)
    elements = [1, 6, 7, 8, 17]
    truth = np.zeros(119)
    truth[elements] = [-13.6057123, -1029.1234567, -1485.7654321, -2042.9876543, -12522.1357911]
    counts = random_counts(rng, 200, elements)
    found = fit_reference(counts, counts @ truth)
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-6)
    absent = np.setdiff1d(np.arange(119), elements)
    assert not found[absent].any()


def test_residuals_are_those_of_least_squares() -> None:
    rng = np.random.default_rng(1)
    counts = random_counts(rng, 100, [1, 8])
    energies = counts @ np.linspace(-1e4, 0, 119) + rng.normal(0, 1, 100)
    residual = energies - counts @ fit_reference(counts, energies)
    np.testing.assert_allclose(counts.T @ residual, 0, atol=1e-5)


def test_collinear_compositions_do_not_blow_up() -> None:
    """Na:Cl always 1:1, a third element in one structure only: the pair's energy is shared evenly."""
    counts = np.zeros((5, 119))
    counts[:, 11] = counts[:, 17] = [1, 2, 4, 8, 3]
    counts[4, 8] = 1
    energies = -17000.0 * counts[:, 11] - 2000.0 * counts[:, 8]
    found = fit_reference(counts, energies)
    assert found[11] == pytest.approx(-8500.0, abs=1e-6)
    assert found[17] == pytest.approx(-8500.0, abs=1e-6)
    assert found[8] == pytest.approx(-2000.0, abs=1e-6)


def test_every_source_has_a_row_and_a_source_without_structures_has_zeros() -> None:
    counts = composition(np.array([1, 1, 1]), np.array([1, 2]))
    rows = fit_references(counts, np.array([-5.0, -14.0]), np.array([0, 1]), ["a", "b", "c"])
    assert rows.shape == (3, 119)
    np.testing.assert_allclose(rows[:, 1], [-5.0, -7.0, 0.0], atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    truth=st.lists(st.floats(-3e4, 10.0), min_size=1, max_size=6),
    n=st.integers(20, 60),
)
def test_predictions_are_exact_on_any_linear_data(seed: int, truth: list[float], n: int) -> None:
    rng = np.random.default_rng(seed)
    elements = rng.choice(np.arange(1, 119), len(truth), replace=False).tolist()
    counts = random_counts(rng, n, elements)
    energies = counts[:, elements] @ np.array(truth)
    np.testing.assert_allclose(counts @ fit_reference(counts, energies), energies, rtol=1e-9, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=80),
    seed=st.integers(0, 1000),
    n_elements=st.integers(1, 12),
)
def test_splits_tear_no_group_and_train_on_every_element(sizes: list[int], seed: int, n_elements: int) -> None:
    rng = np.random.default_rng(seed)
    groups = [f"g{k}" for k, size in enumerate(sizes) for _ in range(size)]
    elements = [frozenset(rng.integers(1, n_elements + 1, 2).tolist()) for _ in groups]
    split = split_by_group(groups, elements, FRACTIONS, seed)
    for name in set(groups):
        assert len({int(s) for s, g in zip(split, groups, strict=True) if g == name}) == 1
    trained = frozenset[int]().union(*(e for e, s in zip(elements, split, strict=True) if s == TRAIN))
    assert trained == frozenset[int]().union(*elements)
    for part in (VAL, TEST):
        assert (split == part).sum() < 0.1 * len(groups) + max(sizes)


def test_shares_are_met_where_groups_are_small() -> None:
    groups = [str(k // 3) for k in range(3000)]
    split = split_by_group(groups, [frozenset({1, 6})] * 3000, FRACTIONS, seed=4)
    assert np.bincount(split).tolist() == pytest.approx([2400, 300, 300], abs=6)


def test_splits_are_reproducible_and_depend_on_the_seed() -> None:
    groups = [str(k) for k in range(100)]
    elements = [frozenset({1})] * 100
    first, again, other = (split_by_group(groups, elements, FRACTIONS, seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    shuffled = split_by_group(groups[::-1], elements, FRACTIONS, 1)
    assert (shuffled[::-1] == first).all()
