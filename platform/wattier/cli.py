"""The command ``wattier``. Heavy libraries are imported by the verb that needs them, so that --help answers at once."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wattier.bench_cli import bench_app
from wattier.data_cli import EXIT_INTERRUPTED, data_app
from wattier.finetune_cli import finetune
from wattier.interrupts import interrupt, interrupts_kept
from wattier.predict_cli import predict
from wattier.release_cli import push, verify
from wattier.submit_cli import submit

if TYPE_CHECKING:
    from wattier.config import RunConfig
    from wattier.console import RunConsole
    from wattier.rundir import RunDir

EXIT_FAILURE, EXIT_BAD_INPUT, EXIT_FAILED_TRIALS = 1, 2, 3  # and departure.EXIT_NOT_FINISHED, 75: run me again
FAILURES_SHOWN = 3

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Choose which graph foundation model to train, and know its price in joules before you pay it.\n\n"
    "A run goes: data, search in stages, selection in tiers, full training, evaluation, release, report. `wattier run "
    "CONFIG` does all of it; every other verb does one step. All are resumable: the run directory is the only state, "
    "and the same command goes on where it stopped.\n\n"
    "Start with: wattier run configs/quickstart.yaml",
)
config_app = typer.Typer(no_args_is_help=True, help="Look at configs: defaults filled in, the schema, model sizes.")
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")

Target = Annotated[
    Path, typer.Argument(metavar="CONFIG|RUN", help="A YAML config, or the run directory that one made.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print trials, joules, device-hours and disk of what is left; start nothing.")
]
Walltime = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        help="How long this command may last: seconds, HH:MM:SS or D-HH:MM:SS. Before that, trials save and it ends "
        "with exit code 75: run it again. Inside a Slurm, PBS or Flux job it knows by itself.",
    ),
]
Ids = list[str] | None
Pinned = Annotated[Ids, typer.Option("--pin", metavar="ID", help="Pick this trial whatever the rules say.")]
Vetoed = Annotated[Ids, typer.Option("--veto", metavar="ID", help="Do not pick this trial.")]
Freed = Annotated[Ids, typer.Option("--free", metavar="ID", help="Leave this trial to the rules again.")]
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config, such as configs/quickstart.yaml.")]


@app.command()
def run(target: Target, dry_run: DryRun = False, walltime: Walltime = None) -> None:
    """Do everything that is left of a run: data, search, selection, training, evaluation, release, report."""
    if dry_run:
        _print_plan(target)
        return
    with _opened(target, walltime) as (rundir, config, console):
        from wattier import run as steps
        from wattier.console import print_ledger
        from wattier.select_console import print_tiers

        with steps.launcher_for(config) as launcher:
            worked = steps.run_all(rundir, config, launcher, console)
        print_tiers(rundir, console.console)
        print_ledger(rundir, console.console)
        if not worked:
            console.console.print("Nothing was left to do.")
        if config.trial is None:
            console.console.print(f"Release: {rundir.release_path}", markup=False)
        console.console.print(f"Report: {rundir.report_path}", markup=False)
        _exit_of_failed_trials(rundir)


@app.command()
def status(target: Target) -> None:
    """Show where a run stands: trials by stage, tiers, joules by phase."""
    from wattier.console import make_console, print_status

    print_status(_existing(target), make_console())


@app.command()
def search(target: Target, dry_run: DryRun = False, walltime: Walltime = None) -> None:
    """Prepare the data and run the stages of the search."""
    if dry_run:
        _print_plan(target)
        return
    _step(target, lambda steps: steps.search, walltime)
    _exit_of_failed_trials(_existing(target), members=False)


@app.command()
def select(target: Target, pin: Pinned = None, veto: Vetoed = None, free: Freed = None) -> None:
    """Sort the finished trials into tiers, with a reason for each pick and each near miss.

    What is pinned and vetoed is kept in the run directory. The rules are the config's section `select`, which may
    change: the same command selects again.
    """
    with _opened(target) as (rundir, config, console):
        from wattier import run as steps
        from wattier.choices import choose
        from wattier.select_console import print_tiers

        trials = rundir.trials(config.search.stages[-1].name)
        choose(rundir, trials, {"pin": pin or [], "veto": veto or [], "free": free or []})
        steps.select(rundir, config, console)
        print_tiers(rundir, console.console, near_misses=True)


@app.command()
def train(target: Target, walltime: Walltime = None) -> None:
    """Train the picked trials to convergence."""
    _refuse_own_model(target, "train")
    _step(target, lambda steps: steps.train, walltime)
    _exit_of_failed_trials(_existing(target), searched=False)


@app.command()
def evaluate(target: Target) -> None:
    """Evaluate the trained members as an ensemble on held-out groups."""
    _refuse_own_model(target, "evaluate")
    with _opened(target) as (rundir, config, console):
        from wattier import run as steps
        from wattier.evaluate_console import print_evaluation

        steps.evaluate(rundir, config, console)
        print_evaluation(rundir, console.console)


@app.command()
def report(
    target: Target,
    formats: Annotated[
        str, typer.Option("--format", metavar="LIST", help="Of html, md, json, csv, with commas between them.")
    ] = "html,md,json,csv",
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to; the run directory if not given.")
    ] = None,
) -> None:
    """Write the report: report.html, one file that needs no network, and report.md, report.json and trials.csv."""
    from wattier.report import write_report

    wanted = [name.strip() for name in formats.split(",") if name.strip()]
    typer.echo(write_report(_existing(target), wanted, output))


@app.command()
def study(
    target: Target,
    storage: Annotated[str | None, typer.Option(metavar="URL", help="Another database, without a password.")] = None,
) -> None:
    """Bring the Optuna studies that mirror a run up to date, and say how optuna-dashboard shows them."""
    from wattier.mirror import rebuild

    rundir = _existing(target)
    rebuilt = rebuild(rundir, rundir.config(), storage)
    for name, counts in (rebuilt.counts or {}).items():
        typer.echo(f"{name}: {', '.join(f'{n} {state}' for state, n in sorted(counts.items()))}")
    if rebuilt.counts is None:
        typer.echo("A search runs here, and keeps its studies up to date itself.")
    typer.echo(f"Look at them with: {rebuilt.command}")


@app.command()
def export(
    target: Target,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A new folder, or an older release; RUN/release by default.")
    ] = None,
) -> None:
    """Write the release folder: weights, references, hashes, model card, example."""
    _refuse_own_model(target, "release")
    from wattier.release import export_release

    rundir = _existing(target)
    with rundir.lock():
        typer.echo(export_release(rundir, rundir.config(), output.expanduser() if output else None))


app.command()(predict)
app.command()(submit)
app.command()(finetune)
app.command()(verify)
app.command()(push)


@app.command()
def doctor() -> None:
    """Say which energy sources and which devices work here, and what to do about those that do not."""
    from rich.table import Table

    from wattier.console import make_console
    from wattier_telemetry.doctor import diagnose

    table = Table(title="Energy sources", title_justify="left")
    for name in ("source", "works", "measures", "what to do"):
        table.add_column(name, overflow="fold")
    for finding in diagnose():
        table.add_row(finding.source, "yes" if finding.works else "no", finding.measures, finding.what_to_do)
    make_console().print(table)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def telemetry(context: typer.Context) -> None:
    """Serve, watch, record, report or read energy on this node: what `wattier-telemetry` does, with its options."""
    from wattier_telemetry import cli as telemetry_cli

    raise typer.Exit(telemetry_cli.main(context.args))


@config_app.command("show")
def config_show(config: ConfigPath) -> None:
    """Print a config with all defaults filled in."""
    from wattier.config import load_config

    typer.echo(load_config(config).to_yaml(), nl=False)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of a config, for editors."""
    import json

    from wattier.config import RunConfig

    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))


@config_app.command("params")
def config_params(config: ConfigPath) -> None:
    """Count the parameters of named model sizes, from the built modules: one line a size."""
    from wattier.config import load_sizes

    sizes = load_sizes(config)
    from wattier.model_sizes import count_size

    for name, size in sizes.all_by_name().items():
        typer.echo(f"{name} {count_size(size)}")


def _print_plan(target: Path) -> None:
    """What is left to do and what it will cost; nothing is started or written."""
    from wattier.config import load_config
    from wattier.console import make_console, print_plan
    from wattier.costs import costs_of
    from wattier.plan import plan_info, store_for_plan
    from wattier.rundir import RunDir

    config = RunDir.open(target).config() if target.is_dir() else load_config(target)
    rundir = RunDir(Path(config.run_dir).expanduser())
    store = store_for_plan(rundir, config)
    info = plan_info(rundir, config, costs_of(rundir, config, store), store)
    print_plan(info, make_console())


def _step(target: Path, step: Callable[[Any], Callable[..., Any]], walltime: str | None) -> None:
    with _opened(target, walltime) as (rundir, config, console):
        from wattier import run as steps

        with steps.launcher_for(config) as launcher:
            step(steps)(rundir, config, launcher, console)


def _refuse_own_model(target: Path, verb: str) -> None:
    from wattier.config import load_config
    from wattier.errors import UserError
    from wattier.rundir import RunDir

    config = RunDir.open(target).config() if target.is_dir() else load_config(target)
    if config.trial is not None:
        raise UserError(
            f"{target}: searches a model of your own ({config.trial}), which Wattier cannot {verb}. Its picks are in "
            "selection.json and in the report; train them yourself."
        )


def _exit_of_failed_trials(rundir: RunDir, *, searched: bool = True, members: bool = True) -> None:
    """End with a code of its own where a trial of the search, or a pick, has failed: the results are whole without."""
    from wattier.rundir import FULL_STAGE

    selection = rundir.selection()
    picked = selection.picked if selection is not None and members else ()
    rows = [row for row in rundir.trials() if row.status == "failed"]
    failed = [row for row in rows if (row.trial_id in picked if row.fidelity.stage == FULL_STAGE else searched)]
    if not failed:
        return
    shown = "; ".join(f"{row.trial_id} ({row.error})" for row in failed[:FAILURES_SHOWN])
    more = f"; and {len(failed) - FAILURES_SHOWN} more" if len(failed) > FAILURES_SHOWN else ""
    where = rundir.trial_folder(failed[0].fidelity.stage, failed[0].trial_id) / "error.txt"
    noun = "trial" if len(failed) == 1 else "trials"
    typer.echo(f"{len(failed)} {noun} failed: {shown}{more}. See error.txt in each one's folder, as {where}", err=True)
    raise typer.Exit(EXIT_FAILED_TRIALS)


@contextmanager
def _opened(target: Path, walltime: str | None = None) -> Iterator[tuple[RunDir, RunConfig, RunConsole]]:
    """The run of a config or a run directory, locked, with a console that shows its progress; it leaves in time."""
    from wattier.config import load_config
    from wattier.departure import EXIT_NOT_FINISHED, NotFinishedError, leaving_in_time
    from wattier.rundir import RunDir
    from wattier.walltime import limit_of

    if target.is_dir():
        rundir = RunDir.open(target)
        config = rundir.config()
    else:
        config = load_config(target)
        rundir = RunDir.create(config)
    limit = limit_of(walltime, config.resources.walltime_seconds)
    with rundir.lock():
        from wattier.console import RunConsole, words_of_departure

        try:
            with leaving_in_time(rundir, limit) as departure, RunConsole(rundir) as console:
                for words in words_of_departure(departure):
                    console.say(words)
                yield rundir, config, console
        except NotFinishedError as why:
            typer.echo(f"Not finished ({why}). What was done is saved; the same command goes on from here.", err=True)
            raise typer.Exit(EXIT_NOT_FINISHED) from None
        except KeyboardInterrupt:
            typer.echo("Interrupted. The same command goes on from here.", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None


def _existing(target: Path) -> RunDir:
    from wattier.config import load_config
    from wattier.errors import UserError
    from wattier.rundir import RunDir

    if target.is_dir():
        return RunDir.open(target)
    folder = Path(load_config(target).run_dir).expanduser()
    if not folder.exists():
        raise UserError(f"{target}: has not been run yet ({folder} does not exist). Start with: wattier run {target}")
    return RunDir.open(folder)


def main() -> None:
    """Run the command; a user's mistake is one line and exit code 2, a bug leaves its traceback in a file."""
    logging.basicConfig(level=os.environ.get("WATTIER_LOG_LEVEL", "WARNING"), format="%(name)s: %(message)s")
    signal.signal(signal.SIGTERM, interrupt)  # how Slurm and Ray jobs ask to stop
    try:
        with interrupts_kept():
            app()
    except Exception as error:  # noqa: BLE001  (the last line of defence)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f"{error.filename}: " if error.filename else ""
            typer.echo(f"{where}the disk is full. Make room; the same command goes on from here.", err=True)
            sys.exit(EXIT_BAD_INPUT)
        if _is_users(error):
            typer.echo(" ".join(str(error).split()), err=True)
            sys.exit(EXIT_BAD_INPUT)
        text, reason = traceback.format_exc(), " ".join(str(error).split())[:300]
        with tempfile.NamedTemporaryFile("w", prefix="wattier-crash-", suffix=".txt", delete=False) as file:
            file.write(text)
        typer.echo(f"wattier failed: {type(error).__name__}: {reason}. The traceback is in {file.name}.", err=True)
        sys.exit(EXIT_FAILURE)


def _is_users(error: Exception) -> bool:
    """Errors whose message is meant for the user, of all three packages; imported only when something failed."""
    from wattier.errors import UserError
    from wattier_telemetry.source import SourceUnavailable

    if isinstance(error, UserError | SourceUnavailable):
        return True
    from wattier_gnn.structure import DataError

    return isinstance(error, DataError)


if __name__ == "__main__":
    main()
