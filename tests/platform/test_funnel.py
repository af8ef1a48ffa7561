"""The funnel: who is promoted, what a stage knows of those before it, and who is never on a front."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wattier.config import RunConfig
from wattier.config_ensemble import SelectSection
from wattier.errors import UserError
from wattier.funnel import budget_shares, on_front, promoted_trials, what_was_before
from wattier.objectives import Objectives
from wattier.records import Fidelity, TrialResult
from wattier.rundir import RunDir, append_json_line
from wattier.select import select_trials
from wattier_telemetry import EnergyReport, Share

SPACE = {"width": {"low": 1, "high": 64}, "rate": {"low": 1e-3, "high": 1.0, "log": True}}
TWO = Objectives(("val_loss", "energy_joules"))


def config_of(path, stages, **search):
    search = {"sampler": "random", "space": SPACE, "stages": stages, **search}
    return RunConfig.model_validate({"name": "demo", "run_dir": str(path), "trial": "mine:train", "search": search})


def result(number, *, stage="final", status="complete", loss=0.5, joules=10.0, epochs=4, epochs_done=None, width=8,
           limit_ratios=None, structures=None, diverged=False):  # fmt: skip
    trial_id = f"{stage}-{number:03d}"
    shares = [] if joules is None else [Share(f"d{trial_id}", "gpu", 0.0, 1.0, 1.0, joules, "counter")]
    done = epochs if epochs_done is None else epochs_done
    return TrialResult(
        "demo", trial_id, {"width": width, "rate": 0.1}, Fidelity(stage, structures, epochs, 1), status, loss, {}, done,
        10 * done, 1.0, EnergyReport.of(shares), diverged=diverged, limit_ratios=limit_ratios or {},
    )  # fmt: skip


outcomes = st.builds(
    dict,
    status=st.sampled_from(["complete", "complete", "pruned", "failed", "interrupted"]),
    loss=st.one_of(st.none(), st.floats(0.01, 10), st.just(0.5)),
    joules=st.one_of(st.none(), st.floats(0.1, 1e6), st.just(10.0)),
    diverged=st.booleans(),
    over=st.booleans(),
)


@given(history=st.lists(outcomes, max_size=25), single=st.booleans())
@settings(max_examples=150, deadline=None)
def test_only_what_finished_its_stage_is_ever_on_a_front(tmp_path_factory, history, single):
    rows = []
    for number, outcome in enumerate(history):
        diverged = outcome["diverged"] and outcome["status"] != "complete"
        over = {"memory_bytes": 1.5} if outcome["over"] else {"memory_bytes": 0.9}
        rows.append(result(number, status=outcome["status"], loss=outcome["loss"], joules=outcome["joules"],
                           diverged=diverged, limit_ratios=over))  # fmt: skip
    may = {
        r.trial_id: r for r in rows
        if r.status == "complete" and r.val_loss is not None and r.limit_ratios["memory_bytes"] <= 1
        and (single or r.energy_joules is not None)
    }  # fmt: skip
    objectives = ["val_loss"] if single else ["val_loss", "energy_joules"]
    config = config_of(tmp_path_factory.mktemp("run") / "run", [{"name": "final", "trials": 30, "epochs": 4}],
                       objectives=objectives)  # fmt: skip
    run = RunDir.create(config)
    for row in rows:
        append_json_line(run.trials_path, row.to_dict())
    promoted = promoted_trials(rows, "final", 30, Objectives.of(config.search))
    assert {r.trial_id for r in promoted} == set(may)
    front = on_front(run, config)
    assert {r.trial_id for r in front} <= set(may)
    if single:
        assert not front or front[0].val_loss == min(r.val_loss for r in may.values())
        return
    for trial in front:  # by definition, not by our ranks
        beaten = [o for o in may.values() if o.val_loss <= trial.val_loss and o.energy_joules <= trial.energy_joules
                  and (o.val_loss, o.energy_joules) != (trial.val_loss, trial.energy_joules)]  # fmt: skip
        assert not beaten
    assert bool(front) == bool(may)
    try:
        selection = select_trials(rows, SelectSection(), stage="final", project=lambda _: None)
    except UserError:
        assert not may
    else:
        assert set(selection.front) | set(selection.picked) <= set(may)


def test_promotion_goes_by_front_then_by_contribution():
    rows = [
        result(0, loss=1.0, joules=1.0),
        result(1, loss=0.1, joules=10.0),
        result(2, loss=0.4, joules=3.0),  # the knee
        result(3, loss=0.95, joules=1.1),  # on the front, adds little
        result(4, loss=0.9, joules=9.0),  # dominated
    ]
    order = [int(r.trial_id[-3:]) for r in promoted_trials(rows, "final", 5)]
    assert order[-1] == 4
    assert order.index(2) < order.index(3)
    assert len(promoted_trials(rows, "final", 2)) == 2


def test_one_objective_promotes_by_its_value():
    rows = [result(0, loss=1.0, joules=1.0), result(1, loss=0.1, joules=10.0), result(2, loss=0.4, joules=None)]
    by_loss = Objectives(("val_loss",))
    assert [r.val_loss for r in promoted_trials(rows, "final", 3, by_loss)] == [0.1, 0.4, 1.0]
    weighted = Objectives(("val_loss", "energy_joules"), (1.0, 1.0))
    assert [r.val_loss for r in promoted_trials(rows[:2], "final", 3, weighted)] == [1.0, 0.1]


@pytest.mark.parametrize(
    ("objectives", "expected"),
    [
        (TWO, (0.5, 30.0)),
        (Objectives(("val_loss", "joules_per_structure")), (0.5, 0.75)),
        (Objectives(("val_loss", "projected_joules"), None, lambda p, j: 1000 * j * p["width"]), (0.5, 6000.0)),
        (Objectives(("val_loss", "energy_joules"), (2.0, 0.1)), (4.0,)),
        (Objectives(("val_loss",)), (0.5,)),
        (Objectives(("val_loss", "projected_joules")), None),
    ],
)
def test_what_trials_are_compared_by(objectives, expected):
    values = objectives.of_result(result(0, joules=30.0))
    assert values == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(("loss", "joules"), [(None, 1.0), (0.5, None), (math.nan, 1.0), (0.5, math.inf)])
def test_what_is_not_known_is_no_value(loss, joules):
    assert TWO.values({}, loss, joules, 10) is None


def test_an_earlier_stage_is_known_at_its_share_of_the_fidelity(tmp_path):
    stages = [{"name": "scout", "trials": 9, "epochs": 2, "structures": 100},
              {"name": "final", "trials": 9, "epochs": 4, "structures": None, "promote": 2}]  # fmt: skip
    config = config_of(tmp_path / "run", stages)
    run = RunDir.create(config)
    rows = [
        result(0, stage="scout", loss=0.7, joules=10.0, epochs=2, structures=100),
        result(1, stage="scout", loss=0.9, joules=5.0, epochs=2, epochs_done=1, status="pruned", structures=100),
        result(2, stage="scout", loss=None, joules=5.0, epochs=2, epochs_done=1, status="pruned", structures=100),
        result(3, stage="scout", status="failed", loss=0.8, joules=3.0, epochs=2, epochs_done=1, structures=100),
    ]
    for row in rows:
        append_json_line(run.trials_path, row.to_dict())
    before = what_was_before(run, config, config.search.stages[1], TWO, None, n_training=400)
    shares = [observation.fidelity for observation in before.observations]
    assert shares == pytest.approx([200 / 1600, 100 / 1600, 100 / 1600])
    assert [o.loss for o in before.observations] == [0.7, 0.9, 0.8]
    assert [o.joules for o in before.observations] == pytest.approx([80.0, 80.0, 48.0])  # at this stage's fidelity
    assert not any(o.complete for o in before.observations)
    assert [point.values for point in before.points] == [(0.7, 10.0)]
    assert what_was_before(run, config, config.search.stages[0], TWO, None, n_training=400).observations == []


def test_later_stages_keep_their_share_of_a_budget(tmp_path):
    stages = [{"name": "a", "trials": 10, "epochs": 1, "reduction_factor": None},
              {"name": "b", "trials": 5, "epochs": 2, "ranks": 2, "reduction_factor": None},
              {"name": "c", "trials": 10, "epochs": 3, "reduction_factor": 3}]  # fmt: skip
    shares = budget_shares(config_of(tmp_path / "run", stages), None, None)
    assert shares == pytest.approx({"a": 10 / 45, "b": 30 / 45, "c": 1.0})
