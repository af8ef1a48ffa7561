"""A password of a database reaches no file, no message and no child process."""

import logging
import os
import subprocess

import pytest
import yaml

from wattier import storage_url
from wattier.config import load_config
from wattier.errors import UserError
from wattier.mirror import Mirror, rebuild
from wattier.run import launcher_for
from wattier.rundir import append_json_line
from wattier.storage_url import STORAGE_VARIABLE, check_url, redacted, secrets_of

FLUSH_SECONDS = 30


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv(STORAGE_VARIABLE, raising=False)
    monkeypatch.setattr(storage_url, "_taken", [])


@pytest.mark.parametrize(
    ("url", "secrets"),
    [
        ("postgresql://me:pw@host/db", ["pw"]),
        ("postgresql+psycopg://me:p%40w@host:1/db", ["p%40w", "p@w"]),
        ("postgresql://me:a/b@host/db", ["a/b"]),
        ("postgresql://me:a?b#c@host/db", ["a?b#c"]),
        ("postgresql://a@b:pw@host/db", ["pw"]),
        ("postgresql://:pw@host/db", ["pw"]),
        ("postgresql://host/db?user=me&password=p%40w", ["p%40w", "p@w"]),
        ("postgresql://host/db?sslpassword=pw", ["pw"]),
        ("mysql+pymysql://host/db?PASSWD=pw", ["pw"]),
        ("mysql+pyodbc:///?odbc_connect=Driver%3DX%3BPWD%3Dpw", ["Driver%3DX%3BPWD%3Dpw", "Driver=X;PWD=pw"]),
        ("postgresql://[::1:pw@host/db", [":1:pw"]),
    ],
)
def test_a_password_in_a_config_is_refused_and_never_repeated(empty_run, tmp_path, url, secrets):
    assert set(secrets) <= set(secrets_of(url))
    for secret in secrets:
        assert secret not in redacted(f"cannot reach {url} as {secret}", url)
    values = empty_run.config().model_dump(mode="json")
    values["search"]["storage"] = url
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"config.yaml: search.storage: holds a password.*PGPASSFILE") as refused:
        load_config(path)
    assert not any(secret in str(refused.value) for secret in secrets)
    assert "\n" not in str(refused.value)
    assert check_url(url, password_allowed=True) == url


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "is no URL"), ("study.db", "is no URL"), ("/x/study.db", "is no URL"), ("://", "is no URL"),
        ("postgres://host/x", "names no database that Optuna can write. Did you mean 'postgresql'"),
        ("redis://host", "names no database"), ("file:///etc/passwd", "names no database"),
        ("sqlite://", "names no file"), ("sqlite:///:memory:", "names no file"),
    ],
)  # fmt: skip
def test_what_is_no_database_is_refused(url, message):
    with pytest.raises(ValueError, match=message):
        check_url(url)


@pytest.mark.parametrize(
    "url",
    ["postgresql:///?service=studies", "postgresql://me@host:5432/x", "postgresql://host/x?passfile=/home/me/.pgpass",
     "sqlite:////x/study.db", "mysql+pymysql://me@host/x", "postgresql://[::1]:5432/x"],
)  # fmt: skip
def test_urls_without_a_password(url):
    assert check_url(url) == url
    assert secrets_of(url) == []


def test_a_password_in_the_environment_reaches_no_file_no_message_and_no_child(empty_run, trial, monkeypatch, caplog):
    run = empty_run
    append_json_line(run.trials_path, trial("a", stage="wide").to_dict())
    secret = "geheim-7-x"
    monkeypatch.setenv(STORAGE_VARIABLE, f"postgresql://me:{secret}@127.0.0.1:1/x?connect_timeout=2")
    with caplog.at_level(logging.DEBUG):
        mirror = Mirror(run, run.config())
        reason = mirror.flush(FLUSH_SECONDS)
        mirror.close()
    assert STORAGE_VARIABLE not in os.environ
    assert Mirror(run, run.config()).url == mirror.url  # the next one of this process still knows
    child = subprocess.run(["env"], capture_output=True, text=True, check=True).stdout
    told = [reason, caplog.text, mirror.where, repr(mirror), str(vars(run)), child]
    assert "refused" in reason
    assert not [text for text in told if secret in text]
    assert not [path for path in run.path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    with pytest.raises(UserError, match="cannot be written") as refused:
        rebuild(run, run.config(), None)
    assert secret not in str(refused.value)


def test_no_process_that_a_launcher_starts_inherits_the_url(empty_run, monkeypatch):
    monkeypatch.setenv(STORAGE_VARIABLE, "postgresql://me:pw@host/x")
    config = empty_run.config().model_copy(update={"launcher": "inline"})
    with launcher_for(config):
        assert STORAGE_VARIABLE not in os.environ
    assert storage_url.chosen_url(config) == "postgresql://me:pw@host/x"
