"""QM7-X as released: HDF5 files of molecules (`idmol`), each with its conformations (`idconf`), labels in eV.

Hoja et al., "QM7-X, a comprehensive dataset of quantum-mechanical properties", Sci. Data 8, 43 (2021), Zenodo 4288677.
The dispersion-free pair (ePBE0, pbe0FOR) is taken; (ePBE0+MBD, totFOR) would be as consistent, a mixture would not.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from wattier_gnn.datasets.hdf5 import hdf5_array, hdf5_group, hdf5_names, open_hdf5
from wattier_gnn.datasets.shard import Reader, find_shards, or_bad
from wattier_gnn.structure import BadRecord, ShardError, Structure


def shards(path: Path) -> list[Path]:
    """The HDF5 files under `path` (see `find_shards`)."""
    return find_shards(path, (".hdf5",))


def read(path: Path) -> Iterator[Structure | BadRecord]:
    """All conformations of all molecules of a file.

    Raises:
        ShardError: the file is truncated or no HDF5.
    """
    with open_hdf5(path) as file:
        for idmol in hdf5_names(path, file):
            try:
                molecule = hdf5_group(path, file, idmol)
            except ShardError as error:
                yield BadRecord(str(error))
                continue
            for idconf in hdf5_names(path, molecule):
                yield or_bad(path, partial(_conformation, path, molecule, idmol, idconf))


def _conformation(path: Path, molecule: h5py.Group, idmol: str, idconf: str) -> Structure:
    group = hdf5_group(path, molecule, idconf)
    numbers = hdf5_array(path, group, "atNUM", ("atoms",), np.int64)
    shape = (len(numbers), 3)
    return Structure(
        numbers=numbers,
        positions_angstrom=hdf5_array(path, group, "atXYZ", shape, np.float64),
        cell_angstrom=None,
        pbc=(False, False, False),
        energy_ev=float(hdf5_array(path, group, "ePBE0", (1,), np.float64)[0]),
        forces_ev_per_angstrom=hdf5_array(path, group, "pbe0FOR", shape, np.float64),
        source="qm7x",
        group=idmol,
        key=f"{idmol}/{idconf}",
    )


READER = Reader(
    "qm7x",
    shards,
    read,
    "ePBE0 and pbe0FOR, total, eV, without many-body dispersion",
    method="PBE0, tight numeric atomic orbitals (FHI-aims), at DFTB3+MBD geometries, molecules in vacuum",
    licence="CC-BY-4.0",
    citation="Hoja et al., Sci. Data 8, 43 (2021), doi:10.1038/s41597-021-00812-2",
)
