"""Ensembles of untrained members, for what does not depend on what they say."""

from __future__ import annotations

from typing import Any

import numpy as np

from wattier_gnn.ensemble import Ensemble
from wattier_gnn.model import ModelConfig, build_model

NUMBERS = [1, 6, 8, 11, 13, 14, 17, 26, 29]


def untrained(*, members: int = 3, parts: dict[str, Any] | None = None, **changes: Any) -> Ensemble:
    """Members of other seeds, cutoffs and sizes, of sources a and b, that know the elements `NUMBERS`.

    parts: further fields of the ensemble.
    """
    references = np.zeros((2, 119))
    references[:, NUMBERS] = -0.1 * np.array(NUMBERS)
    models = []
    for seed in range(members):
        config: dict[str, Any] = {
            "sources": ("a", "b"), "energy_scale_ev": (50.0, 100.0), "mean_neighbors": 12.0,
            "cutoff_angstrom": 4.0 - 0.5 * (seed % 2), "hidden_dim": 12 + 4 * seed, "n_layers": 2, "n_radial": 6,
            "head_dim": 10,
        }  # fmt: skip
        models.append(build_model(ModelConfig(**{**config, **changes}), seed))
    return Ensemble(tuple(models), references, **(parts or {}))
