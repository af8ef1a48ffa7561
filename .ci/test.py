"""Run all tests, those of two rooms beside the others: telemetry and dashboards mostly wait, the rest mostly computes.

What computes is nicer, and what waits has a session (so a scheduling group) of its own: its clocks are not held up.
Both must pass. The output of the first comes when it has ended; arguments go to both pytest runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

WAITING = ("tests/telemetry", "tests/dashboards")


def main() -> int:
    pytest = [sys.executable, "-m", "pytest", *sys.argv[1:]]
    with tempfile.TemporaryFile() as output:
        print(f"tests: {' and '.join(WAITING)} run in the background, their output comes last", flush=True)
        waiting = subprocess.Popen(
            [*pytest, "-p", "no:cacheprovider", *WAITING], stdout=output, stderr=output, start_new_session=True
        )
        try:
            os.nice(10)
            computing = subprocess.run([*pytest, *(f"--ignore={room}" for room in WAITING)], check=False).returncode
            waited = waiting.wait()
        finally:
            waiting.kill()
        output.seek(0)
        sys.stdout.buffer.write(output.read())
    if computing or waited:
        print(f"tests: {'failed' if computing else 'passed'} here, {'failed' if waited else 'passed'} in {WAITING}")
    return computing or waited


if __name__ == "__main__":
    sys.exit(main())
