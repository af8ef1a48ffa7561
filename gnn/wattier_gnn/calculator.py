"""A released ensemble as an ASE calculator: ``atoms.calc = WattierCalculator("release", source="mptrj")``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from wattier_gnn.release import load_release
from wattier_gnn.structure import Structure


class WattierCalculator(Calculator):  # type: ignore[misc]  # ASE has no types
    """Energy [eV], forces [eV/Angstrom] and how sure they are.

    Args:
        release: folder that ``wattier export`` made; every file's hash is checked.
        source: whose level of theory to predict at, such as ``mptrj`` (see ``Ensemble.sources``).

    Results: energy, free_energy, forces, each member's energies and forces as energies_comm [M] and forces_comm
    [M, N, 3], and, where there are several members, energy_std and forces_std.

    Raises:
        DataError: the release is damaged or newer than this version.
        ValueError: no such source.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces"]

    def __init__(self, release: Path | str, source: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ensemble = load_release(release)
        if source not in self.ensemble.sources:
            raise ValueError(f"source is {source!r}, but must be one of {', '.join(self.ensemble.sources)}")
        self.source = source

    def calculate(
        self, atoms: Atoms | None = None, properties: list[str] | None = None, system_changes: list[str] = all_changes
    ) -> None:
        """Predict and fill `results`."""
        super().calculate(atoms, properties, system_changes)
        prediction = self.ensemble.predict([structure_of(self.atoms)], self.source)
        energy = float(prediction.energy_ev[0])
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "forces": prediction.forces_ev_per_angstrom,
            "energies_comm": prediction.member_energies_ev[:, 0],
            "forces_comm": prediction.member_forces_ev_per_angstrom,
        }
        if len(self.ensemble.members) > 1:  # one member cannot say how sure it is
            self.results["energy_std"] = float(prediction.energy_std_ev[0])
            self.results["forces_std"] = prediction.forces_std_ev_per_angstrom


def structure_of(atoms: Atoms) -> Structure:
    """An ASE structure without labels as ours."""
    pbc = tuple(bool(flag) for flag in atoms.pbc)
    return Structure(
        numbers=atoms.numbers.astype(np.int64),
        positions_angstrom=np.asarray(atoms.positions, dtype=np.float64),
        cell_angstrom=np.array(atoms.cell, dtype=np.float64) if any(pbc) else None,
        pbc=(pbc[0], pbc[1], pbc[2]),
        energy_ev=float("nan"),
        forces_ev_per_angstrom=None,
        source="",
        group="",
        key="",
    )
