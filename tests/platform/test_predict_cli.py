"""``wattier predict`` as a user runs it: one file that appears whole, a summary, one line for every mistake."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from ensembles import untrained
from typer.testing import CliRunner

from wattier.cli import app
from wattier.errors import UserError
from wattier.predict_cli import summary
from wattier_gnn.predict import Tally
from wattier_gnn.release_writer import write_release
from wattier_gnn.structure import DataError


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "release"
    return write_release(folder, untrained(members=2), ["one", "two"], name="toy", wattier_version="0.1.0")


@pytest.fixture
def structures(tmp_path: Path) -> Path:
    water, salt = molecule("H2O"), bulk("NaCl", "rocksalt", a=5.5)
    water.calc = SinglePointCalculator(water, energy=-1.0)
    path = tmp_path / "in.xyz"
    write(path, [water, salt] * 3)
    return path


@pytest.fixture
def predict(release: Path, tmp_path: Path) -> Any:
    def command(*arguments: object, source: str = "a") -> Any:
        given = [str(release), *map(str, arguments), "--source", source, "--device", "cpu"]
        return CliRunner().invoke(app, ["predict", *given, "-o", str(tmp_path / "out.xyz")])

    return command


def test_a_file_is_predicted_and_summed_up(predict: Any, structures: Path, tmp_path: Path) -> None:
    done = predict(structures)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "6 structures, 15 atoms, at the level of a"
    assert lines[1].startswith("mean std: energy ")
    assert "(3 structures), forces unknown eV/A" in lines[2]
    assert lines[-1] == str(tmp_path / "out.xyz")
    assert len(read(tmp_path / "out.xyz", ":")) == 6


def test_bad_frames_end_it_or_are_named(predict: Any, structures: Path, tmp_path: Path) -> None:
    write(structures, [*read(structures, ":"), Atoms("U"), Atoms("Pu")])
    done = predict(structures)
    assert isinstance(done.exception, DataError)
    assert "frame 6: atomic number 92" in str(done.exception)
    assert not (tmp_path / "out.xyz").exists()
    done = predict(structures, "--on-bad", "skip")
    assert done.exit_code == 0
    assert "6 structures, 15 atoms, at the level of a; 2 frames skipped" in done.stdout
    assert "skipped: " in done.stderr
    assert "frame 7: atomic number 94" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "source", "reason"),
    [
        (["--on-bad", "ignore"], "a", "--on-bad: is 'ignore', but must be refuse or skip"),
        ([], "c", "--source: is 'c', but must be one of a, b"),
        (["--device", "tpu"], "a", "--device: device is 'tpu'"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], source: str, reason: str, release: Path, structures: Path, tmp_path: Path
) -> None:
    given = [str(release), str(structures), "--source", source, "-o", str(tmp_path / "out.xyz"), *arguments]
    done = CliRunner().invoke(app, ["predict", *given])
    assert isinstance(done.exception, UserError)
    assert reason in str(done.exception)
    assert not (tmp_path / "out.xyz").exists()


def test_the_source_may_be_left_out_where_there_is_one(structures: Path, release: Path, tmp_path: Path) -> None:
    single = untrained(members=1, sources=("only",), energy_scale_ev=(1.0,))
    object.__setattr__(single, "references_ev", single.references_ev[:1])
    folder = write_release(tmp_path / "single", single, ["one"], name="toy", wattier_version="0.1.0")
    out = str(tmp_path / "out.xyz")
    done = CliRunner().invoke(app, ["predict", str(folder), str(structures), "-o", out])
    assert done.exit_code == 0, done.output
    assert "at the level of only" in done.stdout
    done = CliRunner().invoke(app, ["predict", str(release), str(structures), "-o", out])
    assert "--source: is not given, but must be one of a, b" in str(done.exception)


def test_forces_that_are_no_gradient_are_said_to_be_none(structures: Path, tmp_path: Path) -> None:
    ensemble = untrained(members=1, forces="vector")
    folder = write_release(tmp_path / "vector", ensemble, ["one"], name="toy", wattier_version="0.1.0")
    given = ["predict", str(folder), str(structures), "--source", "a", "-o", str(tmp_path / "out.xyz")]
    assert "not the gradient of the energy" in CliRunner().invoke(app, given).stdout
    direct = read(tmp_path / "out.xyz", 0).arrays["wattier_forces"]
    assert "not the gradient" not in CliRunner().invoke(app, [*given, "--conservative"]).stdout
    assert abs(read(tmp_path / "out.xyz", 0).arrays["wattier_forces"] - direct).max() > 1e-3


def test_figures_that_are_not_known_are_said_to_be_unknown() -> None:
    tally = Tally(structures=1, atoms=3, strange=1)
    tally.add("energy_std_ev_per_atom", [float("nan")])
    tally.add("energy_error_ev_per_atom", [])
    assert summary(tally, "a", True) == [
        "1 structure, 3 atoms, at the level of a",
        "mean std: energy unknown eV/atom, forces unknown eV/A",
        "unlike the training data: 1 structure",
    ]


def test_a_killed_prediction_leaves_no_half_a_file(release: Path, structures: Path, tmp_path: Path) -> None:
    """SIGTERM, as from a batch system: what was there stays, and no temporary file does."""
    write(structures, read(structures, ":") * 2000)
    out = tmp_path / "out.xyz"
    out.write_text("before")
    command = [
        sys.executable,
        "-m",
        "wattier",
        "predict",
        str(release),
        str(structures),
        "--source",
        "a",
        "-o",
        str(out),
    ]
    environment = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--batch", "8"], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        deadline = time.monotonic() + 60
        while not any(file.stat().st_size for file in tmp_path.glob(".out.xyz.*.tmp")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "Nothing was written" in said
    assert out.read_text() == "before"
    assert not list(tmp_path.glob(".out.xyz.*"))
