"""The dashboards: what is committed is what the source makes, and every query runs on a real Prometheus."""

import contextlib
import csv
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

from wattier_telemetry import Device, Reading, TrialRegistration, open_source
from wattier_telemetry.exporter import serve
from wattier_telemetry.source import PowerSource

promql_parser = pytest.importorskip("promql_parser", reason="the extra [dev] is not installed")
pytest.importorskip("grafana_foundation_sdk", reason="the extra [dashboards] is not installed")

FOLDER = Path(__file__).parents[2] / "dashboards"
NAMES = ("campaign", "fleet")
MACROS = {"$__range": "5m", "$__rate_interval": "1m", "$__interval": "15s"}
WATTS = {"replayed-0": 410.0, "replayed-1": 95.5}
JOULES = {"t1": 1200.0, "t2": 345.0}
START_SECONDS = 90


def _load(path):
    spec = importlib.util.spec_from_file_location(f"dashboards_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _panels(name):
    return json.loads((FOLDER / "json" / f"{name}.json").read_text())["panels"]


def _expressions(name):
    return [(panel, target) for panel in _panels(name) for target in panel["targets"]]


def _plain(expr, variable=".*"):
    """The expression as Grafana sends it."""
    for macro, value in MACROS.items():
        expr = expr.replace(macro, value)
    return re.sub(r"\$(run|instance)\b", lambda _: variable, expr)


class TestSource:
    def test_committed_json_is_what_the_source_makes(self):
        build = _load(FOLDER / "build.py")
        assert build.drifted(FOLDER / "json") == []
        assert build.texts() == build.texts()

    def test_check_names_the_file_that_drifted(self, tmp_path):
        shutil.copytree(FOLDER / "json", tmp_path / "json")
        shutil.copy(FOLDER / "build.py", tmp_path)
        command = [sys.executable, str(tmp_path / "build.py"), "--check"]
        assert subprocess.run(command, check=False).returncode == 0
        path = tmp_path / "json" / "fleet.json"
        path.write_text(path.read_text().replace("watt", "horsepower"))
        (tmp_path / "json" / "orphan.json").write_text("{}")
        answer = subprocess.run(command, check=False, capture_output=True, text=True)
        assert answer.returncode == 1
        assert [line.split(":")[0] for line in answer.stderr.splitlines()] == ["fleet.json", "orphan.json"]


@pytest.mark.parametrize("name", NAMES)
class TestLint:
    def test_dashboard(self, name):
        text = (FOLDER / "json" / f"{name}.json").read_text()
        board = json.loads(text)
        assert board["uid"] == f"wattier-{name}"
        assert board["title"] and board["description"]
        kinds = {variable["name"]: variable["type"] for variable in board["templating"]["list"]}
        assert kinds.pop("datasource") == "datasource"
        assert set(kinds.values()) == {"query"}
        assert not re.search(r"localhost|127\.0\.0\.1|https?://", text)

    def test_panels(self, name):
        panels = _panels(name)
        ids = [panel["id"] for panel in panels]
        titles = [panel["title"] for panel in panels]
        assert len(set(ids)) == len(ids) and all(ids)
        assert len(set(titles)) == len(titles)
        for panel in panels:
            assert panel["title"] and panel["description"].endswith("."), panel["id"]
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            for thing in (panel, *panel["targets"]):
                assert thing["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
            references = [target["refId"] for target in panel["targets"]]
            assert references and len(set(references)) == len(references), panel["title"]

    def test_panels_do_not_overlap(self, name):
        cells = [
            (x, y)
            for grid in (panel["gridPos"] for panel in _panels(name))
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        ]
        assert len(set(cells)) == len(cells)
        assert max(x for x, _ in cells) < 24

    def test_queries(self, name):
        for panel, target in _expressions(name):
            plain = _plain(target["expr"])
            assert "$" not in plain, panel["title"]
            promql_parser.parse(plain)
            # Joules are a counter's last value: increase() of a true 1,200 J gives 1,500.
            assert not re.search(r"\b(increase|i?rate|i?delta|deriv)\s*\([^)]*joules", plain), panel["title"]
            # Trials may share a device: a join on uuid alone would count the device once per trial.
            assert "group_left" not in plain, panel["title"]


class TestReplay:
    def test_loop_is_a_trace_around_now(self, tmp_path):
        path = tmp_path / "now.csv"
        now = time.time()
        lines = _load(FOLDER / "replay" / "loop.py").looped(FOLDER / "replay" / "demo.csv", now, seconds=300)
        path.write_text("\n".join(lines))
        source = open_source(f"replay:{path}")
        with (FOLDER / "replay" / "demo.csv").open() as file:
            first = {row["device"]: float(row["power_watts"]) for row in reversed(list(csv.DictReader(file)))}
        assert {device.uuid for device in source.devices()} == set(first)
        times = [float(line.split(",")[0]) for line in path.read_text().splitlines()[1:]]
        assert times[0] == pytest.approx(now, abs=0.01)
        assert times[-1] - times[0] >= 300

    def test_compose_is_pinned_and_local(self):
        services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
        images = [service["image"] for service in services.values() if "image" in service]
        images += re.findall(r"^FROM (.+)$", services["exporter"]["build"]["dockerfile_inline"], re.MULTILINE)
        assert len(images) == 3
        for image in images:
            assert re.search(r":v?\d+\.\d+\.\d+", image), image
            assert "." not in image.split("/")[0].split(":")[0], image
        ports = [port for service in services.values() for port in service.get("ports", [])]
        assert ports and all(port.startswith("127.0.0.1:") for port in ports)
        for service in services.values():
            for volume in service["volumes"]:
                assert (FOLDER / volume.split(":")[0]).exists(), volume


# --- a real Prometheus -------------------------------------------------------------------------------------------


def _tool(name):
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian: apt-get install --no-install-recommends prometheus)")
    return path


@pytest.fixture(scope="module")
def promtool():
    return _tool("promtool")


class TestPromtool:
    @pytest.mark.parametrize("arguments", [("config", "prometheus.yml"), ("rules", "rules.yml")])
    def test_check(self, promtool, arguments):
        kind, name = arguments
        command = [promtool, "check", kind, str(FOLDER / name)]
        answer = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        assert answer.returncode == 0, answer.stdout + answer.stderr

    def test_throttled_alert(self, promtool, tmp_path):
        """A reason's series exists only while it acts: 1 minute of 5 fires, though each series alone averages 1."""
        series = 'wattier_throttled{instance="n", uuid="u", device="d", reason='
        tests = {
            "rule_files": [str(FOLDER / "rules.yml")],
            "evaluation_interval": "15s",
            "tests": [
                {
                    "interval": "15s",
                    "input_series": [
                        {"series": f'{series}"none"}}', "values": "0x19 stale stale stale stale 0x20"},
                        {"series": f'{series}"power_cap"}}', "values": "_x20 1x3 stale _x20"},
                    ],
                    "promql_expr_test": [
                        {
                            "expr": "avg_over_time(wattier:throttled:any[5m]) > bool 0.1",
                            "eval_time": eval_time,
                            "exp_samples": [{"labels": '{instance="n", uuid="u", device="d"}', "value": value}],
                        }
                        for eval_time, value in (("4m", 0), ("6m30s", 1), ("11m", 0))
                    ],
                }
            ],
        }
        path = tmp_path / "tests.yml"
        path.write_text(yaml.safe_dump(tests))
        command = [promtool, "test", "rules", str(path)]
        answer = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        assert answer.returncode == 0, answer.stdout + answer.stderr


class FullSource(PowerSource):
    """One device that knows everything and is throttled, and one that always fails."""

    name = "full"

    def devices(self):
        return Device("full-0", "Full", "gpu", 0), Device("broken-0", "Broken", "gpu", 1)

    def read(self, device):
        if device.uuid == "broken-0":
            raise OSError("lost")
        return Reading(
            time_seconds=time.time(),
            power_watts=300.0,
            energy_joules=1e6,
            utilization_ratio=0.9,
            memory_used_bytes=60e9,
            memory_total_bytes=80e9,
            temperature_celsius=61.0,
            clock_hertz=1.7e9,
            memory_clock_hertz=2.6e9,
            throttle_reasons=("power_cap",),
        )

    def close(self):
        pass


class Server:
    """A Prometheus that answers."""

    def __init__(self, url):
        self.url = url

    def get(self, path, **parameters):
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}{path}?{query}", timeout=10) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            body = error.read()
            error.close()
        return json.loads(body)

    def ask(self, expr):
        """The answer to an instant query, at the server's now."""
        answer = self.get("/api/v1/query", query=expr)
        assert answer["status"] == "success", (expr, answer)
        return answer["data"]["result"]

    def has(self, expr, series=1):
        """The same, once so many series are there: one that a busy machine answered late is gone until the next."""
        deadline = time.monotonic() + START_SECONDS
        while len(found := self.ask(expr)) < series and time.monotonic() < deadline:
            time.sleep(0.2)
        return found


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _replay_file(folder):
    path = folder / "trace.csv"
    lines = [f"0,{uuid},{watts}" for uuid, watts in WATTS.items()]
    path.write_text("\n".join(["time_seconds,device,power_watts", *lines]))
    return path


def _register(folder, pids):
    """Two trials of two ranks; both ranks share a device, as trials do."""
    for (trial, joules), pid, uuid in zip(JOULES.items(), pids, WATTS, strict=True):
        for rank in (0, 1):
            TrialRegistration(
                run="night",
                stage="scout",
                trial=trial,
                rank=rank,
                pid=pid,
                device_uuids=(uuid,),
                epoch=3,
                val_loss=0.5,
                structures_per_second=100.0,
                energy_joules=joules / 2,
                method="counter",
            ).write(folder)


def _configure(folder, targets):
    """The shipped configuration, faster, with other targets."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": targets}]
    shutil.copy(FOLDER / "rules.yml", folder)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))


@contextlib.contextmanager
def _prometheus(folder):
    port = _free_port()
    command = [
        _tool("prometheus"),
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        yield Server(f"http://127.0.0.1:{port}"), process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for_data(server, process, folder):
    """Until all exporters were scraped twice and the rules have run on them."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        with contextlib.suppress(OSError, ValueError):
            if len(server.ask("wattier:power_watts:sum")) == 2 and server.ask("wattier:throttled:any"):
                return
        time.sleep(0.2)
    pytest.fail("Prometheus has no data: " + (folder / "prometheus.log").read_text())


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """(server, instance of the replay): Prometheus, an exporter process that replays, and one of all metrics."""
    _tool("prometheus")
    folder = tmp_path_factory.mktemp("live")
    with contextlib.ExitStack() as stack:
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        stack.callback(sleeper.wait)
        stack.callback(sleeper.kill)
        _register(folder / "registry", (os.getpid(), sleeper.pid))
        listed = folder / "exporter.json"
        command = [sys.executable, "-m", "wattier_telemetry.cli", "serve", "--port", "0", "--discovery", str(listed)]
        command += ["--source", f"replay:{_replay_file(folder)}", "--registry", str(folder / "registry")]
        exporter = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        stack.callback(exporter.wait)
        stack.callback(exporter.terminate)
        full = serve(FullSource(), port=0, registry_folder=folder / "nobody")
        stack.callback(full.close)
        deadline = time.monotonic() + START_SECONDS
        while not listed.exists():
            assert exporter.poll() is None
            assert time.monotonic() < deadline, "the exporter does not start"
            time.sleep(0.05)
        replay = json.loads(listed.read_text())[0]["targets"][0].replace("127.0.0.1", "localhost")
        _configure(folder, [replay, f"localhost:{full.port}"])
        server, process = stack.enter_context(_prometheus(folder))
        _wait_for_data(server, process, folder)
        yield server, replay


class TestLive:
    @pytest.mark.parametrize("name", NAMES)
    def test_every_query_answers_with_data(self, live, name):
        server, _ = live
        now = time.time()
        for panel, target in _expressions(name):
            expr = _plain(target["expr"])
            assert server.has(expr), f"{panel['title']}: no data"
            if target["range"]:
                answer = server.get("/api/v1/query_range", query=expr, start=now - 10, end=now, step=1)
                assert answer["status"] == "success", (panel["title"], answer)
                assert answer["data"]["result"], panel["title"]

    def test_legends_name_labels_that_exist(self, live):
        server, _ = live
        for name in NAMES:
            for panel, target in _expressions(name):
                labels = re.findall(r"{{(\w+)}}", target["legendFormat"])
                for series in server.ask(_plain(target["expr"])):
                    assert set(labels) <= set(series["metric"]), panel["title"]

    def test_variables_find_their_values(self, live):
        server, replay = live
        found = {}
        for name in NAMES:
            board = json.loads((FOLDER / "json" / f"{name}.json").read_text())
            for variable in board["templating"]["list"]:
                if variable["type"] == "query":
                    metric, label = re.match(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
                    answer = server.get(f"/api/v1/label/{label}/values", **{"match[]": metric})
                    found[variable["name"]] = answer["data"]
        assert found["run"] == ["night"]
        assert replay in found["instance"]

    def _panel(self, live, name, title, variable=".*", series=1):
        (target,) = [target for panel, target in _expressions(name) if panel["title"] == title]
        return live[0].has(_plain(target["expr"], variable), series)

    def test_power_is_the_replays(self, live):
        series = self._panel(live, "fleet", "Power by device", re.escape(live[1]).replace("\\", "\\\\"), series=2)
        watts = {one["metric"]["uuid"]: float(one["value"][1]) for one in series}
        assert watts == pytest.approx(WATTS, rel=0.01)
        (total,) = self._panel(live, "fleet", "Power", re.escape(live[1]).replace("\\", "\\\\"))
        assert float(total["value"][1]) == pytest.approx(sum(WATTS.values()), rel=0.01)

    def test_energy_is_each_trials_own(self, live):
        series = self._panel(live, "campaign", "Energy by trial", series=2)
        assert {one["metric"]["trial"]: float(one["value"][1]) for one in series} == JOULES
        (total,) = self._panel(live, "campaign", "Trial energy")
        assert float(total["value"][1]) == sum(JOULES.values())

    def test_trials_are_counted_once(self, live):
        (count,) = self._panel(live, "campaign", "Trials running")
        assert count["value"][1] == "2"
        (stage,) = self._panel(live, "campaign", "Running trials by stage")
        assert (stage["metric"], stage["value"][1]) == ({"run": "night", "stage": "scout"}, "2")

    def test_trouble_is_seen(self, live):
        series = self._panel(live, "fleet", "Throttled by reason")
        assert [one["metric"]["reason"] for one in series] == ["power_cap"]
        series = self._panel(live, "fleet", "Read errors by device", series=4)
        errors = {one["metric"]["uuid"]: float(one["value"][1]) for one in series}
        assert errors["broken-0"] > 0
        assert errors["full-0"] == errors["replayed-0"] == 0
        deadline = time.monotonic() + START_SECONDS
        alerts = self._alerts(live)
        while alerts["WattierThrottled"]["state"] != "firing" and time.monotonic() < deadline:
            time.sleep(0.2)
            alerts = self._alerts(live)
        assert all(rule["health"] == "ok" for rule in self._rules(live))
        assert alerts["WattierExporterDown"]["state"] == "inactive"
        assert alerts["WattierThrottled"]["state"] == "firing"

    def _alerts(self, live):
        return {rule["name"]: rule for rule in self._rules(live) if rule["type"] == "alerting"}

    def _rules(self, live):
        (group,) = live[0].get("/api/v1/rules")["data"]["groups"]
        return group["rules"]
