"""Which figures a report has: each with its title, a description for who cannot see it, and its numbers as a table."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import plotly.graph_objects as go

from wattier import figures_evaluation, figures_power, figures_search, plots
from wattier.figure_style import in_script
from wattier.findings import Findings
from wattier.rundir import FULL_STAGE
from wattier.units import UNKNOWN, format_joules, format_joules_alike, format_ratio, format_seconds
from wattier.views_search import STATUSES, FunnelStage, stage_title

MOST_ROWS = 25  # of a table beside a figure
LEAST_WHOLE_WATTS = 100  # from here on whole watts, which are three digits or more
NONE, NO_BREAK = "\u2013", "\u00a0"
_TOP_PIXELS = 20
_UNITS = re.compile(r"(?<=\d) (?=(%|J|kJ|MJ|kWh|W|s|min|h|B|kB|MB|GB|TB|eV)(?!\w))")


class Table(NamedTuple):
    """Cells as text; the first column names the row."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Drawing(NamedTuple):
    """One figure of the page. title: the page's, since plotly's do not wrap. table None = see `note`."""

    figure: go.Figure
    title: str
    description: str
    table: Table | None = None
    note: str = ""

    @property
    def height(self) -> int:
        """Pixels."""
        return int(self.figure.layout.height or 420)

    @property
    def json(self) -> str:
        """Data and layout without template and title, which the page adds; safe inside a script element."""
        plain = json.loads(self.figure.to_json())
        plain["layout"].pop("template", None)
        plain["layout"].pop("title", None)
        plain["layout"].setdefault("margin", {}).setdefault("t", _TOP_PIXELS)
        return in_script(json.dumps(plain, separators=(",", ":"), ensure_ascii=False))


def drawings(findings: Findings) -> dict[str, Drawing]:
    """Every figure that has something to show, by its name; a name says which section it belongs to."""
    found: dict[str, Drawing | None] = {}
    found |= _search(findings)
    if findings.ledger.phases:
        found["ledger"] = _drawing(
            plots.ledger_figure(findings.ledger),
            "Bars of the joules of each phase, coloured and hatched by how they are known.",
            note="The numbers are in the table below.",
        )
    for number, trial in enumerate(findings.power.trials):
        found[f"power-{number}"] = _drawing(
            figures_power.power_figure(trial),
            "Power in watts and memory in gigabytes over time; breaks are times that were not measured, crosses are "
            "times under a throttle.",
            note="Its figures are in the table of power and memory.",
        )
    found |= _evaluation(findings)
    return {name: drawing for name, drawing in found.items() if drawing is not None}


def _search(findings: Findings) -> dict[str, Drawing | None]:
    found: dict[str, Drawing | None] = {}
    in_table = "The numbers are in the table of trials, and in trials.csv beside this file."
    if findings.funnel.stages:
        for what in ("trials", "joules"):
            found[f"funnel-{what}"] = _drawing(
                figures_search.funnel_figure(findings.funnel, what),
                f"Bars of the {what} of each stage, parted by how trials ended.",
                note="The numbers are in the table of the funnel.",
            )
    if findings.pareto and findings.pareto.points:
        text = "Scatter of validation loss against joules, tiers in colour and shape, stopped trials as crosses."
        found["pareto"] = _drawing(plots.pareto_figure(findings.pareto), text, note=in_table)
    if findings.progress:
        table = _progress_table(findings)
        for against in ("trials", "joules"):
            figure = figures_search.progress_figure(findings.progress, against)
            found[f"progress-{against}"] = _drawing(figure, f"Hypervolume of the front against {against}.", table)
    if findings.parallel:
        text = "One line a trial across its hyper-parameters, its loss and its joules."
        found["parallel"] = _drawing(figures_search.parallel_figure(findings.parallel), text, note=in_table)
    if findings.importance:
        figure = figures_search.importance_figure(findings.importance)
        found["importance"] = figure and _drawing(
            figure, "Bars of each hyper-parameter's share in the variance.", _importance_table(findings)
        )
    for stage in dict.fromkeys(curve.stage for curve in findings.curves):
        figure = plots.learning_curves_figure([curve for curve in findings.curves if curve.stage == stage])
        text = "Validation loss by epoch, a line a trial."
        found[f"curves-{stage}"] = _drawing(figure, text, note=in_table)
    return found


def _evaluation(findings: Findings) -> dict[str, Drawing | None]:
    found: dict[str, Drawing | None] = {}
    evaluation = findings.evaluation
    if evaluation is None:
        return found
    kinds = (
        ("energy-density", "energy", figures_evaluation.parity_density_figure),
        ("energy-bars", "energy", figures_evaluation.parity_bars_figure),
        ("force-density", "forces", figures_evaluation.parity_density_figure),
        ("force-bars", "forces", figures_evaluation.parity_bars_figure),
    )
    for kind, quantity, draw in kinds:
        for number, source in enumerate(evaluation.parity):
            figure = draw(evaluation, source, quantity)
            text = f"Predicted against true {quantity}; on the dashed diagonal is right."
            note = "The errors are in the table of this section."
            found[f"parity-{kind}-{number}"] = figure and _drawing(figure, text, note=note)
    if any(part.get("expected") for part in evaluation.calibration.values()):
        found["calibration"] = _drawing(
            figures_evaluation.calibration_figure(evaluation),
            "Observed against expected share of errors inside each interval.",
            _calibration_table(evaluation.calibration),
        )
    for quantity in ("energy", "forces"):
        figure = figures_evaluation.coverage_figure(findings.coverage, quantity)
        text = "Observed coverage of each source, over the band that chance explains."
        found[f"coverage-{quantity}"] = figure and _drawing(figure, text, note="The numbers are in the table below.")
    return found


def _drawing(figure: go.Figure, description: str, table: Table | None = None, *, note: str = "") -> Drawing:
    title = tight(html.unescape(str(figure.layout.title.text or "")))
    return Drawing(figure, title, description, table, note)


def tight(text: str) -> str:
    """No number is parted from its unit at the end of a line."""
    return _UNITS.sub(NO_BREAK, text)


def _progress_table(findings: Findings) -> Table:
    info = findings.progress
    if info is None:
        return Table((), ())
    places = _evenly(range(len(info.trials)))
    rows = [
        (str(info.trials[i]), format_joules(info.joules[i]), format_ratio(info.hypervolume_ratio[i])) for i in places
    ]
    return Table(("trials ended", "joules spent in the stage", "share of the final hypervolume"), tuple(rows))


def _importance_table(findings: Findings) -> Table:
    info = findings.importance
    told = [found for found in info.objectives if found.shares] if info else []
    names = list(dict.fromkeys(name for found in told for name in found.shares))
    head = ("hyper-parameter", *(found.objective for found in told))
    return Table(head, tuple((n, *(format_ratio(found.shares.get(n)) for found in told)) for n in names))


def _calibration_table(calibration: dict[str, dict[str, Any]]) -> Table:
    parts = {name: part for name, part in calibration.items() if part.get("expected")}
    levels = next(iter(parts.values()))["expected"]
    rows = []
    for i in _evenly(range(len(levels))):
        cells = [format_ratio(part["observed"][i]) if i < len(part["observed"]) else UNKNOWN for part in parts.values()]
        rows.append((format_ratio(levels[i]), *cells))
    return Table(("expected inside", *(f"observed, {name}" for name in parts)), tuple(rows))


def _evenly(places: Iterable[int]) -> list[int]:
    every = list(places)
    step = max(1, -(-len(every) // MOST_ROWS))
    return sorted({*every[::step], *every[-1:]})


def as_sentence(text: str) -> str:
    """A text that stands alone: with a capital and a stop."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def funnel_table(findings: Findings) -> Table:
    """The funnel in words; of ways to end only those that occur."""
    stages = findings.funnel.stages
    statuses = [status for status in STATUSES if any(status in stage.counts for stage in stages)]
    names = {"pruned": "stopped"}
    head = ("Stage", "Each trained on", "Trials", "New", *(names.get(s, s).capitalize() for s in statuses), "Went on",
            "Energy", "of finished", "of others")  # fmt: skip
    rows = []
    joules = [(s.total_joules, s.joules.get("complete"), _lost(s)) for s in stages]
    words = format_joules_alike([value for row in joules for value in row])
    for index, stage in enumerate(stages):
        structures = "all structures" if stage.structures is None else f"{stage.structures:,} structures"
        ranks = f", {stage.ranks} ranks" if stage.ranks > 1 else ""
        planned = f"{stage.trials:,}" + (f" of {stage.planned:,}" if stage.planned not in (None, stage.trials) else "")
        counts = [f"{stage.counts.get(status, 0):,}" for status in statuses]
        total, finished, lost = words[3 * index : 3 * index + 3]
        most = "up to " if stage.stage == FULL_STAGE else ""
        rows.append(
            (
                stage_title(stage.stage), f"{structures}, {most}{stage.epochs:,} epochs{ranks}", planned,
                f"{stage.fresh:,}", *counts, f"{stage.went_on:,}", total,
                finished if stage.counts.get("complete") else NONE,
                lost if len(stage.counts) > ("complete" in stage.counts) else NONE,
            )
        )  # fmt: skip
    return Table(head, tuple(rows))


def _lost(stage: FunnelStage) -> float | None:
    known = [joules for status, joules in stage.joules.items() if status != "complete" and joules is not None]
    return sum(known) if known else None


def power_table(findings: Findings) -> Table:
    """Power and memory of the trials that have a figure."""
    head = ("Trial", "Stage", "Time", "Mean power", "Highest of a device", "Peak memory", "Not measured", "Throttled")
    rows = []
    for trial in findings.power.trials:
        throttled = ", ".join(f"{k} {format_seconds(v)}" for k, v in sorted(trial.throttled_seconds.items()))
        knows = any(reason is not None for line in trial.lines for reason in line.throttled)
        rows.append(
            (
                trial.trial_id, stage_title(trial.stage), format_seconds(trial.seconds), _watts(trial.mean_watts),
                _watts(trial.highest_watts), _gigabytes(trial.peak_memory_bytes),
                format_seconds(trial.gap_seconds) if trial.gap_seconds else NONE,
                throttled or (NONE if knows else UNKNOWN),
            )
        )  # fmt: skip
    return Table(head, tuple(rows))


def _watts(watts: float | None) -> str:
    return UNKNOWN if watts is None else f"{watts:,.0f} W" if watts >= LEAST_WHOLE_WATTS else f"{watts:.3g} W"


def _gigabytes(size: float | None) -> str:
    return UNKNOWN if size is None else f"{size / 1e9:.2f} GB"
