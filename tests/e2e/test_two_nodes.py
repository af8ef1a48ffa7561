"""Two emulated nodes: ranks lie together, jobs come by submission, a node that is lost costs what was not saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from members import Quiet, differences, selected_run, undone
from ray_nodes import RayNodes, is_loopback
from two_nodes import HERE, run_funnel, write_config

from wattier.config import RunConfig
from wattier.launch import InlineLauncher
from wattier.run import train
from wattier.rundir import RunDir

SMALL = {
    "name": "small",
    "data": {"sources": {"qm7x": "sample"}, "cutoff_angstrom": 4.0},
    "model": {"n_layers": 1, "n_radial": 4, "head_dim": 16, "n_head_layers": 1, "forces": "vector"},
    "search": {
        "space": {"learning_rate": {"low": 1e-3, "high": 1e-2, "log": True}},
        "stages": [
            {"name": "wide", "trials": 4, "structures": 200, "epochs": 30, "reduction_factor": None},
            {"name": "deep", "trials": 1, "structures": 200, "epochs": 2, "ranks": 2, "promote": 1,
             "reduction_factor": None},
        ],
    },
    "select": {"accurate": 1, "balanced": 0},
    "full_training": {"epochs": 3},
}  # fmt: skip
ONE_TRIAL = {
    "search": {
        "space": {"learning_rate": {"low": 1e-3, "high": 1e-2, "log": True}},
        "stages": [{"name": "only", "trials": 1, "structures": 100, "epochs": 1, "reduction_factor": None}],
    },
    "full_training": {"epochs": 1},
}


@pytest.fixture(scope="module")
def nodes():
    with RayNodes((2, 2), (HERE,)) as cluster:
        yield cluster


@pytest.fixture
def start(nodes, tmp_path):
    """A driver on the cluster: ``start(ranks=2, trials=6, seconds=1, stall_seconds=5)``; its run and its process."""
    started = []

    def begin(*, ranks, trials, seconds, **resources):
        values = SMALL | {"resources": {"retries": 1, **resources}, "training": {"checkpoint_seconds": 0.1}}
        config = RunConfig.model_validate(yaml.safe_load(write_config(values, tmp_path).read_text()))
        run = RunDir.create(config)
        command = [sys.executable, HERE / "on_nodes.py", run.path, *map(str, (ranks, trials, seconds))]
        process = subprocess.Popen(
            command, env=nodes.client_environment(RAY_ADDRESS=nodes.address), stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return run, process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_the_cluster_listens_to_this_machine_only_and_asks_for_a_token(nodes):
    addresses = {connection.laddr.ip for connection in nodes.listening()}
    assert addresses
    assert all(map(is_loopback, addresses))
    environment = {k: v for k, v in nodes.client_environment().items() if "AUTH" not in k}
    ray = Path(sys.executable).with_name("ray")
    done = subprocess.run(
        [ray, "job", "list"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert "401" in done.stderr + done.stdout or "token" in done.stderr + done.stdout


def test_ranks_lie_together_and_more_than_is_free_waits(nodes, start):
    run, process = start(ranks=2, trials=5, seconds=0.5)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert Counter(line.split()[1] for line in out.splitlines()) == {"complete": 5}
    used = [{path.read_text() for path in folder.glob("node-of-rank*")} for folder in run.path.glob("trials/only/*")]
    assert [len(ids) for ids in used] == [1] * 5, "the two ranks of a trial fit on one node"


@pytest.fixture
def submit(nodes, tmp_path):
    """`wattier submit` of SMALL with some changes, from a folder of its own; the process."""
    started = []

    def begin(changes, *options, **environment):
        write_config(SMALL | ONE_TRIAL | changes, tmp_path)
        process = subprocess.Popen(
            [sys.executable, "-m", "wattier", "submit", "config.yaml", "--address", nodes.dashboard, *options],
            cwd=tmp_path, env=nodes.client_environment(**environment), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_submit_shows_the_log_and_ends_with_the_code_of_the_run(submit, tmp_path):
    process = submit({"data": {"sources": {"qm7x": str(tmp_path / "nowhere")}}})
    out, err = process.communicate(timeout=90)
    assert process.returncode == 2, out + err
    assert out.startswith("Submitted as raysubmit_")
    assert f"{tmp_path / 'nowhere'}" in out
    assert "The job ended with exit code 2" in err


def test_submit_with_another_token_is_refused_in_one_line(submit, tmp_path):
    (tmp_path / "token").write_text("0" * 64)
    process = submit({}, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    (line,) = err.splitlines()
    assert "the cluster asks for another token" in line


def test_a_submitted_run_goes_on_when_its_submitter_is_interrupted(submit, tmp_path):
    process = submit({})
    assert process.stdout.readline().startswith("Submitted as raysubmit_")
    run = RunDir(tmp_path / "run")
    wait_until(run.trials_path.parent.exists)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert "The job goes on without us. Follow it: ray job logs --follow --address" in err
    wait_until(run.report_path.exists)
    assert [row.status for row in run.trials()] == ["complete"] * 2


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_lost_node_costs_only_what_was_not_saved(nodes, tmp_path):
    outcome = run_funnel(nodes, write_config(SMALL, tmp_path), kill_node=True, rest_seconds=0.03)
    assert outcome.killed_after is not None, outcome.log
    assert outcome.code == 0, outcome.log
    assert outcome.statuses == {("wide", "complete"): 4, ("deep", "complete"): 1, ("full", "complete"): 1}
    assert outcome.retried, "no trial ran on the node that was lost"
    assert all(twice <= 1 for twice in outcome.retried.values()), "an epoch that was saved was trained again"
    assert outcome.lost_joules > 0
    assert outcome.true_joules <= outcome.billed_joules <= 1.05 * outcome.true_joules
    for trial_id in outcome.retried:
        stages = [row.fidelity.stage for row in outcome.run.trials() if row.trial_id == trial_id]
        folder = outcome.run.trial_folder(stages[0], trial_id)
        assert len(list(folder.glob("attempt*-rank0.energy.json"))) == 2


def test_members_that_lose_their_node_end_in_the_same_bits(nodes, tmp_path):
    """Each of two members has a node of its own; the one whose node dies goes on from its checkpoint on another."""
    if not nodes.others():
        nodes.add_node(2)
    whole_node = {"cpus_per_rank": 2, "retries": 1}
    run = selected_run(tmp_path / "made", resources=whole_node, full_training={"epochs": 20, "early_stop_patience": 20})
    straight, lost = (
        undone(run.path, tmp_path / name, launcher=how) for name, how in (("straight", "inline"), ("lost", "ray"))
    )
    peaceful = RunDir.open(straight.run_dir)
    train(peaceful, peaceful.config(), InlineLauncher(), Quiet())
    outcome = run_funnel(nodes, lost.config_path, kill_node=True, rest_seconds=0.1)
    assert outcome.killed_after is not None, outcome.log
    assert outcome.code == 0, outcome.log
    assert len(outcome.retried) == 1, "one member was on the node that was lost"
    assert all(twice <= 1 for twice in outcome.retried.values()), "an epoch that was saved was trained again"
    assert differences(peaceful, RunDir.open(lost.run_dir)) == []
    true_joules = outcome.true_joules * min(2, os.cpu_count() or 1)  # a rank owns two cores of the node here
    assert true_joules <= outcome.billed_joules <= 1.05 * true_joules


def test_what_the_cluster_has_no_more_is_said_and_not_waited_for(nodes, start):
    if not nodes.others():
        nodes.add_node(2)
    run, process = start(ranks=3, trials=1, seconds=30, stall_seconds=12)
    folder = run.path / "trials" / "only" / "only-000"
    deadline = time.monotonic() + 60
    while len(list(folder.glob("node-of-rank*"))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len({path.read_text() for path in folder.glob("node-of-rank*")}) == 2, "three ranks need two nodes"
    for index in nodes.others():
        nodes.kill_node(index)
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 2
    assert "stage 'only': asks for 3 ranks of 1 CPU each" in out
    assert "the Ray cluster has 2 CPU" in out
    assert "the same command goes on from here" in out
