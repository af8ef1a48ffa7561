"""The studies for optuna-dashboard say what the run directory says, whatever happens to whoever writes them."""

import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from wattier import mirror as mirror_module
from wattier import storage_url
from wattier.errors import UserError
from wattier.mirror import JOURNAL, Mirror, rebuild
from wattier.mirror_storage import MirrorLock, open_journal
from wattier.ports import free_port
from wattier.records import Proposal
from wattier.rundir import RunDir, append_json_line, read_json_lines, write_json, write_text
from wattier.storage_url import STORAGE_VARIABLE

STAGES, IDS = ("wide", "deep"), ("a", "b", "c")
FLUSH_SECONDS = 30
SECRET = "geheim/7?x"
DASHBOARD = (
    "import sys; from importlib.metadata import entry_points; "
    "sys.exit(entry_points(group='console_scripts')['optuna-dashboard'].load()())"
)
HOLD_LOCK = """
import os, sys, time
from optuna.storages.journal import JournalFileSymlinkLock
JournalFileSymlinkLock(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(60)
"""
SEARCH_AND_DIE = """
import os, random, signal, sys, time
from pathlib import Path
from wattier.mirror import Mirror
from wattier.records import Proposal, TrialResult
from wattier.rundir import RunDir, append_json_line, read_json_lines

run, rounds = RunDir.open(Path(sys.argv[1])), random.Random(7)
config, rows = run.config(), [TrialResult.from_dict(row) for row in read_json_lines(Path(sys.argv[2]))]
for _ in range(int(sys.argv[3])):
    child = os.fork()
    if child == 0:
        known, mirror = {row.trial_id for row in run.trials()}, Mirror(run, config)
        for row in rows:
            if row.trial_id not in known:
                mirror.started(row.fidelity.stage, Proposal(row.trial_id, row.params))
                time.sleep(0.001)
                append_json_line(run.trials_path, row.to_dict())
                mirror.finished(row)
        time.sleep(60)
    time.sleep(rounds.uniform(0.01, 0.3))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""
params = st.sampled_from([{"learning_rate": rate, "hidden_dim": size} for rate in (1e-4, 0.003) for size in (32, 64)])
ends = st.fixed_dictionaries({
    "status": st.sampled_from(["complete", "complete", "pruned", "failed", "interrupted"]),
    "val_loss": st.none() | st.floats(0.01, 10),
    "joules": st.none() | st.floats(0, 1e6),
    "diverged": st.booleans(),
    "params": params,
})  # fmt: skip
trials = st.tuples(st.sampled_from(STAGES), st.sampled_from(IDS))
steps = st.lists(
    st.tuples(st.just("start"), trials, params)
    | st.tuples(st.just("end"), trials, ends)
    | st.tuples(st.just("end unseen"), trials, ends)
    | st.tuples(st.just("reopen"), trials, params)
    | st.tuples(st.just("restart"), st.none(), st.none())
    | st.tuples(st.just("kill"), st.none(), st.none())
    | st.tuples(st.just("sync"), st.none(), st.none()),
    max_size=20,
)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv(STORAGE_VARIABLE, raising=False)
    monkeypatch.setattr(storage_url, "_taken", [])


def begin(run, stage, trial_id, values):
    folder = run.trial_folder(stage, trial_id)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "trial.json", {"trial_id": trial_id, "params": values})
    return Proposal(trial_id, values)


def flushed(mirror):
    assert mirror.flush(FLUSH_SECONDS) is None


def studies(storage):
    """Trials of each study, read by Optuna alone."""
    if isinstance(storage, Path):
        storage = JournalStorage(JournalFileBackend(str(storage)))
    names = optuna.get_all_study_names(storage)
    return {name: optuna.load_study(study_name=name, storage=storage).trials for name in names}


def by_id(trials_of_study):
    found = {trial.user_attrs["trial"]: trial for trial in trials_of_study}
    assert len(found) == len(trials_of_study)
    return found


def settle(run, config, storage=None):
    mirror = Mirror(run, config, storage=storage)
    flushed(mirror)
    mirror.close()


def test_every_state_and_every_figure_of_a_run(searched_run):
    run = searched_run
    for folder in ("deep/deep-99",):
        write_json(run.path / "trials" / folder / "trial.json", {"trial_id": "deep-99", "params": {"hidden_dim": 64}})
    mirror = Mirror(run, run.config())
    flushed(mirror)
    found = studies(run.path / JOURNAL)
    assert set(found) == {"demo-wide", "demo-deep"}
    deep = by_id(found["demo-deep"])
    rows = {row.trial_id: row for row in run.trials("deep")}
    assert set(deep) == {*rows, "deep-99"}
    assert deep["deep-99"].state == TrialState.RUNNING
    assert deep["deep-20"].state == TrialState.PRUNED
    assert deep["deep-20"].user_attrs["status"] == "diverged"
    assert deep["deep-21"].state == TrialState.FAIL
    assert deep["deep-21"].user_attrs["error"] == "out of memory"
    for trial_id, row in rows.items():
        trial = deep[trial_id]
        if row.status == "complete":
            assert trial.state == TrialState.COMPLETE
            assert trial.values == [row.val_loss, row.energy_joules]
        else:
            assert trial.values is None
        assert trial.params == row.params
        low, high = row.energy.stated_bounds_joules
        kept = {
            "epochs": row.epochs_done, "seconds": 60.0, "parameters": 12_345, "energy_joules": row.energy_joules,
            "energy_joules_low": low, "energy_joules_high": high, "energy_method": "counter", "val_loss": row.val_loss,
        }  # fmt: skip
        assert {name: value for name, value in kept.items() if value is not None}.items() <= trial.user_attrs.items()
        assert None not in trial.user_attrs.values()
    study = optuna.load_study(study_name="demo-deep", storage=open_journal(run.path / JOURNAL))
    assert study.metric_names == ["val_loss", "energy_joules"]
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MINIMIZE"]
    assert (study.user_attrs["run_dir"], study.user_attrs["epochs"]) == (str(run.path), 6)
    learning_rate = optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)
    assert deep["deep-04"].distributions["learning_rate"] == learning_rate
    mirror.close()
    assert by_id(studies(run.path / JOURNAL)["demo-deep"])["deep-99"].state == TrialState.WAITING


def expected(rows, opened, *, running):
    """What each trial must be, said in the plainest way."""
    states = {}
    for key in opened:
        states[key] = TrialState.RUNNING if running else TrialState.WAITING
    for key, row in rows.items():
        if row["diverged"] or row["status"] == "pruned":
            states[key] = TrialState.PRUNED
        elif row["status"] == "complete" and row["val_loss"] is not None and row["joules"] is not None:
            states[key] = TrialState.COMPLETE
        else:
            states[key] = TrialState.FAIL
    return states


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example([("start", ("wide", "a"), {"learning_rate": 1e-3, "hidden_dim": 32}), ("kill", None, None)])
@given(history=steps)
def test_complete_trials_are_those_that_finished_their_stage(empty_run, tmp_path_factory, trial, history):
    config = empty_run.config().model_copy(update={"run_dir": str(tmp_path_factory.mktemp("history"))})
    run = RunDir.create(config)
    rows, opened = {}, {}
    mirror, left = Mirror(run, config), []
    for what, key, value in history:
        if what == "start":
            opened[key] = value
            proposal = begin(run, *key, value)
            if key not in rows:
                mirror.started(key[0], proposal)
        elif what in ("end", "end unseen"):
            rows[key] = value
            result = trial(key[1], stage=key[0], **value)
            append_json_line(run.trials_path, result.to_dict())
            for _ in range(2 if what == "end" else 0):
                mirror.finished(result)
        elif what == "reopen" and key in rows:
            del rows[key]
            opened[key] = value
            kept = [
                json.dumps(row) + "\n"
                for row in read_json_lines(run.trials_path)
                if (row["fidelity"]["stage"], row["trial_id"]) != key
            ]
            write_text(run.trials_path, "".join(kept))
            mirror.started(key[0], begin(run, *key, value))
        elif what == "sync":
            mirror.sync()
        elif what in ("restart", "kill"):
            if what == "restart":
                mirror.close()
            else:
                flushed(mirror)
                left.append(mirror)
            mirror = Mirror(run, config)
    mirror.sync()
    flushed(mirror)
    _agree(run, rows, opened, running=True)
    assert Mirror.flush(mirror, 0) is None
    for one in left:
        one._driver = False  # a killed process writes nothing when it ends
        one.close()
    mirror.close()
    _agree(run, rows, opened, running=False)
    shutil.rmtree(run.path)


def _agree(run, rows, opened, *, running):
    wanted = expected(rows, opened, running=running)
    found = studies(run.path / JOURNAL) if (run.path / JOURNAL).exists() else {}
    there = {
        (name.removeprefix("demo-"), trial_id): one
        for name, every in found.items()
        for trial_id, one in by_id(every).items()
    }
    assert {key: one.state for key, one in there.items()} == wanted
    for key, one in there.items():
        if one.state == TrialState.COMPLETE:
            assert one.values == [rows[key]["val_loss"], rows[key]["joules"]]
        assert one.params == (rows[key]["params"] if key in rows else opened[key])


def test_a_resumed_trial_stays_what_it_was_and_its_study_too(empty_run, trial):
    run, config = empty_run, empty_run.config()
    values = {"learning_rate": 1e-3, "hidden_dim": 32}
    mirror = Mirror(run, config)
    mirror.started("wide", begin(run, "wide", "wide-000", values))
    mirror.close()
    lines = (run.path / JOURNAL).read_bytes()
    mirror = Mirror(run, config)
    mirror.started("wide", begin(run, "wide", "wide-000", values))
    flushed(mirror)
    assert by_id(studies(run.path / JOURNAL)["demo-wide"])["wide-000"].state == TrialState.RUNNING
    result = trial("wide-000", stage="wide", params=values)
    append_json_line(run.trials_path, result.to_dict())
    mirror.finished(result)
    mirror.close()
    done = by_id(studies(run.path / JOURNAL)["demo-wide"])["wide-000"]
    assert (done.state, done.number, done.user_attrs["status"]) == (TrialState.COMPLETE, 0, "complete")
    assert (run.path / JOURNAL).read_bytes().startswith(lines)  # nothing was made anew


def test_nothing_is_written_twice(searched_run):
    settle(searched_run, searched_run.config())
    text = (searched_run.path / JOURNAL).read_bytes()
    mirror = Mirror(searched_run, searched_run.config())
    for result in searched_run.trials():
        mirror.finished(result)
    mirror.sync()
    mirror.close()
    assert (searched_run.path / JOURNAL).read_bytes() == text


def test_what_the_space_does_not_have_is_an_attribute(empty_run, trial):
    values = {"learning_rate": 5.0, "hidden_dim": 33, "n_layers": 3}
    append_json_line(empty_run.trials_path, trial("a", stage="wide", params=values).to_dict())
    settle(empty_run, empty_run.config())
    found = by_id(studies(empty_run.path / JOURNAL)["demo-wide"])["a"]
    assert found.params == {}
    assert {f"outside space: {name}": value for name, value in values.items()}.items() <= found.user_attrs.items()


def test_a_trial_above_a_limit_is_off_optunas_front(empty_run, trial):
    run = empty_run
    mirror = Mirror(run, run.config())
    for name, loss, ratio in (("a", 0.1, 1.2), ("b", 0.2, 0.9)):
        result = replace(trial(name, stage="wide", val_loss=loss), limit_ratios={"memory_bytes": ratio})
        if name == "b":
            mirror.started("wide", Proposal(name, result.params))
            flushed(mirror)
        mirror.finished(result)
    mirror.close()
    study = optuna.load_study(study_name="demo-wide", storage=open_journal(run.path / JOURNAL))
    assert [one.user_attrs["trial"] for one in study.best_trials] == ["b"]
    assert {one.state for one in study.trials} == {TrialState.COMPLETE}
    assert study.trials[0].user_attrs["share of limit: memory_bytes"] == 1.2


def test_a_line_torn_at_any_byte_is_mended_by_the_next_writer(empty_run, trial):
    run, config = empty_run, empty_run.config()
    for number in range(3):
        append_json_line(run.trials_path, trial(f"t{number}", stage="wide").to_dict())
    settle(run, config)
    whole = (run.path / JOURNAL).read_bytes()
    for size in range(0, len(whole), 37):
        (run.path / JOURNAL).write_bytes(whole[:size])
        settle(run, config)
        assert set(by_id(studies(run.path / JOURNAL)["demo-wide"])) == {"t0", "t1", "t2"}, size
    storage = open_journal(run.path / JOURNAL)
    with (run.path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":4,"torn')
    storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], "another")
    assert set(studies(run.path / JOURNAL)) == {"demo-wide", "another"}


@pytest.mark.parametrize("damage", [b"\x00\xff\n", b"{}\n", b'{"op_code": 99, "worker_id": "x"}\n', b"[]\n", b"3\n"])
def test_a_damaged_journal_is_set_aside_and_made_anew(empty_run, trial, caplog, damage):
    run, config = empty_run, empty_run.config()
    append_json_line(run.trials_path, trial("a", stage="wide").to_dict())
    settle(run, config)
    whole = (run.path / JOURNAL).read_bytes()
    (run.path / JOURNAL).write_bytes(damage + whole)
    settle(run, config)
    assert set(by_id(studies(run.path / JOURNAL)["demo-wide"])) == {"a"}
    assert (run.path / f"{JOURNAL}.damaged").read_bytes() == damage + whole
    assert "is no journal of Optuna" in caplog.text


@pytest.mark.parametrize("relative", [False, True])
def test_a_lock_of_a_killed_writer_is_taken_over(tmp_path, relative, monkeypatch):
    """A relative path leaves a link that leads nowhere, at which Optuna's own lock spins for ever."""
    path = tmp_path / "folder" / JOURNAL
    path.parent.mkdir()
    storage = open_journal(path)
    name = os.path.relpath(path, tmp_path) if relative else str(path)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, name], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as one:
        assert one.stdout.readline() == "held\n"
        one.send_signal(signal.SIGKILL)
    assert Path(f"{path}.lock").is_symlink()
    monkeypatch.setattr(storage._backend._mutex, "_grace_seconds", 0.3)
    storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], "x")
    assert set(studies(path)) == {"x"}
    assert [entry.name for entry in path.parent.iterdir()] == [JOURNAL]


def test_a_search_that_is_killed_again_and_again_loses_nothing(empty_run, trial, tmp_path):
    rows, status = tmp_path / "rows.jsonl", ("complete", "pruned", "failed")
    for number in range(400):
        append_json_line(rows, trial(f"t{number:03d}", stage="wide", status=status[number % 3]).to_dict())
    subprocess.run([sys.executable, "-c", SEARCH_AND_DIE, str(empty_run.path), str(rows), "6"], check=True, timeout=120)
    settle(empty_run, empty_run.config())
    found = by_id(studies(empty_run.path / JOURNAL)["demo-wide"])
    done = {row.trial_id: row.status for row in empty_run.trials()}
    names = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    assert len(done) > 10
    assert {trial_id: names[one.state] for trial_id, one in found.items()} == done


def test_a_lock_that_is_held_is_waited_for(tmp_path):
    path = tmp_path / JOURNAL
    path.touch()
    lock, began = MirrorLock(path), time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK.replace("sleep(60)", "sleep(0.4); os.unlink(sys.argv[1] + '.lock')"), path],
        stdout=subprocess.PIPE, text=True,
    ) as one:  # fmt: skip
        assert one.stdout.readline() == "held\n"
        began = time.monotonic()
        assert lock.acquire()
        assert time.monotonic() - began > 0.3
        lock.release()
    with pytest.raises(RuntimeError):
        lock.release()


def test_two_writers_at_once_spoil_nothing(tmp_path):
    code = (
        "import sys; from pathlib import Path; from wattier.mirror_storage import open_journal\n"
        "from optuna.study import StudyDirection\n"
        "storage = open_journal(Path(sys.argv[1]))\n"
        "for k in range(60): storage.create_new_study([StudyDirection.MINIMIZE], f'{sys.argv[2]}-{k}')\n"
    )
    path = tmp_path / JOURNAL
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert set(studies(path)) == {f"{name}-{k}" for name in "ab" for k in range(60)}


def test_a_database_that_is_away_is_told_once_and_caught_up_with(empty_run, trial, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(mirror_module, "PAUSE_SECONDS", 0.05)
    run, away = empty_run, tmp_path / "away"
    url = f"sqlite:///{away / 'study.db'}"
    mirror = Mirror(run, run.config(), storage=url)
    for number in range(4):
        result = trial(f"t{number}", stage="wide")
        append_json_line(run.trials_path, result.to_dict())
        mirror.started("wide", Proposal(result.trial_id, result.params))
        mirror.finished(result)
        time.sleep(0.03)
    assert "unable to open database file" in mirror.flush(FLUSH_SECONDS)
    warnings = [record for record in caplog.records if record.name == "wattier.mirror"]
    assert len(warnings) == 1
    assert f"wattier study {run.path}" in warnings[0].getMessage()
    away.mkdir()
    deadline = time.monotonic() + FLUSH_SECONDS
    while mirror.flush(0.1) is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    mirror.close()
    storage = optuna.storages.RDBStorage(url)
    assert {one.state for one in by_id(studies(storage)["demo-wide"]).values()} == {TrialState.COMPLETE}
    storage.engine.dispose()


def test_a_database_that_never_answers_holds_nobody_up(empty_run, trial, monkeypatch, caplog):
    monkeypatch.setattr(mirror_module, "CLOSE_SECONDS", 0.2)
    asleep = mirror_module.threading.Event()
    monkeypatch.setattr(mirror_module, "open_journal", lambda _: asleep.wait(60))
    mirror, began = Mirror(empty_run, empty_run.config()), time.monotonic()
    for number in range(100):
        mirror.finished(trial(f"t{number}", stage="wide"))
    assert "not written within" in mirror.flush(0.1)
    mirror.close()
    assert time.monotonic() - began < 10
    assert "not all was written in time" in caplog.text
    asleep.set()
    mirror._thread.join(FLUSH_SECONDS)


def test_a_study_that_somebody_deleted_comes_back(searched_run):
    run = searched_run
    mirror = Mirror(run, run.config())
    flushed(mirror)
    optuna.delete_study(study_name="demo-deep", storage=JournalStorage(JournalFileBackend(str(run.path / JOURNAL))))
    mirror.sync()
    flushed(mirror)
    mirror.close()
    assert len(studies(run.path / JOURNAL)["demo-deep"]) == len(run.trials("deep"))


def test_a_run_that_was_started_over_shows_nothing_of_the_one_before(searched_run, tmp_path):
    run, config, url = searched_run, searched_run.config(), f"sqlite:///{tmp_path / 'study.db'}"
    settle(run, config, url)
    shutil.rmtree(run.path / "trials")
    run.trials_path.unlink()
    settle(run, config, url)
    storage = optuna.storages.RDBStorage(url)
    assert studies(storage) == {}
    storage.engine.dispose()


def test_two_runs_of_one_name_in_one_database_keep_apart(empty_run, trial, tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    other = RunDir.create(empty_run.config().model_copy(update={"run_dir": str(tmp_path / "other")}))
    for run, name in ((empty_run, "a"), (other, "b")):
        append_json_line(run.trials_path, trial(name, stage="wide").to_dict())
        for _ in range(2):
            settle(run, run.config(), url)
    storage = optuna.storages.RDBStorage(url)
    found = {name: set(by_id(every)) for name, every in studies(storage).items()}
    storage.engine.dispose()
    suffixed = next(name for name in found if name != "demo-wide")
    assert found == {"demo-wide": {"a"}, suffixed: {"b"}}
    assert suffixed.startswith("demo-wide-")


def test_a_mirror_stays_in_its_process(empty_run):
    mirror = Mirror(empty_run, empty_run.config(), storage=f"postgresql://me:{SECRET}@127.0.0.1:1/x")
    with pytest.raises(TypeError):
        pickle.dumps(mirror)
    with pytest.raises(TypeError):
        copy.deepcopy(mirror)
    mirror.close()


def test_the_verb_rebuilds_and_leaves_a_running_search_alone(searched_run, tmp_path):
    run, config = searched_run, searched_run.config()
    done = rebuild(run, config, None)
    assert done.counts["demo-wide"] == {"COMPLETE": 10, "PRUNED": 4}
    assert done.command == f"optuna-dashboard {run.path / JOURNAL}"
    (run.path / JOURNAL).unlink()
    with run.lock():
        assert rebuild(run, config, None).counts is None
        assert not (run.path / JOURNAL).exists()
        url = f"sqlite:///{tmp_path / 'study.db'}"
        assert rebuild(run, config, url).counts["demo-wide"] == {"COMPLETE": 10, "PRUNED": 4}
    with pytest.raises(UserError, match=r"--storage: holds a password"):
        rebuild(run, config, f"postgresql://me:{SECRET}@host/x")


def ask(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return json.load(answer)


def test_optuna_dashboard_shows_what_the_run_says(searched_run):
    run = searched_run
    settle(run, run.config())
    port = free_port()
    command = [sys.executable, "-c", DASHBOARD, str(run.path / JOURNAL), "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as dashboard:
        try:
            listed = _patiently(lambda: ask(port, "/api/studies"))["study_summaries"]
            shown = {one["study_name"]: ask(port, f"/api/studies/{one['study_id']}?after=0") for one in listed}
        finally:
            dashboard.kill()
    assert set(shown) == {"demo-wide", "demo-deep"}
    states = {"complete": "Complete", "pruned": "Pruned", "failed": "Fail"}
    for stage in STAGES:
        study = shown[f"demo-{stage}"]
        assert study["objective_names"] == ["val_loss", "energy_joules"]
        assert study["directions"] == ["minimize", "minimize"]
        rows = {row.trial_id: row for row in run.trials(stage)}
        attributes = {t["number"]: {a["key"]: a["value"] for a in t["user_attrs"]} for t in study["trials"]}
        assert {a["trial"].strip('"') for a in attributes.values()} == set(rows)
        for one in study["trials"]:
            row = rows[attributes[one["number"]]["trial"].strip('"')]
            assert one["state"] == states[row.status]
            assert one.get("values") == ([row.val_loss, row.energy_joules] if row.status == "complete" else None)
            shown_params = {p["name"]: float(p["param_external_value"]) for p in one["params"]}
            assert shown_params == pytest.approx(row.params, rel=1e-12)


def _patiently(question, seconds=30):
    deadline = time.monotonic() + seconds
    while True:
        try:
            return question()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
