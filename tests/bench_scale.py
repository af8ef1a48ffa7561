"""What the search itself costs: trials that do nothing but leave their result. Nothing is gated on it.

usage: make bench, or: python tests/bench_scale.py [--sizes 100 1000 5000] [--samplers random tpe] [--ray 300] ...

A search of n trials is measured at its end: the run directory is filled with n trials, as a killed run leaves it, and
the next ones run. So a slow sampler is measured at 5,000 trials without running 5,000 of its own. Wall times are of
this machine's file system too (every record is synced); CPU milliseconds are the driver's own.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import importlib.metadata
import io
import itertools
import json
import os
import platform
import pstats
import random
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import optuna
import psutil

from wattier.config import RunConfig, SearchSection
from wattier.funnel import run_search
from wattier.launch import InlineLauncher, Launcher
from wattier.optuna_sampler import distributions
from wattier.records import EpochRecord, Fidelity, TrialResult
from wattier.rundir import RunDir, append_json_line, write_json
from wattier.select import compare, select_trials, split_candidates
from wattier.space import typed_space
from wattier.trial_context import TrialContext
from wattier_telemetry import EnergyMeter, EnergyReport, Share, TrialRegistration, bill, open_source
from wattier_telemetry.journal import Journal

STAGE, EPOCHS, START_SECONDS = "only", 1, 1_760_000_000.0
MEASURED_TRIALS, MOST_SECONDS = 100, 45.0  # at each size
SPACE = {  # the published one
    "family": {"choices": ["egnn", "schnet", "pna"]},
    "n_layers": {"low": 2, "high": 6},
    "hidden_dim": {"low": 100, "high": 2000},
    "n_head_layers": {"low": 2, "high": 3},
    "head_dim": {"low": 300, "high": 1000},
    "batch_structures": {"low": 16, "high": 128},
}
T = TypeVar("T")
PACKAGES = ("optuna", "ray", "numpy")


class Enough(Exception):
    """The trials that were to be measured have run."""


def main() -> None:
    arguments = parsed()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    print(f"python {platform.python_version()}, {versions}, {os.cpu_count()} cores, {platform.machine()}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for sampler in arguments.samplers:
            for size in arguments.sizes:
                grown(Path(folder) / f"{sampler}-{size}", sampler, size, profile=arguments.profile)
        suggestions(Path(folder) / "ask", arguments.ask)
        if arguments.whole:
            whole(Path(folder) / "whole", arguments.whole)
        if arguments.readers:
            run = new_run(Path(folder) / "readers", "random", arguments.readers)
            fill(run, arguments.readers)
            describe(run, arguments.readers)
            readers(run)
        for ranks in arguments.ranks:
            many_ranks(ranks)
        meter(Path(folder) / "meter")
        if arguments.ray:
            on_ray(Path(folder) / "ray", arguments.ray)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = list(get_args(SearchSection.model_fields["sampler"].annotation))
    parser.add_argument("--sizes", type=int, nargs="*", default=[100, 1000, 5000], help="trials that are there already")
    parser.add_argument("--samplers", nargs="*", default=known, choices=known)
    parser.add_argument("--ask", type=int, nargs="*", default=[100, 500, 1000, 5000], help="trials of Optuna's study")
    parser.add_argument("--whole", type=int, default=5000, help="trials of a whole search, random; 0 = none")
    parser.add_argument("--readers", type=int, default=5000, help="trials of a run that commands read; 0 = none")
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 1024], help="ranks of a trial that is billed")
    parser.add_argument("--ray", type=int, default=300, help="trials of a whole search on Ray; 0 = none")
    parser.add_argument("--folder", type=Path, help="where runs are made and removed; default: the temporary folder")
    parser.add_argument("--profile", action="store_true", help="where the time of the measured trials goes")
    return parser.parse_args()


def nothing(context: TrialContext) -> TrialResult:
    """A trial that does nothing but leave its result."""
    result = made_result(context.config.name, context.spec.proposal.trial_id, context.spec.proposal.params)
    write_json(context.folder / "result.json", result.to_dict())
    return result


def made_result(run: str, trial_id: str, params: dict[str, Any]) -> TrialResult:
    """Loss falls and joules rise with the width, with noise; shares as one metered process leaves them."""
    noise = random.Random(trial_id)
    work = params["n_layers"] * params["hidden_dim"] ** 2 / 1e6 + params["head_dim"] / 1e4
    start, joules = START_SECONDS + 100 * noise.random(), 100 * work * (0.9 + 0.2 * noise.random())
    share = Share("GPU-0", "gpu", start, start + 60, 1.0, joules, "counter", 1.0, 0.99 * joules, 1.01 * joules)
    return TrialResult(
        run=run,
        trial_id=trial_id,
        params=params,
        fidelity=Fidelity(STAGE, None, EPOCHS, 1),
        status="complete",
        val_loss=0.05 + 0.1 / (0.1 + work) * (0.9 + 0.2 * noise.random()),
        val_by_source={},
        epochs_done=EPOCHS,
        structures_seen=1000,
        wall_seconds=60.0,
        energy=EnergyReport.of([share]),
        n_parameters=100_000,
        devices=("GPU-0",),
    )


def new_run(folder: Path, sampler: str, trials: int, launcher: str = "inline") -> RunDir:
    """A run of one stage with the published space."""
    config = {
        "name": "scale",
        "run_dir": str(folder),
        "launcher": launcher,
        "data": {"sources": {"ani1x": "sample"}},
        "search": {
            "sampler": sampler,
            "space": SPACE,
            "stages": [{"name": STAGE, "trials": trials, "epochs": EPOCHS, "reduction_factor": None}],
        },
        "resources": {"gpus_per_rank": 0},
    }
    return RunDir.create(RunConfig.model_validate(config))


def fill(run: RunDir, count: int) -> None:
    """What `count` finished trials leave: folders, notes, results, journals and rows. Nothing waits for the disk."""
    fsync, os.fsync = os.fsync, lambda _: None
    try:
        noise = random.Random(0)
        for index in range(count):
            trial_id = f"{STAGE}-{index:03d}"
            params = random_params(noise)
            result = made_result("scale", trial_id, params)
            folder = run.trial_folder(STAGE, trial_id)
            Journal(folder / "attempt1-rank0.energy.json").finish(result.energy)
            write_json(folder / "trial.json", {"trial_id": trial_id, "params": params})
            write_json(folder / "result.json", result.to_dict())
            record = EpochRecord(1, result.val_loss, result.val_loss, {}, 1000, 60.0, 1e-3, result.energy_joules)
            append_json_line(folder / "epochs.jsonl", record.to_dict())
            append_json_line(run.trials_path, result.to_dict())
    finally:
        os.fsync = fsync


def grown(folder: Path, sampler: str, size: int, *, profile: bool) -> None:
    """Milliseconds a trial at the end of a search, and how long a killed one takes to go on."""
    run = new_run(folder, sampler, size + MEASURED_TRIALS)
    fill(run, size)
    at: list[float] = []
    cpu: list[float] = []
    begun = time.perf_counter()

    def on_result(result: TrialResult) -> None:
        run.trials(result.fidelity.stage)  # as the listener of a run does, to say how many there are
        at.append(time.perf_counter())
        cpu.append(time.process_time())
        if len(at) >= MEASURED_TRIALS or at[-1] - begun > MOST_SECONDS:
            raise Enough

    with contextlib.suppress(Enough), profiled(profile):
        search(run, InlineLauncher(), on_result)
    wall = [1000 * (b - a) for a, b in itertools.pairwise(at)]
    used = 1000 * (cpu[-1] - cpu[0]) / max(1, len(wall))
    print(
        f"{sampler:8} at {size:5} trials: {statistics.median(wall):8.2f} ms a trial (median of {len(wall)}), "
        f"{used:8.2f} ms of it the driver's CPU; the first one {at[0] - begun:.2f} s after the start"
    )


def suggestions(folder: Path, sizes: list[int]) -> None:
    """Optuna's part alone: CPU milliseconds of one `ask` for the published space, in studies of two objectives."""
    space = distributions(typed_space(new_run(folder, "random", 1).config()))
    samplers: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
        "TPE": lambda: optuna.samplers.TPESampler(seed=0),
        "TPE, multivariate": lambda: optuna.samplers.TPESampler(seed=0, multivariate=True),
        "NSGA-II": lambda: optuna.samplers.NSGAIISampler(seed=0),
    }
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    for (name, sampler), size in itertools.product(samplers.items(), sizes):
        study, noise = optuna.create_study(directions=["minimize"] * 2, sampler=sampler()), random.Random(0)
        for index in range(size):
            params = random_params(noise)
            row = made_result("scale", str(index), params)
            values = [row.val_loss, row.energy_joules]
            study.add_trial(optuna.trial.create_trial(params=params, distributions=space, values=values))
        cpu = []
        for index in range(8):
            begun = time.process_time()
            trial = study.ask(space)
            cpu.append(1000 * (time.process_time() - begun))
            study.tell(trial, [0.1, 100.0 + index])
        print(f"ask of {name} in a study of {size}: {statistics.median(cpu):.1f} ms CPU")


def random_params(noise: random.Random) -> dict[str, Any]:
    """Any point of the space."""
    return {
        name: noise.choice(p["choices"]) if "choices" in p else noise.randint(p["low"], p["high"])
        for name, p in SPACE.items()
    }


def search(run: RunDir, launcher: Launcher, on_result: Callable[[TrialResult], None]) -> None:
    """What `wattier search` does once there are data."""
    run_search(run, run.config(), launcher, nothing, on_result)


@contextlib.contextmanager
def profiled(wanted: bool) -> Iterator[None]:
    """Print the dearest functions of the block."""
    if not wanted:
        yield
        return
    profile = cProfile.Profile()
    try:
        with profile:
            yield
    finally:
        text = io.StringIO()
        pstats.Stats(profile, stream=text).sort_stats("cumulative").print_stats(35)
        print(text.getvalue())


def whole(folder: Path, trials: int) -> None:
    """A search from its first trial to its last, and everything that reads such a run."""
    process = psutil.Process()
    run = new_run(folder, "random", trials)
    before = process.memory_info().rss
    at = [time.perf_counter()]

    def on_result(result: TrialResult) -> None:
        run.trials(result.fidelity.stage)
        at.append(time.perf_counter())

    cpu = time.process_time()
    search(run, InlineLauncher(), on_result)
    seconds, cpu = at[-1] - at[0], time.process_time() - cpu
    print(f"whole search of {trials} trials, random: {seconds:.1f} s, {1000 * seconds / trials:.2f} ms a trial, "
          f"{1000 * cpu / trials:.2f} ms of it CPU; "
          f"memory {before / 2**20:.0f} -> {process.memory_info().rss / 2**20:.0f} MiB")  # fmt: skip


def describe(run: RunDir, trials: int) -> None:
    """Files and bytes of a run directory."""
    files = [path for path in run.path.rglob("*") if path.is_file()]
    total, rows = sum(path.stat().st_size for path in files), run.trials_path.stat().st_size
    print(f"run directory: {len(files)} files, {total / 2**20:.1f} MiB, {len(files) / trials:.2f} files a trial; "
          f"trials.jsonl {rows / trials:.0f} B a trial")  # fmt: skip


def readers(run: RunDir) -> None:
    """Time of everything that reads a finished run; each in a process's first call, as a command does it."""
    from wattier import console, report, views
    from wattier.ledger import ledger_info

    config = run.config()
    trials = timed("trials()", lambda: RunDir.open(run.path).trials())
    timed(
        "the same search again, nothing to do", lambda: search(RunDir.open(run.path), InlineLauncher(), lambda _: None)
    )
    candidates, _ = split_candidates(trials, stage=STAGE)
    timed("compare: ranks, contributions", lambda: compare(candidates))
    chosen = timed(
        "select_trials", lambda: select_trials(trials, config.select, stage=STAGE, project=lambda t: t.energy_joules)
    )
    write_json(run.selection_path, chosen.to_dict())
    timed("ledger_info", lambda: ledger_info(RunDir.open(run.path)))
    timed("trials_info", lambda: views.trials_info(RunDir.open(run.path)))
    timed("pareto_info", lambda: views.pareto_info(RunDir.open(run.path)))
    timed("learning_curves_info", lambda: views.learning_curves_info(RunDir.open(run.path)))
    timed("report", lambda: report.write_report(RunDir.open(run.path)))
    timed("the live table of running trials", lambda: console.running_table(run.path))
    command = [sys.executable, "-m", "wattier", "status", str(run.path)]
    timed("wattier status, the whole command", lambda: subprocess.run(command, check=True, capture_output=True))


def timed(what: str, call: Callable[[], T]) -> T:
    """Call once, print seconds."""
    begun = time.perf_counter()
    answer = call()
    print(f"  {what:40} {time.perf_counter() - begun:7.2f} s")
    return answer


def many_ranks(ranks: int) -> None:
    """What the record of a trial of many ranks weighs, and what rank 0 pays each epoch to add up their journals."""
    start, shares = START_SECONDS, []
    for rank in range(ranks):
        shares.append(Share(f"GPU-{rank:036d}", "gpu", start + rank / 1e3, start + 600, 1.0, 1e5 + rank, "counter",
                            1.0, 9.9e4, 1.1e5, throttled_seconds={"power": 0.5}))  # fmt: skip
    row = {**made_result("scale", "only-000", {"n_layers": 2, "hidden_dim": 9, "head_dim": 9}).to_dict()}
    text = json.dumps({**row, "energy": EnergyReport.of(shares).to_dict()})
    begun = time.process_time()
    TrialResult.from_dict(json.loads(text))
    seconds = time.process_time() - begun
    tracemalloc.start()
    kept = TrialResult.from_dict(json.loads(text))
    in_memory, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"a row of {len(kept.energy.shares)} ranks: {len(text) / 2**10:.0f} KiB, "
          f"{1000 * seconds:.1f} ms CPU to read, {in_memory / 2**10:.0f} KiB in memory", end="; ")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for rank, share in enumerate(shares):
            Journal(Path(folder) / f"attempt1-rank{rank}.energy.json").write(EnergyReport.of([share]))
        begun = time.process_time()
        bill(Path(folder))
        print(f"{1000 * (time.process_time() - begun):.0f} ms CPU to add up their journals")


def meter(folder: Path) -> None:
    """What measuring costs a trial that does nothing, and a rank that runs."""
    source = open_source("estimated", rated_watts=10.0)

    def window(number: int) -> None:
        with EnergyMeter(source, journal=folder / f"attempt{number}-rank0.energy.json"):
            pass

    registration = TrialRegistration(run="scale", stage=STAGE, trial="only-000", rank=0, pid=os.getpid())

    def registered(_: int) -> None:
        registration.write(folder / "registry")
        registration.withdraw(folder / "registry")

    for what, call in (("a meter's window, opened and closed", window), ("a registration, made and gone", registered)):
        walls, begun = [], time.process_time()
        for number in range(50):
            before = time.perf_counter()
            call(number)
            walls.append(1000 * (time.perf_counter() - before))
        cpu = 1000 * (time.process_time() - begun) / len(walls)
        print(f"{what}: {statistics.median(walls):.1f} ms, {cpu:.1f} ms of it CPU")
    for interval, seldom in ((0.05, None), (0.05, 5.0), (1.0, 5.0)):
        path = folder / f"{interval}-{seldom}.energy.json"
        with EnergyMeter(source, journal=path, interval_seconds=interval, journal_seconds=seldom):
            begun, cpu_begun = time.perf_counter(), time.process_time()
            time.sleep(5)
            share = (time.process_time() - cpu_begun) / (time.perf_counter() - begun)
        print(f"a meter that reads every {interval} s and writes its journal every {seldom or interval} s: "
              f"{100 * share:.2f} % of a core")  # fmt: skip


def on_ray(folder: Path, trials: int) -> None:
    """Trials as Ray Tune functions on a private cluster of this machine."""
    from wattier.ray_backend import RayLauncher

    run = new_run(folder, "random", trials, launcher="ray")
    launcher, at = RayLauncher(), [time.perf_counter()]

    def on_result(result: TrialResult) -> None:
        at.append(time.perf_counter())

    process, cpu = psutil.Process(), time.process_time()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Tune has a line for each trial that reported nothing
            search(run, launcher, on_result)
    finally:
        launcher.close()
    half = len(at) // 2
    print(f"Ray, {trials} trials: the first after {at[1] - at[0]:.1f} s, then "
          f"{1000 * (at[half] - at[1]) / (half - 1):.1f} ms a trial in the first half, "
          f"{1000 * (at[-1] - at[half]) / (len(at) - 1 - half):.1f} in the second; the driver's CPU "
          f"{1000 * (time.process_time() - cpu) / trials:.1f} ms a trial, "
          f"{process.memory_info().rss / 2**20:.0f} MiB")  # fmt: skip


if __name__ == "__main__":
    main()
