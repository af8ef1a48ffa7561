"""What the ensemble is worth on held-out groups: errors by source against the baseline, and calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from wattier.config import RunConfig
from wattier.config_combinations import reached
from wattier.records import TrialResult, finite_or_none
from wattier.rundir import RunDir, write_json
from wattier.trial import load_member
from wattier_gnn.batching import StepLimits, cut_into_steps
from wattier_gnn.ensemble import Ensemble, spread
from wattier_gnn.splits import TEST, TRAIN, VAL
from wattier_gnn.store import Store
from wattier_gnn.uncertainty import calibration, fit_scale, rank_correlation

BATCH_STRUCTURES = 64
MAX_PARITY_POINTS = 1000


class Predictions(NamedTuple):
    """An uncalibrated ensemble against the labels of B structures with N atoms; per-atom energies are [B]."""

    energy_error_ev: Any  # [B]
    energy_std_ev: Any  # [B]
    energy_true_ev: Any  # [B] without the composition reference
    n_atoms: Any  # [B]
    source_index: Any  # [B]
    force_true: Any  # [N, 3] eV/A
    force_predicted: Any  # [N, 3] eV/A
    force_std: Any  # [N, 3] eV/A
    force_known: Any  # bool [N]
    atom_source: Any  # [N]


def evaluate_run(
    run: RunDir,
    config: RunConfig,
    members: Sequence[TrialResult],
    device: torch.device,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Evaluate the members as one ensemble and write ``evaluation.json``."""
    store = Store(run.store_path)
    ensemble = load_ensemble(run, members, store, device)
    store = Store(run.store_path, ensemble.cutoff_angstrom)
    limits = step_limits(config)
    validation, test = (predict_split(ensemble, store, split, limits) for split in (VAL, TEST))
    forces = _known_forces(validation)
    scales = {
        "energy": fit_scale(validation.energy_error_ev, validation.energy_std_ev),
        "forces": fit_scale(*forces),
    }
    evaluation = {
        "config_name": config.name,
        "members": [member_summary(member) for member in members],
        "sources": {
            name: finite_or_none(_source_metrics(store, test, index)) for index, name in enumerate(store.sources)
        },
        "calibration": {
            "energy": calibration(
                test.energy_error_ev, test.energy_std_ev * scales["energy"], scales["energy"]
            )._asdict(),
            "forces": calibration(
                _known_forces(test)[0], _known_forces(test)[1] * scales["forces"], scales["forces"]
            )._asdict(),
        },
        "parity": {name: _parity(test, index, scales["energy"]) for index, name in enumerate(store.sources)},
    }
    write_json(run.evaluation_path, finite_or_none(evaluation))
    say(f"evaluation: {len(members)} members on {len(test.n_atoms)} held-out structures")
    return evaluation


def member_summary(member: TrialResult) -> dict[str, Any]:
    """What the evaluation says of a member, by which a later command knows whether it still holds."""
    return {
        "trial_id": member.trial_id,
        "val_loss": member.val_loss,
        "epochs_done": member.epochs_done,
        "n_parameters": member.n_parameters,
        "energy_joules": member.energy_joules,
    }


def load_ensemble(run: RunDir, members: Sequence[TrialResult], store: Store, device: torch.device) -> Ensemble:
    """The trained members with the store's references, spread not yet calibrated."""
    models = tuple(load_member(run.path / str(member.checkpoint)).to(device) for member in members)
    return Ensemble(models, store.references)


def step_limits(config: RunConfig) -> StepLimits:
    """What a batch may hold, if the trials of a run could hold it in training."""
    atoms, edges = (
        min((int(value) for value in reached(config, name) if value is not None), default=None)
        for name in ("batch_atoms", "batch_edges")
    )
    return StepLimits(BATCH_STRUCTURES, atoms, edges)


def predict_split(ensemble: Ensemble, store: Store, split: int, limits: StepLimits) -> Predictions:
    """Run the ensemble over all structures of one split."""
    indices = store.indices(split)
    energies, forces, true_forces, known = [], [], [], []
    for step in cut_into_steps(indices, limits, store.n_atoms, store.n_edges):
        arrays = store.gather(step)
        prediction = ensemble.predict_arrays(arrays, np.zeros(len(arrays["energy"])))
        energies.append(prediction.member_energies_ev)
        forces.append(prediction.member_forces_ev_per_angstrom)
        true_forces.append(arrays["forces"])
        known.append(arrays["force_mask"])
    energy, force = np.concatenate(energies, axis=1), np.concatenate(forces, axis=1)
    true = store.energy[indices] - store.baseline_ev(indices)
    n_atoms, source_index = store.n_atoms[indices], store.source_index[indices]
    return Predictions(
        energy.mean(axis=0) - true, spread(energy), true, n_atoms, source_index,
        np.concatenate(true_forces), force.mean(axis=0), spread(force), np.concatenate(known),
        np.repeat(source_index, n_atoms),
    )  # fmt: skip


def _known_forces(p: Predictions) -> tuple[Any, Any]:
    """Errors and spreads of all force components with a label: two [n]."""
    known = p.force_known
    return (p.force_predicted - p.force_true)[known].ravel(), p.force_std[known].ravel()


def _source_metrics(store: Store, p: Predictions, index: int) -> dict[str, Any]:
    chosen = p.source_index == index
    error, true, n_atoms = p.energy_error_ev[chosen], p.energy_true_ev[chosen], p.n_atoms[chosen]
    atoms = (p.atom_source == index) & p.force_known
    force_true, force_predicted = p.force_true[atoms].ravel(), p.force_predicted[atoms].ravel()
    varied = len(force_true) > 1 and np.ptp(force_true) > 0 and np.ptp(force_predicted) > 0
    baseline = float(np.abs(true).mean())
    mae = float(np.abs(error).mean())
    force_error = force_predicted - force_true
    return {
        "n_structures": int(chosen.sum()),
        "n_train": int((store.source_index[store.indices(TRAIN)] == index).sum()),
        "energy_mae_ev": mae,
        "energy_mae_ev_per_atom": float(np.abs(error / n_atoms).mean()),
        "energy_rmse_ev": float(np.sqrt(np.mean(error**2))),
        "force_mae_ev_per_angstrom": float(np.abs(force_error).mean()) if len(force_true) else None,
        "force_rmse_ev_per_angstrom": float(np.sqrt(np.mean(force_error**2))) if len(force_true) else None,
        "force_correlation": float(np.corrcoef(force_true, force_predicted)[0, 1]) if varied else None,
        "reference_energy_mae_ev": baseline,
        "energy_mae_ratio": mae / baseline if baseline else None,
        "spearman_error_spread": rank_correlation(np.abs(error), p.energy_std_ev[chosen]),
    }


def _parity(p: Predictions, index: int, scale: float) -> dict[str, list[float]]:
    """Points for the parity plots, thinned evenly to at most 1000 a series."""
    chosen = np.flatnonzero(p.source_index == index)
    chosen = chosen[:: max(1, len(chosen) // MAX_PARITY_POINTS)]
    n_atoms = p.n_atoms[chosen]
    atoms = (p.atom_source == index) & p.force_known
    force_true, force_predicted = p.force_true[atoms].ravel(), p.force_predicted[atoms].ravel()
    step = max(1, len(force_true) // MAX_PARITY_POINTS)
    true = p.energy_true_ev[chosen] / n_atoms
    series = {
        "energy_true_ev_per_atom": true,
        "energy_predicted_ev_per_atom": true + p.energy_error_ev[chosen] / n_atoms,
        "energy_std_ev_per_atom": p.energy_std_ev[chosen] * scale / n_atoms,
        "force_true_ev_per_angstrom": force_true[::step],
        "force_predicted_ev_per_angstrom": force_predicted[::step],
    }
    return {name: np.round(values, 5).tolist() for name, values in series.items()}
