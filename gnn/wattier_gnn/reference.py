"""Alignment of heterogeneous energies: one composition baseline a source, by least squares in float64.

``min_C sum_i (e_i - sum_Z C_Z n_Z,i)^2`` over the training structures of one source (Lupo Pasini et al.,
J. Supercomput. 81, 618 (2025)). Solved by a rank-revealing decomposition, so that absent elements and collinear
compositions (Na:Cl always 1:1) stay harmless. Structures stream: what is kept of them is the triangle R of the QR
decomposition of [counts | energies], 120 x 120, which is updated a chunk at a time (Demmel et al.,
"Communication-optimal parallel and sequential QR and LU factorizations", SIAM J. Sci. Comput. 34, A206 (2012)). R has
the singular values of the data; normal equations would square their ratio.
"""

from __future__ import annotations

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
        self.n_structures = 0
        self._totals, self._per_atom = _Triangle(), _Triangle()

    def add(self, counts: Any, energies_ev: Any) -> None:
        """Take in counts [B, 119] and total energies [B]; structures have at least one atom."""
        if len(counts):
            rows = np.column_stack([counts, energies_ev])
            self._totals.add(rows)
            self._per_atom.add(rows / counts.sum(axis=1, keepdims=True))
            self.n_structures += len(counts)

    def coefficients(self) -> Any:
        """C [119] in eV, 0 for elements that do not occur; the shortest of all solutions where there are several."""
        return fit_reference(self._totals.r[:, :-1], self._totals.r[:, -1])

    def residual_std_ev(self, coefficients: Any) -> tuple[float | None, float | None]:
        """Standard deviation of what the baseline leaves: of the energies [eV], and by atoms [eV/atom].

        None of fewer than two structures (n - 1 in the denominator).
        """
        if self.n_structures < 2:
            return None, None
        weights = np.append(-coefficients, 1.0)
        return self._totals.std(weights, self.n_structures), self._per_atom.std(weights, self.n_structures)


class _Triangle:
    """The R of the QR decomposition of rows [120] that are seen once, and their sum."""

    def __init__(self) -> None:
        self.r: Any = np.zeros((0, MAX_ATOMIC_NUMBER + 2))
        self._sum = np.zeros(MAX_ATOMIC_NUMBER + 2)

    def add(self, rows: Any) -> None:
        self.r = np.linalg.qr(np.vstack([self.r, rows]), mode="r")
        self._sum += rows.sum(axis=0)

    def std(self, weights: Any, n: int) -> float:
        """The standard deviation of ``rows @ weights``: R keeps the norm of every combination of columns."""
        square, mean = float(np.square(self.r @ weights).sum()), float(self._sum @ weights) / n
        return float(np.sqrt(max(square - n * mean**2, 0.0) / (n - 1)))


def fit_reference(counts: Any, energies_ev: Any) -> Any:
    """Coefficients C [119] in eV (0 for elements that do not occur) of the least-squares composition baseline."""
    coefficients = np.zeros(MAX_ATOMIC_NUMBER + 1)
    present = np.flatnonzero(counts.any(axis=0))
    if len(present):
        solution, *_ = np.linalg.lstsq(counts[:, present], energies_ev, rcond=RELATIVE_CUTOFF)
        coefficients[present] = solution
    return coefficients
