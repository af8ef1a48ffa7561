"""Several trained models as one predictor: the mean is the answer, the calibrated spread is how sure it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from wattier_gnn.arrays import edges_within
from wattier_gnn.batch import Batch
from wattier_gnn.model import FoundationModel, source_index_of
from wattier_gnn.reference import composition
from wattier_gnn.store import join, structures_to_arrays
from wattier_gnn.structure import DataError, Structure


@dataclass(frozen=True)
class EnsemblePrediction:
    """B structures, N atoms in all, M members. Energies are totals: the composition reference is added back."""

    energy_ev: Any  # float64 [B]
    energy_std_ev: Any  # float64 [B], calibrated; NaN where there is one member only
    forces_ev_per_angstrom: Any  # float64 [N, 3]
    forces_std_ev_per_angstrom: Any  # float64 [N, 3], calibrated
    member_energies_ev: Any  # float64 [M, B]
    member_forces_ev_per_angstrom: Any  # float64 [M, N, 3]


@dataclass(frozen=True)
class MemberNumbers:
    """What M members say of B structures with N atoms, before it is joined to one answer."""

    energies_ev: Any  # float64 [M, B], relative to the composition reference
    forces_ev_per_angstrom: Any  # float64 [M, N, 3]


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

    def predict_arrays(self, arrays: Mapping[str, Any], baseline_ev: Any) -> EnsemblePrediction:
        """Predict the structures of some arrays, see `structures_to_arrays`, with edges within `cutoff_angstrom`.

        baseline_ev [B] is the composition reference of each structure.
        """
        return self.combine(self.members_say(arrays), baseline_ev)

    def members_say(self, arrays: Mapping[str, Any]) -> MemberNumbers:
        """What each member answers, relative to the composition reference; each sees edges within its own cutoff."""
        device, n = next(self.members[0].parameters()).device, len(arrays["energy"])
        found: dict[int, tuple[Any, Any]] = {}
        for cutoff in sorted({member.config.cutoff_angstrom for member in self.members}):
            near = arrays if cutoff == self.cutoff_angstrom else edges_within(arrays, cutoff)
            batch = join(near, np.arange(n), np.zeros(n)).to(device)
            found |= {k: _numbers(m, batch) for k, m in enumerate(self.members) if m.config.cutoff_angstrom == cutoff}
        energies, forces = (np.stack([found[k][i] for k in range(len(self.members))]) for i in (0, 1))
        return MemberNumbers(energies, forces)

    def combine(self, said: MemberNumbers, baseline_ev: Any) -> EnsemblePrediction:
        """The ensemble's answer from its members'; baseline_ev [B] is added to every energy."""
        energies, forces = said.energies_ev + baseline_ev, said.forces_ev_per_angstrom
        return EnsemblePrediction(
            energies.mean(axis=0),
            spread(energies) * self.energy_std_scale,
            forces.mean(axis=0),
            spread(forces) * self.forces_std_scale,
            energies,
            forces,
        )

    def predict(self, structures: Sequence[Structure], source: str) -> EnsemblePrediction:
        """Predict structures as if they came from `source` (its level of theory, its energy zero).

        Raises:
            ValueError: no head for that source, or no structure.
            DataError: an element the source's training data did not hold, or a position that is no number.
        """
        if not structures:
            raise ValueError("structures is empty, but must hold at least one structure")
        for structure in structures:
            if not np.isfinite(structure.positions_angstrom).all():
                raise DataError("a position is NaN or infinite, but must be a number of Angstrom. Mend the structure.")
        index = source_index_of(self.sources, source)
        relabelled = [_of_source(s, source) for s in structures]
        arrays = structures_to_arrays(relabelled, self.sources, self.cutoff_angstrom)
        n_atoms = np.diff(arrays["atom_offset"])
        counts = composition(arrays["numbers"], n_atoms)
        unknown = np.flatnonzero(counts.any(axis=0) & (self.references_ev[index] == 0))
        if len(unknown):
            raise DataError(
                f"atomic number {int(unknown[0])} does not occur in the {source} training data, but all must. "
                f"Use another source than {source!r} or another release."
            )
        return self.predict_arrays(arrays, counts @ self.references_ev[index])


@torch.no_grad()
def _numbers(member: FoundationModel, batch: Batch) -> tuple[Any, Any]:
    """One member's energies [B] and forces [N, 3] in float64, with no graph kept of how they came about."""
    prediction = member.eval()(batch)
    return prediction.energy.double().cpu().numpy(), prediction.forces.double().cpu().numpy()


def spread(values: Any) -> Any:
    """Standard deviation over members [M, ...] with M - 1; NaN, which is unknown, for one member."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.full_like(values[0], np.nan)


def _of_source(structure: Structure, source: str) -> Structure:
    return Structure(
        structure.numbers, structure.positions_angstrom, structure.cell_angstrom, structure.pbc, structure.energy_ev,
        structure.forces_ev_per_angstrom, source, structure.group, structure.key,
    )  # fmt: skip
