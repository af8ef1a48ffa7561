"""The report: one HTML file that opens anywhere, without a network."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from wattier import plots, views
from wattier.records import PhaseEnergy
from wattier.rundir import FULL_STAGE, RunDir, read_json, write_text
from wattier.units import UNKNOWN, format_joules, format_ratio, format_seconds

PACKAGES = ("wattier", "torch", "ray", "optuna", "numpy", "plotly", "pydantic", "ase", "nvidia-ml-py")
NO_BREAK = "\u00a0"
_TEMPLATES = Path(__file__).parent / "templates"


def write_report(run: RunDir) -> Path:
    """Write ``report.html`` from what the run directory holds so far, and return its path.

    Raises:
        UserError: a record of the run is damaged.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "joules": lambda value: format_joules(value).replace(" ", NO_BREAK),
        "seconds": lambda value: format_seconds(value).replace(" ", NO_BREAK),
        "percent": format_ratio,
        "number": format_number,
        "count": format_count,
    }
    write_text(run.report_path, environment.get_template("report.html").render(_context(run)))
    return run.report_path


def format_number(value: Any) -> str:
    """A measured number to four digits; None is `unknown`."""
    return UNKNOWN if value is None else f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


def format_count(value: Any) -> str:
    """A whole number with thousands marked; None is `unknown`."""
    return UNKNOWN if value is None else f"{value:,}"


def _context(run: RunDir) -> dict[str, Any]:
    config, trials, ledger = run.config(), views.trials_info(run), views.ledger_info(run)
    selection, evaluation = views.selection_info(run), views.evaluation_info(run)
    cleaning = _cleaning(run)
    return {
        "name": config.name,
        "own": config.trial,
        "throttled_share": config.telemetry.throttled_share,
        "path": str(run.path),
        "written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "trials": trials,
        "varied": _varied(trials),
        "ledger": ledger,
        "projections": views.projection_info(run),
        "phases": [(phase, _share(phase, ledger.total.joules)) for phase in ledger.phases],
        "selection": selection,
        "evaluation": evaluation,
        "how_known": _how_known(ledger),
        "sentences": _summary(trials, ledger, selection, evaluation, own=config.trial is not None),
        "figures": _figures(run, ledger, evaluation),
        "cleaning": cleaning,
        "reasons": list(dict.fromkeys(r for counts in cleaning.get("removed", {}).values() for r in counts)),
        "config_text": run.config_path.read_text(encoding="utf-8"),
        "versions": _versions(),
        "plotly_js": Markup(get_plotlyjs()),
    }


def _figures(run: RunDir, ledger: views.LedgerInfo, evaluation: views.EvaluationInfo | None) -> dict[str, Markup]:
    """JSON of each figure by its name; only those that have something to show."""
    figures = {}
    pareto = views.pareto_info(run)
    if pareto and pareto.points:
        figures["pareto"] = plots.pareto_figure(pareto)
    curves = views.learning_curves_info(run)
    for stage in dict.fromkeys(curve.stage for curve in curves):
        figures[f"curves-{stage}"] = plots.learning_curves_figure([c for c in curves if c.stage == stage])
    if ledger.phases:
        figures["ledger"] = plots.ledger_figure(ledger)
    if evaluation and evaluation.parity:
        figures["energy-parity"] = plots.energy_parity_figure(evaluation)
        figures["force-parity"] = plots.force_parity_figure(evaluation)
    if evaluation and evaluation.calibration:
        figures["calibration"] = plots.calibration_figure(evaluation)
    return {name: Markup(plots.figure_json(figure)) for name, figure in figures.items()}


def _summary(
    trials: views.TrialsInfo,
    ledger: views.LedgerInfo,
    selection: views.SelectionInfo | None,
    evaluation: views.EvaluationInfo | None,
    *,
    own: bool,
) -> list[str]:
    """What was found, in sentences."""
    searched = [row for row in trials.rows if row.stage != FULL_STAGE]
    counts = Counter(row.status for row in searched)
    stages = len({row.stage for row in searched})
    ended = ", ".join(f"{number} {status}" for status, number in counts.items())
    sentences = [f"{len(searched)} trials in {stages} search stage{'s' * (stages != 1)}: {ended}."]
    if not searched:
        sentences = ["No trial has run yet."]
    sentences.append(_energy_sentence(ledger))
    sentences.extend(_selection_sentences(selection)[: 1 if own else None])
    if evaluation is None and not own:
        sentences.append("No evaluation yet: errors on held-out structures are not known.")
    for source, metrics in (evaluation.sources if evaluation else {}).items():
        ratio = metrics.get("energy_mae_ratio")
        error = format_number(metrics.get("energy_mae_ev_per_atom"))
        baseline = f", {format_ratio(ratio)} of the composition baseline's" if ratio is not None else ""
        sentences.append(f"On held-out {source} the ensemble's mean energy error is {error} eV/atom{baseline}.")
    return sentences


def _energy_sentence(ledger: views.LedgerInfo) -> str:
    known = [phase for phase in ledger.phases if phase.joules is not None]
    if not known or not ledger.total.joules:
        return "Nothing is known about the energy of this run."
    dearest = max(known, key=lambda phase: phase.joules or 0.0)
    unknown = [phase.phase for phase in ledger.phases if phase.joules is None]
    missing = f" Not in that sum, since unknown: {', '.join(unknown)}." if unknown else ""
    wasted = sum(entry.joules or 0.0 for entry in ledger.by_status if entry.status in ("failed", "interrupted"))
    lost = f" Failed and interrupted trials took {format_joules(wasted)} of it." if wasted else ""
    return (
        f"The run has cost {format_joules(ledger.total.joules)} ({_how_known(ledger)}), "
        f"{_share(dearest, ledger.total.joules)} of it for {dearest.phase}.{lost}{missing}"
    )


def _how_known(ledger: views.LedgerInfo) -> str:
    """The method; of several the best known first, with the shares of the weaker ones."""
    methods, total = ledger.joules_by_method, ledger.total.joules
    if not total or len(methods) < 2:
        return ledger.total.method or UNKNOWN
    best, *weaker = methods
    return f"{best}, with " + " and ".join(f"{format_ratio(methods[name] / total)} {name}" for name in weaker)


def _selection_sentences(selection: views.SelectionInfo | None) -> list[str]:
    if selection is None:
        return ["No selection yet: no trial has been chosen."]
    record = selection.selection
    tiers = [(t.name, ", ".join(p.trial_id for p in t.picks)) for t in record.tiers if t.picks]
    picked = "; ".join(f"{name}: {ids}" for name, ids in tiers)
    text = f"{len(record.picked)} of {len(record.candidates)} candidates were picked ({picked})."
    if record.projected_joules is None:
        return [text, "What their full training will cost cannot be said."]
    saved = ""
    if selection.saved_joules is not None and record.projected_joules_all:
        ratio = format_ratio(selection.saved_joules / record.projected_joules_all)
        saved = f", {format_joules(selection.saved_joules)} ({ratio}) less than training all candidates"
    return [text, f"Their full training was projected to cost {format_joules(record.projected_joules)}{saved}."]


def _share(phase: PhaseEnergy, total: float | None) -> str:
    return format_ratio(phase.joules / total) if phase.joules is not None and total else UNKNOWN


def _varied(trials: views.TrialsInfo) -> list[str]:
    """Parameters that differ between trials: the others are in the config."""
    values = {n: {json.dumps(r.params.get(n)) for r in trials.rows if r.params} for n in trials.param_names}
    return [name for name, seen in values.items() if len(seen) > 1] or list(trials.param_names)


def _cleaning(run: RunDir) -> dict[str, Any]:
    path = run.store_manifest_path
    cleaning: dict[str, Any] = read_json(path).get("cleaning", {}) if path.exists() else {}
    return cleaning


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
