"""Every node that runs trials has an exporter, outside of them: it sees them live, die, and what they cost."""

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from wattier.config import RunConfig
from wattier.launch import InlineLauncher
from wattier.node_exporters import ExporterPlan, NodeExporters, Outcome
from wattier.rundir import RunDir

sys.path.append(str(Path(__file__).parent))  # trials run in other processes, which import their function by its name

import tabular
from stage_on_ray import run_only

HERE = Path(__file__).parent
HOST = socket.gethostname()
WATTS, UUID = 100.0, "GPU-of-the-test"
LIVING = {"n_layers": 1}
EPOCHS = 60  # of 0.03 s each
ENERGY = "wattier_trial_energy_joules_total"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def trace(tmp_path):
    """A GPU that draws a hundred watts for ever."""
    path = tmp_path / "watts, for ever.csv"
    path.write_text(f"time_seconds,device,power_watts\n0,{UUID},{WATTS}\n")
    return path


@pytest.fixture
def make(tmp_path, trace):
    """A run and its config, with an exporter on any free port."""

    def build(*, trials=1, **telemetry):
        config = RunConfig.model_validate(
            {
                "name": "watched",
                "run_dir": str(tmp_path / f"run{len(list(tmp_path.glob('run*')))}"),
                "data": {"sources": {"ani1x": "sample"}},
                "search": {
                    "max_concurrent": 1,
                    "space": {"n_layers": {"choices": [1, tabular.DIES]}, "learning_rate": {"choices": [0.01]}},
                    "stages": [{"name": "only", "trials": trials, "epochs": EPOCHS, "reduction_factor": None}],
                },
                "resources": {"retries": 0},
                "telemetry": {"source": f"replay:{trace}", "exporter": True, "exporter_port": 0, **telemetry},
            }
        )
        return RunDir.create(config), config

    return build


class Scraper:
    """Finds the exporter as Prometheus does, and asks it all the time."""

    def __init__(self, run):
        self.target = run.path / "telemetry" / "targets" / f"{HOST}.json"
        self.pages, self.addresses = [], set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _work(self):
        while not self._stop.wait(0.05):
            try:
                ((address,),) = [entry["targets"] for entry in json.loads(self.target.read_text())]
                with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
                    self.pages.append(answer.read().decode())
                self.addresses.add(address)
            except OSError:
                continue

    def series(self, name):
        """Every sample of a metric: labels and value, in order of time."""
        found = []
        for page in self.pages:
            for line in re.findall(rf"^{name}{{(.*)}} (\S+)$", page, re.MULTILINE):
                found.append((dict(re.findall(r'(\w+)="([^"]*)"', line[0])), float(line[1])))
        return found


class FakeNodes:
    """A cluster in memory: which nodes there are, whose port is taken, and who was started and stopped, in order."""

    def __init__(self, *names):
        self.names, self.taken, self.dead, self.mute = list(names), set(), set(), set()
        self.log = []

    def alive(self):
        return list(self.names)

    def start(self, plan, node):
        self.log.append(f"start {node}")
        self.dead.discard(node)
        return node, "the port is taken" if node in self.taken else None

    def ask(self, handles):
        return {
            node: Outcome(node, None if problem else f"http://{node}", problem)
            for node, (_, problem) in handles.items()
            if node not in self.dead | self.mute
        }

    def stop(self, handles):
        self.log += [f"stop {node}" for node, _ in handles]

    def since(self):
        """What happened since it was last asked."""
        log, self.log = self.log, []
        return log


class TestPolicy:
    @pytest.fixture
    def plan(self, make):
        run, config = make()
        return ExporterPlan.of(run, config.telemetry)

    def test_none_is_started_unless_the_config_asks(self, make):
        run, config = make(exporter=False)
        nodes = FakeNodes("a")
        exporters = NodeExporters(nodes)
        exporters.ensure(ExporterPlan.of(run, config.telemetry))
        exporters.close()
        assert nodes.since() == []

    def test_nodes_that_join_get_one_at_the_next_stage_and_all_are_closed(self, plan):
        nodes = FakeNodes("a", "b")
        exporters = NodeExporters(nodes)
        exporters.ensure(plan)
        assert nodes.since() == ["start a", "start b"]
        nodes.names = ["b", "c"]
        exporters.ensure(plan)
        assert nodes.since() == ["stop a", "start c"]
        exporters.close()
        assert nodes.since() == ["stop b", "stop c"]
        exporters.close()
        assert nodes.since() == []

    def test_a_dead_one_is_replaced(self, plan):
        nodes = FakeNodes("a", "b")
        exporters = NodeExporters(nodes)
        exporters.ensure(plan)
        nodes.since()
        nodes.dead = {"a"}
        exporters.ensure(plan)
        assert nodes.since() == ["stop a", "start a"]

    def test_a_taken_port_is_told_once_and_tried_again_at_the_next_stage(self, plan, caplog):
        nodes = FakeNodes("a", "b")
        nodes.taken = {"a"}
        exporters = NodeExporters(nodes)
        exporters.ensure(plan)
        exporters.ensure(plan)
        assert nodes.since() == ["start a", "start b", "stop a", "start a", "stop a"]
        (note,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert note.startswith("node a: no exporter of this run (the port is taken). The run goes on")
        nodes.taken = set()
        exporters.ensure(plan)
        exporters.ensure(plan)
        assert nodes.since() == ["start a"]

    def test_one_that_does_not_answer_is_closed_with_the_others(self, plan, caplog):
        nodes = FakeNodes("a")
        nodes.mute = {"a"}
        exporters = NodeExporters(nodes)
        exporters.ensure(plan)
        assert "node a: no exporter of this run (it does not answer yet)" in caplog.text
        exporters.close()
        assert nodes.since() == ["start a", "stop a"]

    def test_what_a_killed_run_listed_is_forgotten(self, plan):
        plan.targets.mkdir(parents=True)
        (plan.targets / "gone.json").write_text("[]")
        exporters = NodeExporters(FakeNodes("a"))
        exporters.ensure(plan)
        assert not list(plan.targets.iterdir())
        (plan.targets / "killed-later.json").write_text("[]")
        exporters.close()
        assert not list(plan.targets.iterdir())

    def test_what_a_node_loads_is_light(self):
        script = "import sys, wattier.node_exporters; print({'torch', 'ray', 'pydantic', 'numpy'} & set(sys.modules))"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "set()"


class TestInline:
    @pytest.fixture
    def registry(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WATTIER_REGISTRY", str(tmp_path / "registry"))

    def test_one_serves_in_this_process_while_the_command_lasts(self, make, registry):
        run, _ = make()
        launcher = InlineLauncher()
        with Scraper(run) as scraper:
            (row,) = run_only(run, launcher, tabular.run_registered, [LIVING])
            assert scraper.target.exists(), "it outlives the stage"
        assert row.status == "complete"
        told = [value for labels, value in scraper.series(ENERGY) if labels["trial"] == row.trial_id]
        assert told[-1] > 0
        launcher.close()
        assert not scraper.target.exists()
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("wattier-")]

    def test_a_taken_port_is_a_note_and_no_failure(self, make, registry, caplog):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            run, config = make(exporter_port=taken.getsockname()[1])
            launcher = InlineLauncher()
            (row,) = run_only(run, launcher, tabular.run_raising, [LIVING])
            launcher.close()
        assert row.status == "complete"
        assert (
            f"node {HOST}: no exporter of this run (127.0.0.1:{config.telemetry.exporter_port}: [Errno" in caplog.text
        )
        assert not list((run.path / "telemetry").rglob("targets/*"))


def test_an_exporter_that_two_lists_name_is_one_target(tmp_path):
    """In a real Prometheus: the address of this machine from the shipped file, and from a run's own folder."""
    tool = shutil.which("prometheus")
    if tool is None:
        pytest.skip("prometheus is not installed")
    config = yaml.safe_load((ROOT / "dashboards" / "prometheus.yml").read_text())
    del config["rule_files"]
    (tmp_path / "dashboards").mkdir()
    (tmp_path / "dashboards/prometheus.yml").write_text(yaml.safe_dump(config))
    targets = tmp_path / "runs/quickstart/telemetry/targets"
    targets.mkdir(parents=True)
    for host, address in ((HOST, "127.0.0.1:9500"), ("n2", "n2.example:9500")):
        entry = {"targets": [address], "labels": {"job": "wattier", "node": host}}
        (targets / f"{host}.json").write_text(json.dumps([entry]))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [tool, f"--config.file={tmp_path}/dashboards/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL)
    try:
        assert active_targets(port) == {("localhost:9500", None), ("n2.example:9500", "n2")}
    finally:
        process.kill()
        process.wait()


def active_targets(port, wanted=2):
    """Instance and node of each target that Prometheus scrapes, once it has seen as many as wanted."""
    found, deadline = [], time.monotonic() + 90
    while len(found) < wanted and time.monotonic() < deadline:
        time.sleep(0.2)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/targets", timeout=5) as answer:
                found = [target["labels"] for target in json.load(answer)["data"]["activeTargets"]]
        except OSError:
            continue
    assert len(found) == wanted
    return {(labels["instance"], labels.get("node")) for labels in found}


class TestOnRay:
    @pytest.fixture
    def process(self, tmp_path):
        """Start `stage_on_ray.py`; the environment knows no registry, and an amdsmi without AMD's library."""
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "amdsmi.py").write_text("raise KeyError('libamd_smi.so')")
        names = {"WATTIER_REGISTRY", "WATTIER_POWER_SOURCE"}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k not in names}
        environment |= {"HOME": str(tmp_path), "PYTHONPATH": f"{HERE}:{broken}"}
        started = []

        def start(*arguments):
            command = [sys.executable, str(HERE / "stage_on_ray.py"), *map(str, arguments)]
            process = subprocess.Popen(
                command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            started.append(process)
            return process

        yield start
        for process in started:
            process.kill()
            process.communicate()

    def test_a_killed_trial_is_seen_and_billed_to_its_end(self, make, tmp_path, process):
        quiet, _ = make(exporter=False)
        run, _ = make(trials=2)
        registry = tmp_path / "registry"
        stale = run.path / "telemetry" / "targets" / "gone.json"
        stale.parent.mkdir(parents=True)
        stale.write_text('[{"targets": ["gone:9500"]}]')
        with Scraper(run) as scraper:
            child = process(quiet.path, run.path, registry)
            assert "done\n" in iter(child.stdout.readline, ""), "Ray, too, has things to say"
            assert [path.name for path in scraper.target.parent.iterdir()] == [f"{HOST}.json"]
            time.sleep(0.3)
        assert not (quiet.path / "telemetry").exists()
        assert registry.is_dir(), "the cluster's processes use the command's registry"
        assert not list(registry.glob("*.json")), "those who are gone are not listed"
        rows = {row.trial_id: row for row in run.trials("only")}
        assert {name: row.status for name, row in rows.items()} == {"only-000": "failed", "only-001": "complete"}
        check_trials_are_shown(scraper, rows)
        check_joules(scraper, run, rows)

        child.communicate("")
        assert child.returncode == 0
        assert not list(scraper.target.parent.iterdir())
        (address,) = scraper.addresses
        host, port = address.split(":")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)), timeout=5)
        assert (run.path / "telemetry" / HOST / "sampler.json").exists(), "joules survive a restart"


def check_trials_are_shown(scraper, names):
    """Each trial was there, on the device that the exporter measures."""
    for name in names:
        mine = [labels for labels, _ in scraper.series("wattier_trial_info") if labels["trial"] == name]
        assert mine
        assert {(row["run"], row["stage"], row["uuid"]) for row in mine} == {("watched", "only", UUID)}
    assert {labels["uuid"] for labels, _ in scraper.series("wattier_power_watts")} == {UUID}


def check_joules(scraper, run, rows):
    """The exporter's figure and the bill are each trial's true energy to within a sampling period, here even a half."""
    fraction = 1 / os.cpu_count()
    period_joules = 1.0 * WATTS * fraction
    for name, row in rows.items():
        witness = json.loads((run.trial_folder("only", name) / "witness.json").read_text())
        truth = WATTS * fraction * (witness["ended"] - witness["began"])
        told = [value for labels, value in scraper.series(ENERGY) if labels["trial"] == name]
        assert told == sorted(told)
        assert truth > 1.5 * period_joules
        assert told[-1] == pytest.approx(truth, abs=period_joules / 2)
        assert row.energy_joules == pytest.approx(truth, abs=period_joules)
