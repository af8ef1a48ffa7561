"""What `wattier bench power` leaves of each size, and how it is said in one line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True)
class SizePower:
    """What one size drew. A size that does not fit has no figures but those of its memory.

    seconds, joules (with the bounds that the meter states) and counts are of whole steps after the first one, which
    loads kernels. peak_memory_bytes: as `peak_memory.peak_memory_bytes` tells it. needed_bytes: what was foretold.
    reason: how it ran out of memory, though it was foretold to fit.
    """

    name: str
    status: Literal["measured", "does_not_fit"]
    n_parameters: int
    settings: dict[str, Any]
    hardware: str
    started_at: str
    needed_bytes: int
    available_bytes: int | None
    steps: int = 0
    structures: int = 0
    atoms: int = 0
    edges: int = 0
    seconds: float | None = None
    data_wait_seconds: float | None = None
    joules: float | None = None
    joules_low: float | None = None
    joules_high: float | None = None
    method: str | None = None
    coverage_ratio: float | None = None
    peak_memory_bytes: int | None = None
    warnings: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def mean_watts(self) -> float | None:
        """Power over the time it trained, W."""
        return self.joules / self.seconds if self.joules is not None and self.seconds else None

    @property
    def structures_per_second(self) -> float | None:
        """Speed, 1/s."""
        return self.structures / self.seconds if self.seconds else None

    @property
    def joules_per_structure(self) -> tuple[float | None, float | None, float | None]:
        """Energy of one structure that is trained on, J: lower bound, best, upper bound."""
        low, best, high = (
            None if joules is None or not self.structures else joules / self.structures
            for joules in (self.joules_low, self.joules, self.joules_high)
        )
        return low, best, high

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with the rates."""
        low, best, high = self.joules_per_structure
        return asdict(self) | {
            "warnings": list(self.warnings),
            "mean_watts": self.mean_watts,
            "structures_per_second": self.structures_per_second,
            "joules_per_structure": best,
            "joules_per_structure_low": low,
            "joules_per_structure_high": high,
        }

    @classmethod
    def from_dict(cls, data: Any) -> SizePower:
        """Read what `to_dict` wrote; the rates are computed again."""
        known = {field.name: data[field.name] for field in fields(cls)}
        return cls(**known | {"warnings": tuple(known["warnings"])})


def in_words(result: SizePower) -> str:
    """A size in one line."""
    head = f"{result.name}: {result.n_parameters:,} parameters"
    if result.status == "does_not_fit":
        if result.reason is not None:
            return f"{head}, does not fit: {result.reason}"
        free = (result.available_bytes or 0) / 2**30
        return f"{head}, does not fit: needs about {result.needed_bytes / 2**30:.1f} GiB, {free:.1f} GiB are free"
    peak = "unknown" if result.peak_memory_bytes is None else f"{result.peak_memory_bytes / 2**30:.2f} GiB"
    speed = f"{result.structures_per_second or 0:.3g} structures/s"
    low, best, high = result.joules_per_structure
    if best is None:
        return f"{head}, {speed}, peak memory {peak}; its energy is unknown"
    between = " to ".join(dict.fromkeys(f"{bound:.4g}" for bound in (low, high) if bound is not None))
    bounds = f" ({between})" if between else ""
    return (
        f"{head}, {result.mean_watts or 0:.4g} W, {best:.4g} J a structure{bounds}, {speed}, peak memory {peak}; "
        f"{result.method}, {result.seconds or 0:.1f} s, {result.steps} steps"
    )
