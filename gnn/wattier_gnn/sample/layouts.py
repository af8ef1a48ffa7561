"""Writers of the five released layouts, from structures: the inverse of the readers, for the sample and for tests."""

from __future__ import annotations

import json
import lzma
import pickle
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import lmdb
import numpy as np
from ase.data import chemical_symbols
from numpy.typing import ArrayLike, NDArray

from wattier_gnn.datasets.ani1x import ENERGY, FORCES, HARTREE_EV
from wattier_gnn.structure import Structure

TAG_ADSORBATE = 2
LMDB_MAP_BYTES = 1 << 28  # an upper bound that the compacted copy does not inherit on disk


def write_ani1x(path: Path, structures: Sequence[Structure]) -> None:
    """One HDF5 group a formula (`Structure.group`); labels in hartree, coordinates and forces in single precision.

    Raises:
        ValueError: the structures of a group differ in the order of their atoms.
    """
    with h5py.File(path, "w", libver="latest") as file:
        for formula, members in groupby(sorted(structures, key=_group), key=_group):
            rows = list(members)
            numbers = rows[0].numbers
            if any(not np.array_equal(row.numbers, numbers) for row in rows):
                raise ValueError(
                    f"{formula}: atoms are in different orders, but must be in one order in all of a group"
                )
            group = file.create_group(formula)
            group["atomic_numbers"] = numbers.astype(np.uint8)
            group["coordinates"] = np.array([row.positions_angstrom for row in rows], dtype=np.float32)
            group[ENERGY] = np.array([row.energy_ev for row in rows]) / HARTREE_EV
            group[FORCES] = (np.array([_forces(row) for row in rows]) / HARTREE_EV).astype(np.float32)


def write_qm7x(path: Path, structures: Sequence[Structure], smiles: Mapping[str, str] | None = None) -> None:
    """One HDF5 group a molecule (`Structure.group`) and in it one a conformation (the key behind the slash).

    Args:
        path: the file.
        structures: keys are ``<idmol>/<idconf>``.
        smiles: idmol -> SMILES, kept as an attribute of the molecule's group.
    """
    with h5py.File(path, "w", libver="latest") as file:
        for structure in structures:
            group = file.create_group(structure.key)
            group["atNUM"] = structure.numbers
            group["atXYZ"] = structure.positions_angstrom
            group["ePBE0"] = np.array([structure.energy_ev])
            group["pbe0FOR"] = _forces(structure)
        for idmol, text in (smiles or {}).items():
            if idmol in file:
                file[idmol].attrs["smiles"] = text


def write_oc20(
    folder: Path,
    shard: int,
    structures: Sequence[Structure],
    tags: Sequence[ArrayLike],
    fixed: Sequence[ArrayLike],
) -> None:
    """``<shard>.extxyz.xz`` and ``<shard>.txt.xz``; the reference energy of a line of ids is ``nan``, unknown.

    Args:
        folder: where both files go.
        shard: number of the shard.
        structures: keys are ``<system>/<frame>``.
        tags: integer [N] a structure: 0 below the surface, 1 surface, 2 adsorbate.
        fixed: boolean [N] a structure: whether an atom was held in place.
    """
    frames, ids = [], []
    for structure, atom_tags, atom_fixed in zip(structures, tags, fixed, strict=True):
        frames.append(_extxyz_frame(structure, np.asarray(atom_tags), np.asarray(atom_fixed)))
        ids.append(structure.key.replace("/", ",") + ",nan\n")
    for name, parts in ((f"{shard}.extxyz.xz", frames), (f"{shard}.txt.xz", ids)):
        (folder / name).write_bytes(lzma.compress("".join(parts).encode(), preset=9 | lzma.PRESET_EXTREME))


def write_oc22(path: Path, structures: Sequence[Structure], tags: Sequence[ArrayLike]) -> None:
    """One LMDB file of pickled ``torch_geometric.data.Data`` records, byte for byte as with that package installed.

    Args:
        path: the file.
        structures: keys are ``<sid>/<fid>``, both integers.
        tags: integer [N] a structure, as for `write_oc20`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        environment = lmdb.open(str(Path(scratch) / "data.lmdb"), subdir=False, map_size=LMDB_MAP_BYTES, lock=False)
        with environment, torch_geometric_stubs() as stubs, environment.begin(write=True) as transaction:
            for index, (structure, atom_tags) in enumerate(zip(structures, tags, strict=True)):
                record = _torch_geometric_data(stubs, _oc22_fields(structure, np.asarray(atom_tags)))
                transaction.put(str(index).encode(), pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL))
            transaction.put(b"length", pickle.dumps(len(structures), protocol=pickle.HIGHEST_PROTOCOL))
        with lmdb.open(str(Path(scratch) / "data.lmdb"), subdir=False, readonly=True, lock=False) as environment:
            path.unlink(missing_ok=True)
            environment.copy(str(path), compact=True)


def write_mptrj(path: Path, structures: Sequence[Structure]) -> None:
    """One JSON object ``{material: {frame: {...}}}``; what is not known is null, a NaN energy too."""
    materials: dict[str, dict[str, Any]] = {}
    for structure in structures:
        materials.setdefault(structure.group, {})[structure.key] = _mptrj_frame(structure)
    path.write_text(json.dumps(materials, allow_nan=False, separators=(",", ":")), encoding="utf-8")


@contextmanager
def torch_geometric_stubs() -> Iterator[dict[str, type]]:
    """Empty classes under torch_geometric's names, importable while the context lasts: pickle insists on that."""
    places = {
        "Data": "torch_geometric.data.data",
        "DataEdgeAttr": "torch_geometric.data.data",
        "DataTensorAttr": "torch_geometric.data.data",
        "GlobalStorage": "torch_geometric.data.storage",
    }
    names = ("torch_geometric", "torch_geometric.data", "torch_geometric.data.data", "torch_geometric.data.storage")
    stubs = {name: type(name, (), {"__module__": module}) for name, module in places.items()}
    hidden = {name: sys.modules[name] for name in names if name in sys.modules}
    modules = {name: ModuleType(name) for name in names}
    for name, module in places.items():
        setattr(modules[module], name, stubs[name])
    sys.modules.update(modules)
    try:
        yield stubs
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(hidden)


def _torch_geometric_data(stubs: Mapping[str, type], fields: Mapping[str, Any]) -> Any:
    """A stub of ``Data`` with the state that PyG 2 pickles (the storage points back at its owner)."""
    data, storage = stubs["Data"](), stubs["GlobalStorage"]()
    data.__dict__ |= {
        "_edge_attr_cls": stubs["DataEdgeAttr"],
        "_tensor_attr_cls": stubs["DataTensorAttr"],
        "_store": storage,
    }
    storage.__dict__ |= {"_mapping": dict(fields), "_parent": data}
    return data


def _oc22_fields(structure: Structure, tags: NDArray[Any]) -> dict[str, Any]:
    import torch

    system, frame = structure.key.split("/")
    return {
        "y": structure.energy_ev,
        "pos": torch.tensor(structure.positions_angstrom, dtype=torch.float32),
        "cell": torch.tensor(_cell(structure), dtype=torch.float32)[None],
        "atomic_numbers": torch.tensor(structure.numbers, dtype=torch.float32),
        "natoms": len(structure.numbers),
        "force": torch.tensor(_forces(structure), dtype=torch.float32),
        "fixed": torch.zeros(len(structure.numbers)),
        "tags": torch.tensor(tags, dtype=torch.long),
        "nads": int((tags == TAG_ADSORBATE).any()),
        "sid": int(system),
        "fid": int(frame),
        "oc22": 1,
    }


def _extxyz_frame(structure: Structure, tags: NDArray[Any], fixed: NDArray[Any]) -> str:
    """Number formats as in the release: 8 decimals in columns of 15 characters."""
    lattice = " ".join(f"{value:.8f}" for value in _cell(structure).ravel())
    energy = f"{structure.energy_ev:.8f}"
    lines = [
        str(len(structure.numbers)),
        f'Lattice="{lattice}" Properties=species:S:1:pos:R:3:move_mask:L:1:tags:I:1:forces:R:3 '
        f'energy={energy} free_energy={energy} pbc="T T T"',
    ]
    atoms = zip(structure.numbers, structure.positions_angstrom, fixed, tags, _forces(structure), strict=True)
    for number, position, is_fixed, tag, force in atoms:
        symbol, mask = chemical_symbols[number], "F" if is_fixed else "T"
        lines.append(f"{symbol:<2}{_columns(position)} {mask} {tag}{_columns(force)}")
    return "\n".join(lines) + "\n"


def _columns(values: NDArray[np.float64]) -> str:
    return "".join(f" {value:14.8f}" for value in values)


def _mptrj_frame(structure: Structure) -> dict[str, Any]:
    cell = _cell(structure)
    fractional = (structure.positions_angstrom @ np.linalg.inv(cell)).round(10)
    lengths = np.linalg.norm(cell, axis=1)
    cosines = (cell @ cell.T / np.outer(lengths, lengths))[[1, 0, 0], [2, 2, 1]]
    lattice: dict[str, Any] = {"matrix": cell.round(10).tolist()}
    lattice |= zip("abc", lengths.round(8).tolist(), strict=True)
    lattice |= zip(("alpha", "beta", "gamma"), np.degrees(np.arccos(cosines)).round(8).tolist(), strict=True)
    lattice["volume"] = round(float(abs(np.linalg.det(cell))), 8)
    symbols = [chemical_symbols[number] for number in structure.numbers]
    sites = [
        {"species": [{"element": symbol, "occu": 1}], "abc": abc, "xyz": xyz, "label": symbol}
        for symbol, abc, xyz in zip(
            symbols, fractional.tolist(), structure.positions_angstrom.round(8).tolist(), strict=True
        )
    ]
    energy = None if np.isnan(structure.energy_ev) else structure.energy_ev
    return {
        "structure": {
            "@module": "pymatgen.core.structure",
            "@class": "Structure",
            "charge": None,
            "lattice": lattice,
            "sites": sites,
        },
        "uncorrected_total_energy": None,
        "corrected_total_energy": energy,
        "energy_per_atom": None if energy is None else energy / len(structure.numbers),
        "force": _forces(structure).round(8).tolist(),
        "stress": None,
        "magmom": None,
        "mp_id": structure.group,
    }


def _group(structure: Structure) -> str:
    return structure.group


def _cell(structure: Structure) -> NDArray[np.float64]:
    if structure.cell_angstrom is None:
        raise ValueError(f"{structure.source} {structure.key}: has no cell, but this layout must have one")
    return structure.cell_angstrom


def _forces(structure: Structure) -> NDArray[np.float64]:
    if structure.forces_ev_per_angstrom is None:
        raise ValueError(f"{structure.source} {structure.key}: has no forces, but this layout must have them")
    return structure.forces_ev_per_angstrom
