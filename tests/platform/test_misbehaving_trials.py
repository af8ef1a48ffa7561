"""Whatever a trial does, it is one row with its reason, its joules are billed, and the search goes on."""

import ast
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from wattier.config import RunConfig
from wattier.funnel import adopt_finished
from wattier.launch import LATER, InlineLauncher, Stage
from wattier.outcome import LONGEST_ERROR
from wattier.policy import FixedPolicy
from wattier.records import Fidelity, Proposal
from wattier.rundir import RunDir
from wattier.trial_output import KEPT_BYTES

sys.path.append(str(Path(__file__).parent))  # trials run in other processes, which import their function by its name

import misbehaving

SECRET = "hunter2-in-the-environment"
COMPLETE, PRUNED = "complete", "pruned"
EXPECTED = {  # what a trial does -> its status, or the beginning of its reason
    "behaves": COMPLETE,
    "raises": "ValueError: the 3rd layer is missing",
    "raises_a_novel": "ValueError: la la",
    "raises_unpicklable": "Unpicklable: it holds a lock",
    "lacks_memory": "out of memory (MemoryError)",
    "exits": "SystemExit: the trial called sys.exit(5)",
    "returns_nonsense": "TypeError: run_trial returned {'loss': 1} and left no result.json",
    "reports_nonsense": "TypeError: report was given {'epoch': 1}",
    "only_returns": COMPLETE,
    "leaves_half_a_result": "result.json holds no result (",
    "leaves_a_list": "result.json holds no result (",
    "leaves_depth": "result.json holds no result (",
    "leaves_anothers": "result.json is of trial 'somebody-else'",
    "leaves_a_wrong_status": "result.json holds no result (status is 'splendid'",
    "leaves_a_word": "result.json holds no result (val_loss is 'low'",
    "leaves_nan": PRUNED,
    "leaves_infinity": PRUNED,
    "spoils_its_epochs": "RuntimeError: and then it failed; and ",
}


@pytest.fixture
def stage_of(tmp_path):
    """A stage of no data at a hundred watts: ``stage_of(ranks=2, stall_seconds=6)``."""
    trace = tmp_path / "watts.csv"
    trace.write_text("time_seconds,device,power_watts\n0,node,100\n")

    def build(*, ranks=1, **resources):
        config = RunConfig.model_validate(
            {
                "name": "misbehaving",
                "run_dir": str(tmp_path / "run"),
                "data": {"sources": {"ani1x": "sample"}},
                "training": {"checkpoint_seconds": 0.1},
                "search": {
                    "space": {"learning_rate": {"low": 1e-4, "high": 1e-1}},
                    "stages": [{"name": "only", "trials": 1, "epochs": 2, "ranks": ranks}],
                },
                "resources": {"retries": 0, **resources},
                "telemetry": {"source": f"replay:{trace}", "interval_seconds": 0.02},
            }
        )
        return Stage(RunDir.create(config), config, Fidelity("only", None, 2, ranks), 1)

    return build


def run_all(launcher, stage, deeds, policy=None):
    """One trial a deed; its row by what it does."""
    heard = []
    proposals = [Proposal(f"only-{i:03d}", {"do": deed}) for i, deed in enumerate(deeds)]
    launcher.run(stage, policy or FixedPolicy(proposals), misbehaving.run, heard.append)
    assert sorted(row.trial_id for row in heard) == [p.trial_id for p in proposals], "each ends once"
    return {row.params["do"]: row for row in heard}


def folder_of(stage, row):
    return stage.run.trial_folder("only", row.trial_id)


def scratch_folders():
    """Those of this process's launchers."""
    return {p for top in ("/tmp", tempfile.gettempdir()) for p in Path(top).glob(f"wattier-*-{os.getpid()}-*")}


class OneAtATime(FixedPolicy):
    """A policy that starts nothing while a trial runs."""

    def __init__(self, proposals):
        super().__init__(proposals)
        self.running, self.most, self.later = 0, 0, 0

    def propose(self):
        if self.running and self.waiting:
            self.later += 1
            return LATER
        proposal = super().propose()
        self.running += proposal is not None
        self.most = max(self.most, self.running)
        return proposal

    def on_result(self, result):
        self.running -= 1


class Stubborn(FixedPolicy):
    """A policy with a bug: it would wait for ever."""

    def propose(self):
        return super().propose() or LATER


class StopsTheFirst(FixedPolicy):
    def on_epoch(self, trial_id, record):
        return trial_id != "only-000"


class MisbehaviourContract:
    """What holds for every launcher."""

    deeds = tuple(EXPECTED)

    def test_each_is_a_row_with_its_reason(self, launcher, stage_of):
        stage = stage_of()
        rows = run_all(launcher, stage, self.deeds)
        for deed, row in rows.items():
            expected = EXPECTED[deed]
            if expected in {COMPLETE, PRUNED}:
                assert row.status == expected, (deed, row.error)
                assert row.diverged == (expected == PRUNED)
                assert (row.val_loss is None) == (expected == PRUNED)
                continue
            assert row.status == "failed", deed
            assert row.error.startswith(expected), (deed, row.error)
            assert len(row.error) < 1000
            text = (folder_of(stage, row) / "error.txt").read_text()
            assert len(text) < 2 * LONGEST_ERROR
        assert "Traceback" in (folder_of(stage, rows["raises"]) / "error.txt").read_text()
        for row in rows.values():
            json.dumps(row.to_dict(), allow_nan=False)
        assert rows["leaves_nan"].energy_joules > 0
        self.look_further(rows)

    def look_further(self, rows):
        """What is checked on top of it."""

    def test_a_policy_may_ask_to_wait(self, launcher, stage_of):
        policy = OneAtATime([Proposal(f"only-{i:03d}", {"do": "behaves"}) for i in range(4)])
        heard = []
        launcher.run(stage_of(), policy, misbehaving.run, heard.append)
        assert [row.status for row in heard] == [COMPLETE] * 4
        assert policy.most == 1
        assert policy.later > 0 or isinstance(launcher, InlineLauncher)

    def test_a_policy_that_would_wait_for_ever_is_a_bug(self, launcher, stage_of):
        with pytest.raises(RuntimeError, match="LATER while no trial runs"):
            launcher.run(stage_of(), Stubborn([Proposal("only-000", {"do": "behaves"})]), misbehaving.run, lambda _: 0)


class TestInline(MisbehaviourContract):
    @pytest.fixture
    def launcher(self):
        return InlineLauncher()

    def test_garbage_that_a_killed_driver_left_is_a_row_too(self, stage_of):
        stage = stage_of()
        stage.open_trial(Proposal("only-000", {"do": "behaves"}))
        path = stage.run.trial_folder("only", "only-000") / "result.json"
        path.write_text("{")
        adopt_finished(stage)
        (row,) = stage.run.trials("only")
        assert (row.status, row.params) == ("failed", {"do": "behaves"})
        assert row.error.startswith("result.json holds no result")
        assert (path.parent / "error.txt").exists()


class TestRay(MisbehaviourContract):
    # A process for each one that fails: those whose garbage is read by the same code as inline are left out.
    deeds = (
        "behaves", "raises", "raises_a_novel", "raises_unpicklable", "lacks_memory", "exits", "returns_nonsense",
        "reports_nonsense", "only_returns", "leaves_half_a_result", "leaves_nan",
    )  # fmt: skip

    @pytest.fixture(scope="class")
    @classmethod
    def session(cls):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
                patch.setenv(name, "")
                patch.delenv(name)
            patch.setenv("PYTHONPATH", str(Path(__file__).parent))
            patch.setenv("PGPASSWORD", SECRET)
            patch.setenv("WATTIER_TEST_STORAGE", f"postgresql://me:{SECRET}@db/optuna")
            from wattier.ray_backend import RayLauncher

            launcher = RayLauncher()
            yield launcher
            launcher.close()

    @pytest.fixture
    def launcher(self, session):
        return session

    def test_no_secret_of_the_environment_is_in_any_file(self, launcher, stage_of):
        stage, read = stage_of(), []

        def look(_):  # while Tune's scratch folder is there
            roots = [stage.run.path, *scratch_folders()]
            files = [path for root in roots for path in root.rglob("*") if path.is_file() and not path.is_socket()]
            read.extend(path for path in files if "tuner.pkl" in path.name or "experiment_state" in path.name)
            holding = [path for path in files if SECRET.encode() in path.read_bytes()]
            assert not holding

        proposals = [Proposal(f"only-{i:03d}", {"do": "behaves"}) for i in range(2)]
        launcher.run(stage, FixedPolicy(proposals), misbehaving.run, look)
        assert read, "Tune has left pickles to look into"

    def test_ranks_that_were_stopped_or_left_alone_do_not_spoil_the_next(self, launcher, stage_of):
        heard = {}
        deeds = [{"do": "reduces"}, {"do": "reduces"}, {"do": "reduces", "rank_1_fails": True}, {"do": "reduces"}]
        policy = StopsTheFirst([Proposal(f"only-{i:03d}", deed) for i, deed in enumerate(deeds)])
        launcher.run(stage_of(ranks=2), policy, misbehaving.run, lambda row: heard.update({row.trial_id: row}))
        assert [heard[f"only-{i:03d}"].status for i in (1, 2, 3)] == [COMPLETE, "failed", COMPLETE], heard
        assert heard["only-002"].error == "rank 1: ValueError: the other rank will wait for me"

    def test_a_process_that_is_gone_is_a_row_with_its_reason(self, launcher, stage_of):
        rows = run_all(launcher, stage_of(), ["kills_itself", "crashes", "behaves"])
        assert rows["kills_itself"].error == "its process was killed (SIGKILL), most likely for memory"
        assert rows["crashes"].error == "its process crashed (Segmentation fault); see output.txt"
        assert rows["behaves"].status == COMPLETE

    def test_a_trial_that_hangs_is_killed_and_one_that_saves_is_not(self, launcher, stage_of):
        stage = stage_of(stall_seconds=12)
        began = time.monotonic()
        rows = run_all(launcher, stage, ["hangs", "hangs_in_native_code", "is_slow_but_alive"])
        assert time.monotonic() - began < 100
        for deed in ("hangs", "hangs_in_native_code"):
            assert rows[deed].status == "failed"
            assert rows[deed].error.startswith("it stalled: no epoch and no checkpoint for 12 s"), rows[deed].error
            assert "it stalled" in (folder_of(stage, rows[deed]) / "error.txt").read_text()
        assert rows["is_slow_but_alive"].status == COMPLETE

    def test_all_ranks_of_a_trial_that_hangs_are_killed(self, launcher, stage_of):
        stage = stage_of(stall_seconds=25, ranks=2)
        row = run_all(launcher, stage, ["hangs_on_one_rank"])["hangs_on_one_rank"]
        assert (row.status, row.error[:10]) == ("failed", "it stalled")
        pids = [int(path.read_text()) for path in folder_of(stage, row).glob("pid*.txt")]
        assert len(pids) == 2
        deadline = time.monotonic() + 10
        while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(psutil.pid_exists, pids))

    def test_a_gigabyte_of_prints_costs_a_mebibyte(self, launcher, stage_of):
        stage = stage_of()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rows = run_all(launcher, stage, ["shouts"])
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert rows["shouts"].status == COMPLETE
        folder = folder_of(stage, rows["shouts"])
        printed = (folder / "output.txt").read_bytes()
        assert len(printed) == KEPT_BYTES
        assert printed.endswith(b"la \nlast words\n")
        assert sum(path.stat().st_size for path in folder.iterdir()) < 1.1 * KEPT_BYTES
        assert grown < misbehaving.SHOUTED_BYTES / 10
        logs = [path for root in scratch_folders() for path in root.rglob("logs/*")]
        assert logs
        assert sum(p.stat().st_size for p in logs if p.is_file()) < misbehaving.SHOUTED_BYTES / 10


LEAVES_SLOWLY = """if True:
    import json, os, sys
    from pathlib import Path
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "1"
    import misbehaving
    from wattier.launch import Stage
    from wattier.policy import FixedPolicy
    from wattier.ray_backend import RayLauncher
    from wattier.records import Fidelity, Proposal
    from wattier.rundir import RunDir

    class StopsTheFirst(FixedPolicy):
        def on_epoch(self, trial_id, record):
            return trial_id != "only-000"

    run, launcher, heard = RunDir.open(Path(sys.argv[1])), RayLauncher(), {}
    config = run.config()
    config = config.model_copy(update={"search": config.search.model_copy(update={"max_concurrent": 1})})
    stage = Stage(run, config, Fidelity("only", None, 2, 1), 3)
    deeds = ("leaves_slowly", "behaves", "behaves")
    proposals = [Proposal(f"only-{i:03d}", {"do": deed}) for i, deed in enumerate(deeds)]
    launcher.run(stage, StopsTheFirst(proposals), misbehaving.run, lambda row: heard.update({row.trial_id: row.error}))
    launcher.close()
    print(json.dumps(heard))
"""


def test_one_that_leaves_slowly_costs_the_next_its_process_and_no_more(stage_of):
    """Tune forgets the trial that was to have the process, and lets no other begin as long as it is thought to run."""
    here = str(Path(__file__).parent)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"PYTHONPATH": here}
    done = subprocess.run(
        [sys.executable, "-c", LEAVES_SLOWLY, stage_of(cpus_per_rank=min(2, os.cpu_count())).run.path],
        capture_output=True, text=True, timeout=200, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert errors.pop("only-001").startswith("it never began: the process it was to have took too long")
    assert errors == {"only-000": None, "only-002": None}


def test_the_table_names_every_deed_once():
    tree = ast.parse(Path(misbehaving.__file__).read_text())
    deeds = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"} - {"run"}
    text = Path(__file__).read_text()
    assert not [deed for deed in deeds if f'"{deed}"' not in text]
