"""OC20 S2EF as released: ``N.extxyz.xz`` with the frames and ``N.txt.xz`` with one line of ids a frame.

Chanussot et al., "Open Catalyst 2020 (OC20) dataset and community challenges", ACS Catal. 11, 6059 (2021).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from wattier_gnn.datasets.extxyz import frame_texts, iterate_frames, labels
from wattier_gnn.datasets.shard import STREAM_ERRORS, Reader, cell_or_none, find_shards, open_text, shard_error
from wattier_gnn.structure import Structure


def shards(path: Path) -> list[Path]:
    """The frame files under `path` (see `find_shards`)."""
    return find_shards(path, (".extxyz", ".extxyz.xz"))


def read(path: Path) -> Iterator[Structure]:
    """All frames of a shard; a shard that is damaged or does not match its ids yields none at all.

    The released 20M split holds shards with fewer frames than ids. Which id belongs to which frame is then unknown, and
    with it the system a frame must not be split from, so frames and ids are counted before the first one is parsed.

    Raises:
        ShardError: the shard is truncated, or its frames and ids differ in number.
    """
    ids = _read_ids(path)
    n_frames = sum(1 for _ in frame_texts(path))
    if n_frames != len(ids):
        raise shard_error(path, "", f"has {n_frames} frames for {len(ids)} lines of ids", "a shard with one id a frame")
    for index, (atoms, (system, frame)) in enumerate(zip(iterate_frames(path), ids, strict=True)):
        energy_ev, forces = labels(path, index, atoms)
        yield Structure(
            numbers=atoms.numbers.astype(np.int64),
            positions_angstrom=atoms.positions.astype(np.float64),
            cell_angstrom=cell_or_none(np.array(atoms.cell, dtype=np.float64)),
            pbc=tuple(atoms.pbc.tolist()),
            energy_ev=energy_ev,
            forces_ev_per_angstrom=forces,
            source="oc20",
            group=system,
            key=f"{system}/{frame}",
        )


def _read_ids(path: Path) -> list[tuple[str, str]]:
    """(system, frame) for each line ``random17,frame3,<reference energy>`` of the file beside `path`."""
    base = path.name.removesuffix(".xz").removesuffix(".extxyz")
    candidates = [path.with_name(base + ".txt"), path.with_name(base + ".txt.xz")]
    beside = next((file for file in candidates if file.is_file()), None)
    if beside is None:
        raise shard_error(
            path, "", f"has no {candidates[1].name} beside it", "released with one, which names its frames"
        )
    try:
        with open_text(beside) as stream:
            lines = stream.read().splitlines()
    except STREAM_ERRORS as error:
        raise shard_error(beside, "", f"cannot be read: {error}", "a whole file") from error
    ids = []
    for number, line in enumerate(lines, start=1):
        fields = line.split(",")
        if len(fields) < 2:
            raise shard_error(beside, f"line {number}", f"is {line[:40]!r}", "'random<system>,frame<number>,<eV>'")
        ids.append((fields[0], fields[1]))
    return ids


READER = Reader(
    "oc20", shards, read, "energy (DFT total, eV, no reference subtracted) and raw forces, of fixed atoms too"
)
