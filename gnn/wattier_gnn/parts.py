"""One released file becomes parts: runs of cleaned structures with their edges, each a file written whole.

A part is closed by what it holds alone, so that a conversion that was killed and begun again leaves the same parts.
Memory is that of one part and of whatever the reader holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from wattier_gnn.arrays import ATOM, EDGE, concatenated, pack_atoms, pack_edges, pack_texts
from wattier_gnn.cleaning import CleaningReport, ForceNorm, removal_reason
from wattier_gnn.datasets import READERS
from wattier_gnn.files import sha256_of, write_file, write_text
from wattier_gnn.neighbors import Edges, find_edges
from wattier_gnn.structure import BadRecord, DataError, ShardError, Structure

PART_STRUCTURES = 10_000
PART_BYTES = 16 << 20
DONE = "shard.json"
HOW_TO_SKIP = "To go on without what cannot be read, set data.on_bad: skip, or give --skip-bad."

Neighbors = Literal["precomputed", "on_the_fly"]
OnBad = Literal["refuse", "skip"]


@dataclass(frozen=True)
class Recipe:
    """What decides, beside the file itself, what a file becomes.

    neighbors: precomputed keeps the edges; on_the_fly keeps their number alone, and they are found again in each batch.
    """

    cutoff_angstrom: float
    max_force_ev_per_angstrom: float
    force_norm: ForceNorm = "per_atom"
    neighbors: Neighbors = "precomputed"


@dataclass(frozen=True)
class Stamp:
    """A file as it lay there at a moment."""

    path: Path
    n_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Raises DataError where there is no such file."""
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}), but must be a file. Check the path."
            ) from error
        return cls(path.absolute(), status.st_size, status.st_mtime_ns)

    def about(self, sha256: str) -> dict[str, Any]:
        """What a manifest says of the file."""
        return {
            "name": self.path.name,
            "path": str(self.path),
            "bytes": self.n_bytes,
            "modified_ns": self.modified_ns,
            "sha256": sha256,
        }

    def is_still(self, about: Mapping[str, Any]) -> bool:
        """Whether it is the file that a manifest tells of: one that was only touched is."""
        if self.n_bytes != about["bytes"]:
            return False
        return bool(self.modified_ns == about["modified_ns"] or sha256_of(self.path) == about["sha256"])


@dataclass(frozen=True)
class Shard:
    """One file of one source, and those that are read with it, as they lay there when the ingestion began."""

    source: str
    file: Stamp
    beside: tuple[Stamp, ...]

    @classmethod
    def of(cls, source: str, path: Path) -> Shard:
        """Raises DataError where there is no such file."""
        return cls(source, Stamp.of(path), tuple(map(Stamp.of, READERS[source].beside(path))))

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def n_bytes(self) -> int:
        return self.file.n_bytes

    def about(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What a manifest says of the file and those beside it, given its ``shard.json``."""
        beside = [file.about(sha256) for file, sha256 in zip(self.beside, record["beside"], strict=True)]
        return {"source": self.source, **self.file.about(record["sha256"])} | ({"beside": beside} if beside else {})

    def is_still(self, about: Mapping[str, Any]) -> bool:
        """Whether all is as a manifest says."""
        beside = about.get("beside", ())
        return (
            self.file.is_still(about)
            and len(self.beside) == len(beside)
            and all(file.is_still(other) for file, other in zip(self.beside, beside, strict=True))
        )

    @property
    def id(self) -> str:
        """Names the folder of its parts; another one when a file has changed."""
        files = (f"\0{file.path}\0{file.n_bytes}\0{file.modified_ns}" for file in (self.file, *self.beside))
        return hashlib.sha256((self.source + "".join(files)).encode()).hexdigest()[:20]


class Part(NamedTuple):
    """A finished part: `read_through` items of the reader are behind it, `report` counts those of this part."""

    path: Path
    read_through: int
    report: CleaningReport
    is_last: bool  # nothing is to be read behind it


def convert(shard: Shard, recipe: Recipe, on_bad: OnBad, folder: Path, told: Callable[[], None] | None = None) -> None:
    """Turn a file into parts in ``folder/<id>``, closed by a ``shard.json``; goes on after the last part that is there.

    Args:
        shard: the file.
        recipe: how structures are cleaned and joined.
        on_bad: refuse stops at the first record or file that cannot be read; skip counts it and goes on.
        folder: of all parts.
        told: called after each part.

    Raises:
        DataError: the first thing that cannot be read, where `on_bad` is refuse.
    """
    place = folder / shard.id
    if (place / DONE).exists():
        _hold_to(on_bad, CleaningReport.from_dict(json.loads((place / DONE).read_text())["report"]))
        return
    place.mkdir(parents=True, exist_ok=True)
    done = finished_parts(place)
    report = CleaningReport()
    for part in done:
        report.add(part.report)
    _hold_to(on_bad, report)
    hashes = [sha256_of(file.path) for file in (shard.file, *shard.beside)]
    n_parts = len(done)
    if not done or not done[-1].is_last:
        for block in _blocks(shard, recipe, on_bad, done[-1].read_through if done else 0):
            _write_part(place / part_name(n_parts, block.read_through), block, recipe)
            report.add(block.report)
            n_parts += 1
            if told is not None:
                told()
    if Shard.of(shard.source, shard.path) != shard:
        raise DataError(f"{shard.path}: changed while it was read, but must stay as it is. Run the same command again.")
    record = {"sha256": hashes[0], "beside": hashes[1:], "parts": n_parts, "report": report.to_dict()}
    write_text(place / DONE, json.dumps(record))


def finished_parts(place: Path) -> list[Part]:
    """The parts of a shard in order, as far as they are without a gap."""
    parts = []
    for number, path in enumerate(sorted(place.glob("*.safetensors"))):
        if int(path.name.split("-")[0]) != number:
            break
        with _opened(path) as file:
            info = json.loads(file.metadata()["info"])
        parts.append(Part(path, info["read_through"], CleaningReport.from_dict(info["report"]), info["is_last"]))
    return parts


def part_name(number: int, read_through: int) -> str:
    """Says in its name how far the reader was, so that progress can be seen without opening it."""
    return f"{number:06d}-{read_through}.safetensors"


def part_tensors(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Some arrays of a part; atoms and edges as records.

    Raises:
        DataError: the file is damaged.
    """
    records = {"atoms": ATOM, "edges": EDGE}
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in names}
    return {name: t.view(records[name]) if name in records else t for name, t in tensors.items()}


class _Block:
    """Structures on their way into one part."""

    def __init__(self, read_through: int) -> None:
        self.structures: list[Structure] = []
        self.edges: list[Edges] = []
        self.report = CleaningReport()
        self.read_through = read_through
        self.is_last = False
        self.n_bytes = 0

    def add(self, structure: Structure, edges: Edges) -> None:
        self.structures.append(structure)
        self.edges.append(edges)
        self.n_bytes += 200 + 50 * len(structure.numbers) + 14 * edges.index.shape[1]

    @property
    def is_full(self) -> bool:
        return len(self.structures) >= PART_STRUCTURES or self.n_bytes >= PART_BYTES


def _blocks(shard: Shard, recipe: Recipe, on_bad: OnBad, skip: int) -> Iterator[_Block]:
    """The structures of a file in runs; the last one may be empty but for its counts."""
    block = _Block(skip)
    reader = READERS[shard.source]
    try:
        for item in islice(reader.read(shard.path), skip, None):
            block.read_through += 1
            if isinstance(item, BadRecord):
                if on_bad == "refuse":
                    raise ShardError(item.message)
                block.report.count_bad_record(shard.source, item.message)
            else:
                _sift(item, shard.source, recipe, block)
            if block.is_full:
                yield block
                block = _Block(block.read_through)
    except DataError as error:
        if on_bad == "refuse":
            raise DataError(f"{str(error).removesuffix('.')}. {HOW_TO_SKIP}") from error
        block.report.count_bad_shard(shard.source, str(error))
    block.is_last = True
    yield block


def _hold_to(on_bad: OnBad, report: CleaningReport) -> None:
    """Refuse what an interrupted ingestion skipped, where this one must not."""
    found = [
        message for of in (report.bad_records, report.bad_shards) for messages in of.values() for message in messages
    ]
    if on_bad == "refuse" and found:
        raise DataError(f"{found[0].removesuffix('.')}. {HOW_TO_SKIP}")


def _sift(structure: Structure, source: str, recipe: Recipe, block: _Block) -> None:
    reason = removal_reason(structure, recipe.max_force_ev_per_angstrom, recipe.force_norm)
    if reason is None:
        try:
            block.add(structure, find_edges(structure, recipe.cutoff_angstrom))
        except DataError:
            reason = "atoms outside their cell"
    block.report.count(source, reason)


def _write_part(path: Path, block: _Block, recipe: Recipe) -> None:
    arrays = concatenated(block.structures, block.edges, [0] * len(block.structures))
    tensors = {name: arrays[name] for name in ("cells", "pbc", "energy", "atom_offset", "edge_offset")}
    tensors["atoms"] = pack_atoms(arrays).view(np.uint8)
    tensors["edges"] = pack_edges(arrays).view(np.uint8)[: None if recipe.neighbors == "precomputed" else 0]
    tensors["keys"], tensors["key_offset"] = pack_texts([s.key for s in block.structures])
    groups = list(dict.fromkeys(s.group for s in block.structures))  # as they come: parts of any size number them alike
    row = {name: k for k, name in enumerate(groups)}
    tensors["group"] = np.array([row[s.group] for s in block.structures], dtype=np.int32)
    tensors["group_names"], tensors["group_offset"] = pack_texts(groups)
    info = {"read_through": block.read_through, "is_last": block.is_last, "report": block.report.to_dict()}
    data = save(tensors, metadata={"info": json.dumps(info)})  # `save_file` would make it unreadable to others
    write_file(path, lambda temporary: temporary.write_bytes(data))


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: not a readable part ({error}). Remove its folder, it will be made again.") from error
