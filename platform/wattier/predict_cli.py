"""The command ``wattier predict``."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer

from wattier.data_cli import EXIT_INTERRUPTED
from wattier.units import UNKNOWN, three_digits

if TYPE_CHECKING:
    from wattier_gnn.ensemble import Ensemble
    from wattier_gnn.predict import Tally

SECONDS_BETWEEN_LINES = 10.0
BAD_FRAMES_SHOWN = 3


def predict(  # noqa: PLR0913, PLR0917  (one parameter an option)
    release: Annotated[Path, typer.Argument(metavar="RELEASE", help="The folder that `wattier export` made.")],
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Structures, as .xyz, .traj, .cif, POSCAR, OUTCAR, ....")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT.xyz", help="Extended XYZ, written at the end.")
    ],
    source: Annotated[
        str | None, typer.Option(help="Whose level of theory to predict at; may be left out where there is one only.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Structures predicted at once, at most.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    conservative: Annotated[
        bool, typer.Option("--conservative", help="Forces are minus the gradient of the energy for all members.")
    ] = False,
    on_bad: Annotated[
        str, typer.Option(metavar="refuse|skip", help="What to do with a frame that cannot be read or predicted.")
    ] = "refuse",
) -> None:
    """Predict energy, forces, stress and how sure they are for every structure of some files.

    OUT.xyz holds what the files hold, their labels included, and wattier_energy, wattier_energy_std, wattier_stress and
    wattier_out_of_distribution in its comment lines, wattier_forces and wattier_forces_std as columns. Formats that
    could run code when they are read are refused.
    """
    from wattier.errors import UserError
    from wattier_gnn.predict import predict_files

    if on_bad not in ("refuse", "skip"):
        raise UserError(f"--on-bad: is {on_bad!r}, but must be refuse or skip.")
    ensemble, source = _loaded(release, source, device)
    try:
        with _Progress() as progress:
            tally = predict_files(
                ensemble, files, output, source=source, batch_structures=batch, conservative=conservative,
                on_bad="skip" if on_bad == "skip" else "refuse", progress=progress.tell,
            )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo("Interrupted. Nothing was written; the same command starts again.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    for message in tally.messages[:BAD_FRAMES_SHOWN]:
        typer.echo(f"skipped: {message}", err=True)
    for line in summary(tally, source, conservative or ensemble.is_conservative):
        typer.echo(line)
    typer.echo(output)


def _loaded(release: Path, source: str | None, device: str) -> tuple[Ensemble, str]:
    """The release on its device, and the source to predict at."""
    from wattier.errors import UserError
    from wattier_gnn.devices import chosen_device
    from wattier_gnn.release import load_release

    ensemble = load_release(release)
    known = ", ".join(ensemble.sources)
    if source is None and len(ensemble.sources) > 1:
        raise UserError(f"--source: is not given, but must be one of {known}: whose level of theory to predict at.")
    if source is not None and source not in ensemble.sources:
        raise UserError(f"--source: is {source!r}, but must be one of {known}.")
    try:
        return ensemble.moved(chosen_device(device)), source or ensemble.sources[0]
    except ValueError as error:
        raise UserError(f"--device: {error}.") from error


class _Progress:
    """How far it is: a line that changes in a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        from wattier.console import make_console

        self._console = make_console()
        self._status = self._console.status("predicting")
        self._started = self._last = time.monotonic()

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._status.stop()

    def tell(self, tally: Tally) -> None:
        """After each batch."""
        now = time.monotonic()
        rate = tally.structures / max(now - self._started, 1e-9)
        line = f"{tally.structures:,} structures, {three_digits(rate)} a second"
        if self._console.is_terminal:
            self._status.update(line)
        elif now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            typer.echo(line, err=True)


def summary(tally: Tally, source: str, is_conservative: bool) -> list[str]:
    """What came of it, in lines: how many, how sure, how far from the labels that the files held."""
    skipped = f"; {_counted(tally.skipped, 'frame')} skipped" if tally.skipped else ""
    what = f"{_counted(tally.structures, 'structure')}, {_counted(tally.atoms, 'atom')}"
    lines = [f"{what}, at the level of {source}{skipped}"]
    spread = {name: tally.mean(name) for name in ("energy_std_ev_per_atom", "forces_std_ev_per_angstrom")}
    lines.append(
        f"mean std: energy {_told(spread['energy_std_ev_per_atom'])} eV/atom, "
        f"forces {_told(spread['forces_std_ev_per_angstrom'])} eV/A"
    )
    if tally.strange is not None:
        lines.append(f"unlike the training data: {_counted(tally.strange, 'structure')}")
    n_energies = tally.sums["energy_error_ev_per_atom"][1]
    if n_energies:
        energy, forces = (tally.mean(name) for name in ("energy_error_ev_per_atom", "forces_error_ev_per_angstrom"))
        lines.append(
            f"mean absolute error against the files' labels: energy {_told(energy)} eV/atom "
            f"({_counted(n_energies, 'structure')}), forces {_told(forces)} eV/A; of use only where their level of "
            f"theory is that of {source}"
        )
    if not is_conservative:
        lines.append("forces are predicted directly by some members: they are not the gradient of the energy")
    return lines


def _counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _told(value: float) -> str:
    return UNKNOWN if math.isnan(value) else three_digits(value)
