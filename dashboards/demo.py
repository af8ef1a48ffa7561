"""See the dashboards' data without a GPU and without Docker: ``make demo``, or ``python dashboards/demo.py``.

A replayed campaign, the exporters of its two hosts, and a real Prometheus that scrapes them; Ctrl-C stops everything.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)] if str(HERE) not in sys.path else []

from replay.player import Player, Truth, playing  # noqa: E402  (found beside this file, wherever it is run from)
from wattier_telemetry.stopping import stop_on_signals  # noqa: E402

START_SECONDS = 60.0
SHORTEST_SECONDS, LONGEST_SECONDS = 10.0, 86_400.0  # of a campaign; in less, its stages have no room
NO_PROMETHEUS = (
    "prometheus is not installed. On Debian and Ubuntu: apt-get install --no-install-recommends prometheus. Or, with "
    "Docker: docker compose -f dashboards/compose.yaml up"
)


class DemoError(Exception):
    """The demonstration cannot start; the message says what to do."""


class Demo:
    """A demonstration that runs.

    Attributes:
        prometheus_url: Where Prometheus answers.
        exporter_urls: What it scrapes.
        player: Who plays the campaign.
    """

    def __init__(self, player: Player, prometheus_url: str, process: subprocess.Popen[bytes]) -> None:
        self.player, self.prometheus_url, self.process = player, prometheus_url, process
        self.exporter_urls = player.urls

    def wait_until_over(self, timeout_seconds: float | None = None) -> bool:
        """Wait until the campaign has ended; what it left stays to be asked."""
        longest = self.player.world.seconds * self.player.rounds + 60.0
        return self.player.wait_until_over(longest if timeout_seconds is None else timeout_seconds)

    def truth(self) -> Truth:
        """What happened."""
        return self.player.truth()


@contextmanager
def demo(
    folder: Path, *, seconds: float = 600.0, prometheus_port: int = 0, rounds: int = 1, remote_write: str | None = None
) -> Iterator[Demo]:
    """Run the player and Prometheus for the length of the block.

    Args:
        folder: For everything they write; it stays.
        seconds: Length of the campaign.
        prometheus_port: 0 = any that is free.
        rounds: How often the campaign is played.
        remote_write: URL of a second database that Prometheus passes everything on to.

    Raises:
        DemoError: If Prometheus is not installed, its port is taken, or it does not start.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise DemoError(NO_PROMETHEUS)
    port = prometheus_port or _free_port()
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise DemoError(f"port {port} is taken. Give another one: --port {port + 1}") from error
    with ExitStack() as stack:
        player = stack.enter_context(playing(Player(folder, seconds, rounds=rounds)))
        (folder / "rules.yml").write_text(yaml.safe_dump(rules()))
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration(folder, seconds, remote_write)))
        process = stack.enter_context(_prometheus(program, folder, port))
        yield Demo(player, f"http://127.0.0.1:{port}", process)


def configuration(folder: Path, seconds: float, remote_write: str | None = None) -> dict[str, Any]:
    """The shipped prometheus.yml, with the exporters of the replay, and faster for a short campaign."""
    config: dict[str, Any] = yaml.safe_load((HERE / "prometheus.yml").read_text(encoding="utf-8"))
    interval = "1s" if seconds < 300 else "2s"
    config["global"] = {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval}
    config["rule_files"] = [str(folder / "rules.yml")]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    del jobs["wattier"]["static_configs"]
    for job, files in (("wattier", "targets/*.json"), ("ray", "ray/prom_metrics_service_discovery.json")):
        jobs[job]["file_sd_configs"] = [{"files": [str(folder / files)], "refresh_interval": "1s"}]
        jobs[job].pop("scrape_interval", None)
    if remote_write is not None:
        queue = {"batch_send_deadline": "1s"}
        config["remote_write"] = [{"url": remote_write, "queue_config": queue}]
    return config


def rules() -> dict[str, Any]:
    """The shipped rules, all of them evaluated as often as the rest of so short a campaign."""
    groups: list[dict[str, Any]] = yaml.safe_load((HERE / "rules.yml").read_text(encoding="utf-8"))["groups"]
    return {"groups": [{key: value for key, value in group.items() if key != "interval"} for group in groups]}


@contextmanager
def _prometheus(program: str, folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [
        program,
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    log = folder / "prometheus.log"
    with log.open("wb") as file:  # a session of its own: Ctrl-C is ours to pass on
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        _wait_until_ready(process, f"http://127.0.0.1:{port}/-/ready", log)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    raise DemoError(f"prometheus does not start: {''.join(last)}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    """Run it until Ctrl-C."""
    parser = argparse.ArgumentParser(description="A replayed campaign, its exporters and Prometheus, on this machine.")
    parser.add_argument("--seconds", type=length, default=600.0, help="length of the campaign (default 600)")
    parser.add_argument("--port", type=int, default=9090, help="of Prometheus (default 9090)")
    parser.add_argument("--once", action="store_true", help="play it once instead of again and again")
    options = parser.parse_args()
    stop = stop_on_signals()
    rounds = 1 if options.once else max(1, int(8 * 3600 / options.seconds))
    try:
        with (
            tempfile.TemporaryDirectory(prefix="wattier-demo-") as folder,
            demo(Path(folder), seconds=options.seconds, prometheus_port=options.port, rounds=rounds) as running,
        ):
            sys.stdout.write(_told(running, options.seconds))
            sys.stdout.flush()
            while not stop.wait(0.5) and running.process.poll() is None:
                pass
            if not stop.is_set():
                sys.stderr.write("demo: prometheus has stopped\n")
                return 1
    except DemoError as error:
        sys.stderr.write(f"demo: {error}\n")
        return 1
    return 0


def length(text: str) -> float:
    """A length of the campaign, s, from the command line."""
    if not SHORTEST_SECONDS <= float(text) <= LONGEST_SECONDS:
        told = f"is {text}, but must be {SHORTEST_SECONDS:g} to {LONGEST_SECONDS:g}"
        raise argparse.ArgumentTypeError(told)
    return float(text)


def alerts_page(url: str) -> str:
    """Where Prometheus shows its alerts: Debian's package has the classic pages alone."""
    try:
        with urllib.request.urlopen(f"{url}/alerts", timeout=5):
            return f"{url}/alerts"
    except OSError:
        return f"{url}/classic/alerts"


def _told(running: Demo, seconds: float) -> str:
    url = running.prometheus_url
    exporters = "\n".join(f"  exporter    {one}" for one in running.exporter_urls)
    return (
        f"A search of 12 trials on 16 simulated GPUs, {seconds:g} s long; one GPU is lost half way.\n"
        f"  Prometheus  {url}\n"
        f"  trials      {url}/graph?g0.expr=wattier_campaign_trials&g0.tab=0\n"
        f"  power       {url}/graph?g0.expr=wattier%3Atrial_power_watts%3Asum&g0.tab=0\n"
        f"  alerts      {alerts_page(url)}\n"
        f"{exporters}\n"
        "In Grafana 11.6 or newer: add a Prometheus datasource with the first URL and import dashboards/json/*.json.\n"
        "Ctrl-C stops everything.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
