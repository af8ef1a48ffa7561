"""A trained potential at work: dynamics that keeps its energy, relaxations that converge, in ASE and in TorchSim.

Trained here, for a quarter of a minute, on the sample: small, but a potential of real molecules, crystals and slabs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.filters import FrechetCellFilter
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS, FIRE
from toys import make

from wattier_gnn.calculator import WattierCalculator
from wattier_gnn.checkpoint import load
from wattier_gnn.ensemble import Ensemble
from wattier_gnn.model import ForceMode, FoundationModel, ModelConfig, build_model
from wattier_gnn.sample import sample_path
from wattier_gnn.splits import TRAIN, VAL
from wattier_gnn.store import Store
from wattier_gnn.train import TrainConfig, Trainer

SOURCES = ("ani1x", "mptrj", "oc20")
MOST_DRIFT_EV = 1e-3  # an atom and a picosecond
FORCE_TOLERANCE = 0.05  # eV/Angstrom
FEMTOSECONDS = 1000


@dataclass(frozen=True)
class Potential:
    """One trained member, and held-out frames of the sample."""

    store: Store
    ensemble: Ensemble

    def held_out(self, source: str, formula: str) -> Atoms:
        """The first validation frame of a composition."""
        for index in self.store.indices(VAL):
            arrays = self.store.gather(np.array([index]))
            cell = arrays["cells"][0]
            atoms = Atoms(
                arrays["numbers"], arrays["positions"], cell=cell if cell.any() else None, pbc=arrays["pbc"][0]
            )
            if self.store.sources[self.store.source_index[index]] == source and atoms.get_chemical_formula() == formula:
                return atoms
        raise AssertionError(f"no {formula} among the validation frames of {source}")


def trained(store: Store, folder: Path, forces: ForceMode, epochs: int) -> FoundationModel:
    config = ModelConfig(
        sources=store.sources, energy_scale_ev=tuple(store.meta["energy_scale_ev"]),
        mean_neighbors=store.meta["mean_neighbors"], cutoff_angstrom=store.cutoff_angstrom, hidden_dim=32, n_layers=2,
        n_radial=8, head_dim=32, n_head_layers=1, forces=forces,
    )  # fmt: skip
    trainer = Trainer(
        build_model(config, seed=0), store,
        TrainConfig(epochs=epochs, batch_structures=16, learning_rate=1e-2, schedule="cosine"),
        train_indices=store.indices(TRAIN), val_indices=store.indices(VAL)[:40], folder=folder,
        device=torch.device("cpu"),
    )  # fmt: skip
    trainer.run(lambda _report: True)
    model = FoundationModel(config)
    model.load_state_dict(load(trainer.best_path)["model"])
    return model


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    paths = {name: sample_path(name) for name in SOURCES}
    folder = tmp_path_factory.mktemp("potential") / "store"
    return make(folder, paths, cutoff_angstrom=4.0, max_force_ev_per_angstrom=30.0)[0]


@pytest.fixture(scope="module")
def potential(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Potential:
    model = trained(store, tmp_path_factory.mktemp("trial"), "conservative", 12)
    return Potential(store, Ensemble((model,), store.references))


def relaxed(atoms: Atoms, steps: int = 300) -> bool:
    return bool(FIRE(atoms, logfile=None).run(fmax=FORCE_TOLERANCE, steps=steps))


def energies_of_dynamics(atoms: Atoms, *, temperature_kelvin: float, step_femtoseconds: float, length: float) -> Any:
    """Total energies [eV/atom], of each step: potential plus kinetic, from velocities drawn at twice the temperature.

    Half of the kinetic energy goes into the bonds.
    """
    rng = np.random.default_rng(0)
    spread = np.sqrt(2 * temperature_kelvin * units.kB * atoms.get_masses())
    momenta = rng.normal(size=(len(atoms), 3)) * spread[:, None]
    atoms.set_momenta(momenta - momenta.mean(axis=0))
    found = []
    dynamics = VelocityVerlet(atoms, step_femtoseconds * units.fs)
    dynamics.attach(lambda: found.append(atoms.get_total_energy() / len(atoms)))
    dynamics.run(round(length / step_femtoseconds))
    return np.array(found)


def drift_ev_per_picosecond(energies: Any, length: float) -> float:
    return abs(float(np.polyfit(np.linspace(0, length / 1000, len(energies)), energies, 1)[0]))


@pytest.mark.parametrize(
    ("source", "formula", "step_femtoseconds"),
    [("ani1x", "C2H4O", 0.5), ("mptrj", "Pd6Zn2", 2.0)],
    ids=["molecule", "crystal"],
)
def test_dynamics_keeps_the_energy(potential: Potential, source: str, formula: str, step_femtoseconds: float) -> None:
    """1 ps at 300 K, in float32 as a user would run it."""
    atoms = potential.held_out(source, formula)
    atoms.calc = WattierCalculator(potential.ensemble, source)
    assert atoms.calc.is_conservative
    assert relaxed(atoms)
    start = atoms.positions.copy()
    energies = energies_of_dynamics(
        atoms, temperature_kelvin=300, step_femtoseconds=step_femtoseconds, length=FEMTOSECONDS
    )
    drift = drift_ev_per_picosecond(energies, FEMTOSECONDS)
    print(
        f"{atoms.symbols}: drift {1000 * drift:.4f} meV/atom/ps, at most {1000 * np.ptp(energies):.3f} meV/atom apart"
    )
    assert drift < MOST_DRIFT_EV
    assert np.ptp(energies) < 5 * MOST_DRIFT_EV
    assert np.abs(atoms.positions - start).max() > 0.05  # it did move
    kinetic = atoms.get_kinetic_energy() / len(atoms)
    assert kinetic > 0.01  # and has not cooled down


def test_forces_of_a_head_drift_and_the_gradient_does_not(store: Store, tmp_path: Path) -> None:
    """What `is_conservative` warns of, and what `conservative=True` is for."""
    ensemble = Ensemble((trained(store, tmp_path, "vector", 2),), store.references)
    drifts = {}
    for conservative in (False, True):
        atoms = Potential(store, ensemble).held_out("ani1x", "C2H4O")
        atoms.calc = WattierCalculator(ensemble, "ani1x", conservative=conservative)
        assert atoms.calc.is_conservative is conservative
        energies = energies_of_dynamics(atoms, temperature_kelvin=300, step_femtoseconds=0.25, length=50)
        drifts[conservative] = drift_ev_per_picosecond(energies, 50) * 0.05
    assert drifts[True] < MOST_DRIFT_EV < drifts[False] / 5


@pytest.mark.parametrize(
    ("source", "formula", "cell"),
    [("ani1x", "C2H4O", False), ("mptrj", "Pd6Zn2", True), ("oc20", "Ag6ORh6", False)],
    ids=["molecule", "bulk", "slab"],
)
def test_relaxations_of_released_frames_converge(potential: Potential, source: str, formula: str, cell: bool) -> None:
    atoms = potential.held_out(source, formula)
    atoms.calc = WattierCalculator(potential.ensemble, source)
    before = atoms.get_potential_energy()
    target = FrechetCellFilter(atoms) if cell else atoms
    optimizer = BFGS(target, logfile=None)
    assert optimizer.run(fmax=FORCE_TOLERANCE, steps=200)
    assert optimizer.nsteps > 2  # it was not there yet
    assert np.linalg.norm(atoms.get_forces(), axis=1).max() < FORCE_TOLERANCE
    assert atoms.get_potential_energy() < before
    distances = atoms.get_all_distances(mic=bool(atoms.pbc.any()))
    assert distances[~np.eye(len(atoms), dtype=bool)].min() > 0.8  # still molecules and metals, not a heap
    if cell:
        # The gradient of the filter is the virial over the number of atoms: what is left of the stress is small.
        assert np.abs(atoms.get_stress()).max() * atoms.get_volume() / len(atoms) < FORCE_TOLERANCE


def test_the_error_of_energies_is_of_the_second_order(potential: Potential) -> None:
    """Velocity Verlet on a smooth energy: half the step, a quarter of the fluctuation."""
    spans = []
    for step in (1.0, 0.5):
        atoms = potential.held_out("ani1x", "C2H4O")
        atoms.calc = WattierCalculator(potential.ensemble, "ani1x", precision="float64")
        assert relaxed(atoms)
        energies = energies_of_dynamics(atoms, temperature_kelvin=150, step_femtoseconds=step, length=40)
        spans.append(np.std(energies))
    assert spans[0] / spans[1] == pytest.approx(4, rel=0.25)
