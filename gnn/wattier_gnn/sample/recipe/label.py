"""Labels geometries one at a time into a work folder; killed and started again it goes on where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import read, write

Labeller = Callable[[Atoms], tuple[float, Any]]


def label_frames(
    frames: Iterable[tuple[str, str, Atoms]], labeller: Labeller, path: Path, say: Callable[[str], None]
) -> list[Atoms]:
    """Append (key, group, structure) to an extxyz file with ``energy`` and ``forces`` labels; skip keys it holds."""
    done = {atoms.info["key"] for atoms in read(path, index=":")} if path.exists() else set()
    started, labelled = time.monotonic(), 0
    for key, group, atoms in frames:
        if key in done:
            continue
        try:
            energy_ev, forces = labeller(atoms)
        except RuntimeError as error:
            say(f"{path.stem}: {key} left out: {error}")
            continue
        record = Atoms(atoms.numbers, atoms.get_positions(), cell=atoms.cell, pbc=atoms.pbc)
        record.info |= {"key": key, "group": group, "label_energy": energy_ev}
        for name in ("tags", "fixed"):
            if name in atoms.arrays:
                record.arrays[name] = atoms.arrays[name]
        record.info |= {k: json.dumps(v) for k, v in atoms.info.items()}
        record.arrays["label_forces"] = np.asarray(forces, dtype=float)
        write(path, record, append=True)
        labelled += 1
        if labelled % 20 == 0:
            say(f"{path.stem}: {labelled} labelled, {(time.monotonic() - started) / labelled:.2f} s each")
    result = read(path, index=":")
    return result if isinstance(result, list) else [result]
