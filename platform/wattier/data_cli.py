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

SOURCE_HELP = (
    "A source and its file or folder; repeat for other sources. For a second path of a source run the command again: "
    "it is added."
)

Folder = Annotated[Path, typer.Argument(metavar="STORE", help="A folder that `wattier data ingest` or a run made.")]


@data_app.command()
def ingest(  # noqa: PLR0913, PLR0917  (one parameter an option)
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Take sources and settings from its data section.")
    ] = None,
    source: Annotated[list[str] | None, typer.Option(metavar="NAME=PATH", help=SOURCE_HELP)] = None,
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
    names = [name for name, _, _ in pairs]
    if again := next((name for name in names if names.count(name) > 1), None):
        raise UserError(
            f"--source: names {again} twice, but each source can have one path at a time. Give one, and run the "
            "command again with the second path; it is added."
        )
    return {name: path for name, _, path in pairs}


@data_app.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="ani1x, qm7x, oc20, oc22 or mptrj.")],
    to: Annotated[Path | None, typer.Option(help="The folder it goes to; datasets/NAME when not given.")] = None,
    url: Annotated[
        str | None, typer.Option(help="Another address: of the one file, or, with a slash at its end, of their folder.")
    ] = None,
    files: Annotated[
        list[str] | None, typer.Option(help="Only files whose name matches, as s2ef_train_2M.tar or 's2ef_val_*'.")
    ] = None,
) -> None:
    """Download the release of a dataset, check it, and unpack it where readers need that.

    A download that was cut off goes on where it stopped: give the same command again. A file gets its name only when it
    is whole and has the published checksum; nothing that is there is overwritten.
    """
    from wattier.console import make_console
    from wattier.data_console import byte_progress
    from wattier_gnn.datasets import READERS
    from wattier_gnn.fetch import choose_files, fetch, from_elsewhere, readable_folders

    release, chosen = choose_files(name, files or [])
    chosen = from_elsewhere(chosen, url) if url else chosen
    folder = to or Path("datasets") / name
    reader, console = READERS[name], make_console()
    typer.echo(f"{name}: {release.homepage}\nlicence: {reader.licence}\nplease cite: {reader.citation}")
    try:
        for file in chosen:
            with byte_progress(console) as on_progress:
                fetched = fetch(file, folder, on_progress)
            state = "was there" if fetched.was_there else "fetched"
            known = f"{fetched.checked} as published" if fetched.checked else "no checksum is published"
            typer.echo(f"{fetched.path}: {state}" + ("" if fetched.was_there and file.unpacks_to else f", {known}"))
            for source in readable_folders(reader, fetched.path):
                typer.echo(f"  as a source in a config: data.sources.{name}: {source}")
    except KeyboardInterrupt:
        typer.echo("Interrupted. The same command goes on from here.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


@data_app.command()
def stats(
    target: Annotated[
        Path,
        typer.Argument(metavar="STORE|CONFIG|RUN", help="A store, or the config or directory of a run that has one."),
    ],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write figures, too: one page, no network.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, units in their names.")] = False,
) -> None:
    """Print what a store holds, by source: samples, removed ones, elements, atoms, edges, energies, forces.

    Energies are less the composition reference, forces are norms on single atoms. Figures come from one pass in bounded
    memory; quantiles are right to 1 %.
    """
    import json

    from wattier.data_stats import find_store, stats_dict, stats_info
    from wattier.errors import UserError

    if html and (html.is_dir() or not html.absolute().parent.is_dir()):
        raise UserError(f"--html: is {html}, but must be a file in a folder that is there. Make the folder first.")
    info = stats_info(find_store(target))
    if as_json:
        typer.echo(json.dumps(stats_dict(info), indent=2, allow_nan=False))
    else:
        from wattier.console import make_console
        from wattier.data_console import print_stats

        print_stats(info, make_console())
    if html:
        from wattier.data_plots import write_stats_page

        write_stats_page(info, html)
        typer.echo(f"Figures: {html}", err=as_json)


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
