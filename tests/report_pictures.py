"""Pictures of a run's report for the documentation: ``python tests/report_pictures.py RUN [FOLDER]``."""

import sys
import tempfile
from pathlib import Path

from headless import browser, look

from wattier.report import write_report
from wattier.rundir import RunDir

SHOWN_PATH = "runs/quickstart"
DRAWN = "[...document.querySelectorAll('.plot')].every(plot => plot.dataset.drawn && plot.querySelector('.main-svg'))"
WITH_A_MARGIN = (
    "{getBoundingClientRect: () => (r => ({x: 0, y: r.y + 4, width: 1200, height: r.height}))"
    "(document.querySelector('#search').getBoundingClientRect())}"
)
# name, width, scheme, which part of the page: its top edge and its height, in pixels, or an element
PICTURES = (
    ("report", 1200, "light", "{getBoundingClientRect: () => ({x: -scrollX, y: -scrollY, width: 1200, height: 1400})}"),
    ("report-dark", 1200, "dark", WITH_A_MARGIN),
    (
        "report-phone",
        390,
        "light",
        "{getBoundingClientRect: () => ({x: -scrollX, y: -scrollY, width: 390, height: 1900})}",
    ),
)


def take(run, folder):
    """Write ``report.png``, ``report-dark.png`` and ``report-phone.png``."""
    with tempfile.TemporaryDirectory() as scratch:
        page = write_report(run, ["html"], Path(scratch))
        page.write_text(page.read_text(encoding="utf-8").replace(str(run.path), SHOWN_PATH), encoding="utf-8")
        with browser(scratch) as address:
            for name, width, scheme, part in PICTURES:
                file = str(folder / f"{name}.png")
                look(address, page, width=width, schemes=(scheme,), ready=DRAWN, picture=file, part=part)


if __name__ == "__main__":
    where = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parents[1] / "docs" / "images"
    take(RunDir.open(Path(sys.argv[1])), where)
