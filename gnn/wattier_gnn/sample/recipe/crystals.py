"""Crystals and slabs off equilibrium, labelled by pretrained potentials whose weights ship inside their wheels.

Three families, small cells on purpose: alloy slabs with adsorbates (as in OC20), oxide slabs with adsorbates (as in
OC22), strained and rattled bulk (as in MPtrj). All random choices come from the seed of their own system.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc100, fcc111, molecule, surface
from ase.data import atomic_numbers, covalent_radii, reference_states
from ase.spacegroup import crystal

TAG_BULK, TAG_SURFACE, TAG_ADSORBATE = 0, 1, 2
VACUUM_ANGSTROM = 6.0
RATTLE_ANGSTROM = (0.03, 0.06, 0.09, 0.12, 0.15)
BULK_RATTLE_ANGSTROM = (0.03, 0.09, 0.15)  # fewer frames of more materials: what is held out are materials

FCC_METALS = ("Cu", "Ag", "Au", "Ni", "Pd", "Pt", "Al", "Rh", "Ir")
ADSORBATES = {
    "H": (1.0, Atoms("H")),
    "O": (1.2, Atoms("O")),
    "N": (1.2, Atoms("N")),
    "C": (1.2, Atoms("C")),
    "OH": (1.9, Atoms("OH", positions=[(0, 0, 0), (0.3, 0, 0.92)])),
    "CO": (1.8, Atoms("CO", positions=[(0, 0, 0), (0, 0, 1.15)])),
    "NO": (1.8, Atoms("NO", positions=[(0, 0, 0), (0, 0, 1.16)])),
    "NH": (1.5, Atoms("NH", positions=[(0, 0, 0), (0, 0, 1.02)])),
    "CH": (1.5, Atoms("CH", positions=[(0, 0, 0), (0, 0, 1.10)])),
    "H2O": (2.2, molecule("H2O")),
}
OXIDE_ADSORBATES = (None, "O", "OH", "H2O")
ROCKSALT_OXIDES = {
    "Mg": 4.21, "Ca": 4.81, "Mn": 4.45, "Fe": 4.33, "Co": 4.26, "Ni": 4.18, "Sr": 5.16, "Ba": 5.54, "Ti": 4.18,
    "V": 4.06, "Cd": 4.70, "Zn": 4.28,
}  # fmt: skip
RUTILE_OXIDES = {
    "Ti": (4.59, 2.96), "V": (4.55, 2.86), "Cr": (4.42, 2.92), "Mn": (4.40, 2.87), "Ru": (4.49, 3.11),
    "Ir": (4.50, 3.15), "Sn": (4.74, 3.19), "Pt": (4.49, 3.14), "Ge": (4.40, 2.86), "Nb": (4.85, 3.00),
}  # fmt: skip
FLUORITE_OXIDES = {"Ce": 5.41, "Zr": 5.09, "Hf": 5.12}
ALKALI, ALKALINE = ("Li", "Na", "K"), ("Mg", "Ca", "Sr", "Ba")
PEROVSKITE = [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)]
L12 = [(0, 0, 0), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)]


def alloy_slabs(n_systems: int) -> Iterator[tuple[str, str, Atoms]]:
    """(key, system, frame): three-layer fcc slabs of one or two metals under an adsorbate, lowest layer fixed."""
    for system in range(n_systems):
        rng = np.random.default_rng([20, system])
        first, second = rng.choice(FCC_METALS, size=2)
        fraction = rng.choice([0.0, 0.25, 0.5])
        lattice = (1 - fraction) * _fcc_constant(first) + fraction * _fcc_constant(second)
        build = fcc111 if rng.random() < 0.5 else fcc100
        slab = build(first, size=(2, 2, 3), a=lattice, vacuum=VACUUM_ANGSTROM)
        layers = slab.get_tags()  # ASE numbers layers from the top, 1
        swapped = rng.permutation(len(slab))[: round(fraction * len(slab))]
        slab.symbols[swapped] = second
        name = str(rng.choice(list(ADSORBATES)))
        height, adsorbate = ADSORBATES[name]
        site = "fcc" if build is fcc111 else "hollow"
        add_adsorbate(slab, adsorbate, height + 0.2 * rng.random(), site if rng.random() < 0.6 else "ontop")
        n_adsorbate = len(slab) - len(layers)
        slab.set_tags(np.r_[np.where(layers == 1, TAG_SURFACE, TAG_BULK), [TAG_ADSORBATE] * n_adsorbate])
        slab.arrays["fixed"] = np.r_[layers == 3, [False] * n_adsorbate]
        slab.pbc = True
        yield from _rattled(slab, f"alloy{system}", rng, movable=~slab.arrays["fixed"])


def oxide_slabs(n_systems: int) -> Iterator[tuple[str, str, Atoms]]:
    """(key, system, frame): rocksalt, rutile, fluorite slabs with nothing, O, OH or water on them; all atoms free."""
    for system in range(n_systems):
        rng = np.random.default_rng([22, system])
        family = rng.choice(["rocksalt", "rutile", "fluorite"], p=[0.5, 0.4, 0.1])
        if family == "rocksalt":
            metal = str(rng.choice(list(ROCKSALT_OXIDES)))
            slab = surface(bulk(f"{metal}O", "rocksalt", ROCKSALT_OXIDES[metal], cubic=True), (1, 0, 0), 2)
        elif family == "rutile":
            metal = str(rng.choice(list(RUTILE_OXIDES)))
            a, c = RUTILE_OXIDES[metal]
            rutile = crystal(
                [metal, "O"], [(0, 0, 0), (0.305, 0.305, 0)], spacegroup=136, cellpar=[a, a, c, 90, 90, 90]
            )
            slab = surface(rutile, (1, 1, 0), 2) if rng.random() < 0.5 else surface(rutile, (1, 0, 0), 3)
        else:
            metal = str(rng.choice(list(FLUORITE_OXIDES)))
            slab = surface(bulk(f"{metal}O2", "fluorite", FLUORITE_OXIDES[metal]), (1, 1, 1), 3) * (2, 1, 1)
        slab.center(vacuum=VACUUM_ANGSTROM, axis=2)
        slab.pbc = True
        height = slab.positions[:, 2]
        tags = np.where(height > height.max() - 1.2, TAG_SURFACE, TAG_BULK)
        name = OXIDE_ADSORBATES[rng.integers(len(OXIDE_ADSORBATES))]
        if name is not None:
            top = int(np.argmax(height))
            clearance, adsorbate = ADSORBATES[name]
            add_adsorbate(slab, adsorbate, clearance + 0.4 + 0.2 * rng.random(), slab.positions[top, :2])
        slab.set_tags(np.r_[tags, [TAG_ADSORBATE] * (len(slab) - len(tags))])
        yield from _rattled(slab, f"oxide{system}", rng)


def bulk_crystals(n_materials: int, calculator: Any) -> Iterator[tuple[str, str, Atoms]]:
    """(key, material, frame): simple prototypes of many element combinations, brought to their volume by `calculator`,
    then strained by up to 4 % and rattled."""
    prototypes = list(_prototypes())
    order = np.random.default_rng(33).permutation(len(prototypes))[:n_materials]
    for index in sorted(order):
        atoms = prototypes[index]
        rng = np.random.default_rng([33, int(index)])
        relaxed = _at_equilibrium_volume(atoms, calculator)
        if len(relaxed) <= 4:
            relaxed = relaxed * (2, 1, 1)
        for key, group, frame in _rattled(relaxed, f"mp-{9000 + index}", rng, widths_angstrom=BULK_RATTLE_ANGSTROM):
            strain = rng.uniform(-0.04, 0.04, size=(3, 3))
            frame.set_cell(frame.cell @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
            yield key, group, frame


def _rattled(
    atoms: Atoms,
    system: str,
    rng: np.random.Generator,
    movable: Any = slice(None),
    widths_angstrom: tuple[float, ...] = RATTLE_ANGSTROM,
) -> Iterator[tuple[str, str, Atoms]]:
    for frame_index, width in enumerate(widths_angstrom):
        frame = atoms.copy()
        frame.calc, frame.info = None, {}
        frame.set_constraint()
        noise = np.zeros_like(frame.positions)
        noise[movable] = rng.normal(scale=width, size=noise[movable].shape)
        frame.positions += noise
        yield f"{system}-{frame_index}", system, frame


def _fcc_constant(symbol: str) -> float:
    return float(reference_states[atomic_numbers[symbol]]["a"])


def _prototypes() -> Iterator[Atoms]:
    """Element combinations in simple structure types, lattice constants guessed from covalent radii."""
    for symbol in (*FCC_METALS, "Ca", "Sr"):
        yield bulk(symbol, "fcc", a=_length("fcc", symbol), cubic=True)
    for symbol in ("Li", "Na", "K", "Fe", "Ba", "Ti", "Zr"):
        yield bulk(symbol, "bcc", a=_length("bcc", symbol), cubic=True)
    for symbol in ("Si", "Ge", "C"):
        yield bulk(symbol, "diamond", a=_length("zincblende", symbol, symbol))
    binaries = (
        ("rocksalt", ALKALI, ("F", "Cl", "Br")),
        ("rocksalt", ALKALINE, ("O", "S", "Se")),
        ("rocksalt", ("Ti", "Zr", "Fe", "Ni"), ("O", "N", "C", "S")),
        ("zincblende", ("Al", "Ga", "Zn", "Cu", "Mg"), ("N", "P", "As", "S", "Se")),
        ("cesiumchloride", ("Ni", "Fe", "Cu", "Zn", "Pd", "Ag"), ("Al", "Ti", "Zr", "Mg", "Ca")),
    )
    for structure, cations, anions in binaries:
        for cation in cations:
            for anion in anions:
                yield bulk(cation + anion, structure, a=_length(structure, cation, anion))
    fluorites = [(a, b) for a in ALKALINE for b in ("F", "Cl")] + [("Zr", "O"), ("Ti", "O"), ("Mg", "Si"), ("Ni", "Si")]
    antifluorites = [(b, a) for a in ALKALI for b in ("O", "S", "Se")]
    for metal, anion in fluorites + antifluorites:
        yield bulk(f"{metal}{anion}2", "fluorite", a=_length("zincblende", metal, anion))
    for large in ("K", "Na", "Ca", "Sr", "Ba"):
        for small, anion in (
            ("Ti", "O"), ("Zr", "O"), ("Fe", "O"), ("Al", "O"), ("Mg", "F"), ("Zn", "F"), ("Ni", "F"), ("Cu", "F"),
            ("Zr", "S"), ("Ti", "N"),
        ):  # fmt: skip
            yield _cubic([large, small, *[anion] * 3], PEROVSKITE, 1.9 * (_radius(small) + _radius(anion)))
    for major in ("Ni", "Cu", "Pt", "Al", "Pd", "Au", "Ag"):
        for minor in ("Al", "Ti", "Zn", "Au", "Pd", "Zr", "Fe"):
            if major != minor:
                yield _cubic([minor, *[major] * 3], L12, 0.75 * _length("fcc", major) + 0.25 * _length("fcc", minor))


def _cubic(symbols: list[str], scaled_positions: list[tuple[float, float, float]], edge_angstrom: float) -> Atoms:
    return Atoms(symbols, scaled_positions=scaled_positions, cell=[edge_angstrom] * 3, pbc=True)


def _radius(symbol: str) -> float:
    return float(covalent_radii[atomic_numbers[symbol]])


def _length(structure: str, first: str, second: str = "") -> float:
    contact = _radius(first) + _radius(second or first)
    return contact * float(
        {
            "fcc": np.sqrt(2),
            "bcc": 2 / np.sqrt(3),
            "rocksalt": 2.0,
            "zincblende": 4 / np.sqrt(3),
            "cesiumchloride": 2 / np.sqrt(3),
        }.get(structure, 2.0)
    )


def _at_equilibrium_volume(atoms: Atoms, calculator: Any) -> Atoms:
    """The uniformly scaled copy of lowest energy on a grid of lattice scales 0.80, 0.82 ... 1.24."""
    scales = np.arange(0.80, 1.25, 0.02)
    energies = []
    for scale in scales:
        trial = atoms.copy()
        trial.set_cell(trial.cell * scale, scale_atoms=True)
        trial.calc = calculator
        energies.append(trial.get_potential_energy())
    best = atoms.copy()
    best.set_cell(best.cell * scales[int(np.argmin(energies))], scale_atoms=True)
    return best
