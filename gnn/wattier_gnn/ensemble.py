"""Several trained models as one predictor: the mean is the answer, the calibrated spread is how sure it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from wattier_gnn.arrays import edges_within
from wattier_gnn.batch import Batch
from wattier_gnn.files import sha256_of
from wattier_gnn.model import FoundationModel, ModelConfig, source_index_of
from wattier_gnn.reference import MAX_ATOMIC_NUMBER, composition
from wattier_gnn.store import join, structures_to_arrays
from wattier_gnn.structure import DataError, Structure

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


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
        device, n = next(self.members[0].parameters()).device, len(arrays["energy"])
        found: dict[int, tuple[Any, Any]] = {}
        for cutoff in sorted({member.config.cutoff_angstrom for member in self.members}):
            near = arrays if cutoff == self.cutoff_angstrom else edges_within(arrays, cutoff)
            batch = join(near, np.arange(n), np.zeros(n)).to(device)
            found |= {k: _numbers(m, batch) for k, m in enumerate(self.members) if m.config.cutoff_angstrom == cutoff}
        energies = np.stack([found[k][0] for k in range(len(self.members))]) + baseline_ev
        forces = np.stack([found[k][1] for k in range(len(self.members))])
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

    @classmethod
    def load(cls, folder: Path) -> Ensemble:
        """Load a release, after checking the hash of every file it names.

        Raises:
            DataError: a file is missing or changed, or the release was made by a newer version.
        """
        manifest = read_manifest(folder)
        members = tuple(_load_member(folder, member) for member in manifest["members"])
        references = np.array(manifest["references_ev"], dtype=np.float64)
        if references.shape != (len(members[0].config.sources), MAX_ATOMIC_NUMBER + 1):
            raise DataError(f"{folder}: references_ev is {list(references.shape)}, but must be [S, 119]. Get it anew.")
        calibration = manifest["calibration"]
        return cls(members, references, calibration["energy_std_scale"], calibration["forces_std_scale"])


@torch.no_grad()
def _numbers(member: FoundationModel, batch: Batch) -> tuple[Any, Any]:
    """One member's energies [B] and forces [N, 3] in float64, with no graph kept of how they came about."""
    prediction = member.eval()(batch)
    return prediction.energy.double().cpu().numpy(), prediction.forces.double().cpu().numpy()


def spread(values: Any) -> Any:
    """Standard deviation over members [M, ...] with M - 1; NaN, which is unknown, for one member."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.full_like(values[0], np.nan)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A release's manifest, once every file it names has the hash it states.

    Raises:
        DataError: no manifest, a newer schema, a missing or changed file, or a name that leaves the folder.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        version, files = manifest["schema_version"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a readable manifest ({error}). Give the folder of a Wattier release.") from error
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path}: schema_version is {version}, but must be {SCHEMA_VERSION}. "
            f"Install the wattier that made it: pip install 'wattier=={manifest.get('wattier_version')}'."
        )
    for name, expected in files.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{path}: names {name!r}, but files must lie inside the release. Do not use this release.")
        if not file.is_file():
            raise DataError(f"{file}: is missing, but the manifest names it. Get the release anew.")
        if (found := sha256_of(file)) != expected:
            raise DataError(f"{file}: sha256 is {found[:12]}..., but must be {expected[:12]}... Get the release anew.")
    return manifest


def _load_member(folder: Path, name: str) -> FoundationModel:
    try:
        model = FoundationModel(ModelConfig.from_dict(json.loads((folder / name / "config.json").read_text())))
        model.load_state_dict(load_file(folder / name / "model.safetensors"))
    except Exception as error:  # safetensors, json and torch each have their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{folder / name}: not a readable member ({reason}). Get the release anew.") from error
    return model.eval()


def _of_source(structure: Structure, source: str) -> Structure:
    return Structure(
        structure.numbers, structure.positions_angstrom, structure.cell_angstrom, structure.pbc, structure.energy_ev,
        structure.forces_ev_per_angstrom, source, structure.group, structure.key,
    )  # fmt: skip
