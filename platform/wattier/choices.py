"""What a person has said of single trials: that they are picked, or are not, whatever the rules say."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from wattier.config_ensemble import SelectSection
from wattier.errors import UserError, did_you_mean
from wattier.records import TrialResult
from wattier.rundir import RunDir, decode, read_json, write_json

Choice = Literal["pin", "veto", "free"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
SHOWN = 5  # ids in a message


class Choices(NamedTuple):
    """Trials that are picked, and trials that are not, whatever the rules say; sorted ids."""

    pinned: tuple[str, ...] = ()
    vetoed: tuple[str, ...] = ()


def choices_of(run: RunDir, settings: SelectSection, trials: Sequence[TrialResult]) -> Choices:
    """What holds in a run: ``choices.json``, and of trials that it does not name, the config.

    Raises:
        UserError: the config names a trial that is not there or cannot be picked, or the file is damaged.
    """
    for name, ids in (("pin", settings.pin), ("veto", settings.veto)):
        _check(f"select.{name}", name, ids, trials)
    told: dict[str, str] = dict.fromkeys(settings.pin, "pin") | dict.fromkeys(settings.veto, "veto") | read_choices(run)
    there = {trial.trial_id for trial in trials}

    def having(choice: Choice) -> tuple[str, ...]:
        return tuple(sorted(i for i, said in told.items() if said == choice and i in there))

    return Choices(having("pin"), having("veto"))


def read_choices(run: RunDir) -> dict[str, Choice]:
    """``choices.json``: what commands have said, by trial id; nothing where there is none."""
    if not run.choices_path.exists():
        return {}
    return decode(run.choices_path, _checked, read_json(run.choices_path))


def choose(run: RunDir, trials: Sequence[TrialResult], said: Mapping[Choice, Collection[str]]) -> None:
    """Write down what a command says of trials; all of it or, where one of them is wrong, nothing.

    Args:
        run: the run, whose lock is held.
        trials: those of the stage that is picked from.
        said: ids of trials to pin, to veto, and to leave to the rules again, whatever the config says.

    Raises:
        UserError: an id is unknown, is named twice, or cannot be picked.
    """
    new: dict[str, Choice] = {}
    for choice, ids in said.items():
        _check(f"--{choice}", choice, ids, trials)
        for trial_id in ids:
            if new.setdefault(trial_id, choice) != choice:
                raise UserError(f"--{choice} {trial_id}: is also --{new[trial_id]}, but must be one. Leave one out.")
    if new:
        write_json(run.choices_path, dict(sorted((read_choices(run) | new).items())))


def can_be_pinned(trial: TrialResult) -> bool:
    """Whether a person may pick it, which may have been stopped before its end: it can be trained."""
    return not (trial.diverged or trial.status == "failed")


def _check(where: str, choice: str, ids: Collection[str], trials: Sequence[TrialResult]) -> None:
    there = {trial.trial_id: trial for trial in trials}
    for trial_id in ids:
        trial = there.get(trial_id)
        if trial is None:
            stage = f" of stage {trials[0].fidelity.stage!r}" if trials else ""
            known = ", ".join(list(there)[:SHOWN]) + (" and others" if len(there) > SHOWN else "")
            hint = did_you_mean(trial_id, there) or (f" They are {known}." if known else "")
            raise UserError(f"{where}: {trial_id!r} is no trial{stage}, but must be one that has ended.{hint}")
        if choice == "pin" and not can_be_pinned(trial):
            how = "diverged" if trial.diverged else "failed"
            raise UserError(f"{where}: {trial_id!r} {how}, but must be a trial that can be trained. Pin another one.")


def _checked(data: Any) -> dict[str, Choice]:
    if not isinstance(data, dict) or not all(choice in CHOICES for choice in data.values()):
        raise ValueError(f"not a mapping of trial ids to {', '.join(CHOICES)}")
    return dict(data)
