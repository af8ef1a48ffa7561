"""A store larger than a node's memory: each rank loads a share once, and batches are exchanged between ranks.

All ranks know which structures every rank needs in a step, and how large each is. So shares travel in one exchange, and
nobody has to ask. The role of DDStore (Choi et al., "DDStore: Distributed data store for scalable training of graph
neural networks on large atomistic modeling datasets", SC-W 2023), without MPI.
"""

from __future__ import annotations

import datetime
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from wattier_gnn.arrays import COLUMNS
from wattier_gnn.batch import Batch
from wattier_gnn.columns import read_rows
from wattier_gnn.distributed import TIMEOUT_SECONDS, World
from wattier_gnn.store import Store, rows_of


class SpreadStore(Store):
    """A store whose atoms and edges lie in the memory of all ranks together; columns of structures stay mapped.

    `batch_of` is a collective: every rank calls it in every step, one with nothing to do too, and always from the same
    thread. It has a process group of its own, on the CPU where the data are, so that it may run beside the gradients'.
    Everything else reads the folder as a `Store` does.
    """

    is_collective = True

    def __init__(self, folder: Path, world: World, cutoff_angstrom: float | None = None) -> None:
        """Load this rank's share; all ranks together, inside of `distributed.process_group`.

        Edges beyond a cutoff smaller than the store's are exchanged all the same, and dropped on arrival.

        Raises:
            DataError: as for `Store`.
        """
        super().__init__(folder, cutoff_angstrom)
        # Structures of rank r: bounds[r] to bounds[r + 1], so that every rank holds as many bytes.
        shares = np.linspace(0, self._bytes_before(len(self)), world.size + 1)[1:-1]
        inner = [bisect_left(range(len(self)), share, key=self._bytes_before) for share in shares]
        self.bounds = np.array([0, *inner, len(self)])
        self._rank = world.rank
        self._first, stop = self.bounds[world.rank : world.rank + 2].tolist()
        self._share = {
            name: read_rows(folder, name, int(offset[self._first]), int(offset[stop]))
            for name, offset in self._records().items()
        }
        timeout = datetime.timedelta(seconds=TIMEOUT_SECONDS)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if world.size > 1 else None

    def batch_of(self, parts: Sequence[Any], rank: int) -> Batch:
        """This rank's batch of a step, given every rank's indices; a collective."""
        parts = [np.asarray(part, dtype=np.int64) for part in parts]
        records = {name: self._exchanged(name, offset, parts) for name, offset in self._records().items()}
        return self.joined(self.unpacked(parts[rank], records["atoms"], records.get("edges")))

    def _bytes_before(self, index: int) -> int:
        return sum(COLUMNS[name].row_bytes * int(offset[index]) for name, offset in self._records().items())

    def _records(self) -> dict[str, Any]:
        """The columns that are spread, with the offsets of their structures."""
        kept = {} if self.finds_edges else {"edges": self.edge_offset}
        return {"atoms": self.atom_offset, **kept}

    def _exchanged(self, name: str, offset: Any, parts: Sequence[Any]) -> Any:
        """The records of this rank's structures in the order of its indices; what others need of ours is sent."""
        column = self._share[name]
        local = offset[self._first : int(self.bounds[self._rank + 1]) + 1] - offset[self._first]
        sent = [rows_of(column, local, mine - self._first) for mine in (self._of(p, self._rank) for p in parts)]
        wanted = [self._of(parts[self._rank], rank) for rank in range(len(parts))]
        sizes = [int((offset[w + 1] - offset[w]).sum()) for w in wanted]
        size = column.dtype.itemsize
        received = torch.empty(sum(sizes) * size, dtype=torch.uint8)
        outgoing = torch.from_numpy(np.concatenate(sent).view(np.uint8))
        if self._group is None:
            received.copy_(outgoing)
        else:
            dist.all_to_all_single(
                received, outgoing, [n * size for n in sizes], [len(s) * size for s in sent], group=self._group
            )
        return self._in_order(received.numpy().view(column.dtype), offset, parts[self._rank], wanted)

    def _of(self, part: Any, rank: int) -> Any:
        """Those structures of a part that lie with one rank, in the order of the part."""
        return part[(part >= self.bounds[rank]) & (part < self.bounds[rank + 1])]

    def _in_order(self, records: Any, offset: Any, part: Any, wanted: Sequence[Any]) -> Any:
        """Records that came rank by rank, put in the order of the part."""
        came = np.concatenate(wanted)
        n_rows = offset[came + 1] - offset[came]
        ends = np.concatenate([[0], np.cumsum(n_rows)])
        place = np.empty(len(part), dtype=np.int64)
        place[np.argsort(self._owner(part), kind="stable")] = np.arange(len(part))
        return rows_of(records, ends, place)

    def _owner(self, part: Any) -> Any:
        return np.searchsorted(self.bounds, part, side="right")
