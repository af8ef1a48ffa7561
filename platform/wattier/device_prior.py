"""How fast and how hungry a device is, before any trial has run on it: a guess with a factor."""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # of which one imports torch
    from multiprocessing.connection import Connection

    from wattier.config import RunConfig
    from wattier.workload import Workload

# How much less is known of each term of `DevicePrior.seconds` than of a product: sums over ranks may hide behind the
# work or hold it up, by what lies between the ranks, and a process may start warm or cold.
TERM_DOUBTS = (1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.5)
RATED_WATTS_PER_CORE = 10.0  # as the estimated power source has it
RATED_WATTS_PER_GPU = 350.0
SMALL_OPERATORS = 50
LONGEST_QUESTION_SECONDS = 60.0


class DevicePrior(NamedTuple):
    """Speed and power of what one rank has.

    Attributes:
        name: of the device, in words.
        watts: at work.
        flops_per_second, bytes_per_second: of products and of memory.
        seconds_per_operation: from one operator to the next, however small they are.
        factor: the truth lies within this factor in about two cases of three.
        seconds_per_structure: reading one and putting it into its batch.
        seconds_per_epoch: to begin and end an epoch: threads, checkpoints.
        seconds_per_process: to begin and end a trial in a process that runs.
        seconds_per_start: to start a process that a trial needs for itself, and to load libraries.
        exchange_bytes_per_second, exchange_seconds: of sums over ranks, for bytes and for each step.
    """

    name: str
    watts: float
    flops_per_second: float
    bytes_per_second: float
    seconds_per_operation: float
    factor: float = 3.0
    seconds_per_structure: float = 3e-5
    seconds_per_epoch: float = 0.02
    seconds_per_process: float = 0.1
    seconds_per_start: float = 4.0
    exchange_bytes_per_second: float = 2e9
    exchange_seconds: float = 1e-4

    def seconds(self, work: Workload, share: float = 1.0) -> tuple[float, ...]:
        """Wall seconds of each term of a trial that does `share` of its work [8]."""
        ranks = work.ranks
        return (
            share * work.flops / ranks / self.flops_per_second,
            share * work.bytes_moved / ranks / self.bytes_per_second,
            share * work.operations * self.seconds_per_operation,
            share * work.structures / ranks * self.seconds_per_structure,
            share * work.epochs * self.seconds_per_epoch,
            share * self._exchange(work),
            self.seconds_per_process,
            self.seconds_per_start if work.starts else 0.0,
        )

    def joules(self, work: Workload, share: float = 1.0) -> tuple[float, ...]:
        """Joules of each term, of all ranks [8]."""
        *shared, start = self.seconds(work, share)
        watts = self.watts * work.ranks
        return (*(watts * seconds for seconds in shared), self.watts * work.starts * start)

    def _exchange(self, work: Workload) -> float:
        if work.ranks == 1:
            return 0.0
        sent = 2 * 4 * work.parameters * (work.ranks - 1) / work.ranks
        return work.steps * (sent / self.exchange_bytes_per_second + self.exchange_seconds * math.log2(work.ranks))


# Ratios between the terms where no device was asked: a core of a server. Its scale says little.
ANY_DEVICE = DevicePrior("any device", RATED_WATTS_PER_CORE, 3e10, 5e9, 1e-5, factor=10.0)


def prior_of(config: RunConfig) -> DevicePrior:
    """The device of a run's ranks, as far as this process can ask: less than half a second, on a GPU some seconds.

    A GPU is asked by another process, which leaves nothing on it. Of the nodes of a cluster that runs elsewhere all
    that is known is what this machine is like: the factor of the guess is 10.
    """
    import torch

    from wattier.launch import runs_here

    resources = config.resources
    share = 1.0 if resources.gpus_per_rank is None else resources.gpus_per_rank
    if torch.cuda.device_count() and share > 0:
        prior = _asked_apart(share * RATED_WATTS_PER_GPU)
    else:
        watts = resources.cpus_per_rank * (config.telemetry.rated_watts_per_core or RATED_WATTS_PER_CORE)
        prior = probe_device("this CPU", watts=watts, threads=resources.cpus_per_rank)
    if runs_here(config):
        return prior
    return prior._replace(name=f"{prior.name}, which need not be like the cluster's nodes", factor=ANY_DEVICE.factor)


def _asked_apart(watts: float) -> DevicePrior:
    """Ask the first GPU in a process of its own; where that fails, a guess."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(there, watts), daemon=True)
    process.start()
    there.close()
    found: DevicePrior | None = None
    try:
        found = here.recv() if here.poll(LONGEST_QUESTION_SECONDS) else None
    except EOFError:  # it died
        pass
    finally:
        process.kill()
        process.join()
        here.close()
    return found or DevicePrior("any GPU", watts, 1e13, 1e12, 1e-5, factor=ANY_DEVICE.factor)


def _tell(there: Connection, watts: float) -> None:
    """In that process."""
    try:
        there.send(probe_device("this GPU", watts=watts, on_gpu=True))
    except (RuntimeError, AssertionError):  # taken by others, too full, or torch was built without it
        there.send(None)


def probe_device(name: str, *, watts: float, threads: int = 1, on_gpu: bool = False) -> DevicePrior:
    """Measure a device for less than half a second: a product, a copy, and small operators one after the other.

    Args:
        name: what to call it.
        watts: of one rank at work; rated, since so short a run cannot be measured.
        threads: of a rank on a CPU.
        on_gpu: ask this process's first GPU.
    """
    import torch

    device, before = torch.device("cuda", 0) if on_gpu else torch.device("cpu"), torch.get_num_threads()
    size = 4096 if on_gpu else 384
    torch.set_num_threads(threads)
    try:
        a, b = torch.rand(size, size, device=device), torch.rand(size, size, device=device)
        big = torch.rand(2**26 if on_gpu else 2**22, device=device)
        other = torch.empty_like(big)
        small = torch.rand(8, device=device, requires_grad=True)

        def wait() -> None:
            if on_gpu:
                torch.cuda.synchronize()

        def few() -> None:
            x = small
            for _ in range(SMALL_OPERATORS):
                x = x * 1.5
            torch.autograd.backward(x.sum())

        product = _median_seconds(lambda: torch.mm(a, b), wait)
        copy = _median_seconds(lambda: other.copy_(big), wait)
        operator = _median_seconds(few, wait) / (2 * SMALL_OPERATORS)
    finally:
        torch.set_num_threads(before)
    prior = DevicePrior(name, watts, 2 * size**3 / product, 2 * 4 * big.numel() / copy, operator)
    # Between GPUs of a node, or of nodes with as many network cards.
    return prior._replace(exchange_bytes_per_second=3e10, exchange_seconds=5e-5) if on_gpu else prior


def _median_seconds(work: Callable[[], object], wait: Callable[[], None], limit_seconds: float = 0.1) -> float:
    """Median of the repetitions within the limit, the first apart, which loads kernels."""
    work()
    wait()
    seconds: list[float] = []
    ends = time.perf_counter() + limit_seconds
    while len(seconds) < 3 or (time.perf_counter() < ends and len(seconds) < 100):
        started = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
