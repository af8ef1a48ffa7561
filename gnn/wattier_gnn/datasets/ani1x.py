"""ANI-1x as released: one HDF5 file, one group a formula, labels in hartree.

Smith et al., "The ANI-1ccx and ANI-1x data sets", Sci. Data 7, 134 (2020), figshare collection 4712477.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from wattier_gnn.datasets.hdf5 import hdf5_array, hdf5_dataset, hdf5_group, hdf5_names, hdf5_rows, open_hdf5
from wattier_gnn.datasets.shard import Reader, find_shards
from wattier_gnn.structure import BadRecord, ShardError, Structure

HARTREE_EV = 27.211386245988  # CODATA 2018
ENERGY = "wb97x_dz.energy"
FORCES = "wb97x_dz.forces"
ATOMS_AT_ONCE = 100_000


def shards(path: Path) -> list[Path]:
    """The HDF5 files under `path` (see `find_shards`)."""
    return find_shards(path, (".h5",))


def read(path: Path) -> Iterator[Structure | BadRecord]:
    """All conformers of a file; those whose label was never computed carry NaN, for cleaning to count.

    A formula whose arrays do not belong together is one bad record: its conformers cannot be told apart.

    Raises:
        ShardError: the file is truncated or no HDF5.
    """
    with open_hdf5(path) as file:
        for formula in hdf5_names(path, file):
            try:
                yield from _conformers(path, file, formula)
            except ShardError as error:
                yield BadRecord(str(error))


def _conformers(path: Path, file: h5py.File, formula: str) -> Iterator[Structure]:
    group = hdf5_group(path, file, formula)
    numbers = hdf5_array(path, group, "atomic_numbers", ("atoms",), np.int64)
    all_positions = hdf5_dataset(path, group, "coordinates", ("conformers", len(numbers), 3))
    n_conformers = len(all_positions)
    all_energies = hdf5_dataset(path, group, ENERGY, (n_conformers,))
    all_forces = hdf5_dataset(path, group, FORCES, all_positions.shape)
    step = max(1, ATOMS_AT_ONCE // max(1, len(numbers)))
    for start in range(0, n_conformers, step):
        rows = slice(start, min(start + step, n_conformers))
        shape = (rows.stop - start, len(numbers), 3)
        positions = hdf5_rows(path, all_positions, rows, shape, np.float64)
        energies = hdf5_rows(path, all_energies, rows, shape[:1], np.float64) * HARTREE_EV
        forces = hdf5_rows(path, all_forces, rows, shape, np.float64) * HARTREE_EV
        for row in range(len(positions)):
            yield Structure(
                numbers=numbers,
                positions_angstrom=positions[row],
                cell_angstrom=None,
                pbc=(False, False, False),
                energy_ev=float(energies[row]),
                forces_ev_per_angstrom=forces[row],
                source="ani1x",
                group=formula,
                key=f"{formula}/{start + row}",
            )


READER = Reader(
    "ani1x",
    shards,
    read,
    f"{ENERGY} and {FORCES}, total, hartree turned into eV",
    method="wB97X/6-31G(d), molecules in vacuum",
    licence="CC0-1.0",
    citation="Smith et al., Sci. Data 7, 134 (2020), doi:10.1038/s41597-020-0473-z",
)
