"""What a store holds, in figures: gathered in one pass over chunks of arrays, in memory that does not grow with them.

Means and spreads are exact (to rounding); quantiles and histograms come from fixed bins, 1 % wide or narrower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wattier_gnn.reference import MAX_ATOMIC_NUMBER, composition

N_BINS = 4000
# Forces by their logarithm, in eV/Å; what lies below or above is counted in the outermost bins.
FORCE_EDGES = np.geomspace(1e-6, 1e6, N_BINS + 1)
# Energies per atom may have either sign and span decades: by the inverse hyperbolic sine, linear within 1e-4 eV.
ENERGY_EDGES = 1e-4 * np.sinh(np.linspace(-20.0, 20.0, N_BINS + 1))
COUNT_EDGES = np.unique(np.concatenate([np.arange(1000), np.geomspace(1000, 1e8, N_BINS).astype(np.int64)])) - 0.5
FORCE_QUANTILES = (0.5, 0.95, 0.99, 0.999)


class Spread(NamedTuple):
    """A distribution in four numbers; all NaN where there is no value."""

    minimum: float
    mean: float
    maximum: float
    deviation: float


class SourceStats(NamedTuple):
    """Figures of one source.

    Attributes:
        source: its name.
        structures: how many there are.
        atoms: how many, over all structures.
        elements: atomic number -> structures that hold the element.
        atoms_per_structure, edges_per_structure: edges are directed pairs within the cutoff; None where the store has
            none.
        energy_ev_per_atom: less the composition reference.
        force_ev_per_angstrom: norms of the forces on single atoms.
        force_quantiles_ev_per_angstrom: quantile -> norm.
        histograms: quantity -> (edges, counts), finely binned.
    """

    source: str
    structures: int
    atoms: int
    elements: dict[int, int]
    atoms_per_structure: Spread
    edges_per_structure: Spread | None
    energy_ev_per_atom: Spread
    force_ev_per_angstrom: Spread
    force_quantiles_ev_per_angstrom: dict[float, float]
    histograms: dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]]


@dataclass
class _Quantity:
    """Running moments (Chan, Golub and LeVeque 1979) and a histogram of one quantity of one source."""

    edges: NDArray[np.float64]
    n: int = 0
    mean: float = 0.0
    squares: float = 0.0
    minimum: float = np.inf
    maximum: float = -np.inf
    counts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = np.zeros(len(self.edges) - 1, dtype=np.int64)

    def add(self, values: NDArray[Any]) -> None:
        """Take note of some values; what is not finite has no place in a mean, and none in a cleaned store."""
        values = values[np.isfinite(values)].astype(np.float64)
        if not len(values):
            return
        n, mean = len(values), float(values.mean())
        apart, total = mean - self.mean, self.n + n
        self.squares += float(np.sum((values - mean) ** 2)) + apart**2 * self.n * n / total
        self.mean += apart * n / total
        self.n = total
        self.minimum, self.maximum = min(self.minimum, float(values.min())), max(self.maximum, float(values.max()))
        bins = np.searchsorted(self.edges, values, side="right") - 1
        self.counts += np.bincount(np.clip(bins, 0, len(self.counts) - 1), minlength=len(self.counts))

    def spread(self) -> Spread:
        """The distribution in four numbers."""
        if not self.n:
            return Spread(*[float("nan")] * 4)
        return Spread(self.minimum, self.mean, self.maximum, float(np.sqrt(self.squares / self.n)))

    def quantile(self, share: float) -> float:
        """The value below which `share` of all lie, to the width of a bin."""
        if not self.n:
            return float("nan")
        below = np.concatenate([[0], np.cumsum(self.counts)])
        value = float(np.interp(share * self.n, below, self.edges))
        return min(max(value, self.minimum), self.maximum)

    def histogram(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The edges and counts of the bins from the first to the last that holds anything."""
        held = np.flatnonzero(self.counts)
        first, last = (held[0], held[-1]) if len(held) else (0, 0)
        return self.edges[first : last + 2], self.counts[first : last + 1]


class Stats:
    """Figures of a store, source by source, from its arrays in any number of chunks."""

    def __init__(self, sources: Sequence[str]) -> None:
        self._sources = tuple(sources)
        self._atoms = [_Quantity(COUNT_EDGES) for _ in sources]
        self._edges = [_Quantity(COUNT_EDGES) for _ in sources]
        self._energies = [_Quantity(ENERGY_EDGES) for _ in sources]
        self._forces = [_Quantity(FORCE_EDGES) for _ in sources]
        self._n_atoms = [0] * len(self._sources)
        self._holding = np.zeros((len(self._sources), MAX_ATOMIC_NUMBER + 1), dtype=np.int64)

    def add(self, arrays: Mapping[str, Any]) -> None:
        """Take note of some structures.

        Args:
            arrays: as `store.structures_to_arrays` lays them out (``edge_offset`` may be missing), and ``references``
                [S, 119] in eV.
        """
        source = np.asarray(arrays["source_index"], dtype=np.int64)
        n_atoms = np.diff(arrays["atom_offset"])
        counts = composition(arrays["numbers"], n_atoms)
        energy = np.asarray(arrays["energy"]) - np.einsum("bz,bz->b", counts, np.asarray(arrays["references"])[source])
        norms = np.linalg.norm(np.asarray(arrays["forces"], dtype=np.float64), axis=1)
        known = np.asarray(arrays["force_mask"], dtype=bool)
        source_of_atom = np.repeat(source, n_atoms)
        n_edges = np.diff(arrays["edge_offset"]) if "edge_offset" in arrays else None
        for s in np.unique(source):
            chosen = source == s
            self._n_atoms[s] += int(n_atoms[chosen].sum())
            self._atoms[s].add(n_atoms[chosen])
            self._energies[s].add(energy[chosen] / np.maximum(n_atoms[chosen], 1))
            self._forces[s].add(norms[(source_of_atom == s) & known])
            self._holding[s] += (counts[chosen] > 0).sum(axis=0)
            if n_edges is not None:
                self._edges[s].add(n_edges[chosen])

    def of_sources(self) -> list[SourceStats]:
        """The figures of each source, in order."""
        return [self._of_source(s, name) for s, name in enumerate(self._sources)]

    def _of_source(self, s: int, name: str) -> SourceStats:
        atoms, edges, energies, forces = self._atoms[s], self._edges[s], self._energies[s], self._forces[s]
        return SourceStats(
            source=name,
            structures=atoms.n,
            atoms=self._n_atoms[s],
            elements={int(z): int(self._holding[s, z]) for z in np.flatnonzero(self._holding[s])},
            atoms_per_structure=atoms.spread(),
            edges_per_structure=edges.spread() if edges.n else None,
            energy_ev_per_atom=energies.spread(),
            force_ev_per_angstrom=forces.spread(),
            force_quantiles_ev_per_angstrom={share: forces.quantile(share) for share in FORCE_QUANTILES},
            histograms={
                "atoms_per_structure": atoms.histogram(),
                "energy_ev_per_atom": energies.histogram(),
                "force_ev_per_angstrom": forces.histogram(),
            },
        )
