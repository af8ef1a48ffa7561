"""The figures of an evaluation: errors, calibration, coverage and parity, by source and of all sources together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from wattier_gnn.ensemble import Ensemble, EnsemblePrediction, MemberNumbers, degrees_of_freedom
from wattier_gnn.intervals import EnsembleCalibration
from wattier_gnn.uncertainty import Coverage, calibration, coverage, rank_correlation

MAX_PARITY_POINTS = 1000
DENSITY_CELLS = 64


class Split(NamedTuple):
    """What members say of the B structures of one split, with N atoms in all, beside their labels."""

    said: MemberNumbers
    energy_true_ev: Any  # [B] without the composition reference
    force_true: Any  # [N, 3] eV/A
    force_known: Any  # bool [N]
    group: Any  # [B] ids
    odd: tuple[str | None, ...]  # [B] reasons why a structure is out of distribution


class Judged(NamedTuple):
    """An ensemble's answers beside labels: B structures [eV], and C components of forces that have a label [eV/A]."""

    n_atoms: Any
    group: Any
    energy_true: Any
    energy_error: Any
    energy_std: Any
    energy_half_width: Any
    odd: Any  # bool [B]
    force_true: Any
    force_error: Any
    force_std: Any
    force_half_width: Any
    force_group: Any
    n_with_forces: int  # structures


def figures_of(ensemble: Ensemble, test: Split, n_train: Any) -> dict[str, Any]:
    """All that ``evaluation.json`` says of the test structures; n_train [S] counts training structures.

    Raises:
        ValueError: the ensemble is not calibrated.
    """
    calibrated = ensemble.calibration
    if calibrated is None:
        raise ValueError("the ensemble has no calibration, but must have one. Give what `calibrated` returns.")
    answer = ensemble.combine(test.said, 0.0)
    pooled = judged(answer, test, None)
    parts = {name: judged(answer, test, k) for k, name in enumerate(ensemble.sources)}
    trained = dict(zip(ensemble.sources, n_train.tolist(), strict=True))
    scales = {
        name: (calibrated.energy.std_scale[k], calibrated.forces.std_scale[k])
        for k, name in enumerate(ensemble.sources)
    }
    typical = [float(np.median([s[i] for s in scales.values()])) for i in (0, 1)]
    return {
        "sources": {name: metrics(part, trained[name]) for name, part in parts.items()},
        "pooled": metrics(pooled, sum(trained.values())),
        "calibration": calibrations(pooled, typical),
        "calibration_by_source": {name: calibrations(part, scales[name]) for name, part in parts.items()},
        "intervals": intervals(ensemble, calibrated, pooled, parts),
        "out_of_distribution": {name: out_of_distribution(part) for name, part in parts.items()},
        "parity": {name: parity(part) for name, part in parts.items()},
    }


def judged(answer: EnsemblePrediction, test: Split, index: int | None) -> Judged:
    """The answers for one source, None = for all, beside the labels."""
    said = test.said
    chosen = np.ones(len(said.n_atoms), dtype=bool) if index is None else said.source_index == index
    owner = np.repeat(np.arange(len(chosen)), said.n_atoms)
    atoms = np.flatnonzero(chosen[owner] & test.force_known)
    odd = np.array([reason is not None for reason in test.odd], dtype=bool)
    return Judged(
        said.n_atoms[chosen],
        test.group[chosen],
        test.energy_true_ev[chosen],
        (answer.energy_ev - test.energy_true_ev)[chosen],
        answer.energy_std_ev[chosen],
        answer.energy_interval_ev[chosen],
        odd[chosen] if len(odd) else np.zeros(int(chosen.sum()), dtype=bool),
        test.force_true[atoms].ravel(),
        (answer.forces_ev_per_angstrom - test.force_true)[atoms].ravel(),
        answer.forces_std_ev_per_angstrom[atoms].ravel(),
        answer.forces_interval_ev_per_angstrom[atoms].ravel(),
        np.repeat(test.group[owner[atoms]], 3),
        len(np.unique(owner[atoms])),
    )


def metrics(part: Judged, n_train: int) -> dict[str, Any]:
    """Errors of energies and forces, against the composition baseline, and whether the spread tells them."""
    error, true, per_atom = part.energy_error, part.energy_true, part.energy_error / part.n_atoms
    varied = len(part.force_true) > 1 and np.ptp(part.force_true) > 0 and np.ptp(part.force_true + part.force_error) > 0
    baseline, mae = _mean(np.abs(true)), _mean(np.abs(error))
    return {
        "n_structures": len(error),
        "n_train": n_train,
        "energy_mae_ev": mae,
        "energy_mae_ev_per_atom": _mean(np.abs(per_atom)),
        "energy_rmse_ev": _root(_mean(error**2)),
        "energy_rmse_ev_per_atom": _root(_mean(per_atom**2)),
        "force_mae_ev_per_angstrom": _mean(np.abs(part.force_error)),
        "force_rmse_ev_per_angstrom": _root(_mean(part.force_error**2)),
        "force_correlation": float(np.corrcoef(part.force_true, part.force_true + part.force_error)[0, 1])
        if varied
        else None,
        "reference_energy_mae_ev": baseline,
        "energy_mae_ratio": mae / baseline if mae is not None and baseline else None,
        "spearman_error_spread": rank_correlation(np.abs(error), part.energy_std),
    }


def calibrations(part: Judged, scales: Sequence[float]) -> dict[str, dict[str, Any]]:
    """How well deviations tell errors: of energies an atom, so that sizes do not matter, and of force components."""
    energy = calibration(part.energy_error / part.n_atoms, part.energy_std / part.n_atoms, scales[0])
    forces = calibration(part.force_error, part.force_std, scales[1])
    return {
        "energy": energy._asdict() | {"unit": "eV/atom"},
        "forces": forces._asdict() | {"unit": "eV/A"},
    }


def intervals(
    ensemble: Ensemble, calibrated: EnsembleCalibration, pooled: Judged, parts: dict[str, Judged]
) -> dict[str, Any]:
    """What intervals were meant to cover, and what they do cover of the test structures."""
    target = calibrated.coverage or math.nan
    result: dict[str, Any] = {"target": target, "method": _method(ensemble)}
    for quantity, found in (("energy", calibrated.energy), ("forces", calibrated.forces)):
        its_own = dict(zip(ensemble.sources, found.is_own, strict=True))
        of_all = "each source" if all(found.is_own) else "all sources" if not any(found.is_own) else "mixed"
        result[quantity] = {
            "pooled": covered(pooled, quantity, target)._asdict() | {"quantile_from": of_all},
            "by_source": {
                name: covered(part, quantity, target)._asdict()
                | {"quantile_from": "this source" if its_own[name] else "all sources"}
                for name, part in parts.items()
            },
        }
    return result


def covered(part: Judged, quantity: str, target: float) -> Coverage:
    """Coverage of energies an atom, or of force components, of which those of one structure are not independent."""
    if quantity == "energy":
        return coverage(part.energy_error / part.n_atoms, part.energy_half_width / part.n_atoms, part.group, target)
    return coverage(part.force_error, part.force_half_width, part.force_group, target, part.n_with_forces)


def _method(ensemble: Ensemble) -> str:
    weights = ensemble.weights_of_members
    if degrees_of_freedom(weights) > 0:
        score = "|error| over the moderated spread of the members"
    elif all(member.config.energy_variance for member in ensemble.members):
        score = "|error| over what the member itself expects, and of forces |error| over a constant of the source"
    else:
        score = "|error|, by atoms for energies, over a constant of the source: one member has no spread"
    return f"split conformal on validation: the quantile of {score}"


def out_of_distribution(part: Judged) -> dict[str, Any]:
    """How many structures are flagged, and whether those have larger errors."""
    per_atom = np.abs(part.energy_error / part.n_atoms)
    return {
        "n": len(per_atom),
        "flagged": int(part.odd.sum()),
        "energy_mae_flagged_ev_per_atom": _mean(per_atom[part.odd]),
        "energy_mae_others_ev_per_atom": _mean(per_atom[~part.odd]),
    }


def parity(part: Judged) -> dict[str, list[float]]:
    """Points for the parity plots, thinned evenly to about 1000 a series, with error bars and density.

    A point's density is the number of all points in its cell of a grid of 64 by 64 over their range.
    """
    true, predicted = part.energy_true / part.n_atoms, (part.energy_true + part.energy_error) / part.n_atoms
    force_predicted = part.force_true + part.force_error
    thin, thin_forces = (slice(None, None, max(1, n // MAX_PARITY_POINTS)) for n in (len(true), len(force_predicted)))
    series = {
        "energy_true_ev_per_atom": true[thin],
        "energy_predicted_ev_per_atom": predicted[thin],
        "energy_std_ev_per_atom": (part.energy_std / part.n_atoms)[thin],
        "energy_interval_ev_per_atom": (part.energy_half_width / part.n_atoms)[thin],
        "energy_density": density(true, predicted)[thin],
        "force_true_ev_per_angstrom": part.force_true[thin_forces],
        "force_predicted_ev_per_angstrom": force_predicted[thin_forces],
        "force_std_ev_per_angstrom": part.force_std[thin_forces],
        "force_interval_ev_per_angstrom": part.force_half_width[thin_forces],
        "force_density": density(part.force_true, force_predicted)[thin_forces],
    }
    return {name: np.round(values, 5).tolist() for name, values in series.items()}


def density(x: Any, y: Any) -> Any:
    """For each of n points the number of points in its cell: int64 [n]."""
    cells = [np.zeros(len(x), dtype=np.int64)] * 2
    if len(x):
        low, high = min(x.min(), y.min()), max(x.max(), y.max())
        width = (high - low) / DENSITY_CELLS or 1.0
        cells = [np.minimum((values - low) / width, DENSITY_CELLS - 1).astype(np.int64) for values in (x, y)]
    cell = cells[0] * DENSITY_CELLS + cells[1]
    return np.bincount(cell, minlength=1)[cell]


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _root(value: float | None) -> float | None:
    return None if value is None else math.sqrt(value)
