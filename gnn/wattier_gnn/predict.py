"""An ensemble's answers for all structures of some files, written as one extended XYZ file."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io.extxyz import key_val_dict_to_str, key_val_str_to_dict, write_xyz
from ase.stress import full_3x3_to_voigt_6_stress

from wattier_gnn.calculator import structure_of
from wattier_gnn.datasets.write_extxyz import readable
from wattier_gnn.ensemble import Ensemble, EnsemblePrediction
from wattier_gnn.files import write_file
from wattier_gnn.frames import Frame, frames
from wattier_gnn.model import source_index_of
from wattier_gnn.structure import BadRecord, DataError, Structure
from wattier_gnn.unfit import unfit

OnBad = Literal["refuse", "skip"]
PREFIX = "wattier_"
SUFFIXES = (".xyz", ".extxyz")
MOST_ATOMS = 4096  # in one batch: some GB of memory for a model of usual width
MESSAGES_KEPT = 20
OF_THE_FORMAT = {"Lattice", "Properties", "pbc", "pos", "species", "symbols", "numbers", "positions", "move_mask"}
COLUMN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


@dataclass
class Tally:
    """What came of a prediction of many structures; a mean is over those that have a value, NaN without any.

    Attributes:
        structures, atoms: predicted.
        skipped: frames that could not be read or predicted; `messages` of the first.
        strange: structures unlike the training data; None where the release does not say.
        sums: name -> (sum, count) of energy_std_ev_per_atom, forces_std_ev_per_angstrom, and, against the labels that
            files held, energy_error_ev_per_atom (absolute) and forces_error_ev_per_angstrom (of components, absolute).
    """

    structures: int = 0
    atoms: int = 0
    skipped: int = 0
    messages: list[str] = field(default_factory=list)
    strange: int | None = None
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add(self, name: str, values: Any) -> None:
        """Count the finite ones among some values."""
        values = np.asarray(values)[np.isfinite(values)]
        total, count = self.sums.get(name, (0.0, 0))
        self.sums[name] = (total + float(values.sum()), count + values.size)

    def mean(self, name: str) -> float:
        """The mean of what was counted under a name."""
        total, count = self.sums.get(name, (0.0, 0))
        return total / count if count else math.nan


def predict_files(  # noqa: PLR0913
    ensemble: Ensemble,
    files: Sequence[Path],
    out: Path,
    *,
    source: str,
    batch_structures: int = 64,
    conservative: bool = False,
    on_bad: OnBad = "refuse",
    progress: Callable[[Tally], None] = lambda _tally: None,
) -> Tally:
    """Predict every frame of `files` and write it to `out`, which appears whole or not at all.

    A frame keeps what it had, labels included. Added are in its comment line wattier_energy [eV], wattier_stress
    [eV/Angstrom^3] in ASE's Voigt order (of three periodic directions), wattier_source, and, where the release knows
    them, wattier_energy_std, wattier_stress_std, wattier_energy_interval (the half width) and
    wattier_out_of_distribution with its reason; for each atom wattier_forces [eV/Angstrom] and wattier_forces_std.
    Memory does not grow with the number of frames.

    Args:
        ensemble: a release, on its device.
        files: in any format of `frames.FORMATS`.
        out: its name ends in .xyz or .extxyz.
        source: whose level of theory.
        batch_structures: structures predicted at once, at most.
        conservative: see `Ensemble.predict`.
        on_bad: refuse ends at the first frame that cannot be read or predicted, skip counts it and goes on.
        progress: called after each batch.

    Raises:
        DataError: a file cannot be read on, a frame is bad, or `out` cannot be written.
        ValueError: no such source.
    """
    source_index_of(ensemble.sources, source)
    _refuse_output(out, files)
    tally = Tally()

    def bad(message: str) -> None:
        if on_bad == "refuse":
            raise DataError(message)
        tally.skipped += 1
        if len(tally.messages) < MESSAGES_KEPT:
            tally.messages.append(message)

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as stream:
            for batch in _batches(files, batch_structures, bad):
                for part, said in _predicted(ensemble, batch, source, conservative, bad):
                    _write(stream, part, said, source)
                    _count(tally, part, said)
                progress(tally)
        if not tally.structures:
            raise DataError(f"{files[0]}: holds no structure that can be predicted, but must hold one at least.")

    try:
        write_file(out, write)
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}). Name another file.") from error
    return tally


def _refuse_output(out: Path, files: Sequence[Path]) -> None:
    if out.suffix not in SUFFIXES:
        raise DataError(f"{out}: ends in {out.suffix!r}, but must end in .xyz or .extxyz, the format that is written.")
    if any(out.exists() and file.exists() and out.samefile(file) for file in files):
        raise DataError(f"{out}: is read from, but must be another file. Give another name.")


def _batches(files: Sequence[Path], most: int, bad: Callable[[str], None]) -> Iterator[list[Frame]]:
    """Frames in their order, so many at a time."""
    batch: list[Frame] = []
    n_atoms = 0
    for item in (item for file in files for item in frames(file)):
        if isinstance(item, BadRecord):
            bad(item.message)
            continue
        if batch and (len(batch) == most or n_atoms + len(item.atoms) > MOST_ATOMS):
            yield batch
            batch, n_atoms = [], 0
        batch.append(item)
        n_atoms += len(item.atoms)
    if batch:
        yield batch


def _predicted(
    ensemble: Ensemble, batch: list[Frame], source: str, conservative: bool, bad: Callable[[str], None]
) -> Iterator[tuple[list[Frame], EnsemblePrediction]]:
    """The answers for those that can be answered; one frame at a time where two atoms of one overlap."""
    reference_ev = ensemble.references_ev[source_index_of(ensemble.sources, source)]
    fit: list[Frame] = []
    structures: list[Structure] = []
    for frame in batch:
        structure = structure_of(frame.atoms)
        if reason := unfit(structure, reference_ev, source):
            bad(f"{frame.where}: {reason}")
        else:
            fit.append(frame)
            structures.append(structure)
    if not fit:
        return
    any_crystal = any(all(structure.pbc) for structure in structures)
    try:
        said = ensemble.predict(structures, source, stress=any_crystal, conservative=conservative)
    except DataError as error:
        if len(fit) == 1:
            bad(f"{fit[0].where}: {error}")
            return
        for frame in fit:
            yield from _predicted(ensemble, [frame], source, conservative, bad)
    else:
        yield fit, said


def _write(stream: TextIO, batch: list[Frame], said: EnsemblePrediction, source: str) -> None:
    bounds = np.concatenate([[0], np.cumsum([len(frame.atoms) for frame in batch])]).tolist()
    for k, (frame, (a, b)) in enumerate(zip(batch, pairwise(bounds), strict=True)):
        atoms = _plain(frame.atoms)
        atoms.info |= _about_structure(said, k) | {f"{PREFIX}source": source}
        atoms.arrays[f"{PREFIX}forces"] = said.forces_ev_per_angstrom[a:b]
        if np.isfinite(said.forces_std_ev_per_angstrom[a:b]).all():
            atoms.arrays[f"{PREFIX}forces_std"] = said.forces_std_ev_per_angstrom[a:b]
        write_xyz(stream, [atoms], write_results=True)


def _about_structure(said: EnsemblePrediction, k: int) -> dict[str, Any]:
    """What the comment line is to say of the k-th structure: what is known."""
    values = {
        "energy": said.energy_ev,
        "energy_std": said.energy_std_ev,
        "energy_interval": said.energy_interval_ev,
    }
    if said.stress_ev_per_angstrom3 is not None:
        values["stress"] = full_3x3_to_voigt_6_stress(said.stress_ev_per_angstrom3)
        values["stress_std"] = full_3x3_to_voigt_6_stress(said.stress_std_ev_per_angstrom3)
    info = {f"{PREFIX}{n}": v[k] for n, v in values.items() if v is not None and np.isfinite(v[k]).all()}
    strange = said.out_of_distribution
    if strange is not None:
        reason = strange[k]
        info[f"{PREFIX}out_of_distribution"] = reason is not None
        if reason is not None:
            info[f"{PREFIX}out_of_distribution_reason"] = readable(reason)
    return info


def _plain(atoms: Atoms) -> Atoms:
    """A copy with what extended XYZ can hold of it, of earlier predictions nothing, and its labels."""
    plain = Atoms(numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    plain.set_constraint([c for c in atoms.constraints if isinstance(c, FixAtoms)])  # of others it has no column
    labels = {name: value for name, value in _labels(atoms).items() if value is not None}
    taken = {*OF_THE_FORMAT, *labels}
    for name, values in atoms.arrays.items():
        if name not in taken and not name.startswith(PREFIX) and _is_column(name, values):
            plain.arrays[name] = values
    plain.info = {
        name: readable(value) if isinstance(value, str) else value
        for name, value in atoms.info.items()
        if name not in taken and not str(name).startswith(PREFIX) and _can_be_told(name, value)
    }
    if labels:
        plain.calc = SinglePointCalculator(plain, **labels)
    return plain


def _is_column(name: str, values: Any) -> bool:
    """Whether ASE reads what it writes of such an array."""
    if not COLUMN_NAME.fullmatch(name) or values.ndim > 2 or values.dtype.kind not in "biufU":
        return False
    return values.dtype.kind != "U" or all(text.isprintable() and text.split() == [text] for text in values.flat)


def _can_be_told(name: Any, value: Any) -> bool:
    """Whether ASE reads from a comment line what it writes there."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it leaves out
            text = key_val_dict_to_str({name: readable(value) if isinstance(value, str) else value})
        return text.isprintable() and list(key_val_str_to_dict(text)) == [name]
    except Exception:  # noqa: BLE001  (ASE's writer has no error of its own)
        return False


def _labels(atoms: Atoms) -> dict[str, Any]:
    """What the file held, None where nothing: energy [eV], forces [eV/Angstrom] before constraints, stress [6]."""
    results = atoms.calc.results if atoms.calc is not None else {}
    shapes = {"energy": (), "forces": (len(atoms), 3), "stress": (6,)}
    found = {name: np.asarray(results.get(name)) for name in shapes}
    return {n: v if v.dtype.kind in "iuf" and v.shape == shapes[n] else None for n, v in found.items()}


def _count(tally: Tally, batch: list[Frame], said: EnsemblePrediction) -> None:
    n_atoms = np.array([len(frame.atoms) for frame in batch])
    tally.structures += len(batch)
    tally.atoms += int(n_atoms.sum())
    tally.add("energy_std_ev_per_atom", said.energy_std_ev / n_atoms)
    tally.add("forces_std_ev_per_angstrom", said.forces_std_ev_per_angstrom)
    labels = [_labels(frame.atoms) for frame in batch]
    energy = np.array([math.nan if label["energy"] is None else label["energy"] for label in labels])
    tally.add("energy_error_ev_per_atom", np.abs(said.energy_ev - energy) / n_atoms)
    forces = [
        np.full((n, 3), math.nan) if x["forces"] is None else x["forces"] for n, x in zip(n_atoms, labels, strict=True)
    ]
    tally.add("forces_error_ev_per_angstrom", np.abs(said.forces_ev_per_angstrom - np.concatenate(forces)))
    strange = said.out_of_distribution
    if strange is not None:
        tally.strange = (tally.strange or 0) + sum(reason is not None for reason in strange)
