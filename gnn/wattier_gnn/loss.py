"""The training loss: errors of energy an atom and of force components, in units of each source's scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from wattier_gnn.batch import Batch, Prediction

LossKind = Literal["mae", "mse", "huber"]
N_SUMS = 7  # columns of `error_sums`
SMALLEST_DEVIATION = 1e-4  # of scaled energy an atom; the likelihood of an exact answer has no bound


def loss_terms(  # noqa: PLR0913, PLR0917
    prediction: Prediction,
    batch: Batch,
    energy_scale_ev: Tensor,
    energy_weight: float,
    force_weight: float,
    kind: LossKind = "mae",
    huber_delta: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Sum over structures [scalar] and sum over atoms with forces [scalar] of the scaled, weighted errors.

    huber_delta: scaled error at which `huber` turns from x^2 / 2 into a straight line.
    Of a model with a deviation head, the energy's part holds `deviation_loss` too.
    """
    scale = energy_scale_ev[batch.source_index]
    energy_error = (prediction.energy - batch.energy) / batch.n_atoms / scale
    force_error = (prediction.forces - batch.forces) / scale[batch.structure_index][:, None]
    energy = _penalty(energy_error, kind, huber_delta)
    if prediction.energy_std is not None:
        energy = energy + deviation_loss(energy_error, prediction.energy_std / batch.n_atoms / scale)
    force = _penalty(force_error, kind, huber_delta).mean(dim=1)
    return energy_weight * energy.sum(), force_weight * (force * batch.force_mask).sum()


def deviation_loss(error: Tensor, std: Tensor) -> Tensor:
    """Negative log likelihood [B] of normal errors with deviations `std`, weighted by the deviations themselves.

    That is beta-NLL with beta = 1/2 (Seitzer et al., ICLR 2022), for the deviation alone: without the weight, one error
    that is large for its deviation would have a gradient without bound, and clipping it would stop all else. The error
    is taken as given, so that the energy learns from its own loss only.
    """
    std = std.clamp(min=SMALLEST_DEVIATION)
    return std.detach() * (std.log() + 0.5 * (error.detach() / std).square())


def _penalty(error: Tensor, kind: LossKind, huber_delta: float) -> Tensor:
    if kind == "mae":
        return error.abs()
    if kind == "mse":
        return error.square()
    return nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=huber_delta)


def error_sums(prediction: Prediction, batch: Batch, n_sources: int) -> Tensor:
    """Float64 [S, 7] by source.

    Structures, force components, sums of |dE| eV, |dE|/n eV/atom, |dF| eV/A, (dE/n)^2 and dF^2.
    """
    energy_error = (prediction.energy - batch.energy).double()
    per_atom = energy_error / batch.n_atoms
    force_error = (prediction.forces - batch.forces).double()
    mask = batch.force_mask.double()
    no_energy, no_force = torch.zeros_like(energy_error), torch.zeros_like(mask)
    of_structures = [no_energy + 1, no_energy, energy_error.abs(), per_atom.abs(), no_energy, per_atom**2, no_energy]
    absolute, squared = force_error.abs().sum(dim=1) * mask, force_error.square().sum(dim=1) * mask
    of_atoms = [no_force, 3 * mask, no_force, no_force, absolute, no_force, squared]
    sums = torch.zeros(n_sources, N_SUMS, dtype=torch.float64, device=batch.energy.device)
    sums.index_add_(0, batch.source_index, torch.stack(of_structures, dim=1))
    return sums.index_add_(0, batch.source_index[batch.structure_index], torch.stack(of_atoms, dim=1))


def metrics_by_source(sums: Tensor, sources: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Mean absolute and root mean square errors of each source that has structures."""
    result = {}
    for source, row in zip(sources, sums.tolist(), strict=True):
        structures, components, energy, per_atom, force, per_atom_squared, force_squared = row
        if structures:
            result[source] = {
                "energy_mae_ev": energy / structures,
                "energy_mae_ev_per_atom": per_atom / structures,
                "force_mae_ev_per_angstrom": force / components if components else math.nan,
                "energy_rmse_ev_per_atom": math.sqrt(per_atom_squared / structures),
                "force_rmse_ev_per_angstrom": math.sqrt(force_squared / components) if components else math.nan,
            }
    return result


def weighted_loss(
    by_source: Mapping[str, Mapping[str, float]],
    scale_ev: Mapping[str, float],
    energy_weight: float,
    force_weight: float,
) -> float:
    """Mean over sources of the scaled, weighted absolute errors.

    Independent of batch size, ranks, source imbalance, and of the kind of loss that a trial trains with.
    """
    terms = []
    for source, metrics in by_source.items():
        force = metrics["force_mae_ev_per_angstrom"]
        term = energy_weight * metrics["energy_mae_ev_per_atom"]
        terms.append((term + (0.0 if math.isnan(force) else force_weight * force)) / scale_ev[source])
    return sum(terms) / len(terms) if terms else math.nan
