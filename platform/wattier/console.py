"""What a person sees while a run works: all printing is here. Rich in a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group, JustifyMethod
from rich.live import Live
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from wattier.budget import Budget
from wattier.checkpoints import removed_info
from wattier.config import RunConfig
from wattier.departure import LEFT_RESULT, left_trials
from wattier.funnel import stage_end, stage_names
from wattier.ledger import LedgerInfo, ledger_info
from wattier.records import TrialResult
from wattier.rundir import FULL_STAGE, RunDir, read_json_lines
from wattier.select_console import print_tiers
from wattier.units import UNKNOWN, format_bytes, format_joules, format_loss, format_ratio, format_seconds, three_digits
from wattier.views import projection_info

if TYPE_CHECKING:
    from wattier.departure import Departure
    from wattier.plan import PlanInfo
    from wattier_gnn.pool import Progress

LIVE_REFRESH_SECONDS = 1.0
HOW_IT_ENDED = {
    "early_stop": "converged: no significant improvement any more",
    "epochs": "all epochs used: it may not have converged",
}
PLAIN_PROGRESS_SECONDS = 10.0
PLAIN_WIDTH = 150  # of tables that go to a file or a pipe
COLUMNS_OF_LEDGER: tuple[tuple[str, JustifyMethod], ...] = (
    ("phase", "left"), ("energy", "right"), ("method", "left"), ("trials", "right"),
)  # fmt: skip


class RunConsole:
    """Progress of a run. Use as a context manager: in a terminal it shows the running trials live."""

    def __init__(self, run: RunDir, console: Console | None = None, *, quiet: bool = False) -> None:
        self.run = run
        self.console = console or make_console(quiet=quiet)
        self._started = time.monotonic()
        self._live: Live | None = None
        self._status = Text()
        self._ended: set[Path] = set()
        self._plain = _Seldom(self.say)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(console=self.console, transient=True, auto_refresh=False)
            self._live.start()
            self._thread = threading.Thread(target=self._refresh, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._live is not None:
            self._live.stop()

    def phase(self, name: str) -> None:
        """A phase begins."""
        self.console.print(Text(f"[{self._clock()}] {name}", style="bold"))

    def say(self, text: str) -> None:
        """One line of progress."""
        self.console.print(Text(f"[{self._clock()}]   {text}"))

    def progress(self, done: Progress) -> None:
        """How far the reading of files is: a line that changes in a terminal, a line now and then elsewhere."""
        if self._live is None:
            self._plain.tell(done)
        else:
            self._status = Text("" if done.files_done == done.files else progress_text(done))

    def trial(self, result: TrialResult, done: int, total: int) -> None:
        """A trial ended."""
        loss = "loss unknown" if result.val_loss is None else f"loss {format_loss(result.val_loss)}"
        energy = f"{format_joules(result.energy_joules)} ({result.energy.method or 'unknown'})"
        error = f", {result.error}" if result.error else ""
        if result.goes_on:
            error += f" ({result.ended}): saved, and goes on with the next command"
        elif result.fidelity.stage == FULL_STAGE and result.ended in HOW_IT_ENDED:
            error += f", {HOW_IT_ENDED[result.ended]}"
        if result.throttled:
            error += f", throttled {format_ratio(result.throttled_ratio)} of the time: not comparable"
        self.say(
            f"{result.fidelity.stage} {done}/{total}: {result.trial_id} {result.status} after {result.epochs_done} "
            f"epochs, {loss}, {energy}{error}"
        )

    def _clock(self) -> str:
        seconds = int(time.monotonic() - self._started)
        return f"{seconds // 60:02d}:{seconds % 60:02d}"

    def _refresh(self) -> None:
        while not self._stop.wait(LIVE_REFRESH_SECONDS):
            if self._live is not None:
                self._live.update(Group(running_table(self.run.path, self._ended), self._status), refresh=True)


class IngestConsole:
    """Progress of an ingestion that belongs to no run. Use as a context manager: in a terminal it shows a bar."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or make_console()
        self._bar: Bar | None = None
        self._plain = _Seldom(self.say)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bar = Bar(BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn(),
                            console=self.console, transient=True)  # fmt: skip
            self._task = self._bar.add_task("reading", total=None)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """One line of progress."""
        self.console.print(Text(text))

    def progress(self, done: Progress) -> None:
        """How far the reading of files is."""
        if self._bar is None:
            self._plain.tell(done)
        else:
            self._bar.update(self._task, completed=done.bytes_done, total=done.bytes, description=progress_text(done))


def words_of_departure(departure: Departure) -> list[str]:
    """When this command leaves, and who says so; nothing where nobody has set a limit."""
    if departure.limit is None or departure.leaves_at is None:
        return []
    left = format_seconds(max(0.0, departure.leaves_at - time.time()))
    at = time.strftime("%H:%M:%S", time.localtime(departure.limit.at_seconds))
    return [f"time is up at {at} ({departure.limit.source}): trials save and leave in {left}"]


def progress_text(done: Progress) -> str:
    """How far the reading of files is, in words."""
    return f"{done.files_done} of {done.files} files, {done.structures_read:,} structures read"


class _Seldom:
    """Says how far an ingestion is, but not all the time."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._last = say, time.monotonic()

    def tell(self, done: Progress) -> None:
        now = time.monotonic()
        if now - self._last >= PLAIN_PROGRESS_SECONDS:
            self._last = now
            self._say(progress_text(done))


def make_console(*, quiet: bool = False) -> Console:
    """A terminal's own width; a fixed one where there is no terminal."""
    console = Console(highlight=False, quiet=quiet)
    return console if console.is_terminal else Console(highlight=False, quiet=quiet, width=PLAIN_WIDTH)


def running_table(path: Path, ended: set[Path] | None = None) -> Table:
    """The trials that have a folder but no result yet, with their last epoch.

    ended: folders that have one, kept from one call to the next: thousands need not be looked into each second.
    """
    ended = set() if ended is None else ended
    table = Table(box=None, padding=(0, 2))
    for name in ("running", "epoch", "val loss", "energy so far"):
        table.add_column(name, justify="left" if name == "running" else "right")
    for folder in sorted((path / "trials").glob("*/*")):
        if folder in ended or not (folder / "trial.json").exists() or (folder / LEFT_RESULT).exists():
            continue
        if (folder / "result.json").exists():
            ended.add(folder)
            continue
        lines = read_json_lines(folder / "epochs.jsonl")
        last: dict[str, Any] = lines[-1] if lines else {}
        loss = last.get("val_loss")
        table.add_row(
            f"{folder.parent.name}/{folder.name}",
            str(last.get("epoch", 0)),
            _loss(loss),
            format_joules(last.get("energy_joules")),
        )
    return table


def _loss(value: float | None) -> str:
    return "" if value is None else format_loss(value)


def print_ledger(run: RunDir, console: Console) -> None:
    """Joules by phase, each with its method."""
    console.print(ledger_table(ledger_info(run)))


def ledger_table(info: LedgerInfo) -> Table:
    """The ledger as a table."""
    table = Table(title="Energy by phase", title_justify="left", title_style="bold")
    for name, justify in COLUMNS_OF_LEDGER:
        table.add_column(name, justify=justify)
    for phase in info.phases:
        table.add_row(phase.phase, format_joules(phase.joules), phase.method or "unknown", str(phase.trials or ""))
    table.add_section()
    table.add_row("total", format_joules(info.total.joules), info.total.method or "unknown", str(info.total.trials))
    return table


def print_plan(info: PlanInfo, console: Console) -> None:
    """What is left of a run, and what it will cost."""
    table = Table(title="What is left to do", title_justify="left", title_style="bold")
    for name in ("phase", "trials", "each trained on", "energy", "between", "device-hours", "disk"):
        table.add_column(name, justify="left" if name in ("phase", "each trained on") else "right")
    for row in (*info.phases, info.total):
        if row is info.total:
            table.add_section()
        structures = "all" if row.fidelity.structures is None else f"{row.fidelity.structures:,}"
        ranks = f", {row.fidelity.ranks} ranks" if row.fidelity.ranks > 1 else ""
        each = f"{structures} structures, {row.fidelity.epochs} epochs{ranks}" if row.fidelity.epochs else ""
        known = row.joules is not None
        between = f"{format_joules(row.joules_low)} and {format_joules(row.joules_high)}" if known else ""
        hours = three_digits(row.device_hours) if row.device_hours is not None else UNKNOWN
        disk = UNKNOWN if row.disk_bytes is None else format_bytes(row.disk_bytes)
        trials = f"{row.trials:,}"
        table.add_row(row.phase, trials, each, format_joules(row.joules), between, hours, disk)
    console.print(table)
    bounds = " Two trials in three should lie between the bounds." if info.total.joules else ""
    console.print(Text(f"Rests on: {info.basis}.{bounds}"))
    if info.total.stops and info.total.trials and info.total.joules:
        console.print(Text("No trial stopped early: schedulers and early stopping make it less."))
    for name, limit in (("search.budget", info.search_joules), ("full_training.budget", info.full_joules)):
        if limit is not None:
            console.print(Text(f"{name}: at most {format_joules(limit)}, over restarts."))


def _spent(run: RunDir, config: RunConfig) -> str:
    budget, spent = config.search.budget, Budget(config.search.budget, run, stage_names(config)).spent()
    parts = []
    if budget is not None and budget.energy_joules is not None:
        parts.append(f"{format_joules(spent.joules)} of {format_joules(budget.energy_joules)}")
    if budget is not None and budget.seconds is not None:
        parts.append(f"{format_seconds(spent.seconds)} of {format_seconds(budget.seconds)}")
    if budget is not None and budget.trials is not None:
        parts.append(f"{spent.trials} of {budget.trials} trials")
    return f"{', '.join(parts)} spent" if parts else "no limit"


def _files_of(run: RunDir, config: RunConfig) -> list[tuple[str, Path]]:
    """What a run leaves behind; of somebody else's model that is the report alone."""
    files = [("evaluation", run.evaluation_path), ("report", run.report_path), ("release", run.release_path)]
    return files if config.trial is None else files[1:2]


def print_status(run: RunDir, console: Console) -> None:
    """Where a run stands."""
    config = run.config()
    console.print(Text(f"{config.name} in {run.path}", style="bold"))
    for stage in config.search.stages:
        results = run.trials(stage.name)
        counts = {status: sum(r.status == status for r in results) for status in ("complete", "pruned", "failed")}
        counts["throttled"] = sum(result.throttled for result in results)
        known = ", ".join(f"{n} {status}" for status, n in counts.items() if n) or "nothing yet"
        console.print(Text(f"  search:{stage.name}: {len(results)}/{stage.trials} trials, {known}"))
        if (end := stage_end(run, stage.name)) is not None:
            console.print(Text(f"    {end['missing']} trials were not started: {end['reason']}"))
    for row in projection_info(run):
        error = format_ratio(row.median_error_ratio)
        console.print(Text(f"  projected joules of {row.stage}: half of {row.trials} off by less than {error}"))
    if config.search.budget is not None:
        console.print(Text(f"  search budget: {_spent(run, config)}"))
    selection = run.selection()
    console.print(Text(f"  selection: {', '.join(selection.picked) if selection else 'not yet'}"))
    if config.trial is None:
        full = run.trials(FULL_STAGE)
        console.print(Text(f"  full training: {len(full)}/{len(selection.picked) if selection else '?'} members"))
    for of_stage, trial_id, ended in left_trials(run):
        console.print(Text(f"    {of_stage}/{trial_id} left ({ended}) and goes on with the next command"))
    removed = removed_info(run)
    if removed.files:
        console.print(Text(f"  checkpoints removed: {removed.files} files, {format_bytes(removed.bytes)}"))
    for name, path in _files_of(run, config):
        console.print(Text(f"  {name}: {path if path.exists() else 'not yet'}"))
    running = running_table(run.path)
    if running.row_count:
        console.print(running)
    print_tiers(run, console)
    print_ledger(run, console)
