"""The members of a run, trained in peace and with disturbances: SIGKILL in mid-epoch, SIGTERM, the end of the walltime.

``python tests/e2e/members.py RUN`` does it with the picks of a finished run, as the quickstart leaves one: it trains
them twice in copies of the folder and prints whether both ended in the same bits, and what the ledger says.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import workplace
import yaml
from observed import observed_seconds
from workplace import Workplace

from wattier.config import RunConfig
from wattier.departure import EXIT_NOT_FINISHED
from wattier.ledger import FULL_PHASE, ledger_info
from wattier.prepare import prepare_data
from wattier.records import Fidelity, Pick, Selection, Tier, TrialResult
from wattier.rundir import FULL_STAGE, RunDir, append_json_line, write_json
from wattier_telemetry import EnergyReport, Share

WATTS = 100.0
NOT_OF_MEMBERS = ("trials/full", "evaluation.json", "report.html", "release", "phases/evaluation", "removed.jsonl")
PICKS = {"deep-000": {"hidden_dim": 8}, "deep-001": {"hidden_dim": 16}}
CONFIG = {
    "name": "members",
    "data": {"sources": {"qm7x": "sample"}, "cutoff_angstrom": 3.0},
    "model": {"n_layers": 1, "n_radial": 4, "head_dim": 8, "n_head_layers": 1, "forces": "vector"},
    "training": {"batch_structures": 128},
    "search": {
        "space": {"hidden_dim": {"low": 8, "high": 16, "step": 8}},
        "stages": [{"name": "deep", "trials": 2, "structures": 100, "epochs": 1, "reduction_factor": None}],
    },
    "select": {"accurate": 2, "balanced": 0, "accurate_rule": "lowest", "min_distance": 0},
    "full_training": {"epochs": 45, "early_stop_patience": 45},
}  # fmt: skip


class Quiet:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def phase(self, name: str) -> None: ...

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(self, done: object) -> None: ...

    def trial(self, result: TrialResult, done: int, total: int) -> None: ...


def selected_run(folder: Path, **changes: Any) -> RunDir:
    """A run whose search is over: its data are real, its two trials and their selection are written down."""
    config = RunConfig.model_validate(CONFIG | {"run_dir": str(folder)} | changes)
    run = RunDir.create(config)
    with run.lock():
        prepare_data(run, config, Quiet())
    little = EnergyReport.of([Share("node", "node", 0.0, 1.0, 1.0, 1e-6, "estimated")])
    for trial_id, params in PICKS.items():
        row = TrialResult(
            "members", trial_id, params, Fidelity("deep", 100, 1, 1), "complete", 1.0, {}, 1, 100, 1.0, little
        )
        append_json_line(run.trials_path, row.to_dict())
    tier = Tier("accurate", "by hand", tuple(Pick(trial_id, "by hand") for trial_id in PICKS))
    selection = Selection("deep", (tier,), (), None, None, tuple(PICKS), {}, None, None)
    write_json(run.selection_path, selection.to_dict())
    return run


class Disturbed(NamedTuple):
    """What the commands said that were cut short."""

    codes: dict[str, int]
    said: dict[str, str]
    seconds: dict[str, float]


def undone(run: Path, folder: Path, **changes: Any) -> Workplace:
    """A copy of a run as it was before its members were trained, with a power source of known watts."""
    place = Workplace(folder, yaml.safe_load((run / "config.yaml").read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / "watts.csv"
    trace.write_text(f"time_seconds,device,power_watts\n0,node,{WATTS}\n")
    shutil.copytree(run, folder / "run", symlinks=True)
    for name in NOT_OF_MEMBERS:
        path = folder / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    rows = folder / "run" / "trials.jsonl"
    kept = [line for line in rows.read_text().splitlines() if json.loads(line)["fidelity"]["stage"] != FULL_STAGE]
    rows.write_text("".join(f"{line}\n" for line in kept))
    telemetry = {"source": f"replay:{trace}", "interval_seconds": 0.02}
    place.config |= {"run_dir": str(folder / "run"), "telemetry": telemetry, **changes}
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(place.config, sort_keys=False))
    place.write()
    return place


def disturb(place: Workplace, walltime_seconds: float) -> Disturbed:
    """Train members in four commands, three of which are cut short; each when every member has gone on for a while."""
    outcome = Disturbed({}, {}, {})
    for name, number in (("SIGKILL", signal.SIGKILL), ("SIGTERM", signal.SIGTERM)):
        began = {path: epochs_of(path) for path in place.run_dir.glob("trials/full/*")}
        process = place.start("train", str(place.run_dir), witnessed=True)
        _wait(process, place, began)
        process.send_signal(number)
        sent = time.monotonic()
        _, outcome.said[name] = process.communicate(timeout=workplace.TIMEOUT_SECONDS)
        outcome.codes[name], outcome.seconds[name] = process.returncode, time.monotonic() - sent
    for name, options in (("walltime", ("--walltime", f"{walltime_seconds:g}")), ("rest", ())):
        started = time.monotonic()
        done = place.wattier("train", str(place.run_dir), *options, witnessed=True)
        outcome.codes[name], outcome.said[name] = done.returncode, done.stdout + done.stderr
        outcome.seconds[name] = time.monotonic() - started
    return outcome


def _wait(process: Any, place: Workplace, began: dict[Path, int]) -> None:
    """Until two members, or as many as there are, have each gone on for two epochs more."""
    deadline = time.monotonic() + workplace.TIMEOUT_SECONDS
    while True:
        now = {path: epochs_of(path) for path in place.run_dir.glob("trials/full/*")}
        if sum(n >= began.get(path, 0) + 2 for path, n in now.items()) >= 2:
            return
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def epochs_of(folder: Path) -> int:
    path = folder / "epochs.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def differences(straight: RunDir, disturbed: RunDir) -> list[str]:
    """In what the members of two runs differ: losses, why they ended, and every bit of their best weights."""
    found = []
    one, other = ({row.trial_id: row for row in run.trials(FULL_STAGE)} for run in (straight, disturbed))
    if one.keys() != other.keys():
        return [f"members {sorted(one)} and {sorted(other)}"]
    for name, row in one.items():
        for key in ("status", "val_loss", "val_by_source", "epochs_done", "structures_seen", "ended"):
            if (a := getattr(row, key)) != (b := getattr(other[name], key)):
                found.append(f"{name}: {key} is {a} and {b}")
        weights = [
            torch.load(run.path / str(row.checkpoint), weights_only=True)["model"] for run in (straight, disturbed)
        ]
        found += [f"{name}: {k}" for k, tensor in weights[0].items() if not torch.equal(tensor, weights[1][k])]
    return found


def billed_over_true(place: Workplace, fraction: float) -> float:
    """Joules of full training over those that the witness saw; fraction: of the node, which each rank owns."""
    phases = {phase.phase: phase.joules for phase in ledger_info(RunDir.open(place.run_dir)).phases}
    return (phases[FULL_PHASE] or 0.0) / (WATTS * fraction * observed_seconds(place.witness_folder))


def main() -> None:
    import os

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--walltime", type=float, default=40.0, help="of the third command, s")
    parser.add_argument("--epochs", type=int, help="fewer than the run's, to take less time")
    options = parser.parse_args()
    workplace.TIMEOUT_SECONDS = 3600
    with tempfile.TemporaryDirectory(prefix="members-") as name:
        changes: dict[str, Any] = {}
        if options.epochs is not None:
            changes["full_training"] = {
                **RunDir(options.run).config().full_training.model_dump(),
                "epochs": options.epochs,
            }
        straight, disturbed = (
            undone(options.run.absolute(), Path(name) / part, **changes) for part in ("straight", "disturbed")
        )
        done = straight.wattier("train", str(straight.run_dir), witnessed=True)
        print(f"in peace: exit code {done.returncode}", flush=True)
        outcome = disturb(disturbed, options.walltime)
        for part, code in outcome.codes.items():
            print(f"{part}: exit code {code}, {outcome.seconds[part]:.1f} s")
        found = differences(RunDir.open(straight.run_dir), RunDir.open(disturbed.run_dir))
        print("\n".join(found) or "members: the same bits")
        for row in RunDir.open(disturbed.run_dir).trials(FULL_STAGE):
            print(f"{row.trial_id}: {row.epochs_done} epochs, {row.ended}, {row.attempts} attempts")
        for part in (straight, disturbed):
            print(f"{part.folder.name}: ledger over witness {billed_over_true(part, 1 / (os.cpu_count() or 1)):.4f}")
        sys.exit(bool(found) or outcome.codes["SIGTERM"] != EXIT_NOT_FINISHED)


if __name__ == "__main__":
    main()
