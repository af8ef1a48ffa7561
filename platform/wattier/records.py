"""What a run leaves behind: one JSON record each, units in the names, None for unknown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from wattier_telemetry import EnergyReport

Status = Literal["complete", "pruned", "failed", "interrupted"]
Params = dict[str, Any]
LEFT = ("walltime", "SIGTERM", "SIGUSR1")  # why a trial was told to leave


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
    """Why a trial is in a tier, in words."""

    trial_id: str
    reason: str


@dataclass(frozen=True)
class Tier:
    """A named group of trials chosen by one rule."""

    name: str
    rule: str
    picks: tuple[Pick, ...]


@dataclass(frozen=True)
class Selection:
    """The outcome of sorting the finished trials of the last stage."""

    stage: str
    tiers: tuple[Tier, ...]
    front: tuple[str, ...]
    hypervolume: float | None
    reference_point: tuple[float, float] | None  # val_loss, energy_joules
    candidates: tuple[str, ...]
    excluded: dict[str, str]  # trial id -> why it was no candidate
    projected_joules: float | None  # full training of all picks
    projected_joules_all: float | None  # full training of all candidates, for comparison

    @property
    def picked(self) -> tuple[str, ...]:
        """Trial ids of all tiers, in order, each once."""
        return tuple(dict.fromkeys(pick.trial_id for tier in self.tiers for pick in tier.picks))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Selection:
        """Inverse of `to_dict`."""
        tiers = tuple(Tier(t["name"], t["rule"], tuple(Pick(**p) for p in t["picks"])) for t in data["tiers"])
        point = data["reference_point"]
        return cls(
            **{
                **data,
                "tiers": tiers,
                "front": tuple(data["front"]),
                "candidates": tuple(data["candidates"]),
                "reference_point": tuple(point) if point else None,
            }
        )


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
