"""SOURCE.md of the sample: what each source is, how it was made, what is wrong with it on purpose, checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import dedent

from ase.data import chemical_symbols

from wattier_gnn.sample.recipe import molecules
from wattier_gnn.sample.recipe.corpus import (
    LARGEST_FORCE_EV_PER_ANGSTROM,
    OUTLIER_FORCE_EV_PER_ANGSTROM,
    PLANTED_NAN,
    PLANTED_OUTLIERS,
    TRUNCATED_FRACTION,
    Written,
)

_SUBJECTS = {
    "ani1x": "Organic molecules (H C N O), all-electron density functional theory, layout of ANI-1x",
    "qm7x": "Small molecules with S and Cl, all-electron density functional theory, layout of QM7-X",
    "oc20": "Three-layer fcc alloy slabs under one adsorbate, lowest layer held, layout of OC20 S2EF",
    "oc22": "Oxide slabs bare or under O, OH or water, all atoms free, layout of OC22 S2EF-Total",
    "mptrj": "Strained and rattled bulk crystals of simple prototypes, layout of MPtrj",
}


def write_source_note(out: Path, written: Sequence[Written]) -> None:
    """Write ``out/SOURCE.md`` about all files under the folders of the sources."""
    parts = [
        "# The sample: five small sources in their released layouts",
        dedent(f"""\
            Made by `python -m wattier_gnn.sample.recipe` (geometries, labels, layouts; seeds fixed). Our own work:
            BSD-3-Clause, no third-party data. None of it is a part of the datasets whose layouts it uses.

            Defects are planted for cleaning to find: energies that are NaN (`null` in JSON), forces of
            {list(OUTLIER_FORCE_EV_PER_ANGSTROM)} eV/Å on a first atom, and one OC20 shard cut to
            {TRUNCATED_FRACTION:.0%} of its bytes. Before that, frames with any force above
            {LARGEST_FORCE_EV_PER_ANGSTROM:g} eV/Å were left out: displacement had pushed atoms of most of them much too
            close."""),
        _counts(written),
        *(f"## {item.source}\n\n{_SUBJECTS[item.source]}. {_method(item.source)}" for item in written),
        _LIMITS,
        _checksums(out, [item.source for item in written]),
    ]
    (out / "SOURCE.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _counts(written: Iterable[Written]) -> str:
    lines = [
        "| source | frames | groups | elements | atoms a frame | NaN energies | force outliers "
        "| frames in a truncated shard | left out |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for item in written:
        structures = [frame.structure for frame in item.frames]
        sizes = [len(structure.numbers) for structure in structures]
        elements = sorted({int(number) for structure in structures for number in structure.numbers})
        symbols = " ".join(chemical_symbols[number] for number in elements)
        lines.append(
            f"| {item.source} | {len(structures)} | {len({structure.group for structure in structures})} "
            f"| {len(elements)}: {symbols} | {min(sizes)}-{max(sizes)} | {PLANTED_NAN[item.source]} "
            f"| {PLANTED_OUTLIERS[item.source]} | {item.n_truncated} | {item.n_left_out} |"
        )
    return (
        "## Counts\n\nFrames with planted labels count as frames; those in the truncated shard do not.\n\n"
        + "\n".join(lines)
    )


def _method(source: str) -> str:
    if source in ("ani1x", "qm7x"):
        method = molecules.ANI1X_METHOD if source == "ani1x" else molecules.QM7X_METHOD
        temperatures = ", ".join(f"{kelvin:g}" for kelvin in molecules.TEMPERATURES_KELVIN)
        return (
            f"Geometries: RDKit {_version('rdkit')} ETKDG, MMFF94 (UFF where it has no parameters) minimum, displaced "
            f"along the classical normal modes at {temperatures} K. Labels: restricted Kohn-Sham "
            f"{method.functional}/{method.basis} with density fitting and grid level {molecules.GRID_LEVEL}, analytic "
            f"gradients, PySCF {_version('pyscf')}."
        )
    if source == "oc22":
        model = f"SevenNet {_version('sevenn')}, model 7net-0 (MIT; trained on MPtrj, PBE and PBE+U, uncorrected)"
    else:
        model = f"CHGNet {_version('chgnet')}, model 0.3.0 (BSD; trained on MPtrj, PBE and PBE+U, MP2020-corrected)"
    return (
        f"Geometries: ASE {_version('ase')}, rattled by 0.03 to 0.15 Å. Labels: the pretrained potential {model}; its "
        "training data are Materials Project calculations (CC-BY-4.0; Deng et al., Nat. Mach. Intell. 5, 1031 (2023))."
    )


_LIMITS = dedent("""\
    ## Limits

    - Slabs and crystals carry labels of a pretrained potential, not of density functional theory: they are smooth
      surrogates with the noise of single precision, and far off equilibrium they extrapolate.
    - Small cells, few elements, one conformer a molecule, uncorrelated displacements: this is made to run a workflow
      on a laptop. No accuracy reached on it says anything about the datasets whose layouts it has.
    - OC20 labels are CHGNet energies, not RPBE; the reference energy in its lists of ids is unknown and written `nan`.
      MPtrj frames have no stress and no magnetic moments (`null`).
    - The molecules' energies passed through ASE's hartree (CODATA 2014), 8e-9 relative from the one the reader uses.
    - ANI-1x groups are formulas, as released: isomers share a group. Groups of QM7-X are molecules.
    - Labels are stored, never recomputed: SevenNet's forces change in their last bits with the number of threads.
    - Written twice, the LMDB file differs in bytes, not in content: torch names storages by their address.""")


def _checksums(out: Path, sources: Iterable[str]) -> str:
    lines = ["## sha256, bytes, file", "", "```"]
    for source in sources:
        for path in sorted((out / source).iterdir()):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            lines.append(f"{digest}  {path.stat().st_size}  {path.relative_to(out).as_posix()}")
    return "\n".join([*lines, "```"])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(version unknown: not installed where this was written)"
