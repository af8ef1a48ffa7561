"""Two ranks take the same steps as one, and none of them waits for a rank that is gone."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wattier_gnn.store import Store

WORKER = Path(__file__).with_name("ddp_worker.py")
SECONDS = 100


def free_ports(n: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def runs(emt_store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each rank of a world of one and of a world of two left behind; all three processes run at once."""
    processes, folders = [], {}
    for size in (1, 2):
        folders[size] = tmp_path_factory.mktemp(f"world{size}")
        ports = free_ports(3)
        for rank in range(size):
            arguments = [str(rank), str(size), str(emt_store.folder), str(folders[size]), *ports]
            command = [sys.executable, "-W", "error", str(WORKER), *arguments]
            processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    deadline = time.monotonic() + SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.returncode for process in processes):
            break  # the others would wait for it
        time.sleep(0.1)
    for process in processes:
        process.kill()
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], "\n".join(errors)
    read = {
        size: [json.loads((folder / f"{r}.json").read_text()) for r in range(size)] for size, folder in folders.items()
    }
    return {"one": read[1], "two": read[2]}


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
