"""What NVML says of a real GPU at rest, under a matrix product and under memory traffic: counter against samples.

usage: python tests/measure_gpu.py [SECONDS]    for docs/measured/; needs an NVIDIA GPU and changes none of its settings
"""

from __future__ import annotations

import sys
import threading
import time

import pynvml
import torch

from wattier_telemetry import EnergyMeter, SourceUnavailable, open_source
from wattier_telemetry.integral import PowerIntegral, trapezoid
from wattier_telemetry.source import PowerSource

REST_SECONDS = 3.0


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    try:
        source = open_source("nvml")
    except SourceUnavailable as reason:
        print(f"measure_gpu: {reason}", file=sys.stderr)
        return 2
    gpu = source.devices()[0]
    print(f"{gpu.name}, driver {pynvml.nvmlSystemGetDriverVersion()}, torch {torch.__version__}, {seconds:g} s each")
    print(f"counter moves every {1e3 * refresh_seconds(source):.0f} ms; {reading_cost(source)}")
    print(f"{'load':<14} {'counter J':>10} {'bound J':>9} {'sampled J':>10} {'ratio':>6} {'mean W':>7}  throttled")
    on = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, work in (("idle", None), ("matmul", matmul(on)), ("memory-bound", copy(on))):
        time.sleep(REST_SECONDS)
        measure(name, source, seconds, work, on)
    source.close()
    return 0


def matmul(on: torch.device):
    """A product of matrices that fills the arithmetic units."""
    n, kind = (8192, torch.bfloat16) if on.type == "cuda" else (1024, torch.float32)
    a = torch.randn(n, n, device=on, dtype=kind)
    return lambda: torch.mm(a, a)


def copy(on: torch.device):
    """A copy that fills the memory bus: 2 GiB to and fro."""
    a = torch.empty(2**29 if on.type == "cuda" else 2**24, device=on)
    b = torch.empty_like(a)
    return lambda: b.copy_(a)


def measure(name, source: PowerSource, seconds: float, work, on: torch.device) -> None:
    synchronize = torch.cuda.synchronize if on.type == "cuda" else None
    sampled, done = PowerIntegral(), threading.Event()
    thread = threading.Thread(target=sample, args=(source, sampled, done))
    with EnergyMeter(source, synchronize=synchronize) as meter:
        thread.start()
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            if work is None:
                time.sleep(0.1)
                continue
            for _ in range(10):
                work()
            if synchronize is not None:
                synchronize()
        done.set()
        thread.join()
    report = meter.report
    share = report.shares[0]
    half = (share.joules_high - share.joules_low) / 2
    throttled = ", ".join(f"{reason} {held:.1f} s" for reason, held in report.throttled_seconds.items()) or "-"
    print(
        f"{name:<14} {share.joules:10.1f} {half:9.1f} {sampled.joules:10.1f} {share.joules / sampled.joules:6.3f} "
        f"{share.joules / share.seconds:7.1f}  {throttled}"
    )
    for warning in report.warnings:
        print(f"{'':<14} {warning}")


def sample(source: PowerSource, total: PowerIntegral, done: threading.Event) -> None:
    """Add up instantaneous power, sampled every 20 ms with its real times."""
    device, last = source.devices()[0], None
    while True:
        now = time.monotonic(), source.read_energy(device)
        if last is not None:
            total.add(trapezoid(last, now))
        if done.is_set():
            return
        last = now
        done.wait(0.02)


def refresh_seconds(source: PowerSource) -> float:
    """Mean time between two movements of the counter, over two seconds of looking."""
    device, moves, last = source.devices()[0], [], None
    ends = time.monotonic() + 2.0
    while time.monotonic() < ends:
        joules = source.read_energy(device).energy_joules
        if joules != last:
            moves.append(time.monotonic())
            last = joules
    return (moves[-1] - moves[1]) / max(1, len(moves) - 2) if len(moves) > 2 else float("nan")


def reading_cost(source: PowerSource) -> str:
    device, parts = source.devices()[0], []
    for name, read in (("read", source.read), ("read_energy", source.read_energy)):
        begin = time.perf_counter()
        for _ in range(100):
            read(device)
        parts.append(f"{name} {1e4 * (time.perf_counter() - begin):.0f} us")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
