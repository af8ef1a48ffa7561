"""What a run will cost before it starts."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import yaml

from wattier.config import RunConfig, load_config
from wattier.costs import costs_of, joules_to_convergence
from wattier.plan import plan_info, store_for_plan
from wattier.prepare import prepare_data
from wattier.records import Fidelity, TrialResult
from wattier.run import _projection
from wattier.rundir import RunDir
from wattier.trial import settings_of
from wattier_gnn.model import ModelConfig, build_model
from wattier_gnn.sample import SAMPLE_SOURCES
from wattier_gnn.splits import TRAIN
from wattier_telemetry import EnergyReport, Share

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The quickstart's config with a run directory of its own."""
    folder = tmp_path_factory.mktemp("plan")
    values = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    values["run_dir"] = str(folder / "run")
    values["search"]["budget"] = {"kilowatt_hours": 0.001}
    values["full_training"]["budget"] = {"joules": 5000.0}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def plan(quickstart):
    config = load_config(quickstart)
    run = RunDir(Path(config.run_dir))
    return config, plan_info(run, config, costs_of(run, config, None), None)


def test_every_phase_is_there_with_its_trials(plan):
    _, info = plan
    counts = {phase.phase: phase.trials for phase in info.phases}
    assert counts == {"search:scout": 10, "search:final": 5, "full training": 3}
    assert info.total.trials == 18
    assert info.search_joules == pytest.approx(3600)
    assert info.full_joules == 5000
    assert "no trial yet" in info.basis


def test_more_work_costs_more_and_totals_add_up(plan):
    _, info = plan
    joules = {phase.phase: phase.joules / phase.trials for phase in info.phases}
    assert 0 < joules["search:scout"] < joules["search:final"] < joules["full training"]
    for name in ("joules", "joules_low", "joules_high", "device_hours", "disk_bytes"):
        parts = [getattr(phase, name) for phase in info.phases]
        assert getattr(info.total, name) == pytest.approx(sum(parts))
    for phase in info.phases:
        assert phase.joules_low < phase.joules < phase.joules_high


def test_disk_is_that_of_real_checkpoints(plan):
    config, info = plan
    section = settings_of(config, {"hidden_dim": 52})[0]  # the middle of 24 to 80
    sizes = ModelConfig(tuple(SAMPLE_SOURCES), (1.0,) * 5, 20.0, **section.model_dump(exclude={"cutoff_angstrom"}))
    parameters = sum(p.numel() for p in build_model(sizes, 0).parameters())
    each = 5 * 4 * parameters  # best: weights; last: weights, average, two moments; float32
    assert info.phases[0].disk_bytes / 10 == pytest.approx(each, rel=0.25)


def test_a_dry_run_prints_it_and_leaves_nothing(quickstart):
    done = subprocess.run([sys.executable, "-m", "wattier", "run", "--dry-run", quickstart], capture_output=True,
                          text=True, check=False, timeout=120, env=os.environ | {"COLUMNS": "200"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in ("search:scout", "full training", "device-hours", "disk", "search.budget: at most 3.60 MJ"[:23]):
        assert text in done.stdout
    assert not (quickstart.parent / "run").exists()


class TestJoulesToConvergence:
    """Trials of a made-up price: 1 J to begin, 50 to 100 mJ a structure by width, twice that on two ranks."""

    @pytest.fixture(scope="class")
    @classmethod
    def prepared(cls, tmp_path_factory):
        values = {
            "name": "price", "run_dir": str(tmp_path_factory.mktemp("price") / "run"), "launcher": "inline",
            "data": {"sources": {"qm7x": "sample"}, "cutoff_angstrom": 3.0},
            "search": {"space": {"hidden_dim": {"low": 16, "high": 64}}, "stages": [
                {"name": "wide", "trials": 8, "structures": 100, "epochs": 3},
                {"name": "deep", "trials": 4, "structures": 200, "epochs": 3, "ranks": 2},
            ]},
            "full_training": {"epochs": 40, "ranks": 1},
        }  # fmt: skip
        config = RunConfig.model_validate(values)
        run = RunDir.create(config)
        return run, config, prepare_data(run, config, mock.Mock())

    @staticmethod
    def price(seen, width, ranks):
        return 1.0 + 0.05 * seen * (1 + (width - 16) / 48) * ranks

    def told(self, prepared, rows, monkeypatch):
        run, config, store = prepared
        results = []
        for stage, trial_id, width, structures, epochs, ranks, done in rows:
            joules = self.price(structures * done, width, ranks)
            share = Share("node", "node", 0.0, 60.0, 1.0, joules, "counter", 1.0)
            results.append(TrialResult(
                "price", trial_id, {"hidden_dim": width}, Fidelity(stage, structures, epochs, ranks), "complete", 0.1,
                {}, done, structures * done, 60.0, EnergyReport.of([share]), 1000,
            ))  # fmt: skip
        monkeypatch.setattr(RunDir, "trials", lambda _, _stage=None: results)
        return joules_to_convergence(run, config, store, "deep")

    ROWS = tuple(
        [("wide", f"wide-{i}", 16 + 6 * i, 100, 3, 1, 1 + i % 3) for i in range(8)]  # some are stopped early
        + [("deep", f"deep-{i}", 16 + 12 * i, 200, 3, 2, 3) for i in range(4)]
    )

    def test_ranks_and_length_of_full_training_count_and_not_those_of_the_search(self, prepared, monkeypatch):
        told = self.told(prepared, self.ROWS, monkeypatch)
        assert set(told) == {f"deep-{i}" for i in range(4)}
        n = len(prepared[2].indices(TRAIN))
        for _, trial_id, width, *_ in self.ROWS[8:]:  # a joule a structure as on two ranks would be 2 times too much
            assert told[trial_id] == pytest.approx(self.price(40 * n, width, 1), rel=0.4)

    def test_figures_are_the_same_in_any_order_and_when_full_training_is_over(self, prepared, monkeypatch):
        told = self.told(prepared, self.ROWS, monkeypatch)
        more = [("full", "deep-0", 16, 400, 40, 1, 40)]
        assert self.told(prepared, [*self.ROWS[::-1], *more], monkeypatch) == told

    def test_a_selection_tells_what_is_known_and_what_the_search_minimized(self, prepared, monkeypatch):
        run, config, store = prepared
        told = self.told(prepared, self.ROWS, monkeypatch)
        trial = run.trials()[-1]
        project = _projection(run, config, store, lambda _, joules_per_structure: 7e6 * joules_per_structure)
        assert project(trial) == told[trial.trial_id]
        assert project(replace(trial, energy=EnergyReport.empty())) is None
        search = config.search.model_copy(update={"objectives": ["val_loss", "projected_joules"]})
        other = config.model_copy(update={"search": search})
        project = _projection(run, other, store, lambda _, joules_per_structure: 7e6 * joules_per_structure)
        assert project(trial) == pytest.approx(7e6 * trial.energy_joules / trial.structures_seen)

    def test_of_no_trial_nothing_is_told(self, prepared, monkeypatch):
        assert self.told(prepared, [], monkeypatch) == {}


def test_what_is_done_is_not_planned_again(quickstart, monkeypatch):
    config = load_config(quickstart)
    run = RunDir(Path(config.run_dir))
    costs = costs_of(run, config, None)
    monkeypatch.setattr(RunDir, "trials", lambda _, stage=None: [None] * 10 if stage == "scout" else [])
    info = plan_info(run, config, costs, None)
    assert [phase.trials for phase in info.phases] == [0, 5, 3]
    assert info.phases[0].joules == 0


def test_the_published_campaign_has_a_price_too():
    config = load_config(ROOT / "configs" / "paper.yaml")
    run = RunDir(Path("/nowhere"))
    info = plan_info(run, config, costs_of(run, config, store_for_plan(run, config)), None)
    small, final = info.phases[:2]
    assert small.joules > 1e6  # a million structures on 16 ranks, 64 times
    assert final.joules is None  # all structures there are: nobody knows how many
    assert "not prepared" in info.basis
