"""The configs that ship: each is valid, and says what it is for."""

import os
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from wattier.config import load_config, load_sizes
from wattier_telemetry.commands import make_parser

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SIZES = "talk_sizes.yaml"


def test_none_is_missing():
    assert {path.name for path in CONFIGS} >= {
        "quickstart.yaml",
        "single_gpu.yaml",
        "multi_node.yaml",
        "paper.yaml",
        "wide.yaml",
        SIZES,
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_loads(path):
    if path.name == SIZES:
        assert set(load_sizes(path).sizes) == {"SMALL", "MEDIUM", "LARGE"}
        return
    config = load_config(path)
    assert config.name == path.stem
    assert Path(config.run_dir).name == path.stem
    *_, last = config.search.stages
    assert last.reduction_factor is None, "the stage that fills the tiers lets every trial finish"
    assert last.trials >= config.select.accurate + config.select.balanced
    for before, after in zip(config.search.stages, config.search.stages[1:], strict=False):
        assert after.promote <= before.trials


@pytest.mark.parametrize("name", ["multi_node", "paper"])
def test_cluster_configs_have_absolute_paths(name):
    """A submitted job runs in a copied working directory."""
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert config.resources.address == "auto"
    assert all(Path(path).is_absolute() for path in (config.run_dir, *config.data.sources.values()))


def test_paper_has_the_published_space():
    config = load_config(ROOT / "configs" / "paper.yaml")
    space = dict(config.search.space)
    assert space.pop("family").choices == ["egnn", "schnet", "pna"]
    ranges = {name: (parameter.low, parameter.high) for name, parameter in space.items()}
    assert ranges == {
        "n_layers": (2, 6),
        "hidden_dim": (100, 2000),
        "n_head_layers": (2, 3),
        "head_dim": (300, 1000),
        "batch_structures": (16 * 1024, 128 * 1024),  # theirs are a rank's own, ours a step's over 1,024 ranks
    }
    assert (config.select.accurate, config.select.balanced) == (4, 11)


def test_wide_searches_what_moves_power_or_cost():
    """More than the night's config, in stages that rise; its data hold every cutoff that is searched."""
    config, night = (load_config(ROOT / "configs" / f"{name}.yaml") for name in ("wide", "single_gpu"))
    space = config.search.space
    assert set(space) > set(night.search.space)
    assert set(space) >= {"batch_structures", "precision", "learning_rate", "force_weight", "cutoff_angstrom", "family"}
    assert space["learning_rate"].log
    assert space["cutoff_angstrom"].high == config.data.cutoff_angstrom
    sizes = [(stage.structures, stage.epochs) for stage in config.search.stages]
    assert len(sizes) == 3
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(sizes))


def test_slurm_script_is_valid_bash():
    subprocess.run(["bash", "-n", str(ROOT / "configs/slurm/wattier.sbatch")], check=True)


@pytest.fixture
def submit(tmp_path):
    """Run the Slurm script with stand-ins for Slurm, Ray and Wattier, and some of its lines edited."""

    def run(n_nodes, run_code=0, edits=()):
        lasting = "echo $$>>pids; {}; exec sleep 9"
        tools = {
            "scontrol": f"printf 'n%s\\n' $(seq {n_nodes})",
            "srun": 'for a; do [[ $a == --nodelist=* ]] && export NODE=${a#*=}; done; '
                    'while [[ $1 == -* ]]; do shift; done; exec "$@"',
            "hostname": "echo 192.0.2.1 192.0.2.2",
            "ray": lasting.format('echo "ray $* $RAY_AUTH_MODE $(stat -c %a $RAY_AUTH_TOKEN_PATH)" >> calls'),
            "python": "[[ $1 == -c ]] && echo token ||"
                      f" while (($(grep -c ^ray calls) < {n_nodes})); do sleep 0.05; done",
            "wattier": f'echo "wattier $* $RAY_ADDRESS" >> calls; exit {run_code}',
            "wattier-telemetry": lasting.format('echo "$NODE $* runtime=$XDG_RUNTIME_DIR" >> samplers'),
            "sleep": 'if [[ $1 == 10 ]]; then exec /bin/sleep 0.2; else exec /bin/sleep "$1"; fi',
        }  # fmt: skip
        (tmp_path / "bin").mkdir()
        for name, text in tools.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        (tmp_path / ".venv/bin").mkdir(parents=True)
        (tmp_path / ".venv/bin/activate").touch()
        text = (ROOT / "configs/slurm/wattier.sbatch").read_text()
        for before, after in edits:
            assert text.count(f"\n{before}") == 1
            text = text.replace(f"\n{before}", f"\n{after}")
        (tmp_path / "wattier.sbatch").write_text(text)
        slurm = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "n[1-9]", "SLURM_CPUS_PER_TASK": "4"}
        environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "XDG_RUNTIME_DIR": "/run/user/0", **slurm}
        answer = subprocess.run(
            ["bash", "wattier.sbatch", "some.yaml"],
            cwd=tmp_path, env=environment, check=False, timeout=30, capture_output=True,
        )  # fmt: skip
        assert answer.returncode == run_code, answer.stderr
        for pid in map(int, (tmp_path / "pids").read_text().split()):
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        samplers = tmp_path / "samplers"
        return sorted(samplers.read_text().splitlines()) if samplers.exists() else []

    return run


@pytest.mark.parametrize(("n_nodes", "run_code"), [(1, 0), (2, 0), (2, 3)])
def test_slurm_script_starts_ends_and_cleans_up(submit, tmp_path, n_nodes, run_code):
    """One head, workers, the run's exit code, no child and no token left."""
    submit(n_nodes, run_code)
    calls = sorted((tmp_path / "calls").read_text().splitlines())
    assert sum("--head" in call for call in calls) == 1
    assert sum("--address=192.0.2.1:22345" in call for call in calls) == n_nodes - 1
    assert all(call.endswith("token 600") for call in calls if call.startswith("ray"))
    assert calls[-1] == "wattier run some.yaml 192.0.2.1:22345"
    assert not list(tmp_path.glob(".ray-token*"))


class TestSamplerOfSlurm:
    def test_each_node_has_one_that_answers_itself_alone(self, submit):
        spool = f"/tmp/wattier-{os.getuid()}-spool"
        assert submit(2) == [f"n{n} serve --port 9500 --spool {spool} runtime=" for n in (1, 2)]

    def test_it_lists_itself_for_the_networks_that_may_ask(self, submit, tmp_path):
        edits = [('sampler_allow=""', 'sampler_allow="10.1.0.0/16 10.2.3.4"'), ('sampler_token=""', "sampler_token=t")]
        first, second = submit(2, edits=edits)
        assert "--allow 10.1.0.0/16 --allow 10.2.3.4 --token-file t --address 0.0.0.0" in first
        assert f"--discovery {tmp_path}/dashboards/targets/12345-n2.json" in second

    def test_its_options_are_known_to_the_command(self, submit):
        (call,) = submit(1, edits=[('sampler_allow=""', "sampler_allow=10.1.0.0/16")])
        options = make_parser().parse_args(call.split()[1:-1])
        assert (options.address, options.allow, options.port) == ("0.0.0.0", ["10.1.0.0/16"], 9500)

    def test_it_can_be_switched_off(self, submit):
        assert submit(1, edits=[("sampler=on ", "sampler=off ")]) == []


def test_runtime_env_names_the_source_roots():
    runtime = yaml.safe_load((ROOT / "configs/ray/runtime_env.yaml").read_text())
    roots = runtime["env_vars"]["PYTHONPATH"].split(":")
    assert all((ROOT / root).is_dir() for root in roots)
    assert {".git", ".venv", "/runs"} <= set(runtime["excludes"])
    assert not {"data", "*.h5"} & set(runtime["excludes"]), "the sample's own data must go along"
