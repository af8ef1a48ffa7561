"""The work of a model, by arithmetic, against the operators that torch runs and counts on the built one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from wattier_gnn import ops
from wattier_gnn.batch import Batch
from wattier_gnn.model import ModelConfig, build_model, count_parameters
from wattier_gnn.structure import Structure
from wattier_gnn.workload import Rate, model_work, n_parameters

SHAPE = {"hidden_dim": 40, "n_layers": 3, "n_radial": 12, "head_dim": 24, "n_head_layers": 2}
UNCOUNTED = {"detach.default", "empty.memory_format", "empty_like.default"}  # they touch no numbers
SAVINGS: list[dict[str, Any]] = [{}, {"activation_checkpointing": True}]
CASES = [
    *itertools.product(["egnn", "schnet", "pna"], ["vector", "direct", "conservative"], SAVINGS),
    *itertools.product(["egnn"], ["vector", "direct", "conservative"], [{"edge_chunk": 100}]),
]


class Witness(TorchDispatchMode):
    """Counts the products' FLOPs as torch's own counter does, and the operators with the bytes they touch."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        if not func.is_view and func.__name__ not in UNCOUNTED:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
            self.operators += 1
        return out


@dataclass(frozen=True)
class Counted:
    training: Witness
    inference: Witness


@pytest.fixture
def batch(tools: Any) -> Batch:
    """Three copies of a molecule and of two crystals, in float32."""
    scenes: list[Structure] = list(tools.scenes().values())
    joined: Batch = tools.join(scenes * 3)
    floats = ("positions", "edge_shift", "energy", "forces")
    return replace(joined, **{name: getattr(joined, name).float() for name in floats})


def config_of(tools: Any, **changes: Any) -> ModelConfig:
    values = {**SHAPE, **changes}
    return ModelConfig(("a", "b"), (1.0, 2.0), 12.0, cutoff_angstrom=tools.cutoff_angstrom, **values)


def count(config: ModelConfig, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Operators of a training step and of an inference; products are left where torch counts them."""
    monkeypatch.setattr(ops, "SMALLEST_ONE_DNN_PRODUCT", 2**62)
    model = build_model(config, 0).train()
    with Witness() as training:
        prediction = model(batch)
        loss = prediction.energy.sum() + prediction.forces.square().sum()
        (loss if prediction.energy_std is None else loss + prediction.energy_std.sum()).backward()
    with Witness() as inference:
        model.eval()(batch)
    return Counted(training, inference)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch_geometric
@pytest.mark.parametrize(("family", "forces", "savings"), CASES)
def test_flops_bytes_and_operators_are_those_that_torch_runs(
    family: str, forces: str, savings: dict[str, Any], tools: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    atoms, edges = len(batch.numbers), batch.edge_index.shape[1]
    for heads in ("per_source",) if savings else ("per_source", "both"):
        config = config_of(tools, family=family, forces=forces, energy_heads=heads, **savings)
        counted, work = count(config, batch, monkeypatch), model_work(config, edges)
        # Without recomputation the count is exact; torch's checkpoint stops early, and so makes a few products less.
        exactly = {"rel": 0.03 if savings else 1e-9}
        assert work.training_flops.of(atoms, edges) == pytest.approx(counted.training.flops, **exactly)
        assert work.inference_flops.of(atoms, edges) == pytest.approx(counted.inference.flops, **exactly)
        roughly = {"rel": 0.35}
        assert work.training_bytes.of(atoms, edges) == pytest.approx(counted.training.bytes, **roughly)
        assert work.inference_bytes.of(atoms, edges) == pytest.approx(counted.inference.bytes, **roughly)
        nearly = {"rel": 0.35 if "edge_chunk" in savings else 0.12}
        assert work.training_operations == pytest.approx(counted.training.operators, **nearly)
        assert work.inference_operations == pytest.approx(counted.inference.operators, **nearly)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("family", ["egnn", "schnet", "pna"])
@pytest.mark.parametrize("forces", ["vector", "direct", "conservative"])
@pytest.mark.parametrize("heads", ["per_source", "shared", "both"])
@pytest.mark.parametrize("n_layers", [1, 4])
def test_parameters_are_exact(family: str, forces: str, heads: str, n_layers: int, tools: Any) -> None:
    config = config_of(tools, family=family, forces=forces, energy_heads=heads, n_layers=n_layers, n_head_layers=3)
    assert n_parameters(config) == count_parameters(build_model(config, 0))


def test_one_layer_is_counted_too(tools: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tools, n_layers=1, forces="conservative")
    counted, work = count(config, batch, monkeypatch), model_work(config)
    assert work.training_flops.of(len(batch.numbers), batch.edge_index.shape[1]) == counted.training.flops


def test_work_grows_with_every_size(tools: Any) -> None:
    small = model_work(config_of(tools))
    for name in ("hidden_dim", "n_layers", "n_radial", "head_dim", "n_head_layers"):
        large = model_work(config_of(tools, **{name: SHAPE[name] * 2}))
        assert large.training_flops.of(10, 100) > small.training_flops.of(10, 100), name
        assert large.parameters > small.parameters, name


def test_conservative_forces_cost_twice_the_products_of_a_vector_head(tools: Any) -> None:
    """A linear layer, its input and its weights: 3 products; and each again for the forces' own derivative: 6."""
    kinds = {kind: config_of(tools, forces=kind, hidden_dim=500, n_layers=6) for kind in ("vector", "conservative")}
    dear, cheap = (model_work(kinds[kind]).training_flops.of(20, 400) for kind in ("conservative", "vector"))
    assert dear / cheap == pytest.approx(2.0, abs=0.2)


def test_a_rate_is_linear() -> None:
    assert Rate(2.0, 3.0).of(10, 100) == 320.0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("family", ["egnn", "schnet"])
@pytest.mark.parametrize("forces", ["vector", "conservative"])
@pytest.mark.parametrize("heads", ["per_source", "shared"])
def test_a_deviation_head_is_counted(
    family: str, forces: str, heads: str, tools: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tools, family=family, forces=forces, energy_heads=heads, energy_variance=True)
    counted, work = count(config, batch, monkeypatch), model_work(config)
    atoms, edges = len(batch.numbers), batch.edge_index.shape[1]
    assert work.training_flops.of(atoms, edges) == counted.training.flops
    assert work.inference_flops.of(atoms, edges) == counted.inference.flops
    assert work.training_operations == pytest.approx(counted.training.operators, rel=0.12)
    assert work.inference_operations == pytest.approx(counted.inference.operators, rel=0.12)
    assert n_parameters(config) == count_parameters(build_model(config, 0))
