"""What makes the model fast or small changes none of its numbers; what rounds says by how much."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_egnn import PlainEGNN
from safetensors.torch import load_file, save_file

from wattier_gnn import ops
from wattier_gnn.batch import Batch
from wattier_gnn.model import FoundationModel, ModelConfig, build_model
from wattier_gnn.store import Store

OLD_KEYS = {
    "sources", "energy_scale_ev", "mean_neighbors", "cutoff_angstrom", "hidden_dim", "n_layers", "n_radial",
    "head_dim", "n_head_layers", "forces",
}  # fmt: skip


def batch_of(tools: Any, dtype: torch.dtype = torch.float32) -> Batch:
    """The scenes, in which coordinates move; labels are 0."""
    batch: Batch = tools.join(list(tools.scenes().values()))
    return replace(
        batch, **{name: getattr(batch, name).to(dtype) for name in ("positions", "edge_shift", "energy", "forces")}
    )


def step(model: Any, batch: Batch) -> dict[str, Any]:
    """Energies, forces and the gradient of every parameter, of one training step."""
    model.train().zero_grad()
    prediction = model(batch)
    (prediction.energy.square().sum() + prediction.forces.square().sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"energy": prediction.energy.detach(), "forces": prediction.forces.detach(), **gradients}


def assert_same(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> None:
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=tolerance * float(b[name].abs().max()), err_msg=name)


@pytest.mark.parametrize("forces", ["conservative", "vector"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_it_equals_the_plain_formulation(
    forces: str, dtype: torch.dtype, tolerance: float, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "SMALLEST_ONE_DNN_PRODUCT", 1)
    fast = tools.model(forces=forces).to(dtype)
    a, b = step(fast, batch_of(tools, dtype)), step(PlainEGNN(fast).to(dtype), batch_of(tools, dtype))
    for name in ("energy", "forces"):
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=tolerance * float(b[name].abs().max()))
    first = torch.cat([a[f"encoder.layers.0.{part}.weight"] for part in ("receiver", "sender", "radial")], dim=1)
    wanted = b["layers.0.first.weight"]
    np.testing.assert_allclose(first, wanted, rtol=0, atol=10 * tolerance * float(wanted.abs().max()))


@pytest.mark.parametrize("forces", ["conservative", "vector", "direct"])
@pytest.mark.parametrize(
    "changes",
    [
        {"activation_checkpointing": True},
        {"edge_chunk": 7},
        {"edge_chunk": 40, "activation_checkpointing": True},
        {"family": "schnet", "activation_checkpointing": True},
        {"family": "pna", "activation_checkpointing": True},
    ],
    ids=["checkpointing", "chunks", "both", "schnet", "pna"],
)
def test_less_memory_changes_no_number(forces: str, changes: dict[str, Any], tools: Any) -> None:
    frugal = tools.model(forces=forces, **changes)
    lavish = tools.model(forces=forces, family=frugal.config.family)
    batch = batch_of(tools, torch.float64)
    assert_same(step(frugal, batch), step(lavish, batch), 1e-10)


@pytest.mark.parametrize("forces", ["conservative", "vector"])
@pytest.mark.parametrize("changes", [{"activation_checkpointing": True}, {"edge_chunk": 40}], ids=["layers", "chunks"])
def test_less_is_kept_for_the_backward_pass(forces: str, changes: dict[str, Any], tools: Any) -> None:
    def kept_bytes(model: Any) -> int:
        kept: dict[int, Any] = {}  # a tensor kept twice takes its memory once

        def note(tensor: Any) -> Any:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            prediction = model.train()(batch_of(tools, torch.float64))
        assert prediction.forces.requires_grad
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)

    lavish = kept_bytes(tools.model(forces=forces, hidden_dim=48))
    assert kept_bytes(tools.model(forces=forces, hidden_dim=48, **changes)) < 0.6 * lavish


@pytest.mark.parametrize("family", ["egnn", "schnet", "pna"])
@pytest.mark.parametrize("forces", ["conservative", "vector", "direct"])
def test_bfloat16_rounds_linear_layers_and_nothing_else(family: str, forces: str, tools: Any) -> None:
    exact = tools.model(family=family, forces=forces)
    rounded = build_model(replace(exact.config, precision="bfloat16"), seed=3)
    rounded.load_state_dict(exact.float().state_dict())
    found, wanted = step(rounded, batch_of(tools)), step(exact.double(), batch_of(tools, torch.float64))
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    for name in ("energy", "forces"):
        error = float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max())
        assert 1e-6 < error < 0.1, name  # rounded, by some thousandths


def test_the_same_atoms_give_the_same_bits(tools: Any) -> None:
    model, batch = tools.model(forces="vector").float(), batch_of(tools)
    for name, tensor in step(model, batch).items():
        assert torch.equal(tensor, step(model, batch)[name])


def test_a_config_of_the_first_schema_still_builds_the_same_network(tools: Any) -> None:
    model = tools.model(forces="vector")
    old = {k: v for k, v in model.config.to_dict().items() if k in OLD_KEYS}
    assert ModelConfig.from_dict(old) == model.config
    names = set(FoundationModel(ModelConfig.from_dict(old)).state_dict())
    # Names of a checkpoint written by the first release.
    assert {"encoder.layers.0.coordinate.2.weight", "force_head.strength.2.weight", "energy_heads.out"} <= names
    assert {"encoder.mean_neighbors", "encoder.basis.frequency", "encoder.layers.2.node.2.bias"} <= names


@pytest.mark.parametrize(
    "changes", [{"family": "mace"}, {"forces": "none"}, {"energy_heads": "own"}, {"precision": "float16"}]
)
def test_a_choice_that_is_none_is_refused(changes: dict[str, Any], tools: Any) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name} is .* must be one of"):
        ModelConfig.from_dict({**tools.model().config.to_dict(), **changes})


def test_the_degree_histogram_sets_the_scalers_of_pna(tools: Any) -> None:
    """Mean degrees by hand: 3 atoms with 2 neighbours and 1 with 10 have 4 on average."""
    histogram = (0, 0, 3, *[0] * 7, 1)
    known = tools.model(family="pna", degree_histogram=histogram)
    assert float(known.encoder.layers[0].conv.aggr_module.avg_deg_lin) == 4.0
    assert float(tools.model(family="pna").encoder.layers[0].conv.aggr_module.avg_deg_lin) == 12.0
    again = FoundationModel(ModelConfig.from_dict(known.config.to_dict()))
    again.load_state_dict(known.state_dict())
    assert again.config.degree_histogram == histogram


@pytest.mark.parametrize("family", ["egnn", "schnet", "pna"])
def test_a_copy_and_saved_weights_predict_the_same(family: str, tools: Any, tmp_path: Path) -> None:
    """The weight average deep-copies a model, a release saves it."""
    model, batch = tools.model(family=family), batch_of(tools, torch.float64)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "weights")
    loaded = FoundationModel(ModelConfig.from_dict(json.loads(json.dumps(model.config.to_dict())))).double().eval()
    loaded.load_state_dict(load_file(tmp_path / "weights"))
    for other in (copy.deepcopy(model), loaded):
        assert torch.equal(other(batch).energy, model(batch).energy)
        assert torch.equal(other(batch).forces, model(batch).forces)


@pytest.mark.parametrize("family", ["egnn", "schnet", "pna"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_family_learns(family: str, precision: str, emt_store: Store) -> None:
    """Forty steps on 27 Cu/Al structures halve the error of forces that an independent potential made."""
    config = ModelConfig(
        emt_store.sources, tuple(emt_store.meta["energy_scale_ev"]), emt_store.meta["mean_neighbors"], 3.5, 16, 2,
        family=family, precision=precision, forces="vector",
    )  # fmt: skip
    model, batch = build_model(config, 0), emt_store.batch(np.arange(27))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = (model(batch).forces - batch.forces).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


def test_torch_geometric_is_imported_only_for_its_families() -> None:
    code = """
import sys, wattier_gnn.model as m
config = dict(sources=("a",), energy_scale_ev=(1.0,), mean_neighbors=3.0, hidden_dim=4, head_dim=4)
m.build_model(m.ModelConfig(**config), 0)
assert "torch_geometric" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(__file__).parent)
