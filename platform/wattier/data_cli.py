"""The commands ``wattier data ...``: releases of datasets, from the download to a store that trains."""

from __future__ import annotations

import typer

data_app = typer.Typer(
    no_args_is_help=True,
    help="Datasets: download a release, turn it into a store, look at it, share it. `wattier run` does what it needs "
    "of this by itself; these commands are for data that several runs share.",
)
