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
RIDGES = (0.0, *(10.0**k for k in range(-8, 4)))  # by the squares of shares of elements, which add up to the structures
SMALLEST_FREEDOM = 1e-9
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


def fit_correction(counts: Any, n_atoms: Any, energies_ev: Any) -> tuple[Any, float]:
    """A correction [119] in eV of references, from few structures, and how far off it is on others.

    Fewer structures than elements are fitted exactly by least squares, and by as much wrongly anywhere else. So here
    energies by atom are explained by one shift that all elements share and a deviation of each, and a ridge holds the
    deviations back: the one whose leave-one-out errors, known in closed form (Allen, Technometrics 16, 125 (1974)), are
    least.

    Args:
        counts: [B, 119] atoms of each element that may be corrected; of the others 0, and their correction is 0.
        n_atoms: [B] atoms of each structure.
        energies_ev: [B] what is to be explained.

    Returns:
        The correction, and the root mean square of its leave-one-out errors in eV/atom.
    """
    present = counts.any(axis=0)
    x, y = counts / n_atoms[:, None], energies_ev / n_atoms
    if not present.any():
        return np.zeros(len(present)), _root_mean_square(y)
    shared = x.sum(axis=1)  # what one shift of all elements explains is taken out first, and is not held back
    axis = shared / np.linalg.norm(shared)
    rows, left = x - np.outer(axis, axis @ x), y - axis * (axis @ y)
    u, s, vt = np.linalg.svd(rows, full_matrices=False)
    known = s > RELATIVE_CUTOFF * np.linalg.norm(x)
    u, s, vt = u[:, known], s[known], vt[known]
    seen = u.T @ left
    outside, alone = left - u @ seen, np.clip(1 - axis**2 - np.square(u).sum(axis=1), 0, None)
    best: tuple[float, Any] = (np.inf, np.zeros(len(present)))
    for ridge in RIDGES:
        kept = ridge / (s**2 + ridge)  # of each direction, the share that is left unexplained
        free = alone + np.square(u) @ kept
        if free.min() < SMALLEST_FREEDOM and ridge != RIDGES[-1]:
            continue  # some structure is explained by itself alone, which tells nothing
        error = _root_mean_square((outside + u @ (kept * seen)) / np.maximum(free, SMALLEST_FREEDOM))
        if error < 0.999 * best[0]:  # of equally good ones the smallest
            best = error, vt.T @ (s / (s**2 + ridge) * seen)
    error, deviations = best
    shift = float(axis @ (y - x @ deviations)) / float(np.linalg.norm(shared))
    return np.where(present, deviations + shift, 0.0), error


def _root_mean_square(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
