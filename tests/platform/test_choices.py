"""What a person says of single trials, and how it lasts; the faces of a selection; that it may be made again."""

import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from wattier import cli
from wattier.choices import choices_of, choose, read_choices
from wattier.config import RunConfig
from wattier.config_ensemble import SelectSection
from wattier.errors import UserError
from wattier.rundir import RunDir, append_json_line, write_json
from wattier.select_console import print_tiers
from wattier.units import format_joules

sys.path.insert(0, str(Path(__file__).parents[1]))
import planted_campaign

CURVE = {"a": (0.1, 1000.0), "b": (0.12, 400.0), "c": (0.2, 100.0), "d": (0.13, 900.0), "e": (0.3, 950.0)}


def own_config(path, **select):
    """A run of somebody's own model, which needs no data to be selected from."""
    return RunConfig.model_validate({
        "name": "own", "run_dir": str(path), "launcher": "inline", "trial": "nowhere:train",
        "search": {"space": {"x": {"low": 0.0, "high": 1.0}}, "stages": [{"name": "deep", "trials": 6, "epochs": 6}]},
        "select": {"accurate": 1, "balanced": 2, "accurate_rule": "lowest", "balanced_rule": "fronts"} | select,
    })  # fmt: skip


@pytest.fixture
def run(tmp_path, trial, monkeypatch):
    """Six trials of one stage, one of which diverged."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    run = RunDir.create(own_config(tmp_path / "run"))
    for i, (name, (loss, joules)) in enumerate(CURVE.items()):
        row = trial(name, val_loss=loss, joules=joules, params={"x": i / 5})
        append_json_line(run.trials_path, row.to_dict())
    append_json_line(run.trials_path, trial("z", status="pruned", diverged=True, params={"x": 1.0}).to_dict())
    return run


def wattier(*arguments):
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


class TestByHand:
    def test_it_lasts_until_it_is_taken_back(self, run):
        assert "a" in wattier("select", run.path)
        assert run.selection().picked == ("a", "b", "c")
        wattier("select", run.path, "--pin", "e", "--veto", "b", "--veto", "a")
        assert run.selection().picked == ("d", "c", "e")
        assert json.loads(run.choices_path.read_text()) == {"a": "veto", "b": "veto", "e": "pin"}
        wattier("select", run.path)
        assert run.selection().picked == ("d", "c", "e")
        wattier("select", run.path, "--free", "a")
        assert run.selection().picked == ("a", "c", "d", "e")
        assert (run.selection().pinned, run.selection().vetoed) == (("e",), ("b",))

    def test_it_lasts_when_the_first_config_is_run_again(self, run, tmp_path):
        (tmp_path / "own.yaml").write_text(own_config(run.path).to_yaml())
        wattier("select", run.path, "--veto", "b")
        wattier("select", tmp_path / "own.yaml")
        assert "b" not in run.selection().picked

    def test_a_command_counts_over_the_config(self, run):
        settings = SelectSection(pin=["d"], veto=["a"])
        trials = run.trials("deep")
        assert choices_of(run, settings, trials) == (("d",), ("a",))
        choose(run, trials, {"pin": [], "veto": ["d"], "free": ["a"]})
        assert choices_of(run, settings, trials) == ((), ("d",))

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--pin", "nobody"], r"--pin: 'nobody' is no trial of stage 'deep', but must .* They are a, b, c, d, e"),
            (["--veto", ""], r"--veto: '' is no trial of stage 'deep'"),
            (["--pin", "z"], r"--pin: 'z' diverged, but must be a trial that can be trained"),
            (["--pin", "a", "--veto", "a"], r"--veto a: is also --pin, but must be one\. Leave one out"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_is_refused_and_nothing_is_kept(self, run, arguments, words):
        with pytest.raises(UserError, match=words):
            wattier("select", run.path, "--veto", "c", *arguments)
        assert read_choices(run) == {}
        assert run.selection() is None

    def test_as_a_user_meets_it(self, run, tmp_path):
        done = subprocess.run(
            [sys.executable, "-m", "wattier", "select", run.path, "--pin", "deep-01"],
            cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        line = "--pin: 'deep-01' is no trial of stage 'deep', but must be one that has ended. They are a, b, c, d, e"
        assert done.stderr.splitlines() == [f"{line} and others."]

    def test_a_trial_that_the_config_names_must_be_there(self, run):
        for name, where in (("pin", r"select\.pin"), ("veto", r"select\.veto")):
            with pytest.raises(UserError, match=rf"{where}: 'wide-000' is no trial of stage 'deep'"):
                choices_of(run, SelectSection(**{name: ["wide-000"]}), run.trials("deep"))
        with pytest.raises(ValueError, match="pin and veto both name 'a'"):
            SelectSection(pin=["a"], veto=["a"])

    @pytest.mark.parametrize("text", ["{", "[]", '{"a": "perhaps"}', '{"a": []}', "3", '"pin"'])
    def test_a_damaged_file_is_named(self, run, text):
        run.choices_path.write_text(text)
        with pytest.raises(UserError, match=r"choices\.json: "):
            wattier("select", run.path)


class TestAgain:
    def test_other_rules_make_no_other_run(self, run, tmp_path):
        wattier("select", run.path)
        changed = {
            "accurate": 2, "balanced": 1, "accurate_rule": "gap", "confidence": 0.9, "balanced_rule": "knee",
            "max_energy_joules": 950.0, "max_energy_ratio": 2.0, "min_distance": 0.0, "flagged": "leave_out",
            "pin": ["e"], "veto": ["c"],
        }  # fmt: skip
        assert set(changed) == set(SelectSection.model_fields)
        (tmp_path / "own.yaml").write_text(own_config(run.path, **changed).to_yaml())
        wattier("select", tmp_path / "own.yaml")
        chosen = run.selection()
        assert chosen.picked == ("a", "b", "e")  # one before the largest gap, one at the knee, one pinned
        assert chosen.rules["balanced_rule"] == "knee"
        assert yaml.safe_load(run.config_path.read_text())["select"] == changed

    def test_a_config_from_before_there_were_rules_is_the_same_run(self, run):
        old = yaml.safe_load(run.config_path.read_text())
        old["select"] = {"accurate": 1, "balanced": 2}
        run.config_path.write_text(yaml.safe_dump(old))
        wattier("select", run.path)
        assert RunDir.create(own_config(run.path)).selection() is not None


def printed(run, width):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_tiers(run, console, near_misses=True)
    return console.file.getvalue()


class TestFaces:
    @pytest.mark.parametrize("width", [60, 80, 150])
    def test_all_of_it_can_be_read_at_any_width(self, run, width):
        wattier("select", run.path, "--veto", "b", "--pin", "e")
        text = printed(run, width)
        assert max(map(len, text.splitlines())) <= width
        words = " ".join(re.sub(r"[│┃]", " ", text).split())
        for tier in run.selection().tiers:
            for pick in tier.picks:
                assert pick.trial_id in words
        assert set(run.selection().tiers[0].picks[0].reason.split()) <= set(words.split())
        assert "ruled out" in words
        assert "pinned by hand" in words

    def test_thousands_that_a_ceiling_keeps_out_are_counted(self, run, tmp_path):
        changed = {"balanced": 20, "min_distance": 0.0, "max_energy_joules": 1.0}
        (tmp_path / "own.yaml").write_text(own_config(run.path, **changed).to_yaml())
        wattier("select", tmp_path / "own.yaml")
        misses = run.selection().near_misses
        many = dataclasses.replace(run.selection(), near_misses=misses * 10)
        write_json(run.selection_path, many.to_dict())
        assert f"and {10 * len(misses) - 12} more, in selection.json." in printed(run, 80)
        assert "20 of 20 places in balanced stay free: 4 above the energy ceiling." in printed(run, 80)

    def test_it_says_what_the_choice_saves(self, whole_run):
        record = whole_run.selection()
        text = " ".join(printed(whole_run, 80).split())
        saved = format_joules(record.saved_joules)
        assert f"projected, {saved} (" in text
        assert "less than all candidates." in text


@pytest.mark.parametrize("noise", [0.0, 0.005])
def test_a_planted_campaign_of_400_trials_is_found_exactly(noise):
    """The tables of docs/selection.md, over 100 seeds, are made by tests/planted_campaign.py."""
    for seed in (1000, 1001):
        made = planted_campaign.campaign(seed, noise)
        assert len(made.trials) == 400
        chosen = planted_campaign.chosen(made, SelectSection(accurate=8, balanced=11))
        assert planted_campaign.found(chosen, "accurate") == made.accurate
        assert planted_campaign.found(chosen, "balanced") == made.knee
        assert chosen.tiers[0].clear
