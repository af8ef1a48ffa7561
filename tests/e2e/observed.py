"""A witness of the energy ledger that shares no arithmetic with it: it clocks how long each rank works under the meter.

From the moment the meter is open to the moment it is told to close, each rank's witness writes first and last moment
into a file of its own every two milliseconds; a SIGKILL leaves the last stamp behind. The meter's own opening and
closing lie outside: what is billed must never be less than what the witness saw.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import wattier.run
import wattier.trial
from wattier.metering import metered
from wattier.records import TrialResult
from wattier.trial import run_trial
from wattier.trial_context import TrialContext
from wattier_gnn.train import Trainer

STAMPS = struct.Struct("dd")
PERIOD_SECONDS = 0.002


def observed_run_trial(context: TrialContext) -> TrialResult | None:
    """The real trial, with a witness beside it."""
    with mock.patch.object(wattier.trial, "metered", _witnessed), mock.patch.object(Trainer, "_step", _unhurried):
        return run_trial(context)


_STEP = Trainer._step


def _unhurried(trainer: Trainer, *arguments: Any) -> Any:
    """A step, and a rest after it, where a test needs time to disturb a training that is cheap."""
    time.sleep(float(os.environ.get("REST_SECONDS", "0")))
    return _STEP(trainer, *arguments)


def observed_seconds(folder: Path) -> float:
    """Sum over all ranks and attempts of the time under the meter."""
    spans = [STAMPS.unpack(path.read_bytes()) for path in folder.glob("*.stamps") if path.stat().st_size]
    return sum(last - first for first, last in spans)


@contextmanager
def _witnessed(folder: Path, name: str, *arguments: Any, **options: Any) -> Iterator[Any]:
    with metered(folder, name, *arguments, **options) as (meter, source):
        if not name.startswith("rank"):  # the start-up of a process, which is no trial's
            yield meter, source
            return
        over, close = threading.Event(), meter.close
        witness = threading.Thread(target=_watch, args=(time.time(), over), daemon=True)
        witness.start()

        def close_unseen() -> None:
            over.set()
            witness.join()
            close()

        meter.close = close_unseen
        yield meter, source


def _watch(first: float, over: threading.Event) -> None:
    path = Path(os.environ["WITNESS_FOLDER"]) / f"{os.getpid()}-{time.time_ns()}.stamps"
    with path.open("wb", buffering=0) as file:
        is_over = False
        while not is_over:
            is_over = over.wait(PERIOD_SECONDS)
            os.pwrite(file.fileno(), STAMPS.pack(first, time.time()), 0)


if __name__ == "__main__":
    from observed import observed_run_trial as importable  # by name, so that other processes can import it

    wattier.run.run_trial = importable
    from wattier.cli import main

    sys.argv[0] = "wattier"
    main()
