"""The studies in a real PostgreSQL: passwords stay where they belong, and a server may go away and come back."""

import os
import pwd
import shutil
import signal
import subprocess
import time
from pathlib import Path

import optuna
import psutil
import pytest

from wattier import mirror as mirror_module
from wattier import storage_url
from wattier.errors import UserError
from wattier.mirror import Mirror, rebuild
from wattier.ports import free_port
from wattier.rundir import append_json_line
from wattier.storage_url import STORAGE_VARIABLE

PASSWORD = "geheim%5?x"
ENCODED = "geheim%255%3Fx"
FLUSH_SECONDS = 60
BINARIES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)), None) or shutil.which(
    "initdb"
)


class Server:
    """A server of its own on loopback, as an unprivileged user where the test runs as root."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.bin = Path(BINARIES).parent
        self.user = None
        if os.getuid() == 0:
            names = {entry.pw_name for entry in pwd.getpwall()}
            self.user = "postgres" if "postgres" in names else "nobody"
            shutil.chown(folder, self.user)
        secret = folder / "secret"
        secret.write_text(PASSWORD)
        if self.user:
            shutil.chown(secret, self.user)
        self._call("initdb", "-D", folder / "data", "-U", "me", "-A", "scram-sha-256", "--pwfile", secret, "-N")
        self.start()

    def _call(self, name, *arguments):
        command = [self.bin / name, *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True, user=self.user, cwd="/", timeout=60)

    def start(self):
        options = ["-D", self.folder / "data", "-h", "127.0.0.1", "-p", str(self.port), "-k", self.folder, "-F"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.bin / "postgres", *options], user=self.user, cwd="/", stdout=log, stderr=log
            )
        deadline = time.monotonic() + 30
        while subprocess.run(
            [self.bin / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)], check=False
        ).returncode:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def stop(self):
        self.process.send_signal(signal.SIGQUIT)  # at once, as in a crash
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'wattier[postgresql]'")
    if BINARIES is None:
        pytest.skip("PostgreSQL's server is not installed: apt-get install postgresql")
    folder = Path("/tmp") / f"wattier-pg-{os.getpid()}"  # a socket's path is short, and its owner may be another
    folder.mkdir(mode=0o700)
    one = Server(folder)
    yield one
    one.process.send_signal(signal.SIGQUIT)
    one.process.wait(30)
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in (STORAGE_VARIABLE, "PGPASSFILE", "PGPASSWORD", "PGSERVICEFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(storage_url, "_taken", [])


@pytest.fixture
def pgpass(server, tmp_path, monkeypatch):
    """The way PostgreSQL itself offers."""
    path = tmp_path / "pgpass"
    path.write_text(f"127.0.0.1:{server.port}:*:me:{PASSWORD}\n")
    path.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(path))


def url_of(server, user="me"):
    return f"postgresql://{user}@127.0.0.1:{server.port}/postgres"


def states(server, name):
    storage = optuna.storages.RDBStorage(f"postgresql://me:{ENCODED}@127.0.0.1:{server.port}/postgres")
    try:
        trials = optuna.load_study(study_name=name, storage=storage).trials
        return {trial.user_attrs["trial"]: (trial.state.name, trial.values, trial.params) for trial in trials}
    finally:
        storage.remove_session()
        storage.engine.dispose()


def of_rows(run, stage):
    """What the study must say, from the rows."""
    state = {"complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
    return {
        row.trial_id: (
            state[row.status], [row.val_loss, row.energy_joules] if row.status == "complete" else None, row.params
        )
        for row in run.trials(stage)
    }  # fmt: skip


def clean(server):
    storage = optuna.storages.RDBStorage(f"postgresql://me:{ENCODED}@127.0.0.1:{server.port}/postgres")
    for name in optuna.get_all_study_names(storage):
        optuna.delete_study(study_name=name, storage=storage)
    storage.remove_session()
    storage.engine.dispose()


def test_a_run_in_postgresql_by_a_password_file(server, pgpass, searched_run):
    for _ in range(2):
        done = rebuild(searched_run, searched_run.config(), url_of(server))
    assert done.command == f"optuna-dashboard {url_of(server)}"
    for stage in ("wide", "deep"):
        assert states(server, f"demo-{stage}") == of_rows(searched_run, stage)
    clean(server)


def test_a_service_file(server, searched_run, tmp_path, monkeypatch):
    path = tmp_path / "services"
    path.write_text(f"[studies]\nhost=127.0.0.1\nport={server.port}\nuser=me\npassword={PASSWORD}\ndbname=postgres\n")
    monkeypatch.setenv("PGSERVICEFILE", str(path))
    rebuild(searched_run, searched_run.config(), "postgresql:///?service=studies")
    assert states(server, "demo-deep") == of_rows(searched_run, "deep")
    clean(server)


def test_a_password_in_the_environment_is_on_no_disk(server, searched_run, monkeypatch, caplog):
    monkeypatch.setenv(STORAGE_VARIABLE, f"postgresql://me:{ENCODED}@127.0.0.1:{server.port}/postgres")
    with caplog.at_level("DEBUG"):
        done = rebuild(searched_run, searched_run.config(), None)
    assert done.command == f'optuna-dashboard "${STORAGE_VARIABLE}"'
    assert states(server, "demo-deep") == of_rows(searched_run, "deep")
    for secret in (PASSWORD, ENCODED):
        assert secret not in caplog.text
        files = [path for path in searched_run.path.rglob("*") if path.is_file()]
        assert not [path for path in files if secret.encode() in path.read_bytes()]
    clean(server)


def test_a_wrong_password_is_one_line_without_it(server, searched_run, monkeypatch):
    wrong = "falsch-und-geheim"
    monkeypatch.setenv(STORAGE_VARIABLE, f"postgresql://me:{wrong}@127.0.0.1:{server.port}/postgres")
    with pytest.raises(UserError, match="password authentication failed for user") as refused:
        rebuild(searched_run, searched_run.config(), None)
    assert wrong not in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="no password supplied"):
        rebuild(searched_run, searched_run.config(), url_of(server))


def test_a_server_that_crashes_and_comes_back_during_a_search(server, pgpass, empty_run, trial, monkeypatch, caplog):
    monkeypatch.setattr(mirror_module, "PAUSE_SECONDS", 0.1)
    run = empty_run
    mirror = Mirror(run, run.config(), storage=url_of(server))

    def end(name):
        result = trial(name, stage="wide")
        append_json_line(run.trials_path, result.to_dict())
        mirror.finished(result)

    end("a")
    assert mirror.flush(FLUSH_SECONDS) is None
    server.stop()
    end("b")
    assert mirror.flush(FLUSH_SECONDS) is not None
    end("c")
    time.sleep(0.3)
    assert len([record for record in caplog.records if record.name == "wattier.mirror"]) == 1
    server.start()
    deadline = time.monotonic() + FLUSH_SECONDS
    while mirror.flush(0.2) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    end("d")
    mirror.close()
    assert states(server, "demo-wide") == of_rows(run, "wide")
    assert len(of_rows(run, "wide")) == 4
    clean(server)


def test_a_server_that_hangs_holds_no_search_up(server, pgpass, empty_run, trial, monkeypatch, caplog):
    monkeypatch.setattr(mirror_module, "CLOSE_SECONDS", 0.3)
    mirror = Mirror(empty_run, empty_run.config(), storage=url_of(server))
    mirror.finished(trial("a", stage="wide"))
    assert mirror.flush(FLUSH_SECONDS) is None
    backends = psutil.Process(server.process.pid).children()
    try:
        for process in backends:
            process.suspend()
        began = time.monotonic()
        for number in range(50):
            mirror.finished(trial(f"t{number}", stage="wide"))
        mirror.close()
        assert time.monotonic() - began < 10
        assert "not all was written in time" in caplog.text
    finally:
        for process in backends:
            process.resume()
        mirror._thread.join(FLUSH_SECONDS)
    assert len(states(server, "demo-wide")) == 51
    clean(server)
