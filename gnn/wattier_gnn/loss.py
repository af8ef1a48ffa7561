"""The training loss: absolute errors of energy an atom and of force components, in units of each source's scale."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from wattier_gnn.batch import Batch, Prediction


def loss_terms(
    prediction: Prediction, batch: Batch, energy_scale_ev: Tensor, energy_weight: float, force_weight: float
) -> tuple[Tensor, Tensor]:
    """Sum over structures [scalar] and sum over atoms with forces [scalar] of the scaled, weighted absolute errors."""
    scale = energy_scale_ev[batch.source_index]
    energy_error = (prediction.energy - batch.energy).abs() / batch.n_atoms / scale
    force_error = (prediction.forces - batch.forces).abs().mean(dim=1) / scale[batch.structure_index]
    return energy_weight * energy_error.sum(), force_weight * (force_error * batch.force_mask).sum()


def error_sums(prediction: Prediction, batch: Batch, n_sources: int) -> Tensor:
    """Float64 [S, 5] by source: structures, force components, sum |dE| eV, sum |dE|/n eV/atom, sum |dF| eV/A."""
    sums = torch.zeros(n_sources, 5, dtype=torch.float64, device=batch.energy.device)
    energy_error = (prediction.energy - batch.energy).abs().double()
    atom_source = batch.source_index[batch.structure_index]
    mask = batch.force_mask.double()
    force_error = (prediction.forces - batch.forces).abs().double().sum(dim=1) * mask
    sums[:, 0].index_add_(0, batch.source_index, torch.ones_like(energy_error))
    sums[:, 1].index_add_(0, atom_source, 3 * mask)
    sums[:, 2].index_add_(0, batch.source_index, energy_error)
    sums[:, 3].index_add_(0, batch.source_index, energy_error / batch.n_atoms)
    sums[:, 4].index_add_(0, atom_source, force_error)
    return sums


def metrics_by_source(sums: Tensor, sources: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Mean absolute errors of each source that has structures."""
    result = {}
    for source, (structures, components, energy, per_atom, force) in zip(sources, sums.tolist(), strict=True):
        if structures:
            result[source] = {
                "energy_mae_ev": energy / structures,
                "energy_mae_ev_per_atom": per_atom / structures,
                "force_mae_ev_per_angstrom": force / components if components else math.nan,
            }
    return result


def weighted_loss(
    by_source: Mapping[str, Mapping[str, float]],
    scale_ev: Mapping[str, float],
    energy_weight: float,
    force_weight: float,
) -> float:
    """Mean over sources of the scaled, weighted errors: independent of batch size, ranks and source imbalance."""
    terms = []
    for source, metrics in by_source.items():
        force = metrics["force_mae_ev_per_angstrom"]
        term = energy_weight * metrics["energy_mae_ev_per_atom"]
        terms.append((term + (0.0 if math.isnan(force) else force_weight * force)) / scale_ev[source])
    return sum(terms) / len(terms) if terms else math.nan
