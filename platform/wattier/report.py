"""The report: one HTML file that opens anywhere, without a network, and the same as text, JSON and CSV beside it."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from wattier.errors import UserError
from wattier.figure_style import NIGHT_TEMPLATE, TEMPLATE, in_script
from wattier.findings import Findings, gather
from wattier.report_figures import as_sentence, drawings, funnel_table, power_table, tight
from wattier.report_formats import to_csv, to_json
from wattier.report_summary import format_number, how_known, share, summary
from wattier.rundir import RunDir, write_text
from wattier.units import UNKNOWN, format_bytes, format_joules, format_ratio, format_seconds
from wattier.views import TrialRow
from wattier.views_evaluation import TALK_NAMES, calibration_rows
from wattier.views_search import varied_parameters
from wattier.views_selection import FLAG_WORDS

FORMATS = {"html": "report.html", "md": "report.md", "json": "report.json", "csv": "trials.csv"}
MOST_ROWS = 400  # of the table of trials; trials.csv has all
NO_BREAK = "\u00a0"
_TEMPLATES = Path(__file__).parent / "templates" / "report"
_MARKDOWN = re.compile(r"([\\`*_{}\[\]|#])")


def write_report(run: RunDir, formats: Sequence[str] = tuple(FORMATS), folder: Path | None = None) -> Path:
    """Write the report from what the run directory holds so far.

    Args:
        run: what to report on.
        formats: of `FORMATS`.
        folder: where to; None = the run directory.

    Returns:
        The path of the first file.

    Raises:
        UserError: a record of the run is damaged, a format is unknown, or the folder cannot be written.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise UserError(f"--format: is {','.join(unknown) or 'empty'!r}, but must be of {', '.join(FORMATS)}")
    findings, folder = gather(run), run.path if folder is None else folder
    written = time.strftime("%Y-%m-%d %H:%M:%S %z")
    made = {
        "html": lambda: _page(findings, written),
        "md": lambda: _text(findings, written),
        "json": lambda: to_json(findings, written),
        "csv": lambda: to_csv(findings),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in formats:
            write_text(folder / FORMATS[name], made[name]())
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}). Give another --output.") from error
    return folder / FORMATS[formats[0]]


def format_count(value: Any) -> str:
    """A whole number with thousands marked; None is `unknown`."""
    return UNKNOWN if value is None else f"{value:,}" if isinstance(value, int | float) else str(value)


def shown_rows(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """The rows of the table of trials: all, or if they are many the picked, the failed and the best of each stage."""
    if len(rows) <= MOST_ROWS:
        return list(rows)
    kept = [row for row in rows if row.tier or row.status == "failed"][: MOST_ROWS // 2]
    rest = sorted(
        (row for row in rows if row not in kept), key=lambda r: (r.val_loss is None, r.val_loss or 0.0, r.trial_id)
    )
    wanted = {(row.stage, row.trial_id) for row in [*kept, *rest[: MOST_ROWS - len(kept)]]}
    return [row for row in rows if (row.stage, row.trial_id) in wanted]


def _page(findings: Findings, written: str) -> str:
    figures = drawings(findings)
    environment = _environment(autoescape=True)
    environment.filters |= {
        "tight": tight,
        "joules": lambda value: format_joules(value).replace(" ", NO_BREAK),
        "seconds": lambda value: format_seconds(value).replace(" ", NO_BREAK),
        "size": lambda value: UNKNOWN if value is None else format_bytes(value).replace(" ", NO_BREAK),
    }
    packed, themes = _packed_plotly()
    context = _context(findings, written) | {
        "figures": figures,
        "figure_json": {name: Markup(drawing.json) for name, drawing in figures.items()},
        "style": Markup(_source("style.css")),
        "script": Markup(_source("script.js")),
        "plotly_packed": Markup(packed),
        "themes": Markup(themes),
    }
    return environment.get_template("page.html").render(context)


def _text(findings: Findings, written: str) -> str:
    environment = _environment(autoescape=False)
    environment.filters |= {"joules": format_joules, "seconds": format_seconds, "md": _markdown}
    return environment.get_template("report.md").render(_context(findings, written))


def _environment(*, autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "sentence": as_sentence,
        "percent": format_ratio,
        "number": format_number,
        "count": format_count,
    }
    return environment


def _context(findings: Findings, written: str) -> dict[str, Any]:
    """What both templates read."""
    rows = shown_rows(findings.trials.rows)
    cleaning = findings.cleaning
    return {
        **findings._asdict(),
        "name": findings.config.name,
        "own": findings.own,
        "written": written,
        "rows": rows,
        "varied": varied_parameters(findings.trials.rows) or list(findings.trials.param_names),
        "phases": [(phase, share(phase, findings.ledger.total.joules)) for phase in findings.ledger.phases],
        "how_known": how_known(findings.ledger),
        "sentences": summary(findings),
        "funnel_table": funnel_table(findings),
        "power_table": power_table(findings),
        "calibration_rows": calibration_rows(findings.evaluation) if findings.evaluation else (),
        "talk_names": TALK_NAMES,
        "flag_words": FLAG_WORDS,
        "throttled_share": findings.config.telemetry.throttled_share,
        "reasons": list(dict.fromkeys(r for counts in cleaning.get("removed", {}).values() for r in counts)),
    }


@cache
def _packed_plotly() -> tuple[str, str]:
    """Plotly's own bundle, packed to two fifths, and both templates as JSON; the page unpacks it with the browser."""
    packed = base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()
    themes = {"day": TEMPLATE.to_plotly_json(), "night": NIGHT_TEMPLATE.to_plotly_json()}
    return packed, in_script(json.dumps(themes))


@cache
def _source(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _markdown(value: Any) -> str:
    """A text in which Markdown and HTML mean nothing."""
    return _MARKDOWN.sub(r"\\\1", html.escape(" ".join(str(value).split()), quote=False))
