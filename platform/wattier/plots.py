"""Figures of a run, drawn from the tuples of `wattier.views`; nothing is computed here but where to put the ink."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from wattier.rundir import FULL_STAGE
from wattier.units import format_joules, format_ratio, three_digits
from wattier.views import Curve, EvaluationInfo, LedgerInfo, ParetoInfo, ParetoPoint

# Okabe and Ito's palette, told apart by every kind of colour vision (https://jfly.uni-koeln.de/color/).
ORANGE, BLUE, GREEN, SKY, PURPLE, GREY = "#D55E00", "#0072B2", "#009E73", "#56B4E9", "#CC79A7", "#8A929E"
INK, FAINT = "#1F2933", "#E4E8EE"
KIND_COLOURS = {"accurate": ORANGE, "balanced": BLUE, "candidate": GREEN}
METHOD_COLOURS = {"counter": BLUE, "integrated": SKY, "estimated": ORANGE}
_FONT = "Inter, 'Segoe UI', 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"
_LOG_SPAN = 10.0
MOST_DECADES = 10

_AXIS = {
    "gridcolor": FAINT,
    "linecolor": GREY,
    "ticks": "outside",
    "tickcolor": GREY,
    "zeroline": False,
    "automargin": True,
    "exponentformat": "SI",
    "title": {"standoff": 10},
}
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": _FONT, "size": 14, "color": INK},
        "title": {
            "font": {"size": 16, "weight": 600},
            "x": 0,
            "xanchor": "left",
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 14},
        },
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "margin": {"l": 70, "r": 20, "t": 56, "b": 60},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "legend": {"orientation": "h", "y": -0.2, "x": 0, "title": {"text": ""}},
        "hoverlabel": {"bgcolor": "white", "font": {"family": _FONT}},
    }
)


def pareto_figure(info: ParetoInfo) -> go.Figure:
    """Accuracy against energy: the front, the tiers in colour, trials that never finished hollow."""
    figure = go.Figure()
    if len(info.front) > 1:
        x, y = [point[1] for point in info.front], [point[0] for point in info.front]
        line = {"color": GREY, "width": 1.5, "dash": "dot"}
        figure.add_scatter(x=x, y=y, mode="lines", line=line, name="Pareto front", hoverinfo="skip")
    kinds = dict.fromkeys(point.kind for point in info.points)
    for kind in sorted(kinds, key=lambda kind: (kind not in KIND_COLOURS, kind)):
        figure.add_trace(_points_trace(kind, [p for p in info.points if p.kind == kind]))
    _layout(figure, _pareto_title(info), "energy of the trial (J)", "validation loss", height=480)
    _log_if_wide(figure, "x", [p.energy_joules for p in info.points])
    _log_if_wide(figure, "y", [p.val_loss for p in info.points])
    return figure


def learning_curves_figure(curves: Sequence[Curve]) -> go.Figure:
    """Validation loss by epoch of the trials of one stage: picked ones in colour, stopped ones dotted."""
    figure = go.Figure()
    named: set[str] = set()
    for curve in sorted(curves, key=lambda c: (c.tier is not None, c.trial_id)):  # the picked ones on top
        name = curve.tier or curve.status
        colour = KIND_COLOURS.get(name, GREY)
        dash = "solid" if curve.tier or curve.status == "complete" else "dot"
        figure.add_scatter(
            x=list(curve.epochs),
            y=list(curve.val_loss),
            mode="lines+markers" if len(curve.epochs) < 30 else "lines",
            line={"color": colour, "width": 2.5 if curve.tier else 1.2, "dash": dash},
            marker={"size": 5},
            opacity=1.0 if curve.tier else 0.7,
            name=name,
            legendgroup=name,
            showlegend=name not in named,
            text=[_safe(curve.trial_id)] * len(curve.epochs),
            customdata=[format_joules(joules) for joules in curve.energy_joules],
            hovertemplate="%{text}<br>epoch %{x}, loss %{y:.4g}<br>%{customdata} so far<extra></extra>",
        )
        named.add(name)
    _layout(figure, _curves_title(curves), "epoch", "validation loss")
    _log_if_wide(figure, "y", [loss for curve in curves for loss in curve.val_loss if loss is not None])
    if max(epoch for curve in curves for epoch in curve.epochs) < 12:
        figure.update_xaxes(dtick=1)  # whole epochs
    return figure


def ledger_figure(info: LedgerInfo) -> go.Figure:
    """Joules by phase, coloured by how they are known; an unknown phase says so instead of drawing a zero."""
    figure = go.Figure()
    total = info.total.joules
    for method in [*METHOD_COLOURS, None]:
        phases = [p for p in info.phases if p.method == method]
        if not phases:
            continue
        labels = [_joules_label(phase.joules, total) for phase in phases]
        pattern = "/" if method == "estimated" else ""
        figure.add_bar(
            y=[_safe(p.phase) for p in phases],
            x=[p.joules or 0 for p in phases],
            orientation="h",
            name=method or "unknown",
            marker={
                "color": METHOD_COLOURS.get(method or "", GREY),
                "pattern": {"shape": pattern, "fillmode": "overlay", "fgcolor": "white"},
            },
            text=labels,
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{text}<extra></extra>",
        )
    known = [p for p in info.phases if p.joules is not None]
    dearest = max(known, key=lambda p: p.joules or 0.0, default=None)
    title = "No phase has known joules"
    if dearest is not None and dearest.joules is not None and total:
        title = f"{_safe(dearest.phase)} took {format_ratio(dearest.joules / total)} of {format_joules(total)}"
    _layout(figure, title[:1].upper() + title[1:], "energy (J)", "", height=190 + 46 * len(info.phases))
    figure.update_yaxes(categoryorder="array", categoryarray=[_safe(p.phase) for p in info.phases][::-1])
    figure.update_xaxes(range=[0, 1.3 * max((p.joules or 0.0 for p in info.phases), default=1.0) or 1.0])
    figure.update_layout(barmode="overlay", showlegend=True, legend_y=-0.35)
    return figure


def energy_parity_figure(info: EvaluationInfo) -> go.Figure:
    """Predicted against true energy by source, with the calibrated spread as error bars."""
    figure = _parity_grid(
        info,
        ("energy_true_ev_per_atom", "energy_predicted_ev_per_atom"),
        "Energies of held-out structures: on the diagonal is right, bars show the predicted spread",
        "eV/atom",
        BLUE,
    )
    for trace, series in zip(figure.data[1::2], info.parity.values(), strict=True):
        spread = series.get("energy_std_ev_per_atom") or []
        trace.error_y = {"array": spread, "color": BLUE, "thickness": 0.8, "width": 0}
    return figure


def force_parity_figure(info: EvaluationInfo) -> go.Figure:
    """Predicted against true force components by source."""
    return _parity_grid(
        info,
        ("force_true_ev_per_angstrom", "force_predicted_ev_per_angstrom"),
        "Force components of held-out structures: on the diagonal is right",
        "eV/Å",
        GREEN,
    )


def calibration_figure(info: EvaluationInfo) -> go.Figure:
    """Share of errors inside each predicted interval: below the diagonal the model is too sure of itself."""
    figure = go.Figure()
    line = {"color": GREY, "dash": "dash", "width": 1.5}
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line=line, name="perfect", hoverinfo="skip")
    for name, colour in (("energy", BLUE), ("forces", ORANGE)):
        part = info.calibration.get(name)
        if part and part.get("expected"):
            area = part.get("miscalibration_area")
            label = name if area is None else f"{name} (miscalibration area {three_digits(area)})"
            line = {"color": colour, "width": 2.5}
            x, y = list(part["expected"]), list(part["observed"])
            figure.add_scatter(x=x, y=y, mode="lines", line=line, name=label)
    title = "Calibration: below the diagonal the ensemble is too sure of itself"
    _layout(figure, title, "expected share inside the interval", "observed share inside", height=460)
    ratio = {"range": [-0.01, 1.01], "tickformat": ".0%"}
    figure.update_xaxes(**ratio)
    figure.update_yaxes(**ratio)
    return figure


def _points_trace(kind: str, points: Sequence[ParetoPoint]) -> go.Scatter:
    finished = kind in KIND_COLOURS
    colour = KIND_COLOURS.get(kind, GREY)
    picked = kind in ("accurate", "balanced")
    return go.Scatter(
        x=[p.energy_joules for p in points],
        y=[p.val_loss for p in points],
        mode="markers+text" if picked else "markers",
        text=[_safe(p.trial_id) for p in points],
        textposition="top right",
        textfont={"size": 12, "color": colour},
        name={"pruned": "stopped early, not compared", "complete": "finished, not compared"}.get(kind, kind),
        marker={
            "color": colour,
            "size": 13 if picked else 9,
            "symbol": {"accurate": "diamond", "balanced": "circle"}.get(kind, "circle" if finished else "circle-open"),
            "line": {"color": "white" if finished else colour, "width": 1.2},
        },
        customdata=[[format_joules(p.energy_joules), p.epochs_done, p.epochs] for p in points],
        hovertemplate=(
            "%{text}<br>loss %{y:.4g}, %{customdata[0]}<br>%{customdata[1]} of %{customdata[2]} epochs<extra></extra>"
        ),
    )


def _pareto_title(info: ParetoInfo) -> str:
    stage = _safe(info.stage)
    if not info.front:
        return f"Stage {stage}: no trial can be compared yet"
    finished = [p for p in info.points if p.kind in KIND_COLOURS]
    best = min(finished, key=lambda p: p.val_loss)
    cheap = min(finished, key=lambda p: p.energy_joules)
    if best.trial_id == cheap.trial_id:
        return f"Stage {stage}: the most accurate trial is the cheapest, too (lower left is better)"
    share = format_ratio(cheap.energy_joules / best.energy_joules)
    return f"Stage {stage}: the front runs from {share} to 100 % of the best trial's joules (lower left is better)"


def _curves_title(curves: Sequence[Curve]) -> str:
    stage = _safe(curves[0].stage)
    title = "Full training" if stage == FULL_STAGE else f"Stage {stage}"
    finished = [(loss, c.trial_id) for c in curves if c.status == "complete" for loss in c.val_loss if loss is not None]
    if not finished:
        return f"{title}: no trial has finished yet"
    loss, trial_id = min(finished)
    cut = "; dotted trials were cut short" if any(c.status != "complete" for c in curves) else ""
    return f"{title}: {_safe(trial_id)} reaches the lowest loss, {loss:.3g}{cut}"


def _parity_grid(info: EvaluationInfo, names: tuple[str, str], title: str, unit: str, colour: str) -> go.Figure:
    sources = list(info.parity)
    columns = min(3, max(1, len(sources)))
    rows = max(1, math.ceil(len(sources) / columns))
    gap = min(0.22, 0.5 / rows)
    titles = [_safe(source) for source in sources]
    figure = make_subplots(rows, columns, subplot_titles=titles, horizontal_spacing=0.1, vertical_spacing=gap)
    for index, source in enumerate(sources):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        true, predicted = (list(info.parity[source].get(name) or []) for name in names)
        low, high = _limits([*true, *predicted])
        line = {"color": GREY, "dash": "dash", "width": 1.2}
        figure.add_scatter(x=[low, high], y=[low, high], mode="lines", line=line, hoverinfo="skip", **place)
        marker = {"color": colour, "size": 5, "opacity": 0.55}
        figure.add_scatter(x=true, y=predicted, mode="markers", marker=marker, name=_safe(source), **place)
        figure.update_xaxes(title_text=f"true ({unit})", nticks=5, **place)
        figure.update_yaxes(title_text=f"predicted ({unit})" if place["col"] == 1 else "", nticks=6, **place)
    figure.update_layout(template=TEMPLATE, title_text=title, height=110 + 300 * rows, showlegend=False)
    figure.update_layout(margin_t=84)
    return figure


def _layout(figure: go.Figure, title: str, x_title: str, y_title: str, *, height: int = 420) -> None:
    figure.update_layout(template=TEMPLATE, title_text=title, height=height, showlegend=True)
    figure.update_xaxes(title_text=x_title)
    figure.update_yaxes(title_text=y_title)


def _log_if_wide(figure: go.Figure, axis: str, values: Sequence[float]) -> None:
    """A logarithmic axis where the values span more than a decade and none forbids it."""
    if values and min(values) > 0 and max(values) / min(values) > _LOG_SPAN:
        digits = (1, 2, 5) if max(values) / min(values) < 1e3 else (1,)
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        decades = range(max(low, -307), min(high, 308) + 1)  # what a float can hold
        apart = -(-len(decades) // MOST_DECADES)  # a diverging loss may span hundreds
        ticks = [digit * 10.0**decade for decade in decades[::apart] for digit in digits]
        update = figure.update_xaxes if axis == "x" else figure.update_yaxes
        update(type="log", tickvals=ticks, ticktext=[_short(tick) for tick in ticks])


def _short(value: float) -> str:
    """A round number with an SI prefix."""
    scale, prefix = next((s for s in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= 0.999 * s[0]), (1.0, ""))
    return f"{value:.0e}" if value >= 1e12 else f"{value / scale:g}{prefix}"


def _limits(values: Sequence[float | None]) -> tuple[float, float]:
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else (0.0, 1.0)


def _joules_label(joules: float | None, total: float | None) -> str:
    if joules is None:
        return "unknown"
    return f"{format_joules(joules)} ({format_ratio(joules / total)})" if total else format_joules(joules)


def _safe(name: str) -> str:
    """Plotly reads a little HTML in its texts; a name is to be shown, not obeyed."""
    return html.escape(name, quote=False)


def figure_json(figure: go.Figure) -> str:
    """JSON that may stand inside a script element: it holds no `<`, `>` or `&`."""
    text = str(figure.to_json())
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
