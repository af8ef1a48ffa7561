"""Reading ahead changes neither order nor errors, and leaves no thread behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from wattier_gnn.batch import Batch
from wattier_gnn.prefetch import Loader
from wattier_gnn.store import Store
from wattier_gnn.structure import DataError

CPU = torch.device("cpu")
STEPS = [[np.array([k])] for k in range(8)]


class WatchedStore:
    """Counts reads and says in which thread they happened; one structure cannot be read."""

    def __init__(self, store: Store, bad: int | None = None) -> None:
        self.store, self.bad = store, bad
        self.reads: list[int] = []
        self.threads: set[str] = set()

    def batch_of(self, parts: Sequence[Any], rank: int) -> Batch:
        self.reads.append(int(parts[rank][0]))
        self.threads.add(threading.current_thread().name)
        if self.reads[-1] == self.bad:
            raise DataError("structure 5 is torn")
        return self.store.batch(parts[rank])


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def energies(loader: Loader, n: int | None = None) -> list[float]:
    found = []
    with loader.reading(iter(STEPS)) as batches:
        for parts, batch in batches:
            assert len(parts) == 1
            found.append(float(batch.energy[0]))
            if len(found) == n:
                break
    return found


@pytest.mark.parametrize("ahead", [0, 1, 3, 99])
def test_the_order_is_kept(emt_store: Store, ahead: int) -> None:
    watched = WatchedStore(emt_store)
    loader = Loader(watched, 0, CPU, ahead)  # type: ignore[arg-type]
    assert energies(loader) == [float(emt_store.batch(part).energy[0]) for (part,) in STEPS]
    assert watched.reads == list(range(8))
    assert loader.wait_seconds > 0


@pytest.mark.parametrize("ahead", [0, 2])
def test_no_more_is_read_than_was_asked_for(emt_store: Store, ahead: int) -> None:
    watched = WatchedStore(emt_store)
    energies(Loader(watched, 0, CPU, ahead), 3)  # type: ignore[arg-type]
    assert watched.reads == list(range(len(watched.reads)))
    assert 3 <= len(watched.reads) <= 3 + ahead


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_comes_where_its_batch_would_have(emt_store: Store, ahead: int) -> None:
    loader, seen = Loader(WatchedStore(emt_store, bad=5), 0, CPU, ahead), []  # type: ignore[arg-type]
    with pytest.raises(DataError, match="torn"), loader.reading(iter(STEPS)) as batches:
        for parts, _ in batches:
            seen.append(int(parts[0][0]))
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("stop", [SystemExit, KeyboardInterrupt, RuntimeError])
def test_a_stop_in_a_step_ends_the_reading(emt_store: Store, stop: type[BaseException]) -> None:
    loader = Loader(WatchedStore(emt_store), 0, CPU, 2)  # type: ignore[arg-type]
    with pytest.raises(stop), loader.reading(iter(STEPS)) as batches:
        for _ in batches:
            raise stop


def test_a_store_that_all_ranks_read_together_is_read_by_the_step_itself(emt_store: Store) -> None:
    alone, together = WatchedStore(emt_store), WatchedStore(emt_store)
    together.is_collective = True  # type: ignore[attr-defined]
    for watched in (alone, together):
        energies(Loader(watched, 0, CPU, 2), 1)  # type: ignore[arg-type]
    assert all(name.startswith("wattier-data") for name in alone.threads)
    assert together.threads == {threading.current_thread().name}
    assert together.reads == [0]
