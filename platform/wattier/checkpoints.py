"""Checkpoints that no later command could need are removed when the members are trained; records and journals stay.

What stays: of a member its best and its last one, also of one that is no longer picked its best, for it is paid for and
another selection may take it back; of a search's pick its best, and with `full_training.warm_start`, where another
selection would begin from it, the best of every trial that can be picked.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from wattier.choices import can_be_pinned
from wattier.config import RunConfig
from wattier.json_lines import append_json_lines, read_json_lines
from wattier.rundir import FULL_STAGE, RunDir

BEST, LAST = "best.pt", "last.pt"
REMOVED_NAME = "removed.jsonl"


class RemovedInfo(NamedTuple):
    """What was removed, and the disk it gave back."""

    files: int
    bytes: int


def remove_needless(run: RunDir, config: RunConfig) -> RemovedInfo:
    """Remove what is needless now, once all members are trained; says what it removed. Killed, it goes on next time."""
    found = {path: path.stat().st_size for path in needless(run, config) if path.exists()}
    if found:  # noted first: of a file that is noted and still there nothing is said
        notes = [{"path": path.relative_to(run.path).as_posix(), "bytes": size} for path, size in found.items()]
        append_json_lines(run.path / REMOVED_NAME, notes)
    for path in found:
        path.unlink(missing_ok=True)
    return RemovedInfo(len(found), sum(found.values()))


def needless(run: RunDir, config: RunConfig) -> list[Path]:
    """Checkpoints, there or not, that no later command could need."""
    selection = run.selection()
    if selection is None or config.full_training.keep_checkpoints == "all":
        return []
    picked, warm = set(selection.picked), config.full_training.warm_start
    paths = []
    for row in run.trials():
        stage, folder = row.fidelity.stage, run.trial_folder(row.fidelity.stage, row.trial_id)
        if stage == FULL_STAGE:
            if row.trial_id not in picked and row.status != "failed":
                paths.append(folder / LAST)
            continue
        paths.append(folder / LAST)  # a trial that has a row is not taken up again
        may_be_picked = stage == selection.stage and (row.trial_id in picked or (warm and can_be_pinned(row)))
        if not may_be_picked:
            paths.append(folder / BEST)
    return paths


def removed_info(run: RunDir) -> RemovedInfo:
    """All that was removed in this run, each file counted once."""
    notes = {str(note["path"]): int(note["bytes"]) for note in read_json_lines(run.path / REMOVED_NAME)}
    gone = {path: size for path, size in notes.items() if not (run.path / path).exists()}
    return RemovedInfo(len(gone), sum(gone.values()))
