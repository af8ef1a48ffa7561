"""The command ``wattier submit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wattier.data_cli import EXIT_INTERRUPTED


def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config, with an absolute run_dir.")],
    address: Annotated[str, typer.Option(help="The cluster's dashboard, such as http://head:8265.")],
    working_dir: Annotated[
        Path, typer.Option(help="What the job sees of this machine; the config must lie in it.", file_okay=False)
    ] = Path(),
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for its end, and end with its code.")] = True,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Show its log while waiting.")] = True,
) -> None:
    """Run a config as a job of a Ray cluster. The token is that of RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH."""
    from wattier.submit import submit as hand_over

    submitted = hand_over(config, address, working_dir)
    typer.echo(f"Submitted as {submitted.job}. {submitted.how_to()}")
    if not wait:
        return
    try:
        if follow:
            submitted.follow(lambda text: typer.echo(text, nl=False))
        code = submitted.wait()
    except KeyboardInterrupt:
        typer.echo(f"The job goes on without us. {submitted.how_to()}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if code:
        typer.echo(f"The job ended with exit code {code}: {submitted.message()}", err=True)
    raise typer.Exit(code)
