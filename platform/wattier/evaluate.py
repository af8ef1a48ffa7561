"""What the ensemble is worth: weights and calibration from validation groups, errors and coverage on test groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from wattier.config import RunConfig
from wattier.config_combinations import reached
from wattier.errors import UserError
from wattier.evaluation_figures import Split, figures_of
from wattier.records import TrialResult, finite_or_none
from wattier.rundir import RunDir, write_json
from wattier.trial import load_member
from wattier_gnn.batching import StepLimits, cut_into_steps
from wattier_gnn.domain import TrainingDomain, measure_domain
from wattier_gnn.ensemble import Ensemble, MemberNumbers, ensemble_blocks, ensemble_parts, what_is_said
from wattier_gnn.intervals import (
    STRUCTURES_FOR_OWN_FACTORS,
    STRUCTURES_FOR_OWN_FORCE_FACTORS,
    EnsembleCalibration,
    Said,
    fit_calibration,
)
from wattier_gnn.splits import TEST, TRAIN, VAL
from wattier_gnn.store import Store
from wattier_gnn.weights import N_FOLDS, FittedWeights, fit_weights, folds_of

BATCH_STRUCTURES = 64
SPLIT_NAMES = {TRAIN: "training", VAL: "validation", TEST: "test"}
MOST_DOMAIN_STRUCTURES = 20_000  # of a source that its ranges are taken from: of more, single outliers would set them


def evaluate_run(
    run: RunDir,
    config: RunConfig,
    members: Sequence[TrialResult],
    device: torch.device,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Evaluate the members as one ensemble and write ``evaluation.json``."""
    store = Store(run.store_path)
    bare = load_ensemble(run, members, store, device)
    store = Store(run.store_path, bare.cutoff_angstrom)
    bare = replace(bare, domain=training_domain(store))
    validation, test = (predict_split(bare, store, split, step_limits(config)) for split in (VAL, TEST))
    fitted = fit_weights(error_products(validation, store, config)) if config.ensemble.weights == "fitted" else None
    ensemble = calibrated(bare, validation, fitted, config.ensemble.coverage)
    evaluation = {
        "config_name": config.name,
        "settings": config.ensemble.model_dump(),
        "members": [member_summary(member) for member in members],
        **figures_of(ensemble, test, _training_counts(store)),
        "weights": _weights_block(members, fitted),
        "uncertainty": ensemble_blocks(ensemble),
    }
    write_json(run.evaluation_path, finite_or_none(evaluation))
    say(f"evaluation: {len(members)} members on {len(test.energy_true_ev)} held-out structures")
    return evaluation


def still_holds(evaluation: Mapping[str, Any] | None, config: RunConfig, members: Sequence[TrialResult]) -> bool:
    """Whether an evaluation is of these very members and settings, and not of a version that knew less."""
    if evaluation is None:
        return False
    same = evaluation["members"] == [member_summary(member) for member in members]
    return same and evaluation.get("settings") == config.ensemble.model_dump()


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
    """The trained members with the store's references: alike in weight, not calibrated."""
    models = tuple(load_member(run.path / str(member.checkpoint)).to(device) for member in members)
    return Ensemble(models, store.references)


def released_ensemble(
    run: RunDir, members: Sequence[TrialResult], store: Store, evaluation: Mapping[str, Any], device: torch.device
) -> Ensemble:
    """The ensemble as it was evaluated, with weights, calibration and domain; of an earlier version, with its factors.

    Raises:
        DataError: a checkpoint or the evaluation is damaged.
    """
    bare = load_ensemble(run, members, store, device)
    blocks = evaluation.get("uncertainty")
    if blocks is None:
        scales = {f"{name}_std_scale": evaluation["calibration"][name]["scale"] for name in ("energy", "forces")}
        blocks = {"calibration": scales}
    return replace(bare, **ensemble_parts(blocks, len(store.sources), len(members)))


def step_limits(config: RunConfig) -> StepLimits:
    """What a batch may hold, if the trials of a run could hold it in training."""
    atoms, edges = (
        min((int(value) for value in reached(config, name) if value is not None), default=None)
        for name in ("batch_atoms", "batch_edges")
    )
    return StepLimits(BATCH_STRUCTURES, atoms, edges)


def training_domain(store: Store) -> TrainingDomain:
    """What the training structures look like, for neighbours within the store's cutoff."""
    chosen, generator = [], np.random.default_rng(0)
    for source in range(len(store.sources)):
        of_source = store.indices(TRAIN)[store.source_index[store.indices(TRAIN)] == source]
        most = min(len(of_source), MOST_DOMAIN_STRUCTURES)
        chosen.append(np.sort(generator.choice(of_source, most, replace=False)))
    return measure_domain(_in_parts(store, np.concatenate(chosen)), store.sources, store.cutoff_angstrom)


def _in_parts(store: Store, indices: Any) -> Iterator[dict[str, Any]]:
    for start in range(0, len(indices), BATCH_STRUCTURES):
        yield store.gather(indices[start : start + BATCH_STRUCTURES])


def predict_split(ensemble: Ensemble, store: Store, split: int, limits: StepLimits) -> Split:
    """What the members say of all structures of one split, beside their labels.

    Raises:
        UserError: there is none.
    """
    indices = store.indices(split)
    if not len(indices):
        raise UserError(
            f"{store.folder}: has no {SPLIT_NAMES[split]} structures, but members are judged by some. Raise "
            "data.split's share of them, in a new run directory."
        )
    said, true_forces, known = [], [], []
    odd: list[str | None] = []
    for step in cut_into_steps(indices, limits, store.n_atoms, store.n_edges):
        arrays = store.gather(step)
        said.append(ensemble.members_say(arrays))
        true_forces.append(arrays["forces"])
        known.append(arrays["force_mask"])
        odd += [] if ensemble.domain is None else ensemble.domain.reasons(arrays)
    return Split(
        MemberNumbers(
            np.concatenate([s.energies_ev for s in said], axis=1),
            np.concatenate([s.forces_ev_per_angstrom for s in said], axis=1),
            store.n_atoms[indices],
            store.source_index[indices].astype(np.int64),
            np.concatenate([s.energy_stds_ev for s in said], axis=1),
        ),
        store.energy[indices] - store.baseline_ev(indices),
        np.concatenate(true_forces),
        np.concatenate(known),
        np.asarray(store.columns["group"][indices]),
        tuple(odd),
    )


def error_products(validation: Split, store: Store, config: RunConfig) -> Any:
    """Products of the members' errors, summed by fold of groups: float64 [K, M, M], see `weights.fit_weights`.

    Errors are those of the training loss, energies by atom and force components in units of each source's scale, with
    the run's weights; every source counts alike.
    """
    said, scale = validation.said, np.array(store.meta["energy_scale_ev"])
    structure_of_atom = np.repeat(np.arange(len(said.n_atoms)), said.n_atoms)
    atoms = np.flatnonzero(validation.force_known)
    energy = (said.energies_ev - validation.energy_true_ev) / said.n_atoms / scale[said.source_index]
    force = (said.forces_ev_per_angstrom - validation.force_true)[:, atoms]
    force = force / scale[said.source_index[structure_of_atom[atoms]]][:, None]
    fold, members = folds_of(validation.group), len(energy)
    grams = np.zeros((N_FOLDS, members, members))
    for weight, errors, owner in (
        (config.training.energy_weight, energy[:, :, None], np.arange(len(said.n_atoms))),
        (config.training.force_weight, force, structure_of_atom[atoms]),
    ):
        source = said.source_index[owner]
        share = 1 / np.maximum(np.bincount(source, minlength=len(scale)), 1)[source] / errors.shape[2]
        for k in range(N_FOLDS):
            chosen = fold[owner] == k
            part = errors[:, chosen]
            grams[k] += weight * np.einsum("kax,lax,a->kl", part, part, share[chosen])
    return grams / len(scale)


def calibrated(bare: Ensemble, validation: Split, fitted: FittedWeights | None, coverage: float) -> Ensemble:
    """The ensemble with its weights, and with deviations and intervals found on validation."""
    ensemble = replace(bare, weights=None if fitted is None else fitted.weights)
    answer = ensemble.combine(validation.said, 0.0)
    said_energy, said_forces = what_is_said(validation.said, ensemble.weights_of_members)
    n_sources, known = len(ensemble.sources), validation.force_known
    source = validation.said.source_index
    with_forces = np.unique(np.repeat(np.arange(len(source)), validation.said.n_atoms)[known])
    own_energy, own_forces = (
        (np.bincount(s, minlength=n_sources) >= enough).tolist()
        for s, enough in (
            (source, STRUCTURES_FOR_OWN_FACTORS),
            (source[with_forces], STRUCTURES_FOR_OWN_FORCE_FACTORS),
        )
    )
    force_errors = (answer.forces_ev_per_angstrom - validation.force_true)[known].ravel()
    flat = Said(
        said_forces.spread[known].ravel(), said_forces.dof, said_forces.aleatoric[known].ravel(),
        said_forces.source_index[known].ravel(), 1.0,
    )  # fmt: skip
    energy = fit_calibration(answer.energy_ev - validation.energy_true_ev, said_energy, n_sources, coverage, own_energy)
    forces = fit_calibration(force_errors, flat, n_sources, coverage, own_forces)
    return replace(ensemble, calibration=EnsembleCalibration(coverage, energy, forces))


def _training_counts(store: Store) -> Any:
    return np.bincount(store.source_index[store.indices(TRAIN)], minlength=len(store.sources))


def _weights_block(members: Sequence[TrialResult], fitted: FittedWeights | None) -> dict[str, Any]:
    """What each member counts, and how that was found."""
    weights = [1 / len(members)] * len(members) if fitted is None else fitted.weights
    method = "all members alike"
    if fitted is not None:
        method = (
            "least squares of validation errors over weights of 0 or more with the sum 1, drawn towards equal weights "
            "by a ridge that cross-validation over groups chose: "
        ) + ("no others were better" if math.isinf(fitted.ridge) else f"{fitted.ridge:g} of the mean square error")
    return {
        "kind": "equal" if fitted is None else "fitted",
        "method": method,
        "by_member": {member.trial_id: weight for member, weight in zip(members, weights, strict=True)},
        "validation_error_equal": None if fitted is None else fitted.error_equal,
        "validation_error_fitted": None if fitted is None else fitted.error_fitted,
        "validation_error_cross": None if fitted is None else fitted.error_cross,
    }
