"""A push against a hub of our own: the bytes that arrive, and each way in which it can fail."""

import json
import re
import shutil
import socket
import sys

import fabricated
import pytest
from loopback_hub import TOKEN, loopback_hub

from wattier import cli
from wattier.errors import UserError
from wattier.hub import push_release
from wattier_gnn.release import MANIFEST, load_release
from wattier_gnn.structure import DataError

# The library hands its HTTP client a file under a name that the client finds old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
NAME = "lab/small-potential"
CARD = "---\nlibrary_name: wattier\n---\n\n# fabricated\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Shared: do not write to it."""
    return fabricated.release(tmp_path_factory.mktemp("hub") / "release", texts={"README.md": CARD, "example.py": ""})


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage is no part of the loopback hub
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    disable_progress_bars()
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with loopback_hub() as server:
        yield server


@pytest.fixture
def push(hub, whole):
    waits = []

    def command(**options):
        return push_release(
            options.pop("folder", whole),
            options.pop("name", NAME),
            wait=waits.append,
            **{"endpoint": hub.url, **options},
        )

    command.waits = waits
    return command


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_arrives_is_the_folder_byte_for_byte(push, hub, whole, tmp_path):
    assert push() == f"{hub.url}/{NAME}/commit/{1:040x}"
    arrived = dict(hub.repositories[NAME]["main"])
    assert arrived.pop(".gitattributes")
    assert arrived == files_of(whole)
    assert hub.commits == [("main", "fabricated, exported by Wattier 0.1.0")]
    assert not hub.private
    for name, content in hub.repositories[NAME]["main"].items():  # as a download would leave it
        (tmp_path / "down" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "down" / name).write_bytes(content)
    assert len(load_release(tmp_path / "down").members) == 2


def test_only_what_the_manifest_names_is_pushed(push, hub, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "release")
    (folder / "secrets.env").write_text("HF_TOKEN=1")
    (folder / "final-000" / "optimizer.pt").write_bytes(b"x")
    push(folder=folder)
    assert set(hub.repositories[NAME]["main"]) == {*files_of(whole), ".gitattributes"}


def test_a_repository_that_is_there_gets_what_is_new_and_keeps_the_rest(push, hub, whole, tmp_path):
    hub.repositories[NAME] = {"main": {"logo.png": b"png"}}
    push()
    assert hub.repositories[NAME]["main"] == {"logo.png": b"png", **files_of(whole)}
    first = len(hub.commits)
    push()
    assert len(hub.commits) == first, "nothing had changed"
    other = fabricated.release(tmp_path / "release", 1, texts={"README.md": CARD})
    push(folder=other)
    assert hub.repositories[NAME]["main"][MANIFEST] == (other / MANIFEST).read_bytes()


def test_private_and_a_branch(push, hub, whole):
    push(private=True, revision="trial")
    assert hub.private == {NAME}
    assert set(hub.repositories[NAME]["main"]) == {".gitattributes"}
    assert hub.repositories[NAME]["trial"][MANIFEST] == (whole / MANIFEST).read_bytes()
    push(revision="trial")
    assert [branch for branch, _ in hub.commits] == ["trial"]


@pytest.mark.parametrize(
    "place", ["repos/create", "validate-yaml", "preupload", "objects/batch", "PUT", "verify", "commit"]
)
@pytest.mark.parametrize("status", [500, 503])
def test_a_bad_moment_of_the_hub_is_waited_for(place, status, push, hub, whole):
    hub.failures.append((place, status))
    push()
    assert not hub.failures
    assert hub.repositories[NAME]["main"][MANIFEST] == (whole / MANIFEST).read_bytes()


def test_a_hub_that_stays_away(push, hub):
    hub.failures += [("repos/create", 502)] * 4
    with pytest.raises(UserError, match=r"answers 502 \(as asked for\)\. Try again later\."):
        push()
    assert push.waits == [1, 2, 4]
    assert not hub.repositories


@pytest.mark.parametrize(
    ("place", "status", "said"),
    [
        ("commit", 403, "may not write there"), ("preupload", 404, "no such place"), ("commit", 400, "answers 400"),
        ("PUT", 403, "may not write there"),
    ],
)  # fmt: skip
def test_a_refusal_is_final(place, status, said, push, hub):
    hub.failures.append((place, status))
    with pytest.raises(UserError, match=said):
        push()
    assert not push.waits
    assert not hub.commits


@pytest.mark.parametrize("token", [None, "hf_wrong_9876543210"])
def test_no_token_or_a_wrong_one(token, push, hub, monkeypatch, caplog):
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=r"the token is missing or not accepted \(401\).*Set HF_TOKEN") as refused:
        push()
    assert "hf_wrong" not in str(refused.value) + caplog.text
    assert not hub.repositories


@pytest.mark.parametrize("token", ["hf_s3cret\u00e9\u4e2d", "hf_s3cret\x01x", "hf_s3cret\nX-Evil: 1", "hf_s3cret\x7f"])
def test_a_token_that_no_header_can_hold_is_not_repeated(token, push, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=r"the token .*Set HF_TOKEN") as refused:
        push()
    assert "s3cret" not in str(refused.value)
    assert not hub.repositories


def test_nobody_listens(push):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: a connection is refused
        with pytest.raises(UserError, match=r"cannot be reached \(.*refused.*\)\. Check the network"):
            push(endpoint=f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert push.waits == [1, 2, 4]


def test_what_is_no_hub(push, hub):
    hub.failures.append(("repos/create", 200))
    with pytest.raises(UserError, match="does not answer as a hub does"):
        push()


@pytest.mark.parametrize("name", ["potential", "a/b/c", "../x", "lab/", "/x", "lab/na me", "", "http://h/lab/x"])
def test_names_that_are_none(name, push, hub):
    with pytest.raises(UserError, match="must be ORG/NAME"):
        push(name=name)
    assert not hub.requests


@pytest.mark.parametrize("endpoint", ["ftp://hub", "hub.example", "http://", "file:///etc"])
def test_endpoints_that_are_none(endpoint, push):
    with pytest.raises(UserError, match="must be an address"):
        push(endpoint=endpoint)


def test_a_password_in_the_endpoint_is_not_repeated(push):
    with pytest.raises(UserError, match="holds a password") as refused:
        push(endpoint="https://me:s3cret@hub.example")
    assert "s3cret" not in str(refused.value)


def test_a_damaged_release_is_not_pushed(push, hub, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "release")
    (folder / "README.md").write_text("---\n---\nanother")
    with pytest.raises(DataError, match=r"README\.md: sha256"):
        push(folder=folder)
    assert not hub.requests


@pytest.mark.parametrize("name", ["example.py", MANIFEST, "final-000/model.safetensors"])
def test_a_release_that_changes_while_it_is_pushed(name, push, hub, whole, tmp_path, monkeypatch):
    folder = shutil.copytree(whole, tmp_path / "release")
    from wattier import hub as module

    verify = module.verify_release

    def then_change(path):
        manifest = verify(path)
        (folder / name).write_text("import os")
        return manifest

    monkeypatch.setattr(module, "verify_release", then_change)
    with pytest.raises(DataError, match=f"{re.escape(name)}: sha256"):
        push(folder=folder)
    assert not hub.commits


def test_without_the_library(push, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'wattier\[hub\]'"):
        push()


def run(monkeypatch, capsys, *arguments):
    """The command as `main` runs it: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["wattier", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def test_the_commands(hub, whole, tmp_path, monkeypatch, capsys):
    code, said, _ = run(monkeypatch, capsys, "push", whole, NAME, "--endpoint", hub.url, "--private")
    assert (code, said) == (0, f"{hub.url}/{NAME}/commit/{1:040x}\n")
    assert hub.private == {NAME}
    code, said, _ = run(monkeypatch, capsys, "verify", whole)
    assert code == 0
    assert "2 members for oxides, molecules; all 6 files have their sha256" in said
    folder = shutil.copytree(whole, tmp_path / "release")
    (folder / "notes.txt").write_text("mine")
    assert "not of the release, never read: notes.txt" in run(monkeypatch, capsys, "verify", folder)[1]
    fabricated.rewrite(folder, lambda m: m["files"].update({"../../etc/passwd": "0" * 64}))
    before = json.dumps(hub.requests)
    for command in (("verify", folder), ("push", folder, NAME, "--endpoint", hub.url), ("verify", tmp_path / "none")):
        code, said, error = run(monkeypatch, capsys, *command)
        assert (code, said) == (2, "")
        assert len(error.splitlines()) == 1
        assert error.startswith(str(command[1]))
    assert json.dumps(hub.requests) == before
