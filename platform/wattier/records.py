"""What a run leaves behind: one JSON record each, units in the names, None for unknown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

from wattier_telemetry import EnergyReport

Status = Literal["complete", "pruned", "failed", "interrupted"]
Params = dict[str, Any]
LEFT = ("walltime", "SIGTERM", "SIGUSR1")  # why a trial was told to leave
AnyPick = TypeVar("AnyPick", bound="Pick")


def finite_or_none(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become None, in nested dicts and lists too."""
    if isinstance(value, dict):
        return {k: finite_or_none(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Fidelity:
    """How far a trial is trained; all trials of a stage share one. structures None = all there are."""

    stage: str
    structures: int | None
    epochs: int
    ranks: int


@dataclass(frozen=True)
class Proposal:
    """A trial to run: its identity, its hyper-parameters, and what it is expected to cost; None = nobody knows."""

    trial_id: str
    params: Params
    projected_joules: float | None = None
    projected_seconds: float | None = None


@dataclass(frozen=True)
class EpochRecord:
    """One line of a trial's ``epochs.jsonl``: what training reported, and joules so far over all attempts and ranks."""

    epoch: int
    train_loss: float | None
    val_loss: float | None
    val_by_source: dict[str, dict[str, float | None]]
    structures_seen: int
    seconds: float
    learning_rate: float | None
    energy_joules: float | None = None
    time_seconds: float | None = None  # seconds since the epoch (Unix), when the line was written
    data_wait_seconds: float | None = None  # of `seconds`, those in which training waited for its batches

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: what is not a finite number becomes None."""
        return {k: finite_or_none(v) for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EpochRecord:
        """Inverse of `to_dict`; keys of a newer version are ignored."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in data.items() if k in known})


@dataclass(frozen=True)
class TrialResult:
    """One row of ``trials.jsonl``. `energy` is the whole bill: lost attempts and all ranks included.

    throttled_ratio: share of device time under the most frequent throttle reason, None = no device can say.
    throttled: it was more than the config allows, so the joules and seconds are not comparable.
    projected_joules: what the whole trial was expected to cost before it started.
    peak_memory_bytes: of the rank that used most: on the GPU where it ran on one, else of its process.
    ended: why training ended: epochs (all of them), early_stop (it converged), stopped (by the scheduler), diverged;
    of one that goes on in the next command, walltime or the signal by which it was told to leave. None = not known.
    limit_ratios: what it used of each of `search.constraints`, over what is allowed; above 1 = too much.
    """

    run: str
    trial_id: str
    params: Params
    fidelity: Fidelity
    status: Status
    val_loss: float | None
    val_by_source: dict[str, dict[str, float | None]]
    epochs_done: int
    structures_seen: int
    wall_seconds: float
    energy: EnergyReport
    n_parameters: int | None = None
    devices: tuple[str, ...] = ()
    checkpoint: str | None = None
    error: str | None = None
    started_at: str | None = None
    attempts: int = 1
    diverged: bool = False
    throttled_ratio: float | None = None
    throttled: bool = False
    projected_joules: float | None = None
    peak_memory_bytes: int | None = None
    limit_ratios: dict[str, float] = field(default_factory=dict)
    ended: str | None = None

    def flagged(
        self, throttled_share: float, *, limits: Mapping[str, float] | None = None, capped: bool = False
    ) -> TrialResult:
        """The same result, which says whether it is comparable, and what it used of each limit.

        Args:
            throttled_share: the largest share of device time under a throttle reason that is still comparable, 0 to 1.
            limits: what a trial may use at most: memory_bytes, wall_seconds, mean_watts.
            capped: a power cap is what was tried, so being held down by it does not count.
        """
        ratio = self.energy.throttled_ratio_but("power_cap") if capped else self.energy.throttled_ratio
        used = {
            "memory_bytes": self.peak_memory_bytes, "wall_seconds": self.wall_seconds, "mean_watts": self.mean_watts
        }  # fmt: skip
        ratios = {name: value / limit for name, limit in (limits or {}).items() if (value := used[name]) is not None}
        throttled = ratio is not None and ratio > throttled_share
        return replace(self, throttled_ratio=ratio, throttled=throttled, limit_ratios=ratios)

    @property
    def goes_on(self) -> bool:
        """Whether it was told to leave before its end, and the next command takes it up again: it has no row."""
        return self.status == "interrupted" and self.ended in LEFT

    @property
    def mean_watts(self) -> float | None:
        """Power of all ranks together, over the time under the meter, W."""
        joules = self.energy.joules
        return joules / self.wall_seconds if joules is not None and self.wall_seconds > 0 else None

    @property
    def energy_joules(self) -> float | None:
        """Total joules of the trial, None where nothing could be measured."""
        return self.energy.joules

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the total and its method beside the shares."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data |= {
            "fidelity": asdict(self.fidelity),
            "energy": self.energy.to_dict(),
            "energy_joules": self.energy.joules,
            "energy_method": self.energy.method,
            "devices": list(self.devices),
        }
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrialResult:
        """Inverse of `to_dict`.

        Raises:
            ValueError: a field is missing or of the wrong type.
        """
        known = {f.name for f in fields(cls)}
        try:
            values = {k: v for k, v in data.items() if k in known}
            values |= {
                "fidelity": Fidelity(**data["fidelity"]),
                "energy": EnergyReport.from_dict(data["energy"]),
                "devices": tuple(data.get("devices", ())),
            }
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a trial record: {error}") from error


@dataclass(frozen=True)
class Pick:
    """Why a trial is in a tier, in words, and the numbers of the sentence. None = unknown, or not asked.

    val_loss_noise: standard deviation of its validation loss, as far as late epochs and repetitions show it.
    joules_low, joules_high: bounds of `energy_joules`, of the search trial. projected_joules: to convergence.
    flags: throttled, partly_measured, pinned. front: 1 = no other candidate beats it in all that is compared.
    contribution_ratio: of the hypervolume of its front, what it alone adds. trade_off: see `knee` in `select_rules`.
    """

    trial_id: str
    reason: str
    val_loss: float | None = None
    val_loss_noise: float | None = None
    energy_joules: float | None = None
    energy_method: str | None = None
    joules_low: float | None = None
    joules_high: float | None = None
    projected_joules: float | None = None
    flags: tuple[str, ...] = ()
    front: int | None = None
    contribution_ratio: float | None = None
    trade_off: float | None = None


@dataclass(frozen=True)
class NearMiss(Pick):
    """A trial that is in no tier, and what kept it out of one.

    kind: clearly_worse, behind_gap, next (the tier was full), ceiling, copy, flagged, veto.
    """

    tier: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Tier:
    """A named group of trials chosen by one rule.

    rule: in words. rule_name: as the config names it. wanted: how many it may hold. notes: what else is to be known.
    clear: whether its trials stand out from the rest by a test; None = the rule does not ask.
    """

    name: str
    rule: str
    picks: tuple[Pick, ...]
    rule_name: str = ""
    wanted: int | None = None
    clear: bool | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LossNoise:
    """How far the validation losses of a stage scatter: one standard deviation for all, and how well it is known."""

    std: float
    degrees_of_freedom: float
    trials: int  # whose curves it is from
    source: str


@dataclass(frozen=True)
class Selection:
    """The outcome of sorting the finished trials of the last stage.

    pinned, vetoed: by hand; a vetoed trial stays a candidate that others are compared with. rules: the settings.
    """

    stage: str
    tiers: tuple[Tier, ...]
    front: tuple[str, ...]
    hypervolume: float | None
    reference_point: tuple[float, ...] | None  # of the objectives, the worst corner
    candidates: tuple[str, ...]
    excluded: dict[str, str]  # trial id -> why it was no candidate
    projected_joules: float | None  # full training of all picks
    projected_joules_all: float | None  # full training of all candidates, for comparison
    near_misses: tuple[NearMiss, ...] = ()
    pinned: tuple[str, ...] = ()
    vetoed: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ("val_loss", "energy_joules")
    rules: dict[str, Any] = field(default_factory=dict)
    noise: LossNoise | None = None

    @property
    def picked(self) -> tuple[str, ...]:
        """Trial ids of all tiers, in order, each once."""
        return tuple(dict.fromkeys(pick.trial_id for tier in self.tiers for pick in tier.picks))

    @property
    def saved_joules(self) -> float | None:
        """What training the picks instead of all candidates saves; None where either is unknown."""
        if self.projected_joules_all is None or self.projected_joules is None:
            return None
        return self.projected_joules_all - self.projected_joules

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Selection:
        """Inverse of `to_dict`; keys of a newer version are ignored.

        Raises:
            KeyError, TypeError: something is missing or of the wrong type.
        """
        values = _known(cls, data)
        tiers = [_known(Tier, t) | {"picks": tuple(_picked(Pick, p) for p in t["picks"])} for t in data["tiers"]]
        values["tiers"] = tuple(Tier(**t | {"notes": tuple(t.get("notes", ()))}) for t in tiers)
        values["near_misses"] = tuple(_picked(NearMiss, miss) for miss in data.get("near_misses", ()))
        for name in ("front", "candidates", "pinned", "vetoed", "objectives"):
            if name in data:
                values[name] = tuple(data[name])
        values["reference_point"] = tuple(data["reference_point"]) if data["reference_point"] else None
        values["noise"] = LossNoise(**_known(LossNoise, data["noise"])) if data.get("noise") else None
        return cls(**values)


def _known(kind: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    return {name: value for name, value in data.items() if name in names}


def _picked(kind: type[AnyPick], data: Mapping[str, Any]) -> AnyPick:
    values = _known(kind, data)
    return kind(**values | {"flags": tuple(values.get("flags", ()))})


@dataclass(frozen=True)
class PhaseEnergy:
    """Joules of one phase of a run: data, search:<stage>, full training, evaluation."""

    phase: str
    joules: float | None
    method: str | None
    coverage_ratio: float | None
    trials: int = 0
    warnings: tuple[str, ...] = field(default_factory=tuple)
    joules_low: float | None = None  # the true energy is not below, as far as the meters can say
    joules_high: float | None = None

    @property
    def uncertainty_ratio(self) -> float | None:
        """Largest deviation from `joules` that the meters leave open, as a share of it; None = not stated."""
        if not self.joules or self.joules_low is None or self.joules_high is None:
            return None
        return max(self.joules_high - self.joules, self.joules - self.joules_low) / self.joules
