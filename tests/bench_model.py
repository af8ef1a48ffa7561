"""The model's speed and memory: ours against the plain formulation with the same weights. Nothing is gated on it.

A step is forward, backward and AdamW. Variants take turns, so that a busy machine slows them alike, and where one
thread works its CPU time is what counts; medians and ratios are printed, each step's products as a share of the fastest
product this machine was seen to make in the same type, and errors against float64.

usage: make bench
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).parent / "gnn"))
from plain_egnn import PlainEGNN

from wattier_gnn import ops
from wattier_gnn.batch import Batch
from wattier_gnn.ingest import ingest
from wattier_gnn.model import ModelConfig, build_model
from wattier_gnn.sample import SAMPLE_SOURCES, sample_path
from wattier_gnn.store import Store
from wattier_telemetry import EnergyMeter, SourceUnavailable, open_source

SEED, REPEATS, EDGES, CUTOFF_ANGSTROM = 0, 4, 2500, 5.0
LARGE_EDGES = 1500  # of the memory runs
SIZES = {"SMALL": (50, 3), "MEDIUM": (500, 6), "LARGE": (2000, 6)}
MEMORY_RUNS = {
    "everything kept": {},
    "checkpointing": {"activation_checkpointing": True},
    "edge_chunk 256": {"edge_chunk": 256},
    "conservative, everything kept": {"forces": "conservative"},
    "conservative, edge_chunk 256": {"forces": "conservative", "edge_chunk": 256},
}
Step = Callable[[], object]


def main() -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if len(sys.argv) > 1:
        one_memory_run(Path(sys.argv[1]), sys.argv[2])
        return
    versions = f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    print(f"{versions}, seed {SEED}, {processor()}; load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        store = sample_store(Path(folder) / "store")
        device = torch.device("cpu")
        peaks = matmul_peaks(device)
        for source in ("qm7x", "mptrj"):
            batch = batch_of(store, [source], EDGES)
            for forces in ("vector", "conservative"):
                table(f"MEDIUM, {source}, {forces}", store, batch, "MEDIUM", forces, device, peaks)
        if sys.platform == "linux":
            memory(Path(folder) / "store", store)
        if torch.cuda.is_available():
            on_gpu(store)


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    wide = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f" {name}" in flags]
    return f"{names[0] if names else platform.machine()} ({', '.join(wide[:2])})"


def sample_store(folder: Path) -> Store:
    return ingest(
        {source: sample_path(source) for source in SAMPLE_SOURCES}, folder, cutoff_angstrom=CUTOFF_ANGSTROM,
        max_force_ev_per_angstrom=100.0, on_bad="skip", split={"train": 0.8, "val": 0.1, "test": 0.1}, seed=SEED,
        say=lambda _: None,
    )  # fmt: skip


def batch_of(store: Store, sources: list[str], n_edges: int) -> Batch:
    """As many random structures of some sources as have so many edges."""
    wanted = np.isin(np.asarray(store.source_index), [store.sources.index(name) for name in sources])
    order = np.random.default_rng(SEED).permutation(np.flatnonzero(wanted))
    low, high = 1, len(order)
    while low < high:
        middle = (low + high) // 2
        if store.batch(order[:middle]).edge_index.shape[1] < n_edges:
            low = middle + 1
        else:
            high = middle
    return store.batch(order[:low])


def matmul_peaks(device: torch.device) -> dict[torch.dtype, float]:
    """FLOP/s of the fastest product of each type, whichever library makes it."""
    peaks = {}
    for dtype in (torch.float32, torch.bfloat16):
        best = 0.0
        for rows, width in ((4096, 512), (2048, 2048)) if device.type == "cpu" else ((8192, 8192),):
            x = torch.randn(rows, width, device=device, dtype=dtype)
            weight = torch.randn(width, width, device=device, dtype=dtype)
            for product in (F.linear, ops.linear):
                for _ in range(6):
                    started = now(device)
                    product(x, weight)
                    best = max(best, 2 * rows * width**2 / (now(device) - started))
        peaks[dtype] = best
        print(f"{device.type} matmul peak {str(dtype).removeprefix('torch.')}: {best / 1e9:.0f} GFLOP/s")
    return peaks


def table(
    title: str,
    store: Store,
    batch: Batch,
    size: str,
    forces: str,
    device: torch.device,
    peaks: dict[torch.dtype, float],
) -> None:
    """Plain float32, ours in float32 (on a CPU also with the plain one's library), ours in bfloat16."""
    config = config_of(store, size, forces)
    batch = batch.to(device)
    print(f"\n{title}: {len(batch.n_atoms)} structures, {len(batch.numbers)} atoms, {batch.edge_index.shape[1]} edges")
    plain = PlainEGNN(build_model(config, SEED)).to(device)
    fast = build_model(config, SEED).to(device)
    rounded = build_model(replace(config, precision="bfloat16"), SEED).to(device)
    exact = predicted(build_model(config, SEED).double().to(device), batch.double())
    errors = {
        name: error(predicted(m, batch), exact) for name, m in (("plain", plain), ("fast", fast), ("bf16", rounded))
    }
    flops = {"plain": counted(plain, batch), "fast": counted(fast, batch)}
    runs: list[tuple[str, str, Step, torch.dtype, str]] = [
        ("plain, float32", "plain", stepper(plain, batch), torch.float32, "plain"),
        ("ours, float32", "fast", stepper(fast, batch), torch.float32, "fast"),
        ("ours, bfloat16", "fast", stepper(rounded, batch), torch.bfloat16, "bf16"),
    ]
    if device.type == "cpu":
        same_library = mock.patch.object(ops, "SMALLEST_ONE_DNN_PRODUCT", 2**62)
        runs.insert(
            1, ("ours, float32, without oneDNN", "fast", within(same_library, runs[1][2]), torch.float32, "fast")
        )
    seconds = alternate([(name, run) for name, _, run, _, _ in runs], device)
    slowest = statistics.median(seconds[runs[0][0]])
    for name, counts, run, dtype, which in runs:
        median = statistics.median(seconds[name])
        share = flops[counts] / median / peaks[dtype]
        joules = joules_a_step(run, device)
        price = "" if joules is None else f"{joules / len(batch.n_atoms):8.4f} J a structure"
        print(
            f"  {name:30s} {1e3 * median:9.1f} ms {slowest / median:6.2f}x {100 * share:5.0f} % of peak  "
            f"energy error {errors[which][0]:.1e}, force error {errors[which][1]:.1e}  {price}"
        )


def config_of(store: Store, size: str, forces: str) -> ModelConfig:
    hidden_dim, n_layers = SIZES[size]
    return ModelConfig(
        store.sources, tuple(store.meta["energy_scale_ev"]), store.meta["mean_neighbors"], CUTOFF_ANGSTROM, hidden_dim,
        n_layers, head_dim=hidden_dim, forces=forces,
    )  # fmt: skip


def predicted(model: nn.Module, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    prediction = model.eval()(batch)
    return tuple(t.detach().double().cpu().numpy() for t in (prediction.energy, prediction.forces))


def error(found: tuple[np.ndarray, ...], exact: tuple[np.ndarray, ...]) -> tuple[float, float]:
    """Root mean square difference over root mean square value, of energies and of force components."""
    return tuple(float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))) for a, b in zip(found, exact, strict=True))


def stepper(model: nn.Module, batch: Batch) -> Step:
    """One training step, ready to be taken."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> None:
        prediction = model.train()(batch)
        loss = (prediction.energy - batch.energy).abs().mean() + (prediction.forces - batch.forces).abs().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def within(context, step: Step) -> Step:
    def inside() -> None:
        with context:
            step()

    return inside


class Products(TorchDispatchMode):
    """Counts the FLOPs of matrix products, forward and backward alike."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def counted(model: nn.Module, batch: Batch) -> int:
    """FLOPs of the products in forward and backward, counted where torch makes them (oneDNN's are not)."""
    with mock.patch.object(ops, "SMALLEST_ONE_DNN_PRODUCT", 2**62), Products() as products:
        prediction = model.train()(batch)
        (prediction.energy.sum() + prediction.forces.square().sum()).backward()
    model.zero_grad(set_to_none=True)
    return products.flops


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def alternate(steps: list[tuple[str, Step]], device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step in turn; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name, _ in steps}
    for repeat in range(REPEATS + 1):
        for name, step in steps:
            started = now(device)
            step()
            if repeat:
                seconds[name].append(now(device) - started)
    return seconds


def joules_a_step(step: Step, device: torch.device, n_steps: int = 20) -> float | None:
    """What the GPU's own counter says of some steps; None where there is none."""
    if device.type != "cuda":
        return None
    try:
        source = open_source("nvml")
    except SourceUnavailable:
        return None
    try:
        with EnergyMeter(source, synchronize=torch.cuda.synchronize) as meter:
            for _ in range(n_steps):
                step()
        return meter.report.joules / n_steps
    finally:
        source.close()


def memory(folder: Path, store: Store) -> None:
    """Peak memory of a forward and backward pass of LARGE above that of its weights, each in a process of its own."""
    batch = batch_of(store, ["mptrj"], LARGE_EDGES)
    print(f"\nLARGE, mptrj, float32: {batch.edge_index.shape[1]} edges, forward and backward, no optimizer")
    for name in MEMORY_RUNS:
        command = [sys.executable, __file__, str(folder), name]
        # Freed memory goes back at once, or the peak would be that of the allocator.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        print(f"  {name:30s} {done.stdout.strip()}")


def one_memory_run(folder: Path, name: str) -> None:
    store = Store(folder)
    batch = batch_of(store, ["mptrj"], LARGE_EDGES)
    model = build_model(replace(config_of(store, "LARGE", "vector"), **MEMORY_RUNS[name]), SEED).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak from here on
    before, started = resident_mib("VmRSS"), time.process_time()
    prediction = model(batch)
    (prediction.energy.abs().mean() + prediction.forces.abs().mean()).backward()
    seconds = time.process_time() - started
    gradient = sum(float(p.grad.double().square().sum()) for p in model.parameters()) ** 0.5
    print(
        f"{resident_mib('VmHWM') - before:7.0f} MiB above {before:.0f} MiB, {seconds:5.1f} s, "
        f"gradient norm {gradient:.6g}"
    )


def resident_mib(key: str) -> float:
    """This process's memory as Linux tells it: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 2**10


def on_gpu(store: Store) -> None:
    """The three published sizes in both types."""
    device = torch.device("cuda")
    print(f"\n{torch.cuda.get_device_name(device)}")
    peaks = matmul_peaks(device)
    for size in SIZES:
        batch = batch_of(store, list(SAMPLE_SOURCES), 50_000 if size != "LARGE" else 20_000)
        for forces in ("vector", "conservative"):
            table(f"{size}, sample corpus, {forces}", store, batch, size, forces, device, peaks)


if __name__ == "__main__":
    main()
