"""Figures of the search as a whole: the funnel, how the front grew, parallel coordinates, importance."""

from __future__ import annotations

import plotly.graph_objects as go

from wattier.figure_style import (
    BLUE,
    GREY,
    KIND_COLOURS,
    KIND_DASHES,
    ORANGE,
    STATUS_COLOURS,
    STATUS_PATTERNS,
    lay_out,
    rounded,
    safe,
)
from wattier.importance import ImportanceInfo
from wattier.plots import PLAIN_NAMES
from wattier.units import format_joules, format_joules_alike, format_ratio
from wattier.views_search import STATUSES, FunnelInfo, ParallelInfo, ProgressInfo, stage_title

MOST_LINES = 400  # of trials that were not picked, in parallel coordinates
MOST_STEPS = 400
_LABEL_WIDTH = 14


def funnel_figure(info: FunnelInfo, what: str) -> go.Figure:
    """Bars by stage, parted by how trials ended: their number (`trials`), or their joules (`joules`)."""
    figure = go.Figure()
    names = [safe(stage_title(stage.stage)) for stage in info.stages]
    for status in STATUSES:
        counts = [stage.counts.get(status, 0) for stage in info.stages]
        joules = [stage.joules.get(status) or 0.0 for stage in info.stages]
        values = counts if what == "trials" else joules
        if not any(values):
            continue
        largest = max(sum(s.counts.values()) for s in info.stages) if what == "trials" else _most_joules(info)
        labels = [f"{n:,}" for n in counts] if what == "trials" else _alike(info, joules)
        room = 0.09 if what == "trials" else 0.2
        figure.add_bar(
            y=names,
            x=rounded(values),
            orientation="h",
            name=status,
            marker={
                "color": STATUS_COLOURS[status],
                "line": {"color": "white", "width": 1},
                "pattern": {"shape": STATUS_PATTERNS[status], "fillmode": "overlay", "fgcolor": "white", "size": 6},
            },
            text=[label if value > room * largest else "" for label, value in zip(labels, values, strict=True)],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            textfont={"color": "#111", "size": 13},
            hovertext=labels,
            hovertemplate="%{y}, " + status + ": %{hovertext}<extra></extra>",
        )
    title = _trials_title(info) if what == "trials" else _joules_title(info)
    lay_out(figure, title, "trials" if what == "trials" else "energy (J)", "", height=150 + 54 * len(names))
    figure.update_layout(barmode="stack", legend_traceorder="normal", margin={"t": 16, "l": 10}, bargap=0.35)
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1])
    figure.update_xaxes(nticks=6)
    return figure


def progress_figure(info: ProgressInfo, against: str) -> go.Figure:
    """Hypervolume in per cent of the last one, against trials or against joules spent."""
    by_trials = against == "trials"
    x = [0.0, *(info.trials if by_trials else info.joules)]
    y = [0.0, *info.hypervolume_ratio]
    joules = [0.0, *info.joules]
    keep = _steps(y)
    figure = go.Figure()
    figure.add_scatter(
        x=rounded(x[i] for i in keep),
        y=rounded(y[i] for i in keep),
        mode="lines",
        line={
            "color": BLUE if by_trials else ORANGE,
            "width": 2.5,
            "shape": "hv",
            "dash": "solid" if by_trials else "dash",
        },
        name=against,
        customdata=[format_joules(joules[i]) for i in keep],
        hovertemplate="%{y:.0%} of the hypervolume<br>after trial "
        + ("%{x}" if by_trials else "worth")
        + ", %{customdata}<extra></extra>",
    )
    at = next((i for i, ratio in enumerate(y) if ratio >= 0.9), len(y) - 1)
    share = joules[at] / joules[-1] if joules[-1] else 1.0
    spent = f"{at} of {len(y) - 1} trials" if by_trials else f"{format_joules(joules[at])} ({format_ratio(share)})"
    lay_out(
        figure,
        f"90 % of the final hypervolume was there after {spent}",
        "trials ended" if by_trials else "energy spent in the stage (J)",
        "hypervolume (share of final)",
        height=330,
    )
    figure.update_layout(showlegend=False, margin={"t": 16})
    figure.update_yaxes(tickformat=".0%", range=[0, 1.05])
    figure.update_xaxes(rangemode="tozero", nticks=6)
    return figure


def parallel_figure(info: ParallelInfo) -> go.Figure:
    """One line a trial through all of its hyper-parameters and both objectives.

    Drawn as lines, since plotly's own kind needs WebGL, which many a browser without a GPU lacks, and shows neither
    dashes nor print.
    """
    figure = go.Figure()
    others = [i for i, kind in enumerate(info.kinds) if kind == "candidate"]
    shown = set(others[:: max(1, -(-len(others) // MOST_LINES))])
    kinds = dict.fromkeys(info.kinds)
    for kind in sorted(kinds, key=lambda kind: (kind != "candidate", kind == "accurate")):
        x: list[float | None] = []
        y: list[float | None] = []
        texts: list[str | None] = []
        for i, trial_id in enumerate(info.trial_ids):
            if info.kinds[i] != kind or (kind == "candidate" and i not in shown):
                continue
            x += [*range(len(info.axes)), None]
            y += [*(axis.positions[i] for axis in info.axes), None]
            texts += [*[safe(trial_id)] * len(info.axes), None]
        picked = kind != "candidate"
        figure.add_scatter(
            x=x,
            y=rounded(y),
            mode="lines",
            name=PLAIN_NAMES.get(kind, safe(kind)),
            text=texts,
            opacity=1.0 if picked else 0.45,
            line={
                "color": KIND_COLOURS.get(kind, GREY),
                "width": 2.5 if picked else 1,
                "dash": KIND_DASHES.get(kind, "solid"),
            },
            hovertemplate="%{text}<extra></extra>",
        )
    _draw_axes(figure, info)
    return figure


def importance_figure(info: ImportanceInfo) -> go.Figure | None:
    """Share of each hyper-parameter in the variance of loss and joules; None where neither can be told."""
    told = [found for found in info.objectives if found.shares]
    if not told:
        return None
    names = list(dict.fromkeys(name for found in told for name in found.shares))[:12]
    figure = go.Figure()
    for found in told:
        energy = found.objective == "energy"
        figure.add_bar(
            y=[safe(name) for name in names],
            x=rounded(found.shares.get(name, 0.0) for name in names),
            orientation="h",
            name=found.objective,
            marker={
                "color": ORANGE if energy else BLUE,
                "pattern": {"shape": "/" if energy else "", "fillmode": "overlay", "fgcolor": "white"},
            },
            text=[format_ratio(found.shares.get(name, 0.0)) for name in names],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{text} of the variance<extra></extra>",
        )
    first = {found.objective: next(iter(found.shares)) for found in told}
    leaders = "What matters most: " + ", ".join(f"{safe(name)} to the {goal}" for goal, name in first.items())
    lay_out(figure, leaders, "share of the variance", "", height=150 + 58 * len(names))
    figure.update_yaxes(categoryorder="array", categoryarray=[safe(name) for name in names][::-1])
    figure.update_xaxes(tickformat=".0%", range=[0, 1.15], nticks=6)
    figure.update_layout(barmode="group", margin={"t": 16, "l": 10}, legend_traceorder="normal")
    return figure


def _draw_axes(figure: go.Figure, info: ParallelInfo) -> None:
    for place, axis in enumerate(info.axes):
        figure.add_shape(type="line", x0=place, x1=place, y0=0, y1=1, line={"color": GREY, "width": 1.5}, layer="below")
        for height, label in axis.ticks:
            text = safe(label if len(label) <= _LABEL_WIDTH else label[: _LABEL_WIDTH - 1] + "…")
            figure.add_annotation(
                x=place, y=height, text=text, showarrow=False, xanchor="left", xshift=5, font={"size": 12}
            )
    lay_out(figure, _parallel_title(info), "", "", height=420)
    names = [axis.name if len(axis.name) <= 20 else axis.name[:19] + "…" for axis in info.axes]
    labels = [
        safe(name) + (f"<br>({axis.unit})" if axis.unit else "") for name, axis in zip(names, info.axes, strict=True)
    ]
    figure.update_xaxes(
        tickvals=list(range(len(labels))), ticktext=labels, showgrid=False, side="top", ticks="", tickangle=0,
        range=[-0.15, len(labels) - 1 + 0.6],
    )  # fmt: skip
    figure.update_yaxes(visible=False, range=[-0.06, 1.06])
    figure.update_layout(margin={"t": 70, "l": 56, "b": 50}, legend_y=-0.05)


def _parallel_title(info: ParallelInfo) -> str:
    others = sum(kind == "candidate" for kind in info.kinds)
    some = f"; {MOST_LINES} of {others:,} others are drawn" if others > MOST_LINES else ""
    return f"The {len(info.trial_ids):,} finished trials of stage {safe(info.stage)}, picked ones in colour{some}"


def _steps(values: list[float]) -> list[int]:
    """Places where a curve of steps changes, its ends, and at most so many."""
    places = [i for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
    places = places[:: -(-len(places) // MOST_STEPS)]
    return sorted({*places, len(values) - 1})


def _most_joules(info: FunnelInfo) -> float:
    return max((stage.total_joules or 0.0 for stage in info.stages), default=0.0)


def _trials_title(info: FunnelInfo) -> str:
    return "Trials: " + " → ".join(f"{stage.trials:,} in {safe(stage_title(stage.stage))}" for stage in info.stages)


def _joules_title(info: FunnelInfo) -> str:
    return "Joules: " + " → ".join(format_joules_alike([stage.total_joules for stage in info.stages]))


def _alike(info: FunnelInfo, joules: list[float]) -> list[str]:
    """In the unit of the dearest stage."""
    return format_joules_alike([*joules, *(stage.total_joules for stage in info.stages)])[: len(joules)]
