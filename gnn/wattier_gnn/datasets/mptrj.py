"""MPtrj as released: one JSON object ``{material: {frame: {structure, energies, force, ...}}}``, 11 GB in all.

Deng et al., "CHGNet as a pretrained universal neural network potential", Nat. Mach. Intell. 5, 1031 (2023), figshare
23713842. Read material by material: the whole file as Python objects would take several times its size in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from ase.data import atomic_numbers
from numpy.typing import NDArray

from wattier_gnn.datasets.shard import STREAM_ERRORS, Reader, checked_array, find_shards, open_text, shard_error
from wattier_gnn.structure import Structure

CHUNK_CHARACTERS = 4 << 20
# A JSON error this far from the end of what has been read cannot be cured by reading more (the longest strings, names
# and numbers of the release are far shorter).
LONGEST_TOKEN_CHARACTERS = 4096
# Fractional and Cartesian coordinates of the release agree to 1e-6 Å; a transposed lattice is off by whole ångströms.
COORDINATE_TOLERANCE_ANGSTROM = 1e-3

_SEPARATORS = re.compile(r"[\s,]*")
_COLON = re.compile(r"\s*:\s*")


def shards(path: Path) -> list[Path]:
    """The JSON files under `path` (see `find_shards`)."""
    return find_shards(path, (".json", ".json.gz"))


def read(path: Path) -> Iterator[Structure]:
    """All frames of all materials, as far as the file can be read.

    Raises:
        ShardError: the file is truncated, malformed, or a frame lacks a field.
    """
    try:
        with open_text(path) as stream:
            for material, frames in _iterate_object(path, stream):
                if not isinstance(frames, dict):
                    raise shard_error(path, material, f"is a {type(frames).__name__}", "an object of frames")
                for frame_id, frame in frames.items():
                    yield _structure(path, material, frame_id, frame)
    except STREAM_ERRORS as error:
        raise shard_error(path, "", f"cannot be read: {error}", "a whole file") from error


def _iterate_object(path: Path, stream: TextIO) -> Iterator[tuple[str, Any]]:
    """The members of the JSON object that the stream holds, one at a time."""
    text = stream.read(CHUNK_CHARACTERS).lstrip()
    if not text.startswith("{"):
        raise shard_error(path, "", f"starts with {text[:20]!r}", "a JSON object of materials")
    at, last = 1, "the start"
    while True:
        at = _end_of(_SEPARATORS, text, at)
        if text[at : at + 1] == "}":
            return
        try:
            name, value, at = _member(text, at)
        except json.JSONDecodeError as error:
            more = "" if error.pos < len(text) - LONGEST_TOKEN_CHARACTERS else stream.read(CHUNK_CHARACTERS)
            if not more:
                what_is = f"is truncated or malformed: {error.msg}"
                raise shard_error(path, f"after {last}", what_is, "a whole JSON object") from error
            text, at = text[at:] + more, 0
            continue
        last = str(name)
        yield last, value


def _member(text: str, at: int) -> tuple[Any, Any, int]:
    decoder = json.JSONDecoder()
    name, at = decoder.raw_decode(text, at)
    colon = _COLON.match(text, at)
    if colon is None:
        raise json.JSONDecodeError("Expecting ':'", text, at)
    value, at = decoder.raw_decode(text, colon.end())
    return name, value, at


def _end_of(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return at if match is None else match.end()


def _structure(path: Path, material: str, frame_id: str, frame: Any) -> Structure:
    inside = f"{material}/{frame_id}"
    try:
        sites = frame["structure"]["sites"]
        matrix = frame["structure"]["lattice"]["matrix"]
        energy, force = frame["corrected_total_energy"], frame["force"]
        symbols = [site["species"][0]["element"] for site in sites]
        fractional = [site["abc"] for site in sites]
        cartesian = [site["xyz"] for site in sites if "xyz" in site]
    except (KeyError, TypeError, IndexError) as error:
        raise shard_error(path, inside, f"lacks {error}", "a frame of the MPtrj release") from error
    shape = (len(sites), 3)
    cell = checked_array(path, f"{inside}/structure/lattice/matrix", matrix, (3, 3), np.float64)
    positions = checked_array(path, f"{inside}/structure/sites/abc", fractional or np.empty((0, 3)), shape, np.float64)
    positions = positions @ cell
    if cartesian:
        given = checked_array(path, f"{inside}/structure/sites/xyz", cartesian, shape, np.float64)
        _check_coordinates(path, inside, positions, given)
    return Structure(
        # 0 stands for a symbol that is no element: cleaning counts it.
        numbers=np.array([atomic_numbers.get(symbol, 0) for symbol in symbols], dtype=np.int64),
        positions_angstrom=positions,
        cell_angstrom=cell,
        pbc=(True, True, True),
        energy_ev=float(checked_array(path, f"{inside}/corrected_total_energy", [energy], (1,), np.float64)[0]),
        forces_ev_per_angstrom=checked_array(path, f"{inside}/force", force or np.empty((0, 3)), shape, np.float64),
        source="mptrj",
        group=material,
        key=frame_id,
    )


def _check_coordinates(path: Path, inside: str, positions: NDArray[np.float64], given: NDArray[np.float64]) -> None:
    apart = float(np.abs(positions - given).max())
    if apart > COORDINATE_TOLERANCE_ANGSTROM:
        what_is = f"has xyz that are up to {apart:.3g} Å from abc @ lattice.matrix"
        raise shard_error(path, inside, what_is, "the same positions twice")


READER = Reader("mptrj", shards, read, "corrected_total_energy (MP2020, eV) and force (eV/Å)")
