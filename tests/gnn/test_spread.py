"""A store that is spread over ranks gives every rank the batches of the plain store, to the bit."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wattier_gnn.distributed import World
from wattier_gnn.spread import SpreadStore
from wattier_gnn.store import Store

WORKER = Path(__file__).with_name("spread_worker.py")
SECONDS = 100
SMALLER_ANGSTROM = 2.8  # a third of the store's edges


@pytest.fixture(scope="module")
def on_the_fly(emt_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The same structures without their edges."""
    folder = tmp_path_factory.mktemp("fly") / "store"
    shutil.copytree(emt_store.folder, folder)
    manifest = (folder / "manifest.json").read_text()
    n_edges = len(emt_store.columns["edges"])
    assert f'"edges": {n_edges}, "cells"' in manifest
    manifest = manifest.replace("precomputed", "on_the_fly").replace(
        f'"edges": {n_edges}, "cells"', '"edges": 0, "cells"'
    )
    (folder / "manifest.json").write_text(manifest)
    (folder / "edges.bin").write_bytes(b"")
    return Store(folder)


@pytest.fixture(scope="module")
def ranks(emt_store: Store, on_the_fly: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """What each rank of worlds of two and three left behind; all processes run at once."""
    processes, folders = [], {}
    for size in (2, 3):
        folders[size] = tmp_path_factory.mktemp(f"world{size}")
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        for rank in range(size):
            arguments = [rank, size, folders[size], port, SMALLER_ANGSTROM, emt_store.folder, on_the_fly.folder]
            command = [sys.executable, "-W", "error", str(WORKER), *map(str, arguments)]
            processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    deadline = time.monotonic() + SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.returncode for process in processes):
            break  # the others would wait for it
        time.sleep(0.1)
    for process in processes:
        process.kill()
    errors = [process.communicate()[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return {size: [np.load(folder / f"{rank}.npz") for rank in range(size)] for size, folder in folders.items()}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("number", range(4), ids=["edges kept", "edges found", "some kept", "some found"])
def test_batches_are_those_of_the_plain_store(
    ranks: dict[int, list[Any]], emt_store: Store, on_the_fly: Store, size: int, number: int
) -> None:
    folder, cutoff = (emt_store, on_the_fly)[number % 2].folder, SMALLER_ANGSTROM if number > 1 else None
    store = Store(folder, cutoff)
    for found in ranks[size]:
        counted = store.count_edges(np.arange(1, 20))
        np.testing.assert_array_equal(found[f"{number}.n_edges"][1:20], counted, err_msg="counted by all ranks")
        for step in range(6):
            expected = store.batch(found[f"{number}.{step}.part"])
            for field in fields(expected):
                values = getattr(expected, field.name).numpy()
                np.testing.assert_array_equal(found[f"{number}.{step}.{field.name}"], values, err_msg=field.name)


@pytest.mark.usefixtures("float64")
def test_edges_found_in_a_batch_are_those_that_were_kept(emt_store: Store, on_the_fly: Store) -> None:
    part = np.array([0, 21, 5, 26, 26])
    found, kept = on_the_fly.batch(part), emt_store.batch(part)
    for field in fields(kept):
        torch.testing.assert_close(getattr(found, field.name), getattr(kept, field.name), rtol=0, atol=0)


def test_the_exchange_was_worth_its_name(ranks: dict[int, list[Any]]) -> None:
    """Empty parts, repeats, structures of others; every rank holds a share, and all shares are the whole."""
    for size, found in ranks.items():
        bounds = found[0]["0.bounds"]
        assert bounds[0] == 0
        assert bounds[-1] == 27
        assert (np.diff(bounds) > 0).all()
        parts = [rank[key] for rank in found for key in rank.files if key.endswith(".part")]
        assert min(map(len, parts)) == 0
        assert any(len(set(part.tolist())) < len(part) for part in parts)
        owners = [set(np.searchsorted(bounds, part, side="right").tolist()) for part in parts]
        assert set(range(1, size + 1)) in owners


def test_a_world_of_one_needs_no_exchange(emt_store: Store) -> None:
    store = SpreadStore(emt_store.folder, World())
    part = np.array([26, 3, 3, 0])
    batch, expected = store.batch_of([part], 0), emt_store.batch(part)
    for field in fields(expected):
        torch.testing.assert_close(getattr(batch, field.name), getattr(expected, field.name), rtol=0, atol=0)
