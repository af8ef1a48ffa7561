"""Signs of life of a trial, and the last words it printed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wattier import trial_output
from wattier.config import RunConfig
from wattier.stall import StallWatch
from wattier.trial_output import KEPT_BYTES, OUT_OF_MEMORY_NOTE, Tail, being_written, keep, kept_output

PRINTS = """
import os, subprocess, sys
from pathlib import Path
from wattier.trial_output import kept_output
print("before", flush=True)
with kept_output(Path(sys.argv[1])):
    print("by Python")
    sys.stderr.write("an error\\n")
    os.write(1, b"by a library\\n")
    subprocess.run(["echo", "by a child"])
    {more}
print("after")
"""


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def told_in(watch, clock, seconds, step=1.0, each=lambda: None):
    """What is told stalled while a time passes."""
    told = []
    for _ in range(round(seconds / step)):
        clock.now += step
        each()
        told += watch.stalled()
    return told


class TestStallWatch:
    def test_a_silent_trial_is_told_once_and_in_time(self, clock, tmp_path):
        watch = StallWatch(20.0, clock)
        watch.started("a", tmp_path)
        assert told_in(watch, clock, 19) == []
        assert told_in(watch, clock, 6) == ["a"]
        assert told_in(watch, clock, 100) == []

    def test_a_report_is_a_sign_of_life(self, clock, tmp_path):
        watch = StallWatch(20.0, clock)
        watch.started("a", tmp_path)
        assert told_in(watch, clock, 200, step=15, each=lambda: watch.heard("a")) == []
        assert told_in(watch, clock, 30) == ["a"]

    @pytest.mark.parametrize("name", ["last.pt", "best.pt", "epochs.jsonl", "own/model.safetensors"])
    def test_so_is_a_file_that_is_written(self, clock, tmp_path, name):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        watch = StallWatch(20.0, clock)
        watch.started("a", tmp_path)
        assert told_in(watch, clock, 200, step=10, each=lambda: path.write_text(str(clock.now))) == []
        assert told_in(watch, clock, 30) == ["a"]

    def test_what_a_hung_trial_writes_too_is_none(self, clock, tmp_path):
        names = ["attempt1-rank0.energy.json", "output.txt", "output-rank1.txt", "lock", ".last.pt.1.tmp", "error.txt"]

        def scribble():
            for name in names:
                (tmp_path / name).write_text(str(clock.now))

        watch = StallWatch(20.0, clock)
        watch.started("a", tmp_path)
        assert told_in(watch, clock, 26, each=scribble) == ["a"]

    def test_a_clock_of_the_file_server_that_is_wrong_does_not_matter(self, clock, tmp_path):
        path = tmp_path / "last.pt"
        path.write_text("new")
        os.utime(path, (2e9, 2e9))  # of the future
        watch = StallWatch(20.0, clock)
        watch.started("a", tmp_path)
        assert told_in(watch, clock, 26) == ["a"]

    def test_who_is_not_watched_is_not_told(self, clock, tmp_path):
        watch = StallWatch(20.0, clock)
        watch.started("a", tmp_path)
        watch.started("b", tmp_path / "not there yet")
        watch.ended("a")
        assert told_in(watch, clock, 100) == ["b"]
        never = StallWatch(None, clock)
        never.started("a", tmp_path)
        assert told_in(never, clock, 1e6, step=1e4) == []

    def test_many_trials_are_looked_at_seldom(self, clock, tmp_path, monkeypatch):
        looks = []
        monkeypatch.setattr("wattier.stall._marks", lambda folder: looks.append(folder) or ())
        watch = StallWatch(1800.0, clock)
        for index in range(1000):
            watch.started(str(index), tmp_path)
        looks.clear()
        told_in(watch, clock, 449, step=0.1)
        assert not looks
        told_in(watch, clock, 2, step=0.1)
        assert len(looks) == 1000

    @pytest.mark.parametrize("values", [{"stall_seconds": 200}, {"stall_seconds": 300}])
    def test_a_config_that_would_kill_between_two_checkpoints_is_refused(self, values):
        config = {
            "name": "x", "run_dir": "/x", "data": {"sources": {"ani1x": "sample"}}, "resources": values,
            "search": {"space": {"n_layers": {"choices": [1]}}, "stages": [{"name": "a", "trials": 1}]},
        }  # fmt: skip
        with pytest.raises(ValueError, match=r"stall_seconds is .* and training\.checkpoint_seconds is 300"):
            RunConfig.model_validate(config)
        RunConfig.model_validate({**config, "training": {"checkpoint_seconds": 100}})


def run_printing(path, more="pass"):
    return subprocess.run(
        [sys.executable, "-c", PRINTS.format(more=more), path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        start_new_session=True,
    )


class TestKeptOutput:
    def test_what_anybody_in_the_process_prints_is_kept_and_nothing_else(self, tmp_path):
        done = run_printing(tmp_path / "output.txt")
        assert (done.stdout, done.stderr, done.returncode) == ("before\nafter\n", "", 0)
        lines = (tmp_path / "output.txt").read_text().splitlines()
        assert sorted(lines) == ["an error", "by Python", "by a child", "by a library"]

    @pytest.mark.parametrize(
        "how", ["os.kill(os.getpid(), 9)", "os.killpg(0, 9)", "os._exit(1)", "raise SystemExit(3)", "os.abort()"]
    )
    def test_the_last_words_outlive_the_process(self, tmp_path, how):
        run_printing(tmp_path / "output.txt", f"print('last words', flush=True); {how}")
        deadline = time.monotonic() + 10
        while being_written(tmp_path / "output.txt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "last words" in (tmp_path / "output.txt").read_text()
        assert [path.name for path in tmp_path.iterdir()] == ["output.txt"]

    def test_the_keeper_of_an_earlier_attempt_does_not_say_that_this_one_is_over(self, tmp_path, monkeypatch):
        monkeypatch.setattr(trial_output, "CLOSE_SECONDS", 0.2)
        with kept_output(tmp_path / "output.txt"):
            child = subprocess.Popen(["sleep", "3"])  # which holds the pipe of the first attempt open
        with kept_output(tmp_path / "output.txt"):
            child.wait(timeout=10)
            trial_output._LINGERING.pop().wait(timeout=10)
            assert being_written(tmp_path / "output.txt").exists()
        assert not being_written(tmp_path / "output.txt").exists()

    def test_native_code_that_holds_the_interpreter_and_prints_is_not_stuck(self, tmp_path):
        shout = "import ctypes; line = b'x' * 65536; [ctypes.PyDLL(None).write(1, line, 65536) for _ in range(200)]"
        assert run_printing(tmp_path / "output.txt", shout).returncode == 0
        assert (tmp_path / "output.txt").stat().st_size == KEPT_BYTES

    def test_a_child_that_prints_on_does_not_hold_up_the_trial(self, tmp_path, monkeypatch):
        monkeypatch.setattr(trial_output, "CLOSE_SECONDS", 0.2)
        began = time.monotonic()
        with kept_output(tmp_path / "output.txt"):
            child = subprocess.Popen(["sh", "-c", "sleep 2; echo late"])
        assert time.monotonic() - began < 1.9
        child.wait(timeout=10)
        deadline = time.monotonic() + 10
        while "late" not in (tmp_path / "output.txt").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "late" in (tmp_path / "output.txt").read_text()
        trial_output._LINGERING.pop().wait(timeout=10)

    def test_descriptors_are_given_back(self, tmp_path):
        def count():
            return len(list(Path("/proc/self/fd").iterdir()))

        before = count()
        for _ in range(3):
            with kept_output(tmp_path / "output.txt"):
                pass
        assert count() == before


class TestTail:
    def test_it_holds_the_end_however_it_comes(self, tmp_path):
        text = bytes(range(256)) * 40
        for size in (1, 7, 100, 10_000):
            tail = Tail(tmp_path / f"{size}", kept_bytes=100)
            for start in range(0, len(text), size):
                tail.add(text[start : start + size])
                assert len(tail._text) <= 200 + size
            tail.flush()
            assert (tmp_path / f"{size}").read_bytes() == text[-100:]

    def test_a_second_attempt_is_added_to_the_first(self, tmp_path):
        path = tmp_path / "output.txt"
        for word in (b"first", b"second"):
            tail = Tail(path)
            tail.add(word)
            tail.flush()
        assert path.read_text() == "first\n[wattier: another attempt begins here]\nsecond"

    def test_a_folder_that_is_gone_or_full_is_no_error(self, tmp_path):
        tail = Tail(tmp_path / "gone" / "output.txt")
        tail.add(b"words")
        tail.flush()
        assert not list(tmp_path.iterdir())

    def test_a_kill_by_the_kernel_for_memory_is_noted(self, tmp_path, monkeypatch):
        kills = iter([7, 8])
        monkeypatch.setattr(trial_output, "_kills_for_memory", lambda: next(kills))
        source, sink = os.pipe()
        os.write(sink, b"words")
        os.close(sink)
        keep(source, Tail(tmp_path / "output.txt"))
        os.close(source)
        assert (tmp_path / "output.txt").read_text() == f"words\n{OUT_OF_MEMORY_NOTE}\n"
