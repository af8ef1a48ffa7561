"""What a search takes from earlier runs and tables: only what lies in its space, and a line for all that is wrong."""

import csv
import os
import shutil

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from wattier.config import load_config
from wattier.config_space import ChoiceParameter, RangeParameter
from wattier.errors import UserError
from wattier.prior_space import OUTSIDE, as_in_space
from wattier.records import Fidelity
from wattier.rundir import RunDir, append_json_line
from wattier.warm_start import describe, kept_priors, prior_trials, read_priors

HEADER = "learning_rate,hidden_dim,val_loss,energy_joules"
SOUND = f"{HEADER}\n1e-3,64,0.25,1000\n"


def changed(config, tmp_path, name="present", **sections):
    """A config with other sections, checked as a file is."""
    values = config.model_dump(mode="json") | {"run_dir": str(tmp_path / name)}
    for section, entries in sections.items():
        values[section] = {**values[section], **entries}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return load_config(path)


@pytest.fixture
def present(empty_run, tmp_path):
    """The config of a search that starts from some paths."""

    def config(*paths, **sections):
        sections["search"] = {"warm_start": [str(path) for path in paths]} | sections.get("search", {})
        return changed(empty_run.config(), tmp_path, **sections)

    return config


@pytest.fixture
def table(tmp_path):
    def write(text, name="results.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_an_earlier_run_gives_all_trials_that_are_observations(searched_run, present):
    config = present(searched_run.path)
    priors = read_priors(config)
    rows = {(row.fidelity.stage, row.trial_id): row for row in searched_run.trials()}
    failed = {key for key, row in rows.items() if row.status == "failed"}
    origins = {f"{searched_run.path}: {stage}/{trial_id}": (stage, trial_id) for stage, trial_id in rows}
    assert {origins[trial.origin] for trial in priors.trials} == set(rows) - failed
    for trial in priors.trials:
        row = rows[origins[trial.origin]]
        assert (trial.params, trial.energy_joules) == (row.params, row.energy_joules)
        assert trial.val_loss == (None if row.diverged else row.val_loss)
        assert trial.status == row.status
        assert trial.fidelity == Fidelity(row.fidelity.stage, None, row.epochs_done, 1)
        assert trial.energy_method == "counter"
    total = len(rows)
    assert describe(priors) == [
        f"warm start: {searched_run.path}: {total - 1} of {total} trials used; left out: 1 failed"
    ]
    assert prior_trials(config) == list(priors.trials)


def test_trials_outside_the_present_space_are_left_out_and_counted(searched_run, present):
    space = {"learning_rate": {"low": 1e-3, "high": 1e-2, "log": True}, "hidden_dim": {"choices": [32, 64]}}
    priors = read_priors(present(searched_run.path, search={"space": space}))
    rows = [row for row in searched_run.trials() if row.status != "failed"]
    slow = [row for row in rows if row.params["learning_rate"] < 1e-3]
    wide = [row for row in rows if row not in slow and row.params["hidden_dim"] == 128]
    assert slow
    assert wide
    assert priors.sources[0].left_out == {
        "failed": 1, "with learning_rate outside the space": len(slow), "with hidden_dim outside the space": len(wide),
    }  # fmt: skip
    assert len(priors.trials) == len(rows) - len(slow) - len(wide) == priors.sources[0].used


def test_what_the_earlier_run_held_fixed_is_taken_from_its_config(searched_run, present):
    space = {
        "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "hidden_dim": {"choices": [32, 64, 128]},
        "n_layers": {"low": 2, "high": 6}, "family": {"choices": ["egnn", "pna"]},
    }  # fmt: skip
    trials = prior_trials(present(searched_run.path, search={"space": space}))
    assert len(trials) == len(searched_run.trials()) - 1
    assert {(trial.params["n_layers"], trial.params["family"]) for trial in trials} == {(3, "egnn")}
    space["n_layers"] = {"low": 4, "high": 6}
    priors = read_priors(present(searched_run.path, search={"space": space}))
    assert priors.trials == ()
    assert priors.sources[0].left_out["with n_layers outside the space"] == len(trials)


def test_what_only_the_earlier_run_searched_must_have_the_present_value(searched_run, present):
    space = {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}
    priors = read_priors(present(searched_run.path, search={"space": space}, model={"hidden_dim": 32}))
    rows = [row for row in searched_run.trials() if row.status != "failed"]
    same = [row for row in rows if row.params["hidden_dim"] == 32]
    assert len(priors.trials) == len(same)
    assert all(set(trial.params) == {"learning_rate"} for trial in priors.trials)
    assert priors.sources[0].left_out["with another hidden_dim than this run's"] == len(rows) - len(same)


def test_other_data_and_other_settings_are_said(searched_run, present):
    config = present(
        searched_run.path, data={"sources": {"ani1x": "sample"}}, training={"force_weight": 7.0, "learning_rate": 0.5}
    )
    line = describe(read_priors(config))[0]
    assert line.endswith("; its data differ from this run's; its settings (force_weight) differ from this run's")


def test_trials_of_the_full_training_are_known_by_the_epochs_they_did(whole_run, present):
    full = [trial for trial in prior_trials(present(whole_run.path)) if trial.fidelity.stage == "full"]
    assert {trial.fidelity.epochs for trial in full} == {40}
    assert len(full) == len(whole_run.trials("full"))


def test_a_run_goes_on_with_what_it_knew_when_it_began(searched_run, present, trial, tmp_path):
    config = present(searched_run.path)
    run = RunDir.create(config)
    known = kept_priors(run, config)
    append_json_line(searched_run.trials_path, trial("late", stage="wide").to_dict())
    assert len(read_priors(config).trials) == len(known.trials) + 1
    shutil.rmtree(searched_run.path)
    assert kept_priors(run, config) == known
    narrower = changed(config, tmp_path, search={"space": {"learning_rate": {"low": 1e-4, "high": 1e-2}}})
    with pytest.raises(UserError, match="does not exist"):
        kept_priors(run, narrower)  # a config that was mended before the run began asks anew
    for damage in ("{", "[]", '{"asked": {}}'):
        (run.path / "warm_start.json").write_text(damage)
        with pytest.raises(UserError):
            kept_priors(run, config)


def test_nothing_is_asked_and_nothing_is_written(empty_run):
    priors = kept_priors(empty_run, empty_run.config())
    assert (priors.trials, describe(priors)) == ((), [])
    assert not (empty_run.path / "warm_start.json").exists()


def test_a_table(present, table):
    path = table(
        "\ufeffjoules, hidden_dim ,learning_rate,loss,epochs,structures,n_layers\r\n"
        "1e3,64,0.001,0.25,4,1000,3\r\n"
        "\r\n"
        ',"128",1e-2,0.125,,,3\r\n'
        "5,256,1e-3,0.1,4,,3\r\n"
        "5,64,1e-3,0.1,4,,4\r\n"
    )
    priors = read_priors(present(path))
    first, second = priors.trials
    assert first.params == {"learning_rate": 0.001, "hidden_dim": 64}
    assert (first.val_loss, first.energy_joules, first.fidelity) == (0.25, 1000.0, Fidelity("table", 1000, 4, 1))
    assert second.params == {"learning_rate": 0.01, "hidden_dim": 128}
    assert (second.val_loss, second.energy_joules, second.fidelity) == (0.125, None, None)
    assert (second.status, second.origin) == ("complete", f"{path}: line 4")
    assert priors.sources[0].left_out == {
        "with hidden_dim outside the space": 1, "with another n_layers than this run's": 1,
    }  # fmt: skip


def test_choices_are_known_as_they_are_written(present, table):
    space = {"family": {"choices": ["egnn", "pna"]}, "activation_checkpointing": {"choices": [True, False]},
             "learning_rate": {"choices": [1e-3, 1e-2]}}  # fmt: skip
    path = table(
        "family,activation_checkpointing,learning_rate,val_loss\npna,TRUE,0.001,1\negnn,false,1e-2,2\negnn,1,0.01,3\n"
    )
    priors = read_priors(present(path, search={"space": space}))
    assert [tuple(trial.params.values()) for trial in priors.trials] == [("pna", True, 1e-3), ("egnn", False, 1e-2)]
    assert priors.sources[0].left_out == {"with activation_checkpointing outside the space": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (HEADER.encode(), "has a header and no trials"),
        (b"learning_rate,hidden_dim\n1e-3,64\n", "has no column 'val_loss'"),
        (b"learning_rate,val_loss\n1e-3,1\n", "has no column 'hidden_dim'"),
        (b"learning_rat,hidden_dim,val_loss\n1e-3,64,1\n", "column 'learning_rat' .*Did you mean 'learning_rate'"),
        (b"id,learning_rate,hidden_dim,val_loss\n", "column 'id' is no parameter and no figure. Remove the column"),
        (b"learning_rate,hidden_dim,val_loss,loss\n1e-3,64,1,1\n", "column 'val_loss' is given twice"),
        (b"learning_rate,hidden_dim,val_loss,\n1e-3,64,1,1\n", "column '' is no parameter"),
        (b"learning_rate;hidden_dim;val_loss\n1e-3;64;1\n", "Cells must be separated by commas"),
        (SOUND.encode() + b"1e-3,64,nan,1\n", "line 3: val_loss is 'nan', but must be a finite number"),
        (SOUND.encode() + b"1e-3,64,inf,1\n", "line 3: val_loss is 'inf'"),
        (SOUND.encode() + b"1e-3,64,1_0,1\n", "line 3: val_loss is '1_0'"),
        (SOUND.encode() + b"1e-3,64,F,1\n", "line 3: val_loss is 'F'"),
        (SOUND.encode() + b"1e-3,64,,1\n", "line 3: val_loss is empty"),
        (SOUND.encode() + b"fast,64,1,1\n", "line 3: learning_rate is 'fast'"),
        (SOUND.encode() + b"1e-3,64,1,-5\n", "line 3: energy_joules is -5, but must be above 0"),
        (SOUND.encode() + b"1e-3,64,1\n", "line 3 has 3 cells, but the header has 4"),
        (SOUND.encode() + b"1e-3,64,1,1,1\n", "line 3 has 5 cells"),
        (SOUND.encode() + b'1e-3,"64" x,1,1\n', "line 3 is no CSV"),
        (SOUND.encode() + b'1e-3,"64,1,1\n', "is no CSV"),
        (SOUND.encode() + b"1e-3," + b"6" * 200_000 + b",1,1\n", "line 3 is no CSV .field larger than field limit"),
        (SOUND.encode("utf-16"), "is not UTF-8 text"),
        (SOUND.replace("hidden", "h\xefdden").encode("latin-1"), "is not UTF-8 text"),
        (b"\x80\x04\x95pickle", "is not UTF-8 text"),
        (b"a\0b\n", "is not text"),
        (b"learning_rate,hidden_dim,val_loss,structures\n1e-3,64,1,5\n", "'structures', but none 'epochs'"),
        (b"learning_rate,hidden_dim,val_loss,structures,epochs\n1e-3,64,1,5,\n", "structures is given and epochs"),
        (b"learning_rate,hidden_dim,val_loss,epochs\n1e-3,64,1,1.5\n", "epochs is 1.5, but must be a whole number"),
        (b"learning_rate,hidden_dim,val_loss,epochs\n1e-3,64,1,0\n", "epochs is 0, but must be a whole number"),
    ],
)  # fmt: skip
def test_a_table_that_is_wrong_is_refused_in_one_line(present, table, text, message):
    path = table(text)
    with pytest.raises(UserError, match=rf"^search.warm_start: {path}: .*{message}") as refused:
        prior_trials(present(path))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400 + len(str(path))


def test_a_table_that_is_too_large_is_not_read(present, table):
    path = table(SOUND)
    os.truncate(path, 10_000_000_000)  # a hole
    with pytest.raises(UserError, match=r"is 10000000000 bytes, but a table must be under 64000000"):
        prior_trials(present(path))


def test_what_is_no_source_is_refused(present, table, tmp_path, empty_run, searched_run):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    sound = table(SOUND)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.yaml").write_text("name: 3\n")
    for paths, message in (
        ((tmp_path / "no",), "does not exist"),
        ((tmp_path / "folder",), "is no run directory"),
        ((tmp_path / "fifo",), "is no file"),
        ((tmp_path / "loop",), "does not exist|cannot be read"),
        ((tmp_path / ("x" * 300),), "cannot be read"),
        ((broken,), rf"{broken}: config.yaml: "),
        ((sound, sound.parent / "." / sound.name), "is named 2 times"),
        ((tmp_path / "present",), "is no run directory|is this run itself|does not exist"),
    ):
        with pytest.raises(UserError, match=rf"^search.warm_start: .*({message})") as refused:
            prior_trials(present(*paths))
        assert "\n" not in str(refused.value)
    itself = present(tmp_path / "present")
    RunDir.create(itself)
    with pytest.raises(UserError, match="is this run itself"):
        prior_trials(itself)
    searched_run.trials_path.write_bytes(b"\0\0\n{}\n")
    with pytest.raises(UserError, match=r"search.warm_start: .*trials.jsonl: line 1 is no JSON record"):
        prior_trials(present(searched_run.path))


@pytest.fixture
def on_table(present, table):
    path = table(SOUND)
    return path, present(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(junk=b'"')
@given(junk=st.binary(max_size=60))
def test_any_bytes_give_trials_or_one_line(on_table, junk):
    path, config = on_table
    path.write_bytes(SOUND.encode() + junk)
    try:
        trials = prior_trials(config)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert trials[0].params == {"learning_rate": 1e-3, "hidden_dim": 64}


@given(low=st.integers(-50, 50), steps=st.integers(0, 20), step=st.integers(1, 9), value=st.integers(-300, 300))
def test_whole_numbers_against_the_list_of_all(low, steps, step, value):
    parameter = RangeParameter(low=low, high=low + max(1, steps) * step, step=step)
    allowed = range(low, low + max(1, steps) * step + 1, step)
    assert (as_in_space(parameter, value) is not OUTSIDE) == (value in allowed)
    assert as_in_space(parameter, value + 0.5) is OUTSIDE
    if value in allowed:
        assert type(as_in_space(parameter, float(value))) is int


@pytest.mark.parametrize("value", [True, None, "64", [64], float("nan"), float("inf"), 10**400])
def test_what_is_no_number_is_in_no_range(value):
    for parameter in (RangeParameter(low=1e-4, high=1.0, log=True), ChoiceParameter(choices=[1, 64])):
        assert as_in_space(parameter, value) is OUTSIDE


def test_a_hostile_table_runs_nothing(present, table, tmp_path):
    cell = "=cmd|' /C touch x'!A0"
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([HEADER.split(","), [cell, 64, 1, 1]])
    with pytest.raises(UserError, match="must be a finite number"):
        prior_trials(present(tmp_path / "x.csv"))
