"""The command ``wattier finetune``: a release trained on data of your own."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Annotated

import typer


def finetune(  # noqa: PLR0913, PLR0917  (one parameter an option)
    release: Annotated[Path, typer.Argument(metavar="RELEASE", help="A release folder.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Extended XYZ with energies (eV), and forces (eV/Å).")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The release to make.")],
    source: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of your data in the new release; the file's name by default. A source of the release: your data are "
            "of its level of theory, and its energy zero stays.",
        ),
    ] = None,
    freeze: Annotated[
        bool, typer.Option("--freeze", help="Train the heads alone; the backbone stays as it is.")
    ] = False,
    epochs: Annotated[int, typer.Option(min=1, help="At most; it ends when validation improves no more.")] = 200,
    learning_rate: Annotated[float | None, typer.Option(min=1e-12, max=1.0, help="Of all that is trained.")] = None,
    batch_structures: Annotated[int, typer.Option(min=1, help="Structures a step.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the split and the order of structures.")] = 0,
    walltime: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long it may last, as for `wattier run`.")
    ] = None,
) -> None:
    """Train a release on your own structures, measured, into a release of its own that names where it came from.

    Energies are aligned with the source of the release that is nearest to yours. Kill it, and the same command goes on;
    before the job's time is up it saves and ends with exit code 75.
    """
    from wattier.console import IngestConsole, words_of_departure
    from wattier.data_cli import EXIT_INTERRUPTED
    from wattier.departure import EXIT_NOT_FINISHED, NotFinishedError, leaving_in_time
    from wattier.finetune import FineTuning, fine_tune
    from wattier.walltime import limit_of
    from wattier_gnn.structure import DataError

    name = source or _name_of(file)
    task = FineTuning(
        release, file, output.absolute(), name, freeze, epochs, learning_rate=learning_rate,
        batch_structures=batch_structures, seed=seed,
    )  # fmt: skip
    _refuse(task.output, task.release, name)
    limit = limit_of(walltime, None)
    with task.work.lock(), IngestConsole() as console:
        try:
            with leaving_in_time(task.work, limit) as departure:
                for words in words_of_departure(departure):
                    console.say(words)
                made = fine_tune(task, console.say)
        except DataError:
            if not (task.work.path / "trials").exists():  # nothing was trained: a mended file begins anew
                shutil.rmtree(task.work.path, ignore_errors=True)
            raise
        except NotFinishedError as why:
            typer.echo(f"Not finished ({why}). What was done is saved; the same command goes on from here.", err=True)
            raise typer.Exit(EXIT_NOT_FINISHED) from None
        except KeyboardInterrupt:
            typer.echo("Interrupted. Checkpoints are kept; the same command goes on from the last one.", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
    shutil.rmtree(task.work.path)
    typer.echo(f"Release: {made}")


def _name_of(file: Path) -> str:
    """A source's name out of a file's."""
    stem = re.sub(r"\W+", "_", file.name.split(".")[0]).strip("_").lower()
    return stem if stem.isidentifier() else f"data_{stem}" if stem else "data"


def _refuse(output: Path, release: Path, name: str) -> None:
    from wattier.errors import UserError

    if not name.isidentifier():
        raise UserError(f"--source: is {name!r}, but must be a name of letters, digits and _. Give another one.")
    if output.resolve() == release.resolve():
        raise UserError(f"--output: {output} is the release to begin from, which would be lost. Name a new folder.")
    if output.exists() and not (output / "manifest.json").is_file():
        raise UserError(f"--output: {output} is there and is no release. Name a new folder.")
