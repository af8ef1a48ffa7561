"""Settings of training that do not go together are refused before anything starts; each can be searched."""

from pathlib import Path
from typing import Literal, get_origin

import pytest
import yaml

from wattier.config import TrainingSection, field_type, load_config
from wattier.errors import UserError
from wattier.optuna_sampler import distributions
from wattier.space import typed_space
from wattier.trial import settings_of
from wattier_gnn.train import TrainConfig

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
EVERY_SOURCE = dict.fromkeys(("ani1x", "qm7x", "oc20", "oc22", "mptrj"), 1.0)


@pytest.fixture
def load(tmp_path):
    """The quickstart with other settings of training and of the search space."""

    def with_changes(training=None, space=None, model=None, resources=None):
        data = yaml.safe_load(QUICKSTART.read_text())
        data["training"] |= training or {}
        data["search"]["space"] |= space or {}
        data["model"] |= model or {}
        data["resources"] = data.get("resources", {}) | (resources or {})
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(data))
        return load_config(path)

    return with_changes


def test_the_sources_of_a_shared_store_are_weighted_by_what_it_holds(tmp_path):
    data = yaml.safe_load(QUICKSTART.read_text())
    data["data"] = {"store": str(tmp_path / "store")}
    data["training"] |= {"mixture": "weights", "source_weights": EVERY_SOURCE}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(data))
    assert load_config(path).training.source_weights == EVERY_SOURCE


def test_parts_of_a_model_need_whole_gpus(tmp_path):
    data = yaml.safe_load(QUICKSTART.read_text())
    data["training"] |= {"sharding": "fsdp"}
    data["resources"] = {"gpus_per_rank": 0.5}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(UserError, match=r"resources.gpus_per_rank is 0.5, but ranks that hold parts"):
        load_config(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training": {"mixture": "even"}},
            "run.yaml: training.mixture: is 'even', but should be 'natural'",
        ),
        ({"training": {"mixture_temperature": 0.5}}, "run.yaml: training.mixture_temperature: is 0.5"),
        ({"training": {"batch_atoms": 0}}, "run.yaml: training.batch_atoms: is 0"),
        ({"training": {"warmup_steps": -1}}, "run.yaml: training.warmup_steps: is -1"),
        ({"training": {"schedual": "cosine"}}, "run.yaml: training: unknown key 'schedual'. Did you mean 'schedule'?"),
        ({"training": {"source_weights": {"oc21": 1.0}}}, "training.source_weights"),
        ({"training": {"source_weights": {"oc20": 0.0}}}, "training.source_weights.oc20: is 0.0"),
        (
            {"training": {"source_weights": EVERY_SOURCE}},
            "run.yaml: training.source_weights is given, but training.mixture is not weights",
        ),
        (
            {"training": {"mixture": "weights"}},
            "run.yaml: training.source_weights names no source, but mixture weights needs one for each of data.sources",
        ),
        (
            {"training": {"mixture": "weights", "source_weights": {"oc20": 1.0}}},
            "run.yaml: training.source_weights names oc20, but mixture weights needs one for each of data.sources",
        ),
        ({"space": {"mixture": {"choices": ["natural", "weights"]}}}, "training.source_weights names no source"),
        (
            {"training": {"warmup_steps": 10, "warmup_epochs": 1.0}},
            "run.yaml: training.warmup_steps and training.warmup_epochs are both above 0",
        ),
        (
            {"training": {"warmup_steps": 10}, "space": {"warmup_epochs": {"low": 0.0, "high": 1.0}}},
            "training.warmup_steps and training.warmup_epochs are both above 0",
        ),
        (
            {"training": {"sharding": "fsdp"}, "model": {"forces": "conservative"}},
            "run.yaml: training.sharding is fsdp and model.forces is conservative",
        ),
        (
            {"training": {"sharding": "fsdp"}, "space": {"forces": {"choices": ["vector", "conservative"]}}},
            "training.sharding is fsdp and model.forces is conservative",
        ),
        ({"space": {"source_weights": {"choices": [1.0]}}}, "search.space: source_weights reaches 1.0"),
        ({"space": {"batch_edges": {"low": 0, "high": 10}}}, "search.space: batch_edges reaches 0"),
        ({"space": {"power_cap_ratio": {"low": 0.5, "high": 1.1}}}, "search.space: power_cap_ratio reaches 1.1"),
        (
            {"space": {"power_cap_ratio": {"choices": [0.5]}}},
            "run.yaml: power_cap_ratio is given, which sets power limits, but resources.allow_power_cap is false",
        ),
        (
            {"training": {"power_cap_ratio": 0.5}, "resources": {"allow_power_cap": True, "gpus_per_rank": 0.5}},
            "run.yaml: power_cap_ratio is given and resources.gpus_per_rank is 0.5, but a power limit acts on all who",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(load, changes, message):
    with pytest.raises(UserError) as caught:
        load(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_goes_together_is_accepted(load):
    training = {
        "mixture": "weights", "source_weights": EVERY_SOURCE, "batch_atoms": 4000, "batch_edges": 60000,
        "epoch_structures": 500, "loss": "huber", "schedule": "cosine", "warmup_epochs": 1, "sharding": "fsdp",
        "checkpoint_seconds": 60, "prefetch_batches": 0,
    }  # fmt: skip
    config = load(training)
    assert TrainConfig(epochs=1, **config.training.for_trainer()).source_weights == EVERY_SOURCE


def test_every_setting_with_one_value_can_be_searched(load):
    """A trial's value reaches the trainer's config under its own name; that of a power cap reaches the GPU."""
    examples = {int: {"low": 2, "high": 4}, float: {"low": 0.25, "high": 0.75}}
    for name in TrainingSection.model_fields.keys() - {"source_weights"}:
        kind = field_type(name)
        if get_origin(kind) is Literal:
            parameter = {"choices": [value for value in kind.__args__ if value != "weights"]}
        elif name == "mixture_temperature":
            parameter = {"low": 1.0, "high": 4.0}
        else:
            parameter = examples[kind]
        config = load(space={name: parameter}, resources={"allow_power_cap": True})
        assert name in distributions(typed_space(config))
        value = parameter["choices"][-1] if "choices" in parameter else parameter["high"]
        _, training = settings_of(config, {name: value})
        holder = training if name == "power_cap_ratio" else TrainConfig(epochs=1, **training.for_trainer())
        assert getattr(holder, name) == value


def test_defaults_of_the_config_are_those_of_the_trainer():
    trainer = TrainConfig(epochs=1)
    for name, value in TrainingSection().for_trainer().items():
        assert getattr(trainer, name) == value, name
