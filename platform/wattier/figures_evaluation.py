"""Figures of the ensemble on held-out structures: parity with density and error bars, calibration, coverage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from wattier.figure_style import BLUE, GREY, ORANGE, lay_out, rounded, safe
from wattier.units import format_ratio, three_digits
from wattier.views import EvaluationInfo
from wattier.views_evaluation import CoverageRow

GRID = 24  # cells a side, in which neighbours are counted where the evaluation has not
MOST_POINTS = 700
_QUANTITIES = {
    "energy": ("energy", "eV/atom", "ev_per_atom"),
    "forces": ("force", "eV/Å", "ev_per_angstrom"),
}


def parity_density_figure(info: EvaluationInfo, source: str, quantity: str) -> go.Figure | None:
    """Predicted against true, coloured by how many points lie close by; None without points."""
    true, predicted, series, unit = _points(info, source, quantity)
    if not true:
        return None
    density = _kept(series.get(f"{_QUANTITIES[quantity][0]}_density")) or _density(true, predicted)
    order = np.argsort(density)  # the crowded ones on top
    colours = [math.log10(max(1.0, density[i])) for i in order]
    figure = _diagonal(true, predicted)
    figure.add_scatter(
        x=rounded(true[i] for i in order),
        y=rounded(predicted[i] for i in order),
        mode="markers",
        name=safe(source),
        marker={
            "color": rounded(colours),
            "colorscale": "Cividis",
            "reversescale": True,
            "size": 5,
            "line": {"width": 0.3, "color": GREY},
            "colorbar": _density_bar(max(colours)),
        },
        hovertemplate=f"true %{{x:.4g}}, predicted %{{y:.4g}} {unit}<extra></extra>",
    )
    _square(figure, safe(source), unit)
    return figure


def parity_bars_figure(info: EvaluationInfo, source: str, quantity: str) -> go.Figure | None:
    """Predicted against true with bars: the interval where there is one, else the calibrated spread; None without."""
    true, predicted, series, unit = _points(info, source, quantity)
    name, _, suffix = _QUANTITIES[quantity]
    interval = _kept(series.get(f"{name}_interval_{suffix}"))
    bars = interval or _kept(series.get(f"{name}_std_{suffix}"))
    if not true or not bars:
        return None
    figure = _diagonal(true, predicted)
    figure.add_scatter(
        x=rounded(true),
        y=rounded(predicted),
        mode="markers",
        name=safe(source),
        marker={"color": BLUE, "size": 5, "opacity": 0.7},
        error_y={"array": rounded(bars), "color": BLUE, "thickness": 0.8, "width": 0},
        hovertemplate=f"true %{{x:.4g}}, predicted %{{y:.4g}} ± %{{error_y.array:.2g}} {unit}<extra></extra>",
    )
    _square(figure, safe(source), unit)
    return figure


def calibration_figure(info: EvaluationInfo) -> go.Figure:
    """Share of errors inside each predicted interval: below the diagonal the model is too sure of itself."""
    figure = go.Figure()
    line = {"color": GREY, "dash": "dash", "width": 1.5}
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line=line, name="perfect", hoverinfo="skip")
    for name, colour, dash in (("energy", BLUE, "solid"), ("forces", ORANGE, "dot")):
        part = info.calibration.get(name)
        if part and part.get("expected"):
            area = part.get("miscalibration_area")
            label = name if area is None else f"{name} (miscalibration area {three_digits(area)})"
            figure.add_scatter(
                x=rounded(part["expected"]),
                y=rounded(part["observed"]),
                mode="lines",
                line={"color": colour, "width": 2.5, "dash": dash},
                name=label,
                hovertemplate="%{y:.0%} of the errors are inside the %{x:.0%} interval<extra></extra>",
            )
    title = "Below the diagonal the ensemble is too sure of itself"
    lay_out(figure, title, "expected share inside the interval", "observed share inside", height=430)
    ratio = {"range": [-0.01, 1.01], "tickformat": ".0%"}
    figure.update_xaxes(**ratio)
    figure.update_yaxes(**ratio)
    figure.update_layout(margin_t=16)
    return figure


def coverage_figure(rows: Sequence[CoverageRow], quantity: str) -> go.Figure | None:
    """Observed coverage by source, with its binomial band; None without intervals."""
    known = [row for row in rows if row.quantity == quantity and row.observed is not None]
    if not known:
        return None
    figure = go.Figure()
    names = [safe(row.source) for row in known]
    for row, name in zip(known, names, strict=True):
        if row.band_low is not None and row.band_high is not None:
            figure.add_scatter(
                x=rounded([row.band_low, row.band_high]), y=[name, name], mode="lines", hoverinfo="skip",
                line={"color": GREY, "width": 9}, opacity=0.45, name="99 % band", showlegend=row is known[0],
            )  # fmt: skip
    outside = [row.is_inside is False for row in known]
    figure.add_scatter(
        x=rounded(row.observed for row in known),
        y=names,
        mode="markers",
        name="observed",
        marker={
            "color": [ORANGE if out else BLUE for out in outside],
            "symbol": ["x" if out else "circle" for out in outside],
            "size": 11,
        },
        text=[f"{row.n:,}" if row.n is not None else "unknown" for row in known],
        hovertemplate="%{y}: %{x:.1%} of %{text}<extra></extra>",
    )
    target = known[0].target
    if target is not None:
        figure.add_vline(x=target, line={"color": GREY, "dash": "dash", "width": 1.5})
    title = f"{quantity.capitalize()}: coverage of the {format_ratio(target)} intervals (dashed: stated; ✕: outside)"
    lay_out(figure, title, "share of held-out values inside", "", height=170 + 34 * len(known))
    low = min(min(row.observed or 0.0, row.band_low or 1.0) for row in known)
    figure.update_xaxes(tickformat=".0%", range=[max(0.0, low - 0.05), 1.02])
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1])
    figure.update_layout(margin={"t": 16, "l": 10})
    return figure


def _points(info: EvaluationInfo, source: str, quantity: str) -> tuple[list[float], list[float], Any, str]:
    name, unit, suffix = _QUANTITIES[quantity]
    series = info.parity.get(source) or {}
    true = _kept(series.get(f"{name}_true_{suffix}"))
    return true, _kept(series.get(f"{name}_predicted_{suffix}")), series, unit


def _kept(values: Sequence[float | None] | None) -> list[float]:
    """Evenly so many; what is not known is drawn nowhere."""
    known = list(values or [])
    step = max(1, -(-len(known) // MOST_POINTS))
    return [math.nan if value is None else float(value) for value in known[::step]]


def _density(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """Points in the cell of each point, of a grid over all of them."""
    points = np.array([x, y], dtype=np.float64)
    low, high = np.nanmin(points, axis=1, keepdims=True), np.nanmax(points, axis=1, keepdims=True)
    span = np.where(high > low, high - low, 1.0)
    cells = np.nan_to_num((points - low) / span * (GRID - 1)).astype(int)
    counts = np.zeros((GRID, GRID))
    np.add.at(counts, (cells[0], cells[1]), 1)
    return [float(count) for count in counts[cells[0], cells[1]]]


def _density_bar(most: float) -> dict[str, Any]:
    ticks = [value for value in (1, 3, 10, 30, 100, 300, 1000) if math.log10(value) <= most + 0.01]
    return {
        "title": {"text": "points<br>close by", "font": {"size": 12}},
        "tickvals": [math.log10(value) for value in ticks],
        "ticktext": [str(value) for value in ticks],
        "thickness": 10,
        "len": 0.9,
        "x": 1.01,
    }


def _diagonal(true: Sequence[float], predicted: Sequence[float]) -> go.Figure:
    known = [value for value in (*true, *predicted) if math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    figure = go.Figure()
    line = {"color": GREY, "dash": "dash", "width": 1.2}
    figure.add_scatter(x=rounded([low, high]), y=rounded([low, high]), mode="lines", line=line, hoverinfo="skip")
    return figure


def _square(figure: go.Figure, title: str, unit: str) -> None:
    lay_out(figure, title, f"true ({unit})", f"predicted ({unit})", height=320)
    figure.update_layout(showlegend=False, margin={"t": 10, "l": 56, "r": 8, "b": 46})
    figure.update_xaxes(nticks=5)
    figure.update_yaxes(nticks=6)
