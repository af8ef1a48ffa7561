"""The work of a trial, by arithmetic, against a training that really runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from toys import structure

from wattier.config import RunConfig
from wattier.records import Fidelity, Params
from wattier.trial import model_config, settings_of
from wattier.workload import disk_bytes, workload_of
from wattier_gnn import ops
from wattier_gnn.model import build_model
from wattier_gnn.sampling import choose_subset
from wattier_gnn.splits import TRAIN, VAL
from wattier_gnn.store import Store, write_store
from wattier_gnn.train import TrainConfig, Trainer, TrainState

SOURCES = ("ani1x", "qm7x")


class Products(TorchDispatchMode):
    """FLOPs of the products, counted where torch makes them."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Molecules of 2 to 9 atoms, twice as many of one source as of the other; a fifth is for validation."""
    rng = np.random.default_rng(0)
    made = []
    for k in range(60):
        n = int(rng.integers(2, 10))
        made.append(
            structure(
                k, numbers=rng.choice([1, 6, 8], n), positions_angstrom=2.0 * rng.normal(size=(n, 3)),
                forces_ev_per_angstrom=rng.normal(size=(n, 3)), source=SOURCES[k % 3 == 0],
            )
        )  # fmt: skip
    split = np.where(np.arange(60) % 5 == 4, VAL, TRAIN).astype(np.int8)
    folder = tmp_path_factory.mktemp("workload") / "store"
    return write_store(folder, made, split, sources=SOURCES, cutoff_angstrom=4.0)


def config_of(store: Store, launcher: str = "ray", **sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate({
        "name": "w", "run_dir": "runs/w", "launcher": launcher,
        "data": {"sources": dict.fromkeys(SOURCES, "sample")},
        "model": {"hidden_dim": 12, "n_layers": 2, "n_radial": 4, "head_dim": 8, **sections.get("model", {})},
        "training": {"batch_structures": 7, "prefetch_batches": 0, **sections.get("training", {})},
        "search": {"space": {"hidden_dim": {"low": 8, "high": 64}}, "stages": [{"name": "s", "trials": 1}]},
    })  # fmt: skip


def train(config: RunConfig, store: Store, params: Params, fidelity: Fidelity, folder: Path) -> TrainState:
    """A training as a trial makes it."""
    section, training = settings_of(config, params)
    return Trainer(
        build_model(model_config(store, section), 0), store,
        TrainConfig(epochs=fidelity.epochs, early_stop_patience=fidelity.epochs, **training.for_trainer()),
        train_indices=choose_subset(store.indices(TRAIN), store.source_index, fidelity.structures, config.seed),
        val_indices=store.indices(VAL), folder=folder, device=torch.device("cpu"),
    ).run(lambda _: True)  # fmt: skip


@pytest.mark.parametrize("forces", ["vector", "conservative"])
@pytest.mark.parametrize(
    ("structures", "training"),
    [
        (None, {}),
        (20, {}),
        (None, {"mixture": "uniform", "epoch_structures": 64}),
    ],
)
def test_products_steps_and_structures_are_those_of_a_training(
    forces: str, structures: int | None, training: dict[str, Any], store: Store, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(ops, "SMALLEST_ONE_DNN_PRODUCT", 2**62)
    config = config_of(store, model={"forces": forces}, training=training)
    params, fidelity = {"hidden_dim": 20, "batch_structures": 9}, Fidelity("s", structures, 2, 1)
    with Products() as products:
        state = train(config, store, params, fidelity, tmp_path)
    work = workload_of(config, store)(params, fidelity)
    assert work.steps == state.steps
    n_validated = fidelity.epochs * len(store.indices(VAL))
    assert work.structures == state.structures_seen + n_validated
    # Every structure is drawn equally often, so that sums are exact; a uniform mixture of 64 draws is so on the mean.
    tolerance = 0.1 if training else 1e-9
    assert work.flops == pytest.approx(products.flops, rel=tolerance)


@pytest.mark.parametrize("cutoff", [2.0, 3.0, 4.0])
def test_a_smaller_cutoff_is_less_work(
    cutoff: float, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much less as its training makes fewer products; the store's share of edges stands for that of each split."""
    monkeypatch.setattr(ops, "SMALLEST_ONE_DNN_PRODUCT", 2**62)
    config, params, fidelity = config_of(store), {"cutoff_angstrom": cutoff}, Fidelity("s", None, 1, 1)
    workload = workload_of(config, store)
    with Products() as products:
        train(config, Store(store.folder, cutoff), params, fidelity, tmp_path)
    assert workload(params, fidelity).flops == pytest.approx(products.flops, rel=0.02)
    assert workload({}, fidelity) == workload({"cutoff_angstrom": 4.0}, fidelity)
    guess = workload_of(config, None)
    assert guess({"cutoff_angstrom": 2.5}, fidelity).flops < guess({}, fidelity).flops


def test_steps_obey_the_limits_of_atoms_and_edges(store: Store) -> None:
    """Fewer structures fit a step; what is drawn, and so the products, stay the same."""
    free = workload_of(config_of(store), store)({}, Fidelity("s", None, 1, 1))
    atoms = float(np.mean(store.n_atoms[store.indices(TRAIN)]))
    for limits, fit in (({"batch_atoms": 12}, 12 / atoms), ({"batch_atoms": 10_000}, 7)):
        tight = workload_of(config_of(store, training=limits), store)({}, Fidelity("s", None, 1, 1))
        assert tight.steps == math.ceil(48 / fit)
        assert tight.flops == free.flops
        assert tight.structures == free.structures
    edges = workload_of(config_of(store, training={"batch_edges": 1}), store)({}, Fidelity("s", None, 1, 1))
    assert edges.steps == 48, "a structure that alone exceeds a limit is a step of its own"


@pytest.mark.parametrize("averaged", [True, False])
def test_bytes_on_the_disk_are_those_of_the_checkpoints(averaged: bool, store: Store, tmp_path: Path) -> None:
    config = config_of(store, training={"ema_decay": 0.99 if averaged else 0.0})
    params, fidelity = {"hidden_dim": 200}, Fidelity("s", None, 1, 1)
    train(config, store, params, fidelity, tmp_path)
    written = sum((tmp_path / name).stat().st_size for name in ("best.pt", "last.pt"))
    assert disk_bytes(workload_of(config, store)(params, fidelity).parameters, averaged=averaged) == pytest.approx(
        written, rel=0.02
    )


def test_ranks_start_processes_only_without_ray(store: Store) -> None:
    fidelity = Fidelity("s", None, 1, 3)
    inline, ray = (workload_of(config_of(store, launcher), store)({}, fidelity) for launcher in ("inline", "ray"))
    assert (inline.starts, ray.starts) == (2, 0)
    assert inline.flops == ray.flops
    assert inline.ranks == 3


def test_before_there_is_a_store_its_sources_are_guessed(store: Store) -> None:
    config = config_of(store)
    workload = workload_of(config, None)
    some, all_there = workload({}, Fidelity("s", 100, 2, 1)), workload({}, Fidelity("s", None, 2, 1))
    assert all_there.flops > some.flops > 0
    # The sample's own figures: 500 structures a source, of which eight in ten are trained on and one validates.
    assert all_there.structures == pytest.approx(2 * (2 * 500 * 0.8 + 2 * 500 * 0.1))
    published = config.model_copy(update={"data": config.data.model_copy(update={"sources": {"oc20": "/data/oc20"}})})
    assert math.isnan(workload_of(published, None)({}, Fidelity("s", None, 2, 1)).flops), "nobody said how many"
    assert workload_of(published, None)({}, Fidelity("s", 10, 2, 1)).flops > some.flops / 10


def test_parameters_that_are_no_part_of_the_work_change_nothing(store: Store) -> None:
    workload, fidelity = workload_of(config_of(store), store), Fidelity("s", 10, 1, 1)
    assert workload({"learning_rate": 1e-2, "power_cap_watts": 250}, fidelity) == workload({}, fidelity)
