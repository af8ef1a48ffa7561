"""One stage's policy: what runs next, what is stopped, and what a sampler is told."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from wattier.budget import Budget, Verdict
from wattier.config import RunConfig
from wattier.config_search import StageSection
from wattier.costs import Costs, fidelity_of
from wattier.energy_model import Projection
from wattier.halving import Halving, ParetoHalving
from wattier.launch import LATER, NotNow
from wattier.multifidelity import MultiFidelitySampler, Observation, scouts
from wattier.objectives import Objectives
from wattier.optuna_sampler import OptunaSampler
from wattier.priors import key_of
from wattier.records import EpochRecord, Fidelity, Params, Proposal, TrialResult
from wattier.rundir import RunDir, decode, read_json
from wattier.sampler import Cost, Ended, Known, Point, Sampler, Surrogate
from wattier.space import Space, random_points, typed_space

ENOUGH_TO_JUDGE = 20  # trials of a stage, for the surrogate to say which are worth their rest
ATTEMPTS = 5  # suggestions that are looked at before a trial is given up as too dear, or a repetition accepted


@dataclass(frozen=True)
class Before:
    """What the stages before this one, and other campaigns, have taught.

    Attributes:
        observations: at fidelities relative to this stage's, all below 1.
        points: those of them that finished their own stage, the latest stage last.
        lost: what diverged or failed, as it would at a higher fidelity.
    """

    observations: Sequence[Observation] = ()
    points: Sequence[Point] = ()
    lost: Sequence[Params] = ()


@dataclass
class _Trial:
    """A trial of this stage as the policy sees it."""

    params: Params
    records: dict[int, EpochRecord] = field(default_factory=dict)
    result: TrialResult | None = None


class SearchPolicy:
    """Interrupted trials first, then promoted ones, then the sampler's, as far as the budget goes.

    All it knows is rebuilt from the run's records, so a killed run goes on with what it knew.
    """

    def __init__(  # noqa: PLR0913  (what a stage is given)
        self,
        config: RunConfig,
        stage: StageSection,
        *,
        run: RunDir,
        promoted: Sequence[Params] = (),
        before: Before | None = None,
        objectives: Objectives | None = None,
        budget: Budget | None = None,
        costs: Costs | None = None,
    ) -> None:
        self.stage, self.run = stage, run
        self.fidelity = fidelity_of(stage)
        self.before = before or Before()
        self.objectives = objectives or Objectives.of(config.search)
        self.costs = costs
        self.budget = budget or Budget(None, run, ())
        self.halving = _halving(config.search.scheduler, stage)
        self.space = typed_space(config)
        self.trials: dict[str, _Trial] = {}
        self.active: set[str] = set()
        self.held: Proposal | None = None  # suggested, and waiting for the budget
        self._take_up(config, promoted)

    def propose(self) -> Proposal | NotNow | None:
        """The next trial; LATER while it waits for one that runs; None when the stage has started all it may."""
        while self.waiting:
            verdict = self._verdict(self.waiting[0])
            if verdict is Verdict.LATER:
                return LATER
            known = self.waiting.pop(0)
            if verdict is Verdict.START:
                self.sampler.take(known.trial_id, known.params)
                return self._opened(known)
        return self._new() if self.free_ids else None

    def _new(self) -> Proposal | NotNow | None:
        """A trial of the sampler's."""
        proposal = self.held or self._suggested(self.free_ids[0])
        self.held = None
        if proposal is None:
            return LATER if self.active else None
        verdict = self._verdict(proposal)
        if verdict is Verdict.LATER:
            self.held = proposal
            return LATER
        if verdict is Verdict.STOP:
            self.sampler.drop(proposal.trial_id)
            return None
        self.free_ids.pop(0)
        return self._opened(proposal)

    def on_epoch(self, trial_id: str, record: EpochRecord) -> bool:
        """Stop what the scheduler would not go on with; never after the last epoch."""
        if trial_id in self.trials:
            self.trials[trial_id].records[record.epoch] = record
        goes_on = self.halving.go_on(trial_id, record)
        if record.epoch >= self.stage.epochs:
            return True
        return self._is_worth(trial_id, record) if self._by_worth and record.val_loss is not None else goes_on

    def on_result(self, result: TrialResult) -> None:
        """Learn from how a trial ended."""
        trial = self.trials.setdefault(result.trial_id, _Trial(result.params))
        if trial.result is not None:
            return
        trial.result = result
        self.active.discard(result.trial_id)
        self.budget.ended(result)
        if self.costs is not None:
            self.costs.learn(result)
        self._hear_limits(result)
        self.sampler.ended(self._ended(trial, result))

    def _hear_limits(self, result: TrialResult) -> None:
        """What used more than is allowed is no reason to stop others."""
        if any(ratio > 1 for ratio in result.limit_ratios.values()):
            self.halving.disqualify(result.trial_id)

    def _take_up(self, config: RunConfig, promoted: Sequence[Params]) -> None:
        """Rebuild what an earlier process knew, and line up what it left."""
        done = self.run.trials(self.stage.name)
        finished = {result.trial_id for result in done}
        self.waiting = self._noted(finished)
        opened = finished | {p.trial_id for p in self.waiting}
        # Neither another stage nor a killed process of this one has drawn from the same seed.
        seed = zlib.crc32(f"{config.seed} {self.stage.name} {len(opened)}".encode())
        self.sampler = sampler_for(config, self.stage, self.space, seed)
        by_pareto = config.search.scheduler == "pareto"
        self._by_worth = by_pareto and isinstance(self.sampler, Surrogate) and self.stage.trials >= ENOUGH_TO_JUDGE
        self._worth: dict[tuple[str, int], bool] = {}
        self.free_ids = [i for i in map(self._trial_id, range(self.stage.trials)) if i not in opened]
        # By parameters, not by place: under another budget the stage before may go on, and promote others.
        tried = {key_of(result.params) for result in done} | {key_of(p.params) for p in self.waiting}
        for params in promoted:
            if self.free_ids and key_of(params) not in tried:
                self.waiting.append(Proposal(self.free_ids.pop(0), dict(params)))
        for trial_id, params in [
            *((r.trial_id, r.params) for r in done),
            *((p.trial_id, p.params) for p in self.waiting),
        ]:
            epochs = self.run.epochs(self.stage.name, trial_id)
            self.trials[trial_id] = _Trial(params, {record.epoch: record for record in epochs})
        for result in done:
            self._hear_limits(result)
        reported = [(record, trial_id) for trial_id, trial in self.trials.items() for record in trial.records.values()]
        for record, trial_id in sorted(reported, key=lambda pair: pair[0].time_seconds or 0.0):
            self.halving.go_on(trial_id, record)
        for result in done:
            self.trials[result.trial_id].result = result
            if self.costs is not None:
                self.costs.learn(result)
            self.sampler.ended(self._ended(self.trials[result.trial_id], result))

    def _noted(self, finished: Collection[str]) -> list[Proposal]:
        """Trials whose folder exists, by their ``trial.json``, but for those that have a row."""
        notes = sorted((self.run.path / "trials" / self.stage.name).glob("*/trial.json"))
        return [
            decode(path, lambda note: Proposal(note["trial_id"], note["params"]), read_json(path))
            for path in notes
            if path.parent.name not in finished
        ]

    def _trial_id(self, index: int) -> str:
        return f"{self.stage.name}-{index:03d}"

    def _projected(self, params: Params) -> Projection | None:
        return None if self.costs is None else self.costs.project(params, self.fidelity)

    def _verdict(self, proposal: Proposal) -> Verdict:
        due = self._projected(proposal.params)
        joules, seconds = (None, None) if due is None else (due.joules, due.seconds)
        return self.budget.verdict(self.stage.name, proposal.trial_id, joules, seconds)

    def _opened(self, proposal: Proposal) -> Proposal:
        due = self._projected(proposal.params)
        if due is not None:
            proposal = replace(proposal, projected_joules=due.joules, projected_seconds=due.seconds)
        self.trials.setdefault(proposal.trial_id, _Trial(proposal.params))
        self.active.add(proposal.trial_id)
        self.budget.opened(self.stage.name, proposal.trial_id, proposal.projected_joules)
        return proposal

    def _suggested(self, trial_id: str) -> Proposal | None:
        """A suggestion that is new and fits the budget; the last one, if none does."""
        known = self._known()
        tried = {key_of(trial.params) for trial in self.trials.values()}
        for attempt in range(ATTEMPTS if self.sampler.repeats else 1):
            params = self.sampler.suggest(trial_id, known)
            if params is None:
                return None
            proposal = Proposal(trial_id, params)
            fits = self._verdict(proposal) is Verdict.START
            if not self.sampler.repeats or attempt == ATTEMPTS - 1 or (fits and key_of(params) not in tried):
                return proposal
            self.sampler.drop(trial_id)
        return None

    def _is_worth(self, trial_id: str, record: EpochRecord) -> bool:
        """Whether the surrogate expects enough of a trial at a rung; asked twice, it repeats its answer."""
        trial = self.trials.get(trial_id)
        if trial is None or trial_id not in self.halving.rungs.get(record.epoch, {}):
            return True
        key = (trial_id, record.epoch)
        if key not in self._worth:
            seen = self._observations(trial)
            known = self._known(without=trial_id)
            self._worth[key] = not seen or not isinstance(self.sampler, Surrogate) or self.sampler.goes_on(known, seen)
        return self._worth[key]

    def _known(self, without: str | None = None) -> Known:
        """All that is known now, as samplers take it; of one trial nothing."""
        observations, finished, lost = list(self.before.observations), [], list(self.before.lost)
        others = [trial for trial_id, trial in self.trials.items() if trial_id != without]
        for trial in others:
            seen = self._observations(trial)
            observations += seen
            if (end := trial.result) is not None and (end.diverged or end.status == "failed" or not seen):
                lost.append(trial.params)
            if (point := self._point(trial)) is not None:
                finished.append(point)
        return Known(
            observations,
            self.before.points,
            finished,
            [trial.params for trial in others if trial.result is None],
            lost,
            cost := self._cost(),
            self.budget.joules_left if cost is not None or self.objectives.second == "energy_joules" else None,
        )

    def _cost(self) -> Cost | None:
        """Joules of a full trial of this stage, where physics says them; else the sampler learns them itself."""
        costs, fidelity = self.costs, self.fidelity
        if costs is None or not costs.model.knows_the_work:
            return None
        if costs.joules(random_points(self.space, 1, 0), fidelity) is None:
            return None
        return lambda many: costs.model.joules(many, fidelity)

    def _observations(self, trial: _Trial) -> list[Observation]:
        """What a trial has shown so far: its loss at rungs and at its end."""
        epochs = self.stage.epochs
        last = max(trial.records, default=0)
        limits = trial.result.limit_ratios if trial.result is not None else {}
        complete = self._point(trial) is not None
        seen = []
        for epoch, record in trial.records.items():
            if record.val_loss is None or (epoch not in self.halving.rungs and epoch != last):
                continue
            joules = None if record.energy_joules is None else record.energy_joules / epoch * epochs
            values = self.objectives.values(
                trial.params, record.val_loss, joules, record.structures_seen / epoch * epochs
            )
            if values is not None and epoch < epochs:
                seen.append(_observation(trial.params, epoch / epochs, values, limits, complete=False))
        if trial.result is not None and complete:
            values = self.objectives.of_result(trial.result)
            if values is not None:
                seen.append(_observation(trial.params, 1.0, values, limits, complete=True))
        return seen

    def _point(self, trial: _Trial) -> Point | None:
        if trial.result is None or trial.result.status != "complete":
            return None
        values = self.objectives.of_result(trial.result)
        return None if values is None else Point(trial.params, values)

    def _ended(self, trial: _Trial, result: TrialResult) -> Ended:
        status = "failed" if result.status == "interrupted" else result.status
        curve = {epoch: r.val_loss for epoch, r in sorted(trial.records.items()) if r.val_loss is not None}
        point = self._point(trial)
        values = None if point is None else point.values
        return Ended(result.trial_id, result.params, status, values, result.limit_ratios, curve)


class FixedPolicy:
    """Runs given trials as far as the budget goes, and lets every one go on to its end."""

    def __init__(
        self,
        proposals: Sequence[Proposal],
        *,
        fidelity: Fidelity | None = None,
        budget: Budget | None = None,
        costs: Costs | None = None,
    ) -> None:
        self.waiting = list(proposals)
        self.refused: dict[str, str] = {}  # trial id -> why it was not started
        self.fidelity, self.budget, self.costs = fidelity, budget, costs

    def propose(self) -> Proposal | NotNow | None:
        """The next of the given trials that can be paid; LATER while that depends on one that runs."""
        while self.waiting:
            proposal = self._projected(self.waiting[0])
            if self.budget is None or self.fidelity is None:
                return self.waiting.pop(0)
            verdict = self.budget.verdict(
                self.fidelity.stage, proposal.trial_id, proposal.projected_joules, proposal.projected_seconds
            )
            if verdict is Verdict.LATER:
                return LATER
            self.waiting.pop(0)
            if verdict is Verdict.START:
                self.budget.opened(self.fidelity.stage, proposal.trial_id, proposal.projected_joules)
                return proposal
            self.refused[proposal.trial_id] = self.budget.refused or "the budget is spent"
        return None

    def on_epoch(self, trial_id: str, record: EpochRecord) -> bool:  # noqa: ARG002
        """Always go on."""
        return True

    def on_result(self, result: TrialResult) -> None:
        """Learn what it cost."""
        if self.budget is not None:
            self.budget.ended(result)
        if self.costs is not None:
            self.costs.learn(result)

    def _projected(self, proposal: Proposal) -> Proposal:
        if self.costs is None or self.fidelity is None:
            return proposal
        due = self.costs.project(proposal.params, self.fidelity)
        if due is None:
            return proposal
        return replace(proposal, projected_joules=due.joules, projected_seconds=due.seconds)


def sampler_for(config: RunConfig, stage: StageSection, space: Space, seed: int) -> Sampler:
    """The sampler that a config names."""
    if config.search.sampler == "mf_ehvi":
        stops = config.search.scheduler == "pareto" and stage.trials >= ENOUGH_TO_JUDGE and bool(stage.reduction_factor)
        n_scouts = scouts(len(space), stage.epochs, stage.trials) if stops else 0
        return Surrogate(MultiFidelitySampler(space, seed, n_scouts))
    return OptunaSampler(config.search.sampler, space, seed, config.search.n_objectives)


def _halving(scheduler: str, stage: StageSection) -> Halving | ParetoHalving:
    kind = Halving if scheduler == "asha" else ParetoHalving
    return kind(stage.epochs, stage.reduction_factor)


def _observation(
    params: Params, fidelity: float, values: tuple[float, ...], limits: Mapping[str, float], *, complete: bool
) -> Observation:
    joules = values[1] if len(values) > 1 else None
    return Observation(params, fidelity, values[0], joules, limits, complete)
