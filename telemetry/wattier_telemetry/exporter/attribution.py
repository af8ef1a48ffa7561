"""Who owes a device's energy: each step is split among the trials on the device, and the rest is nobody's.

Energy is booked in whole microjoules, so that the shares and the rest add up to the device's energy exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psutil

from wattier_telemetry.records import Attribution

Key = tuple[str, str, str, str]  # run, stage, trial, rank
_KEPT_TRIALS = 1000  # a trial that comes back goes on counting where it was
MICRO = 1_000_000


class Part(NamedTuple):
    """A trial's claim on a device."""

    key: Key
    fraction: float
    pid: int


class Split(NamedTuple):
    """How a device's energy is divided now; the weights add up to 1 at most."""

    weights: Mapping[Key, float]
    attribution: Attribution


def split(parts: Sequence[Part], busy: Mapping[int, float], roots: Mapping[int, int]) -> Split:
    """Divide a device among trials: by process utilisation where it is known, else by what they registered.

    Args:
        parts: The trials on the device.
        busy: How busy each process has kept the device, 0 to 1; empty = unknown.
        roots: For each process in ``busy`` that belongs to a trial, the trial's process.
    """
    total = sum(busy.values())
    mine: dict[int, float] = {}
    for pid, ratio in busy.items():
        if pid in roots:
            mine[roots[pid]] = mine.get(roots[pid], 0.0) + ratio
    if total > 0 and mine:
        weights = {}
        for part in parts:
            same = sum(other.fraction for other in parts if other.pid == part.pid)
            weights[part.key] = mine.get(part.pid, 0.0) / total * part.fraction / same
        return Split(weights, "utilization")
    claimed = sum(part.fraction for part in parts)
    scale = 1 / claimed if claimed > 1 else 1.0
    whole = len(parts) == 1 and parts[0].fraction == 1
    return Split({part.key: part.fraction * scale for part in parts}, "whole" if whole else "equal")


def roots_of(busy: Mapping[int, float], pids: set[int], known: dict[int, int | None]) -> dict[int, int]:
    """Find which of some processes are a trial's or its children's; ``known`` remembers answers between calls."""
    for pid in known.keys() - busy.keys():
        del known[pid]
    for pid in busy:
        if pid not in known or (known[pid] is not None and known[pid] not in pids):
            known[pid] = _root(pid, pids)
    return {pid: root for pid, root in known.items() if root is not None}


def _root(pid: int, pids: set[int]) -> int | None:
    if pid in pids:
        return pid
    try:
        return next((parent.pid for parent in psutil.Process(pid).parents() if parent.pid in pids), None)
    except psutil.Error:
        return None


@dataclass
class Ledger:
    """The books of one device, in microjoules; ``total == rest + forgotten + sum of shares``, always."""

    total: int = 0
    rest: int = 0
    forgotten: int = 0
    shares: dict[Key, int] = field(default_factory=dict)

    def book(self, microjoules: int, weights: Mapping[Key, float]) -> None:
        """Divide one step; each share is rounded down, and the rest takes what remains."""
        if microjoules <= 0:
            return
        left = microjoules
        for key, weight in weights.items():
            part = min(left, int(microjoules * weight))
            self.shares[key] = self.shares.get(key, 0) + part
            left -= part
        self.total += microjoules
        self.rest += left

    def forget(self, living: set[Key]) -> None:
        """Drop the oldest shares of trials that ended, beyond what is kept."""
        surplus = len(self.shares) - _KEPT_TRIALS
        for key in [key for key in self.shares if key not in living][: max(0, surplus)]:
            self.forgotten += self.shares.pop(key)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        shares = [[*key, microjoules] for key, microjoules in self.shares.items()]
        return {"total": self.total, "rest": self.rest, "forgotten": self.forgotten, "shares": shares}

    @classmethod
    def from_dict(cls, data: Any) -> Ledger:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: If the books do not balance, or hold what cannot be.
        """
        shares = {_key(row[:-1]): int(row[-1]) for row in data["shares"]}
        ledger = cls(int(data["total"]), int(data["rest"]), int(data["forgotten"]), shares)
        if ledger.total != ledger.rest + ledger.forgotten + sum(shares.values()):
            raise ValueError("the shares and the rest are not equal to the total")
        if min(ledger.rest, ledger.forgotten, *shares.values(), 0) < 0:
            raise ValueError("a share is negative")
        return ledger


def _key(texts: Sequence[str]) -> Key:
    run, stage, trial, rank = (str(text) for text in texts)
    return run, stage, trial, rank
