"""Every launcher keeps one contract: each trial ends once, is billed, and is told to the sampler for what it was."""

import ipaddress
import math
import os
import stat
import sys
import tempfile
from collections import Counter
from pathlib import Path

import psutil
import pytest
from optuna.trial import TrialState

from wattier.config import RunConfig
from wattier.errors import UserError
from wattier.funnel import promoted_trials, run_search, run_stage
from wattier.launch import InlineLauncher, Stage
from wattier.pareto import non_dominated_ranks
from wattier.policy import SearchPolicy
from wattier.records import EpochRecord, Fidelity
from wattier.rundir import RunDir, append_json_line, write_json
from wattier.select import select_trials

sys.path.append(str(Path(__file__).parent))  # trials run in other processes, which import their function by its name

import tabular

WATTS = 100.0
SPACE = {
    "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
    "n_layers": {"choices": [1, 2, tabular.DIES, tabular.DIES_ONCE, tabular.DIVERGES]},
}
GOOD = {"learning_rate": 1e-2, "n_layers": 1}
WORSE = {"learning_rate": 1e-3, "n_layers": 1}
WORST = {"learning_rate": 1e-4, "n_layers": 2}
DYING = {"learning_rate": 1e-2, "n_layers": tabular.DIES}
DYING_ONCE = {"learning_rate": 1e-2, "n_layers": tabular.DIES_ONCE}
DIVERGING = {"learning_rate": 1e-2, "n_layers": tabular.DIVERGES}
OPTUNA_OF_STATUS = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A run and its config: ``make(trials=3, epochs=4)`` has one stage of tabular trials at a hundred watts."""
    trace = tmp_path / "watts.csv"
    trace.write_text(f"time_seconds,device,power_watts\n0,node,{WATTS}\n")

    def build(*, space=None, retries=1, sampler="random", seed=0, stages=None, max_concurrent=None, **stage):
        stage = {"name": "only", "trials": 1, "epochs": 3, "reduction_factor": None, **stage}
        config = RunConfig.model_validate(
            {
                "name": "tabular",
                "run_dir": str(tmp_path / f"run{len(list(tmp_path.glob('run*')))}"),
                "seed": seed,
                "data": {"sources": {"ani1x": "sample"}},
                "search": {"sampler": sampler, "space": space or SPACE, "stages": stages or [stage],
                           "max_concurrent": max_concurrent},
                "resources": {"retries": retries},
                "telemetry": {"source": f"replay:{trace}", "interval_seconds": 0.02},
            }
        )  # fmt: skip
        return RunDir.create(config), config

    return build


class Outcome:
    """One stage run to its end."""

    def __init__(self, run, config, launcher, run_trial, promoted=()):
        section = config.search.stages[0]
        fidelity = Fidelity(section.name, section.structures, section.epochs, section.ranks)
        self.stage = Stage(run, config, fidelity, section.trials)
        self.policy, self.heard = None, []

        def make_policy():
            self.policy = SearchPolicy(config, section, run=run, promoted=promoted)
            return self.policy

        run_stage(self.stage, make_policy, launcher, run_trial, self.heard.append)
        self.rows = run.trials(section.name)
        self.by_id = {row.trial_id: row for row in self.rows}

    def told(self):
        """What Optuna was told, by parameters."""
        return {tuple(sorted(t.params.items())): t.state for t in self.policy.sampler.study.trials}


def key(params):
    return tuple(sorted(params.items()))


class LauncherContract:
    """What a search may rely on, whoever launches its trials."""

    run_trial = None

    def test_each_trial_ends_once_and_as_what_it_was(self, launcher, make):
        promoted = [GOOD, DYING, DYING_ONCE, DIVERGING, WORSE]
        run, config = make(trials=5)
        outcome = Outcome(run, config, launcher, self.run_trial, promoted)
        ids = {row.params["n_layers"] if row.params != WORSE else 0: row.trial_id for row in outcome.rows}
        statuses = {n: (outcome.by_id[i].status, outcome.by_id[i].diverged, outcome.by_id[i].attempts)
                    for n, i in ids.items()}  # fmt: skip
        assert statuses == {
            1: ("complete", False, 1),
            0: ("complete", False, 1),
            tabular.DIES: ("failed", False, 2),
            tabular.DIES_ONCE: ("complete", False, 2),
            tabular.DIVERGES: ("pruned", True, 1),
        }
        assert Counter(r.trial_id for r in outcome.heard) == dict.fromkeys(ids.values(), 1)
        assert len(run.trials_path.read_text().splitlines()) == 5
        assert outcome.told() == {
            key(GOOD): TrialState.COMPLETE,
            key(WORSE): TrialState.COMPLETE,
            key(DYING_ONCE): TrialState.COMPLETE,
            key(DYING): TrialState.FAIL,
            key(DIVERGING): TrialState.PRUNED,
        }
        failed = outcome.by_id[ids[tabular.DIES]]
        assert failed.error
        assert failed.epochs_done == 1
        assert all(row.energy_joules > 0 for row in outcome.rows)
        fraction = 1 / os.cpu_count()
        twice = outcome.by_id[ids[tabular.DIES_ONCE]]
        least = WATTS * fraction * tabular.EPOCH_SECONDS * 4  # one epoch lost, three of the second attempt
        assert twice.energy_joules > least

    def test_a_pruned_trial_is_billed_but_never_chosen(self, launcher, make):
        run, config = make(trials=4, epochs=9, reduction_factor=2, max_concurrent=1)
        outcome = Outcome(run, config, launcher, self.run_trial, [GOOD, WORSE, WORST, DIVERGING])
        by_params = {key(row.params): row for row in outcome.rows}
        good = by_params.pop(key(GOOD))
        assert (good.status, good.epochs_done) == ("complete", 9)
        for row in outcome.rows:  # each for its time, whatever time a busy machine lets it take
            assert row.energy_joules == pytest.approx(WATTS / os.cpu_count() * row.energy.seconds, rel=0.001)
        for row in by_params.values():
            assert row.status == "pruned"
            assert row.epochs_done < 9
            assert row.energy_joules > 0
        assert set(outcome.told().values()) == {TrialState.COMPLETE, TrialState.PRUNED}
        assert [r.trial_id for r in promoted_trials(outcome.rows, "only", 4)] == [good.trial_id]
        selection = select_trials(outcome.rows, config.select, stage="only", project=lambda _: None)
        assert selection.front == selection.candidates == selection.picked == (good.trial_id,)
        assert set(selection.excluded) == {row.trial_id for row in by_params.values()}

    def test_a_sampled_stage_leaves_no_trial_running(self, launcher, make):
        space = {"learning_rate": SPACE["learning_rate"]}
        run, config = make(trials=8, epochs=4, reduction_factor=2, sampler="tpe", space=space)
        outcome = Outcome(run, config, launcher, self.run_trial)
        assert [row.status for row in outcome.rows].count("failed") == 0
        assert sorted(outcome.by_id) == [f"only-{i:03d}" for i in range(8)]
        states = [t.state for t in outcome.policy.sampler.study.trials]
        assert Counter(states) == Counter(OPTUNA_OF_STATUS[row.status] for row in outcome.rows)
        told = {tuple(t.values) for t in outcome.policy.sampler.study.trials if t.values}
        assert told == {(r.val_loss, r.energy_joules) for r in outcome.rows if r.status == "complete"}

    def test_more_trials_of_two_ranks_than_fit_are_all_run(self, launcher, make):
        run, config = make(trials=4, ranks=2, space={"learning_rate": SPACE["learning_rate"]})
        outcome = Outcome(run, config, launcher, self.run_trial)
        assert [row.status for row in outcome.rows] == ["complete"] * 4
        for row in outcome.rows:
            folder = run.trial_folder("only", row.trial_id)
            assert sorted(p.name for p in folder.glob("*.energy.json")) == [
                "attempt1-rank0.energy.json",
                "attempt1-rank1.energy.json",
            ]

    def test_a_stage_that_could_never_start_is_refused(self, launcher, make):
        run, config = make(trials=1, ranks=os.cpu_count() + 1)
        with pytest.raises(UserError, match=r"stage 'only': asks for .* ranks of 1 CPU"):
            Outcome(run, config, launcher, self.run_trial)
        assert not run.trials()

    def test_the_best_of_a_stage_come_first_in_the_next(self, launcher, make):
        stages = [
            {"name": "wide", "trials": 5, "epochs": 2, "reduction_factor": None},
            {"name": "deep", "trials": 3, "epochs": 4, "promote": 2, "reduction_factor": None},
        ]
        run, config = make(stages=stages, space={"learning_rate": SPACE["learning_rate"]})
        run_search(run, config, launcher, self.run_trial, lambda _: None)
        wide, deep = run.trials("wide"), {row.trial_id: row for row in run.trials("deep")}
        best = promoted_trials(wide, "wide", 2)
        assert [row.status for row in wide] == ["complete"] * 5, [row.error for row in wide]
        assert [deep["deep-000"].params, deep["deep-001"].params] == [row.params for row in best]
        points = [[row.val_loss, row.energy_joules] for row in wide]
        front = {wide[i].trial_id for i, rank in enumerate(non_dominated_ranks(points)) if rank == 0}
        assert best[0].trial_id in front
        assert deep["deep-002"].params not in [row.params for row in wide]

    def test_a_killed_stage_goes_on_with_what_it_knew(self, launcher, make):
        run, config = make(trials=4, space=SPACE)
        finished = Outcome(run, config, launcher, self.run_trial, [GOOD, WORSE, DIVERGING, WORST])
        orphan, lost = finished.by_id["only-001"], finished.by_id["only-003"]
        rows = [row for row in finished.rows if row.trial_id not in {orphan.trial_id, lost.trial_id}]
        run.trials_path.unlink()
        for row in rows:
            append_json_line(run.trials_path, row.to_dict())
        (run.trial_folder("only", lost.trial_id) / "result.json").unlink()
        again = Outcome(run, config, launcher, self.run_trial, [GOOD, WORSE, DIVERGING, WORST])
        assert [r.trial_id for r in again.heard] == [lost.trial_id]
        assert {row.trial_id: row.params for row in again.rows} == {r.trial_id: r.params for r in finished.rows}
        assert again.by_id[lost.trial_id].attempts == 2
        assert again.by_id[lost.trial_id].energy_joules > lost.energy_joules
        assert again.by_id[orphan.trial_id] == orphan
        assert Counter(again.told().values()) == {TrialState.COMPLETE: 3, TrialState.PRUNED: 1}

        before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*")}
        finished = Outcome(run, config, launcher, self.run_trial)
        assert finished.policy is None
        assert not finished.heard
        assert {p: p.stat().st_mtime_ns for p in run.path.rglob("*")} == before, "a finished stage starts nothing"


class TestInlineLauncher(LauncherContract):
    run_trial = staticmethod(tabular.run_raising)

    @pytest.fixture
    def launcher(self):
        return InlineLauncher()

    @pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
    def test_a_seed_decides_everything_but_the_clock(self, launcher, make, sampler):
        runs = []
        for seed in (3, 3, 4):
            run, config = make(trials=7, sampler=sampler, seed=seed, space={"learning_rate": SPACE["learning_rate"]})
            runs.append([row.params for row in Outcome(run, config, launcher, self.run_trial).rows])
        # Joules are measured, so after the first few random trials tpe and nsga2 may differ in the last digits.
        compared = 4 if sampler != "random" else 7
        assert runs[0][:compared] == runs[1][:compared] != runs[2][:compared]

    def test_the_error_is_kept_in_words_and_whole(self, launcher, make):
        run, config = make(trials=1, retries=0)
        outcome = Outcome(run, config, launcher, self.run_trial, [DYING])
        assert outcome.rows[0].error == "RuntimeError: out of memory"
        assert outcome.rows[0].attempts == 1
        assert "Traceback" in (run.trial_folder("only", "only-000") / "error.txt").read_text()


class TestRayLauncher(LauncherContract):
    run_trial = staticmethod(tabular.run_killed)

    @pytest.fixture(scope="class")
    @classmethod
    def session(cls, tmp_path_factory):
        """One private cluster for all tests of this class, started from a fresh HOME; its folders and processes."""
        home = tmp_path_factory.mktemp("home")
        others = set(psutil.Process().children(recursive=True))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOME", str(home))
            for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
                patch.setenv(name, "")
                patch.delenv(name)
            patch.setenv("PYTHONPATH", str(Path(__file__).parent))
            from wattier.ray_backend import RayLauncher

            launcher = RayLauncher()
            yield {"launcher": launcher, "home": home, "others": others}
            launcher.close()

    @pytest.fixture
    def launcher(self, session):
        return session["launcher"]

    def test_a_trial_that_raises_says_so(self, launcher, make):
        run, config = make(trials=1)
        outcome = Outcome(run, config, launcher, tabular.run_raising, [DYING])
        assert (outcome.rows[0].status, outcome.rows[0].attempts) == ("failed", 2)
        assert outcome.rows[0].error == "RuntimeError: out of memory"

    def test_two_ranks_of_which_one_dies_do_not_hold_up_the_next(self, launcher, make):
        run, config = make(trials=3, ranks=2)
        outcome = Outcome(run, config, launcher, self.run_trial, [DYING, DYING_ONCE, GOOD])
        assert Counter(row.status for row in outcome.rows) == {"failed": 1, "complete": 2}

    def test_zz_ray_listens_to_this_machine_only_and_leaves_nothing(self, session, make):
        """Last of its class: it ends the cluster."""
        run, config = make(trials=1)
        Outcome(run, config, session["launcher"], self.run_trial, [GOOD])
        processes = set(psutil.Process().children(recursive=True)) - session["others"]
        assert any("raylet" in p.name() for p in processes)
        sockets = [c for p in [*processes, psutil.Process()] for c in connections(p) if c.status == psutil.CONN_LISTEN]
        assert sockets
        assert all(is_loopback(c.laddr.ip) for c in sockets)
        (folder,) = wattier_folders()
        token = folder / "token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700

        session["launcher"].close()

        assert not wattier_folders()
        _, alive = psutil.wait_procs(processes, timeout=60)
        assert not alive
        written = [str(p.relative_to(session["home"])) for p in session["home"].rglob("*") if p.is_file()]
        assert not written


def is_loopback(text):
    address = ipaddress.ip_address(text)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def wattier_folders():
    """Scratch folders of this process's Ray launchers."""
    roots = {Path(tempfile.gettempdir()), Path("/tmp")}
    return {p for root in roots for name in ("ray", "tune") for p in root.glob(f"wattier-{name}-{os.getpid()}-*")}


def connections(process):
    try:
        return process.net_connections(kind="inet")
    except psutil.Error:
        return []


class TestRebuiltPolicy:
    """What a driver that was killed finds in the run directory."""

    @pytest.fixture
    def killed(self, make):
        """Four of six trials were opened: two are recorded, two were interrupted after an epoch."""
        run, config = make(trials=6, epochs=9, reduction_factor=3, space={"learning_rate": SPACE["learning_rate"]})
        policy = SearchPolicy(config, config.search.stages[0], run=run, promoted=[])
        stage = Stage(run, config, Fidelity("only", None, 9, 1), 6)
        opened = [policy.propose() for _ in range(4)]
        answers = {}
        for proposal in opened:
            stage.open_trial(proposal)
            folder = run.trial_folder("only", proposal.trial_id)
            record = EpochRecord(1, 1.0, tabular.val_loss(proposal.params, 1), {}, 10, 1.0, 1e-3)
            append_json_line(folder / "epochs.jsonl", record.to_dict())
            answers[proposal.trial_id] = policy.on_epoch(proposal.trial_id, record)
        for proposal in opened[:2]:
            result = stage.outcome(proposal, "it died")
            append_json_line(run.trials_path, result.to_dict())
        return run, config, policy, opened, answers

    def test_the_interrupted_come_first_as_they_were(self, killed):
        run, config, _, opened, _ = killed
        again = SearchPolicy(config, config.search.stages[0], run=run, promoted=[])
        proposals = []
        while (proposal := again.propose()) is not None:
            proposals.append(proposal)
        assert proposals[:2] == opened[2:]
        assert [p.trial_id for p in proposals] == ["only-002", "only-003", "only-004", "only-005"]
        assert len({p.params["learning_rate"] for p in [*opened, *proposals]}) == 6

    def test_the_sampler_does_not_repeat_what_was_interrupted(self, killed):
        run, config, _, opened, _ = killed
        run.trials_path.unlink()
        again = SearchPolicy(config, config.search.stages[0], run=run, promoted=[])
        proposals = [again.propose() for _ in range(6)]
        assert proposals[:4] == opened
        assert len({p.params["learning_rate"] for p in proposals}) == 6

    def test_rungs_and_answers_are_kept(self, killed):
        run, config, policy, opened, answers = killed
        again = SearchPolicy(config, config.search.stages[0], run=run, promoted=[])
        assert again.halving.rungs == policy.halving.rungs
        assert len(again.halving.rungs[1]) == 4
        for proposal in opened[2:]:
            record = run.epochs("only", proposal.trial_id)[0]
            assert again.on_epoch(proposal.trial_id, record) == again.on_epoch(proposal.trial_id, record)
        assert again.halving.answers == {(trial_id, 1): answer for trial_id, answer in answers.items()}

    def test_a_promoted_trial_is_proposed_once_and_before_the_sampler(self, make):
        run, config = make(trials=3)
        section = config.search.stages[0]
        first = SearchPolicy(config, section, run=run, promoted=[GOOD, WORSE])
        stage = Stage(run, config, Fidelity("only", None, 3, 1), 3)
        stage.open_trial(first.propose())
        again = SearchPolicy(config, section, run=run, promoted=[GOOD, WORSE])
        proposals = [again.propose() for _ in range(4)]
        assert [(p.trial_id, p.params) for p in proposals[:2]] == [("only-000", GOOD), ("only-001", WORSE)]
        assert proposals[2].trial_id == "only-002"
        assert proposals[3] is None

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"trial_id": "only-000"}'])
    def test_a_damaged_note_of_a_trial_is_named(self, make, text):
        run, config = make(trials=1)
        write_json(run.path / "x.json", {})
        folder = run.trial_folder("only", "only-000")
        folder.mkdir(parents=True)
        (folder / "trial.json").write_text(text)
        with pytest.raises(UserError, match=r"trial\.json: "):
            SearchPolicy(config, config.search.stages[0], run=run, promoted=[])


def test_halving_keeps_the_best_share_of_those_who_came(make):
    run, config = make(trials=9, epochs=9, reduction_factor=3)
    policy = SearchPolicy(config, config.search.stages[0], run=run, promoted=[])
    losses = [5.0, 4.0, 6.0, 3.0, 3.5, math.nan, 2.0]
    went_on = []
    for i, loss in enumerate(losses):
        record = EpochRecord.from_dict(EpochRecord(1, loss, loss, {}, 1, 1.0, 1e-3).to_dict())
        went_on.append(policy.on_epoch(f"only-{i:03d}", record))
    assert went_on == [True, True, False, True, True, False, True]
    late = EpochRecord(9, 9.0, 9.0, {}, 1, 1.0, 1e-3)
    assert policy.on_epoch("only-002", late)
