"""The ASE calculator: ASE's consistency checks, its cache, MACE's committee, and one line for every bad structure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, make_supercell, molecule
from ase.calculators.calculator import PropertyNotImplementedError, all_changes
from ase.calculators.fd import FiniteDifferenceCalculator, calculate_numerical_forces, calculate_numerical_stress
from ase.calculators.test import gradient_test
from ase.io import read, write
from ase.stress import voigt_6_to_full_3x3_stress
from ensembles import untrained

from wattier_gnn.calculator import COMMITTEE, WattierCalculator, structure_of
from wattier_gnn.ensemble import Ensemble
from wattier_gnn.structure import DataError


@pytest.fixture(scope="module")
def calculator() -> Callable[..., WattierCalculator]:
    def make(*, precision: Any = "float64", conservative: bool = False, **changes: Any) -> WattierCalculator:
        return WattierCalculator(untrained(**changes), "a", precision=precision, conservative=conservative)

    return make


def crystal() -> Atoms:
    atoms = make_supercell(bulk("NaCl", "rocksalt", a=5.4), [[2, 0, 0], [0, 1, 0], [0, 0, 1]])
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.05 * np.array([[0, 1, 0], [0, 0.3, 0], [0.5, 0, 0]])), True)
    atoms.rattle(0.1, seed=2)
    return atoms


def methanol() -> Atoms:
    atoms = molecule("CH3OH")
    atoms.rattle(0.05, seed=1)
    return atoms


@pytest.mark.parametrize("forces", ["conservative", "vector", "direct"])
@pytest.mark.parametrize("make", [methanol, crystal], ids=["molecule", "crystal"])
def test_forces_and_stress_are_those_of_finite_differences(forces: str, make: Any, calculator: Any) -> None:
    atoms = make()
    atoms.calc = calculator(forces=forces, conservative=forces != "conservative")
    assert atoms.calc.is_conservative
    numeric = calculate_numerical_forces(atoms, eps=1e-4)
    np.testing.assert_allclose(atoms.get_forces(), numeric, rtol=0, atol=1e-6 * np.abs(numeric).max())
    if atoms.pbc.all():
        numeric = calculate_numerical_stress(atoms, eps=1e-4)
        np.testing.assert_allclose(atoms.get_stress(), numeric, rtol=0, atol=1e-6 * np.abs(numeric).max())


def test_ases_own_checks(calculator: Any, capsys: pytest.CaptureFixture[str]) -> None:
    atoms = crystal()
    atoms.calc = calculator()
    analytic, numeric = gradient_test(atoms, indices=[0, 3])
    errors = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()[1:]]
    assert min(errors) < 1e-7 * np.abs(analytic).max()
    assert numeric.shape == analytic.shape
    wrapped = atoms.copy()
    wrapped.calc = FiniteDifferenceCalculator(atoms.calc, eps_disp=1e-4, eps_strain=1e-4)
    np.testing.assert_allclose(atoms.get_forces(), wrapped.get_forces(), atol=1e-7)
    np.testing.assert_allclose(atoms.get_stress(), wrapped.get_stress(), atol=1e-8)
    assert wrapped.get_potential_energy(force_consistent=True) == atoms.get_potential_energy(force_consistent=True)


def test_stress_is_of_the_energy_also_where_forces_are_not(calculator: Any) -> None:
    atoms = crystal()
    atoms.calc = calculator(forces="vector")
    assert not atoms.calc.is_conservative
    np.testing.assert_allclose(atoms.get_stress(), calculate_numerical_stress(atoms, eps=1e-4), atol=1e-8)
    difference = atoms.get_forces() - calculate_numerical_forces(atoms, eps=1e-4)
    assert np.abs(difference).max() > 1e-3


def test_a_stretched_crystal_pulls_itself_together(calculator: Any) -> None:
    """ASE's sign and its Voigt order xx, yy, zz, yz, xz, xy, from energies alone."""
    atoms = crystal()
    atoms.calc = calculator()
    stress, volume, energy = atoms.get_stress(), atoms.get_volume(), atoms.get_potential_energy()
    for k, (i, j) in enumerate([(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]):
        strain = np.zeros((3, 3))
        strain[i, j] += 5e-5
        strain[j, i] += 5e-5
        moved = atoms.copy()
        moved.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        moved.calc = atoms.calc
        gained = moved.get_potential_energy() - energy
        assert gained == pytest.approx(volume * np.sum(strain * voigt_6_to_full_3x3_stress(stress)), rel=2e-2)
        assert k < 6


def test_a_committee_has_the_names_of_mace(calculator: Any) -> None:
    atoms = crystal()
    calc = atoms.calc = calculator()
    energy, forces, stress = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
    results, n = calc.results, len(atoms)
    shapes = {
        "energy_comm": (3,),
        "forces_comm": (3, n, 3),
        "stress_comm": (3, 6),
        "forces_var": (n, 3),
        "stress_var": (6,),
    }
    assert {name: results[name].shape for name in shapes} == shapes
    for name, mean in (("energy", energy), ("forces", forces), ("stress", stress)):
        np.testing.assert_allclose(results[f"{name}_comm"].mean(axis=0), mean, atol=1e-12)
        np.testing.assert_allclose(results[f"{name}_var"], results[f"{name}_comm"].var(axis=0), atol=1e-15)
        # Not calibrated here, so the std is that of three members as a sample.
        np.testing.assert_allclose(results[f"{name}_std"], np.sqrt(results[f"{name}_var"] * 3 / 2), atol=1e-12)
    for name in (*COMMITTEE, "energy_std", "forces_std", "stress_std"):
        assert name in calc.implemented_properties
        assert np.array_equal(calc.get_property(name, atoms), results[name])
    assert isinstance(results["energy_var"], float)
    assert results["free_energy"] == energy


def test_a_committee_of_unequal_members_varies_about_its_answer(calculator: Any) -> None:
    weights = np.array([0.7, 0.0, 0.3])
    atoms = crystal()
    atoms.calc = calculator(parts={"weights": tuple(weights)})
    answers = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
    for name, answer in answers.items():
        of_members = atoms.calc.results[f"{name}_comm"]
        np.testing.assert_allclose(answer, 0.7 * of_members[0] + 0.3 * of_members[2], atol=1e-12)
        due = 0.7 * (of_members[0] - answer) ** 2 + 0.3 * (of_members[2] - answer) ** 2
        np.testing.assert_allclose(atoms.calc.results[f"{name}_var"], due, atol=1e-14)


def test_several_members_of_which_one_is_heard_promise_no_std(calculator: Any) -> None:
    atoms = methanol()
    atoms.calc = calculator(parts={"weights": (0.0, 1.0, 0.0)})
    assert atoms.get_potential_energy() == atoms.calc.results["energy_comm"][1]
    assert atoms.calc.results["energy_var"] == 0.0
    assert not {"energy_std", "forces_std", "stress_std"} & {*atoms.calc.results, *atoms.calc.implemented_properties}


def test_one_member_has_no_committee_and_no_std(calculator: Any) -> None:
    atoms = crystal()
    atoms.calc = calculator(members=1)
    atoms.get_stress()
    assert not {"energy_std", "forces_std", "stress_std", "energy_var"} & set(atoms.calc.results)
    assert set(atoms.calc.implemented_properties) == {"energy", "free_energy", "forces", "stress"}
    with pytest.raises(PropertyNotImplementedError):
        atoms.calc.get_property("energy_std", atoms)
    assert "energy_comm" not in calculator().__class__.implemented_properties  # of the class: for all calculators


def test_one_member_with_a_head_for_it_says_how_sure_its_energy_is(calculator: Any) -> None:
    atoms = methanol()
    atoms.calc = calculator(members=1, energy_variance=True)
    assert atoms.calc.get_property("energy_std", atoms) > 0
    assert "forces_std" not in atoms.calc.results


@pytest.mark.parametrize("atoms", [methanol(), fcc111("Cu", (2, 2, 2))], ids=["molecule", "slab"])
def test_what_has_no_volume_has_no_stress(atoms: Atoms, calculator: Any) -> None:
    atoms.calc = calculator()
    with pytest.raises(PropertyNotImplementedError, match="three directions"):
        atoms.get_stress()
    assert np.isfinite(atoms.get_potential_energy())
    assert "stress" not in atoms.calc.results


def test_a_slab_needs_no_third_lattice_vector(calculator: Any) -> None:
    flat = fcc111("Cu", (2, 2, 2))
    tall = fcc111("Cu", (2, 2, 2), vacuum=9.0)
    assert not flat.cell[2].any()
    for atoms in (flat, tall):
        atoms.calc = calculator()
    assert flat.get_potential_energy() == pytest.approx(tall.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(flat.get_forces(), tall.get_forces(), atol=1e-9)


def test_nothing_is_computed_twice(calculator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    ask = Ensemble.predict
    monkeypatch.setattr(Ensemble, "predict", lambda self, *a, **k: calls.append(k["stress"]) or ask(self, *a, **k))
    atoms = crystal()
    calc = atoms.calc = calculator()
    atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(), calc.get_property("stress_var", atoms)
    assert calls == [True]  # where forces are the gradient, the stress costs nothing
    atoms.info["note"] = "is not looked at"
    atoms.set_tags(3)
    atoms.get_forces()[:] = 0  # a copy
    assert atoms.get_forces().any()
    assert calc.check_state(atoms) == []
    assert len(calls) == 1
    for change in ("positions", "cell", "pbc", "numbers"):
        {
            "positions": lambda: atoms.rattle(0.01, seed=9), "cell": lambda: atoms.set_cell(1.01 * atoms.cell),
            "pbc": lambda: atoms.set_pbc([True, True, False]), "numbers": lambda: atoms.set_atomic_numbers([11] * 4),
        }[change]()  # fmt: skip
        assert calc.check_state(atoms) == [change]
        atoms.get_potential_energy()
    assert len(calls) == 5
    atoms.set_pbc(True)
    calls.clear()
    atoms.calc = calculator(forces="vector")
    atoms.get_forces()
    atoms.get_stress()
    assert calls == [False, True]  # there it costs a derivative, and is made when it is asked for


def test_two_calculators_of_one_ensemble_do_not_change_each_other() -> None:
    ensemble, atoms = untrained(precision="bfloat16"), methanol()
    rough = WattierCalculator(ensemble, "a")
    before = rough.get_potential_energy(atoms)
    exact = WattierCalculator(ensemble, "a", precision="float64")
    atoms.calc = exact
    numeric = calculate_numerical_forces(atoms, eps=1e-4)
    np.testing.assert_allclose(atoms.get_forces(), numeric, atol=1e-6)  # float64 is, whatever the members had
    rough.reset()
    assert rough.get_potential_energy(atoms) == before
    assert before != exact.get_potential_energy(atoms)
    assert next(ensemble.members[0].parameters()).dtype == torch.float32


def test_float32_is_near_float64(calculator: Any) -> None:
    atoms = crystal()
    exact, usual = calculator(), calculator(precision="float32")
    for name in ("energy", "forces", "stress"):
        a, b = exact.get_property(name, atoms), usual.get_property(name, atoms)
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)


def test_which_image_of_an_atom_is_given_does_not_matter(calculator: Any) -> None:
    atoms = crystal()
    moved = atoms.copy()
    moved.positions += np.random.default_rng(0).integers(-2, 3, (len(atoms), 3)) @ atoms.cell.array
    shuffled = atoms[[2, 0, 3, 1]]
    calc = calculator()
    for name in ("energy", "stress", "energy_std"):
        reference = calc.get_property(name, atoms)
        for other in (moved, shuffled, atoms * (1, 1, 2)):
            factor = len(other) / len(atoms) if name != "stress" else 1
            np.testing.assert_allclose(calc.get_property(name, other), factor * reference, rtol=1e-9, atol=1e-10)


BAD = {
    "empty": (Atoms(), "there is no atom"),
    "nan": (Atoms("CO", [(0, 0, 0), (0, np.nan, 1.2)]), "NaN or infinite"),
    "infinite": (Atoms("CO", [(0, 0, 0), (0, np.inf, 1.2)]), "NaN or infinite"),
    "nan cell": (Atoms("C", cell=[np.nan, 3, 3], pbc=True), "NaN or infinite"),
    "overlap": (Atoms("CHO", [(0, 0, 0), (0, 0, 2), (0, 0, 2)]), "atoms 1 and 2 are 0.0000 Angstrom apart"),
    "unknown element": (Atoms("UO"), "atomic number 92 does not occur in the a training data"),
    "ghost": (Atoms("X"), "atomic number 0"),
    "no element": (Atoms([200]), "atomic number 200"),
    "no cell": (Atoms("Cu", pbc=True), "span no volume"),
    "flat cell": (Atoms("Cu", cell=[[3, 0, 0], [0, 3, 0], [3, 3, 0]], pbc=True), "span no volume"),
    "thin cell": (Atoms("Cu", cell=[3, 3, 1e-3], pbc=True), "span no volume"),
    "far away": (Atoms("CO", [(0, 0, 0), (0, 0, 1e8)]), "1e+06 Angstrom"),
    "too dense": (Atoms("Cu100", np.random.default_rng(0).random((100, 3)), cell=[1, 1, 1], pbc=True), "one place"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_structure_is_one_clear_line_and_the_calculator_lives_on(name: str, calculator: Any) -> None:
    atoms, reason = BAD[name]
    atoms = atoms.copy()
    calc = atoms.calc = calculator(precision="float32")
    for ask in (atoms.get_potential_energy, atoms.get_forces):
        with pytest.raises(DataError) as caught:
            ask()
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)
    assert np.isfinite(calc.get_potential_energy(methanol()))


@pytest.mark.parametrize(
    "atoms",
    [Atoms("O"), Atoms("Cu", cell=[2.2] * 3, pbc=True), Atoms("CO", [(0, 0, 0), (0, 0, 1)], cell=[1e6] * 3, pbc=True)],
    ids=["one atom", "its own neighbour", "a huge cell"],
)
def test_odd_structures_are_answered(atoms: Atoms, calculator: Any) -> None:
    atoms = atoms.copy()
    atoms.calc = calculator()
    assert np.isfinite(atoms.get_potential_energy())
    assert np.isfinite(atoms.get_forces()).all()
    assert np.abs(atoms.get_forces().sum(axis=0)).max() < 1e-10
    if atoms.pbc.all():
        assert np.isfinite(atoms.get_stress()).all()


def test_what_is_no_number_is_no_answer() -> None:
    """A head that makes infinities of one element: who asks for another one is answered."""
    ensemble = untrained()
    embedding = dict(ensemble.members[1].named_parameters())["encoder.embedding.weight"]
    embedding.data[29] = 1e38
    calculator = WattierCalculator(ensemble, "a")
    with pytest.raises(DataError, match="NaN or infinite"):
        calculator.get_potential_energy(bulk("Cu"))
    assert np.isfinite(calculator.get_potential_energy(methanol()))
    both = [structure_of(atoms) for atoms in (methanol(), bulk("Cu"))]
    with pytest.raises(DataError, match=r"^structure 1: what members say of it is NaN"):
        ensemble.predict(both, "a")
    unheard = replace(ensemble, weights=(0.5, 0.0, 0.5))
    assert np.isfinite(unheard.predict(both, "a").energy_ev).all()


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    ensemble = untrained(members=1)
    with pytest.raises(ValueError, match="source is 'c', but must be one of a, b"):
        WattierCalculator(ensemble, "c")
    with pytest.raises(ValueError, match="precision is 'float16'"):
        WattierCalculator(ensemble, "a", precision="float16")  # type: ignore[arg-type]
    for device in ("gpu", "meta", "mps", "cuda:99", ""):
        with pytest.raises(ValueError, match=f"device is {device!r}"):
            WattierCalculator(ensemble, "a", device=device)
    with pytest.raises(DataError):
        WattierCalculator(tmp_path / "nothing", "a")


def test_results_go_into_ases_files(calculator: Any, tmp_path: Path) -> None:
    atoms = crystal()
    atoms.calc = calculator()
    atoms.get_stress()
    for name in ("x.traj", "x.xyz", "x.json"):
        write(tmp_path / name, atoms)
        back = read(tmp_path / name)
        assert back.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
        np.testing.assert_allclose(back.get_forces(), atoms.get_forces(), atol=1e-7)
        np.testing.assert_allclose(back.get_stress(), atoms.get_stress(), atol=1e-7)
    exported = atoms.calc.export_properties()
    assert exported["natoms"] == len(atoms)
    assert set(exported) >= {"energy", "free_energy", "forces", "stress"}
    assert atoms.calc.calculate_properties(atoms, ["energy", "stress"])["energy"] == atoms.get_potential_energy()


def test_it_can_be_asked_without_atoms_that_carry_it(calculator: Any) -> None:
    atoms, calc = methanol(), calculator()
    calc.calculate(atoms, ["energy"], all_changes)
    assert calc.get_potential_energy() == calc.get_potential_energy(atoms)
    with pytest.raises(PropertyNotImplementedError):
        calc.get_property("dipole", atoms)
