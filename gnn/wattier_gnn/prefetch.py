"""Batches made ready in the background while the step before runs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch

from wattier_gnn.batch import Batch
from wattier_gnn.store import Store

Parts = Sequence[Any]  # one int64 array of structures a rank


class Loader:
    """Reads this rank's batches in order, up to `ahead` of them before they are asked for.

    A store that is spread over ranks (`is_collective`) is read when asked: its reads are collective operations, and
    those of a second thread would mix with the ones of the step.

    Attributes:
        wait_seconds: time spent waiting for batches since the loader was made.
    """

    def __init__(self, store: Store, rank: int, device: torch.device, ahead: int) -> None:
        self._store, self._rank, self._device = store, rank, device
        self._ahead = 0 if getattr(store, "is_collective", False) else ahead
        self.wait_seconds = 0.0

    @contextmanager
    def reading(self, steps: Iterator[Parts]) -> Iterator[Iterator[tuple[Parts, Batch]]]:
        """The steps with their batches on the device; leaving the block, also early, ends the reading thread.

        An error of reading is raised where its batch would have come.
        """
        if not self._ahead:
            yield self._timed((parts, self._read(parts)) for parts in steps)
            return
        pending: deque[tuple[Parts, Future[Batch]]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="wattier-data") as pool:
            try:
                yield self._timed(self._in_order(steps, pool, pending))
            finally:
                for _, future in pending:
                    future.cancel()

    def _in_order(
        self, steps: Iterator[Parts], pool: ThreadPoolExecutor, pending: deque[tuple[Parts, Future[Batch]]]
    ) -> Iterator[tuple[Parts, Batch]]:
        for parts in steps:
            pending.append((parts, pool.submit(self._read, parts)))
            if len(pending) > self._ahead:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()

    def _timed(self, batches: Iterator[tuple[Parts, Batch]]) -> Iterator[tuple[Parts, Batch]]:
        while True:
            started = time.perf_counter()
            item = next(batches, None)
            self.wait_seconds += time.perf_counter() - started
            if item is None:
                return
            parts, batch = item
            yield parts, batch.to(self._device)

    def _read(self, parts: Parts) -> Batch:
        batch = self._store.batch_of(parts, self._rank)
        if self._device.type != "cuda":
            return batch
        return Batch(*(getattr(batch, f.name).pin_memory() for f in fields(batch)))
