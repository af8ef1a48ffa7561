"""What was found, in sentences."""

from __future__ import annotations

from collections import Counter
from typing import Any

from wattier.findings import Findings
from wattier.records import PhaseEnergy
from wattier.rundir import FULL_STAGE
from wattier.units import UNKNOWN, format_joules, format_ratio
from wattier.views import LedgerInfo, SelectionInfo

NAMED = 6  # trial ids in a sentence


def summary(findings: Findings) -> list[str]:
    """The run in a handful of sentences, the most important first."""
    searched = [row for row in findings.trials.rows if row.stage != FULL_STAGE]
    counts = Counter(row.status for row in searched)
    stages = len({row.stage for row in searched})
    ended = ", ".join(f"{number:,} {status}" for status, number in counts.items())
    sentences = [f"{len(searched):,} trials in {stages} search stage{'s' * (stages != 1)}: {ended}."]
    if not searched:
        sentences = ["No trial has run yet."]
    sentences.append(_energy_sentence(findings.ledger))
    own = findings.own is not None
    sentences.extend(_selection_sentences(findings.selection)[: 1 if own else None])
    if findings.details.pinned or findings.details.vetoed:
        sentences.append(_by_hand(findings))
    if findings.evaluation is None:
        return sentences if own else [*sentences, "No evaluation yet: errors on held-out structures are not known."]
    if findings.evaluation.sources:
        parts = [_source_words(source, metrics) for source, metrics in findings.evaluation.sources.items()]
        sentences.append(
            "Mean energy errors of the ensemble on held-out structures, in eV/atom and as a share of the composition "
            f"baseline's: {', '.join(parts)}."
        )
    sentences += _coverage_sentences(findings)
    return sentences


def how_known(ledger: LedgerInfo) -> str:
    """The method; of several the best known first, with the shares of the weaker ones."""
    methods, total = ledger.joules_by_method, ledger.total.joules
    if not total or len(methods) < 2:
        return ledger.total.method or UNKNOWN
    best, *weaker = methods
    return f"{best}, with " + " and ".join(f"{format_ratio(methods[name] / total)} {name}" for name in weaker)


def share(phase: PhaseEnergy, total: float | None) -> str:
    """A phase's part of the whole."""
    return format_ratio(phase.joules / total) if phase.joules is not None and total else UNKNOWN


def format_number(value: Any) -> str:
    """A measured number to four digits; None is `unknown`."""
    if value is None or isinstance(value, bool | str):
        return UNKNOWN if value is None else str(value)
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def _energy_sentence(ledger: LedgerInfo) -> str:
    known = [phase for phase in ledger.phases if phase.joules is not None]
    if not known or not ledger.total.joules:
        return "Nothing is known about the energy of this run."
    dearest = max(known, key=lambda phase: phase.joules or 0.0)
    unknown = [phase.phase for phase in ledger.phases if phase.joules is None]
    missing = f" Not in that sum, since unknown: {', '.join(unknown)}." if unknown else ""
    wasted = sum(entry.joules or 0.0 for entry in ledger.by_status if entry.status in ("failed", "interrupted"))
    lost = f" Failed and interrupted trials took {format_joules(wasted)} of it." if wasted else ""
    return (
        f"The run has cost {format_joules(ledger.total.joules)} ({how_known(ledger)}), "
        f"{share(dearest, ledger.total.joules)} of it for {dearest.phase}.{lost}{missing}"
    )


def _selection_sentences(selection: SelectionInfo | None) -> list[str]:
    if selection is None:
        return ["No selection yet: no trial has been chosen."]
    record = selection.selection
    tiers = [(t.name, [p.trial_id for p in t.picks]) for t in record.tiers if t.picks]
    picked = "; ".join(f"{name}: {_named(ids)}" for name, ids in tiers)
    were = "was" if len(record.picked) == 1 else "were"
    text = f"{len(record.picked)} of {len(record.candidates)} candidates {were} picked ({picked})."
    if record.projected_joules is None:
        return [text, "What their full training will cost cannot be said."]
    saved = ""
    if selection.saved_joules is not None and record.projected_joules_all:
        ratio = format_ratio(selection.saved_joules / record.projected_joules_all)
        saved = f", {format_joules(selection.saved_joules)} ({ratio}) less than training all candidates"
    return [text, f"Their full training was projected to cost {format_joules(record.projected_joules)}{saved}."]


def _named(ids: list[str]) -> str:
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return ", ".join(ids[:NAMED]) + more


def _by_hand(findings: Findings) -> str:
    parts = []
    if findings.details.pinned:
        parts.append(f"pinned were {_named(list(findings.details.pinned))}")
    if findings.details.vetoed:
        parts.append(f"vetoed were {_named(list(findings.details.vetoed))}")
    text = "; ".join(parts)
    return f"By hand, not by rule: {text}."


def _source_words(source: str, metrics: dict[str, Any]) -> str:
    error = metrics.get("energy_mae_ev_per_atom")
    ratio = metrics.get("energy_mae_ratio")
    baseline = f" ({format_ratio(ratio)})" if ratio is not None else ""
    return f"{source} {UNKNOWN if error is None else f'{error:.3g}'}{baseline}"


def _coverage_sentences(findings: Findings) -> list[str]:
    pooled = [row for row in findings.coverage if row.source == "all sources" and row.observed is not None]
    nouns = {"energy": "energies", "forces": "force components"}
    sentences = []
    for row in pooled:
        doubt = ", outside the 99 % binomial band" if row.is_inside is False else ""
        what = f"{format_ratio(row.observed)} of the held-out {nouns.get(row.quantity, row.quantity)}"
        sentences.append(f"{what} lie inside their {format_ratio(row.target)} intervals{doubt}.")
    return sentences
