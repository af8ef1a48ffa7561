"""``wattier bench power``: each named model size trains for a fixed time under the meter, one after the other.

<out>/store/                      the sample corpus, where no store was given
<out>/sizes/<size>/result.json    what was measured; there once the size is finished, and kept by the next command
<out>/sizes/<size>/trace.csv      power over time, as `wattier-telemetry record` writes it
<out>/power.json                  all results
<out>/power.html                  power over time side by side, and joules a structure
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from wattier.bench_records import SizePower, in_words
from wattier.bench_training import PARAMETER_BYTES, MemoryNeed, Progress, SizeTraining
from wattier.config import DataSection, TelemetrySection
from wattier.errors import UserError
from wattier.metering import check_source, metered
from wattier.model_sizes import Size
from wattier.outcome import reason_of
from wattier.peak_memory import peak_memory_bytes, reset_peak_memory
from wattier.prepare import recipe_of, source_paths
from wattier.rundir import decode, hold_lock, read_json, sweep_temporary_files, write_json
from wattier_gnn.ingest import ingest
from wattier_gnn.manifest import MANIFEST
from wattier_gnn.sample import SAMPLE_SOURCES
from wattier_telemetry import EnergyReport, TrialRegistration
from wattier_telemetry.recording.recorder import TraceWriter, record
from wattier_telemetry.source import PowerSource

RUN = STAGE = "power"  # under which the node's exporter shows the sizes; the trial is the size
TRACE_SECONDS = 0.1
REGISTER_SECONDS = 1.0


@dataclass(frozen=True)
class PowerPlan:
    """What is measured, and where it goes.

    Attributes:
        sizes: by name.
        out: folder to make, or to go on with.
        store: of training structures; None = the sample corpus, prepared in `out`.
        seconds: how long each size trains, s; a step that has begun is ended.
        batch_structures: structures of a step.
        telemetry: where joules come from.
    """

    sizes: Mapping[str, Size]
    out: Path
    store: Path | None
    seconds: float
    batch_structures: int
    telemetry: TelemetrySection

    def folder(self, name: str) -> Path:
        """Where a size's files lie."""
        return self.out / "sizes" / name


def measure_sizes(plan: PowerPlan, say: Callable[[str], None]) -> list[SizePower]:
    """Measure every size that is not finished yet; results in the order of the plan.

    Raises:
        UserError: the folder is in use, or holds a size that was measured with other settings.
        SourceUnavailable: the energy cannot be measured as was asked.
        DataError: the store cannot be used.
    """
    check_source(plan.telemetry)
    if plan.out.exists() and not plan.out.is_dir():
        raise UserError(f"--out: is {plan.out}, which is a file, but must be a folder. Give another one.")
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {plan.out} cannot be made ({error.strerror}). Give another one.") from error
    with hold_lock(plan.out / ".lock") as held:
        if not held:
            raise UserError(f"{plan.out}: another process measures there. Wait for it, or give another --out.")
        sweep_temporary_files(plan.out)
        store = plan.store or _sample_store(plan.out / "store", say)
        results = []
        for name, size in plan.sizes.items():
            results.append(_finished(plan, name, size) or _measured(plan, name, size, store, say))
            say(in_words(results[-1]))
        write_json(plan.out / "power.json", {"sizes": [result.to_dict() for result in results]})
        return results


def _finished(plan: PowerPlan, name: str, size: Size) -> SizePower | None:
    """A size that an earlier command has finished."""
    path = plan.folder(name) / "result.json"
    if not path.exists():
        return None
    result = decode(path, SizePower.from_dict, read_json(path))
    there, asked = result.settings, _settings(plan, size)
    for key in asked:
        if there.get(key) != asked[key]:
            raise UserError(
                f"{path}: was measured with {key} {there.get(key)}, but the command says {asked[key]}, and figures of "
                f"one folder must be comparable. Give another --out, or remove {path.parent}."
            )
    return result if result.status == "measured" else None  # memory may be free now


def _settings(plan: PowerPlan, size: Size) -> dict[str, Any]:
    """What makes a measurement another one."""
    return {
        "seconds": plan.seconds,
        "batch_structures": plan.batch_structures,
        "source": plan.telemetry.source,
        "rated_watts_per_core": plan.telemetry.rated_watts_per_core,
        "store": None if plan.store is None else str(plan.store.absolute()),
        "size": size.model_dump(mode="json"),
    }


def _measured(plan: PowerPlan, name: str, size: Size, store: Path, say: Callable[[str], None]) -> SizePower:
    """Train one size for its time, and leave its result."""
    folder = plan.folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    for left in (*folder.glob("*.energy.json"), folder / "trace.csv"):  # of a command that was stopped
        left.unlink(missing_ok=True)
    sweep_temporary_files(folder)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    reset_peak_memory(device)
    figures: dict[str, Any] = {}
    with SizeTraining(size, store, plan.batch_structures, device) as training:
        need, reason = MemoryNeed(PARAMETER_BYTES * training.n_parameters, None, None), None
        try:
            need = training.memory_need()
            if need.fits:
                say(f"{name}: {training.n_parameters:,} parameters, trains for {plan.seconds:g} s")
                training.prepare()
                figures = _trained(plan, name, folder, training)
        except (RuntimeError, MemoryError) as error:  # what was foretold is an estimate
            reason = reason_of(error)
            if "out of memory" not in reason.lower():
                raise
    result = SizePower(
        name=name,
        status="measured" if figures else "does_not_fit",
        n_parameters=training.n_parameters,
        settings=_settings(plan, size),
        hardware=hardware(device),
        started_at=started_at,
        needed_bytes=need.needed_bytes,
        available_bytes=need.available_bytes,
        reason=reason,
        **figures,
    )
    write_json(folder / "result.json", result.to_dict())
    return result


def _trained(plan: PowerPlan, name: str, folder: Path, training: SizeTraining) -> dict[str, Any]:
    """The figures of a training under the meter, with its trace beside it."""
    on_gpu = training.device.type == "cuda"
    with (
        metered(folder, name, plan.telemetry, on_gpu=on_gpu) as (meter, source),
        _traced(folder / "trace.csv", source),
        _registered(name, source) as tell,
    ):
        done = training.run(plan.seconds, lambda progress: tell(progress, meter.so_far))
        meter.close()  # before the trace's end is waited for
    report = meter.report
    low, high = report.stated_bounds_joules
    return {
        **{field.name: getattr(done, field.name) for field in fields(Progress)},
        "seconds": report.seconds,
        "joules": report.joules,
        "joules_low": low,
        "joules_high": high,
        "method": report.method,
        "coverage_ratio": report.coverage_ratio,
        "peak_memory_bytes": peak_memory_bytes(training.device),
        "warnings": report.warnings,
    }


@contextmanager
def _traced(path: Path, source: PowerSource) -> Iterator[None]:
    """Record the source into a file for the length of the block."""
    stop = threading.Event()
    with TraceWriter(path) as writer, ThreadPoolExecutor(1, thread_name_prefix="wattier-trace") as pool:
        recording = pool.submit(record, [source], writer, period_seconds=TRACE_SECONDS, stop=stop)
        try:
            yield
        finally:
            stop.set()
            recording.result()


Tell = Callable[[Progress, Callable[[], EnergyReport]], None]


@contextmanager
def _registered(name: str, source: PowerSource) -> Iterator[Tell]:
    """Make the size visible to the node's exporter, as a trial; yields how to tell it of progress."""
    fixed: dict[str, Any] = {
        "run": RUN,
        "stage": STAGE,
        "trial": name,
        "rank": 0,
        "pid": os.getpid(),
        "device_uuids": tuple(device.uuid for device in source.devices()),
    }
    first = TrialRegistration(**fixed)
    told_at = 0.0

    def tell(done: Progress, energy: Callable[[], EnergyReport]) -> None:
        nonlocal told_at
        if done.seconds - told_at < REGISTER_SECONDS:
            return
        told_at = done.seconds
        report = energy()
        speed = done.structures / max(done.seconds, 1e-9)
        TrialRegistration(
            **fixed, structures_per_second=speed, energy_joules=report.joules, method=report.method
        ).write()

    first.write()
    try:
        yield tell
    finally:
        first.withdraw()


def _sample_store(path: Path, say: Callable[[str], None]) -> Path:
    """The corpus that ships with Wattier, as a store."""
    if not (path / MANIFEST).exists():
        data = DataSection.model_validate({"sources": dict.fromkeys(SAMPLE_SOURCES, "sample"), "on_bad": "skip"})
        ingest(source_paths(data.sources), path, **recipe_of(data, 0), say=say)
    return path


def hardware(device: torch.device) -> str:
    """What the figures belong to."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{torch.get_num_threads()} threads of {_processor()}, torch {torch.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or os.uname().machine
