"""What a person sees of a selection: the tiers in a narrow table, and under it a sentence for each trial."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from wattier.records import NearMiss, Pick, Selection
from wattier.rundir import RunDir
from wattier.units import format_joules, format_loss, format_ratio
from wattier.views import PickRow, selection_info

THROTTLED_MARK, PARTLY_MARK = "*", "†"
THROTTLED_LINE = (
    "* throttled: its devices' clocks were held down for more than telemetry.throttled_share of its time, so its "
    "joules and seconds are not comparable."
)
PARTLY_LINE = "† partly measured: its meter saw a part of its time only, so its joules are not comparable."
TRAINED = "trained to"
CONVERGED = "to converge"
COLUMNS_OF_TIERS: tuple[tuple[str, JustifyMethod], ...] = (
    ("tier", "left"), ("trial", "left"), ("val loss", "right"), ("energy", "right"), (CONVERGED, "right"),
    (TRAINED, "right"),
)  # fmt: skip
OF_OUR_MODELS = (CONVERGED, TRAINED)  # somebody else's nobody trains here
NEAR_SHOWN = 12  # of those that were not picked; a ceiling may keep out thousands


def print_tiers(run: RunDir, console: Console, *, near_misses: bool = False) -> None:
    """The tier table with a reason for each pick and, where they are wanted, for who nearly was one."""
    info = selection_info(run)
    if info is None:
        return
    is_own = run.config().trial is not None
    console.print(_table(info.rows, info.selection, is_own=is_own))
    console.print(_sentences((row.trial_id, row.tier, row.reason) for row in info.rows))
    for line in _notes(info.selection):
        console.print(Text(line))
    if near_misses:
        _print_near_misses(info.selection, console)
    marks = "".join(_marks(pick) for tier in info.selection.tiers for pick in tier.picks)
    marks += THROTTLED_MARK if any(row.full and row.full.throttled for row in info.rows) else ""
    marks += THROTTLED_MARK if any(row.search and row.search.throttled for row in info.rows) else ""
    for mark, line in ((PARTLY_MARK, PARTLY_LINE), (THROTTLED_MARK, THROTTLED_LINE)):
        if mark in marks:
            console.print(Text(line))


def _table(rows: Iterable[PickRow], selection: Selection, *, is_own: bool) -> Table:
    picks = {pick.trial_id: pick for tier in selection.tiers for pick in tier.picks}
    table = Table(title=f"Selected trials of stage {selection.stage}", title_justify="left", title_style="bold")
    for name, justify in COLUMNS_OF_TIERS:
        if not (is_own and name in OF_OUR_MODELS):
            table.add_column(name, justify=justify, overflow="fold")
    for row in rows:
        pick = picks[row.trial_id]
        loss, joules = (row.search.val_loss, row.search.energy_joules) if row.search else (None, None)
        mark = THROTTLED_MARK if row.search and row.search.throttled else ""
        mark += PARTLY_MARK if PARTLY_MARK in _marks(pick) else ""
        trained = row.full.val_loss if row.full else None
        trained_mark = THROTTLED_MARK if row.full and row.full.throttled else ""
        last = () if is_own else (format_joules(pick.projected_joules), f"{_loss(trained)}{trained_mark}")
        table.add_row(row.tier, row.trial_id, _loss(loss), f"{format_joules(joules)}{mark}", *last)
    return table


def _print_near_misses(selection: Selection, console: Console) -> None:
    shown = selection.near_misses[:NEAR_SHOWN]
    if not shown:
        return
    console.print(Text("Not picked", style="bold"))
    console.print(_sentences((miss.trial_id, _place(miss), miss.reason) for miss in shown))
    if more := len(selection.near_misses) - len(shown):
        console.print(Text(f"and {more} more, in selection.json."))


def _sentences(rows: Iterable[tuple[str, str, str]]) -> Table:
    """Trial, tier and reason: the reason beside a narrow column, so that it can be read at any width."""
    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold", max_width=24)
    table.add_column(overflow="fold")
    for trial_id, tier, reason in rows:
        table.add_row(Text(f"{trial_id}\n{tier}"), Text(reason))
    return table


def _place(miss: NearMiss) -> str:
    return "ruled out" if miss.kind == "veto" else f"not {miss.tier}"


def _notes(selection: Selection) -> list[str]:
    """What holds for whole tiers, and what the choice saves."""
    lines = [f"{tier.name}: {note}." for tier in selection.tiers for note in tier.notes]
    every, saved = selection.projected_joules_all, selection.saved_joules
    if saved is not None and every:
        words = f"Training what was picked to convergence: {format_joules(selection.projected_joules)} projected"
        if saved:
            words += f", {format_joules(saved)} ({format_ratio(saved / every)}) less than all candidates"
        lines.append(f"{words}.")
    return lines


def _marks(pick: Pick) -> str:
    return "".join(
        mark for flag, mark in (("throttled", THROTTLED_MARK), ("partly_measured", PARTLY_MARK)) if flag in pick.flags
    )


def _loss(value: float | None) -> str:
    return "" if value is None else format_loss(value)
