"""One labelled atomic structure, and the errors of the data it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


class DataError(Exception):
    """A problem of the user's data, told in one line: where, what it is, what it must be, what to do."""

    def __init__(self, message: str) -> None:
        words = " ".join(message.split())
        # Names from a file may hold what steers a terminal, or what no file can be written with.
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words))


class ShardError(DataError):
    """One file cannot be read to its end: it is truncated or laid out differently; other files may be fine."""


@dataclass(frozen=True, slots=True)
class BadRecord:
    """One record of a file that cannot be used; the records after it may be fine.

    Attributes:
        message: where it is, what it is, what it must be, what to do; one line.
    """

    message: str


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """Atoms with the energy and the forces somebody computed for them.

    Attributes:
        numbers: int64 [N], atomic numbers.
        positions_angstrom: float64 [N, 3].
        cell_angstrom: float64 [3, 3], one lattice vector a row; None for a molecule.
        pbc: whether the structure repeats along each lattice vector.
        energy_ev: total energy as the source defines it; NaN where the source did not compute it.
        forces_ev_per_angstrom: float64 [N, 3], minus the gradient of the energy; None where the source has none.
        source: name of the dataset, a key of ``datasets.READERS``.
        group: what must not be torn apart by a split (formula, molecule, material or system id).
        key: names the structure within its source.
    """

    numbers: NDArray[np.int64]
    positions_angstrom: NDArray[np.float64]
    cell_angstrom: NDArray[np.float64] | None
    pbc: tuple[bool, bool, bool]
    energy_ev: float
    forces_ev_per_angstrom: NDArray[np.float64] | None
    source: str
    group: str
    key: str

    def __post_init__(self) -> None:
        """Check shapes and types.

        Raises:
            ValueError: an array has the wrong shape or type.
        """
        n_atoms = len(self.numbers) if np.ndim(self.numbers) == 1 else -1
        self._check("numbers", self.numbers, (n_atoms,) if n_atoms >= 0 else ("N",), np.int64)
        self._check("positions_angstrom", self.positions_angstrom, (n_atoms, 3), np.float64)
        if self.cell_angstrom is not None:
            self._check("cell_angstrom", self.cell_angstrom, (3, 3), np.float64)
        if self.forces_ev_per_angstrom is not None:
            self._check("forces_ev_per_angstrom", self.forces_ev_per_angstrom, (n_atoms, 3), np.float64)
        if len(self.pbc) != 3:
            raise ValueError(f"{self.source} {self.key}: pbc is {self.pbc!r}, but must be three booleans")

    def _check(self, name: str, value: Any, shape: tuple[int | str, ...], dtype: type[np.generic]) -> None:
        array = np.asarray(value)
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(
                f"{self.source} {self.key}: {name} is {array.dtype} {list(array.shape)}, "
                f"but must be {dtype.__name__} {list(shape)}"
            )
