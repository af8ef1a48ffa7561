"""The funnel from data to release: each step reads the run directory, does what is left, and writes it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

import torch

from wattier.campaign import campaign_shown
from wattier.checkpoints import remove_needless
from wattier.choices import choices_of
from wattier.config import RunConfig
from wattier.costs import costs_of, fidelity_of, full_fidelity, joules_to_convergence, refuse_small_budget
from wattier.departure import LeaveNote, NotFinishedError
from wattier.errors import UserError
from wattier.evaluate import evaluate_run, still_holds
from wattier.fulltrain import train_members, trained_members, untrained
from wattier.funnel import is_over, run_search, stage_end
from wattier.launch import InlineLauncher, Launcher, Stage, check_local_resources, runs_here
from wattier.ledger import FULL_PHASE
from wattier.metering import check_source, metered
from wattier.mirror import Mirror
from wattier.objectives import Converge, Objectives
from wattier.own_model import STATED, own_trial_of
from wattier.power_cap import check_power_caps
from wattier.prepare import prepare_data
from wattier.records import Params, Selection, TrialResult
from wattier.release import export_release
from wattier.report import write_report
from wattier.rundir import FULL_STAGE, RunDir, read_json, write_json
from wattier.select import select_trials
from wattier.space import typed_space
from wattier.storage_url import take_environment
from wattier.trial import run_trial, settings_of
from wattier.trial_context import RunTrial
from wattier.units import format_bytes
from wattier.warm_start import describe, kept_priors
from wattier_gnn.pool import Progress
from wattier_gnn.release import MANIFEST
from wattier_gnn.splits import TRAIN
from wattier_gnn.store import Store


class Listener(Protocol):
    """Who hears of progress: a terminal, a log, a test."""

    def phase(self, name: str) -> None:
        """A phase begins."""

    def say(self, text: str) -> None:
        """One line of progress."""

    def progress(self, done: Progress) -> None:
        """How far the reading of files is; often."""

    def trial(self, result: TrialResult, done: int, total: int) -> None:
        """A trial ended."""


def search(run: RunDir, config: RunConfig, launcher: Launcher, listener: Listener) -> None:
    """Run the stages of the funnel."""
    if all(is_over(run, config, stage) for stage in config.search.stages):
        return
    _check_stages(run, config)
    with campaign_shown(run, config, "data"):
        store = prepare_data(run, config, listener) if config.trial is None else None
    run_funnel(run, config, launcher, trial_of(config), store, listener)


def run_funnel(  # noqa: PLR0913, PLR0917  (what runs, on what, and who hears of it)
    run: RunDir,
    config: RunConfig,
    launcher: Launcher,
    train_one: RunTrial,
    store: Store | None,
    listener: Listener,
) -> None:
    """Run the stages that are not over, and say which of them the budget ended."""
    if all(is_over(run, config, stage) for stage in config.search.stages):
        return
    totals = {stage.name: stage.trials for stage in config.search.stages}
    if config.telemetry.source != STATED and runs_here(config):
        check_source(config.telemetry)
    costs = costs_of(run, config, store)
    if not run.trials():
        refuse_small_budget(config, costs)
    listener.phase("search")
    n_training = None if store is None else len(store.indices(TRAIN))
    objectives = Objectives.of(config.search, _to_convergence(config, n_training))
    tell = _teller(run, totals, listener)
    priors = kept_priors(run, config)
    for line in describe(priors):
        listener.say(line)
    shown = campaign_shown(run, config, "search", costs=costs, ray_dashboard=lambda: launcher.dashboard_url)
    with closing(Mirror(run, config)) as mirror, shown:
        run_search(
            run, config, launcher, train_one, tell, costs=costs, objectives=objectives, n_training=n_training,
            priors=priors.trials, mirror=mirror,
        )  # fmt: skip
    for stage in config.search.stages:
        if (end := stage_end(run, stage.name)) is not None:
            listener.say(
                f"stage {stage.name} ended with {end['missing']} of {stage.trials} trials not started: {end['reason']}"
            )


def trial_of(config: RunConfig) -> RunTrial:
    """What trains one trial: Wattier's models, or the function that the config names."""
    return run_trial if config.trial is None else own_trial_of(config.trial)


def select(run: RunDir, config: RunConfig, listener: Listener) -> Selection:
    """Sort the finished trials of the last stage into tiers; a selection that still holds is left as it is."""
    stage = config.search.stages[-1]
    missing = stage.trials - len(run.trials(stage.name))
    if missing > 0 and stage_end(run, stage.name) is None:
        raise UserError(
            f"{run.path}: {missing} trials of stage {stage.name!r} are not done. Run `wattier search` first."
        )
    if missing == stage.trials and (end := stage_end(run, stage.name)) is not None:
        raise UserError(
            f"{run.path}: no trial of stage {stage.name!r} was started: {end['reason']}. Raise search.budget, and run "
            "the same command again."
        )
    own = config.trial is not None
    store = None if own else Store(run.store_path)
    converge = _to_convergence(config, None if store is None else len(store.indices(TRAIN)))
    selection = select_trials(
        run.trials(),
        config.select,
        stage=stage.name,
        project=_not_projected if store is None else _projection(run, config, store, converge),
        objectives=Objectives.of(config.search, converge),
        curves=lambda trial: run.epochs(stage.name, trial.trial_id),
        space=typed_space(config),
        choices=choices_of(run, config.select, run.trials(stage.name)),
    )
    if run.selection() != selection:
        listener.phase("selection")
        write_json(run.selection_path, selection.to_dict())
        listener.say(f"picked {', '.join(selection.picked)}")
    return selection


def train(run: RunDir, config: RunConfig, launcher: Launcher, listener: Listener) -> list[TrialResult]:
    """Train the picked trials to convergence."""
    selection = run.selection()
    totals = {FULL_STAGE: len(selection.picked) if selection else 0}
    tell = _teller(run, totals, listener)
    if selection is None or not untrained(run, selection):
        members = trained_members(run)
        _make_room(run, config, listener)
        return members
    listener.phase("full training")
    costs = costs_of(run, config, Store(run.store_path))
    shown = campaign_shown(run, config, FULL_PHASE, ray_dashboard=lambda: launcher.dashboard_url)
    with closing(Mirror(run, config)) as mirror, shown:
        members = train_members(run, config, launcher, run_trial, tell, costs, mirror)
    if missing := totals[FULL_STAGE] - len(members):
        listener.say(f"warning: {missing} of {totals[FULL_STAGE]} picks failed to train and are no members; see above")
    else:
        _make_room(run, config, listener)
    return members


def _make_room(run: RunDir, config: RunConfig, listener: Listener) -> None:
    """Once all members are trained, checkpoints that nobody needs any more go."""
    removed = remove_needless(run, config)
    if removed.files:
        listener.say(
            f"removed {removed.files} checkpoints of trials that were not picked, {format_bytes(removed.bytes)}; their "
            "records stay"
        )


def evaluate(run: RunDir, config: RunConfig, listener: Listener) -> None:
    """Evaluate the ensemble, unless these very members are evaluated already."""
    members = trained_members(run)
    if still_holds(run.evaluation(), config, members):
        return
    _leave_if_due(run)
    listener.phase("evaluation")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    meter = metered(run.phase_folder("evaluation"), "driver", config.telemetry, on_gpu=device.type == "cuda")
    with campaign_shown(run, config, "evaluation"), meter:
        evaluate_run(run, config, members, device, listener.say)


def run_all(run: RunDir, config: RunConfig, launcher: Launcher, listener: Listener) -> bool:
    """Everything, from data to release; False when there was nothing left to do."""
    search(run, config, launcher, listener)
    if _is_selected_by_an_earlier_version(run):
        listener.say(
            "the selection is of an earlier version and its members are trained, so it is kept; `wattier select` picks "
            "by the rules of this one"
        )
    else:
        select(run, config, listener)
    if config.trial is not None:  # what is chosen is trained by whoever wrote the function
        if _is_younger([run.report_path], run):
            return False
        write_report(run)
        return True
    train(run, config, launcher, listener)
    evaluate(run, config, listener)
    if _is_up_to_date(run):
        return False
    _leave_if_due(run)
    listener.phase("release")
    export_release(run, config)
    write_report(run)
    return True


def _is_selected_by_an_earlier_version(run: RunDir) -> bool:
    """Whether all is trained that was picked by rules which the selection does not name: this version may pick others.

    Nobody has asked for what those would cost.
    """
    selection = run.selection()
    return selection is not None and not selection.rules and not untrained(run, selection)


def _leave_if_due(run: RunDir) -> None:
    """Begin nothing new when the command is to leave; while trials ran it was they who were told."""
    if (reason := LeaveNote(run).due()) is not None:
        raise NotFinishedError(reason)


@contextmanager
def launcher_for(config: RunConfig) -> Iterator[Launcher]:
    """The launcher that the config names; Ray is imported only where it is used."""
    take_environment()  # no process that a launcher starts inherits a password
    launcher: Launcher
    if config.launcher == "inline":
        launcher = InlineLauncher()
    else:
        from wattier.ray_backend import RayLauncher

        launcher = RayLauncher()
    try:
        yield launcher
    finally:
        launcher.close()


def _projection(
    run: RunDir, config: RunConfig, store: Store, converge: Converge
) -> Callable[[TrialResult], float | None]:
    """What full training of a trial will cost, by the energy model; unknown stays unknown.

    Where the search minimizes `projected_joules`, they are what it minimized: from the trial's own joules a structure.
    So they are where the model has learned of no trial, since each was tried more than once.
    """
    stage = config.search.stages[-1].name
    told = {} if "projected_joules" in config.search.objectives else joules_to_convergence(run, config, store, stage)

    def project(result: TrialResult) -> float | None:
        if result.energy_joules is None or not result.structures_seen:
            return None
        known = told.get(result.trial_id)
        return converge(result.params, result.energy_joules / result.structures_seen) if known is None else known

    return project


def _not_projected(_: TrialResult) -> float | None:
    return None


def _to_convergence(config: RunConfig, n_training: int | None) -> Converge:
    """Joules of full training from joules a structure."""

    def converge(params: Params, joules_per_structure: float) -> float | None:
        if n_training is None:
            return None
        structures = settings_of(config, params)[1].epoch_structures or n_training
        return joules_per_structure * structures * config.full_training.epochs

    return converge


def _check_stages(run: RunDir, config: RunConfig) -> None:
    """Refuse what could never start, before any work is done."""
    if runs_here(config):
        fidelities = [fidelity_of(section) for section in config.search.stages]
        for fidelity in [*fidelities, full_fidelity(config)]:
            check_local_resources(Stage(run, config, fidelity, n_trials=0))
        check_power_caps(config)


def _teller(run: RunDir, totals: dict[str, int], listener: Listener) -> Callable[[TrialResult], None]:
    """Tells the listener of a result, and how many of its stage there are now."""

    def tell(result: TrialResult) -> None:
        stage = result.fidelity.stage
        listener.trial(result, len(run.trials(stage)), totals.get(stage, 0))

    return tell


def _is_up_to_date(run: RunDir) -> bool:
    """Whether the report and a whole release are there, and younger than all they are made from."""
    manifest = run.release_path / MANIFEST
    if not (run.report_path.exists() and manifest.exists()):
        return False
    files = read_json(manifest).get("files", {})
    whole = all((run.release_path / name).is_file() for name in files)
    return whole and _is_younger([run.report_path, manifest], run)


def _is_younger(made: list[Path], run: RunDir) -> bool:
    """Whether files are there, and were made after the last trial, selection and evaluation."""
    sources = [path for path in (run.trials_path, run.selection_path, run.evaluation_path) if path.exists()]
    if not all(path.exists() for path in made):
        return False
    return max(path.stat().st_mtime_ns for path in sources) <= min(path.stat().st_mtime_ns for path in made)
