"""A training of one named model size for a fixed time: what it needs of memory, and how fast it goes."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
import torch
from torch import Tensor, nn

from wattier.config import ModelSection, TrainingSection
from wattier.model_sizes import Size, build_size, count_size
from wattier_gnn.batch import Batch, Prediction
from wattier_gnn.batching import StepLimits, cut_into_steps
from wattier_gnn.loss import loss_terms
from wattier_gnn.prefetch import Loader
from wattier_gnn.sampling import Sampler
from wattier_gnn.splits import TRAIN
from wattier_gnn.store import Store

SEED = 0
PARAMETER_BYTES = 16  # float32: the weight, its gradient, two moments of AdamW
LIBRARY_BYTES = 200 * 2**20  # what a step loads and allocates whatever the model: kernels, the batches read ahead
STEPS_LOOKED_AT = 2000  # to find the largest batch of a training
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryNeed:
    """The memory that a training will take, beside the libraries that are loaded already.

    Attributes:
        parameter_bytes: weights, gradients and moments.
        batch_bytes: what the largest batch keeps for its gradient; None = not looked at, since the rest is too much.
        available_bytes: what this process may still take; None = unknown.
    """

    parameter_bytes: int
    batch_bytes: int | None
    available_bytes: int | None

    @property
    def needed_bytes(self) -> int:
        """All of it; at least the parameters'."""
        return self.parameter_bytes + (self.batch_bytes or 0) + LIBRARY_BYTES

    @property
    def fits(self) -> bool:
        """Whether it may be tried; what is not known is tried."""
        return self.available_bytes is None or self.needed_bytes <= self.available_bytes


class SizeTraining:
    """Steps of one size on the training structures of a store, in an order that depends on the seed alone."""

    def __init__(self, size: Size, store_path: Path, batch_structures: int, device: torch.device) -> None:
        """Raises DataError where the store has no edges as long as the size's cutoff."""
        cutoff = size.cutoff_angstrom if isinstance(size, ModelSection) else None
        self._size, self._store, self.device = size, Store(store_path, cutoff), device
        store = self._store
        self._limits = StepLimits(batch_structures)
        self._sampler = Sampler(store.indices(TRAIN), seed=SEED)
        self._settings = TrainingSection()
        self._loader = Loader(store, 0, device, self._settings.prefetch_batches)
        self._scale = torch.tensor(store.meta["energy_scale_ev"], device=device)
        self.n_parameters = count_size(size, store)
        self.model: nn.Module | None = None
        self._optimizer: torch.optim.AdamW | None = None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the memory back, for the next size."""
        self.model = self._optimizer = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def memory_need(self) -> MemoryNeed:
        """What it will take: parameters by their number, the batch by what one structure keeps, times the edges.

        Call it before `prepare`. Where the parameters alone are too much the network is never built.
        """
        available = available_bytes(self.device)
        need = MemoryNeed(PARAMETER_BYTES * self.n_parameters, None, available)
        if not need.fits:
            return need
        edges, atoms = self._largest_batch()
        self.model = build_size(self._size, self._store, self.device, SEED)
        one = self._store.batch(self._typical_structure()).to(self.device)
        kept = bytes_kept(self.model, one)
        share = max(edges / max(one.edge_index.shape[1], 1), atoms / len(one.numbers))
        # Going backward, a gradient as large as the largest of what is kept lives beside it, and its factor.
        return MemoryNeed(need.parameter_bytes, math.ceil(share * (kept.total + 2 * kept.largest)), available)

    def prepare(self) -> None:
        """Build network and optimizer, and take the first step, which loads kernels and makes the moments."""
        if self.model is None:
            self.model = build_size(self._size, self._store, self.device, SEED)
        settings = self._settings
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self._step(self._store.batch(next(self._steps())).to(self.device))
        self.wait()

    def run(self, seconds: float, on_step: Callable[[Progress], None]) -> Progress:
        """Take steps until the time is over; at least one, and a step that has begun is ended."""
        done = Progress()
        began, waited = time.monotonic(), self._loader.wait_seconds
        with self._loader.reading([step] for step in self._steps()) as batches:
            for _, batch in batches:
                self._step(batch)
                self.wait()
                done.add(batch, time.monotonic() - began, self._loader.wait_seconds - waited)
                on_step(done)
                if done.seconds >= seconds:
                    return done
        raise AssertionError("the steps never end")

    def wait(self) -> None:
        """Wait for what the device was told to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _step(self, batch: Batch) -> None:
        if self.model is None or self._optimizer is None:
            raise RuntimeError("prepare comes before the first step")
        settings = self._settings
        prediction: Prediction = self.model.train()(batch)
        energy, force = loss_terms(
            prediction, batch, self._scale, settings.energy_weight, settings.force_weight, settings.loss
        )
        loss = energy / len(batch.n_atoms) + force / batch.force_mask.sum().clamp(min=1)
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), settings.gradient_clip_norm)
        self._optimizer.step()

    def _steps(self) -> Iterator[Any]:
        """The structures of each step, without end."""
        number = 0
        while True:
            yield from cut_into_steps(self._sampler.epoch(number), self._limits, self._store.n_atoms, None)
            number += 1

    def _largest_batch(self) -> tuple[int, int]:
        """Edges and atoms of the steps with the most of them."""
        steps = list(itertools.islice(self._steps(), STEPS_LOOKED_AT))
        edges, atoms = (
            max(int(column[step].sum()) for step in steps) for column in (self._store.n_edges, self._store.n_atoms)
        )
        return edges, atoms

    def _typical_structure(self) -> Any:
        """The training structure whose number of atoms is in the middle: int64 [1]."""
        indices = self._store.indices(TRAIN)
        order = self._store.n_atoms[indices].argsort(kind="stable")
        return indices[order[len(order) // 2]][None]


@dataclass
class Progress:
    """What a training has done in its time; seconds are from the first to the end of the last step."""

    steps: int = 0
    structures: int = 0
    atoms: int = 0
    edges: int = 0
    seconds: float = 0.0
    data_wait_seconds: float = 0.0

    def add(self, batch: Batch, seconds: float, data_wait_seconds: float) -> None:
        """Count one more step, which ended at `seconds`."""
        self.steps += 1
        self.structures += len(batch.n_atoms)
        self.atoms += len(batch.numbers)
        self.edges += batch.edge_index.shape[1]
        self.seconds, self.data_wait_seconds = seconds, data_wait_seconds


@dataclass(frozen=True)
class Kept:
    """Memory of what autograd keeps of a batch, B: all of it, and the largest tensor."""

    total: int
    largest: int


def bytes_kept(model: nn.Module, batch: Batch) -> Kept:
    """What a forward pass keeps for the way back, the weights aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}
    alive: list[Tensor] = []  # or a place that was given back would be taken for another's

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        prediction = model.train()(batch)
        (prediction.energy.sum() + prediction.forces.sum()).detach()
    return Kept(sum(seen.values()), max(seen.values(), default=0))


def available_bytes(device: torch.device) -> int | None:
    """Memory that this process may still take: of its GPU, or of the machine and of the job that it is in."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [int(psutil.virtual_memory().available), *_left_of_cgroups(_CGROUPS)]
    return min(limits)


def _left_of_cgroups(root: Path) -> Iterator[int]:
    """What each group of processes that this one is in may still take; a batch system sets such a limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    paths = [line.split(":", 2)[2].lstrip("/") for line in lines if line.startswith("0::")]
    for path in paths:
        for folder in [root / path, *(root / path).parents]:
            try:
                limit = (folder / "memory.max").read_text(encoding="utf-8").strip()
                used = int((folder / "memory.current").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if limit.isdigit():
                yield max(0, int(limit) - used)
