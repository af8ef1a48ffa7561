"""Composition baselines and leak-free splits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wattier_gnn.reference import RIDGES, StreamedReference, baseline, composition, fit_correction, fit_reference
from wattier_gnn.splits import TEST, TRAIN, UNDEALT, VAL, deal_groups, element_masks

FRACTIONS = {"train": 0.8, "val": 0.1, "test": 0.1}


def streamed(counts: Any, energies: Any, chunk: int = 7) -> StreamedReference:
    fit = StreamedReference()
    for first in range(0, len(counts), chunk):
        fit.add(counts[first : first + chunk], energies[first : first + chunk])
    return fit


def streamed_coefficients(counts: Any, energies: Any) -> Any:
    return streamed(counts, energies).coefficients()


FITS = pytest.mark.parametrize("fit", [fit_reference, streamed_coefficients])


def split_by_group(groups: list[str], elements: list[frozenset[int]], fractions: Any, seed: int) -> Any:
    """The split of each structure, given its group and elements."""
    names = sorted(set(groups))
    group = np.array([names.index(name) for name in groups])
    numbers = np.array([z for present in elements for z in present])
    masks = element_masks(np.repeat(group, [len(present) for present in elements]), numbers, len(names))
    dealt = np.full(len(names), UNDEALT)
    return deal_groups(names, np.bincount(group), masks, dealt, fractions=fractions, seed=seed)[group]


def random_counts(rng: Any, n: int, elements: list[int]) -> Any:
    counts = np.zeros((n, 119))
    counts[:, elements] = rng.integers(0, 20, (n, len(elements)))
    counts[:, elements[0]] += 1  # no structure is empty
    return counts


def test_composition_counts_every_element() -> None:
    counts = composition(np.array([1, 1, 8, 118]), np.array([3, 0, 1]))
    assert counts.shape == (3, 119)
    assert counts[0, 1] == 2
    assert counts[0, 8] == counts[2, 118] == 1
    assert counts.sum() == 4
    assert composition(np.array([], dtype=int), np.array([], dtype=int)).shape == (0, 119)


@FITS
def test_exact_linear_data_is_recovered_at_total_energies_in_float64(fit: Any) -> None:
    """Total energies of -1e4 eV and more an atom; the coefficients come back to a micro-eV."""
    rng = np.random.default_rng(0)
    elements = [1, 6, 7, 8, 17]
    truth = np.zeros(119)
    truth[elements] = [-13.6057123, -1029.1234567, -1485.7654321, -2042.9876543, -12522.1357911]
    counts = random_counts(rng, 200, elements)
    found = fit(counts, counts @ truth)
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-6)
    absent = np.setdiff1d(np.arange(119), elements)
    assert not found[absent].any()


@FITS
def test_residuals_are_those_of_least_squares(fit: Any) -> None:
    rng = np.random.default_rng(1)
    counts = random_counts(rng, 100, [1, 8])
    energies = counts @ np.linspace(-1e4, 0, 119) + rng.normal(0, 1, 100)
    residual = energies - counts @ fit(counts, energies)
    np.testing.assert_allclose(counts.T @ residual, 0, atol=1e-5)


@FITS
def test_collinear_compositions_do_not_blow_up(fit: Any) -> None:
    """Na:Cl always 1:1, a third element in one structure only: the pair's energy is shared evenly."""
    counts = np.zeros((5, 119))
    counts[:, 11] = counts[:, 17] = [1, 2, 4, 8, 3]
    counts[4, 8] = 1
    energies = -17000.0 * counts[:, 11] - 2000.0 * counts[:, 8]
    found = fit(counts, energies)
    assert found[11] == pytest.approx(-8500.0, abs=1e-6)
    assert found[17] == pytest.approx(-8500.0, abs=1e-6)
    assert found[8] == pytest.approx(-2000.0, abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 50, 1000])
def test_chunks_give_what_all_at_once_gives(chunk: int) -> None:
    """Energies of all-electron size, elements that come late, elements that always come together."""
    rng = np.random.default_rng(2)
    counts = random_counts(rng, 400, [1, 6, 7, 8, 17])
    counts[300:, 26] = rng.integers(0, 5, 100)
    counts[:, 11] = 2 * counts[:, 17]
    energies = counts @ -np.linspace(10, 2e4, 119) + rng.normal(0, 0.5, 400)
    fit = streamed(counts, energies, chunk)
    np.testing.assert_allclose(fit.coefficients(), fit_reference(counts, energies), rtol=0, atol=1e-8)
    by_numpy = np.linalg.lstsq(counts, energies, rcond=1e-10)[0]
    np.testing.assert_allclose(fit.coefficients(), by_numpy, rtol=0, atol=1e-8)


def test_the_spread_of_what_is_left_needs_no_second_look() -> None:
    rng = np.random.default_rng(3)
    counts = random_counts(rng, 300, [1, 6, 8])
    energies = counts @ -np.linspace(10, 2e4, 119) + rng.normal(0.3, 0.5, 300)
    fit = streamed(counts, energies)
    residual = energies - counts @ fit.coefficients()
    total, per_atom = fit.residual_std_ev(fit.coefficients())
    assert total == pytest.approx(residual.std(ddof=1), rel=1e-7)
    assert per_atom == pytest.approx((residual / counts.sum(axis=1)).std(ddof=1), rel=1e-7)


def test_a_spread_of_one_structure_is_unknown() -> None:
    fit = streamed(np.eye(119)[[6]], np.array([-5.0]))
    assert fit.residual_std_ev(fit.coefficients()) == (None, None)


def test_nothing_and_one_element_give_finite_coefficients() -> None:
    assert not StreamedReference().coefficients().any()
    counts = np.zeros((4, 119))
    counts[:, 29] = [1, 2, 3, 4]
    found = streamed(counts, -3.0 * counts[:, 29]).coefficients()
    assert found[29] == pytest.approx(-3.0, abs=1e-12)
    assert not np.delete(found, 29).any()


def test_a_baseline_is_the_sum_over_atoms() -> None:
    numbers, n_atoms = np.array([1, 1, 8, 118, 6]), np.array([3, 0, 2])
    rows = np.random.default_rng(0).normal(size=(3, 119))
    np.testing.assert_allclose(
        baseline(numbers, n_atoms, rows), (composition(numbers, n_atoms) * rows).sum(axis=1), atol=1e-12
    )


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
    for fit in (fit_reference, streamed_coefficients):
        np.testing.assert_allclose(counts @ fit(counts, energies), energies, rtol=1e-9, atol=1e-6)


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


def test_val_and_test_are_alike_but_for_chance() -> None:
    """A tenth of the groups has a rare element: over many seeds as many of them in validation as in test."""
    groups = [str(k) for k in range(120)]
    elements = [frozenset({1, 20 + k // 20} if k % 10 == 0 else {1}) for k in range(120)]
    rare = np.array([len(present) > 1 for present in elements])
    more_in_test = []
    for seed in range(400):
        split = split_by_group(groups, elements, {"train": 0.6, "val": 0.2, "test": 0.2}, seed)
        more_in_test.append(int(rare[split == TEST].sum()) - int(rare[split == VAL].sum()))
    standard_error = np.std(more_in_test) / np.sqrt(len(more_in_test))
    assert standard_error > 0
    assert abs(np.mean(more_in_test)) < 3 * standard_error


def test_groups_that_were_dealt_stay_where_they_are() -> None:
    """A store is added to: what is new is dealt around what is there, until the shares are met again."""
    names = [f"g{k}" for k in range(600)]
    sizes, masks = np.full(600, 2), np.full((600, 2), 5, dtype=np.uint64)
    dealt = np.full(600, UNDEALT)
    dealt[:300] = np.where(np.arange(300) < 60, VAL, TRAIN)
    split = deal_groups(names, sizes, masks, dealt, fractions=FRACTIONS, seed=1)
    assert (split[:300] == dealt[:300]).all()
    assert np.bincount(split).tolist() == [480, 60, 60]


def test_a_new_element_goes_to_training_unless_it_is_there() -> None:
    masks = element_masks(np.array([0, 1, 2, 2]), np.array([1, 118, 1, 64]), 3)
    assert masks.tolist() == [[1 << 1, 0], [0, 1 << 54], [1 << 1, 1]]
    dealt = np.array([TRAIN, UNDEALT, UNDEALT])
    fractions = {"train": 0.1, "val": 0.1, "test": 0.8}
    assert deal_groups(["a", "b", "c"], np.ones(3), masks, dealt, fractions=fractions, seed=0).tolist() == [TRAIN] * 3
    known = np.tile(masks[2] | masks[1], (3, 1))
    assert (
        deal_groups(["a", "b", "c"], np.ones(3), known, dealt, fractions=fractions, seed=0)[1:].tolist() == [TEST] * 2
    )


def few_structures(n: int, n_elements: int, noise_ev: float, seed: int = 0) -> tuple[Any, Any, Any]:
    """Counts, energies, and the energies of atoms that they are made of: about -300 eV each, but for some eV."""
    generator = np.random.default_rng(seed)
    truth, counts = np.zeros(119), np.zeros((n, 119))
    truth[1 : n_elements + 1] = -300 + generator.normal(0, 3, n_elements)
    for row in counts:
        np.add.at(row, generator.integers(1, n_elements + 1, 4), generator.integers(1, 6, 4))
    n_atoms = counts.sum(axis=1)
    return counts, counts @ truth + noise_ev * n_atoms * generator.normal(size=n), truth


@pytest.mark.parametrize("fixed", [0, 5], ids=["all elements", "some elements"])
def test_a_correction_has_the_leave_one_out_error_of_brute_force(fixed: int) -> None:
    """Each structure left out in turn, and the penalised least squares of the others solved by itself."""
    counts, energies, truth = few_structures(25, 12, 0.5)
    n_atoms = counts.sum(axis=1)
    energies -= counts[:, : fixed + 1] @ truth[: fixed + 1]  # elements whose references are known
    counts[:, : fixed + 1] = 0
    x, y = counts / n_atoms[:, None], energies / n_atoms
    present = np.flatnonzero(counts.any(axis=0))

    def fitted(kept: Any, ridge: float) -> Any:
        rows = np.column_stack([x[kept].sum(axis=1), x[kept][:, present]])
        held = np.column_stack([np.zeros(len(present)), np.sqrt(ridge) * np.eye(len(present))])
        right = np.concatenate([y[kept], np.zeros(len(present))])
        shift, *deviations = np.linalg.lstsq(np.vstack([rows, held]), right, rcond=None)[0]
        return shift + np.array(deviations)

    def left_out(ridge: float) -> float:
        others = [np.delete(np.arange(len(y)), k) for k in range(len(y))]
        errors = [y[k] - x[k, present] @ fitted(kept, ridge) for k, kept in enumerate(others)]
        return float(np.sqrt(np.mean(np.square(errors))))

    by_ridge = {ridge: left_out(ridge) for ridge in RIDGES if ridge >= 1e-6}
    best = min(by_ridge, key=by_ridge.__getitem__)
    found, error = fit_correction(counts, n_atoms, energies)
    assert error == pytest.approx(by_ridge[best], rel=2e-3)
    np.testing.assert_allclose(found[present], fitted(np.arange(len(y)), best), rtol=1e-3)
    assert not np.delete(found, present).any()


@pytest.mark.parametrize("n", [30, 60, 200])
def test_few_structures_of_many_elements_do_not_spoil_the_others(n: int) -> None:
    """Where structures are about as many as elements, plain least squares is at its worst."""
    counts, energies, truth = few_structures(n, 60, 0.2)
    others, _, _ = few_structures(500, 60, 0.0, seed=1)
    others = others[~others[:, ~counts.any(axis=0)].any(axis=1)]

    def error(found: Any) -> float:
        return float(np.sqrt(np.mean((others @ (found - truth) / others.sum(axis=1)) ** 2)))

    found, left_out = fit_correction(counts, counts.sum(axis=1), energies)
    spread_of_truth = error(np.where(truth, -300.0, 0.0))
    assert error(found) < spread_of_truth
    assert error(found) < error(fit_reference(counts, energies))
    assert np.hypot(error(found), 0.2) == pytest.approx(left_out, rel=0.4)


def test_a_correction_of_exact_data_is_exact_and_of_none_nothing() -> None:
    counts, energies, truth = few_structures(60, 12, 0.0)
    found, error = fit_correction(counts, counts.sum(axis=1), energies)
    np.testing.assert_allclose(found, truth, atol=1e-8)
    assert error < 1e-8
    found, error = fit_correction(np.zeros_like(counts), counts.sum(axis=1), energies)
    assert not found.any()
    assert error == pytest.approx(np.sqrt(np.mean((energies / counts.sum(axis=1)) ** 2)))
