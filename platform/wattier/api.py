"""``wattier.search``: the funnel for a training function of your own, from Python."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wattier.budget import Budget, Spent
from wattier.config import RunConfig, checked
from wattier.console import RunConsole
from wattier.errors import UserError
from wattier.funnel import on_front, stage_names
from wattier.outcome import shown
from wattier.own_model import OwnTrial, Trial
from wattier.records import TrialResult
from wattier.rundir import RunDir
from wattier.select import split_candidates

_NO_NAME = re.compile(r"^[^A-Za-z0-9]+|[^A-Za-z0-9_.-]+")  # what the name of a run cannot hold


class Found(NamedTuple):
    """What a search found.

    Attributes:
        front: trials of the last stage that no other one beats in all objectives, the lowest loss first.
        trials: every trial of every stage, in order of finishing, each with its parameters, loss, joules and status.
        spent: joules, seconds and trials over all restarts.
        run_dir: where all of it is written; `wattier status RUN` and `wattier report RUN` show it.
    """

    front: list[TrialResult]
    trials: list[TrialResult]
    spent: Spent
    run_dir: Path


def search(  # noqa: PLR0913
    space: Mapping[str, Any],
    run_trial: Callable[[Trial], Any],
    stages: Sequence[Mapping[str, Any]],
    objectives: Sequence[str] | str = ("val_loss", "energy_joules"),
    budget: Mapping[str, float] | None = None,
    *,
    run_dir: str | Path,
    seed: int = 0,
    launcher: str = "ray",
    quiet: bool = False,
    resources: Mapping[str, Any] | None = None,
    telemetry: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Found:
    """Search the hyper-parameters of any training function, by loss and joules, within a budget.

    The same call goes on where a killed one stopped, and returns at once when there is nothing left to do.

    Args:
        space: parameter name -> ``{"low": 8, "high": 64}`` (whole ends: whole numbers), with ``"log": True`` or
            ``"step"`` where wanted, or ``{"choices": [...]}``.
        run_trial: trains one trial: reads ``trial.params``, calls ``trial.report(val_loss)`` after each of
            ``trial.epochs`` epochs, and returns when that says False. It is measured while it runs.
        stages: mappings of a config's ``search.stages``: name, trials, epochs, structures, ranks, promote,
            reduction_factor.
        objectives: one or two of ``val_loss``, ``energy_joules``, ``joules_per_structure``.
        budget: ``joules`` or ``kilowatt_hours``, ``seconds``, ``trials``, as totals over restarts.
        run_dir: the run directory, which is all the state there is.
        seed: of the sampler and of the trials.
        launcher: ``ray``: several at once, in processes of their own; ``inline``: one after another in this one.
        quiet: say nothing while it works.
        resources: a config's section ``resources``: what a rank gets, the address of a Ray cluster, retries.
        telemetry: a config's section ``telemetry``: where joules come from; ``{"source": "stated"}`` = from
            ``trial.report(..., energy_joules=...)``, as for a table.
        settings: further keys of a config's section ``search``: sampler, scheduler, constraints, weights, warm_start,
            max_concurrent, storage.

    Raises:
        UserError: a setting is wrong, the budget does not pay for one trial, or `run_dir` holds another search.
    """
    search = {"space": space, "stages": stages, "objectives": objectives, "budget": budget, **settings}
    machine = {"resources": resources, "telemetry": telemetry}
    values = _values(run_trial, search, machine) | {
        "run_dir": _path(run_dir),
        "seed": _plain(seed),
        "launcher": launcher,
    }
    config = checked(RunConfig, values, Path("wattier.search"))
    run = RunDir.create(config)
    from wattier.run import launcher_for, run_funnel

    with run.lock(), RunConsole(run, quiet=quiet) as console, launcher_for(config) as started:
        run_funnel(run, config, started, OwnTrial(run_trial), None, console)
        front = on_front(run, config)
        if not front:
            console.say(f"warning: no trial is on the front: {_why_none(run, config)}")
    spent = Budget(config.search.budget, run, stage_names(config)).spent()
    return Found(front, run.trials(), spent, run.path)


def _values(run_trial: Any, search: Mapping[str, Any], machine: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of a function and how it is searched.

    Raises:
        UserError: it is no function.
    """
    if not callable(run_trial):
        raise UserError(f"wattier.search: run_trial is {shown(run_trial)}, but must be a function of one trial.")
    module, name = run_trial.__module__, getattr(run_trial, "__qualname__", type(run_trial).__qualname__)
    objectives = search["objectives"]
    return {
        "name": _NO_NAME.sub("", name.rpartition(".")[2])[:60] or "search",
        "trial": f"{module}:{name}",
        "search": _plain({**search, "objectives": [objectives] if isinstance(objectives, str) else objectives}),
        **{section: {} if values is None else _plain(values) for section, values in machine.items()},
    }


def _path(run_dir: Any) -> Any:
    return str(run_dir) if isinstance(run_dir, Path) else run_dir


def _why_none(run: RunDir, config: RunConfig) -> str:
    """What keeps the trials of the last stage off the front, the commonest reason first."""
    stage = stage_names(config)[-1]
    by_energy = config.search.objectives != ["val_loss"]
    _, excluded = split_candidates(run.trials(stage), stage=stage, by_energy=by_energy)
    counts = Counter(why.reason if why.kind == "energy unknown" else why.kind for why in excluded.values())
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common()) or f"stage {stage} has none"


def _plain(value: Any) -> Any:
    """Mappings, sequences and NumPy's numbers as dicts, lists and numbers, which is what a config is made of."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple | range) else value
