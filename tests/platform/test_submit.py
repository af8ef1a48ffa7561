"""What `wattier submit` refuses before anything leaves this machine, and what it sends."""

import http.server
import threading
from types import SimpleNamespace

import pytest
import yaml

from wattier import submit as module
from wattier.errors import UserError
from wattier.submit import EXCLUDES, Submitted, packages, submit

DEAD = "http://127.0.0.1:9"


@pytest.fixture
def config(tmp_path):
    """Writes a config that could be submitted, with some changes; ``config(name="a.yaml", run_dir="x")``."""

    def write(name="config.yaml", text="", **changes):
        values = {
            "name": "x",
            "run_dir": str(tmp_path / "run"),
            "data": {"sources": {"qm7x": "sample"}},
            "search": {"space": {"n_layers": {"choices": [1, 2]}}, "stages": [{"name": "only", "trials": 1}]},
        } | changes
        path = tmp_path / "work" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(values) + text)
        return path

    return write


@pytest.fixture
def refused(tmp_path):
    """The one line with which a config is refused."""

    def check(path, address=DEAD):
        with pytest.raises(UserError) as caught:
            submit(path, address, tmp_path / "work")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return check


class TestRefusals:
    def test_a_relative_run_dir(self, config, refused):
        assert "run_dir is 'runs/x', but must be an absolute path" in refused(config(run_dir="runs/x"))

    def test_relative_sources_and_stores(self, config, refused):
        line = refused(config(data={"sources": {"qm7x": "data/qm7x", "ani1x": "sample"}}))
        assert "data.sources.qm7x is 'data/qm7x'" in line
        assert "data.store is 'store'" in refused(config(data={"store": "store"}))

    def test_a_config_that_the_job_would_not_see(self, config, refused, tmp_path):
        outside = config().rename(tmp_path / "outside.yaml")
        assert "outside.yaml: lies outside of the working directory" in refused(outside)
        for name in ("runs/a/config.yaml", ".venv/config.yaml", "a/b/.ssh/config.yaml"):
            assert "is not uploaded, as nothing that matches" in refused(config(name))

    def test_what_looks_alike_is_let_through(self, config, refused):
        for name in ("a/runs/config.yaml", "configs/data.yaml", "mydata/config.yaml"):
            assert "no Ray cluster answers here" in refused(config(name))

    def test_an_address_of_another_cluster_in_the_config(self, config, refused):
        line = refused(config(resources={"address": "10.0.0.1:6379"}))
        assert "resources.address is '10.0.0.1:6379', but must be left out" in line

    @pytest.mark.parametrize("url", ["postgresql://me:hunter2@db/optuna", "https://user:p%40ss@host:1/x"])
    def test_a_password(self, config, refused, url):
        line = refused(config(text=f"# storage: {url}\n"))
        assert "holds a URL with a password" in line
        assert "hunter2" not in line

    def test_no_password(self, config, refused):
        path = config(text="# see https://docs:8265/a@b, postgresql://me@db/optuna and http://head:8265\n")
        assert "no Ray cluster answers here" in refused(path)

    @pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://head:10001", "head", ""])
    def test_what_is_no_dashboard(self, config, refused, address):
        assert refused(config(), address).startswith(f"--address: is {address!r}, but must be the dashboard's")

    def test_nobody_there(self, config, refused):
        assert refused(config()).startswith(f"{DEAD}: no Ray cluster answers here")

    def test_somebody_else_there(self, config, refused):
        class Page(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"<html>hello</html>")

            def log_message(self, *_):
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Page)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            assert "no Ray cluster answers here" in refused(config(), f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def test_a_config_that_is_wrong_is_refused_here(self, config, refused):
        assert "unknown key 'serch'" in refused(config(serch=1))


class Client:
    """Ray's client, as far as it is used."""

    def __init__(self, *details):
        self.details, self.sent = list(details), []

    def submit_job(self, **job):
        self.sent.append(job)
        if len(self.sent) == 1 and not self.details:
            raise RuntimeError("Request failed with status code 500: No available agent to submit job, try again.")
        return "job-1"

    def get_job_info(self, job):
        assert job == "job-1"
        details = self.details.pop(0) if len(self.details) > 1 else self.details[0]
        if isinstance(details, Exception):
            raise details
        return details


def ended(status, code, message="Job entrypoint command failed with exit code 3"):
    terminal = SimpleNamespace(value=status, is_terminal=lambda: status not in {"RUNNING", "PENDING"})
    return SimpleNamespace(status=terminal, driver_exit_code=code, message=message)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)


def test_what_is_sent_holds_the_code_and_no_secret(config, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("PGPASSWORD", "hunter2")
    client = Client()
    monkeypatch.setattr(module, "_client", lambda _: client)
    submitted = submit(config("con figs/a.yaml"), "http://head:8265", tmp_path / "work")
    assert len(client.sent) == 2, "a cluster that has only just started is asked again"
    job = client.sent[1]
    assert job["entrypoint"] == "python -m wattier run 'con figs/a.yaml'"
    environment = job["runtime_env"]
    assert environment["working_dir"] == str((tmp_path / "work").resolve())
    assert [path.rpartition("/")[2] for path in environment["py_modules"]] == list(module.PACKAGES)
    assert environment["excludes"] == list(EXCLUDES)
    assert not {"hunter2", str(tmp_path / "token")} & set(str(job).replace("'", " ").split())
    assert "env_vars" not in environment
    assert "ray job logs --follow --address http://head:8265 job-1" in submitted.how_to()


def test_the_packages_are_those_in_use():
    import wattier
    import wattier_gnn
    import wattier_telemetry

    assert packages() == [m.__path__[0] for m in (wattier, wattier_gnn, wattier_telemetry)]


@pytest.mark.parametrize(
    ("details", "code"),
    [
        ([ended("RUNNING", None), ended("SUCCEEDED", 0)], 0),
        ([ended("FAILED", 3)], 3),
        ([ended("FAILED", 2)], 2),
        ([ended("FAILED", -9)], 1),
        ([ended("FAILED", None)], 1),
        ([ended("STOPPED", None)], 1),
        ([OSError("a gap"), ended("RUNNING", None), OSError("another"), ended("FAILED", 3)], 3),
    ],
)
def test_the_exit_code_is_that_of_the_run(details, code):
    submitted = Submitted(Client(*details), "job-1", "http://head:8265")
    assert submitted.wait() == code


def test_a_cluster_that_is_gone_is_given_up(monkeypatch):
    monkeypatch.setattr(module, "LOST_SECONDS", 0.05)
    with pytest.raises(UserError, match="answers no more"):
        Submitted(Client(OSError("refused")), "job-1", "http://head:8265").wait()
