"""Run all tests in two lanes side by side: what mostly waits, then the models; and beside them the whole product.

What computes is nicer, and what waits has a session (so a scheduling group) of its own: its clocks are not held up.
All must pass. The output of the first lane comes when both have ended; arguments go to every pytest run.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from typing import IO

WAITING = ["tests/telemetry", "tests/dashboards"]
MODELS = ["tests/gnn"]
NICE = ["nice", "-n", "10"]


class Lane(threading.Thread):
    """Runs commands one after another, whatever becomes of them."""

    def __init__(self, commands: list[list[str]], output: IO[bytes] | None) -> None:
        super().__init__()
        self.commands, self.output = commands, output
        self.failed: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.is_stopped = False

    def run(self) -> None:
        """Run them all."""
        for command in self.commands:
            if self.is_stopped:
                return
            alone = command[0] not in NICE
            self.process = subprocess.Popen(command, stdout=self.output, stderr=self.output, start_new_session=alone)
            if self.process.wait():
                self.failed.append(" ".join(command[command.index("pytest") :]))

    def stop(self) -> None:
        """Kill what runs, and run no more."""
        self.is_stopped = True
        if self.process is not None:
            self.process.kill()


def main() -> int:
    pytest = [sys.executable, "-m", "pytest", *sys.argv[1:]]
    rest = [f"--ignore={room}" for room in (*WAITING, *MODELS)]
    with tempfile.TemporaryFile() as output:
        print(f"tests: {', '.join(WAITING + MODELS)} run in the background, their output comes last", flush=True)
        hidden = [[*pytest, "-p", "no:cacheprovider", *WAITING], [*NICE, *pytest, "-p", "no:cacheprovider", *MODELS]]
        lanes = [Lane(hidden, output), Lane([[*NICE, *pytest, *rest]], None)]
        try:
            for lane in lanes:
                lane.start()
            for lane in lanes:
                lane.join()
        finally:
            for lane in lanes:
                lane.stop()
        output.seek(0)
        sys.stdout.buffer.write(output.read())
    failed = [command for lane in lanes for command in lane.failed]
    for command in failed:
        print(f"tests: failed: {command}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
