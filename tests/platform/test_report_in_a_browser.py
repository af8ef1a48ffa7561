"""The report as Chromium shows it: no error, no request, no page wider than the screen; by day, by night, on paper.

``WATTIER_PICTURES=folder`` keeps the pictures, to be looked at.
"""

import itertools
import os
import re
from pathlib import Path

import pytest
from fabricated_campaign import fabricate
from headless import CHROMIUM, browser, look

from wattier import figure_style, report
from wattier.report import write_report
from wattier.rundir import append_json_line

MOST_BYTES = 8_000_000
DRAWN = "[...document.querySelectorAll('.plot')].every(plot => plot.dataset.drawn && plot.querySelector('.main-svg'))"
OVERFLOW = "document.documentElement.scrollWidth - innerWidth"
FIGURES = "document.querySelectorAll('.plot').length"
PAGE_COLOUR = "getComputedStyle(document.body).backgroundColor"
INK_OF_FIGURES = "document.querySelector('.plot').layout.template.layout.font.color"
HEADINGS = "[...document.querySelectorAll('h1, h2, h3')].map(heading => +heading.tagName[1])"
UNNAMED = (
    "[...document.querySelectorAll('[role=img], [role=region], button, a')]"
    ".filter(part => !(part.getAttribute('aria-label') || part.textContent.trim())).length"
)
HEADLESS_TABLES = (
    "[...document.querySelectorAll('table')].filter(table => !table.querySelector('thead th[scope=col]')).length"
)
UNREACHABLE = (
    "[...document.querySelectorAll('.scroll')]"
    ".filter(part => part.scrollWidth > part.clientWidth && part.tabIndex < 0).length"
)
LOSSES = (
    "[...document.querySelectorAll('table.sortable tbody tr')]"
    ".map(row => row.cells[4].dataset.sort).filter(Boolean).map(Number)"
)
SORT_BY_LOSS = "document.querySelectorAll('table.sortable th button')[4].click()"
HURT, NIGHT = "window.hurt", "rgb(20, 24, 29)"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("chromium")) as address:
        yield address


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Reports of a campaign of 400 trials with 15 members, and of a small one with a single member."""
    folder = tmp_path_factory.mktemp("campaigns")
    runs = {
        "15": fabricate(folder / "many", trials=400, members=15),
        "1": fabricate(folder / "one", trials=40, members=1),
    }
    evil = "</script><img src=x onerror=window.hurt=1>"
    row = runs["1"].trials("final")[0].to_dict() | {"trial_id": evil, "params": {evil: evil}, "error": evil}
    append_json_line(runs["1"].trials_path, row)
    return {members: write_report(run, ["html"]) for members, run in runs.items()}


def pictures(name):
    folder = os.environ.get("WATTIER_PICTURES")
    return None if folder is None else str(Path(folder) / f"{name}-{{scheme}}.png")


@pytest.mark.parametrize("members", ["15", "1"])
@pytest.mark.parametrize("size", SIZES)
def test_it_opens_without_an_error_or_a_request_and_fits_the_screen(chromium, pages, members, size):
    width, height = SIZES[size]
    questions = [OVERFLOW, FIGURES, PAGE_COLOUR, INK_OF_FIGURES, HEADINGS, UNNAMED, HEADLESS_TABLES, UNREACHABLE, HURT]
    page = pages[members]
    assert page.stat().st_size < MOST_BYTES
    by_day, by_night = look(
        chromium, page, width=width, height=height, schemes=("light", "dark"), ready=DRAWN, questions=questions,
        picture=pictures(f"{members}-{size}"),
    )  # fmt: skip
    for seen in (by_day, by_night):
        assert seen.errors == []
        assert seen.requests == []
        assert seen.answers[OVERFLOW] <= 0
        assert seen.answers[FIGURES] > 20
        levels = seen.answers[HEADINGS]
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
        assert [seen.answers[question] for question in (UNNAMED, HEADLESS_TABLES, UNREACHABLE, HURT)] == [0, 0, 0, None]
    assert (by_day.answers[PAGE_COLOUR], by_day.answers[INK_OF_FIGURES]) == ("rgb(255, 255, 255)", figure_style.INK)
    assert (by_night.answers[PAGE_COLOUR], by_night.answers[INK_OF_FIGURES]) == (NIGHT, figure_style.NIGHT_INK)


def test_the_button_turns_day_into_night_headings_sort_and_paper_is_white(chromium, pages, tmp_path):
    pdf = tmp_path / "report.pdf"
    questions = ["document.querySelector('button.theme').click()", PAGE_COLOUR, INK_OF_FIGURES, SORT_BY_LOSS, LOSSES]
    (seen,) = look(chromium, pages["1"], ready=DRAWN, questions=questions, pdf=pdf)
    assert seen.answers[PAGE_COLOUR] == NIGHT
    assert seen.answers[INK_OF_FIGURES] == figure_style.NIGHT_INK
    assert seen.answers[LOSSES] == sorted(seen.answers[LOSSES])
    assert seen.errors == []
    printed = pdf.read_bytes()
    assert 5 < len(re.findall(rb"/Type\s*/Page\b", printed)) < 60


def luminance(colour):
    """Relative luminance (WCAG 2.2)."""
    digits = colour.lstrip("#")
    digits = "".join(d * 2 for d in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, two):
    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def themes():
    """The colours of the page by day, by night and on paper, as the style sheet has them."""
    style = (Path(report.__file__).parent / "templates" / "report" / "style.css").read_text(encoding="utf-8")
    return [dict(re.findall(r"--([\w-]+): (#[0-9a-f]+)", block)) for block in re.findall(r"--ink: #[^}]*", style)]


def test_words_and_marks_stand_out_from_their_ground():
    found = themes()
    assert len(found) == 4  # day, night by the system, night by the button, paper
    for theme in found:
        for ink, ground in (("ink", "page"), ("ink", "soft"), ("quiet", "page"), ("quiet", "soft"), ("link", "page"),
                            ("ink", "line"), ("good-ink", "good"), ("bad-ink", "bad"), ("one-ink", "one"),
                            ("two-ink", "two"), ("three-ink", "three")):  # fmt: skip
            assert contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground, theme[ink], theme[ground])
    assert found[1] == found[2]
    for ground in ("#ffffff", figure_style.NIGHT_PAGE):
        for colour in (figure_style.ORANGE, figure_style.BLUE, figure_style.GREEN, figure_style.GREY):
            assert contrast(colour, ground) >= 3, (colour, ground)
    assert contrast(figure_style.INK, "#ffffff") >= 4.5
    assert contrast(figure_style.NIGHT_INK, figure_style.NIGHT_PAGE) >= 4.5
