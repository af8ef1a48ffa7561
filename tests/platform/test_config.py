"""A config is refused whole, in one line that names the file and the place, before anything starts."""

import copy
import re
import time
from pathlib import Path

import pytest
import yaml

from wattier.config import RunConfig, load_config, load_sizes
from wattier.errors import UserError
from wattier.optuna_sampler import distributions
from wattier.space import typed_space

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = (REPOSITORY / "configs/quickstart.yaml").read_text()
SPACE = ("search", "space")
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def refusal(tmp_path):
    """The message with which some text, bytes or data is refused."""

    def refuse(content):
        path = tmp_path / "quickstart.yaml"
        text = yaml.safe_dump(content) if isinstance(content, dict) else content
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        started = time.monotonic()
        with pytest.raises(UserError) as caught:
            load_config(path)
        assert time.monotonic() - started < 5
        message = str(caught.value)
        assert "quickstart.yaml: " in message
        assert "\n" not in message
        assert len(message) < 600
        return message

    return refuse


def changed(*path, to):
    """The quickstart config with one value changed."""
    data = yaml.safe_load(QUICKSTART)
    node = data
    for part in path[:-1]:
        node = node[part] if isinstance(node, list) else node.setdefault(part, {})
    node[path[-1]] = to
    return data


def test_typo_is_met_with_the_right_word(refusal):
    assert refusal(QUICKSTART.replace("epochs:", "epoch:", 1)) == (
        "quickstart.yaml: search.stages[0]: unknown key 'epoch'. Did you mean 'epochs'?"
    )


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        (("seed",), "one", "seed: is 'one'"),
        (("seed",), True, "seed: is True"),
        (("seed",), 1.5, "seed: is 1.5"),
        (("seed",), -1, "seed: is -1"),
        (("seed",), 2**40, "seed: is "),
        (("training", "learning_rate"), NAN, "training.learning_rate: is nan"),
        (("training", "learning_rate"), INF, "training.learning_rate: is inf"),
        (("training", "learning_rate"), 0.0, "training.learning_rate: is 0.0"),
        (("training", "plateau_factor"), 1.0, "training.plateau_factor: is 1.0"),
        (("model", "hidden_dim"), 10**30, "model.hidden_dim: is 1"),
        (("model", "hidden_dim"), "a\nb" * 500, "model.hidden_dim: is 'a\\nb"),
        (("model",), None, "model: is empty, but should be a mapping."),
        (("search",), "x", "search: is 'x', but should be a mapping."),
        (("search", "stages"), [], "search.stages: is []"),
        (("search", "stages", 0, "trials"), -1, "search.stages[0].trials: is -1"),
        (("search", "stages", 0, "trials"), 10**9, "search.stages[0].trials: is 1000000000"),
        (("search", "stages", 0, "reduction_factor"), 1, "search.stages[0].reduction_factor: is 1"),
        (("search", "stages", 1, "name"), "../x", "search.stages[1].name: is '../x'"),
        (("search", "stages", 1, "name"), "final\n", "search.stages[1].name: is 'final\\n'"),
        (("search", "stages", 1, "name"), "scout", "stage names are ['scout', 'scout'], but must all differ"),
        (("search", "stages", 1, "name"), "full", "none may be 'full'"),
        (("search", "stages", 1, "promote"), 40, "search.stages[1]: promote is 40, but must be at most trials"),
        (("search", "stages", 0, "promote"), 1, "'scout' promotes 1 trials of the stage before, but that has 0"),
        (("select",), {"accurate": 0, "balanced": 0}, "select: both tiers are empty"),
        (("data", "sources"), {"ani2x": "sample"}, "data.sources"),
        (("data", "sources"), {}, "data: sources is {} and store is null"),
        (("data", "split"), {"train": 0.5}, "data.split: shares sum to 0.7"),
        (("name",), "a/b", "name: is 'a/b'"),
        (("run_dir",), "", "run_dir: is ''"),
        (("run_dir",), "a\0b", "run_dir: is 'a\\x00b'"),
        (("run_dir",), "s3://bucket/run", "run_dir: is 's3://bucket/run', but must be a path on a file system"),
        (("launcher",), "rayy", "launcher: is 'rayy'"),
        (("resources", "gpus_per_rank"), INF, "resources.gpus_per_rank: is inf"),
        (("telemetry", "interval_seconds"), 0, "telemetry.interval_seconds: is 0"),
        (("telemetry", "throttled_share"), 1.5, "telemetry.throttled_share: is 1.5"),
        (("telemetry", "throttled_share"), -0.1, "telemetry.throttled_share: is -0.1"),
        (("telemetry", "exporter"), "yes", "telemetry.exporter: is 'yes'"),
        (("telemetry", "exporter_port"), 70000, "telemetry.exporter_port: is 70000"),
        (("telemetry", "exporter_address"), "node1", "exporter_address: is 'node1', but must be an IP address"),
        (("telemetry", "exporter_allow"), ["10.0.0.1/8"], "exporter_allow: '10.0.0.1/8' is no network"),
        (("telemetry",), {"exporter": True, "exporter_address": "0.0.0.0"}, "exporter_allow is empty"),
    ],
)
def test_wrong_values_are_refused_with_their_place(refusal, path, value, where):
    assert where in refusal(changed(*path, to=value))


def test_an_exporter_may_be_opened_to_a_network(tmp_path):
    section = {"exporter": True, "exporter_address": "0.0.0.0", "exporter_allow": ["10.1.0.0/16", "fd00::/8"]}
    path = tmp_path / "quickstart.yaml"
    path.write_text(yaml.safe_dump(changed("telemetry", to=section)))
    telemetry = load_config(path).telemetry
    assert telemetry.exporter_allow == section["exporter_allow"]
    assert RunConfig.model_fields["telemetry"].default.exporter is False, "nothing listens unless somebody asks"


@pytest.mark.parametrize(
    ("name", "parameter", "what"),
    [
        ("hiden_dim", {"low": 1, "high": 2}, "search.space: unknown parameter 'hiden_dim'. Did you mean 'hidden_dim'?"),
        ("hidden_dim", {"low": -5, "high": 80}, "search.space: hidden_dim reaches -5"),
        ("hidden_dim", {"low": 8.0, "high": 80.0}, "search.space: hidden_dim reaches 8.0"),
        ("hidden_dim", {"choices": [8, "wide"]}, "search.space: hidden_dim reaches 'wide'"),
        ("hidden_dim", {"low": 80, "high": 8}, "search.space.hidden_dim: low is 80 and high is 8"),
        ("hidden_dim", {"low": 8, "hi": 80}, "search.space.hidden_dim: unknown key 'hi'. Did you mean 'high'?"),
        ("hidden_dim", {"low": 8}, "search.space.hidden_dim.high: is missing"),
        ("hidden_dim", {"low": 8, "choices": [8]}, "search.space.hidden_dim: unknown key 'low'"),
        ("hidden_dim", {}, "search.space.hidden_dim.low: is missing"),
        ("hidden_dim", 5, "search.space.hidden_dim: is 5, but should be a mapping"),
        ("hidden_dim", {"low": 8, "high": 80, "step": -8}, "search.space.hidden_dim.step: is -8"),
        ("hidden_dim", {"low": 8, "high": 80, "step": 0.5}, "search.space: step of hidden_dim is 0.5"),
        ("hidden_dim", {"low": 8, "high": 80, "step": 7}, "search.space.hidden_dim: step is 7"),
        ("hidden_dim", {"low": 8, "high": 80, "step": 800}, "search.space.hidden_dim: step is 800"),
        ("learning_rate", {"low": 0, "high": 1.0, "log": True}, "search.space.learning_rate: low is 0"),
        ("learning_rate", {"low": 0.0, "high": 1.0}, "search.space: learning_rate reaches 0.0"),
        ("learning_rate", {"low": NAN, "high": 1.0}, "search.space.learning_rate: low is nan"),
        ("learning_rate", {"low": 1e-3, "high": INF}, "search.space.learning_rate: low is 0.001 and high is inf"),
        ("ema_decay", {"low": 0.5, "high": 1.0}, "search.space: ema_decay reaches 1.0"),
        ("forces", {"choices": ["vector", "magic"]}, "search.space: forces reaches 'magic'"),
    ],
)
def test_a_space_that_no_trial_could_use_is_refused(refusal, name, parameter, what):
    assert what in refusal(changed(*SPACE, name, to=parameter))


BOMB = "l0: &l0 [a, a, a, a, a, a, a, a, a]\n" + "".join(
    f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 30)
)


NO_CONFIGS = [
    ("", "is empty, but must be a mapping"),
    ("# nothing\n", "is empty, but must be a mapping"),
    ("- a\n", "is ['a'], but must be a mapping"),
    ("name: a\nname: b\n", "key 'name' is given twice, line 2"),
    (bytes(range(256)), "is not UTF-8 text"),
    (b"\0\0\0", "is not valid YAML"),
    ("name: quick".encode("utf-16"), "is not UTF-8 text"),
    ("a:\n\t- b\n", "is not valid YAML"),
    ("a: 1\n---\nb: 2\n", "is not valid YAML"),
    ("!!python/object/apply:os.system [true]\n", "is not valid YAML"),
    ("1: 2\n", "key 1 is no text"),
    (QUICKSTART.replace("model:\n", "model:\n  3: 4\n"), "model: key 3 is no text"),
    ("? [1, 2]\n: 3\n", "is not valid YAML"),
    (re.sub("(?m)^seed: .*", "seed: 0x" + "f" * 10_000, QUICKSTART), "seed: is a number of more than 77 digits"),
    ("seed: " + "9" * 5000, "is not valid YAML"),
    ("name: 2024-13-45\n", "is not valid YAML"),
    ("name: !!float x\n", "is not valid YAML"),
    ("name: !!bool x\n", "is not valid YAML"),
    ("[" * 5000, "is not valid YAML"),
    ("{a: " * 3000, "is not valid YAML"),
    ("&a\nname: *a\n", "name: is {"),
    (BOMB, "unknown key 'l0'"),
    (BOMB + "name: *l29\n", "unknown key 'l0'"),
    ("x0: &x0 {a: 1}\n" + "".join(f"x{i}: &x{i} {{<<: [{f'*x{i - 1},' * 9}]}}\n" for i in range(1, 30)), ""),
    ("a" * 2_000_000, "is 2000000 bytes, but a config must be under"),
]


@pytest.mark.parametrize(("text", "what"), NO_CONFIGS, ids=[what for _, what in NO_CONFIGS])
def test_files_that_are_no_config_are_refused_quickly(refusal, text, what):
    assert what in refusal(text)


def test_a_bomb_in_the_place_of_a_value_is_not_written_out(refusal):
    bomb = "".join(f"- &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 30))
    text = QUICKSTART.replace("name: quickstart\n", "name:\n- &l0 [a, a, a]\n" + bomb)
    assert "name: is [" in refusal(text)


def test_paths_that_are_no_file_are_refused(tmp_path):
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "quickstart.yaml" / "x"):
        with pytest.raises(UserError, match=path.name):
            load_config(path)


def test_written_and_read_again_it_is_the_same(tmp_path):
    config = load_config(REPOSITORY / "configs/quickstart.yaml")
    path = tmp_path / "again.yaml"
    path.write_text(config.to_yaml())
    again = load_config(path)
    assert again == config
    assert again.to_yaml() == config.to_yaml()


def test_exponents_without_a_dot_are_numbers(tmp_path):
    path = tmp_path / "quickstart.yaml"
    path.write_text(QUICKSTART.replace("low: 1.0e-3", "low: 1e-3"))
    low = load_config(path).search.space["learning_rate"].low
    assert (type(low), low) == (float, 0.001)


@pytest.mark.parametrize(
    "parameter",
    [
        {"low": 8, "high": 80, "step": 8},
        {"low": 8, "high": 80, "step": 8.0},
        {"low": 8, "high": 80, "log": True},
        {"low": 8, "high": 8},
        {"choices": [8, 16]},
    ],
)
def test_optuna_takes_every_space_that_is_accepted(parameter):
    data = changed(*SPACE, to={"hidden_dim": parameter, "ema_decay": {"low": 0.1, "high": 0.9, "step": 0.1}})
    config = RunConfig.model_validate(copy.deepcopy(data))
    assert set(distributions(typed_space(config))) == {"hidden_dim", "ema_decay"}


def test_sizes_are_checked_the_same_way(tmp_path):
    path = tmp_path / "sizes.yaml"
    path.write_text("sizes:\n  SMALL: {architecture: reference, hiden_dim: 3}\n")
    with pytest.raises(UserError, match=r"^sizes\.yaml: sizes\.SMALL: unknown key 'hiden_dim'\. Did you mean"):
        load_sizes(path)
