"""Batch prediction: the calculator's numbers for every frame of any safe file, and nothing run, torn or lost."""

from __future__ import annotations

import gzip
import pickle
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixBondLength
from ase.io import read, write
from ensembles import untrained
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wattier_gnn.calculator import WattierCalculator
from wattier_gnn.domain import TrainingDomain
from wattier_gnn.ensemble import Ensemble
from wattier_gnn.frames import FORMATS, Frame, frames
from wattier_gnn.predict import Tally, predict_files
from wattier_gnn.structure import DataError

Predict = Callable[..., tuple[Tally, list[Atoms]]]


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    return untrained(members=2)


@pytest.fixture
def predict(ensemble: Ensemble, tmp_path: Path) -> Predict:
    def run(*files: Path, **options: Any) -> tuple[Tally, list[Atoms]]:
        out = tmp_path / "out.xyz"
        tally = predict_files(ensemble, list(files), out, source="a", **options)
        assert not list(tmp_path.glob(".*tmp"))
        return tally, read(out, ":")

    return run


def mixed() -> list[Atoms]:
    """A molecule with labels, a crystal, a slab with fixed atoms, a lone atom; with what users keep in such files."""
    water, salt, slab, atom = molecule("H2O"), bulk("NaCl", "rocksalt", a=5.5), fcc111("Cu", (2, 2, 2), 8.0), Atoms("O")
    for seed, atoms in enumerate((water, salt, slab)):
        atoms.rattle(0.1, seed=seed)
    slab.set_constraint(FixAtoms([0, 1, 2, 3]))
    slab.info.clear()
    water.calc = SinglePointCalculator(water, energy=-3.5, forces=np.arange(9.0).reshape(3, 3))
    salt.info |= {"name": 'a "quoted" name', "temperature": 300.5, "count": 7, "flag": True}
    salt.set_tags([4, 5])
    return [water, salt, slab, atom]


def test_every_frame_has_what_the_calculator_says(ensemble: Ensemble, predict: Predict, tmp_path: Path) -> None:
    structures = mixed() * 3
    write(tmp_path / "in.xyz", structures)
    for batch in (1, 5, 64):
        tally, found = predict(tmp_path / "in.xyz", batch_structures=batch)
        assert (tally.structures, tally.atoms, tally.skipped) == (12, 3 * 14, 0)
        calculator = WattierCalculator(ensemble, "a")
        for given_, said in zip(structures, found, strict=True):
            atoms = given_.copy()
            atoms.set_constraint()
            assert said.symbols.get_chemical_formula() == atoms.symbols.get_chemical_formula()
            for name in ("energy", "energy_std"):
                value = calculator.get_property(name, atoms)
                assert said.info[f"wattier_{name}"] == pytest.approx(value, abs=1e-5)
            for name in ("forces", "forces_std"):
                value = calculator.get_property(name, atoms)
                np.testing.assert_allclose(said.arrays[f"wattier_{name}"].reshape(-1, 3), value, atol=1e-5)
            assert ("wattier_stress" in said.info) == bool(atoms.pbc.all())
            if atoms.pbc.all():
                np.testing.assert_allclose(said.info["wattier_stress"], calculator.get_stress(atoms), atol=1e-6)
                assert said.info["wattier_stress_std"].shape == (6,)
            assert said.info["wattier_source"] == "a"
            assert "wattier_out_of_distribution" not in said.info  # this ensemble does not know


def test_what_was_in_the_file_stays(predict: Predict, tmp_path: Path) -> None:
    for name in ("in.xyz", "in.traj"):
        write(tmp_path / name, mixed())
        water, salt, slab, _ = predict(tmp_path / name)[1]
        assert water.get_potential_energy() == -3.5
        np.testing.assert_array_equal(water.get_forces(), np.arange(9.0).reshape(3, 3))
        assert {n: salt.info[n] for n in ("temperature", "count", "flag")} == {
            "temperature": 300.5, "count": 7, "flag": True
        }  # fmt: skip
        assert salt.info["name"] == 'a "quoted" name'
        assert salt.get_tags().tolist() == [4, 5]
        np.testing.assert_allclose(salt.cell.array, mixed()[1].cell.array, atol=1e-7)
        assert slab.constraints[0].index.tolist() == [0, 1, 2, 3]
        assert slab.pbc.tolist() == [True, True, False]


def test_a_prediction_of_a_prediction_holds_one(predict: Predict, tmp_path: Path) -> None:
    write(tmp_path / "in.xyz", mixed())
    first = predict(tmp_path / "in.xyz")[1]
    (tmp_path / "out.xyz").rename(tmp_path / "again.xyz")
    second = predict(tmp_path / "again.xyz")[1]
    for a, b in zip(first, second, strict=True):
        assert set(a.info) == set(b.info)
        assert list(a.arrays) == list(b.arrays)


def test_means_are_those_of_numpy(predict: Predict, tmp_path: Path) -> None:
    structures = mixed()
    structures[1].calc = SinglePointCalculator(structures[1], energy=float("nan"))
    write(tmp_path / "in.xyz", structures)
    tally, found = predict(tmp_path / "in.xyz", batch_structures=2)
    n = [len(atoms) for atoms in found]
    stds = [a.info["wattier_energy_std"] for a in found]
    assert tally.mean("energy_std_ev_per_atom") == pytest.approx(np.mean(np.divide(stds, n)), rel=1e-6)
    forces = np.concatenate([a.arrays["wattier_forces_std"].ravel() for a in found])
    assert tally.mean("forces_std_ev_per_angstrom") == pytest.approx(forces.mean(), rel=1e-5)
    water = found[0]
    assert tally.sums["energy_error_ev_per_atom"][1] == 1  # NaN is no label
    assert tally.mean("energy_error_ev_per_atom") == pytest.approx(abs(water.info["wattier_energy"] + 3.5) / 3)
    error = np.abs(water.arrays["wattier_forces"] - np.arange(9.0).reshape(3, 3)).mean()
    assert tally.mean("forces_error_ev_per_angstrom") == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize(
    "name", ["x.traj", "x.json", "x.db", "x.cif", "POSCAR", "x.xsf", "x.xyz", "x.extxyz", "x.xyz.gz"]
)
def test_many_formats_are_read(name: str, predict: Predict, tmp_path: Path) -> None:
    salt = bulk("NaCl", "rocksalt", a=5.5, cubic=True)
    salt.rattle(0.05, seed=1)
    many = name not in ("POSCAR",)
    if name.endswith(".gz"):
        write(tmp_path / "x.xyz", [salt] * 3)
        (tmp_path / name).write_bytes(gzip.compress((tmp_path / "x.xyz").read_bytes()))
    else:
        write(tmp_path / name, [salt] * 3 if many else salt)
    tally, found = predict(tmp_path / name)
    assert tally.structures == (3 if many else 1)
    reference = untrained(members=2).predict  # the same energies whichever file they came from
    assert reference is not None
    assert found[0].info["wattier_energy"] == pytest.approx(found[-1].info["wattier_energy"], abs=1e-4)
    assert sorted(found[0].symbols) == sorted(salt.symbols)


def test_several_files_are_one_output(predict: Predict, tmp_path: Path) -> None:
    write(tmp_path / "a.xyz", mixed())
    write(tmp_path / "b.traj", mixed()[:2])
    tally, found = predict(tmp_path / "a.xyz", tmp_path / "b.traj")
    assert tally.structures == len(found) == 6


BAD = {
    "unknown element": (Atoms("UO"), "atomic number 92"),
    "not a number": (Atoms("CO", [(0, 0, 0), (0, np.nan, 1)]), "NaN"),
    "overlapping": (Atoms("CO", [(0, 0, 1), (0, 0, 1)]), "apart"),
    "empty": (Atoms(), "no atom"),
    "flat": (Atoms("Cu", cell=[[3, 0, 0], [0, 3, 0], [3, 3, 0]], pbc=True), "volume"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_frame_is_refused_by_number_or_skipped(kind: str, predict: Predict, tmp_path: Path) -> None:
    atoms, reason = BAD[kind]
    good = mixed()
    write(tmp_path / "in.xyz", [*good, atoms, *good])
    out = tmp_path / "out.xyz"
    out.write_text("what was there before")
    with pytest.raises(DataError) as caught:
        predict(tmp_path / "in.xyz")
    assert "in.xyz: frame 4: " in str(caught.value)
    assert reason in str(caught.value)
    assert out.read_text() == "what was there before"
    tally, found = predict(tmp_path / "in.xyz", on_bad="skip")
    assert (tally.structures, tally.skipped, len(found)) == (8, 1, 8)
    assert "frame 4" in tally.messages[0]


def test_an_unreadable_frame_is_skipped_where_those_after_it_can_be_read(predict: Predict, tmp_path: Path) -> None:
    write(tmp_path / "in.xyz", mixed())
    text = (tmp_path / "in.xyz").read_text().replace("Cl ", "Qq ")
    (tmp_path / "in.xyz").write_text(text)
    with pytest.raises(DataError, match="frame 1"):
        predict(tmp_path / "in.xyz")
    assert predict(tmp_path / "in.xyz", on_bad="skip")[0].structures == 3


@pytest.mark.parametrize("name", ["x.xyz", "x.traj", "x.json"])
def test_a_torn_file_is_refused(name: str, predict: Predict, tmp_path: Path) -> None:
    write(tmp_path / name, mixed())
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * 0.8)])
    with pytest.raises(DataError) as caught:
        predict(tmp_path / name, on_bad="refuse" if name == "x.traj" else "skip")  # whose index says what is missing
    assert name in str(caught.value)
    assert not (tmp_path / "out.xyz").exists()
    if name == "x.traj":
        tally, _ = predict(tmp_path / name, on_bad="skip")
        assert (tally.structures + tally.skipped, tally.skipped > 0) == (4, True)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "name", ["x.traj", "x.pkl", "x.pckl", "x.bundle", "x.gpw", "x.db", "x.xyz", "x.json", "x.cif", "x"]
)
def test_nothing_in_a_file_is_run(name: str, predict: Predict, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    for prefix in (b"", b"PickleTrajectory", b"- of UlmGPAW"):
        (tmp_path / name).write_bytes(prefix + pickle.dumps(Trap(sprung)))
        with pytest.raises(DataError):
            predict(tmp_path / name)
    assert not sprung.exists()
    assert not {"py", "gpw", "bundletrajectory", "postgresql", "mysql", "aselmdb"} & FORMATS


def test_a_python_file_is_not_read(predict: Predict, tmp_path: Path) -> None:
    write(tmp_path / "x.py", mixed()[0])
    with pytest.raises(DataError, match="format 'py'"):
        predict(tmp_path / "x.py")


def test_a_database_of_others_is_not_written_to(predict: Predict, tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE mine (x)")
    database.close()
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"other\.db"):
        predict(path)
    assert path.read_bytes() == before


def test_wrong_places_are_refused(ensemble: Ensemble, predict: Predict, tmp_path: Path) -> None:
    write(tmp_path / "in.xyz", mixed())
    (tmp_path / "empty.xyz").touch()
    (tmp_path / "folder.xyz").mkdir()
    for file, reason in (("none.xyz", "does not exist"), ("folder.xyz", "is a folder"), ("empty.xyz", "format")):
        with pytest.raises(DataError, match=reason):
            predict(tmp_path / file)
    for out, reason in (
        ("out.traj", "must end in .xyz"), ("in.xyz", "must be another file"), ("none/out.xyz", "cannot be written"),
        ("folder.xyz", "cannot be written"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=reason):
            predict_files(ensemble, [tmp_path / "in.xyz"], tmp_path / out, source="a")
    with pytest.raises(ValueError, match="source is 'c'"):
        predict_files(ensemble, [tmp_path / "in.xyz"], tmp_path / "out.xyz", source="c")
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(read(tmp_path / "in.xyz", ":")) == 4


def test_only_bad_frames_make_no_file(predict: Predict, tmp_path: Path) -> None:
    write(tmp_path / "in.xyz", [Atoms("UO"), Atoms("X")])
    with pytest.raises(DataError, match="holds no structure that can be predicted"):
        predict(tmp_path / "in.xyz", on_bad="skip")
    assert not (tmp_path / "out.xyz").exists()


def test_memory_does_not_grow_with_the_file(predict: Predict, tmp_path: Path) -> None:
    """Never more frames are read ahead than a batch holds."""
    write(tmp_path / "in.xyz", mixed() * 25)
    ahead: list[int] = []
    read_frames = 0

    def counted(path: Path) -> Any:
        nonlocal read_frames
        for frame in frames(path):
            read_frames += 1
            yield frame

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wattier_gnn.predict.frames", counted)
        predict(
            tmp_path / "in.xyz", batch_structures=7,
            progress=lambda tally: ahead.append(read_frames - tally.structures),
        )  # fmt: skip
    assert read_frames == 100
    assert max(ahead) <= 1


def test_what_extended_xyz_cannot_hold_is_left_out(
    predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atoms = mixed()[1]
    atoms.info |= {"note": {"a": np.arange(2)}, "ok": 1, "wattier_energy": 99.0, "matrix": np.eye(3)}
    atoms.info |= {"Lattice": "none", "Properties": "species:S:1", "pbc": "F F F"}
    atoms.arrays["pos"] = atoms.arrays["move_mask"] = np.zeros(2)
    atoms.arrays["spaces"] = np.array(["a b", "c"])
    atoms.arrays["odd name:R:1"] = np.arange(2.0)
    atoms.arrays["cube"] = np.zeros((2, 3, 3))
    atoms.arrays["kept"] = np.array(["u", "v"])
    atoms.set_constraint(FixBondLength(0, 1))
    monkeypatch.setattr("wattier_gnn.predict.frames", lambda path: [Frame(path, 0, atoms)])
    (said,) = predict(tmp_path / "any")[1]
    assert said.info["ok"] == 1
    assert said.info["wattier_energy"] != 99.0
    assert not {"spaces", "odd name:R:1", "cube"} & set(said.arrays)
    np.testing.assert_allclose(said.cell.array, atoms.cell.array, atol=1e-7)
    np.testing.assert_allclose(said.positions, atoms.positions, atol=1e-7)
    assert said.pbc.all()
    assert said.arrays["kept"].tolist() == ["u", "v"]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    info=st.dictionaries(
        st.text(max_size=8), st.text(max_size=12) | st.integers() | st.floats() | st.booleans(), max_size=4
    )
)
def test_any_comment_is_written_so_that_it_can_be_read(
    info: dict[str, Any], ensemble: Ensemble, tmp_path: Path
) -> None:
    atoms = Atoms("CO", [(0, 0, 0), (0, 0, 1.1)])
    atoms.info |= info
    write(tmp_path / "in.traj", [atoms, atoms])
    predict_files(ensemble, [tmp_path / "in.traj"], tmp_path / "out.xyz", source="a")
    first, second = read(tmp_path / "out.xyz", ":")
    for said in (first, second):
        assert len(said) == 2
        assert np.isfinite(said.info["wattier_energy"])
        for name, value in info.items():
            if name in said.info and isinstance(value, str):
                assert str(said.info[name]) == value


def test_what_is_unlike_the_training_data_is_marked(tmp_path: Path) -> None:
    class Domain(TrainingDomain):
        def reasons(self, arrays: Any) -> tuple[str | None, ...]:
            return tuple('too "large", by far' if n > 5 else None for n in np.diff(arrays["atom_offset"]))

    ensemble = untrained(parts={"domain": object.__new__(Domain)})
    write(tmp_path / "in.xyz", mixed())
    tally = predict_files(ensemble, [tmp_path / "in.xyz"], tmp_path / "out.xyz", source="b")
    found = read(tmp_path / "out.xyz", ":")
    assert [bool(a.info["wattier_out_of_distribution"]) for a in found] == [False, False, True, False]
    assert found[2].info["wattier_out_of_distribution_reason"] == 'too "large", by far'
    assert tally.strange == 1


def test_one_member_says_nothing_of_how_sure_it_is(tmp_path: Path) -> None:
    write(tmp_path / "in.xyz", mixed())
    tally = predict_files(untrained(members=1), [tmp_path / "in.xyz"], tmp_path / "out.xyz", source="a")
    for atoms in read(tmp_path / "out.xyz", ":"):
        assert not [name for name in (*atoms.info, *atoms.arrays) if "std" in name or "interval" in name]
    assert np.isnan(tally.mean("energy_std_ev_per_atom"))
