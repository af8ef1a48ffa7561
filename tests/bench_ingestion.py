"""What 1,000 exporters of 8 GPUs cost a Prometheus and a VictoriaMetrics. Nothing is gated on it.

usage: python tests/bench_ingestion.py [--nodes 1000] [--intervals 15 10 5 ...] [--servers prometheus victoria-metrics]

The pages are those of the real exporter over a simulated NVML driver with 8 GPUs and 8 registered ranks, read at
several moments. One process serves them for all nodes (telemetry/many_exporters.py), whose own CPU time is told apart.
Each server scrapes at one interval after the other until it keeps up no longer. CPU seconds are the kernel's, of the
server alone, so that other work on the machine moves them little; whether a rate is held does depend on it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import bench_telemetry
import psutil

from wattier.ports import free_port
from wattier_telemetry import TrialRegistration
from wattier_telemetry.exporter import ServeOptions, start
from wattier_telemetry.sources.nvml import NvmlSource

HERE = Path(__file__).parent
INTERVALS = (15, 10, 5, 3, 2, 1)
PAGES, HELD = 4, 0.99  # of one node; share of the scrapes that must have come
SLOWEST = 6
CONFIG = """
global: {{scrape_interval: {interval}s, scrape_timeout: {timeout}s{rules}
scrape_configs:
  - job_name: wattier
    file_sd_configs: [{{files: ["{targets}"]}}]
"""


class Taken(NamedTuple):
    """The counters of one moment: pages given, CPU seconds of server, emulator and the whole machine, time."""

    pages: int
    server: float
    emulator: float
    machine_busy: float
    at: float


class Server:
    """A time-series server that scrapes."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.port = name, folder, free_port()
        self.config = folder / f"{name}.yml"
        self.targets = folder / "targets.json"

    def write(self, interval: int, rules: Path | None = None) -> None:
        """Change how it scrapes."""
        if rules is not None:  # the folder of a rule file is where it is looked for
            rules = Path(shutil.copy(rules, self.folder / "rules.yml"))
        text = CONFIG.format(
            interval=interval,
            timeout=min(interval, 10),
            targets=self.targets,
            rules=f", evaluation_interval: 15s}}\nrule_files: [{rules}]" if rules else "}",
        )
        self.config.write_text(text)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start it and wait until it answers."""
        data, web = self.folder / f"{self.name}-data", f"127.0.0.1:{self.port}"
        flags = {
            "prometheus": [
                f"--config.file={self.config}", f"--storage.tsdb.path={data}", f"--web.listen-address={web}",
            ],
            "victoria-metrics": [
                f"-promscrape.config={self.config}", f"-storageDataPath={data}", f"-httpListenAddr={web}",
                "-search.latencyOffset=0s", "-search.disableCache",
            ],
        }[self.name]  # fmt: skip
        with (self.folder / f"{self.name}.log").open("w") as log:
            self.process = psutil.Popen([self.name, *flags], stdout=log, stderr=log)
        try:
            for _ in range(200):
                try:
                    self.query("vector(1)")
                    break
                except OSError:
                    time.sleep(0.1)
            else:
                raise RuntimeError(
                    f"{self.name} did not start:\n{(self.folder / f'{self.name}.log').read_text()[-2000:]}"
                )
            yield
        finally:
            self.process.terminate()
            self.process.wait(60)

    def reload(self) -> None:
        """Take the changed config."""
        self.process.send_signal(signal.SIGHUP)

    def query(self, expr: str) -> float | None:
        """The first number of an instant query."""
        url = f"http://127.0.0.1:{self.port}/api/v1/query?query={urllib.parse.quote(expr)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            result = json.load(answer)["data"]["result"]
        return float(result[0]["value"][1]) if result else None

    def slowest_rules(self) -> list[tuple[str, float]]:
        """How long its groups of rules and the slowest rules took, s of wall time."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/rules", timeout=30) as answer:
            groups = json.load(answer)["data"]["groups"]
        rules = sorted(
            ((rule["name"], rule["evaluationTime"]) for group in groups for rule in group["rules"]),
            key=lambda one: -one[1],
        )
        return [(f"group {group['name']}", group["evaluationTime"]) for group in groups] + rules[:SLOWEST]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--intervals", type=int, nargs="+", default=INTERVALS)
    parser.add_argument("--servers", nargs="+", default=["prometheus", "victoria-metrics"])
    parser.add_argument("--rules", type=Path, default=HERE.parent / "dashboards/rules.yml")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples, size = capture(folder)
        print(
            f"a page: {samples} series, {size / 1e3:.1f} kB; {options.nodes} nodes: {samples * options.nodes:,} series"
        )
        with emulator(folder / "pages.json", options.nodes) as (process, port):
            (folder / "targets.json").write_text(json.dumps(targets(port, options.nodes)))
            for server in (Server(name, folder) for name in options.servers):
                print(f"\n{version(server.name)}")
                bench(server, process, port, samples, options)


def capture(folder: Path) -> tuple[int, int]:
    """Pages of the real exporter, written to pages.json; the series and bytes of the last one."""
    bench_telemetry.simulate(folder)
    source = NvmlSource()
    uuids = [device.uuid for device in source.devices()]
    exporter = start(ServeOptions(sources=(source,), port=0, registry=folder / "registry"))
    pages = []
    try:
        for moment in range(PAGES):
            for rank, uuid in enumerate(uuids):
                TrialRegistration(
                    "campaign", "final", "final-017", rank, os.getpid(), (uuid,), epoch=moment, epochs=30,
                    val_loss=1.0 / (moment + 1.5), structures_per_second=4_000.0 + moment,
                    energy_joules=1e6 + 700.123 * moment, method="counter",
                ).write(folder / "registry")  # fmt: skip
            time.sleep(2.2)
            with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics") as answer:
                pages.append(answer.read().decode())
    finally:
        exporter.close()
    (folder / "pages.json").write_text(json.dumps({"pages": pages, "uuids": uuids}))
    series = sum(1 for line in pages[-1].splitlines() if line and not line.startswith("#"))
    return series, len(pages[-1].encode())


@contextmanager
def emulator(pages: Path, n_nodes: int) -> Iterator[tuple[psutil.Process, int]]:
    """The process that stands for all nodes, and its port."""
    command = [sys.executable, str(HERE / "telemetry/many_exporters.py"), str(pages), str(n_nodes)]
    process = psutil.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait(10)


def targets(port: int, n_nodes: int) -> list[dict[str, object]]:
    """All nodes for Prometheus: one address, a path and an instance each."""
    return [
        {"targets": [f"127.0.0.1:{port}"], "labels": {"__metrics_path__": f"/node/{n}", "instance": f"node{n:04}:9500"}}
        for n in range(n_nodes)
    ]


def bench(server: Server, process: psutil.Process, port: int, samples: int, options: argparse.Namespace) -> None:
    """One server at all intervals, and what our rules add."""
    print(
        "  interval   scrapes held  samples/s  CPU s/M samples  cores  RSS GB  scrape p50/p99 ms  emulator's cores  "
        "others' cores"
    )
    server.write(options.intervals[0])
    with server.running():
        time.sleep(options.intervals[0] + 3)  # every series is made
        for interval in options.intervals:
            server.write(interval)
            server.reload()
            held = measure(server, process, port, samples, interval, options.nodes, f"{interval:>6} s")
            if held < HELD:
                break
        if server.name == "prometheus":
            server.write(15, options.rules)
            server.reload()
            measure(server, process, port, samples, 15, options.nodes, "15 s+rules")
            print(f"rules of {options.rules}, every 15 s, wall time of the last turn:")
            for rule, seconds in server.slowest_rules():
                print(f"    {seconds:6.2f} s {rule}")


def measure(  # one line of the table
    server: Server, process: psutil.Process, port: int, samples: int, interval: int, n_nodes: int, name: str
) -> float:
    """Share of the scrapes that came."""
    time.sleep(interval + 2)
    before = taken(server, process, port)
    time.sleep(max(2 * interval, 16) if interval < 15 else 30)
    after = taken(server, process, port)
    seconds = after.at - before.at
    pages = after.pages - before.pages
    share = pages / (n_nodes * seconds / interval)
    up = server.query("count(up == 1)") or 0.0
    p50, p99 = (server.query(f"quantile({q}, scrape_duration_seconds)") or 0.0 for q in (0.5, 0.99))
    cores = (after.server - before.server) / seconds
    busy = (after.machine_busy - before.machine_busy) / seconds
    emulated = (after.emulator - before.emulator) / seconds
    million = (after.server - before.server) / (pages * samples / 1e6)
    print(
        f"{name:>10}  {share:7.1%} ({up:.0f} up)  {pages * samples / seconds:9,.0f}  {million:15.2f}  {cores:5.2f}  "
        f"{server.process.memory_info().rss / 1e9:6.2f}  {1e3 * p50:8.0f} /{1e3 * p99:7.0f}  {emulated:14.2f}  "
        f"{max(0.0, busy - cores - emulated):13.2f}",
        flush=True,
    )
    return share


def taken(server: Server, process: psutil.Process, port: int) -> Taken:
    """The counters now."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/count") as answer:
        pages = int(answer.read())
    machine = psutil.cpu_times()
    busy = sum(machine[:8]) - machine.idle - machine.iowait
    return Taken(pages, sum(server.process.cpu_times()[:2]), sum(process.cpu_times()[:2]), busy, time.monotonic())


def version(name: str) -> str:
    """What a server says it is."""
    flag = "--version" if name == "prometheus" else "-version"
    done = subprocess.run([name, flag], capture_output=True, text=True, check=False)
    text = (done.stdout + done.stderr).splitlines()[0] if done.stdout + done.stderr else ""
    debian = subprocess.run(["dpkg-query", "-W", name], capture_output=True, text=True, check=False).stdout.split()
    number = re.search(r"\d+\.\d+\.\d+\S*", text)
    return f"{name} {debian[1] if len(debian) == 2 else number[0] if number else text}"


if __name__ == "__main__":
    main()
