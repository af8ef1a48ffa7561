"""What a cluster could hold, and what the driver says while nothing runs; without Ray."""

import itertools
import logging
import random
import signal
from types import SimpleNamespace

import pytest

from wattier import broken_amdsmi, ray_driver
from wattier.errors import UserError
from wattier.ray_cluster import missing_of
from wattier.ray_driver import Driver, callback_of, scheduler_of
from wattier.records import Fidelity, Proposal
from wattier.rundir import RunDir


def fits(bundle, ranks, nodes):
    """The same by trying: every way to put every rank on some node."""
    for places in itertools.product(range(len(nodes)), repeat=ranks):
        left = [dict(node) for node in nodes]
        for place in places:
            for name, each in bundle.items():
                left[place][name] = left[place].get(name, 0.0) - each
        if all(value >= -1e-9 for node in left for value in node.values()):
            return True
    return False


def test_what_fits_is_found_by_trying():
    draw = random.Random(1)
    for _ in range(400):
        nodes = [
            {"CPU": float(draw.randint(0, 4)), "GPU": draw.choice([0.0, 1.0, 2.0])} for _ in range(draw.randint(0, 3))
        ]
        bundle = {"CPU": float(draw.randint(1, 3))} | draw.choice([{}, {"GPU": 1.0}, {"GPU": 0.5}])
        ranks = draw.randint(1, 4)
        missing = missing_of(bundle, ranks, nodes)
        assert (missing is None) == fits(bundle, ranks, nodes), (bundle, ranks, nodes, missing)


def test_what_is_missing_is_said_with_figures():
    assert missing_of({"CPU": 2.0}, 3, [{"CPU": 4.0}]) == (
        "asks for 3 ranks of 2 CPU each, but the Ray cluster has 4 CPU on 1 nodes"
    )
    assert missing_of({"CPU": 3.0}, 1, [{"CPU": 2.0}, {"CPU": 2.0}]) == (
        "asks for 1 ranks of 3 CPU each, each on one node, but the Ray cluster has room for 0"
    )


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A driver whose clock and whose cluster the test turns."""
    resources = SimpleNamespace(stall_seconds=100.0, address="somewhere:6379")
    config = SimpleNamespace(resources=resources, launcher="ray")
    stage = SimpleNamespace(config=config, fidelity=Fidelity("only", None, 1, 2), run=RunDir(tmp_path))
    driver = Driver(stage, None, None, {"CPU": 1.0})
    world = SimpleNamespace(now=1000.0, missing=None, lives=True)
    monkeypatch.setattr(ray_driver.time, "monotonic", lambda: world.now)
    monkeypatch.setattr(ray_driver, "what_is_missing", lambda *_: world.missing)
    monkeypatch.setattr(ray_driver, "own_node_lives", lambda: world.lives)
    driver.world = world
    return driver


def wait(driver, seconds, *statuses):
    for _ in range(int(seconds)):
        driver.world.now += 1
        driver.look_after([SimpleNamespace(status=status, trial_id="t") for status in statuses])


def test_a_busy_cluster_is_waited_for_and_told_of_once(driver, caplog):
    with caplog.at_level(logging.WARNING):
        wait(driver, 1000, "PENDING", "TERMINATED")
    (record,) = caplog.records
    assert "one waits since 60 s for 2 ranks" in record.getMessage()
    assert "others hold them" in record.getMessage()


@pytest.fixture
def alone(driver, monkeypatch):
    """A driver with a private cluster."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    driver.stage.config.resources.address = None
    return driver


def test_a_private_cluster_that_starts_nothing_is_not_waited_for(alone, caplog):
    """There are no others who could hold its cores; five minutes at least, here more than stall_seconds."""
    wait(alone, 290, "PENDING")
    wait(alone, 10, "RUNNING", "PENDING")  # one came and went
    wait(alone, 290, "PENDING")
    with pytest.raises(UserError, match=r"no trial has begun for 300 s, .* it is stuck"):
        wait(alone, 20, "PENDING")
    assert alone.problem is not None
    assert ["begun no process" in record.getMessage() for record in caplog.records] == [True, True], "told once a wait"


def test_trials_that_begin_and_fail_between_two_looks_are_seen(alone):
    alone.started["t"] = Proposal("only-000", {})
    alone.stage.run.trial_folder = lambda *_: alone.stage.run.path
    for _ in range(10):
        wait(alone, 200, "PENDING")
        alone.begins("t")


def test_where_stalls_are_not_watched_for_it_is_only_told(alone, caplog):
    alone.watch.stall_seconds = None
    wait(alone, 5000, "PENDING")
    assert len(caplog.records) == 1


def test_a_trial_that_tune_forgets_ends_as_one_that_failed(driver, tmp_path):
    """Tune says nothing of one whose process was still leaving its last trial: its policy would wait for ever."""
    with broken_amdsmi.hidden(tmp_path / "hidden"):
        scheduler, heard = scheduler_of(driver), []
    search = SimpleNamespace(on_trial_complete=lambda trial_id, *, error: heard.append((trial_id, error)))
    trials = [SimpleNamespace(trial_id=name, status=status) for name, status in (("a", "RUNNING"), ("b", "ERROR"))]
    scheduler.on_trial_add(SimpleNamespace(search_alg=search), trials[0])
    driver.look_after(trials)
    assert heard == [], "b has ended as others do"
    driver.started |= {name: Proposal(f"only-{name}", {}) for name in "ab"}
    driver.look_after(trials)
    assert heard == [("b", True)], "as Tune tells it of others, so that its own limits hear it too"
    assert driver.reasons["b"].startswith("it never began")


def test_a_cluster_that_is_too_small_is_waited_for_as_long_as_a_stall(driver, caplog):
    driver.world.missing = "asks for 2 ranks of 1 CPU each, but the Ray cluster has 1 CPU on 1 nodes"
    wait(driver, 90, "PENDING")
    driver.world.missing = None  # a node came back
    wait(driver, 10, "PENDING")
    driver.world.missing = "asks for too much"
    wait(driver, 90, "PENDING")
    with pytest.raises(UserError, match="asks for too much, for 100 s now"):
        wait(driver, 20, "PENDING")


@pytest.mark.parametrize("statuses", [("RUNNING",), ("RUNNING", "PENDING"), ("TERMINATED", "ERROR"), ()])
def test_while_something_runs_or_nothing_waits_nothing_is_said(driver, caplog, statuses):
    driver.world.missing, driver.world.lives = "asks for too much", False
    with caplog.at_level(logging.WARNING):
        wait(driver, 1000, *statuses)
    assert not caplog.records


def test_the_loss_of_its_own_node_ends_it(driver):
    driver.world.lives = False
    with pytest.raises(UserError, match="Ray itself was lost"):
        wait(driver, 10, "PENDING")


def test_tune_does_not_keep_the_signal_that_batch_systems_send(driver, tmp_path):
    with broken_amdsmi.hidden(tmp_path / "hidden"):
        from ray.tune.tune import _setup_signal_catching

    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        watch = callback_of(driver)
        broken_off = _setup_signal_catching()  # what Tune does before it sets up its callbacks
        watch.setup()
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]
    assert not broken_off.is_set()


def test_what_breaks_the_driver_is_what_is_raised_and_no_other_trial_is_recorded(driver):
    def full(_):
        raise OSError(28, "No space left on device")

    outcomes = []
    driver.policy, driver.on_result = SimpleNamespace(on_result=lambda _: None), full
    driver.stage.outcome = lambda proposal, _: outcomes.append(proposal) or "result"
    driver.started = {"a": Proposal("only-000", {}), "b": Proposal("only-001", {})}
    driver.reasons = {"a": "died"}
    with pytest.raises(OSError, match="No space") as problem:
        driver.ended("a", error=True)
    driver.ended("b", error=False)  # as Tune, which now ends all that runs, says of the other one
    driver.collect()
    assert driver.problem is problem.value
    assert [proposal.trial_id for proposal in outcomes] == ["only-000"]
