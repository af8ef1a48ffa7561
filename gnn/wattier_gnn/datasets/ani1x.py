"""ANI-1x as released: one HDF5 file, one group a formula, labels in hartree.

Smith et al., "The ANI-1ccx and ANI-1x data sets", Sci. Data 7, 134 (2020), figshare collection 4712477.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from wattier_gnn.datasets.shard import Reader, find_shards, hdf5_array, hdf5_group, open_hdf5
from wattier_gnn.structure import Structure

HARTREE_EV = 27.211386245988  # CODATA 2018
ENERGY = "wb97x_dz.energy"
FORCES = "wb97x_dz.forces"


def shards(path: Path) -> list[Path]:
    """The HDF5 files under `path` (see `find_shards`)."""
    return find_shards(path, (".h5",))


def read(path: Path) -> Iterator[Structure]:
    """All conformers of a file; those whose label was never computed carry NaN, for cleaning to count.

    Raises:
        ShardError: the file is truncated or laid out otherwise.
    """
    with open_hdf5(path) as file:
        for formula in file:
            group = hdf5_group(path, file, formula)
            numbers = hdf5_array(path, group, "atomic_numbers", ("atoms",), np.int64)
            positions = hdf5_array(path, group, "coordinates", ("conformers", len(numbers), 3), np.float64)
            energies = hdf5_array(path, group, ENERGY, (len(positions),), np.float64) * HARTREE_EV
            forces = hdf5_array(path, group, FORCES, positions.shape, np.float64) * HARTREE_EV
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
                    key=f"{formula}/{row}",
                )


READER = Reader("ani1x", shards, read, f"{ENERGY} and {FORCES}, total, hartree turned into eV")
