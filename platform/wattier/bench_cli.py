"""The commands ``wattier bench ...``: measurements of this machine."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wattier.data_cli import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from wattier.bench_power import PowerPlan

bench_app = typer.Typer(no_args_is_help=True, help="Measure this machine: the power of named model sizes.")


@bench_app.callback()
def _bench() -> None:
    """Keep `power` a command of its own, though it is the only one yet."""


@bench_app.command()
def power(  # noqa: PLR0913, PLR0917  (one parameter an option)
    sizes_file: Annotated[
        Path, typer.Argument(metavar="SIZES", help="A YAML of named sizes, such as configs/talk_sizes.yaml.")
    ],
    sizes: Annotated[str | None, typer.Option(metavar="A,B", help="Only these of its sizes, in this order.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=86400, help="How long each size trains.")] = 60.0,
    batch: Annotated[int, typer.Option(min=1, help="Structures of a step.")] = 16,
    store: Annotated[
        Path | None, typer.Option(help="A store of `wattier data ingest`; the sample corpus when not given.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of the results.")] = Path("runs/bench_power"),
    source: Annotated[
        str, typer.Option(help="Where joules come from, as telemetry.source of a config: auto, nvml, replay:FILE ...")
    ] = "auto",
    rated_watts: Annotated[
        float | None, typer.Option(help="Watts of a busy core, for estimates where there is no counter.")
    ] = None,
) -> None:
    """Train each named size for a fixed time, and record the power it draws: W over time, J a structure, memory.

    On a machine with several GPUs the first visible one is used. A size that would not fit is said so and passed over.
    A finished size is kept: the same command goes on where it stopped. While it lasts, `wattier-telemetry serve` shows
    the sizes to Prometheus as trials of the run "power".
    """
    _use_one_gpu()
    plan = _plan(sizes_file, sizes, seconds, batch, store, out, source, rated_watts)
    from wattier.bench_page import write_power_page
    from wattier.bench_power import measure_sizes

    try:
        results = measure_sizes(plan, typer.echo)
    except KeyboardInterrupt:
        typer.echo("Interrupted. The same command goes on from here.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    page = out / "power.html"
    write_power_page(results, out / "sizes", page)
    typer.echo(f"Results: {page} and {out / 'power.json'}")


def _plan(  # noqa: PLR0913, PLR0917  (as above)
    sizes_file: Path,
    chosen: str | None,
    seconds: float,
    batch: int,
    store: Path | None,
    out: Path,
    source: str,
    rated_watts: float | None,
) -> PowerPlan:
    from wattier.bench_power import PowerPlan
    from wattier.config import TelemetrySection, checked, load_sizes
    from wattier.errors import UserError, did_you_mean

    if math.isnan(seconds):
        raise UserError("--seconds: is nan, but must be a number of seconds. Give one, such as 60.")
    known = load_sizes(sizes_file).all_by_name()
    names = [name.strip() for name in chosen.split(",")] if chosen is not None else list(known)
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or f" Known are {', '.join(known)}."
            raise UserError(f"--sizes: is {name!r}, but must be one of {sizes_file.name}.{hint}")
    telemetry = checked(TelemetrySection, {"source": source, "rated_watts_per_core": rated_watts}, Path("options"))
    return PowerPlan({name: known[name] for name in names}, out, store, seconds, batch, telemetry)


def _use_one_gpu() -> None:
    """Show the first visible GPU alone to torch and to the meter; what idles beside it is nobody's to bill."""
    variable = "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in os.environ else "CUDA_VISIBLE_DEVICES"
    os.environ[variable] = os.environ.get(variable, "0").split(",")[0]
