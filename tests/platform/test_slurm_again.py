"""The Slurm script queues a run again that is not finished, and nothing else; Slurm, Ray and Wattier are stand-ins."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from wattier.departure import EXIT_NOT_FINISHED

SCRIPT = Path(__file__).parents[2] / "configs/slurm/wattier.sbatch"
WAITS = "trap 'echo USR1 >> calls; exit {}' USR1; echo ready >> calls; while true; do /bin/sleep 0.05; done"
LASTS = "exec /bin/sleep 20"


@pytest.fixture
def job(tmp_path):
    """Start the script with a wattier of some text; `requeues`: whether the site allows that."""
    started = []

    def start(wattier, requeues=True, **environment):
        tools = {
            "scontrol": 'if [[ $2 == hostnames ]]; then echo n1; '
            "elif [[ $1 == show ]]; then echo '   Command=/home/me/my.sbatch x'; "
            f'else echo "scontrol $*" >> calls; exit {int(not requeues)}; fi',
            "sbatch": 'echo "sbatch $* jobs=$WATTIER_JOBS" >> calls',
            "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
            "hostname": "echo 192.0.2.1",
            "ray": LASTS, "wattier-telemetry": LASTS,
            "python": "[[ $1 == -c ]] && echo token || true",
            "sleep": "exec /bin/sleep 0.1",
            "wattier": wattier,
        }  # fmt: skip
        (tmp_path / "bin").mkdir()
        for name, text in tools.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        (tmp_path / ".venv/bin").mkdir(parents=True)
        (tmp_path / ".venv/bin/activate").touch()
        slurm = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "n1", **environment}
        process = subprocess.Popen(
            ["bash", str(SCRIPT), "some.yaml"], cwd=tmp_path, env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", **slurm},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.communicate()


def calls(tmp_path):
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def wait_until_ready(process, tmp_path):
    deadline = time.monotonic() + 30
    while "ready" not in calls(tmp_path):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("code", [0, 1, 2, 3, 130, 143])
def test_a_run_that_ended_is_not_queued_again(job, tmp_path, code):
    process = job(f"exit {code}")
    assert process.wait(30) == code
    assert calls(tmp_path) == []


def test_a_run_that_is_not_finished_is(job, tmp_path):
    assert job(f"exit {EXIT_NOT_FINISHED}").wait(30) == 0
    assert calls(tmp_path) == ["scontrol requeue 12345"]
    assert not list(tmp_path.glob(".ray-token*"))


def test_where_no_job_may_be_queued_again_another_one_is_submitted(job, tmp_path):
    assert job(f"exit {EXIT_NOT_FINISHED}", requeues=False, WATTIER_JOBS="3").wait(30) == 0
    assert calls(tmp_path)[1:] == [
        "sbatch --export=ALL --dependency=afterany:12345 /home/me/my.sbatch some.yaml jobs=4"
    ]


@pytest.mark.parametrize("counter", [{"SLURM_RESTART_COUNT": "49"}, {"WATTIER_JOBS": "50"}])
def test_it_does_not_go_on_for_ever(job, tmp_path, counter):
    process = job(f"exit {EXIT_NOT_FINISHED}", **counter)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == EXIT_NOT_FINISHED
    assert "not finished after 50 jobs" in out
    assert calls(tmp_path) == []


@pytest.mark.parametrize(("code", "due"), [(EXIT_NOT_FINISHED, 0), (0, 0), (3, 3)])
def test_the_signal_before_the_end_reaches_wattier_whose_code_counts(job, tmp_path, code, due):
    process = job(WAITS.format(code))
    wait_until_ready(process, tmp_path)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == due
    assert calls(tmp_path)[:2] == ["ready", "USR1"]
    assert calls(tmp_path)[2:] == (["scontrol requeue 12345"] if code == EXIT_NOT_FINISHED else [])


def test_a_cancelled_job_does_not_come_back(job, tmp_path):
    process = job(f"trap 'exit {EXIT_NOT_FINISHED}' TERM; echo ready >> calls; while true; do /bin/sleep 0.05; done")
    wait_until_ready(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert calls(tmp_path) == ["ready"]
