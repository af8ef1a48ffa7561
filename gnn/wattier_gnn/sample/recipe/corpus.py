"""From labelled frames to the five released layouts, with the defects that cleaning must find."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import read
from numpy.typing import NDArray

from wattier_gnn.sample import layouts
from wattier_gnn.structure import DataError, Structure

# Frames above this were displaced off any path a molecule or crystal takes: they are left out of the sample on physical
# grounds, before any defect is planted, and are not what the force threshold of cleaning is there for.
LARGEST_FORCE_EV_PER_ANGSTROM = 60.0
OUTLIER_FORCE_EV_PER_ANGSTROM = (0.0, 0.0, 250.0)
TRUNCATED_FRACTION = 0.6
SEED = 2026

# Planted by source: frames without an energy, frames with one impossible force.
PLANTED_NAN = {"ani1x": 3, "qm7x": 0, "oc20": 0, "oc22": 1, "mptrj": 1}
PLANTED_OUTLIERS = {"ani1x": 2, "qm7x": 1, "oc20": 1, "oc22": 1, "mptrj": 1}


@dataclass(frozen=True)
class Frame:
    """A labelled structure and what only its layout keeps: tags [N] and fixed [N] of slabs, SMILES of molecules."""

    structure: Structure
    tags: NDArray[np.int64]
    fixed: NDArray[np.bool_]
    smiles: str


@dataclass(frozen=True)
class Written:
    """What was written of one source: `frames` are those in readable files, defects included."""

    source: str
    frames: list[Frame]
    n_left_out: int
    n_truncated: int


def write_corpus(work: Path, out: Path) -> list[Written]:
    """Write ``out/<source>/`` for all five sources from ``work/<source>.xyz``.

    Raises:
        DataError: a file of labelled frames is missing.
    """
    return [write_source(source, work, out / source) for source in PLANTED_NAN]


def write_source(source: str, work: Path, folder: Path) -> Written:
    """Write one source in its layout, defects planted."""
    frames, n_left_out = labelled_frames(source, work)
    folder.mkdir(parents=True, exist_ok=True)
    held_back: list[Frame] = []
    if source == "oc20":  # the release mixes frames of different systems within a shard
        order = np.random.default_rng(SEED).permutation(len(frames))
        frames = [frames[index] for index in order]
        frames, held_back = frames[:-2], frames[-2:]
    frames = plant_defects(source, frames)
    structures = [frame.structure for frame in frames]
    if source == "ani1x":
        layouts.write_ani1x(folder / "ani1x-release.h5", structures)
    elif source == "qm7x":
        smiles = {frame.structure.group: frame.smiles for frame in frames}
        layouts.write_qm7x(folder / "1000.hdf5", structures, smiles)
    elif source == "oc20":
        half = len(frames) // 2
        for shard, members in enumerate((frames[:half], frames[half:], held_back)):
            _write_oc20_shard(folder, shard, members)
        _truncate(folder / "2.extxyz.xz")
    elif source == "oc22":
        layouts.write_oc22(folder / "data.0000.lmdb", structures, [frame.tags for frame in frames])
    else:
        layouts.write_mptrj(folder / "MPtrj_2022.9_full.json", structures)
    return Written(source, frames, n_left_out, len(held_back))


def labelled_frames(source: str, work: Path) -> tuple[list[Frame], int]:
    """The labelled frames of a source in the order of their keys, and how many were left out for their forces.

    Raises:
        DataError: the file is missing.
    """
    path = work / f"{source}.xyz"
    if not path.is_file():
        raise DataError(f"{path}: does not exist, but must hold labelled frames. Run the command `label` first")
    frames = [_frame(source, atoms) for atoms in sorted(read(path, index=":"), key=_place)]
    kept = [frame for frame in frames if _largest_force(frame.structure) <= LARGEST_FORCE_EV_PER_ANGSTROM]
    return kept, len(frames) - len(kept)


def plant_defects(source: str, frames: Sequence[Frame]) -> list[Frame]:
    """A copy of the frames, some without an energy and some with an impossible force on their first atom."""
    n_nan, n_outliers = PLANTED_NAN[source], PLANTED_OUTLIERS[source]
    chosen = np.random.default_rng([SEED, len(frames)]).permutation(len(frames))[: n_nan + n_outliers]
    planted = list(frames)
    for place, index in enumerate(chosen):
        structure = planted[index].structure
        if place < n_nan:
            structure = replace(structure, energy_ev=float("nan"))
        else:
            forces = np.array(structure.forces_ev_per_angstrom)
            forces[0] = OUTLIER_FORCE_EV_PER_ANGSTROM
            structure = replace(structure, forces_ev_per_angstrom=forces)
        planted[index] = replace(planted[index], structure=structure)
    return planted


def _frame(source: str, atoms: Atoms) -> Frame:
    system, index = _place(atoms)
    smiles = json.loads(atoms.info["smiles"]) if "smiles" in atoms.info else ""
    group, key = {
        "ani1x": (atoms.symbols.get_chemical_formula(mode="hill"), f"{system}/{index}"),
        "qm7x": (f"{system + 1}", f"{system + 1}/Geom-m{system + 1}-i1-c1-{index + 1}"),
        "oc20": (f"random{system}", f"random{system}/frame{index}"),
        "oc22": (f"{system}", f"{system}/{index}"),
        "mptrj": (f"mp-{system}", f"mp-{system}-0-{index}"),
    }[source]
    cell = np.array(atoms.cell, dtype=np.float64)
    structure = Structure(
        numbers=atoms.numbers.astype(np.int64),
        positions_angstrom=atoms.positions.astype(np.float64),
        cell_angstrom=cell if cell.any() else None,
        pbc=tuple(atoms.pbc.tolist()),
        energy_ev=float(atoms.info["label_energy"]),
        forces_ev_per_angstrom=atoms.arrays["label_forces"].astype(np.float64),
        source=source,
        group=group,
        key=key,
    )
    nothing = np.zeros(len(atoms), dtype=np.int64)
    fixed = atoms.arrays.get("fixed", nothing).astype(np.bool_)
    return Frame(structure, atoms.arrays.get("tags", nothing).astype(np.int64), fixed, smiles)


def _place(atoms: Atoms) -> tuple[int, int]:
    """(system, frame) from a key such as ``23-0``, ``alloy17-3`` or ``mp-9000-4``."""
    system, index = str(atoms.info["key"]).rsplit("-", 1)
    return int(system.lstrip("abcdefghijklmnopqrstuvwxyz-")), int(index)


def _largest_force(structure: Structure) -> float:
    forces: Any = structure.forces_ev_per_angstrom
    return float(np.linalg.norm(forces, axis=1).max())


def _write_oc20_shard(folder: Path, shard: int, frames: Sequence[Frame]) -> None:
    structures = [frame.structure for frame in frames]
    layouts.write_oc20(folder, shard, structures, [f.tags for f in frames], [f.fixed for f in frames])


def _truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * TRUNCATED_FRACTION)])
