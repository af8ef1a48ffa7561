"""What a search knows from the start: trials of earlier runs, or of a table, that lie in its own space.

The published campaign did the same with a file of results that it had from a smaller scale. Losses of another run may
stand on other data or weights: they say which parameters are good, not how good (`Source.notes` tells what differs).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from wattier.config import ModelSection, RunConfig, TrainingSection
from wattier.errors import UserError
from wattier.prior_csv import TableRow, read_table
from wattier.prior_space import OUTSIDE, as_in_space
from wattier.records import Fidelity, Params, Status, TrialResult
from wattier.rundir import FULL_STAGE, RunDir, decode, read_json, write_json
from wattier.space import typed_space

KEPT = "warm_start.json"


@dataclass(frozen=True)
class PriorTrial:
    """A trial that somebody else has paid for.

    params: every parameter of the present space, and no other. fidelity: how far it was trained, epochs really done;
    structures None = all of its own data; None = nobody says. val_loss: None = it diverged. status: complete, or pruned
    for one that was stopped (a whole observation at its lower fidelity) or diverged. origin: where it was read.
    """

    params: Params
    fidelity: Fidelity | None
    val_loss: float | None
    energy_joules: float | None
    status: Status
    origin: str
    energy_method: str | None = None


class Source(NamedTuple):
    """What became of the trials of one path of `search.warm_start`."""

    path: str
    used: int
    left_out: dict[str, int]  # reason -> how many
    notes: tuple[str, ...]


class Priors(NamedTuple):
    """All that is known from the start, and where it is from."""

    trials: tuple[PriorTrial, ...]
    sources: tuple[Source, ...]


def prior_trials(config: RunConfig) -> list[PriorTrial]:
    """The trials that `search.warm_start` names, in its order; errors as in `read_priors`."""
    return list(read_priors(config).trials)


def read_priors(config: RunConfig) -> Priors:
    """Read all that `search.warm_start` names: run directories, and CSV files with a header.

    Raises:
        UserError: a path that is neither, or is damaged; one line.
    """
    trials: list[PriorTrial] = []
    sources: list[Source] = []
    paths = [Path(text).expanduser().absolute() for text in config.search.warm_start]
    for path in paths:
        try:
            found, source = _read_one(path, config)
        except UserError as error:
            raise UserError(f"search.warm_start: {error}") from error
        except (OSError, RuntimeError) as error:  # a name too long, a link to itself, no permission
            raise UserError(f"search.warm_start: {path}: cannot be read ({error}). Mend that.") from error
        trials += found
        sources.append(source)
    for path, count in Counter(map(Path.resolve, paths)).items():
        if count > 1:
            raise UserError(f"search.warm_start: {path}: is named {count} times. Leave it there once.")
    return Priors(tuple(trials), tuple(sources))


def kept_priors(run: RunDir, config: RunConfig) -> Priors:
    """What a run knew when it began: read once, and kept in the run directory, so that it can always go on.

    Raises:
        UserError: as `read_priors`, or the kept file is damaged.
    """
    path = run.path / KEPT
    asked = config.search.model_dump(mode="json", include={"warm_start", "space"})
    if path.exists():
        kept = read_json(path)
        if decode(path, lambda data: data["asked"], kept) == asked:  # a config may be mended until a run has begun
            return decode(path, _from_json, kept)
    priors = read_priors(config)
    if config.search.warm_start:
        trials = [asdict(trial) for trial in priors.trials]
        sources = [source._asdict() for source in priors.sources]
        write_json(path, {"asked": asked, "trials": trials, "sources": sources})
    return priors


def describe(priors: Priors) -> list[str]:
    """A line for each source: how many of its trials are known from the start, and why others are not."""
    lines = []
    for source in priors.sources:
        line = f"warm start: {source.path}: {source.used} of {source.used + sum(source.left_out.values())} trials used"
        if source.left_out:
            ranked = sorted(source.left_out.items(), key=lambda item: (-item[1], item[0]))
            line += "; left out: " + ", ".join(f"{count} {reason}" for reason, count in ranked)
        lines.append(line + "".join(f"; {note}" for note in source.notes))
    return lines


def _read_one(path: Path, config: RunConfig) -> tuple[list[PriorTrial], Source]:
    if path.is_dir():
        return _from_run(path, config)
    if not path.exists():
        raise UserError(f"{path}: does not exist. Give a run directory or a CSV file.")
    return _from_table(path, config)


def _from_run(path: Path, config: RunConfig) -> tuple[list[PriorTrial], Source]:
    if path.resolve() == Path(config.run_dir).expanduser().resolve():
        raise UserError(f"{path}: is this run itself, which knows its own trials. Remove it.")
    run = RunDir.open(path)
    try:
        there = run.config()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    fixed = _settings(there)
    trials: list[PriorTrial] = []
    left_out: Counter[str] = Counter()
    for result in run.trials():
        reason = _why_not(result, there)
        known = {name: value for name, value in fixed.items() if name not in there.search.space}
        params, reason = (None, reason) if reason else _in_present_space({**known, **result.params}, there, config)
        if params is None:
            left_out[reason] += 1
        else:
            trials.append(_prior(result, params, path))
    notes = [f"its {part} differ from this run's" for part in _differences(there, config)]
    return trials, Source(str(path), len(trials), dict(left_out), tuple(notes))


def _why_not(result: TrialResult, there: RunConfig) -> str:
    """Why a trial is no observation, whatever its parameters; empty = it is one."""
    if result.diverged:
        return ""
    if result.status in ("failed", "interrupted"):
        return result.status
    if result.fidelity.stage == FULL_STAGE and there.full_training.warm_start:
        return "trained from other trials' weights"
    return "" if result.val_loss is not None and result.epochs_done else "without a loss"


def _prior(result: TrialResult, params: Params, path: Path) -> PriorTrial:
    fidelity = Fidelity(**{**asdict(result.fidelity), "epochs": max(1, result.epochs_done)})
    origin = f"{path}: {fidelity.stage}/{result.trial_id}"
    status: Status = "complete" if result.status == "complete" and not result.diverged else "pruned"
    loss = None if result.diverged else result.val_loss
    return PriorTrial(params, fidelity, loss, result.energy_joules, status, origin, result.energy.method)


def _from_table(path: Path, config: RunConfig) -> tuple[list[PriorTrial], Source]:
    space, known = config.search.space, _settings(config)
    trials: list[PriorTrial] = []
    left_out: Counter[str] = Counter()
    for row in read_table(path, space, known):
        params, reason = _in_present_space(row.params, None, config)
        if params is None:
            left_out[reason] += 1
        else:
            trials.append(_prior_of_row(row, params, path))
    return trials, Source(str(path), len(trials), dict(left_out), ())


def _prior_of_row(row: TableRow, params: Params, path: Path) -> PriorTrial:
    fidelity = None if row.epochs is None else Fidelity("table", row.structures, row.epochs, 1)
    return PriorTrial(params, fidelity, row.val_loss, row.energy_joules, "complete", f"{path}: line {row.line}")


def _in_present_space(params: Params, there: RunConfig | None, config: RunConfig) -> tuple[Params | None, str]:
    """A trial's parameters as the present space has them, or why it is no point of that space.

    What the earlier run searched, or the table lists, and the present run does not, must have the value it has here.
    """
    space, fixed = typed_space(config), _settings(config)
    inside: Params = {}
    for name, parameter in space.items():
        if name not in params:
            return None, f"without {name}"
        value = as_in_space(parameter, params[name])
        if value is OUTSIDE:
            return None, f"with {name} outside the space"
        inside[name] = value
    varied = params if there is None else there.search.space
    for name in varied:
        if name not in space and name in fixed and name in params and params[name] != fixed[name]:
            return None, f"with another {name} than this run's"
    return inside, ""


def _settings(config: RunConfig) -> dict[str, Any]:
    """What a config fixes of a model and its training; of somebody else's model it knows nothing."""
    if config.trial is not None:
        return {}
    return {name: getattr(config.model, name) for name in ModelSection.model_fields} | {
        name: getattr(config.training, name) for name in TrainingSection.model_fields
    }


def _differences(there: RunConfig, here: RunConfig) -> list[str]:
    """Parts of two configs that make their losses or joules differ for one set of parameters."""
    searched = set(here.search.space) | set(there.search.space)
    fixed = _settings(there)
    settings = [n for n, value in _settings(here).items() if n in fixed and n not in searched and value != fixed[n]]
    parts = ["model and training"] if there.trial != here.trial else []
    parts += ["data"] if there.data != here.data else []
    return parts + ([f"settings ({', '.join(settings)})"] if settings else [])


def _from_json(data: Mapping[str, Any]) -> Priors:
    """Inverse of what `kept_priors` writes; raises as `decode` expects."""
    trials = [
        PriorTrial(**{**trial, "fidelity": Fidelity(**trial["fidelity"]) if trial["fidelity"] else None})
        for trial in data["trials"]
    ]
    sources = [Source(**{**source, "notes": tuple(source["notes"])}) for source in data["sources"]]
    return Priors(tuple(trials), tuple(sources))
