"""The page of `wattier bench power`: power over time side by side, joules a structure, and the figures in a table."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from wattier.bench_records import SizePower
from wattier.errors import UserError
from wattier.figure_style import COLOURS, INK, TEMPLATE, figure_json
from wattier.rundir import write_text
from wattier.units import UNKNOWN, format_bytes, three_digits
from wattier_telemetry.recording.trace import TraceError, read_trace

LEAST_SECONDS = 1.0  # of a step of power that is a difference of joules: processor time moves in steps of 10 ms
_COLUMNS = (
    "size", "parameters", "batch", "mean power (W)", "energy of a structure (J)", "bounds (J)", "structures/s",
    "peak memory", "foretold", "seconds", "steps", "method",
)  # fmt: skip
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Power of named model sizes</title>
<style>body{{font-family:Inter,'Segoe UI','Liberation Sans',Arial,sans-serif;color:{ink};max-width:1100px;
margin:2rem auto;padding:0 1rem}}h1{{font-size:1.4rem}}p{{color:#52606d}}table{{border-collapse:collapse;
font-size:.85rem}}td,th{{padding:.3rem .6rem;border-bottom:1px solid #E4E8EE;text-align:right}}
td:first-child,th:first-child,td:last-child,th:last-child{{text-align:left}}</style>
<script>{plotly}</script></head><body>
<h1>Power of named model sizes</h1>
<p>{about}</p>
{figures}
{table}
<p>Each size trained alone, after a first step that is not counted. The bounds are what sampling leaves open; the
calibration of a sensor is not in them. “Estimated” figures are processor time at an assumed power of a core: compare
them with one another only.</p>
</body></html>
"""
_FIGURE = """<div id="{name}"></div>
<script>(function(f){{Plotly.newPlot("{name}",f.data,f.layout,{{responsive:true,displaylogo:false}})}})({figure});</script>"""


class PowerCurve(NamedTuple):
    """Power of one device over time: seconds since the first sample, W."""

    device: str
    seconds: list[float]
    watts: list[float]


def power_curves(trace: Path) -> list[PowerCurve]:
    """The curves of a recording: power as it was read, or else joules over stretches of at least a second."""
    first: float | None = None
    read: dict[str, PowerCurve] = {}
    derived: dict[str, PowerCurve] = {}
    last: dict[str, tuple[float, float]] = {}
    for sample in read_trace(trace):
        device, reading = sample.device, sample.reading
        first = reading.time_seconds if first is None else first
        now = reading.time_seconds - first
        if reading.power_watts is not None:
            curve = read.setdefault(device.uuid, PowerCurve(device.name, [], []))
            curve.seconds.append(now)
            curve.watts.append(reading.power_watts)
        if reading.energy_joules is not None:
            then, joules = last.setdefault(device.uuid, (now, reading.energy_joules))
            if now - then >= LEAST_SECONDS:
                curve = derived.setdefault(device.uuid, PowerCurve(device.name, [], []))
                curve.seconds.append((now + then) / 2)
                curve.watts.append(max(0.0, reading.energy_joules - joules) / (now - then))
                last[device.uuid] = (now, reading.energy_joules)
    return list({**derived, **read}.values())


def write_power_page(results: Sequence[SizePower], folder: Path, path: Path) -> None:
    """Write the page of results whose traces lie below the folder ``sizes``, whole or not at all.

    Raises:
        UserError: a trace is damaged or gone.
    """
    measured = [result for result in results if result.status == "measured"]
    try:
        curves = {result.name: power_curves(folder / result.name / "trace.csv") for result in measured}
    except TraceError as error:
        raise UserError(f"{error}. Remove the folder of that size; the same command measures it again.") from error
    figures = {"power": power_figure(curves), "joules": joules_figure(measured)} if measured else {}
    about = "; ".join(sorted({result.hardware for result in results}))
    page = _PAGE.format(
        ink=INK,
        plotly=get_plotlyjs(),
        about=html.escape(about),
        figures="\n".join(_FIGURE.format(name=name, figure=figure_json(f)) for name, f in figures.items()),
        table=_table(results),
    )
    write_text(path, page)


def power_figure(curves: dict[str, list[PowerCurve]]) -> go.Figure:
    """Power over time, a panel a size, one scale of watts for all."""
    figure = make_subplots(
        rows=1, cols=len(curves), shared_yaxes=True, horizontal_spacing=0.03,
        subplot_titles=[html.escape(name) for name in curves],
    )  # fmt: skip
    devices = list(dict.fromkeys(curve.device for of_size in curves.values() for curve in of_size))
    for column, of_size in enumerate(curves.values(), 1):
        for curve in of_size:
            place = devices.index(curve.device)
            colour = COLOURS[place % len(COLOURS)] if len(of_size) > 1 else COLOURS[(column - 1) % len(COLOURS)]
            figure.add_scatter(
                x=curve.seconds, y=curve.watts, mode="lines", line={"color": colour, "width": 2},
                name=html.escape(curve.device), legendgroup=curve.device, showlegend=len(of_size) > 1 and column == 1,
                hovertemplate="%{x:.1f} s: %{y:.4g} W<extra></extra>", row=1, col=column,
            )  # fmt: skip
    figure.update_layout(template=TEMPLATE, title_text="Power over time", height=420, margin={"t": 80})
    figure.update_xaxes(title_text="time (s)")
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title_text="power (W)", row=1, col=1)
    return figure


def joules_figure(results: Sequence[SizePower]) -> go.Figure:
    """Joules of a structure that is trained on, with bounds."""
    known = [result for result in results if result.joules_per_structure[1] is not None]
    values = [result.joules_per_structure for result in known]
    best = [float(value[1] or 0) for value in values]
    figure = go.Figure(
        go.Bar(
            x=[html.escape(result.name) for result in known],
            y=best,
            marker={"color": [COLOURS[place % len(COLOURS)] for place in range(len(known))]},
            text=[three_digits(value) for value in best],
            error_y={
                "array": [(high or value) - value for (_, _, high), value in zip(values, best, strict=True)],
                "arrayminus": [value - (low or value) for (low, _, _), value in zip(values, best, strict=True)],
            },
        )
    )
    figure.update_layout(template=TEMPLATE, title_text="Energy of a structure", height=380, showlegend=False)
    figure.update_yaxes(title_text="energy of a structure (J)", type="log", dtick=1)
    return figure


def _table(results: Sequence[SizePower]) -> str:
    rows = [_COLUMNS, *map(_row, results)]
    cells = [[html.escape(cell) for cell in row] for row in rows]
    head, *body = (
        "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in row) + "</tr>"
        for row, tag in zip(cells, ["th"] + ["td"] * len(results), strict=True)
    )
    return f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"


def _row(result: SizePower) -> tuple[str, ...]:
    low, best, high = result.joules_per_structure
    head = (result.name, f"{result.n_parameters:,}", str(result.settings["batch_structures"]))
    need = format_bytes(result.needed_bytes)
    if result.status == "does_not_fit":
        free = UNKNOWN if result.available_bytes is None else format_bytes(result.available_bytes)
        why = f"does not fit: {result.reason or f'{free} were free'}"
        return (*head, "", "", "", "", "", need, "", "", why)
    return (
        *head,
        _number(result.mean_watts),
        _number(best),
        f"{_number(low)} to {_number(high)}",
        _number(result.structures_per_second),
        UNKNOWN if result.peak_memory_bytes is None else format_bytes(result.peak_memory_bytes),
        need,
        _number(result.seconds),
        str(result.steps),
        result.method or UNKNOWN,
    )


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else three_digits(value)
