"""The blocks of docs/own_model.md and docs/search.md, run as they stand there."""

import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import wattier
from wattier.cli import EXIT_BAD_INPUT, EXIT_FAILED_TRIALS, EXIT_FAILURE
from wattier.config import RunConfig, load_config
from wattier.config_search import SearchSection
from wattier.data_cli import EXIT_INTERRUPTED
from wattier.departure import EXIT_NOT_FINISHED
from wattier.own_model import Trial
from wattier.rundir import RunDir

DOCS = Path(__file__).parents[2] / "docs"


def blocks(name, language):
    return re.findall(
        rf"^```{language}\n(.*?)^```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


class MyModel:
    """What the reader has: it learns, the wider the better."""

    def __init__(self, width):
        self.loss = 1.0 + 1.0 / width

    def train_one_epoch(self, learning_rate):
        self.loss *= 1.0 - learning_rate
        return self.loss


def run_block(source, **names):
    """Run a block as a script, in this process."""
    exec(compile(source, "docs", "exec"), names := {"__name__": "__main__", **names})
    return names


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trace = tmp_path / "watts.csv"
    trace.write_text("time_seconds,device,power_watts\n0,node,50\n")
    found, search = [], wattier.search  # each search inline, without a line of progress, with a known meter

    def inline(*arguments, **settings):
        settings |= {"launcher": "inline", "quiet": True}
        settings.setdefault("telemetry", {"source": f"replay:{trace}", "interval_seconds": 0.02})
        found.append(search(*arguments, **settings, sampler="tpe"))
        return found[-1]

    monkeypatch.setattr(wattier, "search", inline)
    return found


def test_the_ten_lines(here, capsys):
    source = blocks("own_model.md", "python")[0]
    assert source.count("launcher") == 0
    run_block(source, MyModel=MyModel)
    assert len(here[0].trials) == 40 + 12
    assert here[0].front
    assert len(capsys.readouterr().out.splitlines()) == len(here[0].front)
    assert RunDir(Path("runs/mine")).config().name == "run_trial"


def test_a_table(here):
    table = {
        (width, epoch): SimpleNamespace(loss=1 / width + 1 / epoch, joules=float(width * epoch), seconds=float(epoch))
        for width in range(1, 9)
        for epoch in range(1, 10)
    }
    space = {"width": {"low": 1, "high": 8}}
    stages = [{"name": "only", "trials": 6, "epochs": 9, "reduction_factor": None}]
    run_block(blocks("own_model.md", "python")[1], wattier=wattier, table=table, space=space, stages=stages)
    found = here[0]
    assert [t.energy_joules for t in found.trials] == [9.0 * t.params["width"] for t in found.trials]
    assert all(a.val_loss < b.val_loss and a.energy_joules > b.energy_joules for a, b in pairwise(found.front))


def test_the_config_of_a_model_of_your_own(tmp_path):
    (block,) = blocks("own_model.md", "yaml")
    (tmp_path / "own.yaml").write_text(block)
    config = load_config(tmp_path / "own.yaml")
    assert config.trial == "my_package.training:run_trial"


def test_the_search_section():
    (block,) = blocks("search.md", "yaml")
    section = yaml.safe_load(block)["search"]
    config = RunConfig.model_validate(
        {"name": "a", "run_dir": "r", "data": {"sources": {"ani1x": "sample"}}, "search": section}
    )
    assert [stage.name for stage in config.search.stages] == ["scout", "final"]


def test_what_the_tables_name_is_all_there_is(here):
    text = (DOCS / "search.md").read_text(encoding="utf-8")
    schema = SearchSection.model_json_schema()
    for name in (*_choices(schema["properties"]["sampler"]), *_choices(schema["properties"]["objectives"]["items"])):
        assert f"`{name}`" in text, name
    own = (DOCS / "own_model.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(\w+)", own))
    seen = set()

    def run_trial(trial):
        seen.update(vars(trial), vars(Trial))
        return 0.5

    wattier.search({"x": {"low": 0, "high": 1}}, run_trial, [{"name": "s", "trials": 1, "epochs": 1}], run_dir="run")
    assert {name for name in seen if not name.startswith("_")} - {"last", "stopped"} <= documented


def _choices(schema):
    return schema["enum"]


def test_exit_codes_are_those_of_the_docs():
    text = (DOCS / "search.md").read_text(encoding="utf-8")
    for code in (EXIT_FAILURE, EXIT_BAD_INPUT, EXIT_FAILED_TRIALS, EXIT_INTERRUPTED, EXIT_NOT_FINISHED):
        assert re.search(rf"\b{code}\b", text.partition("## When things go wrong")[2]), code
