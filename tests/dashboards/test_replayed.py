"""A campaign whose truth is known, scraped by a real Prometheus and passed on to VictoriaMetrics: every query runs.

3 stages, 12 trials, 16 GPUs of two hosts, throttling and a lost GPU. What a panel shows is held against closed forms.
"""

import contextlib
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import yaml
from asked import FOLDER, NAMES, Database, may_be_empty, panels, plain, tool

from demo import NO_PROMETHEUS, demo
from replay.standing import BUDGET_SHARE, dominated_area, mine, total_joules
from replay.world import GPU, GPUS, HOT, IDLE, LOST, STAGES, TRIALS, World
from wattier.ports import free_port

SECONDS = 75  # of the campaign
LATE_SECONDS = 0.2  # in which a busy machine's exporter may see that a trial came or went
BUSY = 0.80  # share of it at which all that runs in its last stage does
CHOSEN = {
    "campaign": {"run": "replayed"},
    "trial": {"run": "replayed", "stage": "final", "trial": "final-000"},
    "fleet": {},
    "models": {"run": "sizes", "stage": "power"},
}
WHEN = {"campaign": BUSY, "trial": BUSY, "fleet": BUSY, "models": 0.5}
KINDS = ("prometheus", "victoria-metrics")


class TestWorld:
    """The truth itself: closed forms, by arithmetic that is not the world's."""

    def test_energy_is_power_times_time(self):
        """A GPU alone on its trial, at one level: the ripple adds as much as it takes."""
        world = World(1000.0)
        small = next(trial for trial in TRIALS if trial.name == "SMALL")
        watts = 70 + 0.30 * (620 - 70)
        assert world.trial_joules(small) == pytest.approx(watts * 570, rel=0.002)
        dies = next(trial for trial in TRIALS if trial.name == "final-001")
        assert world.trial_joules(dies) == pytest.approx(4 * (45 + 0.9 * 195) * 240, rel=0.002)

    def test_idling_and_throttling_take_less(self):
        world = World(1000.0)
        trials = {trial.name: trial for trial in TRIALS}
        level, idle = 70 + 0.70 * 550, 70.0
        assert world.joules(IDLE, 330, 600) == pytest.approx(level * 170 + idle * 100, rel=0.003)
        level, slowed = 70 + 0.80 * 550, 70 + 0.6 * 0.80 * 550
        assert world.joules(HOT, 330, 620) == pytest.approx(level * 140 + slowed * 150, rel=0.003)
        both = 2 * level * 290 - (level - slowed) * 150
        assert world.trial_joules(trials["sift-001"]) == pytest.approx(both, rel=0.003)

    def test_is_what_was_asked_for(self):
        assert len(GPUS) == 16 and len(mine()) == 12
        assert sorted(STAGES["replayed"].values()) == [2, 4, 6]
        for host in ("node0", "node1"):
            assert sum(gpu.host == host for gpu in GPUS) == 8
        for trial in TRIALS:
            others = [one for one in TRIALS if one is not trial and set(one.gpus) & set(trial.gpus)]
            assert all(one.ends <= trial.begins or trial.ends <= one.begins for one in others), trial.name

    def test_dominated_area(self):
        """Two points, corner (2.1, 4.2): 1.1 x 0.2 + 0.1 x (4.0 + 0.0) by hand."""
        assert dominated_area([(1.0, 4.0), (2.0, 2.0)]) == pytest.approx(1.1 * 0.2 + 0.1 * 2.0)
        assert dominated_area([]) is None


@contextlib.contextmanager
def _victoria(folder):
    port = free_port()
    command = [
        tool("victoria-metrics", "victoria-metrics"),
        f"-storageDataPath={folder}/victoria",
        f"-httpListenAddr=127.0.0.1:{port}",
        "-search.latencyOffset=0s",  # it hides the newest 30 s otherwise
        "-search.disableCache",
    ]
    with (folder / "victoria.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


class _RayPage(http.server.BaseHTTPRequestHandler):
    """One of the figures that Ray's agents show."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(b'ray_node_cpu_count{SessionName="s",instance="10.0.0.1"} 16\n')

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def _ray_agent(folder):
    """Somebody who answers as Ray's metrics agent does, in the list that Ray writes."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _RayPage)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    listed = [{"labels": {"job": "ray"}, "targets": [f"127.0.0.1:{server.server_port}"]}]
    (folder / "ray").mkdir()
    (folder / "ray" / "prom_metrics_service_discovery.json").write_text(json.dumps(listed))
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Played:
    """The campaign, over, and the databases that hold it."""

    def __init__(self, running, urls):
        self.truth, self.world = running.truth(), running.player.world
        self.start = running.player.start_seconds
        self.databases = {kind: Database(url) for kind, url in zip(KINDS, urls, strict=True)}
        self.end = time.time()

    def at(self, share):
        """Seconds since 1970 at a share of the campaign."""
        return self.start + share * SECONDS

    def ask(self, kind, board, title, *, ref="A", share=None, chosen=None):
        """What a panel's query answers, at the end or at a share of the campaign; over time if the panel asks so."""
        (panel,) = (one for one in panels(board) if one["title"] == title)
        (target,) = (one for one in panel["targets"] if one["refId"] == ref)
        when = self.end if share is None else self.at(share)
        return self.answer(kind, target, when, {**CHOSEN[board], **(chosen or {})})

    def answer(self, kind, target, when, chosen):
        expr = plain(target["expr"], round(when - self.start + 3), chosen)
        database = self.databases[kind]
        if target.get("instant"):
            return database.ask(expr, when)
        return database.ask_range(expr, self.start - 3, when)


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    tool("prometheus", "prometheus")
    folder = tmp_path_factory.mktemp("replayed")
    with contextlib.ExitStack() as stack:
        victoria = stack.enter_context(_victoria(folder))
        stack.enter_context(_ray_agent(folder))
        running = stack.enter_context(demo(folder, seconds=SECONDS, remote_write=f"{victoria}/api/v1/write"))
        assert running.wait_until_over()
        time.sleep(2.5)  # two scrapes, and the rules after them
        result = Played(running, (running.prometheus_url, victoria))
        newest = "wattier:fleet_power_watts:sum"
        passed_on = f"{newest} and timestamp({newest}) > {result.end - 3:.0f}"
        assert result.databases["victoria-metrics"].until(passed_on)
        yield result


@pytest.mark.parametrize("kind", KINDS)
class TestEveryQuery:
    @pytest.mark.parametrize("name", NAMES)
    def test_panel(self, played, kind, name):
        empty = []
        for panel in panels(name):
            for target in panel["targets"]:
                found = played.answer(kind, target, played.at(WHEN[name]), CHOSEN[name])
                if not found and not may_be_empty(panel):
                    empty.append(f"{panel['title']}: {target['expr']}")
        assert empty == []

    def test_rules(self, played, kind):
        groups = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
        for rule in (rule for group in groups for rule in group["rules"]):
            found = played.databases[kind].ask(rule["expr"], played.at(BUSY))
            if "record" in rule:
                assert found, rule
                assert played.databases[kind].ask(rule["record"], played.at(BUSY)), rule

    def test_choices(self, played, kind):
        """The variables offer what there was."""
        times = {"start": f"{played.start:.0f}", "end": f"{played.end:.0f}"}
        get = played.databases[kind].get
        match = '{__name__=~"wattier_(campaign|trial)_info"}'
        assert set(get("/api/v1/label/run/values", **{"match[]": match}, **times)["data"]) == {"replayed", "sizes"}
        hosts = get("/api/v1/label/instance/values", **{"match[]": "wattier_build_info"}, **times)["data"]
        assert set(hosts) == {"node0", "node1"}


def _by(found, *labels):
    """Value of each series, by its labels; the last where there are many."""
    values = {}
    for series in found:
        value = series["value"] if "value" in series else series["values"][-1]
        values[tuple(series["metric"].get(label, "") for label in labels)] = float(value[1])
    return values


def _most(found):
    return max(float(value) for series in found for _, value in series["values"])


@pytest.mark.parametrize("kind", KINDS)
class TestTruth:
    """What the panels say is what happened, within 1 %."""

    def test_joules_of_each_trial_as_billed(self, played, kind):
        found = _by(played.ask(kind, "campaign", "Loss against energy"), "run", "stage", "trial")
        complete = {(t.run, t.stage, t.name) for t in mine() if t.status == "complete"}
        assert found == {key: pytest.approx(played.truth.joules[key], rel=1e-6) for key in complete}

    def test_joules_of_each_trial_as_the_exporters_account_for_them(self, played, kind):
        """Between its registration and its end, by counters that the exporter read itself."""
        each = "max by (run, stage, trial, rank, uuid) (last_over_time(wattier_trial_energy_joules_total[5m]))"
        answer = played.databases[kind].ask(f"sum by (run, stage, trial) ({each})", played.end)
        found = _by(answer, "run", "stage", "trial")
        trials = {(trial.run, trial.stage, trial.name): trial for trial in TRIALS}
        assert found.keys() == played.truth.seen_joules.keys()
        for key, joules in played.truth.seen_joules.items():
            watts = joules / ((trials[key].ends - trials[key].begins) * SECONDS)
            assert found[key] == pytest.approx(joules, abs=max(0.01 * joules, LATE_SECONDS * watts)), key

    def test_joules_of_the_campaign(self, played, kind):
        ((joules,),) = (_by(played.ask(kind, "campaign", "Energy spent")).values(),)
        assert joules == pytest.approx(total_joules(played.world), rel=1e-3)
        ((hours,),) = (_by(played.ask(kind, "campaign", "The same in kWh")).values(),)
        assert hours == pytest.approx(joules / 3.6e6)
        ((used,),) = (_by(played.ask(kind, "campaign", "Budget used")).values(),)
        assert used == pytest.approx(1 / BUDGET_SHARE, rel=1e-3)
        bounds = played.ask(kind, "campaign", "Energy by phase, with bounds", ref="C")
        assert sum(_by(bounds, "phase").values()) == pytest.approx(1.02 * joules, rel=1e-3)

    def test_statuses(self, played, kind):
        last = _by(played.ask(kind, "campaign", "Trials by stage and status"), "stage", "status")
        for stage, planned in STAGES["replayed"].items():
            there = {status: count for (of, status), count in last.items() if of == stage}
            assert sum(there.values()) == planned
            for status in ("complete", "pruned", "failed"):
                assert there[status] == sum(t.stage == stage and t.status == status for t in mine())
        failures = _by(played.ask(kind, "campaign", "Failures by reason"), "stage", "reason")
        assert failures == {("scout", "out_of_memory"): 1, ("sift", "node_lost"): 1}
        running = _by(played.ask(kind, "campaign", "Trials running", share=BUSY)).values()
        assert list(running) == [2]

    def test_best_loss_and_hypervolume(self, played, kind):
        last = _by(played.ask(kind, "campaign", "Best loss by stage"), "stage")
        assert last == {("scout",): 0.61, ("sift",): 0.44, ("final",): 0.31}
        volumes = _by(played.ask(kind, "campaign", "Hypervolume by stage"), "stage")
        points = [(t.loss, played.truth.joules[t.run, t.stage, t.name]) for t in mine() if t.stage == "final"]
        assert volumes["final",] == pytest.approx(dominated_area(points), rel=1e-6)

    def test_expected_end(self, played, kind):
        (when,) = _by(played.ask(kind, "campaign", "Expected end", share=BUSY)).values()
        assert when / 1000 == pytest.approx(played.at(0.94), abs=0.01)

    def test_largest_memory(self, played, kind):
        found = played.ask(kind, "fleet", "Largest device memory (HBM) over all GPUs")
        assert _most(found) == played.truth.memory_bytes == 71.5 * 2**30

    def test_time_throttled(self, played, kind):
        found = _by(played.ask(kind, "fleet", "Time throttled"), "reason")
        whole = round(played.end - played.start + 3) * len(GPU)
        for reason, seconds in played.truth.throttled_seconds.items():
            assert found[reason,] == pytest.approx(seconds / whole, rel=0.01)
        by_hand = {"software_thermal": 0.15 * SECONDS, "power_cap": 8 * 0.2 * SECONDS}
        assert played.truth.throttled_seconds == pytest.approx(by_hand)

    def test_the_hot_gpu_is_the_one_that_lags(self, played, kind):
        found = played.ask(kind, "fleet", "Throttling by GPU and reason")
        hot = {series["metric"]["uuid"] for series in found if series["metric"]["reason"] == "software_thermal"}
        assert hot == {HOT}
        assert _most(played.ask(kind, "fleet", "Stragglers")) == 2
        lagging = _by(played.ask(kind, "fleet", "Stragglers by trial", share=0.5), "trial", "uuid")
        hot, idle = 0.55 / ((0.55 + 1) / 2), 0.25 / ((0.25 + 1) / 2)  # over the median of two
        assert lagging == pytest.approx({("sift-001", HOT): hot, ("sift-000", IDLE): idle}, rel=0.01)

    def test_idle_watts(self, played, kind):
        (watts,) = _by(played.ask(kind, "fleet", "Idle watts wasted now", share=0.48)).values()
        assert watts == pytest.approx(GPU[IDLE].idle_watts, rel=0.05)
        (none,) = _by(played.ask(kind, "fleet", "Idle watts wasted now", share=BUSY)).values()
        assert none == 0

    def test_packages_and_dies(self, played, kind):
        """Each MI250X is one package of two dies, whose sum it is; a card is a package by itself."""
        packages = _by(played.ask(kind, "fleet", "Power by package", share=BUSY), "instance", "package")
        dies = _by(played.ask(kind, "fleet", "Power by GPU", share=BUSY), "uuid")
        assert len(packages) == 12
        for package in (0, 1, 3):  # a die of the third is lost
            both = dies[f"die-1-{package}-0",] + dies[f"die-1-{package}-1",]
            assert packages["node1", f"package-1-{package}"] == pytest.approx(both)
        assert packages["node0", "gpu-0-0"] == dies["gpu-0-0",]

    def test_power_of_all_gpus(self, played, kind):
        found = _by(played.databases[kind].ask("wattier:fleet_power_watts:bucket", played.at(BUSY)), "watts")
        assert sum(found.values()) == 15  # one is lost
        assert sum(count for (watts,), count in found.items() if int(watts) >= 600) == 8
        (total,) = _by(played.ask(kind, "fleet", "Power of all hosts", share=BUSY)).values()
        level = sum(played.world.level(gpu.uuid, BUSY) for gpu in GPUS if gpu.uuid != LOST)
        assert total == pytest.approx(level, rel=0.045)  # the ripple

    def test_sizes(self, played, kind):
        """SMALL, MEDIUM and LARGE of the talk: watts over structures a second."""
        found = _by(played.ask(kind, "models", "Joules per structure", share=0.6), "trial")
        for size in (trial for trial in TRIALS if trial.stage == "power"):
            level = 70 + size.load * 550
            assert found[size.name,] == pytest.approx(level / size.structures_per_second, rel=0.01)

    def test_one_trial(self, played, kind):
        """Exactly its devices, its ranks and its hosts; of one that spans both hosts, too."""
        chosen = {"stage": "sift", "trial": "sift-002"}
        found = played.ask(kind, "trial", "Device power", share=0.5, chosen=chosen)
        assert {series["metric"]["uuid"] for series in found} == {"gpu-0-4", "die-1-1-0"}
        assert list(_by(played.ask(kind, "trial", "Ranks", share=0.5, chosen=chosen)).values()) == [2]
        assert list(_by(played.ask(kind, "trial", "Nodes", share=0.5, chosen=chosen)).values()) == [2]
        key = ("replayed", "final", "final-000")
        (joules,) = _by(played.ask(kind, "trial", "Energy so far")).values()  # to its last scrape
        assert 0.9 * played.truth.joules[key] < joules <= played.truth.joules[key]

    def test_ray_is_scraped_beside_us(self, played, kind):
        """Its own labels stand, and nothing of ours is mixed in."""
        found = played.databases[kind].ask('ray_node_cpu_count{SessionName=~".*"}', played.end)
        assert [series["metric"]["job"] for series in found] == ["ray"]
        assert list(_by(played.ask(kind, "fleet", "Exporters down")).values()) == [0]


class TestAlerts:
    """What Prometheus itself makes of the campaign."""

    def _alerts(self, played):
        groups = played.databases["prometheus"].get("/api/v1/rules")["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert {rule["health"] for rule in rules} == {"ok"}
        return {rule["name"]: rule for rule in rules if rule["type"] == "alerting"}

    def test_fire_when_they_should(self, played):
        alerts = self._alerts(played)
        assert alerts["WattierBudgetSpent"]["state"] == "firing"
        assert alerts["WattierThrottled"]["state"] == "firing"
        (lost,) = alerts["WattierGpuLost"]["alerts"]  # for less than a minute in so short a campaign
        assert lost["labels"]["uuid"] == LOST
        (failed,) = alerts["WattierReadErrors"]["alerts"]
        assert failed["labels"]["uuid"] == LOST
        for name in ("WattierExporterDown", "WattierGpuMissing", "WattierTrialStalled", "WattierCounterImplausible"):
            assert alerts[name]["state"] == "inactive", alerts[name]

    def test_budget_was_nearly_spent_before(self, played):
        found = played.databases["prometheus"].ask('ALERTS{alertname="WattierBudgetNearlySpent"}', played.at(0.92))
        assert [series["metric"]["alertstate"] for series in found] == ["firing"]


class TestDemo:
    """`make demo`: what somebody sees who has no GPU and no Docker."""

    COMMAND = (sys.executable, str(FOLDER / "demo.py"))

    def test_runs_until_ctrl_c_and_leaves_nothing(self, tmp_path):
        tool("prometheus", "prometheus")
        port = free_port()
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        command = [*self.COMMAND, "--port", str(port), "--seconds", "60", "--once"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
        try:
            told = ""
            while "Ctrl-C" not in told:
                line = process.stdout.readline()
                assert line, told
                told += line
            urls = re.findall(r"http://\S+/metrics|http://127[^/\s]+(?=\n)", told)
            assert len(urls) == 3
            assert Database(urls[0]).until("count(wattier_power_watts) == 16")
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.stdout.close()
            assert process.wait(30) == 0
        for url in urls:
            with pytest.raises(OSError):
                Database(url).ask("up")
        assert list(tmp_path.iterdir()) == []

    def test_a_port_that_is_taken(self):
        tool("prometheus", "prometheus")
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            command = [*self.COMMAND, "--port", str(port)]
            answer = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        assert answer.returncode == 1
        assert answer.stderr == f"demo: port {port} is taken. Give another one: --port {port + 1}\n"

    def test_without_prometheus(self, tmp_path):
        environment = {**os.environ, "PATH": str(tmp_path)}
        answer = subprocess.run(self.COMMAND, check=False, capture_output=True, text=True, timeout=60, env=environment)
        assert (answer.returncode, answer.stderr) == (1, f"demo: {NO_PROMETHEUS}\n")
