"""One Optuna study, and its trials as the run directory says they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from wattier.records import Params, Proposal, TrialResult, finite_or_none

METRIC_NAMES = ("val_loss", "energy_joules")
TRIAL_KEY, STATUS_KEY, OWNER_KEY = "trial", "status", "config_sha256"
FIGURES = (
    "val_loss", "energy_joules", "energy_joules_low", "energy_joules_high", "energy_method", "epochs",
    "structures_seen", "seconds", "parameters", "attempts", "throttled", "error",
)  # fmt: skip
ERROR_CHARACTERS = 500
_METRIC_NAMES_KEY = "study:metric_names"  # what Study.set_metric_names sets, with a warning that it is experimental
_CONSTRAINTS_KEY = "constraints"  # Optuna and its dashboard take trials with one above 0 off the front


class Wanted(NamedTuple):
    """A trial as the study is to have it."""

    state: TrialState
    params: Params
    values: tuple[float, float] | None
    attributes: dict[str, Any]
    constraints: tuple[float, ...] = ()  # above 0 = it used more than a limit allows
    started: datetime | None = None  # in UTC
    ended: datetime | None = None


def wanted_of_result(result: TrialResult, space: Mapping[str, BaseDistribution]) -> Wanted:
    """A trial that ended: COMPLETE only if it finished its stage, with a loss and joules that are known.

    One that was stopped or diverged is PRUNED; one that failed, was interrupted, or has no joules is FAIL. Its figures
    are attributes, whatever its state, since Optuna keeps values of COMPLETE trials only; unknown ones are left out.
    """
    status = "diverged" if result.diverged else result.status
    state, values = TrialState.FAIL, None
    loss, joules = result.val_loss, result.energy_joules
    if (
        status == "complete"
        and loss is not None
        and math.isfinite(loss)
        and joules is not None
        and math.isfinite(joules)
    ):
        state, values = TrialState.COMPLETE, (loss, joules)
    elif status in ("pruned", "diverged"):
        state = TrialState.PRUNED
    params, others = _split(result.params, space)
    energy = result.energy
    figures = (
        loss, joules, *energy.stated_bounds_joules, energy.method, result.epochs_done,
        result.structures_seen, result.wall_seconds, result.n_parameters, result.attempts, result.throttled,
        result.error[:ERROR_CHARACTERS] if result.error else None,
    )  # fmt: skip
    attributes: dict[str, Any] = {
        TRIAL_KEY: result.trial_id,
        STATUS_KEY: status,
        **dict(zip(FIGURES, figures, strict=True)),
        **{f"outside space: {name}": value for name, value in others.items()},
    }
    limits = result.limit_ratios
    attributes |= {f"share of limit: {name}": ratio for name, ratio in limits.items()}
    attributes = {name: known for name, value in attributes.items() if (known := finite_or_none(value)) is not None}
    started = _time(result.started_at)
    ended = started + timedelta(seconds=max(0.0, result.wall_seconds)) if started else None
    constraints = tuple(ratio - 1 for ratio in limits.values())
    return Wanted(state, params, values, attributes, constraints, started, ended)


def wanted_of_open(proposal: Proposal, space: Mapping[str, BaseDistribution], *, running: bool) -> Wanted:
    """A trial without a record: it runs, or it will be run again by the same command, which Optuna calls WAITING."""
    params, others = _split(proposal.params, space)
    attributes = {TRIAL_KEY: proposal.trial_id, STATUS_KEY: "running" if running else "interrupted"}
    attributes |= {f"outside space: {name}": finite_or_none(value) for name, value in others.items()}
    return Wanted(TrialState.RUNNING if running else TrialState.WAITING, params, None, attributes)


class MirroredStudy:
    """A study in a storage, and what is known to be in it; only the thread that writes it uses it."""

    def __init__(self, storage: BaseStorage, study_id: int, name: str, space: Mapping[str, BaseDistribution]) -> None:
        self.storage, self.study_id, self.name, self._space = storage, study_id, name, space
        self._numbers: dict[str, int] = {}
        self._there: dict[str, Wanted] = {}
        self.has_strays = False  # trials of nobody, or two of one name
        for trial in storage.get_all_trials(study_id, deepcopy=False):
            trial_id = str(trial.user_attrs.get(TRIAL_KEY))
            self.has_strays = self.has_strays or TRIAL_KEY not in trial.user_attrs or trial_id in self._there
            values = (trial.values[0], trial.values[1]) if trial.values else None
            self._numbers[trial_id] = trial._trial_id
            constraints = tuple(trial.constraints.values())
            self._there[trial_id] = Wanted(trial.state, trial.params, values, trial.user_attrs, constraints)

    def holds_others_than(self, trial_ids: Mapping[str, object]) -> bool:
        """Whether there are trials that the run does not know."""
        return self.has_strays or any(trial_id not in trial_ids for trial_id in self._there)

    def put(self, trial_id: str, wanted: Wanted) -> bool:
        """Make one trial as it is to be; False where only a new study can, since a trial that ended cannot change.

        Raises:
            Exception: whatever the storage says when it cannot be reached.
        """
        there = self._there.get(trial_id)
        if there is None:
            self._numbers[trial_id] = self.storage.create_new_trial(self.study_id, self._template(wanted))
        elif _is_same(there, wanted):
            return True
        elif there.state.is_finished() or there.params != wanted.params:
            return False
        else:
            self._change(self._numbers[trial_id], there, wanted)
        self._there[trial_id] = wanted
        return True

    def _change(self, number: int, there: Wanted, wanted: Wanted) -> None:
        for key, value in wanted.attributes.items():
            if key not in there.attributes or there.attributes[key] != value:
                self.storage.set_trial_user_attr(number, key, value)
        if wanted.constraints != there.constraints:
            self.storage.set_trial_system_attr(number, _CONSTRAINTS_KEY, list(wanted.constraints))
        if wanted.state != there.state and not self.storage.set_trial_state_values(number, wanted.state, wanted.values):
            raise RuntimeError(f"trial {wanted.attributes[TRIAL_KEY]} is being changed by somebody else")

    def _template(self, wanted: Wanted) -> FrozenTrial:
        now = datetime.now(UTC)
        ended = (wanted.ended or now) if wanted.state.is_finished() else None
        started = (wanted.started or ended or now) if wanted.state != TrialState.WAITING else None
        return FrozenTrial(
            number=-1,
            trial_id=-1,
            state=wanted.state,
            value=None,
            values=wanted.values,
            datetime_start=_local(started),
            datetime_complete=_local(ended),
            params=wanted.params,
            distributions={name: self._space[name] for name in wanted.params},
            user_attrs=wanted.attributes,
            system_attrs={_CONSTRAINTS_KEY: list(wanted.constraints)} if wanted.constraints else {},
            intermediate_values={},  # of a study with two objectives Optuna shows none
        )


def open_study(
    storage: BaseStorage, base: str, owner: str, *, space: Mapping[str, BaseDistribution], notes: dict[str, Any] | None
) -> MirroredStudy | None:
    """The study of a stage, made if it is not there; a name that another run has gets a suffix.

    Args:
        storage: where studies are.
        base: the name, ``<run>-<stage>``.
        owner: what no other run has.
        space: the parameters.
        notes: what a person may want to know of a new study; None = no new one is made.

    Raises:
        RuntimeError: the name is taken, with the suffix too.
    """
    there = {study.study_name: study for study in storage.get_all_studies()}
    for name in (base, f"{base}-{owner[:8]}"):
        study = there.get(name)
        if study is not None and study.user_attrs.get(OWNER_KEY) == owner:
            return MirroredStudy(storage, study._study_id, name, space)
        if study is None and notes is None:
            return None
        if study is None:
            study_id = storage.create_new_study([StudyDirection.MINIMIZE] * 2, name)
        elif OWNER_KEY not in study.user_attrs and not storage.get_n_trials(study._study_id):
            study_id = study._study_id  # its maker was killed before it wrote the next lines
        else:
            continue
        storage.set_study_user_attr(study_id, OWNER_KEY, owner)
        storage.set_study_system_attr(study_id, _METRIC_NAMES_KEY, list(METRIC_NAMES))
        for key, value in (notes or {}).items():
            storage.set_study_user_attr(study_id, key, value)
        return MirroredStudy(storage, study_id, name, space)
    if notes is None:
        return None
    raise RuntimeError(f"the names {base} and {base}-{owner[:8]} belong to studies of others")


def _is_same(there: Wanted, wanted: Wanted) -> bool:
    """Whether a trial is as it is to be; what a person added to it, or when it was written, does not matter."""
    ours = {key: value for key, value in there.attributes.items() if key in FIGURES or key in wanted.attributes}
    return there[:3] == wanted[:3] and ours == wanted.attributes and there.constraints == wanted.constraints


def _split(params: Params, space: Mapping[str, BaseDistribution]) -> tuple[Params, Params]:
    """Parameters that the space has, and others, which Optuna would refuse."""
    inside = {name: value for name, value in params.items() if name in space}
    if not _fit(inside, space):
        inside = {name: value for name, value in inside.items() if _fit({name: value}, space)}
    return inside, {name: value for name, value in params.items() if name not in inside}


def _fit(params: Params, space: Mapping[str, BaseDistribution]) -> bool:
    try:
        create_trial(params=params, distributions={name: space[name] for name in params}, state=TrialState.WAITING)
    except (TypeError, ValueError):
        return False
    return True


def _time(text: str | None) -> datetime | None:
    try:
        return datetime.fromisoformat(text).astimezone(UTC) if text else None
    except (TypeError, ValueError):
        return None


def _local(moment: datetime | None) -> datetime | None:
    """Optuna's times are local and do not say so."""
    return None if moment is None else moment.astimezone().replace(tzinfo=None)
