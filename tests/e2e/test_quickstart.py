"""The main job: the whole funnel on the sample corpus, as `make quickstart` runs it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from ase.build import bulk, molecule
from scipy.stats import betabinom
from workplace import REPOSITORY, Workplace, ray_processes

from wattier.ledger import ledger_info
from wattier.rundir import RunDir
from wattier_gnn.calculator import WattierCalculator
from wattier_gnn.splits import TEST, VAL
from wattier_gnn.store import Store
from wattier_gnn.structure import DataError

GIB = 1024**3


@dataclass
class Quickstart:
    """A finished quickstart and what was seen while it ran."""

    place: Workplace
    output: str
    peak_bytes: int

    @property
    def run(self) -> RunDir:
        return RunDir.open(self.place.run_dir)

    @property
    def evaluation(self) -> dict:
        return json.loads(self.run.evaluation_path.read_text())


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quickstart]:
    folder = tmp_path_factory.mktemp("quickstart")
    config = yaml.safe_load((REPOSITORY / "configs" / "quickstart.yaml").read_text())
    place = Workplace(folder, config | {"run_dir": str(folder / "run")})
    place.write()
    process = place.start("run", "config.yaml")
    peak = PeakMemory(process.pid)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    yield Quickstart(place, out, peak.stop())


class PeakMemory:
    """The largest sum of proportional set sizes of a session's processes."""

    def __init__(self, session: int) -> None:
        self.session, self.peak, self.over = session, 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def stop(self) -> int:
        self.over.set()
        self.thread.join()
        return self.peak

    def _watch(self) -> None:
        while not self.over.wait(1.0):
            total = 0
            try:
                root = psutil.Process(self.session)
                tree = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in tree:
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            self.peak = max(self.peak, total)


@pytest.mark.timeout(900)
def test_it_prints_tiers_joules_and_the_report(quickstart: Quickstart) -> None:
    for text in ("Selected trials", "accurate", "balanced", "Energy by phase", "full training"):
        assert text in quickstart.output, text
    assert str(quickstart.run.report_path) in quickstart.output
    assert quickstart.run.report_path.stat().st_size > 1e6
    assert quickstart.peak_bytes <= 6 * GIB
    assert not ray_processes()


def test_planted_defects_are_found_and_counted(quickstart: Quickstart) -> None:
    report = json.loads((quickstart.run.store_path / "manifest.json").read_text())["cleaning"]
    assert len(report["bad_shards"]["oc20"]) == 1
    assert {source: reasons["force above threshold"] for source, reasons in report["removed"].items()} == {
        "ani1x": 2, "qm7x": 1, "oc20": 1, "oc22": 1, "mptrj": 1,
    }  # fmt: skip
    assert sum(reasons.get("nan label", 0) for reasons in report["removed"].values()) == 5


def test_every_trial_has_a_row_with_loss_joules_and_method(quickstart: Quickstart) -> None:
    config = quickstart.run.config()
    results = quickstart.run.trials()
    for stage in config.search.stages:
        assert len([r for r in results if r.fidelity.stage == stage.name]) == stage.trials
    assert all(r.energy_joules and r.energy_joules > 0 and r.energy.method for r in results)
    assert all(r.val_loss is not None for r in results if r.status == "complete")


def test_a_stage_trained_with_two_ranks(quickstart: Quickstart) -> None:
    two = [s.name for s in quickstart.run.config().search.stages if s.ranks == 2]
    assert two
    for result in quickstart.run.trials(two[0]):
        folder = quickstart.run.trial_folder(two[0], result.trial_id)
        assert sorted(p.name for p in folder.glob("*.energy.json")) == [
            "attempt1-rank0.energy.json", "attempt1-rank1.energy.json",
        ]  # fmt: skip


def test_stopped_trials_are_billed_and_never_selected(quickstart: Quickstart) -> None:
    pruned = {r.trial_id for r in quickstart.run.trials() if r.status == "pruned"}
    assert pruned, "successive halving stopped no trial of the first stage"
    selection = quickstart.run.selection()
    assert selection is not None
    assert not pruned & {*selection.picked, *selection.front, *selection.candidates}
    spent = {s.status: s.joules for s in ledger_info(quickstart.run).by_status}
    assert spent["pruned"] > 0


def test_it_learned_physics(quickstart: Quickstart) -> None:
    sources = quickstart.evaluation["sources"]
    assert len(sources) == 5
    for name, metrics in sources.items():
        assert metrics["energy_mae_ev"] <= 0.8 * metrics["reference_energy_mae_ev"], (name, metrics)
    assert sum(metrics["force_correlation"] > 0.5 for metrics in sources.values()) >= 3


def test_intervals_cover_what_they_promise(quickstart: Quickstart) -> None:
    """Of all test structures, and of each source that has 150 of them.

    The band is that of a split-conformal interval: validation, from which it is, is a sample as much as test. The 99 %
    binomial band in `evaluation.json`, of an interval known without error, would be missed by one sound run in twenty.
    """
    store, intervals = Store(quickstart.run.store_path), quickstart.evaluation["intervals"]
    energy, forces = intervals["energy"], intervals["forces"]["pooled"]
    assert intervals["target"] == 0.9
    validation = np.bincount(store.source_index[store.indices(VAL)])
    counts = {"all": validation.sum(), **dict(zip(store.sources, validation, strict=True))}
    rows = {"all": energy["pooled"]} | {name: row for name, row in energy["by_source"].items() if row["n"] >= 150}
    for name, row in rows.items():
        rank = math.ceil((counts[name] + 1) * 0.9)
        low, high = betabinom.ppf([0.005, 0.995], row["n"], rank, counts[name] + 1 - rank) / row["n"]
        assert low <= row["observed"] <= high, (name, row)
        within = "within" if row["band_low"] <= row["observed"] <= row["band_high"] else "outside"
        print(f"{name}: {row['observed']:.3f} of {row['n']} covered, {within} the 99 % binomial band")
    assert energy["pooled"]["n"] == len(store.indices(TEST))
    assert forces["band_low"] <= forces["observed"] <= forces["band_high"], forces


def test_phases_are_billed_with_their_method(quickstart: Quickstart) -> None:
    ledger = ledger_info(quickstart.run)
    assert [p.phase for p in ledger.phases] == [
        "data",
        "start-up",
        "search:scout",
        "search:final",
        "full training",
        "evaluation",
    ]
    assert all(p.joules and p.method for p in ledger.phases)
    assert ledger.total.joules == pytest.approx(sum(p.joules for p in ledger.phases))


def test_full_training_costs_about_what_was_projected(quickstart: Quickstart) -> None:
    """Within a factor of two, had nobody stopped early: two ranks of the last stage cost twice as much a structure."""
    selection = quickstart.run.selection()
    assert selection is not None
    trained = {result.trial_id: result for result in quickstart.run.trials("full")}
    for tier in selection.tiers:
        for pick in tier.picks:
            full = trained[pick.trial_id]
            whole = full.energy_joules * full.fidelity.epochs / full.epochs_done
            print(f"{pick.trial_id}: {pick.projected_joules:.0f} J projected, {whole:.0f} J a whole training")
            assert 0.5 < pick.projected_joules / whole < 2


def test_again_it_does_nothing(quickstart: Quickstart) -> None:
    before = quickstart.place.snapshot()
    started = time.monotonic()
    again = quickstart.place.wattier("run", "config.yaml")
    print(f"second run: {time.monotonic() - started:.1f} s")
    assert again.returncode == 0, again.stderr
    assert quickstart.place.snapshot() == before


def test_status_and_steps_are_idempotent(quickstart: Quickstart) -> None:
    before = quickstart.place.snapshot()
    for verb in ("status", "search", "select", "train", "evaluate"):
        done = quickstart.place.wattier(verb, str(quickstart.run.path))
        assert done.returncode == 0, (verb, done.stderr)
        assert quickstart.place.snapshot() == before, verb


def test_release_loads_in_ase_and_agrees_with_the_members(quickstart: Quickstart) -> None:
    atoms = molecule("CH3OH")
    atoms.calc = WattierCalculator(quickstart.run.release_path, source="ani1x")
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    assert atoms.calc.results["energies_comm"].mean() == pytest.approx(energy)
    assert forces.shape == (6, 3)
    assert atoms.calc.results["energy_std"] > 0
    # Methanol at wB97X/6-31G*: -115.678 hartree; a total energy, so the reference is added back.
    assert energy == pytest.approx(-115.678 * 27.2114, abs=10)
    crystal = bulk("NaCl", "rocksalt", a=5.64) * (2, 1, 1)
    crystal.calc = WattierCalculator(quickstart.run.release_path, source="mptrj")
    per_cell = bulk("NaCl", "rocksalt", a=5.64)
    per_cell.calc = crystal.calc
    assert crystal.get_potential_energy() == pytest.approx(2 * per_cell.get_potential_energy(), rel=1e-4)


def test_release_example_runs(quickstart: Quickstart) -> None:
    done = subprocess.run(
        [sys.executable, str(quickstart.run.release_path / "example.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "eV" in done.stdout


def test_changed_release_is_refused(quickstart: Quickstart, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "release"
    shutil.copytree(quickstart.run.release_path, copy)
    weights = next(copy.glob("*/model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(DataError, match="sha256"):
        WattierCalculator(copy, source="ani1x")
