"""A released ensemble as an ASE calculator: ``atoms.calc = WattierCalculator("release", source="mptrj")``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.outputs import Properties, all_outputs
from ase.stress import full_3x3_to_voigt_6_stress

from wattier_gnn.devices import chosen_device
from wattier_gnn.ensemble import Ensemble, EnsemblePrediction, weighted_mean
from wattier_gnn.model import source_index_of
from wattier_gnn.release import load_release
from wattier_gnn.structure import Structure

Precision = Literal["float32", "float64"]
COMMITTEE = ("energy_comm", "energy_var", "forces_comm", "forces_var", "stress_comm", "stress_var")  # MACE's names
PROPERTIES = ["energy", "free_energy", "forces", "stress"]
SPREADS = ("energy_std", "forces_std", "stress_std")


class WattierCalculator(Calculator):  # type: ignore[misc]  # ASE has no types
    """Energy [eV], forces [eV/Angstrom], stress [eV/Angstrom^3] and how sure they are.

    Args:
        release: folder that ``wattier export`` made, of which every file's hash is checked; or a loaded ensemble.
        source: whose level of theory to predict at, such as ``mptrj`` (see ``Ensemble.sources``).
        device: auto takes a GPU where there is one.
        precision: float64 for finite differences, vibrations and long runs, at about twice the time.
        conservative: take minus the gradient of the energy for forces, also of members that predict forces directly:
            such members' forces are not those of any energy, so molecular dynamics would drift. Slower, and less near
            to the labels, since such members were trained on the forces of their head.

    Results: energy, free_energy, forces; stress in Voigt order where the structure repeats in three directions, always
    the strain derivative of the energy; where they are known energy_std and forces_std (calibrated, on the forces that
    members were trained for) and stress_std (as the members spread); and where there are several members what MACE's
    calculator says of a committee, under its names: of each member energy_comm [M], forces_comm [M, N, 3] and
    stress_comm [M, 6], and of all energy_var, forces_var and stress_var, the variances over members by their weights,
    not calibrated.

    Attributes:
        is_conservative: whether forces are minus the gradient of the energy, as molecular dynamics and geometry
            optimisers that look at energies take for granted.

    Raises:
        DataError: the release is damaged or newer than this version; in a calculation: a structure that no answer can
            be given for.
        ValueError: no such source, device or precision.
    """

    implemented_properties = PROPERTIES

    def __init__(
        self,
        release: Path | str | Ensemble,
        source: str,
        *,
        device: str = "auto",
        precision: Precision = "float32",
        conservative: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if precision not in ("float32", "float64"):
            raise ValueError(f"precision is {precision!r}, but must be float32 or float64")
        ensemble = release if isinstance(release, Ensemble) else load_release(release)
        source_index_of(ensemble.sources, source)
        self.ensemble = ensemble.moved(chosen_device(device), getattr(torch, precision))
        self.source, self.conservative = source, conservative
        self.is_conservative = conservative or ensemble.is_conservative
        spreads = SPREADS if ensemble.knows_forces_std else SPREADS[:1] if ensemble.knows_energy_std else ()
        committee = COMMITTEE if len(ensemble.members) > 1 else ()
        self.implemented_properties = [*PROPERTIES, *spreads, *committee]

    def calculate(
        self, atoms: Atoms | None = None, properties: list[str] | None = None, system_changes: list[str] = all_changes
    ) -> None:
        """Predict and fill `results`.

        Raises:
            DataError: a structure that no answer can be given for.
            PropertyNotImplementedError: stress is asked for, but the structure does not repeat in three directions.
        """
        super().calculate(atoms, properties, system_changes)
        asked = any(name.startswith("stress") for name in properties or ())
        has_volume = bool(self.atoms.pbc.all())
        if asked and not has_volume:
            raise PropertyNotImplementedError(
                f"stress is asked for, but pbc is {self.atoms.pbc.tolist()}, and only a structure that repeats in "
                "three directions has a volume"
            )
        # Where forces are the gradient, the stress is a sum of what is there anyway.
        stress = has_volume and (asked or self.is_conservative)
        prediction = self.ensemble.predict(
            [structure_of(self.atoms)], self.source, stress=stress, conservative=self.conservative
        )
        self.results = _results(prediction, self.ensemble.weights_of_members)

    def export_properties(self) -> Properties:
        """The results that ASE has a name for."""
        return Properties({name: value for name, value in self.results.items() if name in all_outputs})


def _results(prediction: EnsemblePrediction, weights: Any) -> dict[str, Any]:
    """The prediction for one structure, of members with weights [M], under ASE's and MACE's names."""
    energy = float(prediction.energy_ev[0])
    results: dict[str, Any] = {
        "energy": energy,
        "free_energy": energy,
        "forces": prediction.forces_ev_per_angstrom,
        "energies_comm": prediction.member_energies_ev[:, 0],  # of the first releases
        "energy_comm": prediction.member_energies_ev[:, 0],
        "forces_comm": prediction.member_forces_ev_per_angstrom,
    }
    spreads = {"energy_std": prediction.energy_std_ev[0], "forces_std": prediction.forces_std_ev_per_angstrom}
    if prediction.stress_ev_per_angstrom3 is not None:
        results["stress"] = full_3x3_to_voigt_6_stress(prediction.stress_ev_per_angstrom3[0])
        results["stress_comm"] = full_3x3_to_voigt_6_stress(prediction.member_stresses_ev_per_angstrom3[:, 0])
        spreads["stress_std"] = full_3x3_to_voigt_6_stress(prediction.stress_std_ev_per_angstrom3[0])
    # What is not known, as where one member has no other to disagree with, is not there.
    results |= {name: values for name, values in spreads.items() if np.isfinite(values).all()}
    if len(prediction.member_energies_ev) > 1:
        results |= {n.replace("_comm", "_var"): _variance(v, weights) for n, v in results.items() if n in COMMITTEE}
    return {name: float(value) if np.ndim(value) == 0 else value for name, value in results.items()}


def _variance(values: Any, weights: Any) -> Any:
    """Over members [M, ...] about the answer: with equal weights MACE's, which divides by M."""
    return weighted_mean((values - weighted_mean(values, weights)) ** 2, weights)


def structure_of(atoms: Atoms) -> Structure:
    """An ASE structure without labels as ours; a lattice vector that is neither given nor needed is a unit vector."""
    pbc = tuple(bool(flag) for flag in atoms.pbc)
    cell = np.array(atoms.cell, dtype=np.float64)
    spare = ~cell.any(axis=1) & ~np.array(pbc)
    if any(pbc) and spare.any():
        cell[spare] = atoms.cell.complete().array[spare]
    return Structure(
        numbers=atoms.numbers.astype(np.int64),
        positions_angstrom=np.asarray(atoms.positions, dtype=np.float64),
        cell_angstrom=cell if any(pbc) else None,
        pbc=(pbc[0], pbc[1], pbc[2]),
        energy_ev=float("nan"),
        forces_ev_per_angstrom=None,
        source="",
        group="",
        key="",
    )
