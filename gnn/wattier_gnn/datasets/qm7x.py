"""QM7-X as released: HDF5 files of molecules (`idmol`), each with its conformations (`idconf`), labels in eV.

Hoja et al., "QM7-X, a comprehensive dataset of quantum-mechanical properties", Sci. Data 8, 43 (2021), Zenodo 4288677.
The dispersion-free pair (ePBE0, pbe0FOR) is taken; (ePBE0+MBD, totFOR) would be as consistent, a mixture would not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from wattier_gnn.datasets.shard import Reader, find_shards, hdf5_array, hdf5_group, open_hdf5
from wattier_gnn.structure import Structure


def shards(path: Path) -> list[Path]:
    """The HDF5 files under `path` (see `find_shards`)."""
    return find_shards(path, (".hdf5",))


def read(path: Path) -> Iterator[Structure]:
    """All conformations of all molecules of a file.

    Raises:
        ShardError: the file is truncated or laid out otherwise.
    """
    with open_hdf5(path) as file:
        for idmol in file:
            molecule = hdf5_group(path, file, idmol)
            for idconf in molecule:
                conformation = hdf5_group(path, molecule, idconf)
                numbers = hdf5_array(path, conformation, "atNUM", ("atoms",), np.int64)
                shape = (len(numbers), 3)
                yield Structure(
                    numbers=numbers,
                    positions_angstrom=hdf5_array(path, conformation, "atXYZ", shape, np.float64),
                    cell_angstrom=None,
                    pbc=(False, False, False),
                    energy_ev=float(hdf5_array(path, conformation, "ePBE0", (1,), np.float64)[0]),
                    forces_ev_per_angstrom=hdf5_array(path, conformation, "pbe0FOR", shape, np.float64),
                    source="qm7x",
                    group=idmol,
                    key=f"{idmol}/{idconf}",
                )


READER = Reader("qm7x", shards, read, "ePBE0 and pbe0FOR, total, eV, without many-body dispersion")
