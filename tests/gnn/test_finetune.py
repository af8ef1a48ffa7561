"""What a release becomes before it is trained on other data: the same answers, from one head; energies aligned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wattier_gnn.ensemble import Ensemble
from wattier_gnn.finetune import FEWEST_STRUCTURES, TunedStore, adapted, align, unadapted_errors, unseen_elements
from wattier_gnn.model import ModelConfig, build_model
from wattier_gnn.reference import composition
from wattier_gnn.splits import TEST, TRAIN, VAL
from wattier_gnn.store import Store, write_store
from wattier_gnn.structure import DataError, Structure
from wattier_gnn.train import TrainConfig, Trainer

CUTOFF = 4.0
SOURCES = ("first", "second", "third")
SHIFT_EV = {1: 3.25, 6: -7.5, 8: 12.0}
KINDS = [
    {"energy_heads": heads, "forces": forces}
    for heads, forces in [("per_source", "conservative"), ("shared", "vector"), ("both", "vector"), ("both", "direct")]
]


def structures(n: int, source: str, energy: Any = lambda _: 0.0, numbers: Any = (1, 6, 8)) -> list[Structure]:
    generator, found = np.random.default_rng(1), []
    for k in range(n):
        kinds = generator.choice(numbers, size=int(generator.integers(2, 6))).astype(np.int64)
        positions = generator.normal(size=(len(kinds), 3)) * 1.5
        found.append(
            Structure(
                kinds, positions, None, (False,) * 3, energy(kinds), np.zeros_like(positions), source, str(k), str(k)
            )
        )
    return found


def model(seed: int = 0, **changes: Any) -> Any:
    config = ModelConfig(
        SOURCES, (0.5, 2.0, 7.0), 4.0, CUTOFF, hidden_dim=8, n_layers=1, n_radial=4, head_dim=8, n_head_layers=1
    )
    return build_model(replace(config, **changes), seed)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    def make(many: list[Structure], split: Any = None, seed: int = 0) -> TunedStore:
        split = np.resize([TRAIN, TRAIN, TRAIN, VAL, TEST], len(many)).astype(np.int8) if split is None else split
        write_store(tmp_path / "store", many, split, sources=["extxyz"], cutoff_angstrom=CUTOFF)
        return TunedStore(tmp_path / "store", None, "mine", seed)

    return make


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("origin", [0, 2])
def test_it_answers_as_the_source_it_was_cut_out_of(store: Any, kind: dict[str, Any], origin: int) -> None:
    parent = model(**kind).eval()
    tuned = adapted(parent, origin, "mine", freeze=False).eval()
    batch = store(structures(15, "extxyz")).batch(np.arange(10))
    due = parent(replace(batch, source_index=torch.full_like(batch.source_index, origin)))
    found = tuned(batch)
    assert tuned.config.sources == ("mine",)
    assert due.energy.abs().max() > 0.05
    torch.testing.assert_close(found.energy, due.energy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.forces, due.forces, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_frozen_backbone_keeps_every_bit_and_its_training_goes_on(
    store: Any, kind: dict[str, Any], tmp_path: Path
) -> None:
    parent, data = model(**kind), store(structures(40, "extxyz", lambda z: float(len(z))))

    def trainer(leaves: Any = None) -> Trainer:
        return Trainer(
            adapted(parent, 1, "mine", freeze=True), data, TrainConfig(epochs=3, batch_structures=8, weight_decay=0.1),
            train_indices=data.indices(TRAIN), val_indices=data.indices(VAL), folder=tmp_path / "trial",
            device=torch.device("cpu"), leaves=leaves,
        )  # fmt: skip

    asked = iter([False] * 5 + [True])
    assert trainer(lambda _: next(asked)).run(lambda _: True).ended == "left"
    rest = trainer()
    assert rest.run(lambda _: True).ended == "epochs"
    before, after = parent.state_dict(), rest.evaluated().state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("encoder."))
    moved = [
        k
        for k in after
        if not k.startswith("encoder.")
        and not torch.equal(after[k], adapted(parent, 1, "x", freeze=True).state_dict()[k])
    ]
    assert "energy_heads.out" in moved


@pytest.fixture
def release() -> Ensemble:
    """Two members whose references know three elements for two sources, and two for the third."""
    references = np.zeros((3, 119))
    references[:, [1, 6, 8]] = [[-1.0, -30.0, -60.0], [-2.0, -40.0, -70.0], [-3.0, 0.0, -50.0]]
    return Ensemble(tuple(model(seed).eval() for seed in (0, 1)), references)


def as_source(release: Ensemble, many: list[Structure], shift: dict[int, float], source: str) -> list[Structure]:
    """The same structures with the energies that a source of the release gives them, and another zero of each atom."""
    said = release.predict(many, source).energy_ev
    extra = [sum(shift[int(z)] for z in s.numbers) for s in many]
    return [replace(s, energy_ev=float(e + x)) for s, e, x in zip(many, said, extra, strict=True)]


def test_the_source_and_the_zero_of_every_atom_are_found_again(store: Any, release: Ensemble) -> None:
    data = store(as_source(release, structures(60, "extxyz"), SHIFT_EV, "second"))
    found = align(release, data, "mine")
    assert found.origin == 1
    for z, shift in SHIFT_EV.items():
        assert found.references_ev[z] == pytest.approx(release.references_ev[1, z] + shift, abs=1e-5)
    assert np.flatnonzero(found.references_ev).tolist() == [1, 6, 8]
    assert found.residual_ev_per_atom < 1e-5
    assert found.unaligned_ev_per_atom > 1.0
    assert unadapted_errors(release, data, 1, TEST)[0] > 1.0


def test_of_one_composition_only_the_sum_is_changed(store: Any, release: Ensemble) -> None:
    """Water alone cannot tell H from O: both get the same shift."""
    water = [replace(s, numbers=np.array([8, 1, 1])) for s in structures(60, "extxyz") if len(s.numbers) == 3]
    found = align(release, store(as_source(release, water, SHIFT_EV, "first")), "mine")
    correction = found.references_ev[[1, 8]] - release.references_ev[0, [1, 8]]
    total = 2 * SHIFT_EV[1] + SHIFT_EV[8]
    np.testing.assert_allclose(correction, total / 3, atol=1e-5)


def test_a_source_of_the_release_keeps_its_zero(store: Any, release: Ensemble) -> None:
    data = store(as_source(release, structures(60, "extxyz"), SHIFT_EV, "second"))
    found = align(release, data, "first")
    assert found.origin == 0
    np.testing.assert_array_equal(found.references_ev[[1, 6, 8]], release.references_ev[0, [1, 6, 8]])


def test_elements_the_release_never_saw_are_named(store: Any, release: Ensemble) -> None:
    assert unseen_elements(release, store(structures(40, "extxyz", numbers=(1, 6, 26)))) == [26]


def test_frames_of_one_molecule_are_dealt_one_by_one(store: Any) -> None:
    data = store(structures(40, "extxyz"), np.full(40, TRAIN, dtype=np.int8))
    assert data.torn_groups
    assert [len(data.indices(split)) for split in (TRAIN, VAL, TEST)] == [32, 4, 4]
    assert data.meta["by_source"]["mine"]["structures"] == {"train": 32, "val": 4, "test": 4}
    again = Store.indices(TunedStore(data.folder, None, "mine", 0), VAL)
    assert again.tolist() == data.indices(VAL).tolist()
    assert not store(structures(40, "extxyz")).torn_groups


def test_too_few_structures_are_refused(store: Any) -> None:
    with pytest.raises(DataError, match=f"holds 9 usable structures, but must hold {FEWEST_STRUCTURES} or more"):
        store(structures(9, "extxyz"))


def test_aligned_energies_are_what_is_learnt(store: Any, release: Ensemble) -> None:
    data = store(as_source(release, structures(60, "extxyz"), SHIFT_EV, "second"))
    data.align(align(release, data, "mine"))
    batch = data.batch(np.arange(5))
    counts = composition(data.gather(np.arange(5))["numbers"], data.n_atoms[:5])
    due = data.energy[:5] - counts @ data.references[0]
    np.testing.assert_allclose(batch.energy.numpy(), due, rtol=1e-5, atol=1e-5)
    assert np.abs(due).max() < 20, "nothing of the zeros is left"
