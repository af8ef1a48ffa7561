"""Processes that hold power caps, and what the simulated driver was told: for tests that kill.

``python cap_holder.py`` forks one process a line of its standard input: it caps a GPU, says so in a file, and holds the
cap until it is told to end, or dies otherwise.
"""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

GPU, OTHER = "GPU-aaaa-0000", "GPU-bbbb-0000"  # the first two simulated ones
PATIENCE_SECONDS = 30.0
_RECORD = struct.Struct("ddii")


class SetLimit(NamedTuple):
    """One call that set a limit (drivers/scenario.h)."""

    clock: float
    watts: float
    device: int
    pid: int


class Driver(NamedTuple):
    """The memory of the simulated driver."""

    path: Path

    def sets(self, device: int = 0) -> list[SetLimit]:
        """All calls for a device, oldest first."""
        data = self.path.read_bytes() if self.path.exists() else b""
        return [made for made in map(SetLimit._make, _RECORD.iter_unpack(data)) if made.device == device]

    def watts(self, device: int = 0, *, at_first: float = 700.0) -> float:
        """The limit in force, W."""
        return self.sets(device)[-1].watts if self.sets(device) else at_first

    def set_by_hand(self, watts: float, device: int = 0) -> None:
        """What an administrator does meanwhile."""
        with self.path.open("ab") as file:
            file.write(_RECORD.pack(time.monotonic(), watts, device, os.getpid()))


def eventually(condition, patience_seconds=PATIENCE_SECONDS) -> None:
    """Wait for a condition, or fail."""
    deadline = time.monotonic() + patience_seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come true"
        time.sleep(0.01)


def keeper_of(driver: Driver, device: int = 0) -> int:
    """The process that set a limit last."""
    return driver.sets(device)[-1].pid


def is_clean(folder: Path) -> bool:
    """Whether no note is left."""
    return not list(folder.glob("*.json"))


class Holder:
    """One process that holds a cap."""

    def __init__(self, nursery: subprocess.Popen, folder: Path, number: int, **request) -> None:
        self.said, self.end = folder / f"{number}.said", folder / f"{number}.end"
        request |= {"said": str(self.said), "end": str(self.end), "env": dict(os.environ)}
        nursery.stdin.write(json.dumps(request) + "\n")
        nursery.stdin.flush()
        self.pid = int(nursery.stdout.readline())

    def answer(self) -> dict:
        """What it said last, once it has said something: watts, or an error."""
        eventually(self.said.exists)
        return json.loads(self.said.read_text())

    def finish(self, how: str = "return") -> dict:
        """Tell it to end, and return its last word."""
        self.said.unlink(missing_ok=True)
        self.end.write_text(how)
        return self.answer()

    def kill(self, number: int = signal.SIGKILL, *, group: bool = False) -> None:
        """Kill it, or its whole process group."""
        (os.killpg if group else os.kill)(self.pid, number)


def hold(request: dict) -> None:
    """Play a holder."""
    from wattier_telemetry.power_cap import PowerCap
    from wattier_telemetry.power_limit import PowerCapError

    os.setpgid(0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["env"])
    end, cap = Path(request["end"]), PowerCap(request["uuid"], request["ratio"], wait_seconds=request["wait_seconds"])

    def say(**words) -> None:
        temporary = Path(request["said"] + ".tmp")
        temporary.write_text(json.dumps(words))
        temporary.rename(request["said"])

    try:
        with cap:
            if request.get("with_child") and not os.fork():
                time.sleep(10 * PATIENCE_SECONDS)  # a worker that inherits every open file, and outlives its parent
                os._exit(0)
            say(watts=cap.watts, before=cap.before_watts)
            while not (end.exists() and end.read_text()):
                time.sleep(0.01)
            if end.read_text() == "raise":
                raise ZeroDivisionError("the work failed")
    except PowerCapError as error:
        say(error=str(error))
    except ZeroDivisionError as error:
        say(error=str(error), notes=getattr(error, "__notes__", []))
    else:
        say(outcome=cap.restoration.outcome if cap.restoration else None, remark=cap.remark)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for holders
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            hold(json.loads(line))
            os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
