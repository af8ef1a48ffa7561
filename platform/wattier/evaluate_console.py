"""What ``wattier evaluate`` shows on a screen: errors and coverage by source."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from wattier.rundir import RunDir
from wattier.units import UNKNOWN, format_ratio


def print_evaluation(run: RunDir, console: Console) -> None:
    """A row a source and one of all: errors, and what the intervals cover of it. Nothing before the evaluation."""
    evaluation = run.evaluation()
    if evaluation is None:
        return
    intervals = evaluation.get("intervals") or {}
    energy = intervals.get("energy") or {}
    rows = [
        (name, metrics, (energy.get("by_source") or {}).get(name)) for name, metrics in evaluation["sources"].items()
    ]
    rows.append(("all", evaluation.get("pooled") or {}, energy.get("pooled")))
    target = format_ratio(intervals.get("target"))
    table = Table(title="held-out structures")
    for name in (
        "source",
        "structures",
        "energy MAE meV/atom",
        "force MAE meV/Å",
        f"{target} intervals cover",
        "99 % band",
    ):
        table.add_column(name, justify="left" if name == "source" else "right")
    for name, metrics, row in rows:
        covered = row or {}
        band = [format_ratio(covered.get(key)) for key in ("band_low", "band_high")]
        table.add_row(
            Text(name),
            str(metrics.get("n_structures", UNKNOWN)),
            _milli(metrics.get("energy_mae_ev_per_atom")),
            _milli(metrics.get("force_mae_ev_per_angstrom")),
            format_ratio(covered.get("observed")),
            UNKNOWN if covered.get("band_low") is None else " to ".join(band),
        )
    console.print(table)


def _milli(value: Any) -> str:
    return UNKNOWN if value is None else f"{1000 * value:.3g}"
