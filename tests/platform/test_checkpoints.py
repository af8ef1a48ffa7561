"""Which checkpoints go when the members are trained: against a list written by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from wattier.checkpoints import remove_needless, removed_info
from wattier.config import RunConfig
from wattier.records import Fidelity, Pick, Selection, Tier, TrialResult
from wattier.rundir import RunDir, append_json_line, write_json
from wattier_telemetry import EnergyReport

TRIALS = [
    ("wide", "wide-000", "complete"), ("wide", "wide-001", "pruned"),
    ("deep", "deep-000", "complete"), ("deep", "deep-001", "complete"), ("deep", "deep-002", "pruned"),
    ("full", "deep-000", "complete"), ("full", "deep-001", "complete"), ("full", "deep-002", "failed"),
]  # fmt: skip
BYTES = 1000


def make(tmp_path, picked=("deep-000",), **full):
    stages = [{"name": name, "trials": 3, "epochs": 1} for name in ("wide", "deep")]
    config = RunConfig.model_validate(
        {
            "name": "r",
            "run_dir": str(tmp_path / "run"),
            "data": {"sources": {"qm7x": "sample"}},
            "search": {"space": {"learning_rate": {"low": 1e-3, "high": 1e-2}}, "stages": stages},
            "full_training": full,
        }
    )
    run = RunDir.create(config)
    for stage, trial_id, status in TRIALS:
        folder = run.trial_folder(stage, trial_id)
        folder.mkdir(parents=True)
        for name in ("last.pt", "best.pt", "epochs.jsonl", "result.json", "attempt1-rank0.energy.json"):
            (folder / name).write_bytes(b"x" * BYTES)
        row = TrialResult(
            "r", trial_id, {}, Fidelity(stage, None, 1, 1), status, 1.0, {}, 1, 1, 1.0, EnergyReport.empty()
        )
        append_json_line(run.trials_path, row.to_dict())
    open_trial = run.trial_folder("deep", "deep-003")  # of a stage that is not over: without a row
    open_trial.mkdir()
    (open_trial / "last.pt").touch()
    tier = Tier("accurate", "", tuple(Pick(name, "") for name in picked))
    write_json(run.selection_path, Selection("deep", (tier,), (), None, None, (), {}, None, None).to_dict())
    return run, config


def left(run):
    return sorted(path.relative_to(run.path / "trials").as_posix() for path in run.path.rglob("*.pt"))


ALWAYS = [
    "deep/deep-000/best.pt",  # the pick
    "deep/deep-003/last.pt",  # it is taken up again
    "full/deep-000/best.pt", "full/deep-000/last.pt",
    "full/deep-001/best.pt",  # no longer picked, but paid for: another selection may take it back
    "full/deep-002/best.pt", "full/deep-002/last.pt",  # it failed, and is tried again
]  # fmt: skip


def test_what_nobody_needs_goes_and_records_stay(tmp_path):
    run, config = make(tmp_path)
    others = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path.suffix != ".pt"}
    removed = remove_needless(run, config)
    assert left(run) == ALWAYS
    assert removed == removed_info(run) == (10, 10 * BYTES)
    assert all(path.read_bytes() == content for path, content in others.items())
    assert remove_needless(run, config) == (0, 0)
    assert removed_info(run) == (10, 10 * BYTES)


def test_what_another_selection_would_begin_from_stays(tmp_path):
    run, config = make(tmp_path, warm_start=True)
    remove_needless(run, config)
    assert left(run) == sorted([*ALWAYS, "deep/deep-001/best.pt", "deep/deep-002/best.pt"])  # who was stopped, by hand


def test_all_may_be_kept(tmp_path):
    run, config = make(tmp_path, keep_checkpoints="all")
    before = left(run)
    assert remove_needless(run, config) == (0, 0)
    assert left(run) == before


def test_a_removal_that_was_killed_goes_on_and_counts_each_file_once(tmp_path, monkeypatch):
    run, config = make(tmp_path)
    from pathlib import Path

    unlink, gone = Path.unlink, []

    def dies(path, missing_ok=False):
        if len(gone) == 4 and path.suffix == ".pt":
            raise KeyboardInterrupt
        gone.append(path)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", dies)
    with pytest.raises(KeyboardInterrupt):
        remove_needless(run, config)
    monkeypatch.setattr(Path, "unlink", unlink)
    assert removed_info(run).files == 4, "what is noted and still there is not counted"
    remove_needless(run, config)
    assert left(run) == ALWAYS
    assert removed_info(run) == (10, 10 * BYTES)


@pytest.mark.parametrize(
    ("picked", "rules", "kept"),
    [
        (("deep-000", "deep-001"), {}, True),
        (("deep-000",), {"accurate": 1}, False),
        (("deep-000", "deep-002"), {}, False),  # not all are trained
    ],
)
def test_a_trained_selection_of_an_earlier_version_costs_nothing_anew(tmp_path, monkeypatch, picked, rules, kept):
    from wattier import run as steps

    run, config = make(tmp_path, picked)
    write_json(run.selection_path, replace(run.selection(), rules=rules).to_dict())
    asked = []
    for name in ("search", "train", "evaluate"):
        monkeypatch.setattr(steps, name, lambda *_: None)
    monkeypatch.setattr(steps, "select", lambda *_: asked.append("select"))
    monkeypatch.setattr(steps, "_is_up_to_date", lambda _: True)
    steps.run_all(run, config, None, SimpleNamespace(say=asked.append))
    assert (asked == ["select"]) is not kept
    assert ("earlier version" in asked[0]) is kept
