"""How figures are written for people; records keep plain joules and seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence

JOULES_PER_KWH = 3.6e6
UNKNOWN = "unknown"
_JOULE_SCALES = ((1.0, "J", 1e3), (1e3, "kJ", 1e6), (1e6, "MJ", JOULES_PER_KWH), (JOULES_PER_KWH, "kWh", math.inf))


def format_joules(joules: float | None) -> str:
    """Joules as J, kJ, MJ, and kWh beyond 3.6 MJ, to three digits; None is `unknown`, never 0."""
    if joules is None or not math.isfinite(joules):
        return UNKNOWN
    size = float(f"{abs(joules):.3g}")  # rounded first: 999.9 J is 1.00 kJ, not 1,000 J
    scale, unit = next((scale, unit) for scale, unit, limit in _JOULE_SCALES if size < limit)
    return f"{three_digits(joules / scale)} {unit}"


def format_joules_alike(values: Sequence[float | None]) -> list[str]:
    """Joules that stand in one column: all in the unit of the largest, to three digits each."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    size = float(f"{max(map(abs, known), default=0.0):.3g}")
    scale, unit = next((scale, unit) for scale, unit, limit in _JOULE_SCALES if size < limit)
    return [
        UNKNOWN if value is None or not math.isfinite(value) else f"{three_digits(value / scale)} {unit}"
        for value in values
    ]


def format_seconds(seconds: float | None) -> str:
    """Seconds as s, min or h; None is `unknown`."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    for limit, scale, unit in ((120.0, 1.0, "s"), (7200.0, 60.0, "min"), (math.inf, 3600.0, "h")):
        if seconds < limit:
            return f"{three_digits(seconds / scale)} {unit}"
    return UNKNOWN


def format_loss(loss: float) -> str:
    """A loss to four decimals, or to four digits where it is too small or too large for that."""
    return f"{loss:.4f}" if loss == 0 or 1e-2 <= abs(loss) < 1e5 else f"{loss:.4g}"


def format_bytes(size: float) -> str:
    """Bytes as B, kB, MB, GB or TB, to three digits."""
    for limit, scale, unit in ((1e3, 1.0, "B"), (1e6, 1e3, "kB"), (1e9, 1e6, "MB"), (1e12, 1e9, "GB")):
        if size < limit:
            return f"{three_digits(size / scale)} {unit}"
    return f"{three_digits(size / 1e12)} TB"


def format_ratio(ratio: float | None) -> str:
    """A ratio as per cent; None is `unknown`."""
    if ratio is None or not math.isfinite(ratio):
        return UNKNOWN
    percent = 100 * ratio
    if 0 < percent < 0.1:
        return "< 0.1 %"
    return f"{percent:.1f} %" if abs(percent) < 9.95 else f"{percent:,.0f} %"


def three_digits(value: float) -> str:
    """A number to three significant digits, without an exponent."""
    rounded = float(f"{value:.3g}")
    if rounded == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}"
