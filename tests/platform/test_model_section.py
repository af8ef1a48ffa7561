"""Every choice of the network can be written in a config, searched, and reaches the model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from wattier.config import ModelSection, load_config
from wattier.errors import UserError
from wattier.optuna_sampler import distributions
from wattier.space import typed_space
from wattier.trial import model_config, settings_of

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SPACE = {
    "family": {"choices": ["egnn", "schnet", "pna"]},
    "energy_heads": {"choices": ["per_source", "shared", "both"]},
    "forces": {"choices": ["conservative", "vector", "direct"]},
    "precision": {"choices": ["float32", "bfloat16"]},
    "activation_checkpointing": {"choices": [True, False]},
    "edge_chunk": {"low": 256, "high": 4096, "log": True},
    "cutoff_angstrom": {"choices": [3, 4.5]},
    "energy_variance": {"choices": [True, False]},
}
STORE: Any = SimpleNamespace(
    sources=("a",),
    meta={"energy_scale_ev": [1.0], "mean_neighbors": 9.0, "cutoff_angstrom": 5.0},
    edge_share=lambda cutoff: {4.5: 0.6}[cutoff],
)


def config_with(folder: Path, **space: Any) -> Any:
    config = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    config["search"]["space"] = space
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return load_config(path)


def test_all_of_it_can_be_searched(tmp_path: Path) -> None:
    config = config_with(tmp_path, **SPACE)
    found = distributions(typed_space(config))
    assert {name: list(found[name].choices) for name in SPACE if name != "edge_chunk"} == {
        name: parameter["choices"] for name, parameter in SPACE.items() if name != "edge_chunk"
    }
    assert type(found["edge_chunk"]).__name__ == "IntDistribution"


def test_a_trial_s_choices_reach_the_network(tmp_path: Path) -> None:
    chosen = {
        "family": "pna", "energy_heads": "both", "forces": "direct", "precision": "bfloat16",
        "activation_checkpointing": True, "edge_chunk": 512, "cutoff_angstrom": 4.5,
        "energy_variance": True,
    }  # fmt: skip
    section, _ = settings_of(config_with(tmp_path, **SPACE), chosen)
    built = model_config(STORE, section)
    assert {name: getattr(built, name) for name in chosen} == chosen
    assert built.mean_neighbors == 9.0 * 0.6, "edges an atom within the smaller cutoff"


def test_without_a_cutoff_of_its_own_a_model_has_the_store_s() -> None:
    built = model_config(STORE, ModelSection())
    assert (built.cutoff_angstrom, built.mean_neighbors) == (5.0, 9.0)


@pytest.mark.parametrize(
    ("data", "model", "space"),
    [
        ({}, {"cutoff_angstrom": 5.5}, {}),
        ({"cutoff_angstrom": 4.0}, {"cutoff_angstrom": 5}, {}),
        ({}, {}, {"low": 3.0, "high": 5.5}),
        ({}, {"cutoff_angstrom": 3.0}, {"choices": [3.0, 5.5, 4.0]}),
    ],
)
def test_a_cutoff_beyond_the_data_is_refused(tmp_path: Path, data: Any, model: Any, space: Any) -> None:
    values = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    values["data"] |= {"cutoff_angstrom": 5.0, **data}
    values["model"] |= model
    values["search"]["space"] = {"cutoff_angstrom": space} if space else {"n_layers": {"choices": [2]}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(UserError, match=r"cutoff_angstrom reaches 5(\.5)? and data\.cutoff_angstrom is [45],.* Raise"):
        load_config(path)
    values["data"]["cutoff_angstrom"] = 5.5
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    load_config(path)


@pytest.mark.parametrize("value", [0, -3.0, "near", True, float("nan"), float("inf")])
def test_what_is_no_cutoff_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(UserError, match="cutoff_angstrom"):
        config_with(tmp_path, cutoff_angstrom={"choices": [value]})


def test_the_defaults_are_what_they_were() -> None:
    section = ModelSection()
    assert (section.family, section.energy_heads, section.precision) == ("egnn", "per_source", "float32")
    assert section.edge_chunk is None
    assert section.cutoff_angstrom is None
    assert not section.activation_checkpointing
    assert not section.energy_variance


@pytest.mark.parametrize(
    ("name", "value"), [("family", "mace"), ("energy_heads", "none"), ("precision", "float16"), ("edge_chunk", 0)]
)
def test_what_is_no_choice_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=name):
        config_with(tmp_path, **{name: {"choices": [value]}})
