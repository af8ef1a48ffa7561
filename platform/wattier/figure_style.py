"""How all figures look: colours for every kind of vision, by day and by night, and axes with round numbers."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go

# Okabe and Ito's palette, told apart by every kind of colour vision (https://jfly.uni-koeln.de/color/).
ORANGE, BLUE, GREEN, SKY, PURPLE, GREY = "#D55E00", "#0072B2", "#009E73", "#56B4E9", "#CC79A7", "#8A929E"
INK, FAINT = "#1F2933", "#E4E8EE"
NIGHT_INK, NIGHT_FAINT, NIGHT_PAGE = "#E3E8EF", "#323B47", "#14181D"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, GREY)
KIND_COLOURS = {"accurate": ORANGE, "balanced": BLUE, "pinned": PURPLE, "candidate": GREY}
KIND_SYMBOLS = {"accurate": "diamond", "balanced": "square", "pinned": "star", "candidate": "circle"}
KIND_DASHES = {"accurate": "solid", "balanced": "dash", "pinned": "dashdot", "candidate": "solid"}
METHOD_COLOURS = {"counter": BLUE, "integrated": SKY, "estimated": ORANGE}
STATUS_COLOURS = {"complete": GREEN, "pruned": GREY, "diverged": PURPLE, "failed": ORANGE, "interrupted": SKY}
STATUS_PATTERNS = {"complete": "", "pruned": "/", "diverged": "x", "failed": "\\", "interrupted": "."}
FONT = "Inter, 'Segoe UI', 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"
MOST_DECADES = 10
_LOG_SPAN = 10.0
_DIGITS = 5
_LEGEND_PIXELS, _MARGIN_PIXELS = 58, 120  # from the axis down to the legend; above and below the axes


def _template(ink: str, faint: str, page: str) -> go.layout.Template:
    axis = {
        "gridcolor": faint,
        "linecolor": GREY,
        "ticks": "outside",
        "tickcolor": GREY,
        "zeroline": False,
        "automargin": True,
        "exponentformat": "SI",
        "title": {"standoff": 10, "font": {"size": 14}},
    }
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 14, "color": ink},
            "title": {
                "font": {"size": 16, "weight": 600},
                "x": 0,
                "xanchor": "left",
                "y": 1,
                "yanchor": "top",
                "pad": {"t": 14},
            },
            "paper_bgcolor": page,
            "plot_bgcolor": page,
            "margin": {"l": 64, "r": 16, "t": 56, "b": 56},
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0, "title": {"text": ""}},
            "annotationdefaults": {"bgcolor": page, "borderpad": 1},
            "hoverlabel": {"bgcolor": page, "bordercolor": GREY, "font": {"family": FONT, "color": ink}},
        }
    )


TEMPLATE = _template(INK, FAINT, "white")
NIGHT_TEMPLATE = _template(NIGHT_INK, NIGHT_FAINT, NIGHT_PAGE)


def lay_out(figure: go.Figure, title: str, x_title: str, y_title: str, *, height: int = 420) -> None:
    """Give a figure its title, axes and height."""
    below = -_LEGEND_PIXELS / max(height - _MARGIN_PIXELS, 80)
    figure.update_layout(template=TEMPLATE, title_text=title, height=height, showlegend=True, legend_y=below)
    figure.update_xaxes(title_text=x_title)
    figure.update_yaxes(title_text=y_title)


def log_if_wide(figure: go.Figure, axis: str, values: Sequence[float]) -> None:
    """A logarithmic axis where the values span more than a decade and none forbids it."""
    if values and min(values) > 0 and max(values) / min(values) > _LOG_SPAN:
        digits = (1, 2, 5) if max(values) / min(values) < 1e3 else (1,)
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        decades = range(max(low, -307), min(high, 308) + 1)  # what a float can hold
        apart = -(-len(decades) // MOST_DECADES)  # a diverging loss may span hundreds
        ticks = [digit * 10.0**decade for decade in decades[::apart] for digit in digits]
        update = figure.update_xaxes if axis == "x" else figure.update_yaxes
        update(type="log", tickvals=ticks, ticktext=[short_number(tick) for tick in ticks])


def short_number(value: float) -> str:
    """A round number with an SI prefix."""
    scale, prefix = next((s for s in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= 0.999 * s[0]), (1.0, ""))
    return f"{value:.0e}" if value >= 1e12 else f"{value / scale:g}{prefix}"


def safe(name: str) -> str:
    """Plotly reads a little HTML in its texts; a name is to be shown, not obeyed."""
    return html.escape(name, quote=False)


def rounded(values: Iterable[float | None]) -> list[float | None]:
    """Five digits, which no eye tells from sixteen, in a third of the bytes."""
    return [None if v is None or not math.isfinite(v) else float(f"{v:.{_DIGITS}g}") for v in values]


def params_text(params: dict[str, Any], most: int = 12) -> str:
    """Hyper-parameters as lines of a hover label."""
    lines = [
        f"{safe(str(k))[:40]} {safe(f'{v:.4g}' if isinstance(v, float) else str(v))[:40]}" for k, v in params.items()
    ]
    return "<br>".join(lines[:most])


def in_script(text: str) -> str:
    """JSON that may stand inside a script element: it holds no `<`, `>` or `&`."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def figure_json(figure: go.Figure) -> str:
    """JSON of a figure that may stand inside a script element."""
    return in_script(str(figure.to_json()))
