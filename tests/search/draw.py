"""The bench's curves as a figure: a panel a problem, a line a method, its quartiles as a band."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots
from search.compare import FRACTIONS, Run, quartiles
from search.problems import Problem
from search.show import traces_by_method

COLUMNS = 3
OURS_COLOUR, COLOURS = "#d62728", [c for c in qualitative.D3 if c != "#D62728"]


def figure(problems: Sequence[Problem], runs: Sequence[Run]) -> Any:
    """Normalised hypervolume against the fraction of the budget that is spent, of all problems."""
    methods = list(dict.fromkeys(run.method for run in runs))
    rows = -(-len(problems) // COLUMNS)
    drawn = make_subplots(rows, COLUMNS, subplot_titles=[p.name for p in problems], vertical_spacing=0.25 / rows)
    for i, problem in enumerate(problems):
        place = {"row": i // COLUMNS + 1, "col": i % COLUMNS + 1}
        traces = traces_by_method([run for run in runs if run.problem == problem.name], problem)
        for method, found in traces.items():
            curve = quartiles(found)
            colour = _colour(method, methods)
            x = [0.0, *FRACTIONS]
            band = go.Scatter(
                x=[*x, *x[::-1]], y=[0.0, *curve["q75"], *curve["q25"][::-1], 0.0], fill="toself", fillcolor=colour,
                opacity=0.12, line={"width": 0}, hoverinfo="skip", showlegend=False, legendgroup=method,
            )  # fmt: skip
            line = go.Scatter(
                x=x, y=[0.0, *curve["median"]], name=method, legendgroup=method, showlegend=i == 0,
                line={"color": colour, "width": 3 if method.startswith("ours") else 1.5},
            )  # fmt: skip
            drawn.add_trace(band, **place)
            drawn.add_trace(line, **place)
    drawn.update_layout(height=320 * rows, template="plotly_white", legend={"orientation": "h", "y": 1.08})
    drawn.update_xaxes(title_text="share of the joules", row=rows)
    drawn.update_yaxes(title_text="hypervolume / true front's", col=1)
    return drawn


def _colour(method: str, methods: Sequence[str]) -> str:
    return OURS_COLOUR if method == "ours" else COLOURS[methods.index(method) % len(COLOURS)]
