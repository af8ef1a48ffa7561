"""``wattier finetune``: a release learns another potential from a user's file; what it must not do is refused."""

from __future__ import annotations

import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from typer.testing import CliRunner

from wattier.cli import app
from wattier.departure import EXIT_NOT_FINISHED
from wattier.errors import UserError
from wattier_gnn.ensemble import Ensemble
from wattier_gnn.files import sha256_of
from wattier_gnn.model import ModelConfig, build_model
from wattier_gnn.reference import composition, fit_reference
from wattier_gnn.release import load_release
from wattier_gnn.release_writer import write_release
from wattier_gnn.splits import TRAIN, VAL
from wattier_gnn.store import write_store
from wattier_gnn.structure import DataError, Structure
from wattier_gnn.train import TrainConfig, Trainer

CUTOFF, N = 4.5, 80
SHIFT_EV = {13: 40.0, 29: -25.0}
DEPTH_EV, DECAY_ANGSTROM = 12.0, 0.7  # of the pair term by which the user's potential differs


def clusters(n, seed):
    generator, found = np.random.default_rng(seed), []
    for _ in range(n):
        numbers = generator.choice([13, 29], size=int(generator.integers(3, 6)))
        positions = np.array([[0, 0, 0], [2.6, 0, 0], [0, 2.6, 0], [0, 0, 2.6], [2.6, 2.6, 0]])[: len(numbers)]
        found.append(Atoms(numbers=numbers, positions=positions + generator.normal(0, 0.15, positions.shape)))
    return found


def published(atoms):
    """Energy and forces of the potential that the release knows."""
    atoms = atoms.copy()
    atoms.calc = EMT()
    return float(atoms.get_potential_energy()), atoms.get_forces()


def users(atoms):
    """Of the user's: other zeros of the atoms, and a repulsion between all pairs."""
    energy, forces = published(atoms)
    apart = atoms.positions[:, None] - atoms.positions[None]
    r = np.linalg.norm(apart, axis=2) + np.eye(len(atoms)) * 1e9
    term = DEPTH_EV * np.exp(-r / DECAY_ANGSTROM)
    energy += 0.5 * term.sum() + sum(SHIFT_EV[int(z)] for z in atoms.numbers)
    return energy, forces + ((term / DECAY_ANGSTROM / r)[:, :, None] * apart).sum(axis=1)


def structure(atoms, potential, key):
    energy, forces = potential(atoms)
    return Structure(
        atoms.numbers.astype(np.int64), atoms.positions, None, (False,) * 3, energy, forces, "metal", key, key
    )


def write_file(path, many, potential=users):
    frames = []
    for k, atoms in enumerate(many):
        frame = atoms.copy()
        energy, forces = potential(atoms)
        frame.calc = SinglePointCalculator(frame, energy=energy, forces=forces)
        frame.info["group"] = str(k)
        frames.append(frame)
    write(path, frames, format="extxyz")
    return path


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """Two members that have learnt the published potential."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("parent")
    many = [structure(atoms, published, str(k)) for k, atoms in enumerate(clusters(N, 1))]
    split = np.where(np.arange(N) % 8 == 7, VAL, TRAIN).astype(np.int8)
    store = write_store(folder / "store", many, split, sources=["metal"], cutoff_angstrom=CUTOFF)
    config = ModelConfig(
        ("metal",), tuple(store.meta["energy_scale_ev"]), store.meta["mean_neighbors"], CUTOFF, hidden_dim=24,
        n_layers=1, n_radial=6, head_dim=16, forces="vector",
    )  # fmt: skip
    members = []
    for seed in (0, 1):
        trainer = Trainer(
            build_model(config, seed), store,
            TrainConfig(epochs=40, batch_structures=8, learning_rate=5e-3, seed=seed, early_stop_patience=40),
            train_indices=store.indices(TRAIN), val_indices=store.indices(VAL), folder=folder / str(seed),
            device=torch.device("cpu"),
        )  # fmt: skip
        trainer.run(lambda _: True)
        members.append(trainer.evaluated().eval())
    ensemble = Ensemble(tuple(members), store.references)
    return write_release(folder / "release", ensemble, ["m0", "m1"], name="metals", wattier_version="0.1.0")


@pytest.fixture(scope="module")
def user_file(tmp_path_factory):
    return write_file(tmp_path_factory.mktemp("user") / "my-metals.xyz", clusters(N, 2))


def finetune(*arguments):
    return CliRunner().invoke(app, ["finetune", *map(str, arguments)])


def errors(folder, source, held_out, *, aligned=False):
    """Mean absolute errors on structures that nobody trained on: eV/atom, eV/Å; aligned: by the best possible zeros."""
    said = load_release(folder).predict([structure(a, users, "x") for a in held_out], source)
    true = [users(atoms) for atoms in held_out]
    n_atoms = np.array([len(atoms) for atoms in held_out])
    left = np.array([energy for energy, _ in true]) - said.energy_ev
    if aligned:
        counts = composition(np.concatenate([a.numbers for a in held_out]), n_atoms)
        left = left - counts @ fit_reference(counts, left)
    force = np.abs(np.concatenate([forces for _, forces in true]) - said.forces_ev_per_angstrom)
    return float(np.abs(left / n_atoms).mean()), float(force.mean())


def test_it_learns_the_users_potential_and_says_what_it_cost(release, user_file, tmp_path):
    """Held-out energies half as wrong as the release's, even with zeros fitted to the test; forces three quarters."""
    done = finetune(release, user_file, "-o", tmp_path / "mine", "--epochs", 60, "--learning-rate", 0.003)
    assert done.exit_code == 0, (done.output, done.exception)
    held_out = clusters(60, 3)
    energy, force = errors(tmp_path / "mine", "my_metals", held_out)
    plain_energy, plain_force = errors(release, "metal", held_out)
    best_energy, _ = errors(release, "metal", held_out, aligned=True)
    print(f"eV/atom: {plain_energy:.4f} as it is, {best_energy:.4f} aligned, {energy:.4f} tuned")
    print(f"eV/Å: {plain_force:.4f} as it is, {force:.4f} tuned")
    assert energy < best_energy / 2 < plain_energy / 2, (energy, best_energy, plain_energy)
    assert force < 0.75 * plain_force, (force, plain_force)

    manifest = json.loads((tmp_path / "mine" / "manifest.json").read_text())
    assert manifest["sources"] == ["my_metals"]
    assert manifest["parent"]["name"] == "metals"
    assert manifest["parent"]["manifest_sha256"] == sha256_of(release / "manifest.json")
    assert manifest["fine_tuning"]["origin"] == "metal"
    assert manifest["fine_tuning"]["file"]["sha256"] == sha256_of(user_file)
    phases = {phase["phase"]: phase for phase in manifest["energy_by_phase"]}
    assert phases["fine-tuning"]["joules"] > 0
    assert phases["fine-tuning"]["joules"] == pytest.approx(
        sum(about["energy_joules"] for about in manifest["about_members"].values())
    )
    ensemble = load_release(tmp_path / "mine")
    assert ensemble.calibration is not None
    assert "metals" in (tmp_path / "mine" / "README.md").read_text()
    assert not (tmp_path / "mine.work").exists()


def test_left_and_frozen_it_ends_in_the_bits_of_one_that_was_not_left(release, user_file, tmp_path, monkeypatch):
    """Told to leave in the second member's training; the backbone's weights are those of the release, every bit."""
    options = ("--freeze", "--epochs", 4, "--source", "mine")
    assert finetune(release, user_file, "-o", tmp_path / "straight", *options).exit_code == 0
    step, taken = Trainer._step, []

    def interrupted(trainer, *arguments):
        taken.append(trainer.folder.name)
        if taken.count("m1") == 13 and len(taken) < 1000:
            taken.extend([""] * 1000)
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    monkeypatch.setattr("wattier.departure.POLL_SECONDS", 0.0)
    monkeypatch.setattr("wattier_gnn.snapshot.LONGEST_UNASKED_SECONDS", 0.0)
    left = finetune(release, user_file, "-o", tmp_path / "left", *options)
    assert left.exit_code == EXIT_NOT_FINISHED, (left.output, left.exception)
    assert "Not finished (SIGTERM)." in left.stderr
    other = finetune(release, user_file, "-o", tmp_path / "left", "--epochs", 5, "--freeze", "--source", "mine")
    assert isinstance(other.exception, UserError)
    assert "holds an unfinished fine-tuning with another epochs" in str(other.exception)
    first = taken.count("m0")
    assert finetune(release, user_file, "-o", tmp_path / "left", *options).exit_code == 0
    assert taken.count("m0") == first, "a member that is trained is not trained again"
    parents = load_release(release).members
    for parent, one, two in zip(
        parents, load_release(tmp_path / "straight").members, load_release(tmp_path / "left").members, strict=True
    ):
        before, straight, again = (network.state_dict() for network in (parent, one, two))
        assert all(torch.equal(straight[name], again[name]) for name in straight)
        assert all(torch.equal(before[name], straight[name]) for name in before if name.startswith("encoder."))
        assert not torch.equal(before["energy_heads.out"], straight["energy_heads.out"])
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("straight", "left")]
    joules = [{p["phase"]: p["joules"] for p in manifest["energy_by_phase"]}["fine-tuning"] for manifest in manifests]
    assert all(value > 0 for value in joules)


def frames(n):
    return clusters(n, 4)


def truncated(path):
    text = write_file(path, frames(20)).read_text()
    path.write_text(text[: len(text) - 40])


def without_energy(path):
    write(path, frames(20), format="extxyz")


def with_nan(path):
    text = write_file(path, frames(20)).read_text()
    lines = text.splitlines()
    lines[2] = lines[2].replace(lines[2].split()[1], "nan", 1)
    path.write_text("\n".join(lines[: 2 + int(lines[0])]) + "\n")


def few(path):
    write_file(path, frames(4))


def with_iron(path):
    many = frames(20)
    for atoms in many:
        atoms.numbers[0] = 26
    write_file(path, many, lambda atoms: (0.0, np.zeros((len(atoms), 3))))


@pytest.mark.parametrize(
    ("spoil", "options", "says"),
    [
        (lambda _: None, (), "is no file"),
        (lambda path: path.mkdir(), (), "is no file"),
        (lambda path: path.write_bytes(b"\x00" * 100), (), "a number of atoms"),
        (truncated, (), "ends after|cannot be read|extended XYZ"),
        (without_energy, (), "has no energy"),
        (with_nan, (), "no usable extxyz structure"),
        (few, (), "holds 4 usable structures"),
        (with_iron, ("--freeze",), "holds Fe, which the release never saw"),
        (few, ("--source", "two words"), "--source"),
    ],
)
def test_what_cannot_be_learnt_from_is_one_line(release, tmp_path, spoil, options, says):
    spoil(tmp_path / "bad.xyz")
    done = finetune(release, tmp_path / "bad.xyz", "-o", tmp_path / "out", *options)
    assert isinstance(done.exception, UserError | DataError), (done.output, done.exception)
    assert "\n" not in str(done.exception)
    assert re.search(says, str(done.exception)), str(done.exception)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists(), "the mended file would be refused as another one"


def test_without_forces_only_energies_are_learnt_and_it_says_so(release, tmp_path):
    many = [atoms.copy() for atoms in clusters(60, 5)]
    for k, atoms in enumerate(many):
        atoms.calc = SinglePointCalculator(atoms, energy=users(atoms)[0])
        atoms.info["group"] = str(k)
    write(tmp_path / "energies.xyz", many, format="extxyz")
    done = finetune(release, tmp_path / "energies.xyz", "-o", tmp_path / "out", "--epochs", 1)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "your data have no forces" in done.output
    frozen = finetune(release, tmp_path / "energies.xyz", "-o", tmp_path / "frozen", "--epochs", 1, "--freeze")
    assert "your data have no forces" not in frozen.output
    made = load_release(tmp_path / "out")
    said = made.predict([structure(many[0], users, "x")], "energies")
    assert np.isfinite(said.energy_std_ev).all()
    assert np.isnan(said.forces_std_ev_per_angstrom).all()
    metrics = json.loads((tmp_path / "out" / "manifest.json").read_text())["metrics"]["energies"]
    assert metrics["force_mae_ev_per_angstrom"] is None
    parent, kept = (load_release(path).members[0].state_dict() for path in (release, tmp_path / "frozen"))
    heads = [name for name in parent if name.startswith("force_head.")]
    assert heads
    assert all(torch.equal(parent[name], kept[name]) for name in heads)


def test_interrupted_it_says_how_to_go_on_and_what_is_worse_than_before_is_said(
    release, user_file, tmp_path, monkeypatch
):
    options = (release, user_file, "-o", tmp_path / "out", "--epochs", 1, "--learning-rate", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        done = finetune(*options)
    assert done.exit_code == 130
    assert "the same command goes on" in done.output
    assert (tmp_path / "out.work").exists()
    monkeypatch.setattr("wattier.finetune.SECONDS_BETWEEN_LINES", 0.0)
    done = finetune(*options)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "m0: epoch 1 of at most 1" in done.output
    assert "which made it worse" in done.output


def test_a_folder_of_somebody_else_is_not_overwritten(release, user_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    done = finetune(release, user_file, "-o", tmp_path / "out")
    assert isinstance(done.exception, UserError)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_the_release_that_it_begins_from_is_not_replaced(release, user_file, tmp_path):
    (tmp_path / "link").symlink_to(release)
    before = sha256_of(release / "manifest.json")
    for output in (release, release.parent / "x" / ".." / release.name, tmp_path / "link"):
        done = finetune(release, user_file, "-o", output)
        assert isinstance(done.exception, UserError)
        assert "would be lost" in str(done.exception)
    assert sha256_of(release / "manifest.json") == before
    assert not release.with_name(f"{release.name}.work").exists()


def test_a_damaged_release_is_refused(release, user_file, tmp_path):
    done = finetune(tmp_path, user_file, "-o", tmp_path / "out")
    assert isinstance(done.exception, DataError)
