"""Figures of a store, drawn from the tuples of `data_stats`, in one HTML file that needs no network."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from wattier.data_stats import StatsInfo
from wattier.figure_style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, TEMPLATE, figure_json
from wattier.rundir import write_text
from wattier_gnn.datasets import SYMBOLS
from wattier_gnn.stats import SourceStats

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, GREY)
DASHES = ("solid", "dash", "dot", "dashdot", "5px,2px", "2px,4px")
PALE, DEEP = "#CFE3F5", "#08306B"  # an element that occurs is never white
N_BARS = 60
TAILS = 0.001  # a linear axis leaves out this share at either end: one outlier would hide all the rest
LOWEST_FORCE_EV_PER_ANGSTROM = 1e-4

_NOBLE_GASES = (0, 2, 10, 18, 36, 54, 86, 118)
_LANTHANUM, _HAFNIUM, _ACTINIUM, _RUTHERFORDIUM = 57, 72, 89, 104
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font-family:Inter,'Segoe UI','Liberation Sans',Arial,sans-serif;color:{ink};max-width:1100px;
margin:2rem auto;padding:0 1rem}}h1{{font-size:1.4rem}}p{{color:#52606d}}</style>
<script>{plotly}</script></head><body>
<h1>{title}</h1>
<p>{summary}</p>
{figures}
</body></html>
"""
_FIGURE = """<div id="{name}"></div>
<script>(function(f){{Plotly.newPlot("{name}",f.data,f.layout,{{responsive:true,displaylogo:false}})}})({figure});</script>"""


def write_stats_page(info: StatsInfo, path: Path) -> None:
    """Write the page, whole or not at all."""
    figures = {
        "atoms": atoms_figure(info),
        "energies": energy_figure(info),
        "forces": force_figure(info),
        "elements": elements_figure(info),
    }
    samples = ", ".join(f"{source.source} {source.structures:,}" for source in info.sources)
    removed = sum(sum(reasons.values()) for reasons in info.cleaning.removed.values())
    page = _PAGE.format(
        title=f"Data in {html.escape(str(info.folder))}",
        ink=INK,
        plotly=get_plotlyjs(),
        summary=html.escape(
            f"Structures kept: {samples}. Removed: {removed:,}. Edges within {info.cutoff_angstrom:g} Å."
        ),
        figures="\n".join(_FIGURE.format(name=name, figure=figure_json(f)) for name, f in figures.items()),
    )
    write_text(path, page)


def atoms_figure(info: StatsInfo) -> go.Figure:
    """Atoms of a structure, by source."""
    spreads = [s.atoms_per_structure for s in info.sources if s.structures]
    low, high = min((s.minimum for s in spreads), default=0), max((s.maximum for s in spreads), default=0)
    figure = _histograms(info, "atoms_per_structure", (low - 0.5, high + 0.5), whole=True)
    return _finished(figure, f"Structures have {low:,.0f} to {high:,.0f} atoms", "atoms of a structure")


def energy_figure(info: StatsInfo) -> go.Figure:
    """Energy per atom less the composition reference, by source."""
    bounds = [_between_tails(*s.histograms["energy_ev_per_atom"]) for s in info.sources if s.structures]
    low, high = min((b[0] for b in bounds), default=-1.0), max((b[1] for b in bounds), default=1.0)
    widest = max((s for s in info.sources if s.structures), key=lambda s: s.energy_ev_per_atom.deviation, default=None)
    title = "Energy less composition"
    if widest is not None:
        sd = widest.energy_ev_per_atom.deviation
        title += f": the spread is widest in {html.escape(widest.source, quote=False)}, {sd:.3g} eV/atom"
    figure = _histograms(info, "energy_ev_per_atom", (low, high))
    return _finished(figure, title, f"energy per atom (eV/atom), {100 - 200 * TAILS:g} % of each source")


def force_figure(info: StatsInfo) -> go.Figure:
    """Norms of the forces on atoms, by source, on a logarithmic axis."""
    figure = go.Figure()
    known = [s for s in info.sources if math.isfinite(s.force_ev_per_angstrom.maximum)]
    strongest = max((s.force_ev_per_angstrom.maximum for s in known), default=1.0)
    title = f"The strongest force on an atom is {strongest:.3g} eV/Å" if known else "No forces are known"
    top = math.ceil(math.log10(max(strongest, 10 * LOWEST_FORCE_EV_PER_ANGSTROM)) * 5) / 5
    tails = [_between_tails(*s.histograms["force_ev_per_angstrom"])[0] for s in known]
    bottom = math.floor(math.log10(max(min(tails, default=0.0), LOWEST_FORCE_EV_PER_ANGSTROM)))
    bars = np.logspace(bottom, top, N_BARS + 1)
    for number, source in enumerate(info.sources):
        counts = _rebinned(*source.histograms["force_ev_per_angstrom"], bars)
        # A bar is as wide as a factor, so that areas are shares.
        _add_steps(figure, number, source, bars, counts / max(counts.sum(), 1))
    decades = [10.0**n for n in range(bottom, math.ceil(top) + 1)]
    figure.update_xaxes(type="log", tickvals=decades, ticktext=[f"{decade:g}" for decade in decades])
    return _finished(figure, title, "force on an atom (eV/Å)")


def elements_figure(info: StatsInfo) -> go.Figure:
    """The share of structures that hold each element, in the shape of the periodic table."""
    total = sum(source.structures for source in info.sources)
    shares = np.full((10, 18), np.nan)
    texts, hover = np.full((10, 18), "", dtype=object), np.full((10, 18), "", dtype=object)
    for number in range(1, 119):
        place = place_of(number)
        holding = {source.source: source.elements.get(number, 0) for source in info.sources}
        if any(holding.values()):
            shares[place] = sum(holding.values()) / total
        texts[place] = SYMBOLS[number]
        by_source = "<br>".join(f"{html.escape(name, quote=False)}: {n:,}" for name, n in holding.items() if n)
        hover[place] = f"{SYMBOLS[number]}<br>{by_source or 'in no structure'}"
    logs = np.log10(shares)
    rarest = float(np.nanmin(logs, initial=-1.0))
    heat = go.Heatmap(
        z=logs,
        text=texts,
        texttemplate="%{text}",
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
        colorscale=[[0, PALE], [1, DEEP]],
        zmin=rarest,
        zmax=0.0,
        xgap=2,
        ygap=2,
        colorbar={
            "title": {"text": "share of<br>structures"},
            "tickvals": list(range(-8, 1)),
            "ticktext": ["1e-8", "1e-7", "1e-6", "1e-5", "0.01 %", "0.1 %", "1 %", "10 %", "100 %"],
        },
    )
    figure = go.Figure(heat)
    n_elements = len({number for source in info.sources for number in source.elements})
    figure.update_layout(template=TEMPLATE, title_text=f"{n_elements} elements occur", height=480, showlegend=False)
    figure.update_xaxes(visible=False, constrain="domain")
    figure.update_yaxes(visible=False, autorange="reversed", scaleanchor="x")
    return figure


def place_of(number: int) -> tuple[int, int]:
    """Row and column of an element, from 0, in the table of 18 columns; lanthanides and actinides stand below it."""
    if _LANTHANUM <= number < _HAFNIUM:
        return 8, number - _LANTHANUM + 2
    if _ACTINIUM <= number < _RUTHERFORDIUM:
        return 9, number - _ACTINIUM + 2
    period = next(row for row, gas in enumerate(_NOBLE_GASES) if number <= gas) - 1
    from_left, from_right = number - _NOBLE_GASES[period] - 1, _NOBLE_GASES[period + 1] - number
    return period, from_left if from_left < (2 if period else 1) else 17 - from_right


def _histograms(info: StatsInfo, quantity: str, bounds: tuple[float, float], *, whole: bool = False) -> go.Figure:
    """Steps of the share of structures in each bar, between bounds."""
    figure = go.Figure()
    low, high = bounds
    width = (high - low) / N_BARS
    if whole:  # as many whole numbers in one bar as in the next
        width = max(1.0, math.ceil(width))
        high = low + width * math.ceil((high - low) / width)
    bars = np.linspace(low, high, max(1, round((high - low) / width)) + 1) if width > 0 else np.array([low, low + 1.0])
    for number, source in enumerate(info.sources):
        counts = _rebinned(*source.histograms[quantity], bars)
        _add_steps(figure, number, source, bars, counts / max(source.structures, 1))
    return figure


def _rebinned(edges: np.ndarray, counts: np.ndarray, bars: np.ndarray) -> np.ndarray:
    """Counts of fine bins dealt out to bars, each evenly over its width."""
    below = np.concatenate([[0], np.cumsum(counts)])
    return np.diff(np.interp(bars, edges, below))


def _between_tails(edges: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    below = np.concatenate([[0], np.cumsum(counts)])
    low, high = np.interp([TAILS * below[-1], (1 - TAILS) * below[-1]], below, edges)
    return float(low), float(high)


def _add_steps(figure: go.Figure, number: int, source: SourceStats, bars: np.ndarray, shares: np.ndarray) -> None:
    figure.add_scatter(
        x=_plain(bars),
        y=_plain([*shares, shares[-1]]),
        mode="lines",
        line={"shape": "hv", "color": COLOURS[number % len(COLOURS)], "width": 2, "dash": DASHES[number % len(DASHES)]},
        name=f"{html.escape(source.source, quote=False)} ({source.structures:,})",
        hovertemplate="%{x:.4g}: %{y:.2%}<extra></extra>",
    )


def _finished(figure: go.Figure, title: str, x_title: str) -> go.Figure:
    figure.update_layout(template=TEMPLATE, title_text=title, height=400, showlegend=True)
    figure.update_xaxes(title_text=x_title)
    figure.update_yaxes(title_text="share", tickformat=".0%", rangemode="tozero")
    return figure


def _plain(values: Iterable[float]) -> list[float]:
    return [float(value) for value in values]
