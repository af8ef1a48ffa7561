"""How a whole campaign stands, read from its run directory again and again: what only its driver can tell.

A look costs what has changed since the one before: a row is summed up once, a journal read again when it was written.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from wattier.budget import Budget
from wattier.campaign_reasons import reason_class
from wattier.config import RunConfig
from wattier.config_search import BudgetSection
from wattier.errors import UserError
from wattier.funnel import is_over, stage_names
from wattier.ledger import FULL_PHASE
from wattier.outcome import ERROR_NAME
from wattier.records import TrialResult
from wattier.rundir import FULL_STAGE, RunDir, read_json
from wattier.select import compare, split_candidates
from wattier_telemetry import EnergyReport, bill
from wattier_telemetry.campaign import (
    MOST_TRIALS,
    STATUSES,
    BudgetStanding,
    CampaignRegistration,
    EndedTrial,
    Forecast,
    PhaseStanding,
    StageStanding,
)

ENOUGH_TRIALS = 3  # of a stage that ended, to say what its next ones will cost; before, the energy model says it
SEARCH, FULL_TRAINING = "search", "full_training"  # as the sections of the config are called

Key = tuple[str, str]


class Joules(NamedTuple):
    """An energy, J, and its bounds; None = unknown."""

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, report: EnergyReport) -> Joules:
        """Those of a bill."""
        return cls(report.joules, *report.stated_bounds_joules)


class OpenTrial(NamedTuple):
    """A trial that was started and has no record yet."""

    running: bool  # False = another driver started it, and this one has not taken it up again
    joules: Joules
    projected_joules: float | None


class CampaignStanding:
    """Looks at a run while its driver works.

    Args:
        run: which one; opened anew, since another thread reads the driver's.
        config: its config.
        began_seconds: when the driver began, s since 1970.
        expected_joules: of one trial of each stage of the search, as far as the energy model can say.
    """

    def __init__(
        self, run: RunDir, config: RunConfig, began_seconds: float, expected_joules: Mapping[str, float | None]
    ) -> None:
        self.run, self.config, self.began_seconds = RunDir(run.path), config, began_seconds
        self._expected = expected_joules
        self._rows: dict[Key, TrialResult] = {}
        self._bills: dict[Key, Joules] = {}
        self._fields: dict[str, tuple[int, float | None]] = {}  # stage -> candidates there were, their hypervolume
        self._folders: dict[Path, tuple[tuple[int, int], Joules]] = {}
        self._budgets: dict[str, Budget] = {}
        self._spent_before: float | None = None

    def look(self, phase: str, now_seconds: float) -> CampaignRegistration:
        """The campaign as it stands.

        Args:
            phase: what the driver does; of the search, the stage it is at is added.
            now_seconds: s since 1970.

        Raises:
            UserError: the run's records are damaged.
        """
        self._read_rows()
        opened = self._open_trials()
        spent = self._spent(opened)
        if self._spent_before is None:
            self._spent_before = math.fsum(spent.values())
        watts = None
        if now_seconds > self.began_seconds:
            watts = (math.fsum(spent.values()) - self._spent_before) / (now_seconds - self.began_seconds)
        stages = self._planned()
        newest = list(self._rows.items())[-MOST_TRIALS:]
        return CampaignRegistration(
            run=self.config.name,
            pid=os.getpid(),
            phase=self._phase(phase),
            started_seconds=self.began_seconds,
            updated_seconds=now_seconds,
            report=self.run.report_path.as_uri(),
            stages=tuple(self._stage(name, planned, opened) for name, planned in stages.items()),
            phases=tuple(self._phases(opened)),
            budgets=tuple(self._budget_standings(phase, spent, opened)),
            forecasts=tuple(self._forecasts(spent, opened, watts, now_seconds)),
            trials=tuple(
                EndedTrial(stage, trial, row.status, row.val_loss, self._bills[stage, trial].value)
                for (stage, trial), row in newest
            ),
            not_shown=len(self._rows) - len(newest),
        )

    def _read_rows(self) -> None:
        for row in self.run.trials():
            key = row.fidelity.stage, row.trial_id
            if self._rows.get(key) is not row:
                self._rows[key], self._bills[key] = row, Joules.of(row.energy)

    def _planned(self) -> dict[str, int]:
        planned = {section.name: section.trials for section in self.config.search.stages}
        selection = self.run.selection()
        return planned if selection is None else planned | {FULL_STAGE: len(selection.picked)}

    def _phase(self, phase: str) -> str:
        if phase != SEARCH:
            return phase
        left = [s.name for s in self.config.search.stages if not is_over(self.run, self.config, s)]
        return f"{SEARCH}:{left[0] if left else self.config.search.stages[-1].name}"

    def _open_trials(self) -> dict[Key, OpenTrial]:
        """Trials that wrote something and have no record: those that run, and those that another driver left."""
        found = {}
        for stage in (*stage_names(self.config), FULL_STAGE):
            folder = self.run.path / "trials" / stage
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                row = self._rows.get((stage, path.name))
                if row is None or (row.status == "failed" and stage == FULL_STAGE and self._is_tried_again(path)):
                    trial = self._open_trial(path)
                    if trial is not None:
                        found[stage, path.name] = trial
        return found

    def _is_tried_again(self, folder: Path) -> bool:
        """Whether a member that failed was begun anew: then what it left of the failure is gone."""
        return (folder / "trial.json").exists() and not (folder / ERROR_NAME).exists()

    def _open_trial(self, folder: Path) -> OpenTrial | None:
        note, report = folder / "trial.json", bill(folder)
        try:
            # Written when the trial is started, or taken up again; a file server's clock may be a little off.
            running = note.stat().st_mtime >= self.began_seconds - 2
            data = read_json(note)
        except (OSError, UserError):
            running, data = False, {}
        if not (note.exists() or report.shares):
            return None
        projected = data.get("projected_joules") if isinstance(data, dict) else None
        return OpenTrial(running, Joules.of(report), projected if isinstance(projected, int | float) else None)

    def _spent(self, opened: Mapping[Key, OpenTrial]) -> dict[Key, float]:
        spent = {key: joules.value or 0.0 for key, joules in self._bills.items()}
        return spent | {key: max(spent.get(key, 0.0), trial.joules.value or 0.0) for key, trial in opened.items()}

    def _stage(self, name: str, planned: int, opened: Mapping[Key, OpenTrial]) -> StageStanding:
        rows = [row for (stage, trial), row in self._rows.items() if stage == name and (stage, trial) not in opened]
        counts = Counter[str](row.status for row in rows)
        mine = [trial for (stage, _), trial in opened.items() if stage == name]
        counts["running"] += sum(trial.running for trial in mine)
        counts["interrupted"] += sum(not trial.running for trial in mine)
        counts["waiting"] = max(0, planned - sum(counts.values()))
        losses = [row.val_loss for row in rows if row.status == "complete" and row.val_loss is not None]
        return StageStanding(
            stage=name,
            planned=planned,
            statuses={status: counts[status] for status in STATUSES},
            failures=dict(Counter(reason for row in rows if (reason := reason_class(row)) is not None)),
            best_val_loss=min(losses, default=None),
            hypervolume=self._hypervolume(name, rows),
        )

    def _hypervolume(self, stage: str, rows: list[TrialResult]) -> float | None:
        """As `wattier select` would say it now; worked out again only when there are more trials."""
        known = self._fields.get(stage)
        if known is None or known[0] != len(rows):
            candidates, _ = split_candidates(rows, stage=stage)
            known = len(rows), compare(candidates).hypervolume if candidates else None
            self._fields[stage] = known
        return known[1]

    def _phases(self, opened: Mapping[Key, OpenTrial]) -> Iterator[PhaseStanding]:
        folder = self.run.path / "phases"
        sums: dict[str, list[Joules]] = {}
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            name = path.name
            is_stage = name == FULL_STAGE or name in stage_names(self.config)
            sums.setdefault(_phase_of(name) if is_stage else name, []).append(self._folder_bill(path))
        for key in dict.fromkeys((*self._bills, *opened)):
            joules = opened[key].joules if key in opened else self._bills[key]
            sums.setdefault(_phase_of(key[0]), []).append(joules)
        for phase, parts in sums.items():
            yield PhaseStanding(phase, *(_known_sum(column) for column in zip(*parts, strict=True)))

    def _folder_bill(self, folder: Path) -> Joules:
        """The bill of a phase, read again when a journal was written."""
        with os.scandir(folder) as scan:
            times = [entry.stat().st_mtime_ns for entry in scan]
        stamp = len(times), max(times, default=0)
        known = self._folders.get(folder)
        if known is None or known[0] != stamp:
            known = self._folders[folder] = stamp, Joules.of(bill(folder))
        return known[1]

    def _budget_standings(
        self, phase: str, spent: Mapping[Key, float], opened: Mapping[Key, OpenTrial]
    ) -> Iterator[BudgetStanding]:
        """What is used of each limit; of seconds only while they are being spent."""
        limits = ((SEARCH, self.config.search.budget), (FULL_TRAINING, self.config.full_training.budget))
        for (name, limit), now in zip(limits, (SEARCH, FULL_PHASE), strict=True):
            if limit is None:
                continue
            stages = _stages_of(self.config, name)
            joules = math.fsum(value for (stage, _), value in spent.items() if stage in stages)
            used: dict[str, float | None] = {
                "joules": _ratio(joules, limit.energy_joules),
                "seconds": _ratio(self._seconds(name, limit, stages), limit.seconds) if phase == now else None,
                "trials": _ratio(len({key for key in (*self._rows, *opened) if key[0] in stages}), limit.trials),
            }
            ratios = {resource: ratio for resource, ratio in used.items() if ratio is not None}
            yield BudgetStanding(name, limit.energy_joules, joules, ratios)

    def _seconds(self, name: str, limit: BudgetSection, stages: Iterable[str]) -> float:
        """As the driver's own budget counts them: what earlier processes took, and the time since this one began."""
        if name not in self._budgets:
            self._budgets[name] = Budget(limit, self.run, list(stages))
        return self._budgets[name].spent().seconds

    def _forecasts(
        self, spent: Mapping[Key, float], opened: Mapping[Key, OpenTrial], watts: float | None, now: float
    ) -> Iterator[Forecast]:
        """What is spent and what is to come; it ends when that is spent at the mean power since the driver began."""
        left = [self._joules_left(s.name, s.trials, opened) for s in self.config.search.stages]
        so_far = math.fsum(value for (stage, _), value in spent.items() if stage != FULL_STAGE)
        yield _forecast(SEARCH, so_far, None if None in left else math.fsum(x or 0.0 for x in left), watts, now)
        selection = self.run.selection()
        if selection is not None and selection.projected_joules is not None:
            so_far = math.fsum(value for (stage, _), value in spent.items() if stage == FULL_STAGE)
            done = {trial for stage, trial in self._rows if stage == FULL_STAGE} - {trial for _, trial in opened}
            over = done >= set(selection.picked)
            rest = 0.0 if over else max(0.0, selection.projected_joules - so_far)
            yield _forecast(FULL_TRAINING, so_far, rest, watts, now)

    def _joules_left(self, stage: str, planned: int, opened: Mapping[Key, OpenTrial]) -> float | None:
        """What trials of a stage will still take, J; None = nobody can say."""
        section = next(s for s in self.config.search.stages if s.name == stage)
        if is_over(self.run, self.config, section):
            return 0.0
        ended = [
            joules
            for key, row in self._rows.items()
            if key[0] == stage and row.status != "failed" and (joules := self._bills[key].value) is not None
        ]
        each = self._expected.get(stage)
        if ended and (each is None or len(ended) >= ENOUGH_TRIALS):
            each = math.fsum(ended) / len(ended)
        if each is None:
            return None
        mine = [trial for (name, _), trial in opened.items() if name == stage]
        begun = math.fsum(max(0.0, (t.projected_joules or each) - (t.joules.value or 0.0)) for t in mine)
        started = len(mine) + sum(name == stage for name, _ in self._rows)
        return begun + each * max(0, planned - started)


def _forecast(name: str, so_far: float, left: float | None, watts: float | None, now: float) -> Forecast:
    if left is None:
        return Forecast(name)
    ends = None if not left or not watts or watts <= 0 else now + left / watts
    return Forecast(name, so_far + left, ends)


def _phase_of(stage: str) -> str:
    return FULL_PHASE if stage == FULL_STAGE else f"{SEARCH}:{stage}"


def _stages_of(config: RunConfig, budget: str) -> list[str]:
    return stage_names(config) if budget == SEARCH else [FULL_STAGE]


def _known_sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if known else None


def _ratio(used: float, limit: float | None) -> float | None:
    return used / limit if limit else None
