"""The TorchSim model: its own validation, the calculator's numbers, and dynamics and relaxations of a mixed batch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.md.verlet import VelocityVerlet
from ase.stress import voigt_6_to_full_3x3_stress
from ensembles import untrained

from wattier_gnn.calculator import WattierCalculator
from wattier_gnn.structure import DataError
from wattier_gnn.torchsim import WattierModel  # before torch_sim, whose import warns

import torch_sim as ts  # isort: skip
from torch_sim.models.interface import validate_model_outputs  # isort: skip

CPU = torch.device("cpu")


def systems() -> list[Atoms]:
    """A molecule in a box, since all systems of a state repeat or none does; an ionic crystal; a metal of one atom."""
    water, salt, copper = molecule("H2O"), bulk("NaCl", "rocksalt", a=5.4), bulk("Cu")
    water.set_cell([9.0, 10.0, 11.0])
    water.pbc = True
    salt.set_cell(salt.cell.array @ (np.eye(3) + 0.05 * np.arange(9).reshape(3, 3) / 9), scale_atoms=True)
    for seed, atoms in enumerate((water, salt, copper)):
        atoms.rattle(0.05, seed=seed)
    return [water, salt, copper]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_passes_the_validation_of_torchsim(dtype: torch.dtype) -> None:
    validate_model_outputs(WattierModel(untrained(), "a", dtype=dtype, device=CPU), CPU, dtype)


@pytest.mark.parametrize(("forces", "conservative"), [("conservative", False), ("vector", False), ("vector", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_says_what_the_calculator_says(forces: Any, conservative: bool, dtype: torch.dtype) -> None:
    ensemble = untrained(forces=forces)
    model = WattierModel(ensemble, "b", dtype=dtype, conservative=conservative)
    calculator = WattierCalculator(
        ensemble, "b", precision=str(dtype).removeprefix("torch."), conservative=conservative
    )
    assert model.is_conservative == calculator.is_conservative
    state = ts.io.atoms_to_state(systems(), CPU, dtype)
    said = model(state)
    assert {name: tensor.dtype for name, tensor in said.items()} == dict.fromkeys(said, dtype)
    atol = 1e-5
    for k, atoms in enumerate(ts.io.state_to_atoms(state)):
        mine = state.system_idx == k
        assert said["energy"][k].item() == pytest.approx(calculator.get_potential_energy(atoms), abs=atol)
        assert said["energy_std"][k].item() == pytest.approx(calculator.get_property("energy_std", atoms), abs=atol)
        np.testing.assert_allclose(said["forces"][mine], calculator.get_forces(atoms), rtol=0, atol=atol)
        np.testing.assert_allclose(said["forces_std"][mine], calculator.get_property("forces_std", atoms), atol=atol)
        stress = voigt_6_to_full_3x3_stress(calculator.get_stress(atoms))
        np.testing.assert_allclose(said["stress"][k], stress, rtol=0, atol=atol)


def test_molecules_have_no_stress() -> None:
    state = ts.io.atoms_to_state([molecule("H2O"), molecule("CH4")], CPU, torch.float64)
    said = WattierModel(untrained(members=1), "a", dtype=torch.float64)(state)
    assert said["stress"].isnan().all()
    assert said["forces"].isfinite().all()
    assert set(said) == {"energy", "forces", "stress"}
    silent = WattierModel(untrained(members=1), "a", dtype=torch.float64, compute_stress=False)
    assert set(silent(state)) == {"energy", "forces"}
    assert not silent.compute_stress
    with pytest.raises(NotImplementedError):
        silent.compute_stress = True


def test_what_is_not_known_is_not_there() -> None:
    state = ts.io.atoms_to_state([molecule("H2O")], CPU, torch.float64)

    def spreads(**parts: Any) -> set[str]:
        said = WattierModel(untrained(**parts), "a", dtype=torch.float64)(state)
        assert all(said[name].isfinite().all() for name in said if name.endswith("_std"))
        return {name for name in said if name.endswith("_std")}

    assert spreads() == {"energy_std", "forces_std"}
    assert spreads(members=1, energy_variance=True) == {"energy_std"}
    assert spreads(parts={"weights": (1.0, 0.0, 0.0)}) == set()


def test_dynamics_is_that_of_ase() -> None:
    """The same velocities, the same steps, one system in TorchSim's batch and in ASE."""
    ensemble = untrained()
    model = WattierModel(ensemble, "a", dtype=torch.float64)
    state = ts.io.atoms_to_state(systems(), CPU, torch.float64)
    start, update = ts.nve(
        model, dt=torch.tensor(0.5 * units.fs, dtype=torch.float64), kT=torch.tensor(0.02, dtype=torch.float64), seed=1
    )
    moving = start(state)
    atoms = systems()[1]
    mine = moving.system_idx == 1
    atoms.set_momenta(moving.momenta[mine].numpy())
    atoms.calc = WattierCalculator(ensemble, "a", precision="float64")
    for _ in range(10):
        moving = update(moving)
    VelocityVerlet(atoms, 0.5 * units.fs).run(10)
    apart = (moving.positions[mine].numpy() - atoms.positions) @ np.linalg.inv(atoms.cell.array)
    apart = (apart - np.rint(apart)) @ atoms.cell.array  # TorchSim wraps
    assert np.abs(apart).max() < 1e-5  # masses of the two differ in their last digits
    assert np.abs(atoms.positions - systems()[1].positions).max() > 0.01


def test_a_batch_is_integrated_and_relaxed_with_its_cells() -> None:
    model = WattierModel(untrained(), "a", dtype=torch.float64)
    state = ts.io.atoms_to_state(systems(), CPU, torch.float64)
    before = model(state)["energy"]
    after = ts.integrate(systems(), model, integrator=ts.nve, n_steps=3, temperature=300.0, timestep=0.0005)
    assert after.n_systems == 3
    assert after.energy.isfinite().all()
    with pytest.warns(UserWarning, match="max steps"):
        relaxed = ts.optimize(
            systems(), model, optimizer=ts.frechet_cell_fire, max_steps=10,
            convergence_fn=ts.generate_force_convergence_fn(force_tol=1e-3),
        )  # fmt: skip
    assert (relaxed.energy < before).all()
    assert not torch.allclose(relaxed.cell, state.cell)


def test_a_dictionary_will_do_and_bad_input_is_refused() -> None:
    model = WattierModel(untrained(), "a", dtype=torch.float64)
    state = ts.io.atoms_to_state(systems(), CPU, torch.float64)
    names = ("positions", "cell", "pbc", "atomic_numbers", "system_idx")
    torch.testing.assert_close(model({name: getattr(state, name) for name in names})["energy"], model(state)["energy"])
    with pytest.raises(DataError, match="structure 1: atomic number 92"):
        model(ts.io.atoms_to_state([*systems()[:1], bulk("U", "bcc", a=3.5)], CPU, torch.float64))
    with pytest.raises(ValueError, match=r"dtype is torch\.float16"):
        WattierModel(untrained(), "a", dtype=torch.float16)
    with pytest.raises(ValueError, match="source is 'c'"):
        WattierModel(untrained(), "c")
    assert model.memory_scales_with == "n_atoms_x_density"
    assert model.device == CPU


def test_without_torchsim_one_line_says_what_to_install() -> None:
    code = "import sys; sys.modules['torch_sim'] = None; import wattier_gnn.torchsim"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("ImportError: wattier_gnn.torchsim needs torch_sim")
    assert 'pip install "wattier[torchsim]"' in done.stderr
