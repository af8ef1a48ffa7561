"""Full training: only the picked trials, on all training structures, until they converge."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from wattier.budget import Budget
from wattier.config import RunConfig
from wattier.costs import Costs, full_fidelity, refuse_small_training_budget
from wattier.errors import UserError
from wattier.funnel import run_stage
from wattier.launch import Launcher, Stage
from wattier.mirror import Mirror
from wattier.policy import FixedPolicy
from wattier.records import Proposal, Selection, TrialResult
from wattier.rundir import FULL_STAGE, RunDir, append_json_line, read_json
from wattier.trial_context import RunTrial


def train_members(  # noqa: PLR0913, PLR0917  (what runs, who listens, who knows the price)
    run: RunDir,
    config: RunConfig,
    launcher: Launcher,
    run_trial: RunTrial,
    on_result: Callable[[TrialResult], None],
    costs: Costs | None = None,
    mirror: Mirror | None = None,
) -> list[TrialResult]:
    """Train every picked trial that is not trained yet; the complete members, in the order of the selection.

    One that the budget of full training does not pay for gets the record of a failed one; the next command, perhaps
    with a larger budget, tries it again.

    Raises:
        UserError: nothing is selected yet, or no member could be trained.
    """
    selection = _selection(run)
    params = {result.trial_id: result.params for result in run.trials(selection.stage)}
    full = config.full_training
    stage = Stage(
        run,
        config,
        full_fidelity(config),
        n_trials=len(selection.picked),
        early_stop_patience=full.early_stop_patience,
        warm_start_from=selection.stage if full.warm_start else None,
        seeds=member_seeds(run, selection.picked, config.seed),
    )

    due = [Proposal(trial_id, params[trial_id]) for trial_id in untrained(run, selection)]
    if costs is not None and due:
        refuse_small_training_budget(run, config, costs, [proposal.params for proposal in due], stage.fidelity)
    budget = Budget(full.budget, run, [FULL_STAGE])
    policy = FixedPolicy(due, fidelity=stage.fidelity, budget=budget, costs=costs)

    def is_done(result: TrialResult) -> bool:
        return result.trial_id in selection.picked and result.status != "failed"

    run_stage(stage, lambda: policy, launcher, run_trial, on_result, is_done, mirror)
    told = {result.trial_id: result.error for result in run.trials(FULL_STAGE)}
    for trial_id, reason in policy.refused.items():
        result = stage.outcome(Proposal(trial_id, params[trial_id]), f"not started: {reason} (full_training.budget)")
        if told.get(trial_id) != result.error:  # the same command again says nothing new
            append_json_line(run.trials_path, result.to_dict())
        on_result(result)
    return trained_members(run)


def member_seeds(run: RunDir, picked: Sequence[str], first: int) -> dict[str, int]:
    """A seed for each pick, no two alike, that stays with it whatever else is picked later.

    Who has begun keeps the seed that its ``trial.json`` notes, also of one that is no longer picked; the others take
    the lowest that are free. An earlier version noted none, and seeded by place.
    """
    begun: dict[str, int] = {}
    for note in (run.path / "trials" / FULL_STAGE).glob("*/trial.json"):
        noted, name = read_json(note), note.parent.name
        seed = noted.get("seed") if isinstance(noted, dict) else None
        if isinstance(seed, int):
            begun[name] = seed
        elif name in picked:
            begun[name] = first + picked.index(name)
    free = (seed for seed in itertools.count(first) if seed not in begun.values())
    return {trial_id: begun[trial_id] if trial_id in begun else next(free) for trial_id in picked}


def untrained(run: RunDir, selection: Selection) -> list[str]:
    """Picks that are not trained; a failed one counts, so that the next command tries it again."""
    done = {result.trial_id for result in run.trials(FULL_STAGE) if result.status != "failed"}
    return [trial_id for trial_id in selection.picked if trial_id not in done]


def trained_members(run: RunDir) -> list[TrialResult]:
    """The picked trials that are trained to the end, in the order of the selection.

    Raises:
        UserError: nothing is selected, a pick is not trained yet, or none of them could be.
    """
    selection = _selection(run)
    results = {result.trial_id: result for result in run.trials(FULL_STAGE)}
    if missing := [t for t in selection.picked if t not in results]:
        raise UserError(f"{run.path}: {', '.join(missing)} not trained yet. Run `wattier train` first.")
    members = [results[t] for t in selection.picked if results[t].status == "complete"]
    if not members:
        errors = "; ".join(f"{r.trial_id}: {r.error or r.status}" for r in results.values())
        raise UserError(f"{run.path}: no member of the ensemble was trained ({errors}). See error.txt in its folder.")
    return members


def _selection(run: RunDir) -> Selection:
    selection = run.selection()
    if selection is None:
        raise UserError(f"{run.path}: nothing is selected yet. Run `wattier select` first.")
    return selection
