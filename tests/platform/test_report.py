"""The report: one offline file, safe against hostile names, at every point of a run."""

import base64
import gzip
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from wattier import figures_evaluation, plots
from wattier.report import write_report
from wattier.rundir import append_json_line
from wattier.views import evaluation_info, learning_curves_info, ledger_info, pareto_info

HOSTILE = "<img src=x onerror=alert(1)>"
LOADING = {"src", "href", "srcset", "poster", "data", "action", "background"}


class Page(HTMLParser):
    """Elements, attributes, visible text and scripts of a page."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.loads, self.ids, self.figures = [], [], [], {}
        self.handlers, self.words, self.target, self.element = [], [], None, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.elements.append(tag)
        self.element = tag
        is_figure = tag == "script" and found.get("class") == "figure-data"
        self.target = found["id"].replace("data-", "figure-", 1) if is_figure else None
        self.ids += [found["id"]] if "id" in found else []
        self.loads += [value for name, value in attributes if name in LOADING]
        self.handlers += [name for name in found if name.startswith("on")]

    def handle_endtag(self, _tag):
        self.element, self.target = "", None

    def handle_data(self, data):
        if self.target:
            self.figures[self.target] = json.loads(data)
        elif self.element not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def read(run):
    path = write_report(run)
    assert path == run.report_path
    return Page(path.read_text(encoding="utf-8"))


def test_the_whole_report_tells_everything(whole_run):
    page = read(whole_run)
    for words in ("Tiers", "the lowest of", "MAE / baseline", "20 %", "force above threshold", "part-7.extxyz"):
        assert words in page.text
    assert "no counter: estimated" in page.text
    assert "(counter, with < 0.1 % integrated and 0.4 % estimated)" in page.text
    assert "plotly 7." in page.text or "plotly 6." in page.text
    assert "learning_rate: 0.0001" not in page.text
    assert "low: 0.0001" in page.text  # the config
    names = ["pareto", "curves-wide", "curves-deep", "curves-full", "ledger", "calibration", "parallel"]
    names += ["funnel-trials", "funnel-joules", "progress-trials", "progress-joules"]
    kinds = ("energy-density", "energy-bars", "force-density")
    names += [f"parity-{kind}-{source}" for kind in kinds for source in (0, 1)]
    assert sorted(page.figures) == sorted(f"figure-{name}" for name in names)
    assert set(page.figures) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_nothing_is_loaded_from_anywhere(whole_run):
    page = read(whole_run)
    assert all(value.startswith("#") for value in page.loads)
    assert "link" not in page.elements
    text = whole_run.report_path.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    style = re.search(r"<style>(.*?)</style>", text, re.S).group(1)
    assert "url(" not in style
    assert "@import" not in style
    packed = re.search(r'id="plotly-packed">([^<]*)<', text).group(1)
    assert gzip.decompress(base64.b64decode(packed)).count(b"plotly.js v") == 1


def test_hostile_names_are_shown_not_obeyed(whole_run):
    evil = "</script><script>alert(1)</script>"
    row = whole_run.trials("deep")[0].to_dict()
    row |= {"trial_id": HOSTILE, "params": {evil: evil, "hidden_dim": 64}, "error": evil, "val_loss": 0.2}
    append_json_line(whole_run.trials_path, row)
    data = json.loads(whole_run.evaluation_path.read_text())
    for part in ("sources", "parity"):
        data[part][HOSTILE] = data[part].pop("oc20")
    whole_run.evaluation_path.write_text(json.dumps(data))
    plain = Page(write_report(whole_run).read_text(encoding="utf-8"))
    assert "img" not in plain.elements
    assert plain.handlers == []
    assert HOSTILE in plain.text
    assert evil in plain.text
    text = whole_run.report_path.read_text(encoding="utf-8")
    assert HOSTILE not in text
    assert evil not in text
    # Plotly obeys some HTML in its own texts: there, names are escaped a second time.
    assert HOSTILE not in json.dumps(plain.figures)
    assert "&lt;img" in json.dumps(plain.figures)


def test_a_searched_run_says_what_is_missing(searched_run):
    page = read(searched_run)
    assert "No selection yet" in page.text
    assert "No evaluation yet" in page.text
    assert "figure-pareto" in page.figures
    assert "figure-calibration" not in page.figures


def test_an_empty_run_has_a_report_too(empty_run):
    page = read(empty_run)
    for words in ("No trial has run yet", "Nothing is known about the energy", "No data has been cleaned yet"):
        assert words in page.text
    assert page.figures == {}


def test_the_report_is_replaced_whole(searched_run):
    write_report(searched_run)
    write_report(searched_run)
    made = sorted(p.name for p in searched_run.path.glob("*report*"))
    assert made == ["report.html", "report.json", "report.md"]
    assert not list(searched_run.path.glob(".*tmp"))


def test_json_of_a_figure_may_stand_in_a_script(whole_run):
    info = pareto_info(whole_run)._replace(stage="</script>&<b>")
    text = plots.figure_json(plots.pareto_figure(info))
    assert not set("<>&") & set(text)
    assert "&lt;/script&gt;&amp;&lt;b&gt;" in json.loads(text)["layout"]["title"]["text"]


def axis_titles(figure):
    layout = figure.to_plotly_json()["layout"]
    return {k: v.get("title", {}).get("text") for k, v in layout.items() if re.fullmatch(r"[xy]axis\d*", k)}


def test_axes_carry_their_units(whole_run):
    evaluation = evaluation_info(whole_run)
    assert axis_titles(plots.pareto_figure(pareto_info(whole_run)))["xaxis"] == "energy of the trial (J)"
    assert axis_titles(plots.ledger_figure(ledger_info(whole_run)))["xaxis"] == "energy (J)"
    energy = figures_evaluation.parity_bars_figure(evaluation, "ani1x", "energy")
    forces = figures_evaluation.parity_density_figure(evaluation, "ani1x", "forces")
    assert axis_titles(energy)["xaxis"] == "true (eV/atom)"
    assert axis_titles(forces)["yaxis"] == "predicted (eV/Å)"
    assert "interval" in axis_titles(figures_evaluation.calibration_figure(evaluation))["xaxis"]


def test_the_scatter_draws_stopped_trials_as_crosses(whole_run):
    figure = plots.pareto_figure(pareto_info(whole_run))
    symbols = {trace.name: trace.marker.symbol for trace in figure.data if trace.mode != "lines"}
    assert symbols["stopped early, not compared"] == "x-thin-open"
    assert symbols["accurate"] == "diamond"
    assert symbols["finished, not picked"] == "circle"


def test_a_wide_axis_is_logarithmic_with_round_ticks(whole_run):
    axis = plots.pareto_figure(pareto_info(whole_run)).layout.xaxis
    assert axis.type == "log"
    assert dict(zip(axis.ticktext, axis.tickvals, strict=True))["20k"] == pytest.approx(20_000)


def test_parity_figures_draw_the_spread_and_survive_a_source_without_points(whole_run):
    evaluation = evaluation_info(whole_run)
    figure = figures_evaluation.parity_bars_figure(evaluation, "ani1x", "energy")
    spread = evaluation.parity["ani1x"]["energy_std_ev_per_atom"]
    assert list(figure.data[1].error_y.array) == pytest.approx(spread, rel=1e-4)
    assert list(figure.data[1].x) == pytest.approx(evaluation.parity["ani1x"]["energy_true_ev_per_atom"], rel=1e-4)
    bare = evaluation._replace(parity={"empty": {}, **evaluation.parity})
    assert figures_evaluation.parity_bars_figure(bare, "empty", "energy") is None
    assert figures_evaluation.parity_density_figure(bare, "empty", "forces") is None


def test_density_counts_neighbours(whole_run):
    parity = {"cluster": {
        "energy_true_ev_per_atom": [0.0] * 50 + [1.0],
        "energy_predicted_ev_per_atom": [0.0] * 50 + [1.0],
    }}  # fmt: skip
    evaluation = evaluation_info(whole_run)._replace(parity=parity)
    figure = figures_evaluation.parity_density_figure(evaluation, "cluster", "energy")
    colours = dict(zip(figure.data[1].x, figure.data[1].marker.color, strict=True))
    assert colours == {1.0: 0.0, 0.0: pytest.approx(math.log10(50), rel=1e-4)}


def test_curves_of_picked_trials_stand_out(whole_run):
    curves = [curve for curve in learning_curves_info(whole_run) if curve.stage == "deep"]
    figure = plots.learning_curves_figure(curves)
    widths = {trace.name: trace.line.width for trace in figure.data}
    assert widths["accurate"] > widths["complete"]
    assert {trace.line.dash for trace in figure.data if trace.name == "pruned"} == {"dot"}


@pytest.mark.parametrize("joules", [None, 0.0])
def test_a_ledger_without_joules_is_drawn(joules, whole_run):
    ledger = ledger_info(whole_run)
    dark = ledger._replace(
        phases=(replace(ledger.phases[0], joules=joules, method=None),), total=replace(ledger.total, joules=joules)
    )
    figure = plots.ledger_figure(dark)
    assert figure.data[0].text[0] == ("unknown" if joules is None else "0 J")
