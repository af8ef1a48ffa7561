"""Two ranks take the same steps as one, none of them waits for a rank that is gone, and a kill costs nothing."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wattier_gnn import checkpoint
from wattier_gnn.store import Store

WORKER = Path(__file__).with_name("ddp_worker.py")
SECONDS = 150
N_PORTS = 9
STEPS, STEPS_BETWEEN_CHECKPOINTS = 16, 3  # of a training with checkpoints: four epochs of four
KILLED_AFTER = random.Random(4).randrange(STEPS_BETWEEN_CHECKPOINTS + 1, STEPS)


def free_ports(n: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def run_ranks(job: str, store: Store, folders: dict[int, Path]) -> list[tuple[int, str]]:
    """A world of one and a world of two, all processes at once; exit codes and what they wrote to stderr.

    Once a rank has failed the others, which may wait for it, are killed.
    """
    processes = []
    for size, folder in folders.items():
        ports = free_ports(N_PORTS)
        for rank in range(size):
            arguments = [job, str(rank), str(size), str(store.folder), str(folder), *ports]
            command = [sys.executable, "-W", "error", str(WORKER), *arguments]
            processes.append((size, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    deadline = time.monotonic() + SECONDS
    while any(process.poll() is None for _, process in processes):
        time.sleep(0.05)
        lost = {size for size, process in processes if process.poll()}
        for size, process in processes:
            if size in lost or time.monotonic() > deadline:
                process.kill()
    errors = [process.communicate()[1] for _, process in processes]
    return [(process.returncode, text) for (_, process), text in zip(processes, errors, strict=True)]


def read_results(job: str, folders: dict[int, Path]) -> dict[str, list[dict[str, Any]]]:
    names = {1: "one", 2: "two"}
    return {
        names[size]: [json.loads((folder / f"{rank}-{job}.json").read_text()) for rank in range(size)]
        for size, folder in folders.items()
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """One for each size of world."""
    return {size: tmp_path_factory.mktemp(f"world{size}") for size in (1, 2)}


@pytest.fixture(scope="module")
def runs(emt_store: Store, folders: dict[int, Path]) -> dict[str, list[dict[str, Any]]]:
    """What each rank of a world of one and of a world of two left behind."""
    ended = run_ranks("undisturbed", emt_store, folders)
    assert [code for code, _ in ended] == [0, 0, 0], "\n".join(text for _, text in ended)
    return read_results("undisturbed", folders)


@pytest.mark.parametrize("mode", ["conservative", "vector"])
def test_two_ranks_follow_the_loss_curve_of_one(runs: dict[str, list[dict[str, Any]]], mode: str) -> None:
    (one,), two = ([run[mode] for run in runs[world]] for world in ("one", "two"))
    assert len(one["losses"]) == 12
    for rank in two:
        np.testing.assert_allclose(rank["losses"], one["losses"], rtol=1e-5)
        assert rank["weights"] == pytest.approx(one["weights"], rel=1e-6)
        assert rank["best_val"] == pytest.approx(one["best_val"], rel=1e-5)
        assert rank["ended"] == one["ended"] == "epochs"
    assert two[0]["weights"] == two[1]["weights"]
    np.testing.assert_allclose(two[0]["val"], one["val"], rtol=1e-5)
    assert one["losses"][-1] != one["losses"][0]


def test_a_spread_model_follows_it_too(runs: dict[str, list[dict[str, Any]]]) -> None:
    """FSDP on two ranks, weight average and clipping included, with a store that only both together can read."""
    one = runs["one"][0]["vector"]
    for rank in runs["two"]:
        spread = rank["spread"]
        np.testing.assert_allclose(spread["losses"], one["losses"], rtol=1e-5)
        assert spread["best_val"] == pytest.approx(one["best_val"], rel=1e-5)
        assert spread["weights"] == pytest.approx(one["weights"], rel=1e-6)
        assert spread["reads"] == 3 * (4 + 1), "each step of three epochs, and one of validation"


def test_what_it_leaves_is_the_same_whatever_the_sharding(
    runs: dict[str, list[dict[str, Any]]], folders: dict[int, Path]
) -> None:
    for name in ("last.pt", "best.pt"):
        whole, spread = (checkpoint.load(folders[2] / mode / name) for mode in ("vector", "spread"))
        assert shapes(spread) == shapes(whole)
        for key, tensor in whole["model"].items():
            torch.testing.assert_close(spread["model"][key], tensor, rtol=1e-4, atol=1e-5)


def test_a_training_may_change_its_sharding(runs: dict[str, list[dict[str, Any]]]) -> None:
    parts = runs["two"][0]["handed over"]
    assert [len(part["losses"]) for part in parts] == [4, 4, 4]
    joined = [loss for part in parts for loss in part["losses"]]
    np.testing.assert_allclose(joined, runs["one"][0]["vector"]["losses"], rtol=1e-5)


def test_a_spread_model_with_forces_by_gradient_is_refused(runs: dict[str, list[dict[str, Any]]]) -> None:
    for run in runs["two"]:
        assert run["refusal"].startswith("training.sharding is fsdp and model.forces is conservative")


def test_the_hard_batches_were_among_them(runs: dict[str, list[dict[str, Any]]], emt_store: Store) -> None:
    """A rank without a structure, and a step in which a source that has structures is absent."""
    parts = [run["vector"]["parts"] for run in runs["two"]]
    assert parts[1][3] == []
    present = [set(emt_store.source_index[part].tolist()) for part in runs["one"][0]["vector"]["parts"]]
    assert {0, 1} in present
    assert {0} in present


def test_only_rank_zero_reports_and_writes(runs: dict[str, list[dict[str, Any]]]) -> None:
    assert [len(run["vector"]["val"]) for run in runs["two"]] == [3, 0]


def test_a_failing_listener_stops_every_rank(runs: dict[str, list[dict[str, Any]]]) -> None:
    first, second = (run["failing"] for run in runs["two"])
    assert first == {"error": "the listener failed", "steps": 8}
    assert second == {"ended": "stopped", "epoch": 2, "steps": 8}


def test_a_killed_training_goes_on_bit_for_bit(
    runs: dict[str, list[dict[str, Any]]], folders: dict[int, Path], emt_store: Store
) -> None:
    """SIGKILL after a random step of a random epoch, some steps after the last checkpoint; then the same command."""
    killed = run_ranks(f"killed-{KILLED_AFTER}", emt_store, folders)
    alone, *together = [code for code, _ in killed]
    assert alone == -9, killed
    assert -9 in together, killed
    assert 0 not in together, killed
    resumed = run_ranks("resumed", emt_store, folders)
    assert [code for code, _ in resumed] == [0, 0, 0], "\n".join(text for _, text in resumed)
    results = read_results("resumed", folders)
    for size, world in ((1, "one"), (2, "two")):
        straight = runs[world][0]["straight"]
        assert straight["steps"] == STEPS
        for rank in results[world]:
            assert rank["steps"] == STEPS - KILLED_AFTER // STEPS_BETWEEN_CHECKPOINTS * STEPS_BETWEEN_CHECKPOINTS
        reports = results[world][0]["reports"]
        assert reports == straight["reports"][-len(reports) :], "losses, metrics and rates of every epoch that follows"
        for name in ("last.pt", "best.pt"):
            whole, again = (checkpoint.load(folders[size] / job / name) for job in ("straight", "killed"))
            assert_same(whole, again)


def shapes(content: Any) -> Any:
    """A checkpoint with its tensors replaced by their shapes and types, and its numbers by their types."""
    if isinstance(content, dict):
        return {key: shapes(value) for key, value in content.items() if key not in {"state", "schedule"}}
    if isinstance(content, list | tuple):
        return [shapes(value) for value in content]
    return (tuple(content.shape), content.dtype) if isinstance(content, torch.Tensor) else type(content)


def assert_same(whole: Any, again: Any, at: str = "") -> None:
    """Two checkpoints are equal, every tensor to the bit, but for the time they took."""
    if isinstance(whole, dict):
        assert whole.keys() == again.keys(), at
        for key in whole.keys() - {"seconds", "data_wait_seconds", "save_seconds"}:
            assert_same(whole[key], again[key], f"{at}/{key}")
    elif isinstance(whole, list | tuple):
        assert len(whole) == len(again), at
        for index, (a, b) in enumerate(zip(whole, again, strict=True)):
            assert_same(a, b, f"{at}/{index}")
    elif isinstance(whole, torch.Tensor):
        assert torch.equal(whole, again), at
    else:
        assert whole == again, at
