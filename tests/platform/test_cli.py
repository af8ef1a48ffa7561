"""The command line: a frozen list of verbs, light imports, and one line with exit code 2 for every mistake."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from wattier.rundir import RunDir
from wattier.trial import load_member
from wattier_gnn.checkpoint import load
from wattier_gnn.sample import SAMPLE_FOLDER
from wattier_gnn.structure import DataError

REPOSITORY = Path(__file__).parents[2]
VERBS = [
    "bench",
    "config",
    "data",
    "doctor",
    "evaluate",
    "export",
    "finetune",
    "predict",
    "push",
    "report",
    "run",
    "search",
    "select",
    "status",
    "study",
    "submit",
    "telemetry",
    "train",
    "verify",
]
CONFIG_VERBS = ["params", "schema", "show"]
BENCH_VERBS = ["power"]
DATA_VERBS = ["export", "fetch", "ingest", "stats", "verify"]
HEAVY = ["torch", "ray", "optuna", "pydantic", "numpy", "h5py", "ase", "plotly"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def wattier(tmp_path, home):
    """Run the command as a user does, in a folder and a HOME of its own."""

    def command(*arguments, timeout=60):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment |= {"HOME": str(home), "WATTIER_REGISTRY": str(tmp_path / "registry")}
        return subprocess.run(
            [sys.executable, "-m", "wattier", *map(str, arguments)], cwd=tmp_path, env=environment, text=True,
            capture_output=True, timeout=timeout, check=False,
        )  # fmt: skip

    return command


@pytest.fixture
def refused(wattier, tmp_path):
    """The one line on stderr with which a command is refused."""

    def command(*arguments):
        done = wattier(*arguments)
        assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
        lines = done.stderr.splitlines()
        assert len(lines) == 1, done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert not list(tmp_path.glob("wattier-crash-*"))
        assert not list(tmp_path.rglob("*.tmp"))
        deadline = time.monotonic() + 20
        while (
            leftovers(tmp_path) and time.monotonic() < deadline
        ):  # those of other tests' clusters are on their way out
            time.sleep(0.1)
        assert not leftovers(tmp_path)
        return lines[0]

    return command


def leftovers(folder):
    """Processes that still work in a folder, and Ray processes that nobody owns any more."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd", "ppid"]):
        line = " ".join(process.info["cmdline"] or [])
        orphaned_ray = "wattier-ray-" in line and process.info["ppid"] == 1
        if process.info["cwd"] == str(folder) or orphaned_ray:
            found.append(line)
    return found


@pytest.fixture
def config(tmp_path):
    """Write a small config, with some values changed: ``config(data={...})``."""

    def write(**changes):
        data = {
            "name": "small",
            "run_dir": "run",
            "launcher": "inline",
            "data": {"sources": {"qm7x": "sample"}, "cutoff_angstrom": 3.0},
            "model": {"hidden_dim": 8, "n_layers": 1, "n_radial": 4, "head_dim": 8, "n_head_layers": 1,
                      "forces": "vector"},
            "search": {
                "space": {"learning_rate": {"low": 1e-3, "high": 1e-2, "log": True}},
                "stages": [{"name": "only", "trials": 1, "structures": 50, "epochs": 1}],
            },
            "full_training": {"epochs": 1},
            "telemetry": {"source": "estimated"},
            **changes,
        }  # fmt: skip
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return write


def in_run(tmp_path):
    """Files of the run directory, without the config, the locks, the energy journals and the finished parts of an
    ingestion that a refusal may leave."""
    run = tmp_path / "run"
    files = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    kept = ("phases/", "data/store/.ingest/")
    return {f for f in files if f not in {"config.yaml", "lock", "data/store/.lock"} and not f.startswith(kept)}


class TestHelp:
    def test_help_is_light(self):
        script = f"""
            import sys
            from typer.testing import CliRunner
            from wattier.cli import app
            assert CliRunner().invoke(app, ["--help"]).exit_code == 0
            print([name for name in {HEAVY} if name in sys.modules])
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "[]"

    def test_verbs_are_frozen(self):
        from wattier.bench_cli import bench_app
        from wattier.cli import app, config_app
        from wattier.data_cli import data_app

        def names(group):
            commands = [c.name or c.callback.__name__.replace("_", "-") for c in group.registered_commands]
            return sorted(commands + [g.name for g in group.registered_groups])

        assert names(app) == VERBS
        assert names(config_app) == CONFIG_VERBS
        assert names(data_app) == DATA_VERBS
        assert names(bench_app) == BENCH_VERBS

    @pytest.mark.parametrize(
        "verb",
        [[v] for v in VERBS]
        + [["bench", v] for v in BENCH_VERBS]
        + [["config", v] for v in CONFIG_VERBS]
        + [["data", v] for v in DATA_VERBS],
        ids=" ".join,
    )
    def test_every_verb_explains_itself(self, verb):
        from typer.testing import CliRunner

        from wattier.cli import app

        done = CliRunner().invoke(app, [*verb, "--help"], catch_exceptions=False)
        assert done.exit_code == 0
        assert len([line for line in done.output.splitlines() if line.strip()]) >= 4

    @pytest.mark.parametrize("arguments", [["serch", "x"], ["run"], ["run", "a", "b"], ["run", "--fast", "a"]])
    def test_wrong_usage_is_exit_2(self, wattier, arguments):
        done = wattier(*arguments)
        assert done.returncode == 2
        assert "Usage" in done.stderr
        assert "Traceback" not in done.stderr


class TestTelemetryVerb:
    """`wattier telemetry ...` is `wattier-telemetry ...`, to the last option."""

    def same(self, wattier, *arguments):
        done = wattier("telemetry", *arguments)
        alone = subprocess.run(
            [sys.executable, "-m", "wattier_telemetry.cli", *arguments], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (alone.returncode, alone.stdout, alone.stderr)
        return done

    @pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["record", "-h"], []])
    def test_its_help_is_its_own(self, wattier, arguments):
        done = self.same(wattier, *arguments)
        assert "wattier-telemetry" in done.stdout + done.stderr

    @pytest.mark.parametrize(
        "arguments", [["read", "--source", "nvlm"], ["serve", "--port", "x"], ["serve", "--allow=10.0.0.1/8"], ["fly"]]
    )
    def test_its_mistakes_are_its_own(self, wattier, arguments):
        done = self.same(wattier, *arguments)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1

    def test_options_arrive(self, wattier, tmp_path):
        (tmp_path / "watts.csv").write_text("time_seconds,device,power_watts\n0,GPU-of-the-test,250\n")
        done = wattier("telemetry", "read", "--source", f"replay:{tmp_path}/watts.csv")
        (device,) = json.loads(done.stdout)["devices"]
        assert (device["uuid"], device["reading"]["power_watts"]) == ("GPU-of-the-test", 250)


class TestConfigVerbs:
    def test_params_counts_the_sizes_of_the_talk(self, wattier):
        done = wattier("config", "params", REPOSITORY / "configs/talk_sizes.yaml")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines() == ["SMALL 58404", "MEDIUM 14539004", "LARGE 163129004"]

    def test_show_prints_a_config_that_says_the_same(self, wattier, tmp_path):
        first = wattier("config", "show", REPOSITORY / "configs/quickstart.yaml")
        assert (first.returncode, first.stderr) == (0, "")
        (tmp_path / "shown.yaml").write_text(first.stdout)
        assert wattier("config", "show", "shown.yaml").stdout == first.stdout

    def test_schema_names_every_section(self, wattier):
        done = wattier("config", "schema")
        properties = json.loads(done.stdout)["properties"]
        assert {"data", "model", "training", "search", "select", "full_training", "resources"} <= set(properties)


class TestRefusals:
    def test_typo(self, refused, tmp_path):
        text = (REPOSITORY / "configs/quickstart.yaml").read_text()
        (tmp_path / "quickstart.yaml").write_text(text.replace("epochs:", "epoch:", 1))
        line = "quickstart.yaml: search.stages[0]: unknown key 'epoch'. Did you mean 'epochs'?"
        assert refused("run", "quickstart.yaml") == line
        assert not (tmp_path / "runs").exists()

    @pytest.mark.parametrize("verb", ["run", "status"])
    def test_no_such_file(self, refused, tmp_path, verb):
        assert refused(verb, "nowhere.yaml").startswith("nowhere.yaml: cannot be read")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("verb", ["run", "status"])
    def test_folder_that_is_no_run(self, refused, tmp_path, verb):
        (tmp_path / "folder").mkdir()
        assert "folder: is no run directory" in refused(verb, "folder")
        assert not list((tmp_path / "folder").iterdir())

    def test_status_of_a_config_that_never_ran(self, refused, config):
        assert "has not been run yet" in refused("status", config())

    def test_truncated_shard(self, refused, config, tmp_path):
        shutil.copytree(SAMPLE_FOLDER / "qm7x", tmp_path / "qm7x")
        shard = sorted(p for p in (tmp_path / "qm7x").rglob("*") if p.suffix == ".hdf5")[0]
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
        message = refused("run", config(data={"sources": {"qm7x": "qm7x"}}))
        assert shard.name in message
        assert "on_bad: skip" in message
        assert not in_run(tmp_path)

    def test_no_data(self, refused, config, tmp_path):
        (tmp_path / "empty").mkdir()
        for path in ("empty", "nowhere"):
            message = refused("run", config(launcher="ray", data={"sources": {"qm7x": path}}, run_dir=f"run-{path}"))
            assert path in message
        assert not in_run(tmp_path)

    def test_more_ranks_than_cores(self, refused, config, tmp_path):
        message = refused(
            "run", config(launcher="ray", full_training={"ranks": 1000}, training={"batch_structures": 2000})
        )
        assert "asks for 1000 ranks" in message
        assert not in_run(tmp_path)

    @pytest.mark.parametrize(
        ("source", "what"),
        [
            ("nvlm", "power source is 'nvlm'"),
            ("replay:nowhere.csv", "nowhere.csv: cannot be read"),
            ("replay:bad.csv", "bad.csv: line 2: power_watts is 'much'"),
        ],
    )
    def test_telemetry(self, refused, config, tmp_path, source, what):
        (tmp_path / "bad.csv").write_text("time_seconds,device,power_watts\n0,gpu,much\n")
        assert what.lower() in refused("run", config(telemetry={"source": source})).lower()
        assert not in_run(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, home):
    """A tiny run that went all the way; each test damages a copy of it."""
    folder = tmp_path_factory.mktemp("trained")
    data = {
        "name": "tiny", "run_dir": str(folder / "run"), "launcher": "inline",
        "data": {"sources": {"qm7x": "sample"}, "cutoff_angstrom": 3.0},
        "model": {"hidden_dim": 8, "n_layers": 1, "n_radial": 4, "head_dim": 8, "n_head_layers": 1, "forces": "vector"},
        "search": {"space": {"learning_rate": {"low": 1e-3, "high": 1e-2, "log": True}},
                   "stages": [{"name": "only", "trials": 2, "structures": 50, "epochs": 1}]},
        "select": {"accurate": 1, "balanced": 1}, "full_training": {"epochs": 1}, "telemetry": {"source": "estimated"},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(data))
    done = subprocess.run(
        [sys.executable, "-m", "wattier", "run", "config.yaml"], cwd=folder, env={**os.environ, "HOME": str(home)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def damaged(trained, tmp_path):
    """A copy of the trained run, which the test then damages."""
    shutil.copytree(trained, tmp_path / "run")
    return RunDir.open(tmp_path / "run")


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class TestDamagedRun:
    @pytest.mark.parametrize("verb", ["run", "status"])
    def test_config(self, refused, damaged, verb):
        damaged.config_path.write_bytes(b"\xff\xfename: x")
        assert "config.yaml: is not UTF-8 text" in refused(verb, "run")

    @pytest.mark.parametrize(("verb", "line"), [("run", "garbage"), ("status", "[]"), ("export", "{}")])
    def test_trials(self, refused, damaged, verb, line):
        damaged.trials_path.write_text(line + "\n" + damaged.trials_path.read_text())
        assert "trials.jsonl: " in refused(verb, "run")

    @pytest.mark.parametrize(("verb", "text"), [("train", "{"), ("evaluate", "{}"), ("report", "[]"), ("status", "{")])
    def test_selection(self, refused, damaged, verb, text):
        damaged.selection_path.write_text(text)
        assert "selection.json: " in refused(verb, "run")

    @pytest.mark.parametrize(("verb", "text"), [("run", "{"), ("run", "[]"), ("report", "{}"), ("export", "{}")])
    def test_evaluation(self, refused, damaged, verb, text):
        damaged.evaluation_path.write_text(text)
        assert "evaluation.json: " in refused(verb, "run")

    def test_store(self, refused, damaged):
        damaged.evaluation_path.unlink()
        halve(damaged.store_path / "atoms.bin")
        assert "not a readable store" in refused("run", "run")

    def test_best_weights(self, refused, damaged):
        member = damaged.selection().picked[0]
        halve(damaged.trial_folder("full", member) / "best.pt")
        assert "best.pt: not a readable checkpoint" in refused("export", "run")
        damaged.evaluation_path.unlink()
        assert "best.pt: not a readable checkpoint" in refused("evaluate", "run")

    def test_last_weights_fail_the_trial_and_say_which_file(self, damaged, wattier):
        rows = [json.loads(line) for line in damaged.trials_path.read_text().splitlines()]
        kept = [row for row in rows if row["fidelity"]["stage"] == "only"]
        damaged.trials_path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        for folder in (damaged.path / "trials/full").iterdir():
            (folder / "result.json").unlink()
            halve(folder / "last.pt")
        done = wattier("train", "run")
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert "last.pt: not a readable checkpoint" in done.stderr

    @pytest.mark.parametrize("verb", ["run", "search"])
    def test_a_failed_trial_is_exit_3_and_one_line(self, damaged, wattier, verb):
        rows = [json.loads(line) for line in damaged.trials_path.read_text().splitlines()]
        failed = next(row for row in rows if row["fidelity"]["stage"] == "only")
        failed |= {"status": "failed", "error": "RuntimeError: the third epoch was one too many"}
        damaged.trials_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = wattier(verb, "run")
        assert done.returncode == 3, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith(
            f"1 trial failed: {failed['trial_id']} (RuntimeError: the third epoch was one too many)."
        )
        assert line.endswith(f"trials/only/{failed['trial_id']}/error.txt")
        if verb == "run":
            assert damaged.report_path.exists()
            assert failed["trial_id"] not in damaged.selection().picked

    def test_a_failed_member_is_exit_3_of_train_and_a_failed_scout_is_not(self, damaged, monkeypatch):
        """Full training itself is a stand-in that leaves a failed row, and then one that trained."""
        from typer.testing import CliRunner

        from wattier.cli import app

        rows = [json.loads(line) for line in damaged.trials_path.read_text().splitlines()]
        member = next(row for row in rows if row["fidelity"]["stage"] == "full")
        scout = next(row for row in rows if row["fidelity"]["stage"] == "only")
        for stage, code in (("full", 3), ("only", 0)):
            left = {"status": "failed", "error": "RuntimeError: so it goes"}
            lines = [member | left] if stage == "full" else [scout | left, member]

            def train(run, *_, lines=lines):
                with run.trials_path.open("a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)

            monkeypatch.setattr("wattier.run.train", train)
            done = CliRunner().invoke(app, ["train", str(damaged.path)])
            assert done.exit_code == code, done.output
            assert (f"1 trial failed: {member['trial_id']}" in done.output) == (code == 3)

    def test_checkpoints_that_hold_code_are_not_run(self, tmp_path):
        torch.save({"model": subprocess.run}, tmp_path / "best.pt")
        for reader in (load, load_member):
            with pytest.raises(DataError, match="not a readable checkpoint"):
                reader(tmp_path / "best.pt")

    def test_tampered_release(self, damaged):
        from wattier_gnn.release import load_release

        assert load_release(damaged.release_path).members
        weights = next(damaged.release_path.rglob("model.safetensors"))
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(bytes(content))
        with pytest.raises(DataError, match=r"model\.safetensors: sha256 is .* but must be"):
            load_release(damaged.release_path)
        weights.unlink()
        with pytest.raises(DataError, match="is missing, but the manifest names it"):
            load_release(damaged.release_path)
