"""OC22 S2EF-Total in all its layouts: LMDB files of pickles (the release), ASE-LMDB files, raw trajectories.

Tran et al., "The Open Catalyst 2022 (OC22) dataset and challenges", ACS Catal. 13, 3066 (2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from wattier_gnn.datasets.fairchem import Names, read_aselmdb, read_lmdb, read_trajectory
from wattier_gnn.datasets.shard import Reader, find_shards, one_layout
from wattier_gnn.structure import BadRecord, Structure

NAMES = Names("oc22", "{sid}", "{sid}/{fid}")


def shards(path: Path) -> list[Path]:
    """The LMDB or trajectory files under `path` (see `find_shards`), all of one layout."""
    return one_layout(path, find_shards(path, (".lmdb", ".aselmdb", ".traj")))


def read(path: Path) -> Iterator[Structure | BadRecord]:
    """All records of a file in the order of their keys.

    Raises:
        ShardError: the file is truncated or of another format.
    """
    if path.suffix == ".traj":
        return read_trajectory(path, NAMES.source)
    return read_aselmdb(path, NAMES) if path.suffix == ".aselmdb" else read_lmdb(path, NAMES)


READER = Reader(
    "oc22",
    shards,
    read,
    "y (DFT total, eV; `energy` in newer files) and force (`forces`), all atoms free",
    method="PBE+U, spin-polarised (VASP), oxide slabs with and without adsorbates",
    licence="CC-BY-4.0",
    citation="Tran et al., ACS Catal. 13, 3066 (2023), doi:10.1021/acscatal.2c05426",
    one_layout=True,
)
