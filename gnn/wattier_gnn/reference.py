"""Alignment of heterogeneous energies: one composition baseline a source, by least squares in float64.

``min_C sum_i (e_i - sum_Z C_Z n_Z,i)^2`` over the training structures of one source (Lupo Pasini et al.,
J. Supercomput. 81, 618 (2025)). Solved by a rank-revealing decomposition, so that absent elements and collinear
compositions (Na:Cl always 1:1) stay harmless.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_ATOMIC_NUMBER = 118
RELATIVE_CUTOFF = 1e-10  # singular values below this share of the largest count as zero


def composition(numbers: Any, n_atoms: Any) -> Any:
    """Counts of each element: float64 [B, 119] (column Z) from numbers [N] of B structures with n_atoms [B]."""
    counts = np.zeros((len(n_atoms), MAX_ATOMIC_NUMBER + 1))
    np.add.at(counts, (np.repeat(np.arange(len(n_atoms)), n_atoms), numbers), 1.0)
    return counts


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
