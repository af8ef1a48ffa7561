"""Run all tests on two lanes side by side: each takes the next room of tests when it is done with one.

What computes is nicer, and what waits has a session (so a scheduling group) of its own: its clocks are not held up.
All must pass. A room's output comes when it has ended; arguments go to every pytest run. What still runs after
LIMIT_SECONDS, or when this is terminated, says where every thread of it stood and ends: a gate that hangs says why.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

N_LANES = 2
LIMIT_SECONDS = 4200.0  # four times what they take
MOST_FAILURES = 5  # of a room, which then ends: one sick cluster makes test after test wait for its time limit
NICE = ["nice", "-n", "10"]


class Room(NamedTuple):
    """Folders of tests that run in one pytest. waits: they mostly wait, with an eye on the clock."""

    folders: tuple[str, ...]
    waits: bool = False


# The longest first, so that the lanes end together.
ROOMS = (
    Room(("tests/e2e",)),
    Room(("tests/telemetry", "tests/dashboards"), waits=True),
    Room(("tests/platform",)),
    Room(("tests/gnn", "tests/search")),
)


class Lane(threading.Thread):
    """Runs rooms until there are none left, whatever becomes of them."""

    def __init__(self, rooms: deque[Room], arguments: list[str], voice: threading.Lock, deadline: float) -> None:
        super().__init__()
        self.rooms, self.arguments, self.voice, self.deadline = rooms, arguments, voice, deadline
        self.failed: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Take the next room until there is none."""
        while True:
            try:
                room = self.rooms.popleft()
            except IndexError:
                return
            self._run(room)

    def _run(self, room: Room) -> None:
        python = [sys.executable, "-X", "faulthandler"]
        options = ["-p", "no:cacheprovider", f"--maxfail={MOST_FAILURES}", *self.arguments]
        command = [*([] if room.waits else NICE), *python, "-m", "pytest", *options, *room.folders]
        name, started = " ".join(room.folders), time.monotonic()
        with tempfile.TemporaryFile() as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=room.waits)
            try:
                code = self.process.wait(timeout=max(0.0, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.stop()
                code = self.process.wait()
            output.seek(0)
            with self.voice:
                sys.stdout.buffer.write(output.read())
                how = "was stopped after" if code == -signal.SIGABRT else "took"
                print(f"tests: {name} {how} {time.monotonic() - started:.0f} s", flush=True)
        if code:
            self.failed.append(name)

    def stop(self) -> None:
        """End what runs, which says where it stood (faulthandler), and run no more."""
        self.rooms.clear()
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGABRT)


def forgotten() -> list[str]:
    """Folders of tests that no room holds."""
    there = {path.parent.as_posix() for path in Path("tests").rglob("test_*.py")}
    return sorted(there - {folder for room in ROOMS for folder in room.folders})


def main() -> int:
    if folders := forgotten():
        print(f"tests: .ci/test.py runs no {', '.join(folders)}. Add it to a room.")
        return 2
    rooms, voice = deque(ROOMS), threading.Lock()
    deadline = time.monotonic() + LIMIT_SECONDS
    lanes = [Lane(rooms, sys.argv[1:], voice, deadline) for _ in range(N_LANES)]
    signal.signal(signal.SIGTERM, lambda *_: [lane.stop() for lane in lanes])
    print("tests: " + ", ".join(folder for room in ROOMS for folder in room.folders), flush=True)
    try:
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
    finally:
        for lane in lanes:
            lane.stop()
    failed = [name for lane in lanes for name in lane.failed]
    for name in failed:
        print(f"tests: failed: {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
