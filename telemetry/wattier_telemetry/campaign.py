"""How the driver of a search tells the node's exporter how the whole campaign stands: one small file, rewritten whole.

What trials and devices do is seen where they run. What only the driver knows is here: how many trials are planned and
how they ended, what was spent of the budget, and when all of it will be over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from wattier_telemetry.registration import default_folder, is_alive, read_small_file, replace_file

SUFFIX = ".campaign"  # not .json, so that nobody takes it for a trial
MOST_TRIALS = 1000  # that ended, the newest; what bounds the number of series
MOST_PARTS = 100  # stages, phases and the like of one campaign
STATUSES = ("waiting", "running", "complete", "pruned", "failed", "interrupted")
REASONS = ("out_of_memory", "diverged", "killed", "node_lost", "stalled", "over_budget", "error")
RESOURCES = ("joules", "seconds", "trials")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StageStanding:
    """One stage of the campaign; None = unknown.

    Attributes:
        stage: Its name.
        planned: Trials it has in the end.
        statuses: Trials by one of `STATUSES`; they add up to `planned`, or to more where a stage was lengthened.
        failures: Trials that did not end well, by one of `REASONS`.
        best_val_loss: Of the trials that finished the stage.
        hypervolume: That they dominate together, with the reference point that their worst ones give now.
    """

    stage: str
    planned: int
    statuses: Mapping[str, int] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    best_val_loss: float | None = None
    hypervolume: float | None = None


@dataclass(frozen=True, slots=True)
class PhaseStanding:
    """Energy that a phase has taken so far, J, and between which bounds the truth lies."""

    phase: str
    joules: float | None = None
    joules_low: float | None = None
    joules_high: float | None = None


@dataclass(frozen=True, slots=True)
class BudgetStanding:
    """A budget: its joules, those spent, and for each of `RESOURCES` that is limited the share that is used up."""

    budget: str
    joules: float | None = None
    spent_joules: float | None = None
    used_ratios: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a part of the campaign will have taken in the end, J, and when that will be, s since 1970."""

    forecast: str
    joules: float | None = None
    ends_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class EndedTrial:
    """A trial that ended: how, how well, and for how many joules."""

    stage: str
    trial: str
    status: str
    val_loss: float | None = None
    joules: float | None = None


@dataclass(frozen=True, slots=True)
class CampaignRegistration:
    """A campaign as its driver sees it.

    Attributes:
        run: Name of the run.
        pid: The driver, on this host; the registration dies with it.
        phase: What the driver does now.
        started_seconds: When the driver began, s since 1970.
        updated_seconds: When this was written, s since 1970.
        report: Where the report is, a URL.
        ray_dashboard: Where Ray's own dashboard is, a URL.
        stages: How each stage stands.
        phases: Where the joules went.
        budgets: What may be spent.
        forecasts: What is expected.
        trials: Those that ended, oldest first.
        not_shown: Ended trials that were left out.
        host: Where the pid lives.
    """

    run: str
    pid: int
    phase: str = ""
    started_seconds: float | None = None
    updated_seconds: float | None = None
    report: str | None = None
    ray_dashboard: str | None = None
    stages: tuple[StageStanding, ...] = ()
    phases: tuple[PhaseStanding, ...] = ()
    budgets: tuple[BudgetStanding, ...] = ()
    forecasts: tuple[Forecast, ...] = ()
    trials: tuple[EndedTrial, ...] = ()
    not_shown: int = 0
    host: str = field(default_factory=socket.gethostname)

    def path(self, folder: Path | None = None) -> Path:
        """Return the file of this run; a name that needs cleaning gets a digest, so that no two runs share a file."""
        clean = re.sub(r"[^A-Za-z0-9_-]", "_", self.run)[:60]
        if clean != self.run:
            clean += "." + hashlib.sha256(self.run.encode(errors="replace")).hexdigest()[:8]
        return (default_folder() if folder is None else folder) / f"{clean}{SUFFIX}"

    def write(self, folder: Path | None = None) -> Path:
        """Put the registration in place of the one before, atomically; what is not finite becomes unknown."""
        path = self.path(folder)
        replace_file(path, json.dumps(_finite(asdict(self)), allow_nan=False))
        return path

    def withdraw(self, folder: Path | None = None) -> None:
        """Remove the registration; it is no error if it is gone."""
        self.path(folder).unlink(missing_ok=True)


def read_campaigns(folder: Path | None = None) -> list[CampaignRegistration]:
    """Return the campaigns whose driver lives on this host; torn files are passed over, those of the dead removed."""
    folder = default_folder() if folder is None else folder
    found = []
    for path in sorted(folder.glob(f"[!.]*{SUFFIX}")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            if (campaign := load_campaign(path)) is not None:
                found.append(campaign)
    return found


def load_campaign(path: Path) -> CampaignRegistration | None:
    """Read one file, which may be anybody's; None = its driver is on another host, or dead, and then it is removed.

    Raises:
        OSError: If it cannot be read.
        TypeError, ValueError: If it is no registration.
    """
    try:
        campaign = parse_campaign(json.loads(read_small_file(path)))
    except (RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: is no campaign") from error
    if campaign.host != socket.gethostname():
        return None
    if not is_alive(campaign.pid, path.stat().st_mtime):
        path.unlink(missing_ok=True)
        return None
    return campaign


def parse_campaign(data: Any) -> CampaignRegistration:
    """Check what the exporter will rely on; a file by another version of Wattier may hold more.

    Raises:
        TypeError, ValueError: If a field is missing or has a wrong type.
    """
    campaign = _made(CampaignRegistration, data)
    parts = {
        "stages": StageStanding,
        "phases": PhaseStanding,
        "budgets": BudgetStanding,
        "forecasts": Forecast,
        "trials": EndedTrial,
    }
    values: dict[str, Any] = {item.name: getattr(campaign, item.name) for item in fields(campaign)}
    for name, kind in parts.items():
        most = MOST_TRIALS if name == "trials" else MOST_PARTS
        rows = values[name]
        if not isinstance(rows, list | tuple) or len(rows) > most:
            raise ValueError(f"{name} of a campaign must be a list of at most {most}")
        made = values[name] = tuple(_made(kind, row) for row in rows)
        if len({tuple(getattr(row, label) for label in _LABELS if hasattr(row, label)) for row in made}) < len(made):
            raise ValueError(f"{name} of a campaign names one twice")
    if not 0 < campaign.pid <= 2**31 - 1:
        raise ValueError("pid of a campaign is no process")
    return CampaignRegistration(**values)


_WORDS = {"statuses": STATUSES, "failures": REASONS, "used_ratios": RESOURCES}
_LABELS = ("stage", "trial", "phase", "budget", "forecast")  # of the series that a part becomes
_LISTS = ("stages", "phases", "budgets", "forecasts", "trials")


def _made(kind: type[T], data: Any) -> T:
    if not isinstance(data, dict):
        raise TypeError(f"a {kind.__name__} is a JSON object")
    known = {item.name: str(item.type) for item in fields(kind)}  # type: ignore[arg-type]
    values = {name: value for name, value in data.items() if name in known}
    for name, value in values.items():
        if name not in _LISTS and not _fits(name, known[name], value):
            raise ValueError(f"{name} of a {kind.__name__} has the wrong type")
    return kind(**values)


def _fits(name: str, annotation: str, value: Any) -> bool:
    if annotation.startswith("Mapping"):
        return isinstance(value, dict) and set(value) <= set(_WORDS[name]) and all(map(_is_share, value.values()))
    if value is None:
        return annotation.endswith("None")
    if annotation.startswith("str"):
        return isinstance(value, str)
    if annotation == "int":
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**53
    return _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become None, which is unknown."""
    if isinstance(value, dict):
        return {key: one for key, item in value.items() if (one := _finite(item)) is not None or item is None}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
