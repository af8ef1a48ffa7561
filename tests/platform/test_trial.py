"""Real trials through the inline launcher on the sample: what is compared, what is billed, what is tried again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from wattier import run as steps
from wattier.config import RunConfig
from wattier.config_ensemble import EnsembleSection
from wattier.ledger import ledger_info
from wattier.records import EpochRecord, TrialResult
from wattier.rundir import FULL_STAGE, RunDir
from wattier_gnn import checkpoint
from wattier_gnn.store import Store


class Quiet:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def phase(self, name: str) -> None:
        self.lines.append(name)

    def say(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, done: object) -> None:
        pass

    def trial(self, result: TrialResult, done: int, total: int) -> None:
        self.lines.append(f"{result.trial_id} {result.status}")


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WATTIER_REGISTRY", str(tmp_path / "registry"))

    def build(space: dict, ranks: int = 1, trials: int = 2, **select: Any) -> tuple[RunDir, RunConfig]:
        text = yaml.safe_dump({
            "name": "trial", "run_dir": str(tmp_path / "run"), "launcher": "inline",
            "data": {"sources": {"qm7x": "sample"}, "cutoff_angstrom": 3.0},
            "model": {"hidden_dim": 8, "n_layers": 1, "n_radial": 4, "head_dim": 8, "forces": "vector"},
            "search": {"space": space, "stages": [
                {"name": "s", "trials": trials, "structures": 64, "epochs": 1, "ranks": ranks, "reduction_factor": None}
            ]},
            "select": {"accurate": 1, "balanced": 0} | select,
            "full_training": {"epochs": 1}, "telemetry": {"source": "estimated"},
        })  # fmt: skip
        config = RunConfig.model_validate(yaml.safe_load(text))
        return RunDir.create(config), config

    return build


def test_losses_of_trials_with_other_weights_are_comparable(make) -> None:
    run, config = make({"force_weight": {"choices": [1e-6, 1e-6 * 1.01]}, "energy_weight": {"choices": [1e-6]}})
    with steps.launcher_for(config) as launcher:
        steps.search(run, config, launcher, Quiet())
    for result in run.trials():
        per_source = result.val_by_source["qm7x"]
        scale = json.loads((run.store_path / "manifest.json").read_text())["energy_scale_ev"][0]
        expected = (per_source["energy_mae_ev_per_atom"] + per_source["force_mae_ev_per_angstrom"]) / scale
        assert result.val_loss == pytest.approx(expected), "the config's weights, 1 and 1, not the trial's"


def test_a_checkpoint_holds_the_joules_so_far_and_an_epoch_its_wait_for_data(make) -> None:
    run, config = make({"hidden_dim": {"choices": [8]}}, trials=1)
    with steps.launcher_for(config) as launcher:
        steps.search(run, config, launcher, Quiet())
    (result,) = run.trials()
    saved = checkpoint.load(run.trial_folder("s", result.trial_id) / "last.pt")
    assert saved["state"]["extra"]["energy_joules"] > 0
    (epoch,) = run.epochs("s", result.trial_id)
    assert 0 < epoch.data_wait_seconds < epoch.seconds
    line = epoch.to_dict()
    del line["data_wait_seconds"]
    assert EpochRecord.from_dict(line).data_wait_seconds is None, "as an earlier version wrote it: not known"


def test_ranks_that_rank_zero_counts_as_children_are_billed_once(make) -> None:
    run, config = make({"hidden_dim": {"choices": [8]}}, ranks=2, trials=1)
    with steps.launcher_for(config) as launcher:
        steps.search(run, config, launcher, Quiet())
    (result,) = run.trials()
    assert result.status == "complete", result.error
    assert len(result.energy.shares) == 1
    assert len(list(run.trial_folder("s", result.trial_id).glob("*.energy.json"))) == 2


def test_a_failed_member_is_tried_again_and_the_run_says_so(make) -> None:
    run, config = make({"hidden_dim": {"choices": [8, 16]}}, accurate=1, balanced=1)
    with steps.launcher_for(config) as launcher:
        steps.search(run, config, launcher, Quiet())
        selection = steps.select(run, config, Quiet())
        broken = run.trial_folder(FULL_STAGE, selection.picked[0]) / "last.pt"
        broken.parent.mkdir(parents=True)
        broken.write_bytes(b"not a checkpoint")
        listener = Quiet()
        members = steps.train(run, config, launcher, listener)
        assert len(members) == len(selection.picked) - 1
        assert any("failed to train" in line for line in listener.lines)

        broken.unlink()
        members = steps.train(run, config, launcher, Quiet())
        assert [m.trial_id for m in members] == list(selection.picked)
        assert members[0].attempts == 3, "one retry of the first command, one of the second"
        assert steps.run_all(run, config, launcher, Quiet())
        assert not steps.run_all(run, config, launcher, Quiet()), "nothing is left to do"
        manifest = run.release_path / "manifest.json"
        next(run.release_path.glob("*/model.safetensors")).unlink()
        assert steps.run_all(run, config, launcher, Quiet()), "a release that lost a file is made anew"
        assert manifest.exists()


def test_one_member_is_released_without_uncertainty(make) -> None:
    run, config = make({"hidden_dim": {"choices": [8]}}, trials=1)
    with steps.launcher_for(config) as launcher:
        assert steps.run_all(run, config, launcher, Quiet())
    evaluation = run.evaluation()
    assert evaluation is not None
    assert evaluation["calibration"]["energy"]["coverage_68"] is None
    assert evaluation["intervals"]["energy"]["pooled"]["observed"] > 0.5, "but intervals, of one width an atom"
    assert "no uncertainty" in (run.release_path / "README.md").read_text()
    from ase.build import molecule

    from wattier_gnn.calculator import WattierCalculator

    atoms = molecule("CH4")
    atoms.calc = WattierCalculator(run.release_path, source="qm7x")
    assert atoms.get_forces().shape == (5, 3)
    assert "energy_std" not in atoms.calc.results
    from wattier_gnn.structure import Structure

    shifted = Structure(
        atoms.numbers, atoms.positions * 3.0, None, (False, False, False), float("nan"), None, "qm7x", "g", "k"
    )
    answer = atoms.calc.ensemble.predict([shifted], "qm7x")
    assert answer.coverage == 0.9
    assert answer.energy_interval_ev[0] > 0
    assert (answer.forces_interval_ev_per_angstrom > 0).all()
    assert "farther" in answer.out_of_distribution[0]


def test_other_weights_are_found_without_training_again(make) -> None:
    run, config = make({"hidden_dim": {"choices": [8, 16]}}, accurate=2, balanced=0, accurate_rule="lowest")
    with steps.launcher_for(config) as launcher:
        assert steps.run_all(run, config, launcher, Quiet())
        before = run.evaluation()
        assert before["weights"]["by_member"] == dict.fromkeys(run.selection().picked, 0.5)
        fitted = config.model_copy(update={"ensemble": EnsembleSection(weights="fitted", coverage=0.8)})
        again, listener = RunDir.create(fitted), Quiet()
        assert steps.run_all(again, fitted, launcher, listener)
        assert not any(line.endswith("complete") for line in listener.lines), "no trial ran again"
        assert not steps.run_all(again, fitted, launcher, Quiet())
    evaluation = again.evaluation()
    assert evaluation["settings"] == {"weights": "fitted", "coverage": 0.8}
    assert sum(evaluation["weights"]["by_member"].values()) == pytest.approx(1)
    errors = [evaluation["weights"][f"validation_error_{kind}"] for kind in ("fitted", "equal")]
    assert errors[0] <= errors[1]
    from wattier.evaluate import released_ensemble
    from wattier_gnn.release import load_release

    old = {name: part for name, part in before.items() if name != "uncertainty"}
    store, members = Store(run.store_path), run.trials(FULL_STAGE)
    kept = released_ensemble(run, members, store, old, torch.device("cpu"))
    assert kept.calibration.energy.std_scale == (before["calibration"]["energy"]["scale"],)
    assert kept.calibration.coverage is None, "an earlier version knew no intervals"

    released = load_release(run.release_path)
    assert list(released.weights) == list(evaluation["weights"]["by_member"].values())
    assert released.calibration.coverage == 0.8


def test_members_of_other_cutoffs_are_one_ensemble(make) -> None:
    """Searched, trained, evaluated, released and asked: each member looks as far as it did in training."""
    run, config = make({"cutoff_angstrom": {"choices": [1.8, 3.0]}}, trials=6, accurate=3, balanced=3)
    with steps.launcher_for(config) as launcher:
        assert steps.run_all(run, config, launcher, Quiet())
    from ase import Atoms

    from wattier_gnn.calculator import WattierCalculator

    atoms = Atoms("CHO", [(0, 0, 0), (0, 0, 1.1), (0, 2.5, 0)])  # the oxygen is 2.5 A from C, 2.73 A from H
    atoms.calc = WattierCalculator(run.release_path, source="qm7x")
    cutoffs = [member.config.cutoff_angstrom for member in atoms.calc.ensemble.members]
    assert set(cutoffs) == {1.8, 3.0}
    params = {t.trial_id: t.params for t in run.trials(FULL_STAGE)}
    assert cutoffs == [params[m["trial_id"]]["cutoff_angstrom"] for m in run.evaluation()["members"]]
    near = {member.config.cutoff_angstrom: member.config.mean_neighbors for member in atoms.calc.ensemble.members}
    assert 0 < near[1.8] < 0.6 * near[3.0]
    assert near[3.0] == json.loads((run.store_path / "manifest.json").read_text())["mean_neighbors"]
    atoms.get_forces()
    on_oxygen = [bool(forces[2].any()) for forces in atoms.calc.results["forces_comm"]]
    assert on_oxygen == [cutoff == 3.0 for cutoff in cutoffs]


def test_the_first_step_of_a_process_is_a_phase_of_its_own(make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wattier.trial._WARM", set())
    run, config = make({"hidden_dim": {"choices": [8]}})
    with steps.launcher_for(config) as launcher:
        steps.search(run, config, launcher, Quiet())
    assert [p.phase for p in ledger_info(run).phases] == ["data", "start-up", "search:s"]
    assert len(list(run.phase_folder("start-up").glob("*.energy.json"))) == 1
