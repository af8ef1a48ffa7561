"""What ``wattier data ...`` shows on a screen: the progress of a download, and a store in tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn
from rich.table import Table
from rich.text import Text

from wattier.data_stats import StatsInfo, removed_from
from wattier.units import UNKNOWN
from wattier_gnn.datasets import SYMBOLS
from wattier_gnn.stats import FORCE_QUANTILES, Spread

TOTAL = "total"


@contextmanager
def byte_progress(console: Console) -> Iterator[Callable[[str, int, int | None], None]]:
    """A function to be told (name, bytes so far, bytes in all): a bar in a terminal, else a line every tenth."""
    if not console.is_terminal:
        said: dict[str, int] = {}

        def say(name: str, done: int, total: int | None) -> None:
            tenth = 10 * done // total if total else done // 1_000_000_000
            if said.get(name) != tenth:
                said[name] = tenth
                of = f"{total / 1e6:,.1f} MB" if total else f"{UNKNOWN} size"
                console.print(Text(f"{name}: {done / 1e6:,.1f} MB of {of}"))

        yield say
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), SpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def show(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done, total=total)

        yield show


def print_stats(info: StatsInfo, console: Console) -> None:
    """A store in tables: what was kept and removed, sizes, labels, elements."""
    console.print(Text(f"{info.folder}, edges within {info.cutoff_angstrom:g} Å"))
    for table in (_samples_table(info), _sizes_table(info), _labels_table(info)):
        console.print(table)
    for source in info.sources:
        symbols = ", ".join(SYMBOLS[number] for number in source.elements)
        console.print(_text(f"{source.source}: {len(source.elements)} elements: {symbols}"))
    for name, messages in info.cleaning.bad_shards.items():
        for message in messages:
            console.print(_text(f"{name}: not read to its end: {message}"))


def _samples_table(info: StatsInfo) -> Table:
    table = _table("Data samples", "source", "samples", "read", "removed", "why", "elements", "atoms")
    totals = [0, 0, 0, 0]
    for source in info.sources:
        read = info.cleaning.read[source.source]
        removed = removed_from(info.cleaning, source.source)
        why = ", ".join(f"{n:,} {reason}" for reason, n in removed.items())
        figures = [source.structures, read, sum(removed.values()), source.atoms]
        totals = [total + figure for total, figure in zip(totals, figures, strict=True)]
        samples, read_text, removed_text, atoms = (f"{figure:,}" for figure in figures)
        elements = str(len(source.elements))
        table.add_row(_text(source.source), samples, read_text, removed_text, _text(why), elements, atoms)
    table.add_section()
    samples, read_text, removed_text, atoms = (f"{total:,}" for total in totals)
    all_elements = {z for source in info.sources for z in source.elements}
    table.add_row(TOTAL, samples, read_text, removed_text, "", str(len(all_elements)), atoms)
    return table


def _sizes_table(info: StatsInfo) -> Table:
    columns = [f"{what} {name}" for what in ("atoms", "edges") for name in ("min", "mean", "max", "sd")]
    table = _table("Atoms and edges of a structure", "source", *columns)
    for source in info.sources:
        sizes = (source.atoms_per_structure, source.edges_per_structure)
        table.add_row(_text(source.source), *(cell for spread in sizes for cell in _cells(spread, counts=True)))
    return table


def _labels_table(info: StatsInfo) -> Table:
    quantiles = [f"{100 * share:g} %" for share in FORCE_QUANTILES]
    energies = [f"energy {name}" for name in ("min", "mean", "max", "sd")]
    title = "Energy less composition (eV/atom), force on an atom (eV/Å)"
    table = _table(title, "source", *energies, "force mean", *quantiles, "force max")
    for source in info.sources:
        forces = source.force_ev_per_angstrom
        norms = [forces.mean, *source.force_quantiles_ev_per_angstrom.values(), forces.maximum]
        table.add_row(_text(source.source), *_cells(source.energy_ev_per_atom, counts=False), *map(_number, norms))
    return table


def _text(words: str) -> Text:
    """Words of a manifest, which somebody else may have written: no markup, and nothing that steers a terminal."""
    return Text("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in columns:
        table.add_column(name, justify="left" if name in ("source", "why") else "right", overflow="fold")
    return table


def _cells(spread: Spread | None, *, counts: bool) -> list[str]:
    if spread is None:
        return [UNKNOWN] * 4
    if counts and spread.minimum == spread.minimum:
        return [f"{spread.minimum:,.0f}", f"{spread.mean:,.1f}", f"{spread.maximum:,.0f}", f"{spread.deviation:,.1f}"]
    return [_number(value) for value in spread]


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else UNKNOWN
