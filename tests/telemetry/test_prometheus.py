"""A real Prometheus scrapes the exporter every 200 ms for a minute, while trials share a device, end, are killed."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections import Counter
from itertools import pairwise

import pytest

from wattier_telemetry.exporter import ServeOptions, start

PERIOD_SECONDS = 0.2
LONGEST_GAP_SECONDS = 0.45
MINUTE_SECONDS = 60.0
WATTS = {"shared": 200.0, "alone": 80.0}
PLAN = {  # trial: device, fraction, when it starts and how long it runs, how it ends
    "a": ("shared", 0.5, 3.0, 28.0, "exit"),
    "b": ("shared", 0.5, 12.0, 40.0, "exit"),
    "c": ("alone", 1.0, 6.0, 35.0, "kill"),
}
TRIAL = """
import json, os, sys, time
from pathlib import Path
from wattier_telemetry import EnergyMeter, TrialRegistration, open_source

trial, uuid, fraction, seconds, folder = json.loads(sys.argv[1])
source = open_source(f"replay:{folder}/{uuid}.csv")
registration = TrialRegistration("night", "scout", trial, 0, os.getpid(), (uuid,), fraction)
with EnergyMeter(source, journal=Path(folder) / f"{trial}.energy.json", fraction=fraction) as meter:
    registration.write(Path(folder) / "trials")
    print(json.dumps({"begin": time.time()}), flush=True)
    time.sleep(seconds)
    end = time.time()
    registration.withdraw(Path(folder) / "trials")
print(json.dumps({"end": end, "joules": meter.report.joules}), flush=True)
"""
WITNESS = """
import json, select, sys, time
from pathlib import Path

def waited():
    found = {}
    for pid in sys.argv[1:]:
        for task in Path(f"/proc/{pid}/task").glob("*"):
            try:
                found[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
            except (OSError, IndexError):
                pass
    return found

last, before, stalls, waits = time.time(), waited(), [], []
while not select.select([sys.stdin], [], [], 0.02)[0]:
    now, after = time.time(), waited()
    if now - last > 0.05:
        stalls.append((last, now))
    longer = {task: after[task] - before.get(task, 0.0) for task in after}
    waits.append((now, {task: seconds for task, seconds in longer.items() if seconds > 0.001}))
    last, before = now, after
print(json.dumps((stalls, waits)))
"""
STALL_SECONDS, STALL_RATIO = 0.05, 0.25  # of the 200 ms that a scrape may take
BACKLOG_SECONDS = 0.3
CONFIG = """
global: {{scrape_interval: 200ms, scrape_timeout: 200ms}}
scrape_configs:
  - job_name: wattier
    file_sd_configs: [{{files: ["{folder}/sd.json"], refresh_interval: 1s}}]
"""


class StallWitness:
    """Notes when the machine let a process wait: no scrape can be asked of it then.

    Two kinds of evidence: it woke late from a short sleep itself, or a thread of the given processes stood in the
    kernel's run queue (its own account, the second figure of schedstat) for a good part of the time.
    """

    def __init__(self, *pids):
        command = [sys.executable, "-c", WITNESS, *map(str, pids)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._seen = None

    @property
    def seen(self):
        """([(begin, end) of each stall], [(time, {thread: seconds in the queue})]) until this is asked for first."""
        if self._seen is None:
            self._seen = json.loads(self._process.communicate()[0])
        return self._seen

    def excuses(self, begin, end):
        """Whether the machine stalled in this span, or so shortly before that the backlog reaches into it."""
        stalls, waits = self.seen
        queued = Counter()
        for at, seconds in waits:
            if begin <= at <= end + STALL_SECONDS:
                queued.update(seconds)
        stalled = any(first < end and begin < last + BACKLOG_SECONDS for first, last in stalls)
        return stalled or max(queued.values(), default=0.0) > max(STALL_SECONDS, STALL_RATIO * (end - begin))

    def close(self):
        self._process.kill()
        self._process.communicate()


class Server:
    """Prometheus over its API."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}/api/v1"

    def ask(self, path, **parameters):
        with urllib.request.urlopen(f"{self.url}/{path}?{urllib.parse.urlencode(parameters)}", timeout=20) as answer:
            body = json.loads(answer.read())
        assert body["status"] == "success"
        return body["data"]["result"]

    def raw(self, metric, begin, end):
        """Return {labels: [(time, value)]} of the stored samples themselves."""
        found = self.ask("query", query=f"{metric}[{round(1000 * (end - begin))}ms]", time=end)
        return {
            frozenset(series["metric"].items()): [(at, float(value)) for at, value in series["values"]]
            for series in found
        }


def _tool(name):
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian package prometheus)")
    return path


def _begin(stack, folder, trial):
    uuid, fraction, _, seconds, ending = PLAN[trial]
    arguments = json.dumps([trial, uuid, fraction, seconds if ending == "exit" else 1000.0, str(folder)])
    process = subprocess.Popen([sys.executable, "-c", TRIAL, arguments], stdout=subprocess.PIPE, text=True)
    stack.callback(process.stdout.close)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def _run_plan(stack, folder):
    """Let the minute pass; returns each trial's begin, end and the joules of its own ledger."""
    origin, running, truth = time.monotonic(), {}, {}
    starts = sorted(PLAN, key=lambda trial: PLAN[trial][2])
    for trial in starts:
        time.sleep(max(0.0, origin + PLAN[trial][2] - time.monotonic()))
        running[trial] = _begin(stack, folder, trial)
        truth[trial] = json.loads(running[trial].stdout.readline())
    for trial, process in running.items():
        if PLAN[trial][4] == "kill":
            time.sleep(max(0.0, truth[trial]["begin"] + PLAN[trial][3] - time.time()))
            alive = time.time()
            process.send_signal(signal.SIGKILL)
            process.wait()
            truth[trial] |= {"alive": alive, "end": time.time(), "joules": None}
    for trial, process in running.items():
        if PLAN[trial][4] == "exit":
            truth[trial] |= json.loads(process.stdout.readline())
            truth[trial]["alive"] = truth[trial]["end"]
    time.sleep(max(0.0, origin + MINUTE_SECONDS - time.monotonic()))
    return truth


@pytest.fixture(scope="module")
def minute(tmp_path_factory):
    """(Prometheus, begin, end, truth of each trial, text of the last scrape) of one minute."""
    prometheus = _tool("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    for name, devices in {"node": WATTS, **{uuid: {uuid: watts} for uuid, watts in WATTS.items()}}.items():
        lines = ["time_seconds,device,power_watts", *(f"0,{uuid},{watts}" for uuid, watts in devices.items())]
        (folder / f"{name}.csv").write_text("\n".join(lines))
    (folder / "prometheus.yml").write_text(CONFIG.format(folder=folder))
    options = ServeOptions(
        f"replay:{folder}/node.csv", port=0, registry=folder / "trials", discovery=folder / "sd.json", names="omnistat"
    )
    with contextlib.ExitStack() as stack:
        exporter = start(options)
        stack.callback(exporter.close)
        probe = stack.enter_context(contextlib.closing(socket.create_server(("127.0.0.1", 0))))
        port = probe.getsockname()[1]
        probe.close()
        command = [prometheus, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        log = stack.enter_context((folder / "log").open("wb"))
        server = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        stack.callback(server.wait)
        stack.callback(server.kill)
        prom = Server(port)
        _wait_for_scrapes(prom, folder)
        begin, witness = time.time(), StallWitness(os.getpid(), server.pid)
        stack.callback(witness.close)
        truth = _run_plan(stack, folder)
        with urllib.request.urlopen(exporter.url, timeout=10) as answer:
            text = answer.read()
        yield prom, begin, time.time(), truth, text, witness


def _wait_for_scrapes(prom, folder):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if prom.ask("query", query="count_over_time(up[2s]) >= 3"):
                return
        time.sleep(0.2)
    pytest.fail("Prometheus does not scrape: " + (folder / "log").read_text())


def _named(found, trial):
    return [values for labels, values in found.items() if dict(labels).get("trial") == trial]


def _answered(prom, begin, end):
    """Return {time: seconds it took} of each scrape that was answered within its 200 ms.

    Under load Prometheus may scrape late, or be answered late: that is the machine's. What an answer lacks is ours.
    """
    (up,) = prom.raw("up", begin, end).values()
    (seconds,) = prom.raw("scrape_duration_seconds", begin, end).values()
    took = dict(seconds)
    answered = {at: took[at] for at, value in up if value == 1.0}
    assert len(answered) > MINUTE_SECONDS, "too few scrapes to tell anything"
    return answered


def test_no_gap(minute):
    """Prometheus misses nothing but what the machine held up, and every answer holds every device."""
    prom, begin, end, _, _, witness = minute
    answered = _answered(prom, begin, end)
    (up,) = prom.raw("up", begin, end).values()
    missed = [at for at, value in up if value != 1.0]
    assert [at for at in missed if not witness.excuses(at, at + 0.2)] == []
    times = [begin, *sorted(answered), end]
    long = [(a, b) for a, b in pairwise(times) if b - a > LONGEST_GAP_SECONDS and not witness.excuses(a, b)]
    assert long == []
    for metric in ("wattier_power_watts", "wattier_energy_joules_total", "wattier_device_up", "rocm_energy_joules"):
        found = prom.raw(metric, begin, end)
        assert len(found) == 2
        for labels, values in found.items():
            assert [at for at, _ in values] == sorted(answered), (metric, labels)


def test_series_of_a_trial_have_no_gap_while_it_runs(minute):
    """Every answer that was made while it ran holds it."""
    prom, begin, end, truth, _, _ = minute
    answered = _answered(prom, begin, end)
    for metric in ("wattier_trial_info", "wattier_trial_energy_joules_total"):
        found = prom.raw(metric, begin, end)
        for trial, known in truth.items():
            (values,) = _named(found, trial)
            while_it_ran = {at for at, took in answered.items() if known["begin"] < at and at + took < known["alive"]}
            assert len(while_it_ran) > 20
            assert while_it_ran <= {at for at, _ in values}, (metric, trial)


def test_promtool_finds_nothing(minute):
    answer = subprocess.run([_tool("promtool"), "check", "metrics"], input=minute[4], capture_output=True, check=False)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, b"", b"")


def test_the_join_returns_exactly_the_trials_that_ran(minute):
    prom, begin, end, truth, _, _ = minute
    join = "wattier_power_watts * on (uuid) group_right () wattier_trial_info"
    found = prom.ask("query_range", query=join, start=begin, end=end, step=0.5)
    assert {series["metric"]["trial"]: series["metric"]["uuid"] for series in found} == {
        trial: plan[0] for trial, plan in PLAN.items()
    }
    for series in found:
        trial = series["metric"]["trial"]
        times = [at for at, _ in series["values"]]
        assert times[0] == pytest.approx(truth[trial]["begin"], abs=1.2)
        assert times[-1] == pytest.approx(truth[trial]["end"], abs=1.2)
        assert {float(value) for _, value in series["values"]} == {WATTS[PLAN[trial][0]]}


@pytest.mark.parametrize("trial", PLAN)
def test_energy_of_a_trial(minute, trial):
    prom, begin, end, truth, _, _ = minute
    (values,) = _named(prom.raw("wattier_trial_energy_joules_total", begin, end), trial)
    known, (uuid, fraction, *_) = truth[trial], PLAN[trial]
    at, joules = values[-1]  # of its end, or of a moment before, if that answer came too late for Prometheus
    took = _answered(prom, begin, end)[at]
    least, most = (moment - known["begin"] for moment in (min(at, known["alive"]), min(at + took, known["end"])))
    assert joules == max(value for _, value in values)
    assert 0.99 * least <= joules / (WATTS[uuid] * fraction) <= 1.01 * most
    if known["joules"] is not None and at >= known["alive"]:
        assert joules == pytest.approx(known["joules"], rel=0.01)


def test_shares_and_rest_are_the_devices_energy(minute):
    prom, begin, end, truth, _, _ = minute
    names = ("wattier_accounted_energy_joules_total", "wattier_unattributed_energy_joules_total")
    total, rest = (dict(prom.raw(f'{name}{{uuid="shared"}}', begin, end).popitem()[1]) for name in names)
    trials = prom.raw('wattier_trial_energy_joules_total{uuid="shared"}', begin, end)
    ends = [truth[dict(labels)["trial"]]["alive"] for labels in trials]
    compared = [at for at in total if at < min(ends)]
    for at in compared:  # a series that is not there yet is of a trial that owes nothing yet
        owed = sum(dict(values).get(at, 0.0) for values in trials.values())
        assert owed + rest[at] == pytest.approx(total[at], abs=1e-3)
    assert len(compared) > 20
    at = max(total)
    assert total[at] - min(total.values()) == pytest.approx(WATTS["shared"] * (at - min(total)), rel=0.01)


@pytest.mark.parametrize("trial", PLAN)
def test_nothing_is_stale_after_the_end(minute, trial):
    prom, _, _, truth, _, _ = minute
    at = truth[trial]["end"] + 2 * LONGEST_GAP_SECONDS
    for query in ("wattier_trial_info", "wattier_trial_energy_joules_total", "wattier_trial_device_share_ratio"):
        assert prom.ask("query", query=f'{query}{{trial="{trial}"}}', time=truth[trial]["end"] - 1), query
        assert not prom.ask("query", query=f'{query}{{trial="{trial}"}}', time=at), query
