"""What telemetry costs, on 8 GPUs of a simulated NVML driver read through the real binding. Nothing is gated on it.

usage: make bench
"""

from __future__ import annotations

import concurrent.futures
import http.client
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent / "telemetry"))
from scenario import SimulatedDevice, write_scenario

from wattier_telemetry.exporter import ServeOptions, start
from wattier_telemetry.exporter.sampler import Sampler
from wattier_telemetry.sources.nvml import NvmlSource

GPUS, SCRAPERS, SCRAPES_PER_SECOND, SECONDS, READINGS = 8, 20, 5, 10, 1_000_000


class Times:
    """A sink that notes when samples came."""

    def __init__(self):
        self.at = []

    def add(self, time_seconds, points):
        self.at.append(time_seconds)

    def points(self):
        return []

    def close(self):
        pass


def main() -> None:
    print(f"python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}; {GPUS} simulated GPUs")
    with tempfile.TemporaryDirectory() as folder:
        simulate(Path(folder))
        source = NvmlSource()
        cost(source, "scraped alone", [])
        cost(source, "pushing", [Times()])
        for period in (1.0, 0.1, 0.01):
            jitter(source, period)
        scrapes(source, Path(folder))
        memory(source)


def simulate(folder: Path) -> None:
    """Build the simulated driver and make this process use it."""
    import ctypes

    import pynvml

    library = folder / "libnvidia-ml.so.1"
    code = Path(__file__).parent / "telemetry/drivers/nvml.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(code), "-lm"], check=True)
    pynvml.nvmlLib = ctypes.CDLL(str(library))
    os.environ["WATTIER_SCENARIO"] = str(folder / "scenario")
    write_scenario(folder / "scenario", *(SimulatedDevice(700, 100, 1.0) for _ in range(GPUS)))


def cost(source: NvmlSource, how: str, sinks: list[Times]) -> None:
    """CPU time of a sampler at 1 Hz, all metrics of all GPUs, idle turns of its threads included."""
    sampler = Sampler([source], period_seconds=1.0, sinks=sinks)
    sampler.start()
    time.sleep(2.0)
    begin, cpu = time.monotonic(), time.process_time()
    time.sleep(3 * SECONDS)
    share = (time.process_time() - cpu) / (time.monotonic() - begin)
    sampler.close()
    print(f"at 1 Hz, {how}: {share:.3%} of one core")


def jitter(source: NvmlSource, period: float) -> None:
    """How far the time between two samples is from the period, and how far the last one has drifted."""
    sink = Times()
    sampler = Sampler([source], period_seconds=period, sinks=[sink])
    sampler.start()
    time.sleep(max(SECONDS, 15 * period))
    sampler.close()
    late = [abs(b - a - period) for a, b in zip(sink.at, sink.at[1:], strict=False)]
    p50, p99 = statistics.median(late), statistics.quantiles(late, n=100)[98]
    drift = (sink.at[-1] - sink.at[0]) / period - round((sink.at[-1] - sink.at[0]) / period)
    missing = round((sink.at[-1] - sink.at[0]) / period) + 1 - len(sink.at)
    print(
        f"period {period:g} s: jitter p50 {1e3 * p50:.2f} ms, p99 {1e3 * p99:.2f} ms; "
        f"drift {1e3 * drift * period:+.2f} ms, {missing} of {len(sink.at) + missing} samples skipped"
    )


def scrapes(source: NvmlSource, folder: Path) -> None:
    """Latency of scrapes that come from another process, many at a time."""
    exporter = start(ServeOptions(sources=(source,), port=0, registry=folder / "registry", names="omnistat"))
    try:
        code = "import sys, bench_telemetry as b; b.scrape_all(int(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", code, str(exporter.port)], check=True, cwd=Path(__file__).parent)
    finally:
        exporter.close()


def scrape_all(port: int) -> None:
    """Scrape from all scrapers at once, in the process that waits for the answers."""

    def scrape(number: int) -> list[float]:
        seconds, due = [], time.monotonic() + number / SCRAPERS / SCRAPES_PER_SECOND
        for _ in range(SECONDS * SCRAPES_PER_SECOND):
            time.sleep(max(0.0, due - time.monotonic()))
            due += 1 / SCRAPES_PER_SECOND
            begin = time.monotonic()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/metrics")
            body = connection.getresponse().read()
            seconds.append(time.monotonic() - begin)
            connection.close()
        assert b"wattier_power_watts" in body
        return seconds

    with concurrent.futures.ThreadPoolExecutor(SCRAPERS) as pool:
        seconds = sorted(second for some in pool.map(scrape, range(SCRAPERS)) for second in some)
    print(
        f"{SCRAPERS} scrapers, {SCRAPES_PER_SECOND} scrapes a second each: "
        f"p50 {1e3 * seconds[len(seconds) // 2]:.1f} ms, p99 {1e3 * seconds[int(0.99 * len(seconds))]:.1f} ms"
    )


def memory(source: NvmlSource) -> None:
    """Resident memory while a million readings are booked, as fast as they can be."""
    sink = Times()
    sampler = Sampler([source], sinks=[sink])
    (lane,) = sampler._lanes
    process = psutil.Process()
    shown, cpu = [], time.process_time()
    for n in range(READINGS // GPUS):
        lane.started_at = time.monotonic()
        lane._sample(set(), set(), push=True)
        sink.at.clear()
        if n % (READINGS // GPUS // 4) == READINGS // GPUS // 100:
            shown.append(process.memory_info().rss)
    shown.append(process.memory_info().rss)
    sampler._roster.close()
    print(f"one sample after the other: {1e3 * (time.process_time() - cpu) / (READINGS // GPUS):.2f} ms of CPU each")
    print(f"RSS over {READINGS} readings: " + " -> ".join(f"{rss / 2**20:.1f} MiB" for rss in shown))


if __name__ == "__main__":
    main()
