"""A witness of the energy ledger that shares no code with it: it watches how long each rank is under the meter.

Each call of the trial writes the first and the last moment at which its journal was open, every two milliseconds, into
a file of its own; a SIGKILL leaves the last stamp behind.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
import time
from pathlib import Path

import wattier.run
from wattier.records import TrialResult
from wattier.trial import TrialContext, run_trial

STAMPS = struct.Struct("dd")
PERIOD_SECONDS = 0.002


def observed_run_trial(context: TrialContext) -> TrialResult | None:
    """The real trial, with a witness beside it."""
    pattern = f"*rank{context.world.rank}.energy.json"
    before = set(context.folder.glob(pattern))
    over = threading.Event()
    witness = threading.Thread(target=_watch, args=(context.folder, pattern, before, over), daemon=True)
    witness.start()
    try:
        return run_trial(context)
    finally:
        over.set()
        witness.join()


def observed_seconds(folder: Path) -> float:
    """Sum over all ranks and attempts of the time under the meter."""
    spans = [STAMPS.unpack(path.read_bytes()) for path in folder.glob("*.stamps") if path.stat().st_size]
    return sum(last - first for first, last in spans)


def _watch(folder: Path, pattern: str, before: set[Path], over: threading.Event) -> None:
    path = Path(os.environ["WITNESS_FOLDER"]) / f"{os.getpid()}-{time.time_ns()}.stamps"
    with path.open("wb", buffering=0) as file:
        journal = None
        first = 0.0
        while not over.wait(PERIOD_SECONDS):
            if journal is None:
                journal = next(iter(set(folder.glob(pattern)) - before), None)
                first = time.time()
            elif b'"final": true' in journal.read_bytes()[:4096]:
                return
            else:
                os.pwrite(file.fileno(), STAMPS.pack(first, time.time()), 0)


if __name__ == "__main__":
    from observed import observed_run_trial as importable  # by name, so that other processes can import it

    wattier.run.run_trial = importable
    from wattier.cli import main

    sys.argv[0] = "wattier"
    main()
