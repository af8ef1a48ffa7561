"""Which geometries are labelled by which method, in which order and with which seeds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ase import Atoms

from wattier_gnn.sample.recipe import crystals, molecules
from wattier_gnn.sample.recipe.label import Labeller, label_frames

FIRST_MOLECULE_SEED = 1000
N_SLABS = 90
N_MATERIALS = 230

Say = Callable[[str], None]


def label_source(source: str, work: Path, say: Say) -> None:
    """Label all frames of one source into ``work/<source>.xyz``; started again it goes on where it stopped.

    Needs the extra ``[labels]``. One thread a process: with more, the last bits of SevenNet's forces change.
    """
    work.mkdir(parents=True, exist_ok=True)
    frames, labeller = _LABELLINGS[source](say)
    label_frames(frames, labeller, work / f"{source}.xyz", say)


def molecule_frames(smiles: Sequence[str], say: Say) -> Iterator[tuple[str, str, Atoms]]:
    """(key ``<place in the list>-<temperature>``, SMILES, frame), molecules in a shuffled order.

    Shuffled so that a labelling that is stopped early is a fair sample of the list, not of its small molecules.
    """
    order = sorted(set(smiles), key=smiles.index)
    random.Random(0).shuffle(order)
    for text in order:
        place = smiles.index(text)
        seed = FIRST_MOLECULE_SEED + place
        try:
            frames = molecules.thermal_displacements(text, seed, molecules.TEMPERATURES_KELVIN)
        except (RuntimeError, ValueError) as error:
            say(f"{text} left out: {error}")
            continue
        for index, atoms in enumerate(frames):
            atoms.info = {"smiles": text}
            yield f"{place}-{index}", text, atoms


def _molecules(smiles: Sequence[str], method: molecules.Method, say: Say) -> tuple[Iterator[Any], Labeller]:
    from pyscf import lib

    lib.num_threads(1)
    return molecule_frames(smiles, say), partial(molecules.label, method=method)


def _alloys(_say: Say) -> tuple[Iterator[Any], Labeller]:
    return crystals.alloy_slabs(N_SLABS), _by_calculator(_chgnet())


def _oxides(_say: Say) -> tuple[Iterator[Any], Labeller]:
    _one_torch_thread()
    from sevenn.calculator import SevenNetCalculator

    return crystals.oxide_slabs(N_SLABS), _by_calculator(SevenNetCalculator("7net-0", device="cpu"))


def _bulk(_say: Say) -> tuple[Iterator[Any], Labeller]:
    calculator = _chgnet()
    return crystals.bulk_crystals(N_MATERIALS, calculator), _by_calculator(calculator)


def _chgnet() -> Any:
    _one_torch_thread()
    from chgnet.model.dynamics import CHGNetCalculator

    return CHGNetCalculator(use_device="cpu")


def _one_torch_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _by_calculator(calculator: Any) -> Labeller:
    def label(atoms: Any) -> tuple[float, Any]:
        labelled = atoms.copy()
        labelled.calc = calculator
        return labelled.get_potential_energy(), labelled.get_forces()

    return label


_LABELLINGS: dict[str, Callable[[Say], tuple[Iterator[Any], Labeller]]] = {
    "ani1x": partial(_molecules, molecules.ANI1X_SMILES, molecules.ANI1X_METHOD),
    "qm7x": partial(_molecules, molecules.QM7X_SMILES, molecules.QM7X_METHOD),
    "oc20": _alloys,
    "oc22": _oxides,
    "mptrj": _bulk,
}
