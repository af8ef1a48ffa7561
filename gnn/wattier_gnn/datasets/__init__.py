"""Readers of the released layouts: ANI-1x, QM7-X, OC20, OC22, MPtrj, and any extended XYZ file or ASE database."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from wattier_gnn.datasets import ani1x, ase_db, extxyz, mptrj, oc20, oc22, qm7x
from wattier_gnn.datasets.ase_row import SYMBOLS
from wattier_gnn.datasets.shard import Reader

READERS: Mapping[str, Reader] = MappingProxyType(
    {
        reader.name: reader
        for reader in (ani1x.READER, qm7x.READER, oc20.READER, oc22.READER, mptrj.READER, extxyz.READER, ase_db.READER)
    }
)

__all__ = ["READERS", "SYMBOLS", "Reader"]
