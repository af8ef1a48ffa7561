"""The report as text, JSON and CSV: the same numbers, hostile names inert, and the command that writes them."""

import csv
import io
import itertools
import json
import re

import pytest
from typer.testing import CliRunner

from wattier.cli import app
from wattier.errors import UserError
from wattier.report import FORMATS, MOST_ROWS, shown_rows, write_report
from wattier.report_formats import CSV_COLUMNS
from wattier.rundir import append_json_line
from wattier.views import ledger_info, trials_info

EVIL = "a|b</script>\n<img src=x onerror=alert(1)>[x](javascript:alert(1))"
FORMULA = "=HYPERLINK(1)"


def table(run):
    return list(csv.DictReader(io.StringIO((run.path / "trials.csv").read_text(encoding="utf-8"))))


def test_the_csv_has_a_row_a_trial_with_the_figures_of_its_record(whole_run):
    write_report(whole_run)
    rows, trials = table(whole_run), trials_info(whole_run).rows
    assert len(rows) == len(trials)
    for cells, row in zip(rows, trials, strict=True):
        assert (cells["stage"], cells["trial_id"], cells["status"]) == (row.stage, row.trial_id, row.status)
        assert cells["energy_joules"] == ("" if row.energy_joules is None else str(row.energy_joules))
        assert cells["val_loss"] == ("" if row.val_loss is None else str(row.val_loss))
        assert cells["param:hidden_dim"] == str(row.params.get("hidden_dim", ""))
    assert list(rows[0])[: len(CSV_COLUMNS)] == list(CSV_COLUMNS)


def test_the_json_holds_the_views(whole_run):
    write_report(whole_run)
    data = json.loads((whole_run.path / "report.json").read_text(encoding="utf-8"))
    ledger = ledger_info(whole_run)
    assert data["ledger"]["total"]["joules"] == ledger.total.joules
    assert [phase["phase"] for phase in data["ledger"]["phases"]] == [phase.phase for phase in ledger.phases]
    assert data["selection"]["selection"]["tiers"][0]["picks"][0]["trial_id"] == whole_run.selection().picked[0]
    assert data["config"]["seed"] == whole_run.config().seed
    assert "parity" not in data["evaluation"]
    assert (whole_run.path / "report.json").stat().st_size < 200_000


def test_the_text_says_the_same(whole_run):
    write_report(whole_run)
    text = (whole_run.path / "report.md").read_text(encoding="utf-8")
    for words in (
        "## Tiers",
        "## Funnel",
        "## Energy",
        "## Evaluation",
        "report.html",
        whole_run.selection().picked[0],
    ):
        assert words in text
    lines = text.splitlines()
    for above, line in itertools.pairwise(lines):  # a table has as many cells in each of its lines
        if above.startswith("|") and line.startswith("|"):
            assert above.replace("\\|", "").count("|") == line.replace("\\|", "").count("|"), line


def test_hostile_names_mean_nothing_in_any_format(whole_run):
    row = whole_run.trials("deep")[0].to_dict()
    row |= {"trial_id": EVIL, "params": {FORMULA: FORMULA}, "error": FORMULA, "status": "failed"}
    append_json_line(whole_run.trials_path, row)
    data = json.loads(whole_run.evaluation_path.read_text())
    data["sources"][EVIL] = data["sources"].pop("oc20")
    whole_run.evaluation_path.write_text(json.dumps(data))
    write_report(whole_run)
    text = (whole_run.path / "report.md").read_text(encoding="utf-8")
    assert "<img" not in text
    assert not re.search(r"(?<!\\)\]\(", text)  # no link
    assert "a\\|b" in text
    cells = next(cells for cells in table(whole_run) if cells["trial_id"] == EVIL)
    assert cells["note"] == "failed: " + FORMULA or cells["note"] == "'" + FORMULA
    assert all(not value.startswith("=") for name, value in cells.items() if name != "trial_id")


def test_at_every_point_of_a_run(empty_run, searched_run):
    for run in (empty_run, searched_run):
        write_report(run)
        assert all((run.path / name).stat().st_size > 50 for name in FORMATS.values())


def test_many_trials_are_listed_in_part_and_the_page_says_so(whole_run):
    rows = list(trials_info(whole_run).rows)
    many = [rows[0]._replace(trial_id=f"t{i}", val_loss=float(i), tier=None) for i in range(2 * MOST_ROWS)] + rows
    shown = shown_rows(many)
    assert len(shown) == MOST_ROWS
    assert {row.trial_id for row in rows if row.tier} <= {row.trial_id for row in shown}
    assert "t0" in {row.trial_id for row in shown}
    assert shown == [row for row in many if row in shown]


def test_the_command_writes_what_was_asked_where_it_was_asked(whole_run, tmp_path):
    folder = tmp_path / "elsewhere"
    result = CliRunner().invoke(app, ["report", str(whole_run.path), "--format", "md, csv", "--output", str(folder)])
    assert result.exit_code == 0
    assert result.output.split() == [str(folder / "report.md")]
    assert sorted(path.name for path in folder.iterdir()) == ["report.md", "trials.csv"]
    assert not whole_run.report_path.exists()


@pytest.mark.parametrize(("formats", "words"), [(["pdf"], "'pdf', but must be of html, md"), ([], "'empty'")])
def test_an_unknown_format_is_refused(whole_run, formats, words):
    with pytest.raises(UserError, match=words):
        write_report(whole_run, formats)


def test_a_folder_that_cannot_be_written_is_a_users_error(whole_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(whole_run, ["csv"], tmp_path / "file")
