"""Several trained models as one predictor: the mean is the answer, the calibrated spread is how sure it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from wattier_gnn.arrays import edges_within, volumes
from wattier_gnn.batch import Batch
from wattier_gnn.model import FoundationModel, source_index_of
from wattier_gnn.reference import composition
from wattier_gnn.store import join, structures_to_arrays
from wattier_gnn.structure import DataError, Structure
from wattier_gnn.unfit import overlapping, unfit


@dataclass(frozen=True)
class EnsemblePrediction:
    """B structures, N atoms in all, M members. Energies are totals: the composition reference is added back.

    Stresses are None unless asked for. They have ASE's sign, positive where the structure would shrink, and are NaN
    where a structure does not repeat in three directions. Their std is not calibrated: no source has labels.
    """

    energy_ev: Any  # float64 [B]
    energy_std_ev: Any  # float64 [B], calibrated; NaN where there is one member only
    forces_ev_per_angstrom: Any  # float64 [N, 3]
    forces_std_ev_per_angstrom: Any  # float64 [N, 3], calibrated
    member_energies_ev: Any  # float64 [M, B]
    member_forces_ev_per_angstrom: Any  # float64 [M, N, 3]
    stress_ev_per_angstrom3: Any = None  # float64 [B, 3, 3]
    stress_std_ev_per_angstrom3: Any = None  # float64 [B, 3, 3]
    member_stresses_ev_per_angstrom3: Any = None  # float64 [M, B, 3, 3]


@dataclass(frozen=True)
class MemberNumbers:
    """What M members say of B structures with N atoms, before it is joined to one answer."""

    energies_ev: Any  # float64 [M, B], relative to the composition reference
    forces_ev_per_angstrom: Any  # float64 [M, N, 3]
    stresses_ev_per_angstrom3: Any = None  # float64 [M, B, 3, 3], None where not asked for


@dataclass(frozen=True)
class Ensemble:
    """Trained members of one data alignment; each sees the neighbours within its own cutoff.

    energy_std_scale, forces_std_scale: factors found on validation data by which the members' spread is multiplied.
    """

    members: tuple[FoundationModel, ...]
    references_ev: Any  # float64 [S, 119]
    energy_std_scale: float = 1.0
    forces_std_scale: float = 1.0

    @property
    def sources(self) -> tuple[str, ...]:
        """Sources that the members have heads for."""
        return self.members[0].config.sources

    @property
    def cutoff_angstrom(self) -> float:
        """The largest of the members' cutoffs."""
        return max(member.config.cutoff_angstrom for member in self.members)

    @property
    def is_conservative(self) -> bool:
        """Whether every member's forces are minus the gradient of its energy."""
        return all("conservative" in member.properties for member in self.members)

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

    def predict_arrays(self, arrays: Mapping[str, Any], baseline_ev: Any) -> EnsemblePrediction:
        """Predict the structures of some arrays, see `structures_to_arrays`, with edges within `cutoff_angstrom`.

        baseline_ev [B] is the composition reference of each structure.
        """
        return self.combine(self.members_say(arrays), baseline_ev)

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
        energies, forces = (np.stack([found[k][i] for k in range(len(self.members))]) for i in (0, 1))
        if not stress:
            return MemberNumbers(energies, forces)
        by_strain = np.stack([found[k][2] for k in range(len(self.members))])
        return MemberNumbers(energies, forces, by_strain / volumes(arrays)[:, None, None])

    def combine(self, said: MemberNumbers, baseline_ev: Any) -> EnsemblePrediction:
        """The ensemble's answer from its members'; baseline_ev [B] is added to every energy."""
        energies, forces = said.energies_ev + baseline_ev, said.forces_ev_per_angstrom
        stresses = said.stresses_ev_per_angstrom3
        return EnsemblePrediction(
            energies.mean(axis=0),
            spread(energies) * self.energy_std_scale,
            forces.mean(axis=0),
            spread(forces) * self.forces_std_scale,
            energies,
            forces,
            None if stresses is None else stresses.mean(axis=0),
            None if stresses is None else spread(stresses),
            stresses,
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
            DataError: a structure that no answer can be given for, or an element that the source's training data did
                not hold.
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
        said = self.members_say(arrays, stress=stress, conservative=conservative)
        return self.combine(said, counts @ self.references_ev[index])


@torch.no_grad()
def _numbers(member: FoundationModel, batch: Batch, *, strain: bool, conservative: bool) -> tuple[Any, ...]:
    """One member's energies [B], forces [N, 3] and, where asked for, strain derivatives [B, 3, 3], in float64."""
    said = member.eval()(batch, strain=strain, conservative=conservative)
    found = (said.energy, said.forces, *((said.strain_derivative,) if strain else ()))
    return tuple(tensor.double().cpu().numpy() for tensor in found)


def chosen_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is a GPU where there is one.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name if name.partition(":")[0] in ("cpu", "cuda") else "")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device is {name!r}, but must be auto, cpu, or a GPU that is there, as cuda or cuda:1"
        ) from error
    return device


def spread(values: Any) -> Any:
    """Standard deviation over members [M, ...] with M - 1; NaN, which is unknown, for one member."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.full_like(values[0], np.nan)


def _of_many(index: int, structures: Sequence[Structure]) -> str:
    """Which one is meant."""
    return f"structure {index}: " if len(structures) > 1 else ""


def _of_source(structure: Structure, source: str) -> Structure:
    return Structure(
        structure.numbers, structure.positions_angstrom, structure.cell_angstrom, structure.pbc, structure.energy_ev,
        structure.forces_ev_per_angstrom, source, structure.group, structure.key,
    )  # fmt: skip
