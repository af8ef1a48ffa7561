# ruff: noqa: TRY004  (a bad type in a file is bad data, and its reader catches ValueError)
"""What was read from a JSON file, held against what it must be; an error says where it is and what is wrong."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any


def checked_table(data: Any, where: str, *, required: set[str], optional: Collection[str] = ()) -> Mapping[str, Any]:
    """Return the data as an object that has what is required, and nothing that is neither that nor optional.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where}: must be a JSON object, not {type(data).__name__}")
    if missing := required - data.keys():
        raise ValueError(f"{where}: missing {', '.join(sorted(missing))}")
    if unknown := data.keys() - required - set(optional):
        raise ValueError(f"{where}: unknown {', '.join(sorted(map(str, unknown)))}")
    return data


def checked_number(table: Mapping[str, Any], name: str, where: str) -> float:
    """Return one of its values as a finite number.

    Raises:
        ValueError: It is none.
    """
    value = table[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: {name} must be a finite number, not {value!r}")
    return float(value)
