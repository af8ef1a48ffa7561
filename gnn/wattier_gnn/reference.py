"""Alignment of heterogeneous energies: one composition baseline a source, by least squares in float64.

``min_C sum_i (e_i - sum_Z C_Z n_Z,i)^2`` over the training structures of one source (Lupo Pasini et al.,
J. Supercomput. 81, 618 (2025)). Solved by a rank-revealing decomposition, so that absent elements and collinear
compositions (Na:Cl always 1:1) stay harmless. Structures stream: what is kept of them is the triangle R of the QR
decomposition of [counts | energies], 120 x 120, which is updated a chunk at a time (Demmel et al.,
"Communication-optimal parallel and sequential QR and LU factorizations", SIAM J. Sci. Comput. 34, A206 (2012)). R has
the singular values of the data; normal equations would square their ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_ATOMIC_NUMBER = 118
RELATIVE_CUTOFF = 1e-10  # singular values below this share of the largest count as zero


def composition(numbers: Any, n_atoms: Any) -> Any:
    """Counts of each element: float64 [B, 119] (column Z) from numbers [N] of B structures with n_atoms [B]."""
    n, width = len(n_atoms), MAX_ATOMIC_NUMBER + 1
    cell = np.repeat(np.arange(n), n_atoms) * width + numbers
    return np.bincount(cell, minlength=n * width).reshape(n, width).astype(np.float64)


def baseline(numbers: Any, n_atoms: Any, coefficients: Any) -> Any:
    """Composition reference energies float64 [B]: the sum of ``coefficients[b, Z]`` over the atoms of structure b.

    Args:
        numbers: [N] atomic numbers.
        n_atoms: [B] atoms of each structure.
        coefficients: float64 [B, 119], the row of each structure's source.
    """
    owner = np.repeat(np.arange(len(n_atoms)), n_atoms)
    return np.bincount(owner, weights=coefficients[owner, numbers], minlength=len(n_atoms))


class StreamedReference:
    """The least-squares composition baseline of structures that are seen once, a chunk at a time."""

    def __init__(self) -> None:
        self._triangle: Any = np.zeros((0, MAX_ATOMIC_NUMBER + 2))
        self.n_structures = 0

    def add(self, counts: Any, energies_ev: Any) -> None:
        """Take in counts [B, 119] and total energies [B]."""
        if len(counts):
            stacked = np.vstack([self._triangle, np.column_stack([counts, energies_ev])])
            self._triangle = np.linalg.qr(stacked, mode="r")
            self.n_structures += len(counts)

    def coefficients(self) -> Any:
        """C [119] in eV, 0 for elements that do not occur; the shortest of all solutions where there are several."""
        return fit_reference(self._triangle[:, :-1], self._triangle[:, -1])


def fit_reference(counts: Any, energies_ev: Any) -> Any:
    """Coefficients C [119] in eV (0 for elements that do not occur) of the least-squares composition baseline."""
    coefficients = np.zeros(MAX_ATOMIC_NUMBER + 1)
    present = np.flatnonzero(counts.any(axis=0))
    if len(present):
        solution, *_ = np.linalg.lstsq(counts[:, present], energies_ev, rcond=RELATIVE_CUTOFF)
        coefficients[present] = solution
    return coefficients


def fit_references(counts: Any, energies_ev: Any, source_index: Any, sources: Sequence[str]) -> Any:
    """One row of coefficients a source: float64 [S, 119] eV."""
    rows = [fit_reference(counts[source_index == s], energies_ev[source_index == s]) for s in range(len(sources))]
    return np.stack(rows)


class StreamedMoments:
    """Count, mean and standard deviation of numbers that are seen once (Chan, Golub and LeVeque's update)."""

    def __init__(self) -> None:
        self.n, self.mean, self._square = 0, 0.0, 0.0

    def add(self, values: Any) -> None:
        """Take in an array."""
        n = values.size
        if n:
            mean = float(values.mean())
            apart, total = mean - self.mean, self.n + n
            self._square += float(np.square(values - mean).sum()) + apart**2 * self.n * n / total
            self.mean += apart * n / total
            self.n = total

    @property
    def std(self) -> float | None:
        """The standard deviation (n - 1 in the denominator); None of fewer than two numbers."""
        return float(np.sqrt(self._square / (self.n - 1))) if self.n > 1 else None
