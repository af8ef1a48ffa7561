"""A trial's power and memory over time: what was not measured is a gap, what was throttled is marked."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from wattier.figure_style import COLOURS, GREEN, ORANGE, TEMPLATE, rounded, safe
from wattier.units import format_seconds
from wattier.views_power import TrialPower
from wattier.views_search import stage_title

BYTES_PER_GB = 1e9
_MINUTES_FROM, _HOURS_FROM = 300.0, 3 * 3600.0
_DASHES = ("solid", "dash", "dot", "dashdot")


def power_figure(trial: TrialPower) -> go.Figure:
    """Watts above, gigabytes below, over the time since the trial began."""
    scale, unit = (1.0, "s") if trial.seconds < _MINUTES_FROM else (60.0, "min")
    if trial.seconds > _HOURS_FROM:
        scale, unit = 3600.0, "h"
    has_memory = any(size is not None for line in trial.lines for size in line.memory_bytes)
    rows = 2 if has_memory else 1
    figure = make_subplots(rows, 1, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.66, 0.34][:rows])
    shown_ranks: set[str] = set()
    for number, line in enumerate(trial.lines):
        style = {"color": COLOURS[number % len(COLOURS)], "width": 1.8, "shape": "vh", "dash": _DASHES[number % 4]}
        x = rounded(t / scale for t in line.seconds)
        name = f"{line.domain.upper()} {safe(line.rank)}"
        figure.add_scatter(
            x=x, y=rounded(line.watts), mode="lines", line=style, name=name, connectgaps=False, row=1, col=1,
            hovertemplate=f"%{{y:.4g}} W after %{{x:.4g}} {unit}<extra>{name}</extra>", showlegend=len(trial.lines) > 1,
        )  # fmt: skip
        hot = [i for i, reason in enumerate(line.throttled) if reason and line.watts[i] is not None]
        if hot:
            figure.add_scatter(
                x=[x[i] for i in hot], y=rounded(line.watts[i] for i in hot), mode="markers", name="throttled",
                marker={"color": ORANGE, "symbol": "x", "size": 7}, row=1, col=1, showlegend=True,
                text=[safe(line.throttled[i] or "") for i in hot], hovertemplate="throttled: %{text}<extra></extra>",
            )  # fmt: skip
        if has_memory and line.rank not in shown_ranks:  # of the process, not of each of its devices
            shown_ranks.add(line.rank)
            sizes = [None if size is None else size / BYTES_PER_GB for size in line.memory_bytes]
            figure.add_scatter(
                x=x, y=rounded(sizes), mode="lines", name=f"memory {safe(line.rank)}", row=2, col=1, showlegend=False,
                line={"color": GREEN, "width": 1.8, "dash": _DASHES[(number + 2) % 4]},
                hovertemplate=f"%{{y:.3g}} GB after %{{x:.4g}} {unit}<extra></extra>", connectgaps=False,
            )  # fmt: skip
    figure.update_layout(template=TEMPLATE, title_text=_title(trial), height=300, legend_y=-0.3)
    figure.update_layout(margin={"t": 10, "l": 56, "r": 8, "b": 50})
    figure.update_yaxes(title_text="power (W)", rangemode="tozero", nticks=5, row=1, col=1)
    if has_memory:
        figure.update_yaxes(title_text="memory<br>(GB)", rangemode="tozero", nticks=4, row=2, col=1)
    figure.update_xaxes(title_text=f"time since the trial began ({unit})", nticks=6, row=rows, col=1)
    return figure


def _title(trial: TrialPower) -> str:
    tier = f", {safe(trial.tier)}" if trial.tier else ""
    parts = [f"{safe(trial.trial_id)} ({safe(stage_title(trial.stage))}{tier})"]
    if trial.gap_seconds > 0:
        parts.append(f"{format_seconds(trial.gap_seconds)} not measured")
    if trial.throttled_seconds:
        parts.append(f"throttled by {safe(', '.join(sorted(trial.throttled_seconds)))}")
    return ": ".join([parts[0], "; ".join(parts[1:])]) if len(parts) > 1 else parts[0]
