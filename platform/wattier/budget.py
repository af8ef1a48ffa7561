"""What a search may spend, what it has spent, and whether the next trial still fits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from enum import Enum
from typing import NamedTuple

from wattier.config_search import BudgetSection
from wattier.ledger import trial_bills
from wattier.records import TrialResult
from wattier.rundir import RunDir
from wattier.units import format_joules, format_seconds
from wattier_telemetry import EnergyReport


class Verdict(Enum):
    """Whether a trial may start."""

    START = "start"
    LATER = "later"  # it may fit when a running trial turns out cheaper than projected
    STOP = "stop"


class Spent(NamedTuple):
    """What trials have cost, running ones so far."""

    joules: float
    seconds: float
    trials: int


class Budget:
    """Totals over restarts: what earlier processes spent is read from the run directory.

    A trial starts when its projection, the projections of those that run, and what has been spent fit together. So
    what is spent in the end exceeds the budget by no more than the projections of the last trials were short by.
    """

    def __init__(
        self,
        limits: BudgetSection | None,
        run: RunDir,
        stages: Collection[str],
        share: float = 1.0,
        sharing: Sequence[str] | None = None,
    ) -> None:
        """Read what was spent.

        Args:
            limits: None = anything may be spent.
            run: where it was spent.
            stages: whose trials count.
            share: of joules and seconds, 0 to 1, that some of the stages may spend.
            sharing: those stages, the present one last, which may start one trial whatever its share; None = all.
        """
        self.limits = limits or BudgetSection()
        self.share, self.sharing = share, set(stages if sharing is None else sharing)
        self._present = None if sharing is None else sharing[-1]
        self._reports = _bills(run, stages)
        self._running: dict[tuple[str, str], float | None] = {}  # projected joules
        self._before_seconds = _busy_seconds(self._reports.values())
        self._shared_seconds = _busy_seconds(r for (stage, _), r in self._reports.items() if stage in self.sharing)
        self._began = time.monotonic()
        self.refused: str | None = None  # why the last trial was not started, in words

    def spent(self) -> Spent:
        """What has been spent until now, by trials that ended and by those that are open."""
        joules = math.fsum(report.joules or 0.0 for report in self._reports.values())
        elapsed = time.monotonic() - self._began
        trials = len(set(self._reports) | set(self._running))
        return Spent(joules, self._before_seconds + elapsed, trials)

    @property
    def joules_left(self) -> float | None:
        """What a further trial may cost, J; None = anything."""
        return self._joules_left(running=True)

    def verdict(self, stage: str, trial_id: str, joules: float | None, seconds: float | None) -> Verdict:
        """Whether a trial of these projections may start; None = nobody knows, so it runs alone."""
        spent, key = self.spent(), (stage, trial_id)
        if self.limits.trials is not None and key not in self._reports and spent.trials >= self.limits.trials:
            self.refused = f"{spent.trials} trials have started, of {self.limits.trials}"
            return Verdict.STOP
        if (limit := self.limits.seconds) is not None:
            shared = spent.seconds - self._before_seconds + self._shared_seconds
            if (seconds or 0.0) > min(limit - spent.seconds, self._share_of(limit) - shared):
                self._refuse(spent.seconds, shared, limit, seconds, format_seconds)
                return Verdict.STOP
        return self._energy_verdict(key, joules)

    def opened(self, stage: str, trial_id: str, joules: float | None) -> None:
        """A trial of these projected joules starts."""
        self._running[stage, trial_id] = joules

    def ended(self, result: TrialResult) -> None:
        """A trial ended, and this is its whole bill."""
        key = (result.fidelity.stage, result.trial_id)
        self._running.pop(key, None)
        self._reports[key] = result.energy

    def _energy_verdict(self, key: tuple[str, str], joules: float | None) -> Verdict:
        left, sure, limit = self.joules_left, self._joules_left(running=False), self.limits.energy_joules
        if left is None or sure is None or limit is None:
            return Verdict.START
        paid = self._reports[key].joules or 0.0 if key in self._reports else 0.0
        due = None if joules is None else max(0.0, joules - paid)  # an interrupted trial goes on where it was
        if due is None:
            if self._running:
                return Verdict.LATER
            if left > 0:
                return Verdict.START
        elif due <= left:
            return Verdict.START
        shared = math.fsum(report.joules or 0.0 for key, report in self._reports.items() if key[0] in self.sharing)
        self._refuse(self.spent().joules, shared, limit, due, format_joules)
        return Verdict.LATER if self._running and due is not None and due <= sure else Verdict.STOP

    def _refuse(
        self, spent: float, shared: float, limit: float, due: float | None, text: Callable[[float | None], str]
    ) -> None:
        self.refused = f"{text(spent)} of {text(limit)} are spent"
        if self.share < 1:
            self.refused += f" ({text(shared)} of the {text(self.share * limit)} for the stages up to this one)"
        self.refused += f", and the next trial would take {text(due)}"

    def _joules_left(self, *, running: bool) -> float | None:
        """What is neither spent nor, when all that runs costs what was projected, will be; None = no limit."""
        if (limit := self.limits.energy_joules) is None:
            return None
        spent = {key: report.joules or 0.0 for key, report in self._reports.items()}
        for key, joules in self._running.items() if running else ():
            spent[key] = max(joules or 0.0, spent.get(key, 0.0))
        shared = math.fsum(joules for (stage, _), joules in spent.items() if stage in self.sharing)
        return min(limit - math.fsum(spent.values()), self._share_of(limit) - shared)

    def _share_of(self, limit: float) -> float:
        """What the stages up to the present one may spend: all of it, where that one has not started any trial yet."""
        has_begun = any(stage == self._present for stage, _ in (*self._reports, *self._running))
        return limit if self._present is not None and not has_begun else self.share * limit


def _bills(run: RunDir, stages: Collection[str]) -> dict[tuple[str, str], EnergyReport]:
    """What each trial that was started owes, recorded or not."""
    return {
        key: report
        for key, report in trial_bills(run, stages).items()
        if report.shares or (run.trial_folder(*key) / "trial.json").exists()  # else its row says that it was not paid
    }


def _busy_seconds(reports: Iterable[EnergyReport]) -> float:
    """Time during which at least one trial ran, s."""
    intervals = sorted((s.start_seconds, s.end_seconds) for report in reports for s in report.shares)
    total, reached = 0.0, -math.inf
    for start, end in intervals:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
