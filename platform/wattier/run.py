"""The funnel from data to release: each step reads the run directory, does what is left, and writes it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from wattier.config import RunConfig
from wattier.errors import UserError
from wattier.evaluate import evaluate_run, member_summary
from wattier.fulltrain import train_members, trained_members, untrained
from wattier.launch import InlineLauncher, Launcher, Stage, check_local_resources, runs_here
from wattier.metering import metered
from wattier.prepare import prepare_data
from wattier.records import Fidelity, Selection, TrialResult
from wattier.release import export_release
from wattier.report import write_report
from wattier.rundir import FULL_STAGE, RunDir, read_json, write_json
from wattier.search import run_search
from wattier.select import select_trials
from wattier.storage_url import take_environment
from wattier.trial import run_trial, settings_of
from wattier_gnn.ensemble import MANIFEST
from wattier_gnn.pool import Progress
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
    totals = {stage.name: stage.trials for stage in config.search.stages}
    if all(len(run.trials(name)) >= total for name, total in totals.items()):
        return
    _check_stages(run, config)
    prepare_data(run, config, listener)
    listener.phase("search")
    run_search(run, config, launcher, run_trial, _teller(run, totals, listener))


def select(run: RunDir, config: RunConfig, listener: Listener) -> Selection:
    """Sort the finished trials of the last stage into tiers; a selection that still holds is left as it is."""
    stage = config.search.stages[-1]
    missing = stage.trials - len(run.trials(stage.name))
    if missing > 0:
        raise UserError(
            f"{run.path}: {missing} trials of stage {stage.name!r} are not done. Run `wattier search` first."
        )
    selection = select_trials(
        run.trials(), config.select, stage=stage.name, project=_projection(Store(run.store_path), config)
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
    if selection and untrained(run, selection):
        listener.phase("full training")
    members = train_members(run, config, launcher, run_trial, _teller(run, totals, listener))
    if missing := totals[FULL_STAGE] - len(members):
        listener.say(f"warning: {missing} of {totals[FULL_STAGE]} picks failed to train and are no members; see above")
    return members


def evaluate(run: RunDir, config: RunConfig, listener: Listener) -> None:
    """Evaluate the ensemble, unless these very members are evaluated already."""
    members = trained_members(run)
    evaluation = run.evaluation()
    if evaluation is not None and evaluation["members"] == [member_summary(member) for member in members]:
        return
    listener.phase("evaluation")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with metered(run.phase_folder("evaluation"), "driver", config.telemetry, on_gpu=device.type == "cuda"):
        evaluate_run(run, config, members, device, listener.say)


def run_all(run: RunDir, config: RunConfig, launcher: Launcher, listener: Listener) -> bool:
    """Everything, from data to release; False when there was nothing left to do."""
    search(run, config, launcher, listener)
    select(run, config, listener)
    train(run, config, launcher, listener)
    evaluate(run, config, listener)
    if _is_up_to_date(run):
        return False
    listener.phase("release")
    export_release(run, config)
    write_report(run)
    return True


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


def _projection(store: Store, config: RunConfig) -> Callable[[TrialResult], float | None]:
    """Joules of training a trial on all structures for all epochs, extrapolated from its own joules a structure.

    An early stop makes the truth smaller; other ranks than the stage's make it larger or smaller.
    """
    n_training, epochs = len(store.indices(TRAIN)), config.full_training.epochs

    def project(result: TrialResult) -> float | None:
        if result.energy_joules is None or not result.structures_seen:
            return None
        structures = settings_of(config, result.params)[1].epoch_structures or n_training
        return result.energy_joules / result.structures_seen * structures * epochs

    return project


def _check_stages(run: RunDir, config: RunConfig) -> None:
    """Refuse what could never start, before any work is done."""
    if runs_here(config):
        fidelities = [Fidelity(s.name, s.structures, s.epochs, s.ranks) for s in config.search.stages]
        full = config.full_training
        for fidelity in [*fidelities, Fidelity(FULL_STAGE, None, full.epochs, full.ranks)]:
            check_local_resources(Stage(run, config, fidelity, n_trials=0))


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
    made = min(run.report_path.stat().st_mtime_ns, manifest.stat().st_mtime_ns)
    sources = [path for path in (run.trials_path, run.selection_path, run.evaluation_path) if path.exists()]
    files = read_json(manifest).get("files", {})
    whole = all((run.release_path / name).is_file() for name in files)
    return whole and all(path.stat().st_mtime_ns <= made for path in sources)
