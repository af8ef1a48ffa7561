"""Structures of a store as extended XYZ, which most tools read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, TextIO

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.extxyz import key_val_dict_to_str, key_val_str_to_dict, write_xyz


def write_frames(file: TextIO, arrays: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Append one frame for each structure.

    Args:
        file: to write to.
        arrays: of the structures, as `store.structures_to_arrays` lays them out; energies are totals [eV].
        info: name -> one value for each structure, for the comment line.
    """
    for k, (start, stop) in enumerate(pairwise(arrays["atom_offset"].tolist())):
        cell = arrays["cells"][k]
        atoms = Atoms(
            numbers=arrays["numbers"][start:stop],
            positions=arrays["positions"][start:stop],
            cell=cell if cell.any() else None,
            pbc=arrays["pbc"][k],
            info={name: values[k] for name, values in info.items()},
        )
        known = bool(arrays["force_mask"][start:stop].all())
        forces = {"forces": np.array(arrays["forces"][start:stop])} if known else {}
        atoms.calc = SinglePointCalculator(atoms, energy=float(arrays["energy"][k]), **forces)
        write_xyz(file, [atoms], write_results=True)


def readable(text: str) -> str:
    """What to put in a comment line so that ASE reads `text` there, as a number where it looks like one.

    ASE itself writes some texts, such as an empty one or one with a line break, so that the line cannot be read again.
    """
    if text.isprintable() and str(key_val_str_to_dict(key_val_dict_to_str({"text": text})).get("text")) == text:
        return text
    return "_JSON " + json.dumps(text).replace("\\", "\\\\")  # ASE escapes quotes, and takes one backslash away
