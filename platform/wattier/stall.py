"""Which running trials have shown no sign of life for too long.

A sign of life is an epoch that was reported, or a file of the trial's folder that was written: a long epoch that saves
checkpoints within it is alive. What a meter's thread, a lock or a print writes is none, for a hung trial does so too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LOOKS_PER_STALL = 4  # so that a stall is noticed at most a quarter later than it has lasted long enough
NO_SIGN = ("lock", "trial.json", "error.txt")

Marks = tuple[tuple[str, int, int], ...]


@dataclass
class _Watched:
    folder: Path
    alive_at: float
    look_at: float
    marks: Marks


class StallWatch:
    """Looks at the folders of running trials, each a few times within `stall_seconds`; None = never.

    Times of files are compared with each other only: a file server's clock may be off.
    """

    def __init__(self, stall_seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.stall_seconds, self._clock = stall_seconds, clock
        self._watched: dict[str, _Watched] = {}
        self._look_at = float("inf")

    def started(self, key: str, folder: Path) -> None:
        """An attempt of a trial begins now."""
        if self.stall_seconds is None:
            return
        now = self._clock()
        look_at = now + self.stall_seconds / LOOKS_PER_STALL
        self._watched[key] = _Watched(folder, now, look_at, _marks(folder))
        self._look_at = min(self._look_at, look_at)

    def heard(self, key: str) -> None:
        """A trial reported."""
        if key in self._watched:
            self._watched[key].alive_at = self._clock()

    def ended(self, key: str) -> None:
        """A trial is watched no more."""
        self._watched.pop(key, None)

    def stalled(self) -> list[str]:
        """Trials that have stalled by now, each told once."""
        if self.stall_seconds is None or self._clock() < self._look_at:
            return []
        found = [key for key, watched in self._watched.items() if self._has_stalled(watched)]
        for key in found:
            self.ended(key)
        self._look_at = min((watched.look_at for watched in self._watched.values()), default=float("inf"))
        return found

    def _has_stalled(self, watched: _Watched) -> bool:
        now = self._clock()
        if self.stall_seconds is None or now < watched.look_at:
            return False
        marks = _marks(watched.folder)
        if marks != watched.marks:
            watched.marks, watched.alive_at = marks, now
        watched.look_at = now + self.stall_seconds / LOOKS_PER_STALL
        return now - watched.alive_at >= self.stall_seconds


def _marks(folder: Path) -> Marks:
    """Name, time and size of every file that is a sign of life."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.startswith((".", "output")) or name.endswith(".energy.json") or name in NO_SIGN:
                continue
            path = Path(parent) / name
            try:
                state = path.stat()
            except OSError:  # replaced at this moment
                continue
            found.append((str(path), state.st_mtime_ns, state.st_size))
    return tuple(sorted(found))
