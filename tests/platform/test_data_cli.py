"""``wattier data``: a store from the command line, and runs that share it."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from wattier import console as console_module
from wattier import run as steps
from wattier.config import RunConfig
from wattier.console import IngestConsole
from wattier.data_cli import data_app
from wattier.data_console import print_stats
from wattier.data_stats import find_store, stats_info
from wattier.errors import UserError
from wattier.rundir import RunDir
from wattier_gnn.pool import Progress
from wattier_gnn.sample import sample_path
from wattier_gnn.store import Store
from wattier_gnn.structure import DataError


class Quiet:
    def phase(self, name: str) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def progress(self, done: object) -> None:
        """Nothing."""

    def trial(self, result: object, done: int, total: int) -> None:
        """Nothing."""


def data(*arguments: object) -> str:
    """The output of a command that works; what it raises otherwise."""
    done = CliRunner().invoke(data_app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("shared") / "store"
    return folder, data("ingest", "--source", "qm7x=sample", "--out", folder, "--cutoff", 2.5, "--seed", 3)


@pytest.fixture
def store(made: tuple[Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "store"))


def config_of(tmp_path: Path, **data_section: Any) -> RunConfig:
    text = yaml.safe_dump({
        "name": "shared", "run_dir": str(tmp_path / "run"), "launcher": "inline",
        "data": {"cutoff_angstrom": 2.5, **data_section},
        "search": {"space": {}, "stages": [{"name": "s", "trials": 1}]}, "telemetry": {"source": "estimated"},
    })  # fmt: skip
    (tmp_path / "config.yaml").write_text(text)
    return RunConfig.model_validate(yaml.safe_load(text))


class TestIngest:
    def test_it_says_what_it_did_and_does_it_once(self, made: tuple[Path, str]) -> None:
        folder, output = made
        assert "qm7x: 508 read, 507 kept, removed: 1 force above threshold" in output
        assert "qm7x: aligned energies spread by " in output
        settings = Store(folder).meta["settings"]
        assert (settings["cutoff_angstrom"], settings["seed"], settings["force_norm"]) == (2.5, 3, "per_atom")
        again = data("ingest", "--source", "qm7x=sample", "--out", folder, "--cutoff", 2.5, "--seed", 3)
        assert again == f"store: nothing to do, all 1 files are in {folder}\n"

    def test_a_config_gives_sources_and_settings(self, tmp_path: Path) -> None:
        config_of(
            tmp_path, sources={"qm7x": "sample"}, force_norm="frobenius", neighbors="on_the_fly",
            max_force_ev_per_angstrom=20.0, split={"train": 0.7, "val": 0.1, "test": 0.2},
        )  # fmt: skip
        data("ingest", tmp_path / "config.yaml", "--out", tmp_path / "s", "--max-force", "30", "--workers", "1")
        assert Store(tmp_path / "s").meta["settings"] == {
            "cutoff_angstrom": 2.5, "max_force_ev_per_angstrom": 30.0, "force_norm": "frobenius", "seed": 0,
            "neighbors": "on_the_fly", "split": {"train": 0.7, "val": 0.1, "test": 0.2},
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--out", "s"], "--source: is not given"),
            (["--source", "qm7x=sample"], "--out: is not given"),
            (["--source", "qm7x", "--out", "s"], "--source: is 'qm7x', but must be NAME=PATH"),
            (["--source", "qm7x=a", "--source", "qm7x=b", "--out", "s"], "--source: names qm7x twice"),
            (["--source", "ani2x=x", "--out", "s"], "sources"),
            (["--source", "qm7x=sample", "--out", "s", "--neighbors", "maybe"], "neighbors: is 'maybe'"),
            (["--source", "qm7x=sample", "--out", "s", "--cutoff", "-1"], "cutoff_angstrom: is -1"),
        ],
    )
    def test_what_cannot_be_is_said_in_one_line(self, arguments: list[str], said: str) -> None:
        with pytest.raises(UserError) as caught:
            data("ingest", *arguments)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_bad_file_is_refused_or_counted(self, tmp_path: Path) -> None:
        shutil.copytree(sample_path("oc20"), tmp_path / "oc20")
        arguments = ("ingest", "--source", f"oc20={tmp_path / 'oc20'}", "--out", tmp_path / "s", "--cutoff", 2)
        with pytest.raises(DataError, match=r"2\.extxyz\.xz: .* --skip-bad"):
            data(*arguments)
        assert "1 unreadable file skipped" in data(*arguments, "--skip-bad")


class TestExport:
    def test_a_release_and_its_check(self, store: Path, tmp_path: Path) -> None:
        out = tmp_path / "release"
        assert data("export", store, out).startswith(f"{out}: 507 structures in 16 files")
        assert "all 16 files have their sha256" in data("verify", out)
        (out / "README.md").write_text("better than ever")
        with pytest.raises(DataError, match=r"README\.md: sha256"):
            data("verify", out)

    def test_an_unknown_format_is_refused(self, store: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="--format: is 'csv'"):
            data("export", store, tmp_path / "release", "--format", "csv")
        assert not (tmp_path / "release").exists()

    def test_a_place_that_cannot_be_is_refused_and_left(
        self, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("x")
        (tmp_path / "link").symlink_to("nowhere")
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        before = sorted(path.name for path in tmp_path.iterdir())
        for out in ("../file", "../link", "../file/below"):
            with pytest.raises(DataError, match="cannot be made"):
                data("ingest", "--source", "qm7x=sample", "--out", out)
        for out in ("../file", "../link", "../file/below", "."):
            with pytest.raises(DataError, match=r"cannot be made|is there already|is not a new folder"):
                data("export", store, out)
        for page in ("no/such/page.html", ".."):
            with pytest.raises(UserError, match="--html: is "):
                data("stats", store, "--html", page)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        assert not list((tmp_path / "here").iterdir())

    def test_words_of_others_do_not_steer_the_terminal(self, store: Path, tmp_path: Path) -> None:
        info = stats_info(store)
        odd = "[bold]\x1b]0;pwned\x07[/x]"
        info.cleaning.removed["qm7x"] = Counter({odd: 1})
        info.cleaning.bad_shards[odd] = [odd]
        info = info._replace(sources=[*info.sources, info.sources[0]._replace(source=odd)])
        console = Console(file=io.StringIO(), force_terminal=True, width=400)
        print_stats(info, console)
        output = console.file.getvalue()  # type: ignore[attr-defined]
        assert "\x1b]" not in output
        assert output.count(r"[bold]\x1b]0;pwned\x07[/x]") == 7


class TestSharedStore:
    def test_runs_read_it_where_it_lies(self, store: Path, tmp_path: Path) -> None:
        config = config_of(tmp_path, store=str(store), sources={"qm7x": "sample"})
        run = RunDir.create(config)
        for _ in range(2):
            assert len(steps.prepare_data(run, config, Quiet())) == 507
        assert (run.store_path / "atoms.bin").resolve() == (store / "atoms.bin").resolve()
        assert len(Store(run.store_path)) == 507
        assert "all files have their size" in data("verify", run.store_path)
        assert not list(run.path.glob("phases/data/*"))

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"cutoff_angstrom": 3.0}, r"data\.cutoff_angstrom: is 3\.0, but the store .* was made with 2\.5"),
            ({"max_force_ev_per_angstrom": 50.0}, r"data\.max_force_ev_per_angstrom"),
            ({"force_norm": "frobenius"}, r"data\.force_norm: is frobenius"),
            ({"split": {"train": 0.6, "val": 0.2, "test": 0.2}}, r"data\.split"),
            ({"sources": {"oc22": "sample"}}, r"data\.sources: is \['oc22'\], but the store .* made with \['qm7x'\]"),
        ],
    )
    def test_its_settings_must_be_those_of_the_config(
        self, store: Path, tmp_path: Path, change: dict[str, Any], said: str
    ) -> None:
        config = config_of(tmp_path, store=str(store), **change)
        with pytest.raises(UserError, match=said):
            steps.prepare_data(RunDir.create(config), config, Quiet())

    def test_a_run_sees_one_store_from_beginning_to_end(self, store: Path, tmp_path: Path) -> None:
        config = config_of(tmp_path, store=str(store))
        run = RunDir.create(config)
        before = steps.prepare_data(run, config, Quiet())
        arrays, indices = before.gather(np.arange(507)), before.indices(2)
        data("ingest", "--source", "oc22=sample", "--out", store, "--cutoff", 2.5, "--seed", 3, "--skip-bad")
        assert len(Store(store)) > 507
        for after in (Store(run.store_path), steps.prepare_data(run, config, Quiet())):
            assert after.meta == before.meta
            assert after.groups.names == before.groups.names
            np.testing.assert_array_equal(after.indices(2), indices)
            for name, values in after.gather(np.arange(507)).items():
                np.testing.assert_array_equal(values, arrays[name], err_msg=name)
        with pytest.raises(DataError, match="Add to the store that it links to"):
            data("ingest", "--source", "ani1x=sample", "--out", run.store_path, "--cutoff", 2.5, "--seed", 3)
        assert steps.prepare_data(RunDir(tmp_path / "later"), config, Quiet()).sources == ("qm7x", "oc22")

    def test_a_store_that_was_made_anew_is_refused(self, store: Path, tmp_path: Path) -> None:
        config = config_of(tmp_path, store=str(store))
        run = RunDir.create(config)
        steps.prepare_data(run, config, Quiet())
        shutil.rmtree(store)
        with pytest.raises(UserError, match="is not the store that"):
            steps.prepare_data(run, config, Quiet())
        data("ingest", "--source", "qm7x=sample", "--out", store, "--cutoff", 2.5, "--seed", 4)
        with pytest.raises(UserError, match="is not the store that"):
            steps.prepare_data(run, config, Quiet())
        shutil.rmtree(store)
        data("ingest", "--source", "qm7x=sample", "--out", store, "--cutoff", 2.5, "--seed", 3)
        assert len(steps.prepare_data(run, config, Quiet())) == 507

    def test_its_figures_are_shown_before_the_run_begins(self, store: Path, tmp_path: Path) -> None:
        config = config_of(tmp_path, store=str(store))
        assert find_store(tmp_path / "config.yaml") == store
        run = RunDir.create(config)
        steps.prepare_data(run, config, Quiet())
        assert find_store(tmp_path / "config.yaml") == run.store_path

    def test_it_must_be_there_and_have_all_splits(self, store: Path, tmp_path: Path) -> None:
        config = config_of(tmp_path, store=str(tmp_path / "nowhere"))
        with pytest.raises(DataError, match="not a readable store"):
            steps.prepare_data(RunDir.create(config), config, Quiet())
        manifest = json.loads((store / "manifest.json").read_text())
        manifest["by_source"]["qm7x"]["structures"]["val"] = 0
        (store / "manifest.json").write_text(json.dumps(manifest))
        config = config_of(tmp_path, store=str(store))
        with pytest.raises(UserError, match="the val split of qm7x is empty"):
            steps.prepare_data(RunDir.create(config), config, Quiet())


class TestProgress:
    DONE = Progress(files_done=3, files=40, bytes_done=50, bytes=100, structures_read=1234567)

    def test_a_terminal_shows_a_bar(self) -> None:
        console = Console(file=io.StringIO(), force_terminal=True, width=120)
        with IngestConsole(console) as shown:
            shown.progress(self.DONE)
            shown.say("a line")
        output = console.file.getvalue()  # type: ignore[attr-defined]
        assert "3 of 40 files, 1,234,567 structures read" in output
        assert "50%" in output
        assert "a line" in output

    def test_elsewhere_a_line_now_and_then(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [0.0]
        monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
        console = Console(file=io.StringIO(), width=120)
        with IngestConsole(console) as shown:
            for second in range(25):
                now[0] = float(second)
                shown.progress(self.DONE)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert lines == ["3 of 40 files, 1,234,567 structures read"] * 2
