"""The funnel: stages of rising fidelity, each a fair comparison of its own, each taught by those before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from wattier.budget import Budget
from wattier.config import RunConfig
from wattier.config_search import StageSection
from wattier.costs import Costs, fidelity_of, mean_joules
from wattier.departure import LeaveNote, NotFinishedError, trials_run
from wattier.launch import Launcher, NotNow, Policy, Stage, was_cut_off
from wattier.mirror import Mirror
from wattier.multifidelity import Observation
from wattier.objectives import Objectives
from wattier.pareto import non_dominated_ranks
from wattier.policy import Before, SearchPolicy
from wattier.priors import key_of
from wattier.records import Fidelity, Params, Proposal, TrialResult
from wattier.rundir import RunDir, append_json_line, read_json, write_json
from wattier.sampler import Point
from wattier.select import by_trade_off, compare, split_candidates
from wattier.space import contains, typed_space
from wattier.trial_context import RunTrial
from wattier.warm_start import PriorTrial

LESS_THAN_ALL = 0.99  # an earlier stage's fidelity, where it is not smaller than the present one's
UNKNOWN_SHARE = 0.5  # ... of a trial of which nobody says how far it was trained
STOPPED_SHARE = 0.5  # of its joules a stage spends when its scheduler stops trials, for planning


def run_search(  # noqa: PLR0913  (who launches, who listens, who knows the price)
    run: RunDir,
    config: RunConfig,
    launcher: Launcher,
    run_trial: RunTrial,
    on_result: Callable[[TrialResult], None],
    *,
    costs: Costs | None = None,
    objectives: Objectives | None = None,
    n_training: int | None = None,
    priors: Sequence[PriorTrial] = (),
    mirror: Mirror | None = None,
) -> None:
    """Run all stages that are not finished yet, adopting and resuming what a killed run left.

    Args:
        run: where the records are.
        config: what to run.
        launcher: runs the trials.
        run_trial: trains one.
        on_result: hears of each trial that ended.
        costs: what knows the price of a trial; None = nothing is projected.
        objectives: what trials are compared by; None = as the config says.
        n_training: training structures there are, which a stage without `structures` takes.
        priors: trials of other campaigns.
        mirror: shows the trials to optuna-dashboard.
    """
    objectives = objectives or Objectives.of(config.search)
    if n_training is None:  # of data of your own nobody knows more than this
        n_training = max(section.structures or 1 for section in config.search.stages)
    for index, section in enumerate(config.search.stages):
        earlier = config.search.stages[index - 1].name if index else ""
        promoted = promoted_trials(each_once(run.trials(earlier)), earlier, section.promote, objectives)
        stage = Stage(run, config, fidelity_of(section), section.trials)
        share = budget_shares(config, costs, n_training)[section.name]
        names = stage_names(config)
        budget = Budget(config.search.budget, run, names, share, names[: index + 1])

        def make_policy(section: StageSection = section, promoted=promoted, budget: Budget = budget) -> SearchPolicy:  # type: ignore[no-untyped-def]
            return SearchPolicy(
                config,
                section,
                run=run,
                promoted=[result.params for result in promoted],
                before=what_was_before(run, config, section, objectives, costs, n_training, priors),
                objectives=objectives,
                budget=budget,
                costs=costs,
            )

        if not is_over(run, config, section):
            run_stage(stage, make_policy, launcher, run_trial, on_result, mirror=mirror)
            _note_end(run, config, section, budget.refused)


def run_stage(  # noqa: PLR0913, PLR0917  (what a stage is, and how it is run)
    stage: Stage,
    make_policy: Callable[[], Policy],
    launcher: Launcher,
    run_trial: RunTrial,
    on_result: Callable[[TrialResult], None],
    is_done: Callable[[TrialResult], bool] = lambda _: True,
    mirror: Mirror | None = None,
) -> None:
    """Run what is left of one stage; a stage whose trials all have a row that counts as done starts nothing."""
    adopt_finished(stage)
    if mirror is not None:
        mirror.sync()
    if sum(map(is_done, stage.run.trials(stage.fidelity.stage))) >= stage.n_trials:
        return

    def record(result: TrialResult) -> None:
        if result.goes_on:
            on_result(result)
            return
        append_json_line(stage.run.trials_path, result.to_dict())
        if mirror is not None:
            mirror.finished(result)
        on_result(result)

    policy = UntilLeaving(make_policy(), LeaveNote(stage.run))
    if (reason := policy.note.too_late_to_start()) is not None:
        raise NotFinishedError(reason)
    shown = policy if mirror is None else _Mirrored(policy, stage.fidelity.stage, mirror)
    with trials_run():
        launcher.run(stage, shown, run_trial, record)
    n_done = sum(map(is_done, stage.run.trials(stage.fidelity.stage)))
    if policy.left is not None and n_done < stage.n_trials:
        raise NotFinishedError(policy.left)


class UntilLeaving:
    """A policy that starts nothing any more when the command is about to leave."""

    def __init__(self, policy: Policy, note: LeaveNote) -> None:
        self.policy, self.note = policy, note
        self.left: str | None = None  # why something was not started, or not finished
        self.on_epoch = policy.on_epoch

    def propose(self) -> Proposal | NotNow | None:
        """The policy's next trial, or none."""
        if (reason := self.note.too_late_to_start()) is not None:
            self.left = reason
            return None
        return self.policy.propose()

    def on_result(self, result: TrialResult) -> None:
        """A trial that goes on another time has taught nothing yet."""
        if result.goes_on:
            self.left = result.ended
        else:
            self.policy.on_result(result)


class _Mirrored:
    """A policy whose trials show in optuna-dashboard as soon as they start."""

    def __init__(self, policy: Policy, stage: str, mirror: Mirror) -> None:
        self.policy, self.stage, self.mirror = policy, stage, mirror
        self.on_epoch, self.on_result = policy.on_epoch, policy.on_result

    def propose(self) -> Proposal | NotNow | None:
        proposal = self.policy.propose()
        if isinstance(proposal, Proposal):
            self.mirror.started(self.stage, proposal)
        return proposal


def adopt_finished(stage: Stage) -> None:
    """Record the trials that finished while no driver was there to write it down; who was cut off goes on."""
    name = stage.fidelity.stage
    known = {result.trial_id for result in stage.run.trials(name)}
    for path in sorted((stage.run.path / "trials" / name).glob("*/result.json")):
        if path.parent.name not in known:
            result = stage.recorded(path)
            if was_cut_off(path.parent, result):
                path.unlink()
                continue
            append_json_line(stage.run.trials_path, result.to_dict())


def each_once(results: Sequence[TrialResult]) -> list[TrialResult]:
    """One trial a configuration: of those that ran several times the finished one with the lowest loss."""
    best: dict[str, TrialResult] = {}
    for result in sorted(results, key=lambda r: (r.status != "complete", r.val_loss is None, r.val_loss or 0.0)):
        best.setdefault(key_of(result.params), result)
    return list(best.values())


def promoted_trials(
    results: Sequence[TrialResult], stage: str, count: int, objectives: Objectives | None = None
) -> list[TrialResult]:
    """The best trials of a finished stage: by front, then by hypervolume contribution; of one objective, by its value.

    Trials that were stopped, diverged, failed, or used more than is allowed are never among them.
    """
    compared = objectives or Objectives(("val_loss", "energy_joules"))
    candidates, _ = split_candidates(results, stage=stage, by_energy=compared.names != ("val_loss",))
    valued = [(trial, values) for trial in candidates if (values := compared.of_result(trial)) is not None]
    if not valued or count == 0:
        return []
    if compared.count == 1:
        return [trial for trial, _ in sorted(valued, key=lambda pair: (*pair[1], pair[0].trial_id))[:count]]
    field = compare([trial for trial, _ in valued], [values for _, values in valued])
    return [standing.trial for standing in sorted(field.standings, key=by_trade_off)[:count]]


def on_front(run: RunDir, config: RunConfig) -> list[TrialResult]:
    """Trials of the last stage that no other one beats in all objectives, the lowest loss first."""
    objectives = Objectives.of(config.search)
    ranked = promoted_trials(run.trials(), stage_names(config)[-1], len(run.trials()), objectives)
    if objectives.count == 1:
        return ranked[:1]
    values = [point for trial in ranked if (point := objectives.of_result(trial)) is not None]
    ranks = non_dominated_ranks(values)
    return sorted((t for t, rank in zip(ranked, ranks, strict=True) if rank == 0), key=lambda t: t.val_loss or 0.0)


def what_was_before(  # noqa: PLR0913, PLR0917
    run: RunDir,
    config: RunConfig,
    section: StageSection,
    objectives: Objectives,
    costs: Costs | None,
    n_training: int | None,
    priors: Sequence[PriorTrial] = (),
) -> Before:
    """What other campaigns and earlier stages have taught, each trial at its fidelity relative to this stage's."""
    space, here = typed_space(config), fidelity_of(section)
    names = stage_names(config)
    seen, points, lost = _from_priors(priors, here, objectives, costs, n_training)
    for name in names[: names.index(section.name)]:
        for trial in run.trials(name):
            if not contains(space, trial.params):
                continue
            if trial.diverged or trial.status == "failed":
                lost.append(trial.params)
            if trial.val_loss is None or not trial.epochs_done:
                continue
            ratio = size_of(trial.fidelity, n_training) / size_of(here, n_training)
            done = min(1.0, trial.epochs_done / trial.fidelity.epochs)
            joules = _joules_here(costs, here, trial.params, trial.energy_joules, ratio * done)
            values = objectives.values(trial.params, trial.val_loss, joules, trial.structures_seen / (ratio * done))
            if values is not None:
                second, share = values[1] if len(values) > 1 else None, min(LESS_THAN_ALL, ratio)
                seen.append(Observation(trial.params, share * done, values[0], second, trial.limit_ratios, False))
            if trial.status == "complete" and (own := objectives.of_result(trial)) is not None:
                points.append(Point(trial.params, own))
    return Before(seen, points, lost)


def _joules_here(
    costs: Costs | None, here: Fidelity, params: Params, joules: float | None, ratio: float
) -> float | None:
    """Joules of a trial at this stage's fidelity: as projected, else those it took at another one, in proportion."""
    if costs is not None and (known := costs.joules([params], here)) is not None:
        return float(known[0])
    return None if joules is None else joules / ratio


def _from_priors(
    priors: Sequence[PriorTrial], here: Fidelity, objectives: Objectives, costs: Costs | None, n_training: int | None
) -> tuple[list[Observation], list[Point], list[Params]]:
    """Trials of other campaigns: of a lower fidelity, however far they were trained, since on other data."""
    seen: list[Observation] = []
    points: list[Point] = []
    lost = [prior.params for prior in priors if prior.val_loss is None]  # they diverged
    for prior in priors:
        if prior.val_loss is None:
            continue
        ratio = UNKNOWN_SHARE
        if prior.fidelity is not None:
            ratio = size_of(prior.fidelity, n_training) / size_of(here, n_training)
        joules, share = _joules_here(costs, here, prior.params, prior.energy_joules, ratio), min(LESS_THAN_ALL, ratio)
        values = objectives.values(prior.params, prior.val_loss, joules, size_of(here, n_training))
        if values is None:
            continue
        seen.append(Observation(prior.params, share, values[0], values[1] if len(values) > 1 else None, {}, False))
        if prior.status == "complete":
            points.append(Point(prior.params, values))
    return seen, points, lost


def is_over(run: RunDir, config: RunConfig, section: StageSection) -> bool:
    """Whether nothing is left to start in a stage: all trials have a row, or this very budget ended it."""
    if len(run.trials(section.name)) >= section.trials:
        return True
    note = stage_end(run, section.name)
    return note is not None and note["budget"] == _budget_of(config)


def stage_end(run: RunDir, stage: str) -> Mapping[str, object] | None:
    """Why a stage ended with fewer trials than were planned, where it did: ``search.json``."""
    notes = read_json(run.search_path) if run.search_path.exists() else {}
    note = notes.get(stage) if isinstance(notes, dict) else None
    return note if isinstance(note, dict) and {"reason", "budget"} <= set(note) else None


def stage_names(config: RunConfig) -> list[str]:
    """Stages of the search in their order."""
    return [stage.name for stage in config.search.stages]


def size_of(fidelity: Fidelity, n_training: int | None) -> float:
    """How much a trial of a fidelity sees: structures times epochs."""
    there = n_training or fidelity.structures or 1
    return float(fidelity.epochs * min(fidelity.structures or there, there))


def budget_shares(config: RunConfig, costs: Costs | None, n_training: int | None) -> dict[str, float]:
    """The share of the budget that may be spent by the end of each stage, so that later ones get theirs."""
    planned = {}
    for section in config.search.stages:
        each = mean_joules(config, costs, section)
        size = size_of(fidelity_of(section), n_training) * section.ranks
        stopped = 1.0 if section.reduction_factor is None else STOPPED_SHARE
        planned[section.name] = section.trials * stopped * (size if each is None else each)
    total, so_far, shares = sum(planned.values()), 0.0, {}
    for name, joules in planned.items():
        so_far += joules
        shares[name] = so_far / total
    shares[config.search.stages[-1].name] = 1.0
    return shares


def _note_end(run: RunDir, config: RunConfig, section: StageSection, reason: str | None) -> None:
    """Write down that a stage ended early, or that it did not."""
    notes = read_json(run.search_path) if run.search_path.exists() else {}
    missing = section.trials - len(run.trials(section.name))
    if missing > 0:
        why = reason or "the search space holds no other configuration"
        notes[section.name] = {"reason": why, "missing": missing, "budget": _budget_of(config)}
        write_json(run.search_path, notes)
    elif section.name in notes:
        del notes[section.name]
        write_json(run.search_path, notes)


def _budget_of(config: RunConfig) -> dict[str, object] | None:
    return None if config.search.budget is None else config.search.budget.model_dump()
