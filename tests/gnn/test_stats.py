"""The figures of a store, held against numpy on all of the sample corpus at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from wattier_gnn.cleaning import CleaningReport, read_clean
from wattier_gnn.datasets import READERS
from wattier_gnn.sample import SAMPLE_SOURCES, sample_path
from wattier_gnn.stats import FORCE_QUANTILES, SourceStats, Spread, Stats
from wattier_gnn.store import structures_to_arrays
from wattier_gnn.structure import Structure

REFERENCES = np.random.default_rng(0).normal(-500.0, 200.0, (len(SAMPLE_SOURCES), 119))


@pytest.fixture(scope="module")
def corpus() -> list[Structure]:
    """Every second structure of the sample corpus, the sources in turns as in a shuffled store."""
    report = CleaningReport()
    found = [
        (index, number, structure)
        for number, source in enumerate(SAMPLE_SOURCES)
        for index, structure in enumerate(read_clean(READERS[source], sample_path(source), 100.0, report))
        if index % 2 == 0
    ]
    return [structure for _, _, structure in sorted(found, key=lambda entry: entry[:2])]


def gather(structures: list[Structure], chunk: int, edges: bool = True) -> Stats:
    stats = Stats(SAMPLE_SOURCES)
    for start in range(0, len(structures), chunk):
        arrays = structures_to_arrays(structures[start : start + chunk], SAMPLE_SOURCES, 3.0)
        if not edges:
            del arrays["edge_offset"]
        stats.add({**arrays, "references": REFERENCES})
    return stats


def assert_spread(spread: Spread | None, values: Any) -> None:
    assert spread is not None
    expected = (np.min(values), np.mean(values), np.max(values), np.std(values))
    assert spread == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("chunk", [97, 10_000])
def test_figures_are_those_of_numpy(chunk: int, corpus: list[Structure]) -> None:
    found = {stats.source: stats for stats in gather(corpus, chunk).of_sources()}
    assert list(found) == list(SAMPLE_SOURCES)
    for number, source in enumerate(SAMPLE_SOURCES):
        mine = [structure for structure in corpus if structure.source == source]
        stats = found[source]
        sizes = [len(structure.numbers) for structure in mine]
        assert (stats.structures, stats.atoms) == (len(mine), sum(sizes))
        assert_spread(stats.atoms_per_structure, sizes)
        energies = [(s.energy_ev - REFERENCES[number][s.numbers].sum()) / len(s.numbers) for s in mine]
        assert_spread(stats.energy_ev_per_atom, energies)
        forces = np.concatenate([structure.forces_ev_per_angstrom for structure in mine])
        norms = np.sqrt((forces**2).sum(axis=1))
        assert_spread(stats.force_ev_per_angstrom, norms)
        for share in FORCE_QUANTILES:
            at = np.quantile(norms, [max(share - 0.002, 0.0), min(share + 0.002, 1.0)])
            assert at[0] / 1.01 <= stats.force_quantiles_ev_per_angstrom[share] <= at[1] * 1.01
        elements = {z: sum(z in structure.numbers for structure in mine) for z in range(1, 119)}
        assert stats.elements == {z: n for z, n in elements.items() if n}


def test_edges_are_counted(corpus: list[Structure]) -> None:
    molecules = [structure for structure in corpus if structure.source == "ani1x"][:40]
    (stats, *rest) = gather(molecules, 7).of_sources()
    edges = []
    for structure in molecules:
        apart = np.linalg.norm(structure.positions_angstrom[:, None] - structure.positions_angstrom[None], axis=-1)
        edges.append(int((apart < 3.0).sum()) - len(apart))
    assert_spread(stats.edges_per_structure, edges)
    assert all(other.edges_per_structure is None for other in rest)
    assert gather(molecules, 7, edges=False).of_sources()[0].edges_per_structure is None


def test_histograms_hold_every_value(corpus: list[Structure]) -> None:
    for stats in gather(corpus, 500).of_sources():
        for name, n in (
            ("atoms_per_structure", stats.structures),
            ("energy_ev_per_atom", stats.structures),
            ("force_ev_per_angstrom", stats.atoms),
        ):
            edges, counts = stats.histograms[name]
            assert len(edges) == len(counts) + 1
            assert counts.sum() == n
            spread: Spread = getattr(stats, name)
            assert edges[0] <= spread.minimum
            assert spread.maximum <= edges[-1]
        edges, counts = stats.histograms["atoms_per_structure"]
        centres = (edges[:-1] + edges[1:]) / 2
        assert np.average(centres, weights=counts) == pytest.approx(stats.atoms_per_structure.mean)  # a bin a number


def toy(energies: list[float], forces: list[float], known: list[bool]) -> SourceStats:
    stats = Stats(["a"])
    n = len(energies)
    vectors = np.zeros((n, 3))
    vectors[:, 1] = forces
    arrays = {
        "numbers": np.ones(n, dtype=np.uint8),
        "forces": vectors,
        "force_mask": np.array(known),
        "atom_offset": np.arange(n + 1),
        "energy": np.array(energies),
        "source_index": np.zeros(n, dtype=np.int16),
        "references": np.zeros((1, 119)),
    }
    stats.add(arrays)
    return stats.of_sources()[0]


def test_unknown_forces_are_left_out() -> None:
    stats = toy([1.0, 2.0, 3.0], [5.0, -7.0, 0.0], [True, True, False])
    assert_spread(stats.force_ev_per_angstrom, [5.0, 7.0])
    assert np.isnan(toy([1.0], [0.0], [False]).force_ev_per_angstrom.mean)


def test_far_away_values_are_counted_at_the_ends() -> None:
    stats = toy([-1e30, 1e30, 1e-30], [0.0, 1e30, 1e-30], [True] * 3)
    assert stats.histograms["energy_ev_per_atom"][1].sum() == 3
    assert stats.histograms["force_ev_per_angstrom"][1].sum() == 3
    assert stats.force_quantiles_ev_per_angstrom[0.5] <= 1e30


def test_means_survive_a_large_offset() -> None:
    """The textbook sum of squares would lose all digits of the spread."""
    values = np.random.default_rng(0).normal(-1e9, 1.0, 1000)
    stats = Stats(["a"])
    for value in values.reshape(-1, 10):
        n = len(value)
        stats.add({
            "numbers": np.ones(n, dtype=np.uint8), "forces": np.zeros((n, 3)), "force_mask": np.zeros(n, dtype=bool),
            "atom_offset": np.arange(n + 1), "energy": value, "source_index": np.zeros(n, dtype=int),
            "references": np.zeros((1, 119)),
        })  # fmt: skip
    assert stats.of_sources()[0].energy_ev_per_atom.deviation == pytest.approx(values.std(), rel=1e-6)


def test_a_source_without_structures() -> None:
    (stats,) = Stats(["a"]).of_sources()
    assert (stats.structures, stats.atoms, stats.elements, stats.edges_per_structure) == (0, 0, {}, None)
    assert all(np.isnan(value) for value in stats.atoms_per_structure)
    assert stats.histograms["atoms_per_structure"][1].sum() == 0
