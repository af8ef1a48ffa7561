"""What each member counts in the ensemble's mean: alike, or as validation errors say.

One weight a member, for energies and forces alike and for all sources: a weighted mean of energies has the same mean of
forces as its gradient, so that conservative members make a conservative ensemble.

Fitted weights minimise the mean square error of the weighted mean over the simplex (no weight below 0, sum 1),

    w' G w + r |w - 1/M|^2,    G[k, l] = mean of error_k * error_l,

(stacked regression: Breiman, Mach. Learn. 24, 49 (1996)), drawn towards equal weights by a ridge r that is chosen by
cross-validation over groups. Since equal weights are among those compared, the weighted mean is never worse than the
plain one on the errors it was fitted to; whether it is better on others is what the cross-validation is for.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

RIDGES = (math.inf, 100.0, 10.0, 1.0, 0.1, 0.01)  # by the mean of G's diagonal
N_FOLDS = 5


class FittedWeights(NamedTuple):
    """Weights [M], and root mean square errors in the unit of the errors that G was made of.

    ridge: in units of the mean of G's diagonal, inf = equal weights. error_cross: of the chosen ridge on groups that
    the weights were not fitted to.
    """

    weights: tuple[float, ...]
    ridge: float
    error_equal: float
    error_fitted: float
    error_cross: float


def fit_weights(grams: Any) -> FittedWeights:
    """Weights from the sums of error products of K folds, float64 [K, M, M]: each G is a fold's share of the mean."""
    whole, equal = grams.sum(axis=0), np.full(grams.shape[1], 1 / grams.shape[1])
    held_out = {ridge: _cross_error(grams, ridge) for ridge in RIDGES}
    ridge = min(RIDGES, key=lambda r: held_out[r])  # of equally good ones the largest
    weights = simplex_weights(whole, ridge)
    errors = [math.sqrt(max(float(w @ whole @ w), 0.0)) for w in (equal, weights)]
    return FittedWeights(tuple(weights.tolist()), ridge, errors[0], errors[1], math.sqrt(max(held_out[ridge], 0.0)))


def simplex_weights(gram: Any, ridge: float) -> Any:
    """The weights [M] on the simplex with the least w' (G + r I) w, where r is `ridge` times the mean of G's diagonal.

    On the simplex |w - 1/M|^2 is |w|^2 - 1/M. The form is homogeneous, so that the constraint on the sum can be met
    last: v >= 0 with the least v' A v / 2 - sum v is a least-squares problem, and w = v / sum v.
    """
    n_members, size = len(gram), float(np.trace(gram)) / len(gram)
    if n_members == 1 or not size > 0 or math.isinf(ridge):
        return np.full(n_members, 1 / n_members)
    # Scaled to a diagonal of 1, with a trace of a ridge in any case: G of members that err alike has no inverse.
    root = np.linalg.cholesky(gram / size + max(ridge, 1e-9) * np.eye(n_members)).T
    found, _ = nnls(root, np.linalg.solve(root.T, np.ones(n_members)))
    return found / found.sum()


def _cross_error(grams: Any, ridge: float) -> float:
    """Mean square error of each fold with weights fitted to the others."""
    whole, total = grams.sum(axis=0), 0.0
    for fold in grams:
        weights = simplex_weights(whole - fold, ridge)
        total += float(weights @ fold @ weights)
    return total


def folds_of(groups: Any) -> Any:
    """A fold for each of some structures, whole groups together: int64 [n] from group ids [n]; always the same."""
    ids, which = np.unique(groups, return_inverse=True)
    order = np.random.default_rng(0).permutation(len(ids))
    return order[which] % N_FOLDS
