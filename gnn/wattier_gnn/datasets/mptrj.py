"""MPtrj as released: one JSON object ``{material: {frame: {structure, energies, force, ...}}}``, 11 GB in all.

Deng et al., "CHGNet as a pretrained universal neural network potential", Nat. Mach. Intell. 5, 1031 (2023), figshare
23713842. Read frame by frame: the whole file as Python objects would take several times its size in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers
from numpy.typing import NDArray

from wattier_gnn.datasets.json_stream import JsonStream
from wattier_gnn.datasets.shard import (
    STREAM_ERRORS,
    Reader,
    checked_array,
    find_shards,
    open_text,
    or_bad,
    shard_error,
)
from wattier_gnn.structure import BadRecord, Structure

# Fractional and Cartesian coordinates of the release agree to 1e-6 Å; a transposed lattice is off by whole ångströms.
COORDINATE_TOLERANCE_ANGSTROM = 1e-3


def shards(path: Path) -> list[Path]:
    """The JSON files under `path` (see `find_shards`)."""
    return find_shards(path, (".json", ".json.gz"))


def read(path: Path) -> Iterator[Structure | BadRecord]:
    """All frames of all materials, as far as the file can be read.

    Raises:
        ShardError: the file is truncated or is no JSON.
    """
    try:
        with open_text(path) as stream:
            document = JsonStream(path, stream)
            for material in document.members():
                if document.peek() != "{":
                    kind = type(document.value()).__name__
                    yield BadRecord(str(shard_error(path, material, f"is a {kind}", "an object of frames")))
                    continue
                for frame_id in document.members():
                    yield or_bad(path, partial(_structure, path, material, frame_id, document.value()))
    except STREAM_ERRORS as error:
        raise shard_error(path, "", f"cannot be read: {error}", "a whole file") from error


def _structure(path: Path, material: str, frame_id: str, frame: Any) -> Structure:
    inside = f"{material}/{frame_id}"
    try:
        sites = frame["structure"]["sites"]
        matrix = frame["structure"]["lattice"]["matrix"]
        energy, force = frame["corrected_total_energy"], frame["force"]
        symbols = [site["species"][0]["element"] for site in sites]
        fractional = [site["abc"] for site in sites]
        cartesian = [site["xyz"] for site in sites if "xyz" in site]
        # 0 stands for a symbol that is no element: cleaning counts it.
        numbers = np.array([atomic_numbers.get(symbol, 0) for symbol in symbols], dtype=np.int64)
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
        numbers=numbers,
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


READER = Reader(
    "mptrj",
    shards,
    read,
    "corrected_total_energy (MP2020, eV) and force (eV/Å)",
    method="PBE and PBE+U (VASP, Materials Project settings), energies with the MP2020 corrections",
    licence="MIT; underlying Materials Project data CC-BY-4.0",
    citation="Deng et al., Nat. Mach. Intell. 5, 1031 (2023), doi:10.1038/s42256-023-00716-3",
)
