"""What a manifest says of how sure an ensemble is: fields of `Ensemble` beside members and references."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from wattier_gnn.ensemble import Ensemble
from wattier_gnn.structure import DataError

SCALES = ("energy_std_scale", "forces_std_scale")


def ensemble_blocks(ensemble: Ensemble) -> dict[str, Any]:
    """JSON-ready, for a manifest."""
    return {"calibration": {name: getattr(ensemble, name) for name in SCALES}}


def ensemble_parts(
    blocks: Mapping[str, Any] | None,
    sources: Sequence[str],  # noqa: ARG001
    n_members: int,  # noqa: ARG001
) -> dict[str, Any]:
    """Fields of an `Ensemble`, inverse of `ensemble_blocks`.

    Raises:
        DataError: a field is missing or no such thing.
    """
    calibration, found = (blocks or {}).get("calibration", {}), {}
    for name in SCALES:
        value: Any = calibration.get(name) if isinstance(calibration, dict) else None
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise DataError(f"calibration.{name} is {value!r:.40}, but must be a number of 0 or more")
        found[name] = float(value)
    return found
