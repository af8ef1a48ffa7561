"""What the driver of the replayed campaign would say of it."""

from __future__ import annotations

import math
import os
from collections import Counter

from replay.world import RUN, STAGES, TRIALS, Trial, World
from wattier_telemetry.campaign import (
    STATUSES,
    BudgetStanding,
    CampaignRegistration,
    EndedTrial,
    Forecast,
    PhaseStanding,
    StageStanding,
)

BUDGET_SHARE = 0.97  # of what the campaign takes, so that its end is over budget
UNCERTAINTY = 0.02  # of the joules, either way
MARGIN = 0.1  # of the range beyond the worst trial, where the reference point lies


def mine() -> tuple[Trial, ...]:
    """The trials of the campaign."""
    return tuple(trial for trial in TRIALS if trial.run == RUN)


def total_joules(world: World) -> float:
    """What the whole campaign takes, J."""
    return math.fsum(world.trial_joules(trial) for trial in mine())


def dominated_area(points: list[tuple[float, float]]) -> float | None:
    """Area that points dominate, both columns minimised, up to 10 % of the range beyond the worst; None of no point."""
    if not points:
        return None
    corner = [max(column) + MARGIN * (max(column) - min(column)) for column in zip(*points, strict=True)]
    area, lowest = 0.0, corner[1]
    for first, second in sorted(points):
        if second < lowest:
            area += (corner[0] - first) * (lowest - second)
            lowest = second
    return area


def standing(world: World, seconds: float, start_seconds: float, name: str = RUN) -> CampaignRegistration:
    """The campaign after some seconds of it, which began at a time in seconds since 1970."""
    share = seconds / world.seconds
    spent = math.fsum(world.trial_joules(trial, seconds) for trial in mine())
    total = total_joules(world)
    budget = BUDGET_SHARE * total
    begun = sum(trial.begins <= share for trial in mine())
    return CampaignRegistration(
        run=name,
        pid=os.getpid(),
        phase=f"search:{_stage_at(share)}",
        started_seconds=start_seconds,
        updated_seconds=start_seconds + seconds,
        report=f"file:///runs/{name}/report.html",
        ray_dashboard="http://127.0.0.1:8265",
        stages=tuple(_stage(world, stage, planned, share) for stage, planned in STAGES[RUN].items()),
        phases=tuple(_phase(world, stage, seconds) for stage in STAGES[RUN]),
        budgets=(BudgetStanding("search", budget, spent, {"joules": spent / budget, "trials": begun / 20}),),
        forecasts=(Forecast("search", total, start_seconds + max(t.ends for t in mine()) * world.seconds),),
        trials=tuple(
            EndedTrial(t.stage, t.name, t.status, t.loss if t.status == "complete" else None, world.trial_joules(t))
            for t in sorted(mine(), key=lambda trial: trial.ends)
            if t.ends <= share
        ),
    )


def _stage_at(share: float) -> str:
    return next((trial.stage for trial in mine() if share < trial.ends), "final")


def _stage(world: World, stage: str, planned: int, share: float) -> StageStanding:
    trials = [trial for trial in mine() if trial.stage == stage]
    ended = [trial for trial in trials if trial.ends <= share]
    counts = Counter(trial.status for trial in ended)
    counts["running"] = sum(trial.begins <= share < trial.ends for trial in trials)
    counts["waiting"] = planned - sum(counts.values())
    whole = [trial for trial in ended if trial.status == "complete"]
    return StageStanding(
        stage,
        planned,
        {status: counts[status] for status in STATUSES},
        dict(Counter(trial.reason for trial in ended if trial.reason)),
        min((trial.loss for trial in whole), default=None),
        dominated_area([(trial.loss, world.trial_joules(trial)) for trial in whole]),
    )


def _phase(world: World, stage: str, seconds: float) -> PhaseStanding:
    joules = math.fsum(world.trial_joules(trial, seconds) for trial in mine() if trial.stage == stage)
    return PhaseStanding(f"search:{stage}", joules, (1 - UNCERTAINTY) * joules, (1 + UNCERTAINTY) * joules)
