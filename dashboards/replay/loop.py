"""Move a recorded trace to now and repeat it for a day: ``python loop.py demo.csv > now.csv``."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterator
from pathlib import Path

DAY_SECONDS = 86_400.0


def looped(path: Path, start_seconds: float, seconds: float = DAY_SECONDS) -> Iterator[str]:
    """Lines of a CSV with the trace again and again; each round begins one step after the last ended."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    times = sorted({float(line["time_seconds"]) for line in lines})
    period = times[-1] - times[0] + (times[1] - times[0])
    yield "time_seconds,device,power_watts"
    for round_ in range(int(seconds / period) + 1):
        shift = start_seconds - times[0] + round_ * period
        for line in lines:
            yield f"{float(line['time_seconds']) + shift:.3f},{line['device']},{line['power_watts']}"


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in looped(Path(sys.argv[1]), time.time()))
