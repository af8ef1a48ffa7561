"""Files converted by several processes at once, on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple

from wattier_gnn.parts import OnBad, Recipe, Shard, convert
from wattier_gnn.structure import DataError

POLL_SECONDS = 0.5
BYTES_WORTH_A_PROCESS = 8 << 20  # of input: a process takes seconds to start


class Progress(NamedTuple):
    """How far an ingestion is."""

    files_done: int
    files: int
    bytes_done: int
    bytes: int
    structures_read: int


def convert_all(  # noqa: PLR0913  (most are keywords)
    shards: Sequence[Shard],
    *,
    recipe: Recipe,
    on_bad: OnBad,
    staging: Path,
    workers: int | None,
    progress: Callable[[Progress], None],
) -> None:
    """Convert every file, by as many processes as there are cores unless `workers` says otherwise.

    Raises:
        DataError: as for `parts.convert`; the other processes are stopped, what they finished stays.
    """
    watcher = _Watcher(shards, staging, progress)
    n_workers = min(_worth_it(shards) if workers is None else workers, len(shards))
    if n_workers <= 1:
        for shard in shards:
            convert(shard, recipe, on_bad, staging, told=lambda shard=shard: watcher.tell([shard]))  # type: ignore[misc]
            watcher.finished(shard)
        return
    context = multiprocessing.get_context("spawn")  # threads of this process may hold locks that a fork would copy
    stop = context.Event()
    with ProcessPoolExecutor(n_workers, context, _start_worker, (stop,)) as pool:
        try:
            jobs = {pool.submit(convert, shard, recipe, on_bad, staging): shard for shard in shards}
            _follow(jobs, watcher)
        except BrokenProcessPool as error:
            raise DataError(
                "A process that read files was killed, probably for want of memory, but all must live. Run the same "
                "command with fewer processes (--workers); what is finished is kept."
            ) from error
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _follow(jobs: dict[Future[None], Shard], watcher: _Watcher) -> None:
    waiting = set(jobs)
    while waiting:
        done, waiting = wait(waiting, POLL_SECONDS, return_when="FIRST_COMPLETED")
        for job in done:
            job.result()
            watcher.finished(jobs[job])
        watcher.tell([jobs[job] for job in waiting if job.running()])


def _worth_it(shards: Sequence[Shard]) -> int:
    return min(len(os.sched_getaffinity(0)), 1 + sum(s.n_bytes for s in shards) // BYTES_WORTH_A_PROCESS)


def _start_worker(stop: Event) -> None:
    """Leave Ctrl-C to the parent, and leave when it says so or is gone: a pool's own workers would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        while not stop.wait(POLL_SECONDS):
            if parent is not None and not parent.is_alive():
                break
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Watcher:
    """Adds up how far all files are, from the names of the parts that are there."""

    def __init__(self, shards: Sequence[Shard], staging: Path, progress: Callable[[Progress], None]) -> None:
        self._files, self._bytes = len(shards), sum(s.n_bytes for s in shards)
        self._staging, self._progress = staging, progress
        self._files_done = self._bytes_done = self._read_done = 0

    def finished(self, shard: Shard) -> None:
        self._files_done += 1
        self._bytes_done += shard.n_bytes
        self._read_done += self._read(shard)
        self.tell([])

    def tell(self, running: Sequence[Shard]) -> None:
        read = self._read_done + sum(self._read(shard) for shard in running)
        self._progress(Progress(self._files_done, self._files, self._bytes_done, self._bytes, read))

    def _read(self, shard: Shard) -> int:
        names = [path.stem for path in (self._staging / shard.id).glob("*.safetensors")]
        return max((int(name.split("-")[1]) for name in names), default=0)
