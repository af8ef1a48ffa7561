"""Figures of trials and joules, drawn from the tuples of `wattier.views`; only where the ink goes is computed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import plotly.graph_objects as go

from wattier.figure_style import (
    GREY,
    KIND_COLOURS,
    KIND_DASHES,
    KIND_SYMBOLS,
    METHOD_COLOURS,
    figure_json,
    lay_out,
    log_if_wide,
    params_text,
    rounded,
    safe,
)
from wattier.rundir import FULL_STAGE
from wattier.units import format_joules, format_ratio
from wattier.views import Curve, LedgerInfo, ParetoInfo, ParetoPoint

__all__ = ["MOST_CURVES", "figure_json", "learning_curves_figure", "ledger_figure", "pareto_figure"]

MOST_CURVES, MOST_POINTS = 120, 150  # curves of trials that were not picked; points of one curve
MOST_LABELS = 6  # picked trials; more would lie on one another
MOST_SHOWN = 2000  # points that are not picked and not on the front
PLAIN_NAMES = {
    "candidate": "finished, not picked",
    "pruned": "stopped early, not compared",
    "complete": "finished, not compared",
}
_OPEN_SYMBOLS = {"pruned": "x-thin-open", "complete": "circle-open", "failed": "triangle-down-open"}


def pareto_figure(info: ParetoInfo) -> go.Figure:
    """Accuracy against energy: the front, the tiers in colour, others grey, those that never finished crosses."""
    figure = go.Figure()
    if len(info.front) > 1:
        x, y = [point[1] for point in info.front], [point[0] for point in info.front]
        line = {"color": GREY, "width": 1.5, "dash": "dot", "shape": "hv"}
        figure.add_scatter(x=rounded(x), y=rounded(y), mode="lines", line=line, name="Pareto front", hoverinfo="skip")
    shown = _thinned(info.points)
    kinds = dict.fromkeys(point.kind for point in shown)
    few = sum(point.kind in KIND_COLOURS and point.kind != "candidate" for point in shown) <= MOST_LABELS
    middle = statistics.median([p.energy_joules for p in shown]) if shown else 0.0
    for kind in sorted(kinds, key=_on_top):
        figure.add_trace(_points_trace(kind, [p for p in shown if p.kind == kind], middle, labelled=few))
    lay_out(figure, _pareto_title(info), "energy of the trial (J)", "validation loss", height=500)
    figure.update_layout(legend_traceorder="reversed")
    log_if_wide(figure, "x", [p.energy_joules for p in info.points])
    log_if_wide(figure, "y", [p.val_loss for p in info.points])
    return figure


def learning_curves_figure(curves: Sequence[Curve]) -> go.Figure:
    """Validation loss by epoch of the trials of one stage: picked ones in colour, stopped ones dotted.

    Curves of one kind are one trace with gaps between them: thousands of traces are slow, and take megabytes.
    """
    figure = go.Figure()
    shown = _thinned_curves(curves)
    kinds = dict.fromkeys(curve.tier or curve.status for curve in shown)
    for kind in sorted(kinds, key=lambda kind: (kind in KIND_COLOURS, kind == "accurate", kind)):  # picked ones on top
        figure.add_trace(_curves_trace(kind, [curve for curve in shown if (curve.tier or curve.status) == kind]))
    lay_out(figure, _curves_title(curves), "epoch", "validation loss")
    log_if_wide(figure, "y", [loss for curve in curves for loss in curve.val_loss if loss is not None])
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
        pattern = {"estimated": "/", "integrated": "."}.get(method or "", "")
        figure.add_bar(
            y=[safe(p.phase) for p in phases],
            x=rounded(p.joules or 0 for p in phases),
            orientation="h",
            name=method or "unknown",
            marker={
                "color": METHOD_COLOURS.get(method or "", GREY),
                "pattern": {"shape": pattern, "fillmode": "overlay", "fgcolor": "white"},
            },
            text=[_joules_label(phase.joules, total) for phase in phases],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{text}<extra></extra>",
        )
    lay_out(figure, _ledger_title(info), "energy (J)", "", height=150 + 46 * len(info.phases))
    figure.update_yaxes(categoryorder="array", categoryarray=[safe(p.phase) for p in info.phases][::-1])
    figure.update_xaxes(range=[0, 1.45 * max((p.joules or 0.0 for p in info.phases), default=1.0) or 1.0], nticks=6)
    figure.update_layout(barmode="overlay", showlegend=True, margin={"t": 40, "l": 10})
    return figure


def _thinned(points: Sequence[ParetoPoint]) -> list[ParetoPoint]:
    """All that are picked or on the front, and of the others so many, evenly."""
    step = -(-len(points) // MOST_SHOWN)
    return [
        p for i, p in enumerate(points) if i % step == 0 or p.on_front or p.kind in ("accurate", "balanced", "pinned")
    ]


def _on_top(kind: str) -> tuple[bool, bool, bool, str]:
    """Sort key: what is drawn last lies above the rest."""
    return kind in KIND_COLOURS, kind != "candidate", kind == "accurate", kind


def _points_trace(kind: str, points: Sequence[ParetoPoint], middle_joules: float, *, labelled: bool) -> go.Scatter:
    finished = kind in KIND_COLOURS
    colour = KIND_COLOURS.get(kind, GREY)
    picked = finished and kind != "candidate"
    return go.Scatter(
        x=rounded(p.energy_joules for p in points),
        y=rounded(p.val_loss for p in points),
        mode="markers+text" if labelled and picked else "markers",
        text=[safe(p.trial_id) for p in points],
        textposition=["top right" if p.energy_joules <= middle_joules else "top left" for p in points],
        textfont={"size": 12},
        name=PLAIN_NAMES.get(kind, safe(kind)),
        marker={
            "color": colour,
            "size": 13 if picked else 9,
            "opacity": 1.0 if picked else 0.75,
            "symbol": KIND_SYMBOLS.get(kind) or _OPEN_SYMBOLS.get(kind, "circle-open"),
            "line": {"color": "white" if finished else colour, "width": 1.2},
        },
        customdata=[_hover(p) for p in points],
        hovertemplate="<b>%{text}</b><br>loss %{y:.4g}, %{customdata}<extra></extra>",
    )


def _hover(point: ParetoPoint) -> str:
    hot = "<br>throttled: its joules are not comparable" if point.throttled else ""
    front = "<br>on the Pareto front" if point.on_front else ""
    params = params_text(point.params)
    progress = f"{point.epochs_done} of {point.epochs} epochs"
    return f"{format_joules(point.energy_joules)}<br>{progress}{front}{hot}{'<br>' if params else ''}{params}"


def _pareto_title(info: ParetoInfo) -> str:
    stage = safe(info.stage)
    if not info.front:
        return f"Stage {stage}: no trial can be compared yet"
    finished = [p for p in info.points if p.kind in KIND_COLOURS]
    best = min(finished, key=lambda p: p.val_loss)
    cheap = min(finished, key=lambda p: p.energy_joules)
    if best.trial_id == cheap.trial_id:
        return f"Stage {stage}: the most accurate trial is the cheapest, too (lower left is better)"
    share = format_ratio(cheap.energy_joules / best.energy_joules)
    return f"Stage {stage}: the front runs from {share} to 100 % of the best trial's joules (lower left is better)"


def _thinned_curves(curves: Sequence[Curve]) -> list[Curve]:
    picked = [curve for curve in curves if curve.tier]
    others = [curve for curve in curves if not curve.tier]
    kept = [*others[:: max(1, -(-len(others) // MOST_CURVES))], *picked]
    return [_thinned_curve(curve) for curve in kept]


def _thinned_curve(curve: Curve) -> Curve:
    step = -(-len(curve.epochs) // MOST_POINTS)
    if step <= 1:
        return curve
    places = sorted({*range(0, len(curve.epochs), step), len(curve.epochs) - 1})
    columns = (curve.epochs, curve.val_loss, curve.energy_joules)
    epochs, losses, joules = (tuple(column[i] for i in places) for column in columns)
    return curve._replace(epochs=epochs, val_loss=losses, energy_joules=joules)


def _curves_trace(kind: str, curves: Sequence[Curve]) -> go.Scatter:
    x: list[float | None] = []
    y: list[float | None] = []
    texts: list[str | None] = []
    for curve in curves:
        x += [*curve.epochs, None]
        y += [*curve.val_loss, None]
        texts += [f"{safe(curve.trial_id)}<br>{format_joules(joules)} so far" for joules in curve.energy_joules]
        texts.append(None)
    is_tier = any(curve.tier for curve in curves)
    longest = max(len(curve.epochs) for curve in curves)
    return go.Scatter(
        x=x,
        y=rounded(y),
        mode="lines+markers" if longest < 30 else "lines",
        line={
            "color": KIND_COLOURS.get(kind, GREY),
            "width": 2.5 if is_tier else 1.2,
            "dash": KIND_DASHES.get(kind, "solid" if kind == "complete" else "dot"),
        },
        marker={"size": 5, "symbol": KIND_SYMBOLS.get(kind, "circle")},
        opacity=1.0 if is_tier else 0.7,
        name=safe(kind),
        text=texts,
        connectgaps=False,
        hovertemplate="%{text}<br>epoch %{x}, loss %{y:.4g}<extra></extra>",
    )


def _curves_title(curves: Sequence[Curve]) -> str:
    stage = safe(curves[0].stage)
    title = "Full training" if stage == FULL_STAGE else f"Stage {stage}"
    finished = [(loss, c.trial_id) for c in curves if c.status == "complete" for loss in c.val_loss if loss is not None]
    if not finished:
        return f"{title}: no trial has finished yet"
    loss, trial_id = min(finished)
    cut = "; dotted trials were cut short" if any(c.status != "complete" for c in curves) else ""
    others = sum(not curve.tier for curve in curves)
    some = f"; one in {-(-others // MOST_CURVES)} of those not picked is drawn" if others > MOST_CURVES else ""
    return f"{title}: {safe(trial_id)} reaches the lowest loss, {loss:.3g}{cut}{some}"


def _ledger_title(info: LedgerInfo) -> str:
    known = [p for p in info.phases if p.joules is not None]
    dearest = max(known, key=lambda p: p.joules or 0.0, default=None)
    total = info.total.joules
    if dearest is None or dearest.joules is None or not total:
        return "No phase has known joules"
    title = f"{safe(dearest.phase)} took {format_ratio(dearest.joules / total)} of {format_joules(total)}"
    return title[:1].upper() + title[1:]


def _joules_label(joules: float | None, total: float | None) -> str:
    if joules is None:
        return "unknown"
    return f"{format_joules(joules)} ({format_ratio(joules / total)})" if total else format_joules(joules)
