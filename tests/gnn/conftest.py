"""Structures, batches, models and one small store with true forces, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.emt import EMT

from wattier_gnn import ingest as ingest_module
from wattier_gnn import manifest as manifest_module
from wattier_gnn import parts
from wattier_gnn.batch import Batch
from wattier_gnn.datasets import READERS, Reader
from wattier_gnn.model import FoundationModel, ModelConfig, build_model
from wattier_gnn.neighbors import find_edges
from wattier_gnn.splits import TRAIN, VAL
from wattier_gnn.store import Store, write_store
from wattier_gnn.structure import Structure

CUTOFF_ANGSTROM = 4.0
SKEW = np.array([[6.1, 0.0, 0.0], [1.9, 5.7, 0.0], [-1.3, 0.8, 6.6]])
SMALL = np.array([[2.6, 0.0, 0.0], [0.9, 2.4, 0.0], [-0.4, 0.7, 2.9]])


@dataclass(frozen=True)
class Toolbox:
    """What tests build things with; positions and cells in Angstrom, batches in float64."""

    cutoff_angstrom: float = CUTOFF_ANGSTROM

    def structure(self, numbers: Sequence[int], positions: Any, **changes: Any) -> Structure:
        """A molecule without labels, unless `changes` says otherwise."""
        molecule = Structure(
            numbers=np.array(numbers, dtype=np.int64),
            positions_angstrom=np.array(positions, dtype=np.float64).reshape(-1, 3),
            cell_angstrom=None,
            pbc=(False, False, False),
            energy_ev=0.0,
            forces_ev_per_angstrom=None,
            source="a",
            group="g",
            key="k",
        )
        return replace(molecule, **changes)

    def scenes(self) -> dict[str, Structure]:
        """A molecule, a skew crystal, and a crystal whose cell is smaller than the cutoff."""
        rng = np.random.default_rng(0)
        periodic = (True, True, True)
        grid = np.array([[i, j, k] for i in range(2) for j in range(2) for k in range(2)], dtype=float)
        return {
            "molecule": self.structure([6, 1, 8, 1, 7, 6, 1, 1], 1.6 * grid + rng.normal(0, 0.25, (8, 3))),
            "skew": self.structure(
                [29, 13, 8, 29, 8], rng.random((5, 3)) @ SKEW, cell_angstrom=SKEW, pbc=periodic, source="b"
            ),
            "small": self.structure([11, 17], [[0.1, 0.2, 0.0], [1.4, 1.5, 1.6]], cell_angstrom=SMALL, pbc=periodic),
        }

    def join(self, structures: Sequence[Structure], sources: Sequence[str] = ("a", "b")) -> Batch:
        """One batch in float64, its labels all 0."""
        edges = [find_edges(s, self.cutoff_angstrom) for s in structures]
        n_atoms = np.array([len(s.numbers) for s in structures])
        first = np.cumsum(n_atoms) - n_atoms
        cells = [s.cell_angstrom if s.cell_angstrom is not None else np.zeros((3, 3)) for s in structures]
        shifts = [e.shift.astype(float) @ cell for e, cell in zip(edges, cells, strict=True)]
        n = int(n_atoms.sum())
        return Batch(
            numbers=torch.from_numpy(np.concatenate([s.numbers for s in structures])),
            positions=torch.from_numpy(np.concatenate([s.positions_angstrom for s in structures])),
            edge_index=torch.from_numpy(
                np.concatenate([e.index.astype(np.int64) + k for e, k in zip(edges, first, strict=True)], axis=1)
            ),
            edge_shift=torch.from_numpy(np.concatenate(shifts)),
            structure_index=torch.from_numpy(np.repeat(np.arange(len(n_atoms)), n_atoms)),
            source_index=torch.tensor([list(sources).index(s.source) for s in structures]),
            n_atoms=torch.from_numpy(n_atoms),
            energy=torch.zeros(len(n_atoms), dtype=torch.float64),
            forces=torch.zeros(n, 3, dtype=torch.float64),
            force_mask=torch.ones(n, dtype=torch.bool),
        )

    def model(self, **changes: Any) -> FoundationModel:
        """A float64 model of sources a and b, in eval mode, that moves coordinates by some tenths of an Angstrom."""
        config = ModelConfig(
            sources=("a", "b"),
            energy_scale_ev=(1.0, 2.0),
            mean_neighbors=12.0,
            cutoff_angstrom=self.cutoff_angstrom,
            hidden_dim=12,
            n_layers=3,
            n_radial=6,
            head_dim=10,
        )
        model = build_model(replace(config, **changes), seed=3).double().eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "coordinate.2" in name:
                    weight.mul_(3000)
        return model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """These tensors are small: threads would only wait for each other, for minutes on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def float64() -> Iterator[None]:
    """What is built in this test is in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def tools() -> Toolbox:
    """The builders."""
    return Toolbox()


def emt_labels(atoms: Any) -> tuple[float, Any]:
    """Energy in eV and forces [N, 3] in eV/Angstrom of the effective medium theory."""
    atoms.calc = EMT()
    return float(atoms.get_potential_energy()), atoms.get_forces()


@pytest.fixture(scope="session")
def emt_structures() -> list[Structure]:
    """27 rattled Cu/Al structures with true forces: 20 clusters, then 7 crystals."""
    rng = np.random.default_rng(1)
    structures = []
    for index in range(27):
        source = "cluster" if index < 20 else "crystal"
        atoms = bulk("Cu", cubic=True)
        atoms.pbc = source == "crystal"
        atoms.numbers[:] = rng.choice([13, 29], len(atoms)) if index > 1 else [13, 29, 29, 29]
        atoms.positions += rng.normal(0, 0.15, (len(atoms), 3))
        energy_ev, forces = emt_labels(atoms)
        structures.append(
            Structure(
                numbers=atoms.numbers.astype(np.int64),
                positions_angstrom=atoms.positions.copy(),
                cell_angstrom=atoms.cell.array.copy() if source == "crystal" else None,
                pbc=(source == "crystal",) * 3,
                energy_ev=energy_ev,
                forces_ev_per_angstrom=forces,
                source=source,
                group=str(index),
                key=str(index),
            )
        )
    return structures


@pytest.fixture(scope="session")
def emt_split() -> Any:
    """Every fifth structure is for validation."""
    return np.where(np.arange(27) % 5 == 4, VAL, TRAIN).astype(np.int8)


@pytest.fixture(scope="session")
def emt_store(emt_structures: list[Structure], emt_split: Any, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Sources cluster, crystal, and one without structures. Shared: do not write to it."""
    folder: Path = tmp_path_factory.mktemp("emt") / "store"
    return write_store(folder, emt_structures, emt_split, sources=["cluster", "crystal", "absent"], cutoff_angstrom=3.5)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Makes a file of a source ``toy`` that yields what it is given; an exception in the list is raised."""
    contents: dict[str, list[Any]] = {}

    def read(path: Path) -> Iterator[Any]:
        for item in contents[path.name]:
            if isinstance(item, Exception):
                raise item
            yield item

    def shards(path: Path) -> list[Path]:
        return [path] if path.is_file() else sorted(path.glob("*.toy"))

    readers = {**READERS, "toy": Reader("toy", shards, read, "none")}
    for module in (parts, ingest_module, manifest_module):
        monkeypatch.setattr(module, "READERS", readers)

    def file(name: str, items: list[Any]) -> Path:
        contents[f"{name}.toy"] = items
        folder = tmp_path / "toys"
        folder.mkdir(exist_ok=True)
        path: Path = folder / f"{name}.toy"
        path.write_text(name)
        return path

    return file
