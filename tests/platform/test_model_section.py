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
}


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
        "activation_checkpointing": True, "edge_chunk": 512,
    }  # fmt: skip
    section, _ = settings_of(config_with(tmp_path, **SPACE), chosen)
    store = SimpleNamespace(
        sources=("a",), meta={"energy_scale_ev": [1.0], "mean_neighbors": 9.0, "cutoff_angstrom": 5.0}
    )
    built = model_config(store, section)  # type: ignore[arg-type]
    assert {name: getattr(built, name) for name in chosen} == chosen


def test_the_defaults_are_what_they_were() -> None:
    section = ModelSection()
    assert (section.family, section.energy_heads, section.precision) == ("egnn", "per_source", "float32")
    assert section.edge_chunk is None
    assert not section.activation_checkpointing


@pytest.mark.parametrize(
    ("name", "value"), [("family", "mace"), ("energy_heads", "none"), ("precision", "float16"), ("edge_chunk", 0)]
)
def test_what_is_no_choice_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=name):
        config_with(tmp_path, **{name: {"choices": [value]}})
