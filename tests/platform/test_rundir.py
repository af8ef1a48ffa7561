"""The run directory survives crashes, keeps a second driver out, and never mixes two configs."""

import json
import logging
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wattier import json_lines
from wattier.errors import UserError
from wattier.rundir import RunDir, append_json_line, hold_lock, read_json, read_json_lines, write_json, write_text

RECORDS = [{"a": 1, "nested": {"text": 'quote " brace } \\ \u00e9', "more": {"b": [1, None]}}}, {"a": 2}]
HOLD = """
import sys, time
from pathlib import Path
from wattier.rundir import RunDir
with RunDir(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "selection.json"
    write_json(path, {"a": 1})

    def no_space(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["selection.json"]


def test_json_has_no_nan(tmp_path):
    for write in (write_json, append_json_line):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_record_torn_at_any_byte_is_left_out_and_the_next_one_kept(tmp_path, caplog):
    path = tmp_path / "trials.jsonl"
    for record in RECORDS:
        append_json_line(path, record)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        survivors = RECORDS[: (size >= first - 1) + (size >= len(whole) - 1)]
        assert read_json_lines(path) == survivors, size
        append_json_line(path, {"a": 3})
        assert read_json_lines(path) == [*survivors, {"a": 3}], size


def test_a_torn_line_is_reported_once(tmp_path, caplog):
    path = tmp_path / "epochs.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    with caplog.at_level(logging.WARNING):
        assert [read_json_lines(path) for _ in range(3)] == [[{"a": 1}]] * 3
    assert [r.getMessage() for r in caplog.records] == [f"{path}: line 2 was torn by a crash and is left out"]


@pytest.mark.parametrize("damage", [b"garbage", b'{"a": 1}}', b'"a": 1}', b"{'a': 1}", b"\xff\xfe{", b'{"a": 1,}'])
def test_damage_that_no_crash_makes_is_refused(tmp_path, damage):
    path = tmp_path / "trials.jsonl"
    path.write_bytes(b'{"a": 1}\n' + damage + b'\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"trials\.jsonl: line 2 is no JSON record"):
        read_json_lines(path)


@pytest.mark.parametrize("line", ["{}", "[]", "3", '"x"', '{"fidelity": {}, "energy": {}}'])
def test_json_that_is_no_record_is_refused(searched_run, line):
    text = searched_run.trials_path.read_text()
    searched_run.trials_path.write_text(line + "\n" + text)
    with pytest.raises(UserError, match=r"trials\.jsonl: holds no record of this version"):
        searched_run.trials()
    epochs = next(searched_run.path.glob("trials/*/*/epochs.jsonl"))
    epochs.write_text(line + "\n")
    with pytest.raises(UserError, match=r"epochs\.jsonl: holds no record of this version"):
        searched_run.epochs(epochs.parent.parent.name, epochs.parent.name)
    searched_run.selection_path.write_text(line)
    with pytest.raises(UserError, match=r"selection\.json: holds no record of this version"):
        searched_run.selection()


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(record=st.dictionaries(st.text(), st.recursive(st.text() | st.none() | st.floats(allow_nan=False),
       lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)),
       cut=st.integers(1, 10_000))  # fmt: skip
def test_any_record_cut_anywhere_is_known_as_torn(record, cut):
    line = json.dumps(record).encode()
    assert json_lines._is_torn(line[: cut % len(line) or 1])
    assert not json_lines._is_torn(line)


def test_the_last_row_of_a_trial_counts_and_so_does_the_last_line_of_an_epoch(searched_run):
    rows = searched_run.trials()
    again = {**rows[0].to_dict(), "val_loss": 42.0}
    append_json_line(searched_run.trials_path, again)
    assert len(searched_run.trials()) == len(rows)
    assert searched_run.trials()[0].val_loss == 42.0
    stage, trial_id = rows[0].fidelity.stage, rows[0].trial_id
    path = searched_run.trial_folder(stage, trial_id) / "epochs.jsonl"
    first = read_json_lines(path)[0]
    append_json_line(path, {**first, "val_loss": 43.0, "of_a_newer_version": 1})
    assert searched_run.epochs(stage, trial_id)[0].val_loss == 43.0
    assert [e.epoch for e in searched_run.epochs(stage, trial_id)] == list(range(1, rows[0].epochs_done + 1))


def test_a_second_driver_is_kept_out_until_the_first_dies(empty_run):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(empty_run.path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another wattier is running here"), empty_run.lock():
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with empty_run.lock(), hold_lock(empty_run.path / "lock") as held_twice:
        assert not held_twice
    with empty_run.lock():
        pass


def test_another_config_in_the_same_folder_is_refused_with_the_first_difference(empty_run):
    config = empty_run.config()
    assert RunDir.create(config).path == empty_run.path
    empty_run.trial_folder("wide", "wide-000").mkdir(parents=True)
    other = config.model_copy(update={"seed": 7})
    with pytest.raises(UserError, match=r"holds a run of another config \(there: 'seed: 0', here: 'seed: 7'\)"):
        RunDir.create(other)


def test_a_config_of_an_earlier_version_with_fewer_settings_is_the_same(empty_run):
    config = empty_run.config()
    empty_run.trial_folder("wide", "wide-000").mkdir(parents=True)
    lines = empty_run.config_path.read_text().splitlines(keepends=True)
    fewer = "".join(line for line in lines if "throttled_share" not in line)
    assert fewer != "".join(lines)
    empty_run.config_path.write_text(fewer)
    assert RunDir.create(config).config() == config


def test_a_config_that_made_nothing_yet_may_be_mended(empty_run):
    other = empty_run.config().model_copy(update={"seed": 7})
    assert RunDir.create(other).config().seed == 7


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\x00", b"name: demo\n"])
def test_a_damaged_config_in_the_folder_is_refused(empty_run, damage):
    config = empty_run.config()
    empty_run.trial_folder("wide", "wide-000").mkdir(parents=True)
    empty_run.config_path.write_bytes(damage)
    with pytest.raises(UserError, match=r"holds a run of another config \(there: "):
        RunDir.create(config)
    with pytest.raises(UserError, match=r"config\.yaml: "):
        RunDir.open(empty_run.path).config()


def test_a_folder_that_is_no_run_or_cannot_be_one_is_refused(empty_run, tmp_path):
    with pytest.raises(UserError, match="is no run directory"):
        RunDir.open(tmp_path)
    file = tmp_path / "file"
    write_text(file, "x")
    for path in (file, file / "below"):
        with pytest.raises(UserError, match="cannot be written"):
            RunDir.create(empty_run.config().model_copy(update={"run_dir": str(path)}))
