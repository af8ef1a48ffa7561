"""A model that takes a smaller cutoff than its store's is one that has a store of that cutoff, and works no more."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk

from wattier_gnn import store as store_module
from wattier_gnn.arrays import squared_lengths
from wattier_gnn.batch import Batch
from wattier_gnn.batching import StepLimits, edges_to_cut_by
from wattier_gnn.calculator import structure_of
from wattier_gnn.distributed import World
from wattier_gnn.ensemble import Ensemble
from wattier_gnn.model import FoundationModel, ModelConfig, build_model
from wattier_gnn.splits import TRAIN, VAL
from wattier_gnn.spread import SpreadStore
from wattier_gnn.store import Store, write_store
from wattier_gnn.structure import DataError, Structure
from wattier_gnn.train import TrainConfig, Trainer

WIDE, NARROW = 5.5, 3.4  # the cubic cell of copper is 3.6 Angstrom: WIDE sees several images of an atom, also its own
SOURCES = ["cluster", "crystal", "a", "b"]
CPU = torch.device("cpu")
KINDS = [("egnn", "conservative"), ("egnn", "vector"), ("schnet", "conservative"), ("pna", "direct")]


@pytest.fixture(scope="module")
def structures(emt_structures: list[Structure], tools: Any) -> list[Structure]:
    """Clusters and crystals with true forces; a skew cell, a cell smaller than a bond, an atom without neighbours."""
    rng = np.random.default_rng(7)
    scenes = [
        replace(s, energy_ev=float(rng.normal()), forces_ev_per_angstrom=rng.normal(size=s.positions_angstrom.shape))
        for s in tools.scenes().values()
    ]
    return [*emt_structures, *scenes, tools.structure([6], [[0, 0, 0]], key="alone")]


@pytest.fixture(scope="module")
def stores(structures: list[Structure], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each cutoff, and one of the wide one whose edges are found in each batch."""
    folder = tmp_path_factory.mktemp("cutoffs")
    split = np.where(np.arange(len(structures)) % 5 == 4, VAL, TRAIN).astype(np.int8)
    for name, cutoff in (("wide", WIDE), ("narrow", NARROW)):
        write_store(folder / name, structures, split, sources=SOURCES, cutoff_angstrom=cutoff)
    shutil.copytree(folder / "wide", folder / "found")
    manifest = json.loads((folder / "found" / "manifest.json").read_text())
    manifest["settings"]["neighbors"], manifest["rows"]["edges"] = "on_the_fly", 0
    (folder / "found" / "manifest.json").write_text(json.dumps(manifest))
    (folder / "found" / "edges.bin").write_bytes(b"")
    return {name: folder / name for name in ("wide", "narrow", "found")}


def config_of(store: Store, cutoff: float, **changes: Any) -> ModelConfig:
    return ModelConfig(**{
        "sources": store.sources, "energy_scale_ev": tuple(store.meta["energy_scale_ev"]),
        "mean_neighbors": store.meta["mean_neighbors"] * store.edge_share(cutoff), "cutoff_angstrom": cutoff,
        "hidden_dim": 8, "n_layers": 2, "n_radial": 5, "head_dim": 8, **changes,
    })  # fmt: skip


def step(model: FoundationModel, batch: Batch) -> dict[str, Any]:
    """Energies, forces, and the gradient of a loss of both in every weight."""
    model.zero_grad()
    prediction = model.train()(batch)
    (prediction.energy.square().sum() + (prediction.forces - batch.forces).square().sum()).backward()
    gradients = {f"gradient of {k}": p.grad for k, p in model.named_parameters()}
    return {"energy": prediction.energy, "forces": prediction.forces, **gradients}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("family", "forces"), KINDS)
@pytest.mark.parametrize("name", ["wide", "found"], ids=["edges kept", "edges found"])
def test_energies_forces_and_gradients_are_those_of_the_narrow_store(
    stores: dict[str, Path], name: str, family: str, forces: str
) -> None:
    narrowed, narrow = Store(stores[name], NARROW), Store(stores["narrow"])
    configs = [config_of(store, NARROW, family=family, forces=forces) for store in (narrowed, narrow)]
    assert configs[0].mean_neighbors == pytest.approx(configs[1].mean_neighbors, rel=1e-14)
    part = np.random.default_rng(0).permutation(len(narrow))
    found, wanted = (
        step(build_model(config, seed=2).double(), store.batch(part))
        for config, store in zip(configs, (narrowed, narrow), strict=True)
    )
    assert all(value is not None for value in wanted.values())
    assert wanted["forces"].abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def in_one_order(batch: Batch) -> Batch:
    order = np.lexsort((*batch.edge_shift.numpy().T, *batch.edge_index.numpy()[::-1]))
    return replace(batch, edge_index=batch.edge_index[:, order], edge_shift=batch.edge_shift[order])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["wide", "found"], ids=["edges kept", "edges found"])
def test_batches_are_those_of_the_narrow_store(stores: dict[str, Path], name: str) -> None:
    """Edge by edge, but for the order of images of one pair: the same follows from a batch whatever model reads it."""
    narrowed, narrow = Store(stores[name], NARROW), Store(stores["narrow"])
    for part in ([30, 2, 29, 2, 21], np.arange(len(narrow)), []):
        found, wanted = narrowed.batch(np.array(part, dtype=np.int64)), narrow.batch(np.array(part, dtype=np.int64))
        assert (found.edge_index[0].diff() >= 0).all(), "sorted by receiver, as models take it"
        found, wanted = in_one_order(found), in_one_order(wanted)
        for field in fields(Batch):
            torch.testing.assert_close(getattr(found, field.name), getattr(wanted, field.name), rtol=0, atol=0)
    np.testing.assert_array_equal(narrowed.count_edges(np.arange(len(narrow))), narrow.n_edges)
    assert narrow.n_edges.sum() < 0.4 * narrowed.n_edges.sum(), "most edges of the wide store are beyond"


@pytest.mark.usefixtures("float64")
def test_lengths_are_those_of_the_edges_of_a_batch(stores: dict[str, Path]) -> None:
    store = Store(stores["wide"])
    part = np.arange(len(store))[::-1].copy()
    batch = store.batch(part)
    i, j = batch.edge_index
    lengths = torch.linalg.vector_norm(batch.positions[j] + batch.edge_shift - batch.positions[i], dim=1)
    np.testing.assert_allclose(np.sqrt(squared_lengths(store.gather(part))), lengths.numpy(), rtol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("family", ["egnn", "schnet"])
def test_a_neighbour_exactly_at_the_cutoff_makes_no_difference(family: str, tmp_path: Path, tools: Any) -> None:
    """Rounding decides on which side it falls; the model says the same of both."""
    crystal = replace(structure_of(bulk("Cu", a=math.sqrt(2) * 2.6, cubic=True)), source="a")
    split = np.zeros(1, dtype=np.int8)
    wide, narrow = (
        write_store(tmp_path / str(cutoff), [replace(crystal, energy_ev=0.0)], split, sources=["a"],
                    cutoff_angstrom=cutoff)
        for cutoff in (5.3, 2.6)
    )  # fmt: skip
    model = build_model(config_of(wide, 2.6, family=family, mean_neighbors=12.0), 0).double().eval()
    found, wanted = model(Store(wide.folder, 2.6).batch([0])), model(narrow.batch([0]))
    torch.testing.assert_close(found.energy, wanted.energy, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.forces, wanted.forces, rtol=0, atol=1e-10)


def train(store: Store, folder: Path, **changes: Any) -> tuple[Trainer, list[int]]:
    """Two epochs in float64, and how many edges each forward pass of the network was given."""
    model, edges = build_model(config_of(store, NARROW), seed=1).double(), []
    config = TrainConfig(**{"epochs": 2, "batch_structures": 8, "ema_decay": 0.0, **changes})
    trainer = Trainer(
        model, store, config, train_indices=store.indices(TRAIN), val_indices=store.indices(VAL), folder=folder,
        device=CPU,
    )  # fmt: skip
    hook = model.encoder.register_forward_pre_hook(lambda _, given: edges.append(len(given[1])))
    trainer.run(lambda _: True)
    hook.remove()
    return trainer, edges


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("limits", [{}, {"batch_edges": 300}], ids=["no limit", "edges limited"])
def test_training_takes_the_steps_of_the_narrow_store(stores: dict[str, Path], tmp_path: Path, limits: Any) -> None:
    """The same structures in each step, the same edges to work on, the same weights in the end."""
    narrow, wanted_edges = train(Store(stores["narrow"]), tmp_path / "narrow", **limits)
    for name in ("wide", "found"):
        found, edges = train(Store(stores[name], NARROW), tmp_path / name, **limits)
        assert edges == wanted_edges, "what the network works on, step by step"
        assert found.state.best_val_loss == pytest.approx(narrow.state.best_val_loss, abs=1e-10)
        torch.testing.assert_close(found.model.state_dict(), narrow.model.state_dict(), rtol=0, atol=1e-10)
    if limits:
        alone = Store(stores["narrow"]).n_edges.max()
        assert max(wanted_edges) <= max(300, alone)


@pytest.mark.usefixtures("float64")
def test_a_checkpoint_is_that_of_the_smaller_cutoff(stores: dict[str, Path], tmp_path: Path) -> None:
    trainer, _ = train(Store(stores["wide"], NARROW), tmp_path)
    saved = torch.load(trainer.best_path, weights_only=True)["config"]
    assert saved["cutoff_angstrom"] == NARROW
    assert saved["mean_neighbors"] == pytest.approx(Store(stores["narrow"]).meta["mean_neighbors"])
    again, _ = train(Store(stores["wide"], NARROW), tmp_path, epochs=3)
    assert again.state.epoch == 3


@pytest.mark.usefixtures("float64")
def test_a_cutoff_below_every_bond_leaves_atoms_alone(stores: dict[str, Path], tmp_path: Path) -> None:
    store = Store(stores["wide"], 0.1)
    assert store.batch(np.arange(len(store))).edge_index.shape == (2, 0)
    model = build_model(config_of(store, 0.1), 0).double()
    trainer = Trainer(
        model, store, TrainConfig(epochs=1, batch_edges=10), train_indices=store.indices(TRAIN),
        val_indices=store.indices(VAL), folder=tmp_path, device=CPU,
    )  # fmt: skip
    assert trainer.run(lambda _: True).ended == "epochs"


class TestEdgesToCutBy:
    def test_they_are_counted_where_they_decide_something(self, stores: dict[str, Path]) -> None:
        narrowed, narrow = Store(stores["wide"], NARROW), Store(stores["narrow"])
        chosen = np.array([3, 28, 4, 3])
        counted = edges_to_cut_by(narrowed, chosen, StepLimits(8, edges=100), World(), CPU)
        np.testing.assert_array_equal(counted[chosen], narrow.n_edges[chosen])
        assert len(counted) == len(narrowed)

    def test_nothing_is_read_where_they_do_not(self, stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Store, "gather", None)
        for store, edges in ((Store(stores["wide"]), 100), (Store(stores["wide"], NARROW), None)):
            assert edges_to_cut_by(store, np.arange(5), StepLimits(8, edges=edges), World(), CPU) is store.n_edges


class TestEdgeShare:
    @pytest.fixture
    def crystals(self, tmp_path: Path) -> Path:
        """Face-centred cubic: 12 neighbours at a / sqrt 2, 6 more at a, 24 more at a sqrt 1.5."""
        made = [replace(structure_of(bulk("Al", a=4.0)), source="a", energy_ev=0.0, key=str(k)) for k in range(3)]
        write_store(tmp_path / "s", made, np.zeros(3, dtype=np.int8), sources=["a"], cutoff_angstrom=5.0)
        return tmp_path / "s"

    def test_shells_of_a_crystal(self, crystals: Path) -> None:
        store = Store(crystals)
        assert store.meta["mean_neighbors"] == 42
        shares = [store.edge_share(cutoff) for cutoff in (1.0, 2.82, 2.83, 3.99, 4.01, 4.89, 4.90, 5.0, 6.0)]
        assert [42 * share for share in shares] == pytest.approx([0, 0, 12, 12, 18, 18, 42, 42, 42])
        assert 42 * Store(crystals, 4.5).edge_share(3.5) == pytest.approx(12)

    def test_a_sample_is_near_the_truth_and_always_the_same(
        self, tmp_path: Path, tools: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rng = np.random.default_rng(4)
        clouds = [tools.structure([6] * n, rng.uniform(0, 5, (n, 3)), key=f"{n}") for n in rng.integers(2, 12, 900)]
        split = np.zeros(900, dtype=np.int8)
        folder = write_store(tmp_path / "s", clouds, split, sources=["a"], cutoff_angstrom=4.0).folder
        sampled = [Store(folder).edge_share(2.5) for _ in range(2)]
        monkeypatch.setattr(store_module, "SAMPLED_STRUCTURES", 900)
        exact = Store(folder, 2.5).count_edges(np.arange(900)).sum() / Store(folder).n_edges.sum()
        assert Store(folder).edge_share(2.5) == pytest.approx(exact, rel=1e-12)
        assert sampled[0] == sampled[1] != exact
        assert sampled[0] == pytest.approx(exact, rel=0.03)

    def test_atoms_without_neighbours(self, tmp_path: Path, tools: Any) -> None:
        split = np.zeros(1, dtype=np.int8)
        store = write_store(
            tmp_path / "s", [tools.structure([6], [[0, 0, 0]])], split, sources=["a"], cutoff_angstrom=4.0
        )
        assert store.edge_share(2.0) == 1.0
        assert config_of(store, 2.0).mean_neighbors == 0.0


class TestEnsemble:
    """Members with three cutoffs, two of them alike; SchNet and PNA would hear an edge beyond theirs, EGNN not."""

    MEMBERS = (("schnet", NARROW), ("egnn", WIDE), ("pna", 2.6), ("egnn", NARROW))

    @pytest.fixture
    def ensemble(self, stores: dict[str, Path]) -> Ensemble:
        store = Store(stores["wide"])
        torch.set_default_dtype(torch.float64)
        configs = [config_of(store, cutoff, family=family) for family, cutoff in self.MEMBERS]
        members = tuple(build_model(config, seed=k).eval() for k, config in enumerate(configs))
        return Ensemble(members, store.references)

    @pytest.mark.usefixtures("float64")
    def test_each_member_sees_its_own_neighbours(
        self, ensemble: Ensemble, structures: list[Structure], stores: dict[str, Path], tmp_path: Path
    ) -> None:
        assert ensemble.cutoff_angstrom == WIDE
        store = Store(stores["wide"])
        given_to = {}
        for k, member in enumerate(ensemble.members):
            member.encoder.register_forward_pre_hook(lambda _, given, k=k: given_to.update({k: len(given[1])}))
        by_store = ensemble.predict_arrays(store.gather(np.arange(len(store))), store.baseline_ev(range(len(store))))
        edges = dict(given_to)
        for k, (member, (_, cutoff)) in enumerate(zip(ensemble.members, self.MEMBERS, strict=True)):
            split = np.zeros(len(structures), dtype=np.int8)
            own = write_store(tmp_path / str(k), structures, split, sources=SOURCES, cutoff_angstrom=cutoff)
            assert edges[k] == own.n_edges.sum(), "it works on no other"
            alone = member(own.batch(np.arange(len(own))))
            energy = by_store.member_energies_ev[k] - store.baseline_ev(range(len(store)))
            np.testing.assert_allclose(energy, alone.energy.numpy(), rtol=0, atol=1e-10)
            forces = by_store.member_forces_ev_per_angstrom[k]
            np.testing.assert_allclose(forces, alone.forces.numpy(), rtol=0, atol=1e-10)
        crystals = [k for k, s in enumerate(structures) if s.source == "crystal"]
        given = ensemble.predict([structures[k] for k in crystals], "crystal")
        np.testing.assert_allclose(given.member_energies_ev, by_store.member_energies_ev[:, crystals], atol=1e-10)
        np.testing.assert_allclose(given.energy_std_ev, by_store.energy_std_ev[crystals], atol=1e-10)

    @pytest.mark.usefixtures("float64")
    def test_atoms_beyond_a_member_s_cutoff_do_not_touch(self, ensemble: Ensemble, tools: Any) -> None:
        """Two coppers 3 Angstrom apart: for the member of 2.6 Angstrom they are two atoms alone."""
        pair = tools.structure([29, 29], [[0, 0, 0], [3.0, 0, 0]])
        far = tools.structure([29, 29], [[0, 0, 0], [99.0, 0, 0]])
        near, apart = (ensemble.predict([s], "cluster") for s in (pair, far))
        same = near.member_energies_ev[:, 0] == pytest.approx(apart.member_energies_ev[:, 0], abs=1e-12)
        assert not same
        differs = np.abs(near.member_energies_ev - apart.member_energies_ev)[:, 0] > 1e-9
        assert differs.tolist() == [True, True, False, True]
        assert not near.member_forces_ev_per_angstrom[2].any()
        assert near.member_forces_ev_per_angstrom[1].any()


class TestRefusals:
    @pytest.mark.parametrize("cutoff", [WIDE + 1e-6, 0.0, -1.0, math.nan, math.inf])
    def test_a_store_does_not_hold_longer_edges(self, stores: dict[str, Path], cutoff: float) -> None:
        for open_store in (Store, lambda folder, c: SpreadStore(folder, World(), c)):
            with pytest.raises(DataError, match=r"cutoff_angstrom is .* at most 5\.5.*Lower it"):
                open_store(stores["wide"], cutoff)

    @pytest.mark.parametrize("stated", [None, "far", [5.5], math.nan, -5.5, 0, math.inf])
    def test_a_store_that_states_no_length(self, stores: dict[str, Path], tmp_path: Path, stated: Any) -> None:
        shutil.copytree(stores["wide"], tmp_path / "s")
        manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
        (tmp_path / "s" / "manifest.json").write_text(json.dumps({**manifest, "cutoff_angstrom": stated}))
        for cutoff in (None, 3.0):
            with pytest.raises(DataError, match=r"not a readable store|cutoff_angstrom is"):
                Store(tmp_path / "s", cutoff)

    def test_the_whole_cutoff_is_no_narrowing(self, stores: dict[str, Path]) -> None:
        assert not Store(stores["wide"], WIDE).is_narrowed
        assert Store(stores["wide"]).cutoff_angstrom == WIDE

    def test_a_model_is_not_trained_on_longer_edges(self, stores: dict[str, Path], tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"cutoff_angstrom is 3\.4, but batches .* up to 5\.5\. Open it as Store"):
            train(Store(stores["wide"]), tmp_path)

    @pytest.mark.parametrize("cutoff", [0, -1.0, math.nan, math.inf, "5", None, [5.0]])
    def test_a_config_of_others_has_a_length(self, cutoff: Any) -> None:
        good = ModelConfig(("a",), (1.0,), 3.0).to_dict()
        with pytest.raises(ValueError, match=r"cutoff_angstrom|incomplete"):
            ModelConfig.from_dict({**good, "cutoff_angstrom": cutoff})
