"""OC20 S2EF in both its layouts: ``N.extxyz.xz`` with ``N.txt.xz`` (the release), and what fairchem makes of it.

The release has the frames in the one file and a line of ids a frame in the other; fairchem's preprocessing turns them
into LMDB files. Chanussot et al., "Open Catalyst 2020 (OC20) dataset and community challenges", ACS Catal. 11, 6059
(2021).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from wattier_gnn.datasets.extxyz import frame_structure, frame_texts
from wattier_gnn.datasets.fairchem import Names, read_aselmdb, read_lmdb
from wattier_gnn.datasets.shard import (
    STREAM_ERRORS,
    Identity,
    Reader,
    find_shards,
    one_layout,
    open_text,
    or_bad,
    shard_error,
)
from wattier_gnn.structure import BadRecord, Structure

NAMES = Names("oc20", "random{sid}", "random{sid}/frame{fid}")
# A line of ids is 40 characters long, and a shard of the release has 5,000 of them.
MOST_ID_CHARACTERS = 64 << 20


def shards(path: Path) -> list[Path]:
    """The frame or LMDB files under `path` (see `find_shards`), all of one layout."""
    return one_layout(path, find_shards(path, (".extxyz", ".extxyz.xz", ".lmdb", ".aselmdb")))


def read(path: Path) -> Iterator[Structure | BadRecord]:
    """All frames of a shard; one whose frames and ids differ in number yields none at all.

    Raises:
        ShardError: the shard is truncated, or its frames and ids differ in number.
    """
    if path.suffix == ".lmdb":
        return read_lmdb(path, NAMES)
    return read_aselmdb(path, NAMES) if path.suffix == ".aselmdb" else _read_frames(path)


def _read_frames(path: Path) -> Iterator[Structure | BadRecord]:
    # The released 20M split holds shards with fewer frames than ids. Which id belongs to which frame is then unknown,
    # and with it the system a frame must not be split from: they are counted before the first one is parsed.
    ids = _read_ids(path)
    n_frames = sum(1 for _ in frame_texts(path))
    if n_frames != len(ids):
        raise shard_error(path, "", f"has {n_frames} frames for {len(ids)} lines of ids", "a shard with one id a frame")
    for index, (text, (system, frame)) in enumerate(zip(frame_texts(path), ids, strict=True)):
        yield or_bad(path, partial(frame_structure, path, index, text, Identity("oc20", system, f"{system}/{frame}")))


def _read_ids(path: Path) -> list[tuple[str, str]]:
    """(system, frame) for each line ``random17,frame3,<reference energy>`` of the file beside `path`."""
    beside = next(iter(_ids_beside(path)), None)
    if beside is None:
        raise shard_error(
            path, "", f"has no {_base(path)}.txt.xz beside it", "released with one, which names its frames"
        )
    try:
        with open_text(beside) as stream:
            text = stream.read(MOST_ID_CHARACTERS + 1)
        if len(text) > MOST_ID_CHARACTERS:
            raise shard_error(beside, "", f"has more than {MOST_ID_CHARACTERS:,} characters", "lines of ids")
        lines = text.splitlines()
    except STREAM_ERRORS as error:
        raise shard_error(beside, "", f"cannot be read: {error}", "a whole file") from error
    ids = []
    for number, line in enumerate(lines, start=1):
        fields = line.split(",")
        if len(fields) < 2:
            raise shard_error(beside, f"line {number}", f"is {line[:40]!r}", "'random<system>,frame<number>,<eV>'")
        ids.append((fields[0], fields[1]))
    return ids


def _ids_beside(path: Path) -> list[Path]:
    """The file of ids of a file of frames, unpacked rather than packed; none where it is missing, or not due."""
    if path.suffix in (".lmdb", ".aselmdb"):
        return []
    candidates = [path.with_name(f"{_base(path)}.txt"), path.with_name(f"{_base(path)}.txt.xz")]
    return [file for file in candidates if file.is_file()][:1]


def _base(path: Path) -> str:
    return path.name.removesuffix(".xz").removesuffix(".extxyz")


READER = Reader(
    "oc20",
    shards,
    read,
    "energy (DFT total, eV, no reference subtracted) and raw forces, of fixed atoms too; of LMDB files the energy that "
    "the preprocessing wrote (y or `energy`: with --ref-energy it is the adsorption energy)",
    method="RPBE (VASP), alloy slabs with adsorbates",
    licence="CC-BY-4.0",
    citation="Chanussot et al., ACS Catal. 11, 6059 (2021), doi:10.1021/acscatal.0c04525",
    one_layout=True,
    beside=_ids_beside,
)
