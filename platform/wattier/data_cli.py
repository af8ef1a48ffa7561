"""The commands ``wattier data ...``: releases of datasets, from the download to a store that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXIT_INTERRUPTED = 130

data_app = typer.Typer(
    no_args_is_help=True,
    help="Datasets: download a release, turn it into a store, look at it, share it. `wattier run` does what it needs "
    "of this by itself; these commands are for data that several runs share.",
)


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
