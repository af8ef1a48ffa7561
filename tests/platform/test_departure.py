"""A command leaves before its job ends: what it knows of the end, what it tells its trials, what it ends with."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from wattier import departure, funnel
from wattier.cli import app
from wattier.config import RunConfig
from wattier.console import print_status
from wattier.departure import (
    EXIT_NOT_FINISHED,
    Departure,
    LeaveNote,
    NotFinishedError,
    leaving_in_time,
    left_trials,
    trials_run,
)
from wattier.errors import UserError
from wattier.fulltrain import member_seeds
from wattier.launch import STOPPED_NAME, InlineLauncher, Stage, note_stop
from wattier.own_model import OwnTrial
from wattier.policy import FixedPolicy
from wattier.records import EpochRecord, Fidelity, Proposal, TrialResult
from wattier.rundir import FULL_STAGE, LEAVE_NAME, RunDir, append_json_line, write_json
from wattier.trial_context import ended_result
from wattier.walltime import Limit, job_limit, limit_of, seconds_of
from wattier_telemetry import EnergyReport

NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("2:30", 150), ("1:0:0", 3600), ("1-0", 86400), ("1-2:30", 95400), ("2-0:0:5", 172805), ("7.5", 7.5)],
)  # fmt: skip
def test_times_are_those_of_slurm(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "UNLIMITED", "infinity", "1:2:3:4", "-5", "1-", "a", "1e9", "nan"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="no time"):
        seconds_of(text)


@pytest.mark.parametrize("text", ["0", "soon", "-1", "00:00"])
def test_a_walltime_that_is_none_is_one_line(text):
    with pytest.raises(UserError, match=r"--walltime: is .* HH:MM:SS"):
        limit_of(text, None)


QSTAT = """Job Id: 12.head
    Resource_List.select = 1:ncpus=4
    Resource_List.walltime = 01:00:00
    {}
"""
STARTED = time.strftime("stime = %a %b %d %H:%M:%S %Y", time.localtime(NOW - 600))


@pytest.mark.parametrize(
    ("environment", "answers", "due"),
    [
        ({}, {}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1800000500"}, {}, (500, "SLURM_JOB_END_TIME")),
        ({"SLURM_JOB_ID": "7"}, {"squeue": "1-00:00:30"}, (86430, "squeue")),
        ({"SLURM_JOB_ID": "7"}, {"squeue": "UNLIMITED"}, None),
        ({"SLURM_JOB_ID": "7"}, {}, None),
        ({"PBS_JOBID": "12"}, {"qstat": QSTAT.format(STARTED)}, (3000, "qstat")),
        ({"PBS_JOBID": "12"}, {"qstat": QSTAT.format("resources_used.walltime = 00:50:00")}, (600, "qstat")),
        ({"PBS_JOBID": "12"}, {"qstat": "garbage"}, None),
        ({"FLUX_JOB_ID": "f1"}, {"flux": "120.5"}, (120.5, "flux job timeleft")),
        ({"FLUX_JOB_ID": "f1"}, {"flux": "infinity"}, None),
    ],
)
def test_the_batch_system_says_when_the_job_ends(environment, answers, due):
    limit = job_limit(environment, lambda command: answers.get(command[0]), NOW)
    assert limit == (None if due is None else Limit(NOW + due[0], due[1]))


def test_the_earliest_limit_counts(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(NOW) + 100))
    assert limit_of("200", 300.0, NOW) == Limit(NOW + 100, "SLURM_JOB_END_TIME")
    assert limit_of("50", 300.0, NOW) == Limit(NOW + 50, "--walltime")
    assert limit_of("1:00:00", 30.0, NOW) == Limit(NOW + 30, "resources.walltime_seconds")


CONFIG = {
    "name": "leaving", "launcher": "inline",
    "data": {"sources": {"qm7x": "sample"}},
    "search": {
        "space": {"learning_rate": {"low": 1e-3, "high": 1e-2}},
        "stages": [{"name": "s", "trials": 3, "epochs": 4, "reduction_factor": None}],
    },
}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(departure, "POLL_SECONDS", 0.0)
    return RunDir.create(RunConfig.model_validate(CONFIG | {"run_dir": str(tmp_path / "run")}))


class TestNote:
    def test_trials_read_when_to_leave(self, run):
        note = LeaveNote(run)
        assert note.due(1e12) is None
        assert note.too_late_to_start() is None
        Departure(run, Limit(time.time() + 1000, "x"))
        assert note.due(900) is None
        assert note.due(990) == "walltime", "15 s are the command's own"
        assert note.too_late_to_start() is None
        Departure(run, Limit(time.time() + 20, "x"))
        assert LeaveNote(run).due(10) is None, "of a short time it takes a quarter"
        Departure(run, Limit(time.time() - 5, "x"))
        assert (note.due(), note.too_late_to_start()) == ("walltime", "walltime")

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"at": "x"}', '{"at": null, "last_start": 0, "reason": "a"}'])
    def test_a_damaged_note_says_nothing(self, run, text):
        (run.path / LEAVE_NAME).write_text(text)
        assert LeaveNote(run).due(1e12) is None

    def test_it_goes_with_the_command(self, run):
        (run.path / LEAVE_NAME).write_text('{"at": 0, "last_start": 0, "reason": "walltime"}')
        with run.lock():
            assert LeaveNote(run).due() is None, "it was of a command that was killed"
            Departure(run, Limit(0.0, "x"))
            assert LeaveNote(run).due() == "walltime"
        assert not (run.path / LEAVE_NAME).exists()


class TestSignals:
    def test_trials_are_told_and_the_second_signal_ends_it(self, run):
        with leaving_in_time(run, None), trials_run():
            os.kill(os.getpid(), signal.SIGTERM)
            assert LeaveNote(run).due() == "SIGTERM"
            with pytest.raises(NotFinishedError, match="SIGUSR1"):
                os.kill(os.getpid(), signal.SIGUSR1)

    def test_so_is_a_trial_whose_node_is_an_hour_behind(self, run, monkeypatch):
        with leaving_in_time(run, None), trials_run():
            os.kill(os.getpid(), signal.SIGTERM)
            now = time.time()
            monkeypatch.setattr(departure.time, "time", lambda: now - 3600)
            assert (LeaveNote(run).due(), LeaveNote(run).too_late_to_start()) == ("SIGTERM", "SIGTERM")

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
    def test_where_no_trial_runs_it_leaves_at_once(self, run, number):
        with leaving_in_time(run, None), pytest.raises(NotFinishedError, match=number.name):
            os.kill(os.getpid(), number)

    def test_so_it_does_when_time_is_up_between_stages(self, run):
        with leaving_in_time(run, Limit(time.time() + 0.2, "x")), pytest.raises(NotFinishedError, match="walltime"):
            threading.Event().wait(20)

    def test_handlers_are_put_back(self, run):
        before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)]
        with leaving_in_time(run, Limit(time.time() + 1000, "x")):
            pass
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)] == before

    def test_an_interrupt_that_another_library_has_made_its_own_says_why_all_the_same(self, run):
        """Ray raises a KeyboardInterrupt of its own in the place of what a handler raised while it waited."""

        def as_ray_does():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(20)
            except KeyboardInterrupt:
                raise KeyboardInterrupt from None

        with pytest.raises(NotFinishedError, match="SIGTERM"), leaving_in_time(run, None):
            as_ray_does()
        with pytest.raises(KeyboardInterrupt) as caught, leaving_in_time(run, None):
            raise KeyboardInterrupt
        assert not isinstance(caught.value, NotFinishedError), "Ctrl-C is what it was"

    @pytest.mark.parametrize("limit", [None, 1000.0])
    def test_somebody_elses_alarm_rings_all_the_same(self, run, limit):
        rung = []
        handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
        others, _ = signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            with leaving_in_time(run, limit and Limit(time.time() + limit, "x")):
                began = time.monotonic()
                time.sleep(0.1)
            deadline = time.monotonic() + 20
            while not rung and time.monotonic() < deadline:
                time.sleep(0.01)
            assert rung[0] - began > 0.1, "it rings after the time that it was set for, not at once"
        finally:
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, others)


def leaves_in_epoch(epoch, ran):
    """A trial that is resumed after its last epoch, and asks after each whether to leave, as a real one does."""

    def run_trial(context):
        run = RunDir(context.folder.parents[2])
        name, note = context.spec.proposal.trial_id, LeaveNote(run)
        records = run.epochs("s", name)
        for number in range(len(records) + 1, 5):
            ran.append((name, number))
            if (name, number) == epoch:
                os.kill(os.getpid(), signal.SIGUSR1)
            record = EpochRecord(number, 1.0, 1.0 / number, {}, number, 1.0, 1e-3)
            append_json_line(context.folder / "epochs.jsonl", record.to_dict())
            context.report(record)
            if number < 4 and (reason := note.due()) is not None:
                return ended_result(
                    context, EnergyReport.empty(), status="interrupted", val_loss=record.val_loss, val_by_source={},
                    epochs_done=number, structures_seen=number, diverged=False, ended=reason,
                )  # fmt: skip
        return ended_result(
            context, EnergyReport.empty(), status="complete", val_loss=0.25, val_by_source={}, epochs_done=4,
            structures_seen=4, diverged=False, ended="epochs",
        )  # fmt: skip

    return run_trial


def run_stage(run, run_trial, heard):
    config = run.config()
    stage = Stage(run, config, Fidelity("s", None, 4, 1), 3)
    done = {row.trial_id for row in run.trials("s")}
    due = [Proposal(f"s-{k:03d}", {"learning_rate": 1e-3}) for k in range(3) if f"s-{k:03d}" not in done]
    with run.lock(), leaving_in_time(run, None):
        funnel.run_stage(stage, lambda: FixedPolicy(due), InlineLauncher(), run_trial, heard.append)


def test_a_stage_that_is_left_goes_on_where_it_was(run, capsys):
    """The second of three trials is told to leave in its second epoch: it has no row, and the third is not started."""
    ran, heard = [], []
    with pytest.raises(NotFinishedError, match="SIGUSR1"):
        run_stage(run, leaves_in_epoch(("s-001", 2), ran), heard)
    assert [(row.trial_id, row.status) for row in run.trials()] == [("s-000", "complete")]
    assert [(row.trial_id, row.goes_on) for row in heard] == [("s-000", False), ("s-001", True)]
    assert left_trials(run) == [("s", "s-001", "SIGUSR1")]
    from rich.console import Console

    print_status(run, Console(width=200))
    assert "s/s-001 left (SIGUSR1) and goes on with the next command" in capsys.readouterr().out

    run_stage(run, leaves_in_epoch(None, ran), heard)
    assert ran == [("s-000", k) for k in (1, 2, 3, 4)] + [("s-001", 1), ("s-001", 2)] + [
        ("s-001", 3), ("s-001", 4), *(("s-002", k) for k in (1, 2, 3, 4)),
    ]  # fmt: skip
    assert [row.ended for row in run.trials()] == ["epochs"] * 3
    assert left_trials(run) == []


@pytest.mark.parametrize("stopped", [True, False])
def test_who_was_cut_off_with_the_command_is_not_taken_for_one_that_the_policy_stopped(run, stopped):
    """Tune ends its trials alike when the command breaks off, as on a full disk: such a result is no row."""
    stage = Stage(run, run.config(), Fidelity("s", None, 4, 1), 1)
    proposal = Proposal("s-000", {"learning_rate": 1e-3})
    stage.open_trial(proposal)
    folder = run.trial_folder("s", "s-000")
    result = TrialResult(
        "leaving", "s-000", proposal.params, stage.fidelity, "pruned", 0.5, {}, 2, 2, 1.0, EnergyReport.empty(),
        ended="stopped",
    )  # fmt: skip
    write_json(folder / "result.json", result.to_dict())
    if stopped:
        note_stop(folder)
    funnel.adopt_finished(stage)
    assert [row.status for row in run.trials()] == (["pruned"] if stopped else [])
    assert (folder / "result.json").exists() is stopped


def test_a_policys_stop_is_noted_and_forgotten_with_the_attempt(run):
    class Stops(FixedPolicy):
        def on_epoch(self, trial_id, record):
            return False

    def one_epoch(context):
        assert context.report(EpochRecord(1, 1.0, 1.0, {}, 1, 1.0, 1e-3)) is False
        raise SystemExit

    stage = Stage(run, run.config(), Fidelity("s", None, 4, 1), 1)
    proposal = Proposal("s-000", {"learning_rate": 1e-3})
    InlineLauncher().run(stage, Stops([proposal]), one_epoch, lambda _: None)
    note = run.trial_folder("s", "s-000") / STOPPED_NAME
    assert note.exists()
    stage.open_trial(proposal)
    assert not note.exists()


class TestSeeds:
    def begin(self, run, picked, trial_id):
        seeds = member_seeds(run, picked, 7)
        stage = Stage(run, run.config(), Fidelity(FULL_STAGE, None, 4, 1), len(picked), seeds=seeds)
        assert stage.open_trial(Proposal(trial_id, {})).seed == seeds[trial_id]
        return seeds

    def test_they_stay_with_their_members_whatever_is_picked_later(self, run):
        assert self.begin(run, ("a", "b", "c"), "c") == {"a": 7, "b": 8, "c": 9}
        assert self.begin(run, ("a", "b", "c"), "a") == {"a": 7, "b": 8, "c": 9}
        assert member_seeds(run, ("new", "c", "b"), 7) == {"new": 8, "c": 9, "b": 10}, "a was trained with 7"

    def test_those_that_an_earlier_version_began_go_by_place(self, run):
        for name in ("a", "b"):
            folder = run.trial_folder(FULL_STAGE, name)
            folder.mkdir(parents=True)
            write_json(folder / "trial.json", {"trial_id": name, "params": {}})
        assert member_seeds(run, ("a", "b", "c"), 7) == {"a": 7, "b": 8, "c": 9}


def test_a_signal_in_the_last_trial_does_not_spoil_a_stage_that_is_done(run):
    run_stage(run, leaves_in_epoch(("s-002", 4), []), [])
    assert [row.status for row in run.trials()] == ["complete"] * 3


def test_without_time_nothing_is_started(run):
    with run.lock():
        Departure(run, Limit(time.time() + 0.01, "x"))
        time.sleep(0.02)
        stage = Stage(run, run.config(), Fidelity("s", None, 4, 1), 3)
        with pytest.raises(NotFinishedError, match="walltime"):
            funnel.run_stage(stage, lambda: FixedPolicy([]), InlineLauncher(), lambda _: pytest.fail("started"), print)


def test_a_trial_that_waited_too_long_is_no_failure(run):
    stage = Stage(run, run.config(), Fidelity("s", None, 4, 1), 1)
    proposal = Proposal("s-000", {"learning_rate": 1e-3})
    Departure(run, Limit(0.0, "x"))
    launcher, heard = InlineLauncher(), []
    launcher.run(stage, FixedPolicy([proposal]), lambda _: pytest.fail("started"), heard.append)
    assert [(row.status, row.ended, row.error) for row in heard] == [("interrupted", "walltime", None)]


def test_the_command_ends_with_a_code_of_its_own(run, monkeypatch):
    def search(rundir, *_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("wattier.run.search", search)
    done = CliRunner().invoke(app, ["search", str(run.path), "--walltime", "1:00:00"])
    assert done.exit_code == EXIT_NOT_FINISHED == 75
    assert "Not finished (SIGTERM). What was done is saved; the same command goes on from here." in done.stderr
    assert "(--walltime): trials save and leave in 59.7 min" in done.stdout


def test_records_say_why_training_ended_and_old_ones_that_nobody_knows():
    row = TrialResult(
        "r",
        "t",
        {},
        Fidelity("s", None, 1, 1),
        "complete",
        1.0,
        {},
        1,
        1,
        1.0,
        EnergyReport.empty(),
        ended="early_stop",
    )
    data = row.to_dict()
    assert TrialResult.from_dict(data).ended == "early_stop"
    del data["ended"]
    assert TrialResult.from_dict(data).ended is None
    assert not replace(row, status="interrupted").goes_on, "what a stranger's trial says of itself is no leaving"


def test_how_long_a_command_may_last_does_not_make_another_run(run):
    values = CONFIG | {"run_dir": str(run.path), "resources": {"walltime_seconds": 60.0}}
    run.trials_path.touch()
    changed = RunConfig.model_validate(values | {"full_training": {"keep_checkpoints": "all"}})
    assert RunDir.create(changed).config().resources.walltime_seconds == 60.0


def test_a_function_of_your_own_is_told_and_called_again(tmp_path, monkeypatch):
    """Epochs of 10 s, as it states them; 8 s are left: another one would end too late."""
    monkeypatch.setattr(departure, "POLL_SECONDS", 0.0)
    own = {"trial": "mine:f", "telemetry": {"source": "stated"}, "data": {}, "run_dir": str(tmp_path / "run")}
    run = RunDir.create(RunConfig.model_validate(CONFIG | own))
    answers = []

    def mine(trial):
        for epoch in range(trial.reported_epochs + 1, trial.epochs + 1):
            monkeypatch.setattr("wattier.own_model.time.monotonic", lambda epoch=epoch: 10.0 * epoch)
            go_on = trial.report(1.0 / epoch, epoch=epoch, energy_joules=float(epoch), seconds=10.0 * epoch)
            answers.append((epoch, go_on, trial.left))
            if not go_on:
                return
            if epoch == 2:
                Departure(run, Limit(time.time() + 8 / 0.75, "x"))

    stage = Stage(run, run.config(), Fidelity("s", None, 4, 1), 1)
    for _ in range(2):
        heard = []
        with run.lock():
            InlineLauncher().run(stage, FixedPolicy([Proposal("s-000", {})]), OwnTrial(mine), heard.append)
        answers.append([(row.status, row.ended, row.epochs_done) for row in heard])
    assert answers == [
        (1, True, None), (2, True, None), (3, False, "walltime"), [("interrupted", "walltime", 3)],
        (4, False, None), [("complete", None, 4)],
    ]  # fmt: skip
