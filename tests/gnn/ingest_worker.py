"""An ingestion that dies: ``ingest_worker.py FOLDER WHERE WORKERS``; or that says what memory it took.

WHERE is ``part`` (after the third part), ``merge`` (after the second commit) or ``pool`` (when a child has finished its
first part; FOLDER.pids then names the children), each by SIGKILL.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from wattier_gnn import ingest as ingest_module
from wattier_gnn import manifest, merge, parts
from wattier_gnn.columns import Appender
from wattier_gnn.datasets import Reader
from wattier_gnn.ingest import ingest
from wattier_gnn.sample import sample_path
from wattier_gnn.structure import Structure

SOURCES = ("oc22", "qm7x", "ani1x")


def run(folder: Path, **options: Any) -> None:
    """Three sources of the sample in small parts, a commit for each file."""
    parts.PART_STRUCTURES, merge.COMMIT_BYTES = 100, 1
    ingest(
        {name: sample_path(name) for name in SOURCES}, folder, cutoff_angstrom=2.5, max_force_ev_per_angstrom=100.0,
        on_bad="skip", split={"train": 0.8, "val": 0.1, "test": 0.1}, seed=1, say=lambda _: None, **options,
    )  # fmt: skip


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_parts(folder: Path) -> None:
    def progress(_: object) -> None:
        if len(list((folder / ".ingest").rglob("*.safetensors"))) >= 3:
            die()

    run(folder, workers=1, progress=progress)


def die_in_merge(folder: Path) -> None:
    flush, commits = Appender.flush, iter(range(100))

    def flush_or_die(self: Appender) -> None:
        if next(commits) == 2:
            die()
        flush(self)

    Appender.flush = flush_or_die  # type: ignore[method-assign]
    run(folder, workers=1)


def die_over_a_pool(folder: Path) -> None:
    def progress(_: object) -> None:
        children = multiprocessing.active_children()
        if children and list((folder / ".ingest").rglob("*.safetensors")):
            folder.with_suffix(".pids").write_text(" ".join(str(child.pid) for child in children))
            die()

    run(folder, workers=2, progress=progress)


def say_memory(folder: Path) -> None:
    """Peak memory [KiB] after an ingestion of 1,000 structures, and after one of 20,000 more."""
    parts.PART_BYTES, manifest.CHUNK_STRUCTURES = 1 << 20, 500

    def read(path: Path) -> Iterator[Structure]:
        rng = np.random.default_rng(0)
        for k in range(int(path.read_text())):
            yield Structure(
                numbers=np.array([6] * 12),
                positions_angstrom=rng.normal(0, 2, (12, 3)),
                cell_angstrom=None,
                pbc=(False, False, False),
                energy_ev=float(rng.normal()),
                forces_ev_per_angstrom=rng.normal(size=(12, 3)),
                source="toy",
                group=str(k // 10),
                key=str(k),
            )

    readers = {"toy": Reader("toy", lambda path: [path], read, "none")}
    parts.READERS = ingest_module.READERS = readers  # type: ignore[misc, attr-defined, assignment]
    folder.mkdir()
    for n in (1000, 20_000):
        (folder / f"{n}.toy").write_text(str(n))
        ingest(
            {"toy": folder / f"{n}.toy"}, folder / str(n), cutoff_angstrom=5.0, max_force_ev_per_angstrom=100.0,
            on_bad="refuse", split={"train": 0.8, "val": 0.1, "test": 0.1}, seed=1, say=lambda _: None, workers=1,
        )  # fmt: skip
        sys.stdout.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}\n")


if __name__ == "__main__":
    {"part": die_after_parts, "merge": die_in_merge, "pool": die_over_a_pool, "memory": say_memory}[sys.argv[2]](
        Path(sys.argv[1])
    )
