"""SIGKILL anywhere, the same command again: nothing is lost, nothing is done twice, every joule is billed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from observed import observed_seconds
from workplace import TIMEOUT_SECONDS, Workplace, ray_processes

from wattier.ledger import ledger_info
from wattier.rundir import RunDir

WATTS = 100.0
EXPECTED = {("wide", "complete"): 4, ("deep", "complete"): 2, ("full", "complete"): 2}


def kill_in_search(place: Workplace) -> bool:
    """One trial is done, another has finished an epoch."""
    open_trials = [p for p in place.run_dir.glob("trials/wide/*") if not (p / "result.json").exists()]
    return len(place.rows()) >= 1 and any((p / "epochs.jsonl").exists() for p in open_trials)


def kill_in_two_rank_stage(place: Workplace) -> bool:
    return any(place.run_dir.glob("trials/deep/*/epochs.jsonl"))


def kill_in_full_training(place: Workplace) -> bool:
    return any(p.read_text().count("\n") >= 3 for p in place.run_dir.glob("trials/full/*/epochs.jsonl"))


def kill_in_evaluation(place: Workplace) -> bool:
    return any(place.run_dir.glob("phases/evaluation/*.energy.json"))


def assert_undisturbed_outcome(place: Workplace) -> None:
    rows = place.rows()
    assert Counter((r["fidelity"]["stage"], r["status"]) for r in rows) == EXPECTED
    assert len({(r["fidelity"]["stage"], r["trial_id"]) for r in rows}) == len(rows)
    for name in ("selection.json", "evaluation.json", "report.html", "release/manifest.json"):
        assert (place.run_dir / name).exists(), name


@pytest.mark.parametrize("moment", [kill_in_search, kill_in_two_rank_stage, kill_in_full_training, kill_in_evaluation])
def test_killed_and_run_again(tiny: Workplace, moment) -> None:
    tiny.kill_when(lambda: moment(tiny), "run", "config.yaml", witnessed=True)
    finished = {(r["fidelity"]["stage"], r["trial_id"]): r for r in tiny.rows()}

    again = tiny.wattier("run", "config.yaml", witnessed=True)

    assert again.returncode == 0, again.stderr
    assert_undisturbed_outcome(tiny)
    for key, row in finished.items():
        folder = tiny.run_dir / "trials" / Path(*key)
        assert len(list(folder.glob("*rank0.energy.json"))) == row["attempts"] == 1, f"{key} was run again"
    assert_ledger_is_true(tiny)
    assert_no_ray_left()


def test_a_worker_and_then_ray_itself_are_killed(tiny: Workplace) -> None:
    """First a worker, whose trial is tried again in the same run; then the GCS, and in the next run the raylet."""
    tiny.environment |= {"RAY_gcs_rpc_server_reconnect_timeout_s": "3"}  # Ray's own patience is a minute
    tiny.config["full_training"] = {"epochs": 150, "early_stop_patience": 150}  # five ranks lose a moment here, not one
    tiny.write()
    process = tiny.start("run", "config.yaml", witnessed=True)
    wait_for(process, lambda: kill_in_search(tiny) and working(process))
    working(process)[0].kill()
    wait_for(process, lambda: any(tiny.run_dir.glob("trials/wide/*/attempt2-rank0.energy.json")))
    next(child for child in children(process) if child.name() == "gcs_server").kill()
    process.communicate(timeout=120)
    assert process.returncode != 0

    process = tiny.start("run", "config.yaml", witnessed=True)
    wait_for(process, lambda: kill_in_two_rank_stage(tiny))
    next(child for child in children(process) if child.name() == "raylet").kill()
    process.communicate(timeout=120)
    assert process.returncode != 0

    again = tiny.wattier("run", "config.yaml", witnessed=True)
    assert again.returncode == 0, again.stderr
    assert_undisturbed_outcome(tiny)
    assert_ledger_is_true(tiny)
    assert_no_ray_left()


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def working(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Workers that are in the middle of a trial, by the title that Ray gives them."""
    found = []
    for child in children(process):
        with contextlib.suppress(psutil.Error):
            if "ImplicitFunc.train" in " ".join(child.cmdline()):
                found.append(child)
    return found


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_undisturbed_run_resumes_to_nothing(tiny: Workplace) -> None:
    first = tiny.wattier("run", "config.yaml", witnessed=True)
    assert first.returncode == 0, first.stderr
    assert_undisturbed_outcome(tiny)
    assert_ledger_is_true(tiny)
    before = tiny.snapshot()

    second = tiny.wattier("run", str(tiny.run_dir))

    assert second.returncode == 0, second.stderr
    assert "Nothing was left to do" in second.stdout
    assert tiny.snapshot() == before
    assert_no_ray_left()


def assert_ledger_is_true(place: Workplace) -> None:
    """Joules of all trials are watts times the seconds that a witness saw, lost attempts included: 0 to 1 % over."""
    ledger = ledger_info(RunDir.open(place.run_dir))
    billed = sum(p.joules or 0.0 for p in ledger.phases if p.trials)
    fraction = 1 / (os.cpu_count() or 1)  # of the node, which one rank of one CPU owns
    true = WATTS * fraction * observed_seconds(place.witness_folder)
    assert true > 0
    assert true <= billed <= 1.01 * true, f"billed {billed:.2f} J, true {true:.2f} J"


def assert_no_ray_left() -> None:
    deadline = time.monotonic() + 15
    while ray_processes() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not ray_processes()
