"""A synthetic run: two search stages, full training, evaluation, with real energy journals of every kind of trial."""

import json
import math
import os
import random
from typing import NamedTuple

import pytest

from wattier.config import RunConfig
from wattier.config_ensemble import SelectSection
from wattier.records import EpochRecord, Fidelity, TrialResult
from wattier.rundir import FULL_STAGE, RunDir, append_json_line, write_json
from wattier.select import select_trials
from wattier_telemetry import EnergyMeter, EnergyReport, Share, bill
from wattier_telemetry.journal import Journal
from wattier_telemetry.sources.replay import ReplaySource

EPOCHS = {"wide": 2, "deep": 6, FULL_STAGE: 40}
START = 1_760_000_000.0


class Spec(NamedTuple):
    """What a synthetic trial is to look like."""

    trial_id: str
    stage: str = "deep"
    status: str = "complete"
    val_loss: float | None = 0.1
    joules: float | None = 1000.0
    epochs_done: int | None = None
    method: str = "counter"
    params: dict | None = None
    diverged: bool = False
    error: str | None = None


def share(joules, start=START, *, seconds=60.0, method="counter", domain="gpu"):
    """One share of one device."""
    return Share(f"{domain}-0", domain, start, start + seconds, 1.0, joules, method, 1.0 if joules is not None else 0.0)


def make_trial(spec, start=START, run="demo"):
    """A TrialResult in memory, as the driver would record it."""
    epochs = EPOCHS.get(spec.stage, 6)
    return TrialResult(
        run=run,
        trial_id=spec.trial_id,
        params=spec.params or {"learning_rate": 1e-3, "hidden_dim": 64},
        fidelity=Fidelity(spec.stage, None, epochs, 1),
        status=spec.status,
        val_loss=spec.val_loss,
        val_by_source={},
        epochs_done=epochs if spec.epochs_done is None else spec.epochs_done,
        structures_seen=1000,
        wall_seconds=60.0,
        energy=EnergyReport.of([share(spec.joules, start, method=spec.method)]),
        n_parameters=12_345,
        error=spec.error,
        diverged=spec.diverged,
    )


@pytest.fixture
def trial():
    """Make one trial: ``trial("a", val_loss=0.1, joules=5.0)``."""
    return lambda trial_id, **fields: make_trial(Spec(trial_id, **fields))


def run_config(path, name="demo"):
    """A config whose stages fit the synthetic trials."""
    return RunConfig.model_validate(
        {
            "name": name,
            "run_dir": str(path),
            "data": {"sources": {"ani1x": "sample", "oc20": "sample"}},
            "search": {
                "space": {
                    "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
                    "hidden_dim": {"choices": [32, 64, 128]},
                },
                "stages": [{"name": n, "trials": 12, "epochs": EPOCHS[n]} for n in ("wide", "deep")],
            },
            "select": {"accurate": 1, "balanced": 2},
        }
    )


def write_trial(run, spec, number, *, final=True):
    """What a trial leaves in its folder, and the driver in ``trials.jsonl``."""
    start = START + 100.0 * number
    folder = run.trial_folder(spec.stage, spec.trial_id)
    result = make_trial(spec, start)
    journal = Journal(folder / "rank0.energy.json")
    journal.write(result.energy)
    if final:
        journal.finish(result.energy)
        append_json_line(run.trials_path, result.to_dict())
    lines = []
    for epoch in range(1, result.epochs_done + 1):
        decay = math.exp(-2.5 * epoch / result.fidelity.epochs)
        loss = None if spec.val_loss is None else spec.val_loss * (1 + 1.5 * (decay - math.exp(-2.5)))
        joules = None if spec.joules is None else spec.joules * epoch / result.epochs_done
        record = EpochRecord(epoch, loss, loss, {}, 100 * epoch, 1.0, 1e-3, joules, start + epoch)
        lines.append(json.dumps(record.to_dict()) + "\n")
    (folder / "epochs.jsonl").write_text("".join(lines))
    return result


def search_specs():
    """Trials of both search stages: a trade-off curve with noise, and each way a trial can end."""
    noise = random.Random(3)
    specs = []
    for i in range(14):
        joules = 2_000.0 * 1.32**i
        loss = 0.04 + 40 / joules + 0.03 * noise.random()
        params = {"learning_rate": 10 ** noise.uniform(-4, -2), "hidden_dim": noise.choice([32, 64, 128])}
        pruned = i % 3 == 2
        done, spent = (1, 0.5) if pruned else (2, 1.0)
        status = "pruned" if pruned else "complete"
        specs.append(Spec(f"wide-{i:02d}", "wide", status, loss * 1.5, joules * spent / 4, done, params=params))
        if i >= 4:
            done, spent = (2, 0.3) if pruned else (6, 1.0)
            specs.append(Spec(f"deep-{i:02d}", "deep", status, loss, joules * spent, done, params=params))
    specs.append(Spec("deep-20", status="pruned", val_loss=None, joules=900.0, epochs_done=3, diverged=True))
    specs.append(Spec("deep-21", status="failed", val_loss=None, joules=300.0, epochs_done=1, error="out of memory"))
    return specs


def evaluation(sources=("ani1x", "oc20")):
    """An ``evaluation.json`` with one null in it."""
    noise = random.Random(5)
    metrics, parity = {}, {}
    for index, source in enumerate(sources):
        true = [noise.gauss(0, 0.3) for _ in range(80)]
        forces = [noise.gauss(0, 2) for _ in range(300)]
        metrics[source] = {
            "n_structures": 80,
            "n_train": 1640,
            "energy_mae_ev": 0.42,
            "energy_mae_ev_per_atom": 0.021,
            "energy_rmse_ev": 0.61,
            "force_mae_ev_per_angstrom": 0.11 if index == 0 else None,
            "force_rmse_ev_per_angstrom": 0.2,
            "force_correlation": 0.98,
            "reference_energy_mae_ev": 2.1,
            "energy_mae_ratio": 0.2,
            "spearman_error_spread": 0.55,
        }
        parity[source] = {
            "energy_true_ev_per_atom": true,
            "energy_predicted_ev_per_atom": [x + noise.gauss(0, 0.03) for x in true],
            "energy_std_ev_per_atom": [abs(noise.gauss(0.03, 0.01)) for _ in true],
            "force_true_ev_per_angstrom": forces,
            "force_predicted_ev_per_angstrom": [x + noise.gauss(0, 0.2) for x in forces],
        }
    levels = [i / 20 for i in range(21)]
    part = {"scale": 1.7, "expected": levels, "observed": [x**1.2 for x in levels], "miscalibration_area": 0.043}
    part |= {"coverage_68": 0.64, "coverage_95": 0.93}
    members = [
        {"trial_id": t, "val_loss": 0.03, "epochs_done": 40, "n_parameters": 12345, "energy_joules": None}
        for t in ("deep-10", "deep-07")
    ]
    return {"members": members, "sources": metrics, "calibration": {"energy": part, "forces": part}, "parity": parity}


def write_cleaning(run):
    """The counts that ``CleaningReport.to_dict`` leaves beside the store."""
    report = {
        "read": {"ani1x": 2100, "oc20": 2000},
        "kept": {"ani1x": 2050, "oc20": 1990},
        "removed": {"ani1x": {"force above threshold": 50}, "oc20": {"nan label": 10}},
        "bad_shards": {"oc20": ["part-7.extxyz: ends in the middle of structure 12"]},
    }
    run.store_path.mkdir(parents=True)
    write_json(run.store_path / "manifest.json", {"cleaning": report})


def measure_phase(run, phase, tmp_path):
    """A driver's own journal, by the real meter: 50 W for two seconds of a clock of our own."""
    trace = tmp_path / "trace.csv"
    trace.write_text("time_seconds,device,power_watts\n0,GPU-driver,50\n")
    now = [START - 100.0]

    def tick():
        return now[0]

    source = ReplaySource(trace, clock=tick)
    path = run.phase_folder(phase) / "driver.energy.json"
    with EnergyMeter(source, journal=path, interval_seconds=30, clock=tick, monotonic=tick):
        for _ in range(20):
            now[0] += 0.1


@pytest.fixture
def empty_run(tmp_path, monkeypatch):
    """A run of which only the config is there; it need not survive a power cut, so nothing waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return RunDir.create(run_config(tmp_path / "run"))


@pytest.fixture
def searched_run(empty_run, tmp_path):
    """A run whose search is done, with one trial that was killed and left no record."""
    measure_phase(empty_run, "data", tmp_path)
    write_cleaning(empty_run)
    for number, spec in enumerate(search_specs()):
        write_trial(empty_run, spec, number)
    write_trial(empty_run, Spec("deep-99", epochs_done=2, joules=700.0), 90, final=False)
    return empty_run


@pytest.fixture
def whole_run(searched_run):
    """A run that went all the way."""
    run = searched_run
    selection = select_trials(run.trials(), SelectSection(), stage="deep", project=lambda t: 7.0 * t.energy_joules)
    write_json(run.selection_path, selection.to_dict())
    for number, trial_id in enumerate(selection.picked, start=100):
        row = next(t for t in run.trials("deep") if t.trial_id == trial_id)
        write_trial(run, Spec(trial_id, FULL_STAGE, val_loss=row.val_loss / 2, joules=6.5 * row.energy_joules), number)
    estimate = EnergyReport.of(
        [share(2500.0, START + 90_000, method="estimated", domain="cpu")], ["no counter: estimated"]
    )
    Journal(run.phase_folder("evaluation") / "driver.energy.json").finish(estimate)
    run.evaluation_path.write_text(json.dumps(evaluation()))
    return run


@pytest.fixture
def billed():
    """Joules in one folder, read by the telemetry itself."""
    return lambda folder: bill(folder).joules
