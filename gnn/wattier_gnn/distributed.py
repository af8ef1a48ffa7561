"""The few collective operations that training needs; all are no-ops in a world of one."""

from __future__ import annotations

import datetime
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class World:
    """This process's place among the ranks of one training; address and port are those of rank 0."""

    rank: int = 0
    size: int = 1
    address: str = "127.0.0.1"
    port: int = 0


@contextmanager
def process_group(world: World, device: torch.device, *, exclusive_device: bool = True) -> Iterator[None]:
    """Join the process group for the length of the block; always left again, or the next training here would fail.

    NCCL needs a GPU for each rank; ranks that share one, and CPUs, use gloo.
    """
    if world.size == 1:
        yield
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface_of(world.address))
    dist.init_process_group(
        "nccl" if device.type == "cuda" and exclusive_device else "gloo",
        init_method=f"tcp://{world.address}:{world.port}",
        rank=world.rank,
        world_size=world.size,
        timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS),
    )
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they may hold a DistributedDataParallel, see Trainer.run
        raise
    finally:
        dist.destroy_process_group()


def all_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def largest(value: float, device: torch.device) -> float:
    """The largest of the ranks' numbers, on every rank."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def from_rank_zero(value: float, device: torch.device) -> float:
    """Rank 0's number, on every rank."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(tensor, 0)
    return float(tensor)


def gather_bytes(mine: Tensor, device: torch.device) -> list[Tensor]:
    """Every rank's uint8 [n], in the order of ranks, on every rank's CPU; all are of one length."""
    if not dist.is_initialized():
        return [mine]
    here = mine.to(device)
    gathered = [torch.empty_like(here) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, here)
    return [part.cpu() for part in gathered]


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def _interface_of(address: str) -> str:
    """Ranks on one machine talk over loopback, whatever other interfaces there are."""
    return "lo" if address.startswith("127.") else os.environ.get("GLOO_SOCKET_IFNAME", "")
