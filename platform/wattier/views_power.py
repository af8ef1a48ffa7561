"""Power and memory over time, from the traces that trials leave; what was not measured stays a gap."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from wattier.power_trace import SUFFIX
from wattier.rundir import FULL_STAGE, RunDir
from wattier.views import TrialRow
from wattier_telemetry.recording.trace import TraceError, read_trace
from wattier_telemetry.throttling import CLOCK_SETTINGS

MOST_TRIALS = 24  # with a figure of their own
MOST_MOMENTS, FEWEST_MOMENTS = 1500, 60  # of a figure, shared by its lines; of one line
LONG_STEPS = 4.0  # times the usual step between two lines: nobody looked for so long
LEAST_THROTTLED = 0.1  # of a step


Moment = tuple[float, float | None, float | None, str | None]  # seconds, watts, bytes, throttled by


class PowerLine(NamedTuple):
    """One device under one rank of one attempt, [moments] each.

    seconds: since the trial's first moment. watts: mean since the moment before, None = a gap, not 0.
    memory_bytes: held by the process. throttled: by what in that step, '' = by nothing, None = the device cannot say.
    """

    device: str
    domain: str
    rank: str
    seconds: tuple[float, ...]
    watts: tuple[float | None, ...]
    memory_bytes: tuple[float | None, ...]
    throttled: tuple[str | None, ...]


class TrialPower(NamedTuple):
    """A trial over time, and in figures; None = nobody knows."""

    stage: str
    trial_id: str
    tier: str | None
    lines: tuple[PowerLine, ...]
    seconds: float
    mean_watts: float | None
    highest_watts: float | None
    gap_seconds: float
    throttled_seconds: dict[str, float]
    peak_memory_bytes: float | None


class PowerInfo(NamedTuple):
    """Picked trials in full training, or in the search where none was trained; then those whose devices were throttled.

    without: trials of these that left no trace. unreadable: what is wrong with files that could not be read.
    """

    trials: tuple[TrialPower, ...]
    without: int
    unreadable: tuple[str, ...]
    not_shown: int


def power_info(run: RunDir, rows: Sequence[TrialRow]) -> PowerInfo:
    """The traces worth a figure."""
    full = [row for row in rows if row.stage == FULL_STAGE]
    wanted = full or [row for row in rows if row.tier is not None]
    wanted += [row for row in rows if row.throttled and row not in wanted]
    if not wanted:
        wanted = [row for row in rows if row.energy_joules is not None][-MOST_TRIALS:]
    found, unreadable, without = [], [], 0
    for row in wanted[:MOST_TRIALS]:
        lines, problems = _lines(run.trial_folder(row.stage, row.trial_id))
        unreadable += problems
        if lines:
            found.append(_trial(row, lines))
        else:
            without += 1
    return PowerInfo(tuple(found), without, tuple(unreadable), max(0, len(wanted) - MOST_TRIALS))


def _lines(folder: Path) -> tuple[list[PowerLine], list[str]]:
    """The lines of a trial, each [moments], seconds since 1970."""
    lines, problems = [], []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            lines += _read(path)
        except TraceError as error:
            if path.stat().st_size and "the trace is empty" not in str(error):
                problems.append(str(error))
    start = min((line.seconds[0] for line in lines), default=0.0)
    return [line._replace(seconds=tuple(t - start for t in line.seconds)) for line in lines], problems


def _read(path: Path) -> list[PowerLine]:
    columns: dict[str, list[Moment]] = {}
    domains: dict[str, str] = {}
    seen: dict[str, dict[str, float]] = {}
    for sample in read_trace(path, warn=lambda _: None):
        uuid, reading = sample.device.uuid, sample.reading
        domains[uuid] = sample.device.domain
        before = seen.get(uuid, {})
        now = {k: v for k, v in (reading.throttle_seconds or {}).items() if k not in CLOCK_SETTINGS}
        rows = columns.setdefault(uuid, [])
        step = reading.time_seconds - rows[-1][0] if rows else math.inf
        acting = [reason for reason, total in now.items() if total - before.get(reason, 0.0) > LEAST_THROTTLED * step]
        seen[uuid] = now
        told = None if reading.throttle_seconds is None else ", ".join(sorted(acting))
        rows.append((reading.time_seconds, reading.power_watts, reading.memory_used_bytes, told))
    rank = path.name.removesuffix(SUFFIX)
    return [_with_gaps(uuid, domains[uuid], rank, rows) for uuid, rows in columns.items() if len(rows) > 1]


def _with_gaps(uuid: str, domain: str, rank: str, rows: list[Moment]) -> PowerLine:
    """A step that is much longer than the others was not looked at: its mean is known, its course is not."""
    steps = [b[0] - a[0] for a, b in itertools.pairwise(rows)]
    longest = LONG_STEPS * statistics.median(steps)
    kept = rows[:1]
    for step, row in zip(steps, rows[1:], strict=True):
        if step > longest and row[1] is not None:
            kept.append((row[0] - step / 2, None, None, None))
        kept.append(row)
    times, watts, memory, throttled = zip(*kept, strict=True)
    return PowerLine(uuid, domain, rank, times, watts, memory, throttled)


def _thinned(line: PowerLine, lines: int) -> PowerLine:
    """Evenly so many moments as its figure has room for; gaps and throttled ones go last."""
    most = max(FEWEST_MOMENTS, MOST_MOMENTS // lines)
    count = len(line.seconds)
    if count <= most:
        return line
    special = [i for i in range(count) if line.watts[i] is None or line.throttled[i]]
    special = special[:: max(1, -(-len(special) // (most // 2)))]
    kept = sorted({*range(0, count, -(-count // (most // 2))), count - 1, *special})
    return line._replace(
        seconds=tuple(line.seconds[i] for i in kept),
        watts=tuple(line.watts[i] for i in kept),
        memory_bytes=tuple(line.memory_bytes[i] for i in kept),
        throttled=tuple(line.throttled[i] for i in kept),
    )


def _trial(row: TrialRow, lines: list[PowerLine]) -> TrialPower:
    gaps, highest, memory = 0.0, [], []
    throttled: dict[str, float] = {}
    for line in lines:
        for i in range(1, len(line.seconds)):
            step = line.seconds[i] - line.seconds[i - 1]
            gaps += step if line.watts[i] is None else 0.0
            for reason in filter(None, (line.throttled[i] or "").split(", ")):
                throttled[reason] = throttled.get(reason, 0.0) + step
        highest += [watts for watts in line.watts if watts is not None]
        memory += [size for size in line.memory_bytes if size is not None]
    return TrialPower(
        stage=row.stage,
        trial_id=row.trial_id,
        tier=row.tier,
        lines=tuple(_thinned(line, len(lines)) for line in lines),
        seconds=max(line.seconds[-1] for line in lines),
        mean_watts=row.mean_watts,
        highest_watts=max(highest, default=None),
        gap_seconds=gaps,
        throttled_seconds=throttled,
        peak_memory_bytes=row.peak_memory_bytes or max(memory, default=None),
    )
