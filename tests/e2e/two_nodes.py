"""A funnel on two emulated nodes, by `ray job submit`: ``python tests/e2e/two_nodes.py CONFIG [--kill-node]``.

With --kill-node the second node is killed in the middle of a trial. What it cost is printed, and held against a witness
that shares no arithmetic with the ledger.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from observed import observed_seconds
from ray_nodes import RayNodes, is_loopback

from wattier.ledger import ledger_info
from wattier.rundir import RunDir, read_json_lines
from wattier_telemetry.registration import read_registrations

HERE = Path(__file__).parent
WATTS = 100.0
LONGEST_SECONDS = 3600


@dataclass
class Outcome:
    """What became of a funnel."""

    code: int
    log: str
    seconds: float
    run: RunDir
    statuses: Counter = field(default_factory=Counter)
    killed_after: float | None = None
    retried: dict[str, int] = field(default_factory=dict)  # trial -> epochs that were trained twice
    billed_joules: float = 0.0
    true_joules: float = 0.0
    lost_joules: float = 0.0


def write_config(values: dict[str, Any], folder: Path) -> Path:
    """The config with a run directory of its own and a power source of known watts."""
    trace = folder / "watts.csv"
    trace.write_text(f"time_seconds,device,power_watts\n0,node,{WATTS}\n")
    telemetry = {"source": f"replay:{trace}", "interval_seconds": 0.02}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**values, "run_dir": str(folder / "run"), "telemetry": telemetry}))
    return path


TOO_EARLY = "No available agent to submit job"  # Ray's word while a busy head starts


def run_funnel(nodes: RayNodes, config: Path, *, kill_node: bool, rest_seconds: float = 0.0) -> Outcome:
    """Submit a run whose config `write_config` made; with kill_node, a node dies as soon as work would be lost.

    rest_seconds: after each step of a training, which must last until there is something to lose.
    """
    victim = next(iter(nodes.others()), 1)
    run, witness = RunDir(config.parent / "run"), config.parent / "witness"
    witness.mkdir(exist_ok=True)
    began = time.monotonic()
    command = "python", str(HERE / "observed.py"), "run", str(config)
    job = nodes.submit(*command, env={"WITNESS_FOLDER": str(witness), "REST_SECONDS": str(rest_seconds)})
    killed_after = None
    try:
        if kill_node and _wait_for(lambda: _work_would_be_lost(nodes, run, victim), job):
            killed_after = time.monotonic() - began
            nodes.kill_node(victim)
        log, _ = job.communicate(timeout=LONGEST_SECONDS)
    finally:
        job.kill()
        job.wait()
    if job.returncode and TOO_EARLY in log:
        time.sleep(3)
        return run_funnel(nodes, config, kill_node=kill_node, rest_seconds=rest_seconds)
    return _looked_at(Outcome(job.returncode, log, time.monotonic() - began, run, killed_after=killed_after), witness)


def _wait_for(condition: Callable[[], bool], job: subprocess.Popen) -> bool:
    while not condition():
        if job.poll() is not None:
            return False
        time.sleep(0.02)
    return True


def _work_would_be_lost(nodes: RayNodes, run: RunDir, victim: int) -> bool:
    """A trial runs on the node, and every trial that runs has finished an epoch and saved it."""
    running = [path.parent for path in run.path.glob("trials/*/*/attempt1-rank0.energy.json")]
    running = [path for path in running if not (path / "result.json").exists()]
    if not running or not all((path / "last.pt").exists() for path in running):
        return False
    workers = {process.pid for process in nodes.workers(victim)}
    there = [trial for trial in read_registrations(nodes.folder / "registry") if trial.pid in workers]
    return any(run.trial_folder(trial.stage, trial.trial) in running for trial in there)


def _looked_at(outcome: Outcome, witness: Path) -> Outcome:
    run = outcome.run
    if not run.config_path.exists():
        return outcome
    rows = run.trials()
    outcome.statuses = Counter((row.fidelity.stage, row.status) for row in rows)
    for row in rows:
        folder = run.trial_folder(row.fidelity.stage, row.trial_id)
        if row.attempts > 1:
            epochs = [line["epoch"] for line in read_json_lines(folder / "epochs.jsonl")]
            outcome.retried[row.trial_id] = len(epochs) - len(set(epochs))
            outcome.lost_joules += sum(
                json.loads(path.read_text())["report"]["shares"][0]["joules"] for path in folder.glob("attempt1-*.json")
            )
    outcome.billed_joules = sum(phase.joules or 0.0 for phase in ledger_info(run).phases if phase.trials)
    outcome.true_joules = WATTS / (os.cpu_count() or 1) * observed_seconds(witness)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--kill-node", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="two-nodes-") as name, RayNodes((2, 2), (HERE,)) as nodes:
        config = write_config(yaml.safe_load(options.config.read_text()), Path(name))
        outcome = run_funnel(nodes, config, kill_node=options.kill_node)
        print(outcome.log[-3000:])
        listening = nodes.listening()
        print(f"sockets on loopback: {sum(is_loopback(c.laddr.ip) for c in listening)} of {len(listening)}")
        print(f"exit code of the job: {outcome.code}, after {outcome.seconds:.0f} s")
        print(f"trials: {dict(outcome.statuses)}")
        if options.kill_node:
            print(f"node 1 was killed after {outcome.killed_after or float('nan'):.0f} s")
            print(f"tried again: {outcome.retried} (epochs trained twice)")
            print(f"first attempts of those, billed: {outcome.lost_joules:.1f} J")
        ratio = outcome.billed_joules / outcome.true_joules - 1
        print(f"ledger: {outcome.billed_joules:.1f} J, witness: {outcome.true_joules:.1f} J ({100 * ratio:+.2f} %)")
        sys.exit(outcome.code)


if __name__ == "__main__":
    main()
