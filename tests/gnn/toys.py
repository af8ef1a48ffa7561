"""Ingestions of the sample, and of a source ``toy`` whose files yield what a test says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from wattier_gnn.ingest import ingest
from wattier_gnn.sample import sample_path
from wattier_gnn.store import Store
from wattier_gnn.structure import Structure

SOURCES = ("oc22", "qm7x", "ani1x")


def make(folder: Path, paths: dict[str, Path] | None = None, **changes: Any) -> tuple[Store, list[str]]:
    said: list[str] = []
    options: dict[str, Any] = {
        "cutoff_angstrom": 2.5, "max_force_ev_per_angstrom": 100.0, "on_bad": "skip", "seed": 1, "workers": 1,
        "split": {"train": 0.8, "val": 0.1, "test": 0.1}, "say": said.append,
    }  # fmt: skip
    store = ingest(paths or {name: sample_path(name) for name in SOURCES}, folder, **{**options, **changes})
    return store, said


def structure(k: int, **changes: Any) -> Structure:
    rng = np.random.default_rng(k)
    values: dict[str, Any] = {
        "numbers": np.array([6, 1, 1]), "positions_angstrom": rng.normal(size=(3, 3)), "cell_angstrom": None,
        "pbc": (False, False, False), "energy_ev": -40.0 + rng.normal(),
        "forces_ev_per_angstrom": rng.normal(size=(3, 3)), "source": "toy", "group": f"g{k // 4}", "key": f"k{k}",
    }  # fmt: skip
    return Structure(**{**values, **changes})
