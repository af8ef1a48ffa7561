"""What is committed is what the source makes, and it passes our own lint."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from typing import ClassVar

import pytest
import yaml
from asked import FOLDER, NAMES, board, may_be_empty, panels, plain

promql_parser = pytest.importorskip("promql_parser", reason="the extra [dev] is not installed")
pytest.importorskip("grafana_foundation_sdk", reason="the extra [dashboards] is not installed")

JOULES_GUESSED = r"\b(increase|i?rate|i?delta|deriv)\s*\([^)]*joules"
ENERGY_JOINED = r"joules[^)]*\)?\s*\*\s*on|group_left[^)]*\)\s*[^)]*joules"


def _rules():
    groups = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


class TestDrift:
    def test_committed_json_is_what_the_source_makes(self):
        command = [sys.executable, str(FOLDER / "build.py"), "--check"]
        answer = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        assert (answer.returncode, answer.stderr) == (0, "")

    def test_check_names_the_file_that_drifted(self, tmp_path):
        for name in ("json", "boards"):
            shutil.copytree(FOLDER / name, tmp_path / name)
        shutil.copy(FOLDER / "build.py", tmp_path)
        path = tmp_path / "json" / "fleet.json"
        path.write_text(path.read_text().replace("watt", "horsepower"))
        (tmp_path / "json" / "orphan.json").write_text("{}")
        command = [sys.executable, str(tmp_path / "build.py")]
        answer = subprocess.run([*command, "--check"], check=False, capture_output=True, text=True, timeout=60)
        assert answer.returncode == 1
        assert [line.split(":")[0] for line in answer.stderr.splitlines()] == ["fleet.json", "orphan.json"]
        assert subprocess.run(command, check=False, timeout=60).returncode == 0
        assert path.read_bytes() == (FOLDER / "json" / "fleet.json").read_bytes()

    def test_the_grafana_is_the_one_that_is_pinned(self):
        pinned = re.search(r"grafana_foundation_sdk==\d+!(\S+)", (FOLDER.parent / "constraints.txt").read_text())[1]
        images = re.findall(r"grafana/grafana:(\S+)", (FOLDER / "compose.yaml").read_text())
        assert images == [pinned]
        assert f"Grafana {pinned.rpartition('.')[0]}" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
class TestLint:
    def test_dashboard(self, name):
        text = (FOLDER / "json" / f"{name}.json").read_text()
        found = json.loads(text)
        assert found["uid"] == f"wattier-{name}"
        assert found["title"] and found["description"]
        variables = found["templating"]["list"]
        assert variables[0]["name"] == "datasource" and variables[0]["type"] == "datasource"
        for variable in variables[1:]:
            assert variable["type"] == "query" and variable["datasource"]["uid"] == "${datasource}"
        names = {variable["name"] for variable in variables}
        used = set(re.findall(r"\$\{?([a-z][a-z_]*)\b", text)) - {"datasource"}
        assert {name for name in used if not name.startswith("__")} <= names
        assert not re.search(r"localhost|127\.0\.0\.1|https?://|node[01]\b", text)

    def test_panels(self, name):
        everything = board(name)["panels"]
        ids = [panel["id"] for panel in everything]
        titles = [panel["title"] for panel in everything]
        assert len(set(ids)) == len(ids) and all(ids)
        assert len(set(titles)) == len(titles) and all(titles)
        for panel in panels(name):
            assert panel["description"].endswith("."), panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            for thing in (panel, *panel["targets"]):
                assert thing["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
            references = [target["refId"] for target in panel["targets"]]
            assert references and len(set(references)) == len(references), panel["title"]

    def test_axes_and_legends(self, name):
        for panel in panels(name):
            custom = panel["fieldConfig"]["defaults"].get("custom", {})
            if panel["type"] == "timeseries":
                assert custom["axisLabel"], panel["title"]
                legend = panel["options"]["legend"]
                assert legend["displayMode"] == "table" and legend["sortBy"] == "Last *", panel["title"]
            if panel["type"] == "xychart":
                labels = [p for o in panel["fieldConfig"]["overrides"] for p in o["properties"]]
                assert sum(one["id"] == "custom.axisLabel" for one in labels) == 2, panel["title"]

    def test_panels_do_not_overlap(self, name):
        cells = [
            (x, y)
            for grid in (panel["gridPos"] for panel in board(name)["panels"])
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        ]
        assert len(set(cells)) == len(cells)
        assert max(x for x, _ in cells) < 24

    def test_queries(self, name):
        for panel in panels(name):
            for target in panel["targets"]:
                expr = plain(target["expr"], 300)
                assert "$" not in expr.replace('"$1"', ""), panel["title"]  # of label_replace
                promql_parser.parse(expr)
                # Joules are a counter's last value: increase() of a true 1,200 J gives 1,500.
                assert not re.search(JOULES_GUESSED, expr), panel["title"]
                # Trials may share a device: its energy joined on uuid would count once for each of them.
                assert not re.search(ENERGY_JOINED, expr), panel["title"]

    def test_links(self, name):
        for panel in panels(name):  # a row of a table has fields, a series has labels
            text = json.dumps(panel["fieldConfig"]["defaults"].get("links", []))
            assert ("__field.labels" if panel["type"] in {"table", "xychart"} else "__data.fields") not in text
        links = [link["url"] for panel in panels(name) for link in panel["fieldConfig"]["defaults"].get("links", [])]
        assert links
        for url in links:
            target = re.match(r"/d/([\w-]+)\?|\$\{(report|ray_dashboard)\}", url)
            assert target, url
            if target[1]:
                assert target[1].removeprefix("wattier-") in NAMES
                chosen = set(re.findall(r"var-(\w+)=", url))
                there = board(target[1].removeprefix("wattier-"))["templating"]["list"]
                assert chosen <= {variable["name"] for variable in there}, url


class TestAsked:
    """What operators ask, and where the answer stands: a panel that goes missing is noticed."""

    WANTED: ClassVar = {
        "campaign": {"Trials by stage and status": "timeseries", "Loss against energy": "xychart",
                     "Energy spent": "stat", "The same in kWh": "stat", "Energy against budget": "timeseries",
                     "Best loss by stage": "timeseries", "Hypervolume by stage": "timeseries",
                     "Structures per second": "timeseries", "Structures per joule": "timeseries",
                     "Failures by reason": "bargauge", "Expected end": "stat"},
        "trial": {"Loss by epoch": "xychart", "Device power": "timeseries", "Device memory (HBM)": "timeseries",
                  "Utilisation": "timeseries", "Temperature": "timeseries", "Clocks": "timeseries",
                  "Energy so far": "stat", "Throttling by reason": "state-timeline", "Ranks": "stat", "Nodes": "stat"},
        "fleet": {"Power of all GPUs": "heatmap", "Largest device memory (HBM) over all GPUs": "timeseries",
                  "Temperature of all GPUs": "timeseries", "Compute clock of all GPUs": "timeseries",
                  "Throttling by GPU and reason": "state-timeline", "Memory errors": "timeseries",
                  "Idle watts wasted now": "stat", "Stragglers": "timeseries", "Exporters down": "stat",
                  "Power by package": "timeseries", "Power by GPU": "timeseries"},
        "models": {"Power by size": "timeseries", "Joules per structure": "bargauge"},
    }  # fmt: skip

    @pytest.mark.parametrize("name", NAMES)
    def test_is_there(self, name):
        found = {panel["title"]: panel["type"] for panel in panels(name)}
        assert self.WANTED[name].items() <= found.items()
        names = {variable["name"] for variable in board(name)["templating"]["list"]}
        assert names >= {"campaign": {"run", "stage"}, "trial": {"run", "stage", "trial"}, "fleet": {"host"},
                         "models": {"run", "stage"}}[name]  # fmt: skip

    def test_what_is_of_the_whole_fleet_reads_recording_rules(self):
        """At 68,480 GPUs nobody may ask for a series of each: only `topk` of chosen hosts, and sums over them, do."""
        recorded = {rule["record"] for rule in _rules() if "record" in rule}
        found = board("fleet")["panels"]
        begin = next(i for i, panel in enumerate(found) if panel["title"] == "All GPUs")
        whole = []
        for panel in found[begin + 1 :]:
            if panel["type"] == "row":
                break
            whole.append(panel)
        assert len(whole) == 5
        for panel in whole:
            for target in panel["targets"]:
                names = set(re.findall(r"\bwattier[\w:]*", target["expr"]))
                assert names and names <= recorded, panel["title"]

    def test_most_panels_must_have_data(self):
        everything = [panel for name in NAMES for panel in panels(name)]
        assert sum(map(may_be_empty, everything)) < len(everything) / 3


class TestRules:
    def test_parse(self):
        for rule in _rules():
            promql_parser.parse(rule["expr"])
            assert not re.search(JOULES_GUESSED, rule["expr"]), rule
            assert not re.search(ENERGY_JOINED, rule["expr"]), rule

    def test_every_rule_that_is_asked_for_is_there(self):
        recorded = {rule["record"] for rule in _rules() if "record" in rule}
        texts = [(FOLDER / "json" / f"{name}.json").read_text() for name in NAMES]
        texts += [rule["expr"] for rule in _rules()]
        assert set(re.findall(r"\bwattier:[\w:]+", " ".join(texts))) == recorded

    def test_every_metric_that_is_asked_for_is_exported(self):
        from wattier_telemetry.exporter.campaigns import CAMPAIGN
        from wattier_telemetry.exporter.metrics import METRICS

        exported = {metric.name for metric in (*METRICS, *CAMPAIGN)}
        texts = [target["expr"] for name in NAMES for panel in panels(name) for target in panel["targets"]]
        texts += [rule["expr"] for rule in _rules()]
        assert set(re.findall(r"\bwattier_\w+", " ".join(texts))) <= exported

    @pytest.mark.parametrize(
        "arguments",
        [("check", "config", "prometheus.yml"), ("check", "rules", "rules.yml"), ("test", "rules", "rules_test.yml")],
    )
    def test_promtool(self, promtool, arguments):
        *words, name = arguments
        command = [promtool, *words, str(FOLDER / name)]
        answer = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
        assert answer.returncode == 0, answer.stdout + answer.stderr

    def test_every_alert_has_a_unit_test(self):
        text = (FOLDER / "rules_test.yml").read_text()
        alerts = {rule["alert"] for rule in _rules() if "alert" in rule}
        wanted = (
            "ExporterDown GpuLost GpuMissing Throttled BudgetNearlySpent BudgetSpent TrialStalled CounterImplausible"
        )
        assert alerts >= {f"Wattier{name}" for name in (*wanted.split(), "CounterImplausible")}
        assert {alert for alert in alerts if alert not in text} == set()

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ('up{job="wattier"} == 0\n        for: 1m', 'up{job="wattier"} == 0\n        for: 1s'),
            ("wattier:trial_utilization_ratio:max < 0.05", "wattier:trial_utilization_ratio:max < 0.001"),
            ("- 1\n          ) > 0.2", "- 1\n          ) > 0.6"),
            ("max by (run, stage, trial, rank, uuid) (", "("),
        ],
    )
    def test_a_rule_that_is_wrong_fails_its_unit_test(self, promtool, tmp_path, old, new):
        text = (FOLDER / "rules.yml").read_text()
        assert text.count(old) == 1
        (tmp_path / "rules.yml").write_text(text.replace(old, new))
        shutil.copy(FOLDER / "rules_test.yml", tmp_path)
        command = [promtool, "test", "rules", str(tmp_path / "rules_test.yml")]
        assert subprocess.run(command, check=False, capture_output=True, timeout=120).returncode != 0


class TestCompose:
    def test_is_pinned_and_local(self):
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

    def test_the_exporter_has_all_that_the_telemetry_needs(self):
        project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
        needed = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in project["dependencies"]}
        services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
        line = re.search(r"pip install (.+)", services["exporter"]["build"]["dockerfile_inline"])[1]
        pinned = {word.replace("-", "_") for word in line.split() if "==" in word}
        assert {word.partition("==")[0] for word in pinned} == needed
        tried = (FOLDER.parent / "constraints.txt").read_text().replace("-", "_").splitlines()
        assert pinned <= set(tried)

    def test_docker_compose_reads_it(self):
        """Where there is one of version 2, which knows `dockerfile_inline`. The schema is held to in any case."""
        for command in (["docker", "compose"], ["docker-compose"]):
            if shutil.which(command[0]) is None:
                continue
            version = subprocess.run([*command, "version", "--short"], check=False, capture_output=True, text=True)
            if not re.match(r"v?[2-9]\.", version.stdout):
                continue
            whole = [*command, "-f", str(FOLDER / "compose.yaml"), "config"]
            answer = subprocess.run(whole, check=False, capture_output=True, text=True, timeout=60)
            assert answer.returncode == 0, answer.stderr
            assert {"exporter", "prometheus", "grafana"} <= set(yaml.safe_load(answer.stdout)["services"])
        _hold_to_schema(yaml.safe_load((FOLDER / "compose.yaml").read_text()))

    @pytest.mark.parametrize("fault", [{"port": []}, {"depends_on": "nobody"}, {"volumes": [3]}, {"image": 1}])
    def test_the_schema_refuses_what_compose_would(self, fault):
        config = yaml.safe_load((FOLDER / "compose.yaml").read_text())
        config["services"]["grafana"] |= fault
        with pytest.raises(AssertionError):
            _hold_to_schema(config)

    def test_grafana_finds_its_dashboards_and_its_datasource(self):
        provider = yaml.safe_load((FOLDER / "provisioning" / "dashboards" / "wattier.yaml").read_text())["providers"][0]
        volumes = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["grafana"]["volumes"]
        assert f"./json:{provider['options']['path']}:ro" in volumes
        sources = yaml.safe_load((FOLDER / "provisioning" / "datasources" / "prometheus.yaml").read_text())
        assert [source["type"] for source in sources["datasources"]] == ["prometheus"]


_TEXTS = {"type": "array", "items": {"type": "string"}}
_TEXT_OR_TEXTS = {"anyOf": [{"type": "string"}, _TEXTS]}
_SERVICE = {  # of https://github.com/compose-spec/compose-spec, what is used here
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "build": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"context": {"type": "string"}, "dockerfile_inline": {"type": "string"}},
        },
        "command": _TEXT_OR_TEXTS,
        "depends_on": _TEXTS,
        "environment": {"type": "object", "additionalProperties": {"type": ["string", "number", "null"]}},
        "image": {"type": "string"},
        "init": {"type": "boolean"},
        "network_mode": {"type": "string"},
        "ports": _TEXTS,
        "volumes": _TEXTS,
    },
    "anyOf": [{"required": ["image"]}, {"required": ["build"]}],
}
_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["services"],
    "properties": {
        "name": {"type": "string"},
        "services": {"type": "object", "additionalProperties": _SERVICE},
    },
}


def _hold_to_schema(config):
    import jsonschema

    problems = [error.message for error in jsonschema.Draft202012Validator(_SCHEMA).iter_errors(config)]
    assert problems == []
    for service in config["services"].values():
        needed = {*service.get("depends_on", ()), *re.findall(r"^service:(.+)$", service.get("network_mode", ""))}
        assert needed <= set(config["services"])


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Ray's dashboards, from a process of its own: importing Ray takes seconds, and warns."""
    script = (
        "import json, sys\nfrom pathlib import Path\nfrom wattier.broken_amdsmi import hidden\n"
        "with hidden(Path(sys.argv[1])):\n"
        "    import ray.dashboard.modules.metrics.grafana_dashboard_factory as factory\n"
        "names = [n for n in dir(factory) if n.startswith('generate_') and n.endswith('dashboard')]\n"
        "json.dump([json.loads(getattr(factory, name)()[0]) for name in names], sys.stdout)"
    )
    command = [sys.executable, "-c", script, str(tmp_path_factory.mktemp("ray") / "hidden")]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)


class TestBesideRay:
    """Ray 2.60 makes dashboards of its own, for the same Grafana and the same Prometheus."""

    def test_nothing_clashes(self, theirs):
        ours = [board(name) for name in NAMES]
        assert len(theirs) >= 5
        for field in ("uid", "title"):
            assert not {one[field] for one in ours} & {one[field] for one in theirs}
        asked = set(re.findall(r"\bray_\w+", json.dumps(theirs)))
        assert len(asked) > 50 and not any("wattier" in name for name in re.findall(r"\b[a-z_:]+", json.dumps(theirs)))
        recorded = {rule.get("record", rule.get("alert")) for rule in _rules()}
        assert all(name.startswith(("wattier:", "Wattier")) for name in recorded)

    def test_ray_lists_its_targets_where_prometheus_looks(self):
        jobs = {
            job["job_name"]: job for job in yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
        }
        assert set(jobs) == {"wattier", "ray"}
        assert jobs["ray"]["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
        assert "relabel_configs" not in jobs["ray"] and "metric_relabel_configs" not in jobs["ray"]


@pytest.mark.parametrize("length", ["0", "-5", "nan", "inf", "long"])
def test_a_demonstration_of_no_length_is_refused_in_words(length):
    command = [sys.executable, str(FOLDER / "demo.py"), f"--seconds={length}"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 2
    assert "--seconds" in told.stderr and "Traceback" not in told.stderr
