"""Which structures are removed, for which reason, and that all of them are counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from wattier_gnn.cleaning import CleaningReport, read_clean, removal_reason
from wattier_gnn.datasets import READERS, Reader
from wattier_gnn.structure import BadRecord, DataError, ShardError, Structure

GOOD = Structure(
    numbers=np.array([1, 118], dtype=np.int64),
    positions_angstrom=np.zeros((2, 3)),
    cell_angstrom=np.eye(3),
    pbc=(True, True, True),
    energy_ev=-1.0,
    forces_ev_per_angstrom=np.array([[60.0, 0.0, 79.9], [0.0, 0.0, 0.0]]),
    source="toy",
    group="g",
    key="k",
)
NAN = float("nan")
REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def test_a_good_structure_stays() -> None:
    assert removal_reason(GOOD, 100.0) is None
    assert removal_reason(replace(GOOD, forces_ev_per_angstrom=None), 100.0) is None


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        (replace(GOOD, energy_ev=NAN), "nan label"),
        (replace(GOOD, energy_ev=float("inf")), "nan label"),
        (replace(GOOD, forces_ev_per_angstrom=np.full((2, 3), NAN)), "nan label"),
        (replace(GOOD, positions_angstrom=np.full((2, 3), NAN)), "nan position"),
        (replace(GOOD, cell_angstrom=np.full((3, 3), NAN)), "nan position"),
        (replace(GOOD, positions_angstrom=np.array([[0, 0, 0], [0, -2e6, 0]])), "position out of range"),
        (replace(GOOD, cell_angstrom=None), "cell without volume"),
        (replace(GOOD, cell_angstrom=np.diag([0.5, 0.5, 1.5])), "impossible density"),
        (replace(GOOD, cell_angstrom=np.ones((3, 3))), "cell without volume"),
        (replace(GOOD, cell_angstrom=np.diag([4, 4, 0.01])), "cell without volume"),
        (replace(GOOD, numbers=np.array([0, 1], dtype=np.int64)), "unknown element"),
        (replace(GOOD, numbers=np.array([1, 119], dtype=np.int64)), "unknown element"),
        (
            replace(
                GOOD,
                numbers=np.zeros(0, dtype=np.int64),
                positions_angstrom=np.zeros((0, 3)),
                forces_ev_per_angstrom=np.zeros((0, 3)),
            ),
            "no atoms",
        ),
    ],
)
def test_reasons(structure: Structure, reason: str) -> None:
    assert removal_reason(structure, 100.0) == reason


def test_the_force_rule_is_per_atom_and_includes_the_threshold() -> None:
    def with_forces(*rows: tuple[float, float, float]) -> Structure:
        return replace(GOOD, forces_ev_per_angstrom=np.array(rows, dtype=float))

    assert removal_reason(with_forces((60, 0, 80), (0, 0, 0)), 100.0) == "force above threshold"  # the norm is 100
    assert removal_reason(with_forces((99, 0, 0), (99, 0, 0)), 100.0) is None  # the norm over all atoms is 140
    assert removal_reason(with_forces((99, 0, 0), (99, 0, 0)), 50.0) == "force above threshold"


def test_the_frobenius_rule_takes_all_atoms_together() -> None:
    forces = np.array([[99.0, 0, 0], [14.2, 0, 0]])  # the norm over all atoms is 100.01
    structure = replace(GOOD, forces_ev_per_angstrom=forces)
    assert removal_reason(structure, 100.0, "per_atom") is None
    assert removal_reason(structure, 100.0, "frobenius") == "force above threshold"
    assert removal_reason(structure, 100.1, "frobenius") is None


def test_an_open_axis_needs_no_lattice_vector() -> None:
    slab = replace(GOOD, cell_angstrom=np.diag([3.0, 3.0, 0.0]), pbc=(True, True, False))
    assert removal_reason(slab, 100.0) is None
    assert removal_reason(replace(GOOD, cell_angstrom=None, pbc=(False, False, False)), 100.0) is None


def atoms_at(positions: object, cell: object = None, n_periodic: int = 0) -> Structure:
    n_atoms = len(np.asarray(positions))
    return replace(
        GOOD,
        numbers=np.full(n_atoms, 6),
        positions_angstrom=np.asarray(positions, dtype=float),
        cell_angstrom=None if cell is None else np.asarray(cell, dtype=float),
        pbc=tuple(axis < n_periodic for axis in range(3)),
        forces_ev_per_angstrom=np.zeros((n_atoms, 3)),
    )


FAR = [[500.0, 500.0, 500.0]]
TURN = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]


@pytest.mark.parametrize(
    "structure",
    [
        atoms_at(np.zeros((3000, 3))),
        atoms_at(np.concatenate([np.zeros((41, 3)), FAR])),  # an outlier does not thin out a clump
        atoms_at(np.zeros((40, 3)), np.diag([0.2, 0.2, 20.0]), 2),
        atoms_at(np.concatenate([np.zeros((40, 3)), FAR]), np.diag([0.2, 0.2, 0.0]) @ TURN, 2),
        atoms_at(np.concatenate([np.zeros((40, 3)), FAR]), np.diag([0.2, 20.0, 20.0]) @ TURN, 1),
    ],
)
def test_a_clump_of_atoms_is_removed_whatever_repeats(structure: Structure) -> None:
    assert removal_reason(structure, 100.0) == "impossible density"


def test_dense_matter_stays_whatever_repeats() -> None:
    """Diamond, and hydrogen as close everywhere as in H2: a crystal, a slab, a rod and a grain of each."""
    corners = np.array([[0, 0, 0], [0, 2, 2], [2, 0, 2], [2, 2, 0]])
    diamond = 3.567 / 4 * np.concatenate([corners, corners + 1])
    for motif, side in ((diamond, 3.567), (np.zeros((1, 3)), 0.74)):
        shifts = side * np.stack(np.meshgrid(*[np.arange(6)] * 3), axis=-1).reshape(-1, 3)
        positions = (motif[:, None] + shifts).reshape(-1, 3) @ TURN
        for n_periodic in range(4):
            assert removal_reason(atoms_at(positions, 6 * side * TURN, n_periodic), 100.0) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"numbers": np.array([1.0, 2.0])}, r"numbers is float64 \[2\], but must be int64 \[2\]"),
        ({"numbers": np.zeros((1, 2), dtype=np.int64)}, r"numbers is int64 \[1, 2\]"),
        ({"positions_angstrom": np.zeros((3, 3))}, r"positions_angstrom is float64 \[3, 3\], but must be .* \[2, 3\]"),
        ({"cell_angstrom": np.zeros(3)}, r"cell_angstrom is float64 \[3\]"),
        ({"forces_ev_per_angstrom": np.zeros((2, 3), dtype=np.float32)}, "forces_ev_per_angstrom is float32"),
        ({"pbc": (True,)}, "pbc"),
    ],
)
def test_a_structure_checks_its_shapes(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=f"toy k: {said}"):
        replace(GOOD, **change)  # type: ignore[arg-type]


def test_a_data_error_is_one_line() -> None:
    assert str(DataError("a:\n  is b,\n  but must be c")) == "a: is b, but must be c"


def toy_reader(structures_before_damage: list[Structure | BadRecord]) -> Reader:
    def read(path: Path) -> Iterator[Structure | BadRecord]:
        yield from structures_before_damage
        if path.name == "bad":
            raise ShardError(f"{path}: is bad")

    return Reader("toy", lambda path: [path / "good", path / "bad"], read, "none")


def test_everything_read_is_counted() -> None:
    report = CleaningReport()
    structures = [GOOD, replace(GOOD, energy_ev=NAN), BadRecord("record 2 is bad"), replace(GOOD, energy_ev=-2.0)]
    kept = list(read_clean(toy_reader(structures), Path("/p"), 100.0, report))
    assert [structure.energy_ev for structure in kept] == [-1.0, -2.0, -1.0, -2.0]
    assert report.read == {"toy": 8}
    assert report.kept == {"toy": 4}
    assert report.removed == {"toy": {"nan label": 2, "unreadable record": 2}}
    assert report.bad_shards == {"toy": ["/p/bad: is bad"]}
    assert report.bad_records == {"toy": ["record 2 is bad"] * 2}


def test_a_report_survives_json() -> None:
    report = CleaningReport()
    report.count("a", None)
    report.count("a", "no atoms")
    report.count_bad_shard("b", "b/1: is bad")
    report.count_bad_record("b", "b/2: record 3 is bad")
    assert CleaningReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert CleaningReport.from_dict(CleaningReport().to_dict()) == CleaningReport()


def test_reports_add_up() -> None:
    one, two = CleaningReport(), CleaningReport()
    for report in (one, two):
        report.count("a", None)
        report.count("a", "no atoms")
        for k in range(15):
            report.count_bad_record("a", f"bad {k}")
        report.count_bad_shard("a", "a/1: is bad")
    one.add(two)
    assert one.read == {"a": 34}
    assert one.kept == {"a": 2}
    assert one.removed == {"a": {"no atoms": 2, "unreadable record": 30}}
    assert one.bad_shards == {"a": ["a/1: is bad"] * 2}
    assert one.bad_records["a"] == [f"bad {k}" for k in [*range(15), *range(5)]]


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the genuine sample is not part of the repository and is not at {REAL}")
@pytest.mark.parametrize(
    ("name", "inside", "structures", "per_atom", "frobenius"),
    [
        ("oc20", "oc20_s2ef/0.extxyz.xz", 1313, 3, 3),
        ("oc20", "oc20_s2ef/1.extxyz.xz", 1313, 2, 2),
        ("extxyz", "mptrj/mptrj-random-1k.xyz.xz", 1000, 0, 3),
        ("extxyz", "mptrj/mptrj-highest-stress-1k.xyz.xz", 1000, 23, 78),
        ("mptrj", "mptrj", 240, 8, 12),
        ("ani1x", "ani1x", 1560, 0, 0),
        ("qm7x", "qm7x", 377, 0, 0),
    ],
)
def test_both_force_rules_remove_what_the_collection_says(
    name: str, inside: str, structures: int, per_atom: int, frobenius: int
) -> None:
    """The figures of COUNTS.md."""
    reader, removed, read = READERS[name], {"per_atom": 0, "frobenius": 0}, 0
    for shard in reader.shards(REAL / inside):
        for item in reader.read(shard):
            assert isinstance(item, Structure)
            read += 1
            removed["per_atom"] += removal_reason(item, 100.0, "per_atom") == "force above threshold"
            removed["frobenius"] += removal_reason(item, 100.0, "frobenius") == "force above threshold"
    assert (read, removed["per_atom"], removed["frobenius"]) == (structures, per_atom, frobenius)
