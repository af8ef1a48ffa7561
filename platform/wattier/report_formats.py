"""The report for machines: JSON of all views, and a CSV with a row a trial."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from wattier.findings import Findings
from wattier.records import finite_or_none

CSV_COLUMNS = (
    "stage", "trial_id", "status", "tier", "val_loss", "energy_joules", "energy_method", "joules_low", "joules_high",
    "coverage_ratio", "throttled_ratio", "throttled", "epochs_done", "epochs", "wall_seconds", "mean_watts",
    "n_parameters", "peak_memory_bytes", "started_at",
)  # fmt: skip
LEFT_OUT = ("config", "config_text", "curves", "parallel", "power", "errors")  # drawn from what is beside it, or large
_FORMULAS = ("=", "+", "-", "@", "\t", "\r")


def to_json(findings: Findings, written: str) -> str:
    """Every view as JSON, units in the names, null for unknown."""
    data: dict[str, Any] = {
        "written": written,
        "name": findings.config.name,
        "config": findings.config.model_dump(mode="json"),
    }
    data |= {name: plain(value) for name, value in findings._asdict().items() if name not in LEFT_OUT}
    if data.get("evaluation"):
        data["evaluation"].pop("parity", None)
    return json.dumps(finite_or_none(data), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def to_csv(findings: Findings) -> str:
    """A row a trial, hyper-parameters last as ``param:<name>``; an empty cell is unknown."""
    names = list(findings.trials.param_names)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*CSV_COLUMNS, *(f"param:{name}" for name in names), "note"])
    for row in findings.trials.rows:
        cells = [getattr(row, name) for name in CSV_COLUMNS]
        cells += [row.params.get(name) for name in names]
        writer.writerow([_cell(cell) for cell in [*cells, row.note]])
    return text.getvalue()


def plain(value: Any) -> Any:
    """Tuples with names and records as dicts, all else as JSON has it."""
    if hasattr(value, "_asdict"):
        return {name: plain(item) for name, item in value._asdict().items()}
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _cell(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula is marked as text."""
    if value is None:
        return ""
    if isinstance(value, str) and value.startswith(_FORMULAS):
        return f"'{value}"
    return value if isinstance(value, str | int | float) else json.dumps(value)
