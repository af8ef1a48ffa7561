"""The commands ``wattier data ...``: releases of datasets, from the download to a store that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

EXIT_INTERRUPTED = 130

data_app = typer.Typer(
    no_args_is_help=True,
    help="Datasets: download a release, turn it into a store, look at it, share it. `wattier run` does what it needs "
    "of this by itself; these commands are for data that several runs share.",
)

Folder = Annotated[Path, typer.Argument(metavar="STORE", help="A folder that `wattier data ingest` or a run made.")]


@data_app.command()
def ingest(  # noqa: PLR0913, PLR0917  (one parameter an option)
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Take sources and settings from its data section.")
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="A source and its file or folder; repeat for more.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The store to make, go on with, or add to.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; as many as cores by default.")] = None,
    skip_bad: Annotated[
        bool | None, typer.Option("--skip-bad", help="Count records and files that cannot be read, and go on.")
    ] = None,
    cutoff: Annotated[float | None, typer.Option(help="Of neighbours, in Angstrom.")] = None,
    max_force: Annotated[float | None, typer.Option(help="Remove structures above, in eV/Angstrom.")] = None,
    force_norm: Annotated[str | None, typer.Option(help="per_atom or frobenius.")] = None,
    neighbors: Annotated[str | None, typer.Option(help="precomputed or on_the_fly.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the split into train, val and test.")] = None,
) -> None:
    """Bring released files into one store: read, clean, split by group, align, find neighbours.

    Memory is bounded whatever the size of the input. Kill it, and the same command goes on; run it again, and it does
    nothing; give more files or sources, and they are added.
    """
    from wattier.config import DataSection, checked, load_config
    from wattier.console import IngestConsole
    from wattier.errors import UserError
    from wattier.prepare import recipe_of, source_paths
    from wattier_gnn.ingest import ingest as ingest_into

    given = load_config(config) if config else None
    options: dict[str, Any] = {
        "cutoff_angstrom": cutoff,
        "max_force_ev_per_angstrom": max_force,
        "force_norm": force_norm,
        "neighbors": neighbors,
        "sources": _sources(source) if source else None,
        "on_bad": "skip" if skip_bad else None,
    }
    values = given.data.model_dump() if given else {}
    values |= {name: value for name, value in options.items() if value is not None}
    data = checked(DataSection, values, Path("options"))
    folder = out or (Path(data.store) if data.store else None)
    if folder is None:
        raise UserError("--out: is not given, but must name the store to make. Add --out FOLDER.")
    if not data.sources:
        raise UserError("--source: is not given, but there must be something to read. Add --source NAME=PATH.")
    seed = seed if seed is not None else given.seed if given else 0
    with IngestConsole() as console:
        try:
            ingest_into(
                source_paths(data.sources),
                folder.expanduser(),
                **recipe_of(data, seed),
                workers=workers,
                say=console.say,
                progress=console.progress,
                may_be_empty=True,  # a run, which trains and tests on every source, does not allow it
            )
        except KeyboardInterrupt:
            console.say("Interrupted. The same command goes on from here.")
            raise typer.Exit(EXIT_INTERRUPTED) from None


def _sources(texts: list[str]) -> dict[str, str]:
    from wattier.errors import UserError

    pairs = [text.partition("=") for text in texts]
    for text, (name, _, path) in zip(texts, pairs, strict=True):
        if not name or not path:
            raise UserError(f"--source: is {text!r}, but must be NAME=PATH, such as ani1x=/data/ani1x-release.h5.")
    return {name: path for name, _, path in pairs}


@data_app.command()
def export(
    store: Folder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    form: Annotated[str, typer.Option("--format", help="store, which opens as one, or extxyz.")] = "store",
) -> None:
    """Write a store as a data release: self-contained, with a card and the sha256 of every file."""
    from wattier.errors import UserError
    from wattier_gnn.export import export_store
    from wattier_gnn.store import Store

    if form not in ("store", "extxyz"):
        raise UserError(f"--format: is {form!r}, but must be store or extxyz. Give one of them.")
    export_store(Store(store), out, "store" if form == "store" else "extxyz", typer.echo)


@data_app.command()
def verify(store: Folder) -> None:
    """Check every file of a release against its sha256, or of a store against its size."""
    from wattier_gnn.export import verify as check

    typer.echo(check(store))
