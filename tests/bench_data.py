"""What ingestion costs in memory and time, and how fast a store is read. Nothing is gated on these figures.

usage: python tests/bench_data.py [ingest|neighbors|reads] [--structures 1000000] [--workers N]
"""

from __future__ import annotations

import argparse
import pickle
import platform
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
import psutil

if TYPE_CHECKING:  # the processes of an ingestion import this file too, and need no torch
    from wattier_gnn.store import Store

SEED = 0
SETTINGS = {
    "max_force_ev_per_angstrom": 100.0, "on_bad": "skip", "split": {"train": 0.8, "val": 0.1, "test": 0.1}, "seed": 1,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=["ingest", "neighbors", "reads"])
    parser.add_argument("--structures", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int)
    options = parser.parse_args()
    from wattier_gnn.ingest import ingest
    from wattier_gnn.sample import SAMPLE_SOURCES, sample_path

    print(
        f"python {platform.python_version()}, numpy {np.__version__}, {psutil.cpu_count()} cores, {platform.machine()}"
    )
    with tempfile.TemporaryDirectory() as folder:
        if options.what in (None, "neighbors", "reads"):
            store = ingest(
                {name: sample_path(name) for name in SAMPLE_SOURCES}, Path(folder) / "sample", cutoff_angstrom=5.0,
                say=lambda _: None, **SETTINGS,
            )  # fmt: skip
        if options.what in (None, "neighbors"):
            neighbors(store)
        if options.what in (None, "reads"):
            reads(store, Path(folder))
        if options.what in (None, "ingest"):
            ingestion(Path(folder), options.structures, options.workers)


def ingestion(folder: Path, n_structures: int, workers: int | None) -> None:
    """Generated molecules in the layout of ANI-1x, eight files: peak memory of all processes, structures a second."""
    from wattier_gnn.ingest import ingest

    source = folder / "ani1x"
    source.mkdir()
    generate(source, n_structures, n_files=8)
    size = sum(file.stat().st_size for file in source.iterdir())
    with Memory() as memory:
        start = time.perf_counter()
        store = ingest({"ani1x": source}, folder / "store", cutoff_angstrom=5.0, say=print, workers=workers, **SETTINGS)
        seconds = time.perf_counter() - start
    whole = sum(file.stat().st_size for file in store.folder.iterdir())
    print(
        f"ingest: {len(store)} structures, {len(store.columns['atoms'])} atoms, {store.edge_offset[-1]} edges, "
        f"{size / 2**20:.0f} MiB read, {whole / 2**20:.0f} MiB written, {seconds:.0f} s, "
        f"{len(store) / seconds:.0f} structures/s; peak of all processes: RSS {memory.peak_rss / 2**20:.0f} MiB, "
        f"PSS {memory.peak_pss / 2**20:.0f} MiB; the largest process {largest_mib():.0f} MiB"
    )


def generate(folder: Path, n_structures: int, n_files: int) -> None:
    """Files of molecules of C, H, N, O with 6 to 20 atoms in 60 formulas each."""
    rng = np.random.default_rng(SEED)
    for number in range(n_files):
        with h5py.File(folder / f"part{number}.h5", "w") as file:
            each = np.diff(np.linspace(0, n_structures // n_files, 61).astype(int))
            for formula, n in enumerate(each):
                numbers = np.concatenate([[1, 6, 7, 8], rng.choice([1, 6, 7, 8], rng.integers(2, 17))]).astype(np.uint8)
                group = file.create_group(f"f{number}_{formula}")
                group["atomic_numbers"] = numbers
                frame = 1.4 * rng.integers(0, 4, (len(numbers), 3))
                group["coordinates"] = (frame + rng.normal(0, 0.3, (n, len(numbers), 3))).astype(np.float32)
                energies = -20.0 * numbers.astype(float).sum() + rng.normal(0, 0.1, n)
                group["wb97x_dz.energy"] = energies
                group["wb97x_dz.forces"] = rng.normal(0, 0.03, (n, len(numbers), 3)).astype(np.float32)


class Memory:
    """The peak memory of this process and its children while the block runs, by looking five times a second."""

    def __init__(self) -> None:
        self.peak_rss = self.peak_pss = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.2):
            rss = pss = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    info = process.memory_full_info()
                except psutil.Error:
                    continue
                rss, pss = rss + info.rss, pss + info.pss
            self.peak_rss, self.peak_pss = max(self.peak_rss, rss), max(self.peak_pss, pss)


def largest_mib() -> float:
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024


def neighbors(store: Store) -> None:
    """Our neighbour lists (vesin's, sorted, in our layout) against ASE's, on crystals and slabs of the sample."""
    from ase import Atoms
    from ase.neighborlist import neighbor_list

    from wattier_gnn.neighbors import find_edges
    from wattier_gnn.structure import Structure

    rng = np.random.default_rng(SEED)
    chosen = rng.choice(np.flatnonzero(store.source_index >= 2), 100, replace=False)
    structures, atoms = [], []
    for k in chosen:
        a = store.gather([k], edges=False)
        structures.append(
            Structure(
                a["numbers"].astype(np.int64),
                a["positions"],
                a["cells"][0],
                tuple(a["pbc"][0].tolist()),
                0.0,
                None,
                "a",
                "g",
                "k",
            )
        )
        atoms.append(Atoms(a["numbers"], a["positions"], cell=a["cells"][0], pbc=a["pbc"][0]))
    compare(
        "neighbours of 100 periodic structures",
        ("ASE", lambda: [neighbor_list("ijS", a, 5.0) for a in atoms]),
        ("ours", lambda: [find_edges(s, 5.0) for s in structures]),
        repeats=5,
    )


def reads(store: Store, folder: Path) -> None:
    """Random structures from the memory map, and from LMDBs of pickled records of the same arrays, or tensors."""
    import torch

    arrays = read_from(folder / "arrays.lmdb", [pickle.dumps(store.gather([k])) for k in range(len(store))])
    tensors = read_from(
        folder / "tensors.lmdb",
        [pickle.dumps({k: torch.from_numpy(v) for k, v in store.gather([n]).items()}) for n in range(len(store))],
    )
    rng = np.random.default_rng(SEED)
    for size in (1, 32):
        draws = [rng.integers(0, len(store), size) for _ in range(100)]
        compare(
            f"100 random reads of {size}",
            ("LMDB of pickled tensors", lambda draws=draws: [tensors(d) for d in draws]),
            ("LMDB of pickled arrays", lambda draws=draws: [arrays(d) for d in draws]),
            ("store", lambda draws=draws: [store.gather(d) for d in draws]),
            repeats=9,
        )
    compare("100 batches of 32", ("store", lambda: [store.batch(d) for d in draws]), repeats=9)


def read_from(path: Path, records: list[bytes]) -> Callable[[np.ndarray], object]:
    """Reads some records of an LMDB that is made of them."""
    import lmdb

    with lmdb.open(str(path), subdir=False, map_size=1 << 32) as environment, environment.begin(write=True) as write:
        for k, record in enumerate(records):
            write.put(str(k).encode(), record)
    transaction = lmdb.open(str(path), subdir=False, readonly=True, lock=False).begin()
    return lambda indices: [pickle.loads(transaction.get(str(k).encode())) for k in indices]


def compare(what: str, *sides: tuple[str, Callable[[], object]], repeats: int) -> None:
    """Median seconds of each side, taken in turns, and what the last is worth against each."""
    seconds: dict[str, list[float]] = {name: [] for name, _ in sides}
    for _ in range(repeats):
        for name, run in sides:
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    last = medians[sides[-1][0]]
    print(f"{what}: " + ", ".join(f"{name} {1e3 * m:.1f} ms ({m / last:.1f} times)" for name, m in medians.items()))


if __name__ == "__main__":
    main()
