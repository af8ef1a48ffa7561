"""The funnel: stages of rising fidelity, each searched by an Optuna sampler, each a fair comparison of its own."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from wattier.config import RunConfig, SearchSection, StageSection, field_type
from wattier.config_space import ChoiceParameter, RangeParameter
from wattier.launch import Launcher, Policy, Stage
from wattier.records import EpochRecord, Fidelity, Params, Proposal, TrialResult
from wattier.rundir import RunDir, append_json_line, decode, read_json
from wattier.select import by_trade_off, compare, split_candidates
from wattier.trial import RunTrial

optuna.logging.set_verbosity(optuna.logging.WARNING)
N_STARTUP_TRIALS = 4


def distributions(space: dict[str, RangeParameter | ChoiceParameter]) -> dict[str, BaseDistribution]:
    """The search space in Optuna's words."""
    return {name: _distribution(name, parameter) for name, parameter in space.items()}


class Halving:
    """Asynchronous successive halving on the validation loss (Li et al., MLSys 2020).

    Rungs stand at epochs 1, r, r^2 ... below the last; a trial goes on past a rung while it is among the best 1/r of
    those that reached it. Asked twice about one epoch, it repeats its answer.
    """

    def __init__(self, epochs: int, reduction_factor: int | None) -> None:
        self.reduction_factor = reduction_factor or 0
        self.rungs: dict[int, dict[str, float]] = {}
        rung = 1
        while reduction_factor and rung < epochs:
            self.rungs[rung] = {}
            rung *= reduction_factor
        self.answers: dict[tuple[str, int], bool] = {}

    def go_on(self, trial_id: str, record: EpochRecord) -> bool:
        """Whether a trial is worth its next epoch."""
        key = (trial_id, record.epoch)
        if key not in self.answers:
            self.answers[key] = self._judge(trial_id, record)
        return self.answers[key]

    def _judge(self, trial_id: str, record: EpochRecord) -> bool:
        if record.val_loss is None:
            return False
        rung = self.rungs.get(record.epoch)
        if rung is None:
            return True
        rung[trial_id] = record.val_loss
        keep = max(1, math.ceil(len(rung) / self.reduction_factor))
        return sorted(rung.values())[keep - 1] >= record.val_loss


class SearchPolicy:
    """One stage's policy: interrupted trials first, then promoted ones, then the sampler's.

    The study holds this stage only: values of another fidelity would not be comparable. It is rebuilt from the run's
    records, so a killed run goes on with what it knew.
    """

    def __init__(self, config: RunConfig, stage: StageSection, *, run: RunDir, promoted: Sequence[Params]) -> None:
        self.stage, self.run = stage, run
        self.space = distributions(config.search.space)
        self.halving = Halving(stage.epochs, stage.reduction_factor)
        done = run.trials(stage.name)
        self.asked: dict[str, optuna.Trial] = {}
        finished = {result.trial_id for result in done}
        self.waiting = [p for p in self._opened() if p.trial_id not in finished]
        opened = finished | {p.trial_id for p in self.waiting}
        # Neither another stage nor a killed process of this one has drawn from the same seed.
        seed = zlib.crc32(f"{config.seed} {stage.name} {len(opened)}".encode())
        self.study = optuna.create_study(directions=["minimize", "minimize"], sampler=_sampler(config.search, seed))
        for index, params in enumerate(promoted):
            trial_id = self._trial_id(index)
            if trial_id not in opened:
                self.waiting.append(Proposal(trial_id, params))
                opened.add(trial_id)
        self.free_ids = [i for i in (self._trial_id(k) for k in range(stage.trials)) if i not in opened]
        for result in done:
            self._replay(result)
        for proposal in self.waiting:
            self._replay_epochs(proposal.trial_id)

    def propose(self) -> Proposal | None:
        """The next trial, or None when the stage has started all of its trials."""
        if self.waiting:
            proposal = self.waiting.pop(0)
            self.study.enqueue_trial(self._known(proposal.params))
            self.asked[proposal.trial_id] = self.study.ask(self.space)
            return proposal
        if not self.free_ids:
            return None
        trial_id = self.free_ids.pop(0)
        trial = self.study.ask(self.space)
        self.asked[trial_id] = trial
        return Proposal(trial_id, dict(trial.params))

    def on_epoch(self, trial_id: str, record: EpochRecord) -> bool:
        """Stop what halving would not go on with; never after the last epoch."""
        return record.epoch >= self.stage.epochs or self.halving.go_on(trial_id, record)

    def on_result(self, result: TrialResult) -> None:
        """Tell the sampler: only a trial that finished the stage is COMPLETE; stopped and diverged ones are PRUNED."""
        trial = self.asked.pop(result.trial_id, None)
        if trial is None:
            return
        values, state = _told(result)
        self.study.tell(trial, values, state=state)

    def _trial_id(self, index: int) -> str:
        return f"{self.stage.name}-{index:03d}"

    def _opened(self) -> list[Proposal]:
        """Trials whose folder exists, by their ``trial.json``."""
        folder = self.run.path / "trials" / self.stage.name
        notes = sorted(folder.glob("*/trial.json"))
        return [
            decode(path, lambda note: Proposal(note["trial_id"], note["params"]), read_json(path)) for path in notes
        ]

    def _known(self, params: Params) -> Params:
        return {k: v for k, v in params.items() if k in self.space}

    def _replay(self, result: TrialResult) -> None:
        """Tell a rebuilt study what an earlier process already learned."""
        self._replay_epochs(result.trial_id)
        values, state = _told(result)
        if set(result.params) == set(self.space):
            self.study.add_trial(
                optuna.trial.create_trial(
                    params=result.params, distributions=self.space, values=values, state=state or TrialState.COMPLETE
                )
            )

    def _replay_epochs(self, trial_id: str) -> None:
        for record in self.run.epochs(self.stage.name, trial_id):
            self.on_epoch(trial_id, record)


class FixedPolicy:
    """Runs given trials, and lets every one go on to its end."""

    def __init__(self, proposals: Sequence[Proposal]) -> None:
        self.waiting = list(proposals)

    def propose(self) -> Proposal | None:
        """The next of the given trials."""
        return self.waiting.pop(0) if self.waiting else None

    def on_epoch(self, trial_id: str, record: EpochRecord) -> bool:  # noqa: ARG002
        """Always go on."""
        return True

    def on_result(self, result: TrialResult) -> None:
        """Nothing to learn."""


def promoted_trials(results: Sequence[TrialResult], stage: str, count: int) -> list[TrialResult]:
    """The best trials of a finished stage, compared as the selection compares them: by front, then by contribution."""
    candidates, _ = split_candidates(results, stage=stage)
    if not candidates or count == 0:
        return []
    return [standing.trial for standing in sorted(compare(candidates).standings, key=by_trade_off)[:count]]


def run_search(
    run: RunDir, config: RunConfig, launcher: Launcher, run_trial: RunTrial, on_result: Callable[[TrialResult], None]
) -> None:
    """Run all stages that are not finished yet, adopting and resuming what a killed run left."""
    earlier = ""
    for section in config.search.stages:
        promoted = [result.params for result in promoted_trials(run.trials(), earlier, section.promote)]
        stage = Stage(
            run,
            config,
            Fidelity(section.name, section.structures, section.epochs, section.ranks),
            section.trials,
        )
        make_policy = partial(SearchPolicy, config, section, run=run, promoted=promoted)
        run_stage(stage, make_policy, launcher, run_trial, on_result)
        earlier = section.name


def run_stage(  # noqa: PLR0913, PLR0917  (what a stage is, and how it is run)
    stage: Stage,
    make_policy: Callable[[], Policy],
    launcher: Launcher,
    run_trial: RunTrial,
    on_result: Callable[[TrialResult], None],
    is_done: Callable[[TrialResult], bool] = lambda _: True,
) -> None:
    """Run what is left of one stage; a stage whose trials all have a row that counts as done starts nothing."""
    adopt_finished(stage)
    if sum(map(is_done, stage.run.trials(stage.fidelity.stage))) >= stage.n_trials:
        return

    def record(result: TrialResult) -> None:
        append_json_line(stage.run.trials_path, result.to_dict())
        on_result(result)

    launcher.run(stage, make_policy(), run_trial, record)


def adopt_finished(stage: Stage) -> None:
    """Record the trials that finished while no driver was there to write it down."""
    name = stage.fidelity.stage
    known = {result.trial_id for result in stage.run.trials(name)}
    for path in sorted((stage.run.path / "trials" / name).glob("*/result.json")):
        if path.parent.name not in known:
            result = stage.recorded(path)
            append_json_line(stage.run.trials_path, result.to_dict())


def _told(result: TrialResult) -> tuple[list[float] | None, TrialState | None]:
    """Values and state for Optuna; a trial whose joules are unknown cannot be compared and counts as failed."""
    if result.status == "complete" and result.val_loss is not None and result.energy_joules is not None:
        return [result.val_loss, result.energy_joules], None
    return None, TrialState.PRUNED if result.status == "pruned" else TrialState.FAIL


def _sampler(search: SearchSection, seed: int) -> BaseSampler:
    if search.sampler == "random":
        return RandomSampler(seed=seed)
    if search.sampler == "nsga2":
        return NSGAIISampler(seed=seed, population_size=max(4, N_STARTUP_TRIALS))
    return TPESampler(seed=seed, n_startup_trials=N_STARTUP_TRIALS)


def _distribution(name: str, parameter: RangeParameter | ChoiceParameter) -> BaseDistribution:
    if isinstance(parameter, ChoiceParameter):
        return CategoricalDistribution(parameter.choices)
    if field_type(name) is int:
        step = int(parameter.step or 1)
        return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log, step=step)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)
