"""Several trained models as one predictor: the weighted mean is the answer, the calibrated spread is how sure it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from wattier_gnn.arrays import edges_within, volumes
from wattier_gnn.batch import Batch
from wattier_gnn.domain import TrainingDomain
from wattier_gnn.intervals import EnsembleCalibration, Said, plain_scale
from wattier_gnn.model import FoundationModel, source_index_of
from wattier_gnn.reference import composition
from wattier_gnn.store import join, structures_to_arrays
from wattier_gnn.structure import DataError, Structure
from wattier_gnn.unfit import overlapping, unfit


@dataclass(frozen=True)
class EnsemblePrediction:
    """B structures, N atoms in all, M members. Energies are totals: the composition reference is added back.

    Standard deviations and intervals are NaN where they are not known: one member has no spread, and a release of an
    earlier version no intervals. The parts of energy_std_ev are such that their squares add up to its square.
    Stresses are None unless asked for. They have ASE's sign, positive where the structure would shrink, and are NaN
    where a structure does not repeat in three directions. Their std is not calibrated: no source has labels.
    """

    energy_ev: Any  # float64 [B]
    energy_std_ev: Any  # float64 [B], calibrated
    forces_ev_per_angstrom: Any  # float64 [N, 3]
    forces_std_ev_per_angstrom: Any  # float64 [N, 3], calibrated
    member_energies_ev: Any  # float64 [M, B]
    member_forces_ev_per_angstrom: Any  # float64 [M, N, 3]
    energy_epistemic_std_ev: Any  # float64 [B], by which members disagree
    energy_aleatoric_std_ev: Any  # float64 [B], which members predict themselves, where they have a head for it
    energy_interval_ev: Any  # float64 [B], half the width of the interval that is meant to cover `coverage`
    forces_interval_ev_per_angstrom: Any  # float64 [N, 3], of each component by itself
    coverage: float | None  # None where there are no intervals
    out_of_distribution: tuple[str | None, ...] | None = None  # [B] reasons, None = nothing odd; None = cannot say
    stress_ev_per_angstrom3: Any = None  # float64 [B, 3, 3]
    stress_std_ev_per_angstrom3: Any = None  # float64 [B, 3, 3]
    member_stresses_ev_per_angstrom3: Any = None  # float64 [M, B, 3, 3]


@dataclass(frozen=True)
class MemberNumbers:
    """What M members say of B structures with N atoms, before it is joined to one answer."""

    energies_ev: Any  # float64 [M, B], relative to the composition reference
    forces_ev_per_angstrom: Any  # float64 [M, N, 3]
    n_atoms: Any  # int64 [B]
    source_index: Any  # int64 [B]
    energy_stds_ev: Any  # float64 [M, B], by the members' own heads; NaN where one has none
    stresses_ev_per_angstrom3: Any = None  # float64 [M, B, 3, 3], None where not asked for


@dataclass(frozen=True)
class Ensemble:
    """Trained members of one data alignment; each sees the neighbours within its own cutoff.

    weights: what each member counts in the mean, sum 1; None = alike. calibration: found on validation data; None = the
    plain spread, and no intervals. domain: what the training data looked like; None = not known.
    """

    members: tuple[FoundationModel, ...]
    references_ev: Any  # float64 [S, 119]
    weights: tuple[float, ...] | None = None
    calibration: EnsembleCalibration | None = None
    domain: TrainingDomain | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """Sources that the members have heads for."""
        return self.members[0].config.sources

    @property
    def weights_of_members(self) -> Any:
        """What each member counts in the mean: float64 [M], sum 1."""
        n = len(self.members)
        return np.full(n, 1 / n) if self.weights is None else np.array(self.weights)

    @property
    def cutoff_angstrom(self) -> float:
        """The largest of the members' cutoffs."""
        return max(member.config.cutoff_angstrom for member in self.members)

    @property
    def is_conservative(self) -> bool:
        """Whether every member's forces are minus the gradient of its energy."""
        return all("conservative" in member.properties for member in self.members)

    @property
    def knows_forces_std(self) -> bool:
        """Whether forces have a standard deviation: where two members or more are heard, they can disagree."""
        return degrees_of_freedom(self.weights_of_members) > 0

    @property
    def knows_energy_std(self) -> bool:
        """Whether energies have one: as forces, or where every member that is heard has a head that says its own."""
        heard = (m for m, weight in zip(self.members, self.weights_of_members, strict=True) if weight > 0)
        return self.knows_forces_std or all(member.config.energy_variance for member in heard)

    @property
    def dtype(self) -> torch.dtype:
        """Of the members' weights, and of what they compute."""
        return next(self.members[0].parameters()).dtype

    def moved(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Ensemble:
        """A copy whose members are on a device.

        In float64 all of a member is: also those linear layers that it has in bfloat16 otherwise.
        """
        members = copy.deepcopy(self.members)
        for member in members:
            member.to(device=device, dtype=dtype)
            low = member.config.precision == "bfloat16" and dtype == torch.float32
            member.encoder.compute = torch.bfloat16 if low else None
        return replace(self, members=members)

    def predict_arrays(
        self, arrays: Mapping[str, Any], baseline_ev: Any, *, stress: bool = False, conservative: bool = False
    ) -> EnsemblePrediction:
        """Predict the structures of some arrays, see `structures_to_arrays`, with edges within `cutoff_angstrom`.

        baseline_ev [B] is the composition reference of each structure; stress, conservative: see `members_say`.

        Raises:
            DataError: an energy or a force is no number.
        """
        said = self.members_say(arrays, stress=stress, conservative=conservative)
        if (k := _first_without_a_number(said, self.weights_of_members)) is not None:
            raise DataError(
                f"{_of_many(k, said.n_atoms)}what members say of it is NaN or infinite, but must be a number. Look at "
                "the structure; if it is as others are, do not use this release."
            )
        prediction = self.combine(said, baseline_ev)
        if self.domain is None:
            return prediction
        return replace(prediction, out_of_distribution=self.domain.reasons(arrays))

    def members_say(
        self, arrays: Mapping[str, Any], *, stress: bool = False, conservative: bool = False
    ) -> MemberNumbers:
        """What each member answers, relative to the composition reference; each sees edges within its own cutoff.

        Args:
            arrays: the structures.
            stress: also from the strain of all vectors, see `FoundationModel.forward`.
            conservative: forces are minus the gradient of the energy, also of members that have a force head.
        """
        device, n = next(self.members[0].parameters()).device, len(arrays["energy"])
        found: dict[int, tuple[Any, ...]] = {}
        for cutoff in sorted({member.config.cutoff_angstrom for member in self.members}):
            near = arrays if cutoff == self.cutoff_angstrom else edges_within(arrays, cutoff)
            batch = join(near, np.arange(n), np.zeros(n), self.dtype).to(device)
            found |= {
                k: _numbers(m, batch, strain=stress, conservative=conservative)
                for k, m in enumerate(self.members)
                if m.config.cutoff_angstrom == cutoff
            }
        energies, forces, stds = (np.stack([found[k][i] for k in range(len(self.members))]) for i in range(3))
        stresses = None
        if stress:
            by_strain = np.stack([found[k][3] for k in range(len(self.members))])
            stresses = by_strain / volumes(arrays)[:, None, None]
        source_index = np.asarray(arrays["source_index"], dtype=np.int64)
        return MemberNumbers(energies, forces, np.diff(arrays["atom_offset"]), source_index, stds, stresses)

    def combine(self, said: MemberNumbers, baseline_ev: Any) -> EnsemblePrediction:
        """The ensemble's answer from its members'; baseline_ev [B] is added to every energy."""
        energies, forces = said.energies_ev + baseline_ev, said.forces_ev_per_angstrom
        weights, calibration, stresses = self.weights_of_members, self.calibration, said.stresses_ev_per_angstrom3
        if calibration is None:
            plain = plain_scale(1.0, len(self.references_ev))
            calibration = EnsembleCalibration(None, plain, plain)
        of_energy, of_forces = what_is_said(said, weights)
        energy, force = calibration.energy.sureness(of_energy), calibration.forces.sureness(of_forces)
        return EnsemblePrediction(
            energy_ev=weighted_mean(energies, weights),
            energy_std_ev=energy.std,
            forces_ev_per_angstrom=weighted_mean(forces, weights),
            forces_std_ev_per_angstrom=force.std,
            member_energies_ev=energies,
            member_forces_ev_per_angstrom=forces,
            energy_epistemic_std_ev=energy.epistemic,
            energy_aleatoric_std_ev=energy.aleatoric,
            energy_interval_ev=energy.half_width,
            forces_interval_ev_per_angstrom=force.half_width,
            coverage=calibration.coverage,
            stress_ev_per_angstrom3=None if stresses is None else weighted_mean(stresses, weights),
            stress_std_ev_per_angstrom3=None if stresses is None else spread(stresses, weights),
            member_stresses_ev_per_angstrom3=stresses,
        )

    def predict(
        self, structures: Sequence[Structure], source: str, *, stress: bool = False, conservative: bool = False
    ) -> EnsemblePrediction:
        """Predict structures as if they came from `source` (its level of theory, its energy zero).

        Args:
            structures: at least one.
            source: whose head.
            stress: also predict stresses.
            conservative: forces are minus the gradient of the energy, also of members that have a force head.

        Raises:
            ValueError: no head for that source, or no structure.
            DataError: a structure that no answer can be given for, as one with an element that the source's training
                data did not hold.
        """
        if not structures:
            raise ValueError("structures is empty, but must hold at least one structure")
        index = source_index_of(self.sources, source)
        for k, structure in enumerate(structures):
            if reason := unfit(structure, self.references_ev[index], source):
                raise DataError(_of_many(k, structures) + reason)
        relabelled = [_of_source(s, source) for s in structures]
        arrays = structures_to_arrays(relabelled, self.sources, self.cutoff_angstrom)
        if overlap := overlapping(arrays):
            raise DataError(_of_many(overlap.structure, structures) + overlap.message)
        counts = composition(arrays["numbers"], np.diff(arrays["atom_offset"]))
        baseline_ev = counts @ self.references_ev[index]
        return self.predict_arrays(arrays, baseline_ev, stress=stress, conservative=conservative)


def ensemble_blocks(ensemble: Ensemble) -> dict[str, Any]:
    """All that an ensemble is besides members and references, JSON-ready: what a release keeps of it."""
    return {
        "weights": None if ensemble.weights is None else list(ensemble.weights),
        "calibration": None if ensemble.calibration is None else ensemble.calibration.to_dict(),
        "training_domain": None if ensemble.domain is None else ensemble.domain.to_dict(),
    }


def ensemble_parts(blocks: Any, n_sources: int, n_members: int) -> dict[str, Any]:
    """Inverse of `ensemble_blocks`: keyword arguments of `Ensemble`; what is absent or None is None.

    Raises:
        DataError: a block is not what it must be.
    """
    if not isinstance(blocks, Mapping):
        raise DataError(f"uncertainty is a {type(blocks).__name__}, but must be a mapping. Get the release anew.")
    weights, calibration, domain = (blocks.get(name) for name in ("weights", "calibration", "training_domain"))
    return {
        "weights": None if weights is None else _checked_weights(weights, n_members),
        "calibration": None if calibration is None else EnsembleCalibration.from_dict(calibration, n_sources),
        "domain": None if domain is None else TrainingDomain.from_dict(domain, n_sources),
    }


def _checked_weights(weights: Any, n_members: int) -> tuple[float, ...]:
    try:
        numbers = np.array(weights, dtype=np.float64)
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if numbers.shape != (n_members,) or not (numbers >= 0).all() or not abs(numbers.sum() - 1) < 1e-6:
        raise DataError(
            f"weights are {str(weights)[:80]}, but must be {n_members} numbers, one a member, of 0 or more and with "
            "the sum 1. Get the release anew."
        )
    return tuple(numbers.tolist())


@torch.no_grad()
def _numbers(member: FoundationModel, batch: Batch, *, strain: bool, conservative: bool) -> tuple[Any, ...]:
    """One member's energies [B], forces [N, 3], own deviations [B] and, where asked for, strain derivatives [B, 3, 3].

    All in float64, with no graph kept of them.
    """
    said = member.eval()(batch, strain=strain, conservative=conservative)
    own = torch.full_like(said.energy, torch.nan) if said.energy_std is None else said.energy_std
    found = (said.energy, said.forces, own, *((said.strain_derivative,) if strain else ()))
    return tuple(tensor.double().cpu().numpy() for tensor in found)


def what_is_said(said: MemberNumbers, weights: Any) -> tuple[Said, Said]:
    """What calibration needs of energies [B] and of force components [N, 3], of members with weights [M].

    The mixture of the members has the mean of their own variances and the variance of their means (Lakshminarayanan et
    al., NeurIPS 2017).
    """
    dof = degrees_of_freedom(weights)
    aleatoric = np.sqrt(weighted_mean(said.energy_stds_ev**2, weights))
    energy = Said(spread(said.energies_ev, weights), dof, aleatoric, said.source_index, said.n_atoms)
    atom_source = np.repeat(said.source_index, said.n_atoms)[:, None]
    forces = spread(said.forces_ev_per_angstrom, weights)
    return energy, Said(forces, dof, np.full_like(forces, np.nan), np.broadcast_to(atom_source, forces.shape), 1.0)


def weighted_mean(values: Any, weights: Any) -> Any:
    """The mean over members [M, ...] with weights [M]; who weighs nothing is not heard, not even as NaN."""
    heard = np.flatnonzero(weights)
    return np.tensordot(weights[heard], values[heard], axes=1)


def degrees_of_freedom(weights: Any) -> float:
    """Of the spread of members with weights [M]: M - 1 where they are alike, 0 where one has all the weight."""
    return max(1 / float(np.square(weights).sum()) - 1, 0.0)


def spread(values: Any, weights: Any | None = None) -> Any:
    """Standard deviation over members [M, ...], unbiased (M - 1 where weights are alike); NaN = unknown for one member.

    With weights w it is that of reliability weights: the sum of w (x - mean)^2 over 1 - sum w^2.
    """
    weights = np.full(len(values), 1 / len(values)) if weights is None else weights
    free = 1 - float(np.square(weights).sum())
    if free < 1e-9:
        return np.full(values.shape[1:], np.nan)
    return np.sqrt(weighted_mean((values - weighted_mean(values, weights)) ** 2, weights) / free)


def _first_without_a_number(said: MemberNumbers, weights: Any) -> int | None:
    """The first structure of whose energy or forces a member with a weight says no number."""
    heard = np.flatnonzero(weights)
    lost = ~np.isfinite(said.energies_ev[heard]).all(axis=0)
    atoms = ~np.isfinite(said.forces_ev_per_angstrom[heard]).all(axis=(0, 2))
    lost[np.repeat(np.arange(len(lost)), said.n_atoms)[atoms]] = True
    return int(lost.argmax()) if lost.any() else None


def _of_many(index: int, many: Sized) -> str:
    """Which one is meant."""
    return f"structure {index}: " if len(many) > 1 else ""


def _of_source(structure: Structure, source: str) -> Structure:
    return Structure(
        structure.numbers, structure.positions_angstrom, structure.cell_angstrom, structure.pbc, structure.energy_ev,
        structure.forces_ev_per_angstrom, source, structure.group, structure.key,
    )  # fmt: skip
