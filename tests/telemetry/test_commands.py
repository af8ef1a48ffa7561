"""The command line: watch in a real pseudo-terminal, recordings that are killed, reports, and the doctor."""

import argparse
import contextlib
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import urllib.error
import urllib.request
from fcntl import ioctl
from types import SimpleNamespace

import pytest

from wattier_telemetry import TrialRegistration, open_source
from wattier_telemetry.cli import main
from wattier_telemetry.commands import make_parser
from wattier_telemetry.doctor import diagnose, remarks
from wattier_telemetry.recording import recorder
from wattier_telemetry.recording.recorder import TraceWriter, record
from wattier_telemetry.recording.trace import read_trace
from wattier_telemetry.source import SourceUnavailable
from wattier_telemetry.sources import cray as cray_module
from wattier_telemetry.watch import Watcher

COMMAND = [sys.executable, "-m", "wattier_telemetry.cli"]
HEADER = "time_seconds,device,power_watts"
FULL = f"{HEADER},name,utilization_ratio,memory_used_bytes,memory_total_bytes,temperature_celsius,clock_hertz,"
FULL += "throttle_reasons"


@contextlib.contextmanager
def started(command, **options):
    """A command that ends with the block, also where it was not told to."""
    with subprocess.Popen(command, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def gpu(trace):
    """A replayed GPU with every figure, and one that only knows its watts."""
    return trace(
        "0,GPU-0,300,H200,0.75,10737418240,161061273600,61,1980000000,power_cap",
        "0,GPU-1,50,,,,,,,",
        header=FULL,
        name="full.csv",
    )


@pytest.fixture
def trial(tmp_path):
    """A running trial that owns half of GPU-0, registered where the commands look."""
    registration = TrialRegistration(
        run="r",
        stage="s1",
        trial="t7",
        rank=0,
        pid=os.getpid(),
        device_uuids=("GPU-0",),
        fraction=0.5,
        epoch=3,
        epochs=10,
        val_loss=0.125,
        energy_joules=1234.5,
    )
    registration.write(tmp_path / "registry")
    return registration


def run(*arguments, **options):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False, **options
    )


class Terminal:
    """A command in a pseudo-terminal of 80 columns and 24 lines."""

    def __init__(self, *arguments):
        self.master, self.slave = pty.openpty()
        ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(self.slave)
        ends = {"stdin": self.slave, "stdout": self.slave, "stderr": self.slave}
        self.process = subprocess.Popen([*COMMAND, *map(str, arguments)], start_new_session=True, **ends)
        self.text = ""

    def read_until(self, wanted, seconds=30):
        """Collect what is written until a text has come."""
        end = time.monotonic() + seconds
        while wanted not in self.text:
            assert time.monotonic() < end, self.text
            if select.select([self.master], [], [], 0.2)[0]:
                self.text += os.read(self.master, 65536).decode()

    def finish(self):
        """Return the exit code, after reading what is left."""
        code = None
        end = time.monotonic() + 30
        while code is None and time.monotonic() < end:
            code = self.process.poll()
            while select.select([self.master], [], [], 0.05)[0]:
                self.text += os.read(self.master, 65536).decode()
        return code

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal():
    running = []

    def start(*arguments):
        running.append(Terminal(*arguments))
        return running[-1]

    yield start
    for one in running:
        one.close()


class TestWatch:
    def lines(self, path, registry):
        watcher = Watcher([open_source(f"replay:{path}")], registry, period_seconds=1)
        watcher.lines()
        time.sleep(0.2)
        return watcher.lines()

    def test_table_shows_devices_and_trials(self, gpu, trial, tmp_path):
        lines = self.lines(gpu, tmp_path / "registry")
        row = next(line for line in lines if line.startswith("GPU-0"))
        fields = row.removeprefix("GPU-0 H200").split()
        assert fields[0] == "300.0"
        assert float(fields[1]) == pytest.approx(300 * 0.2, rel=0.9)  # it grows from the first look on
        assert float(fields[1]) >= 300 * 0.2 * 0.99
        assert fields[2:] == ["75%", "10.0/150.0", "61", "1980", "power_cap"]
        bare = next(line for line in lines if line.startswith("GPU-1")).split()
        assert (bare[1], bare[3:]) == ("50.0", ["-"] * 5)
        running = next(line for line in lines if line.startswith("r/s1/t7")).split()
        assert running == ["r/s1/t7", "0", "3/10", "0.125", "1,234.5"]

    def test_nothing_is_wider_than_80_columns_or_commands_the_terminal(self, trace, tmp_path):
        name = "\x1b[2Jvery-" + "long" * 40
        path = trace(f"0,{name},12345678,{'thermal|' * 30}x", header=f"{HEADER},throttle_reasons")
        registry = tmp_path / "registry"
        TrialRegistration(run="\x1b[1m", stage="s" * 90, trial="t" * 90, rank=0, pid=os.getpid()).write(registry)
        lines = self.lines(path, registry)
        assert all(len(line) <= 80 for line in lines)
        assert "\x1b" not in "".join(lines)

    def test_device_that_fails_leaves_the_others(self, gpu, tmp_path, monkeypatch):
        source = open_source(f"replay:{gpu}")
        readable = source.read

        def read(device):
            if device.uuid == "GPU-0":
                raise SourceUnavailable("fell off\nthe bus")
            return readable(device)

        monkeypatch.setattr(source, "read", read)
        lines = Watcher([source], tmp_path, period_seconds=1).lines()
        assert any(line.startswith("GPU-0") and "does not answer: fell off the bus" in line for line in lines)
        assert any(line.startswith("GPU-1") and " 50.0 " in line for line in lines)

    def test_once_prints_plain_text(self, gpu, trial):
        done = run("watch", "--once", "--source", f"replay:{gpu}")
        assert (done.returncode, done.stderr) == (0, "")
        assert "\x1b" not in done.stdout
        assert done.stdout.count("GPU-0") == 1
        assert "r/s1/t7" in done.stdout

    def test_pipe_gets_blocks_without_escapes(self, gpu):
        command = [*COMMAND, "watch", "--period", "0.05", "--source", f"replay:{gpu}"]
        with started(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            text = "".join(process.stdout.readline() for _ in range(12))
            process.send_signal(signal.SIGINT)
            rest = process.stdout.read()
            assert process.wait(timeout=30) == 0
        assert text.count("wattier-telemetry watch") >= 2
        assert "\x1b" not in text + rest

    @pytest.mark.parametrize("end", ["q", "\x03", signal.SIGTERM])
    def test_terminal_is_redrawn_in_place_and_restored(self, gpu, trial, terminal, end):
        shown = terminal("watch", "--period", "0.1", "--source", f"replay:{gpu}")
        shown.read_until("q quits")
        shown.text = shown.text[: shown.text.index("q quits")]
        shown.read_until("q quits")  # drawn again
        assert not termios.tcgetattr(shown.slave)[3] & termios.ECHO  # typed keys do not spoil the table
        frame = shown.text.rpartition("\x1b[H")[2]
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame)
        assert all(len(line) <= 80 for line in plain.split("\r\n"))
        assert "GPU-0" in plain
        assert "r/s1/t7" in plain
        if end == "\x03":
            # Without a controlling terminal the key makes no signal; a shell's foreground job gets SIGINT for it.
            shown.process.send_signal(signal.SIGINT)
        elif isinstance(end, str):
            os.write(shown.master, end.encode())
        else:
            shown.process.send_signal(end)
        assert shown.finish() == 0
        assert termios.tcgetattr(shown.slave) == shown.before
        assert shown.text.rstrip().endswith("\x1b[?25h\x1b[?1049l")  # cursor back, then the old screen


class TestRecord:
    def wait_for_lines(self, path, count):
        end = time.monotonic() + 60
        while not path.exists() or path.read_bytes().count(b"\n") < count:
            assert time.monotonic() < end
            time.sleep(0.05)

    def start(self, output, source, *more):
        command = [*COMMAND, "record", "--source", f"replay:{source}", "--output", str(output), "--period", "0.02"]
        return started([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    @pytest.mark.parametrize("suffix", ["csv", "parquet"])
    def test_killed_recording_can_be_read(self, gpu, tmp_path, suffix):
        output = tmp_path / f"night.{suffix}"
        growing = output if suffix == "csv" else tmp_path / "night.parquet.partial.csv"
        with self.start(output, gpu) as process:
            self.wait_for_lines(growing, 80)
            process.kill()
        samples = list(read_trace(growing, warn=lambda _: None))
        assert len(samples) >= 78
        assert {sample.reading.power_watts for sample in samples} == {300, 50}
        done = run("report", growing, "--json")
        assert done.returncode == 0
        job = json.loads(done.stdout)["job"]
        assert job["joules"] == pytest.approx(350 * job["seconds"], rel=0.05)

    @pytest.mark.parametrize("suffix", ["csv", "parquet"])
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_ended_recording_is_whole(self, gpu, tmp_path, suffix, number):
        output = tmp_path / f"night.{suffix}"
        with self.start(output, gpu) as process:
            self.wait_for_lines(output if suffix == "csv" else tmp_path / "night.parquet.partial.csv", 20)
            process.send_signal(number)
            assert process.wait(timeout=60) == 0
            assert re.search(rf"night\.{suffix}: \d+ samples in 0 h 00 min", process.stdout.read())
            assert process.stderr.read() == ""
        warnings = []
        assert len(list(read_trace(output, warn=warnings.append))) >= 20
        assert warnings == []
        assert not (tmp_path / "night.parquet.partial.csv").exists()

    def test_duration_period_and_trials(self, gpu, trial, tmp_path):
        output = tmp_path / "night.csv"
        assert main(f"record --source replay:{gpu} --output {output} --period 0.1 --duration 1".split()) == 0
        samples = list(read_trace(output))
        times = [sample.reading.time_seconds for sample in samples if sample.device.uuid == "GPU-0"]
        assert 0.9 <= times[-1] - times[0] <= 1.5
        assert len(times) <= 11
        owned = [sample.trials for sample in samples if sample.device.uuid == "GPU-0"]
        assert {(part.run, part.stage, part.trial, part.rank, part.fraction) for parts in owned for part in parts} == {
            ("r", "s1", "t7", 0, 0.5)
        }
        assert {sample.trials for sample in samples if sample.device.uuid == "GPU-1"} == {()}
        assert samples[0].reading.throttle_reasons == ("power_cap",)

    def test_report_of_a_recording_bills_the_trial_its_half(self, gpu, trial, tmp_path, capsys):
        output = tmp_path / "night.parquet"
        main(f"record --source replay:{gpu} --output {output} --period 0.1 --duration 1".split())
        capsys.readouterr()
        assert main(["report", str(output), "--json", "--grid-intensity", "400"]) == 0
        card = json.loads(capsys.readouterr().out)
        (found,) = card["trials"]
        seconds = found["bill"]["seconds"]
        assert found["bill"]["joules"] == pytest.approx(0.5 * 300 * seconds, rel=0.02)
        assert card["job"]["joules"] == pytest.approx(found["bill"]["joules"] + card["unattributed_joules"])
        assert card["job"]["grams_co2"] == pytest.approx(card["job"]["joules"] / 3.6e6 * 400)
        assert main(["report", str(output)]) == 0
        assert "Trial r/s1/t7, 1 rank" in capsys.readouterr().out

    def test_clock_that_is_set_back_makes_no_energy(self, gpu, tmp_path, monkeypatch):
        wall, real = [0.0], time.time

        def progress(_):
            wall[0] -= 3600

        monkeypatch.setattr(time, "time", lambda: real() + wall[0])
        source = open_source(f"replay:{gpu}")
        with TraceWriter(tmp_path / "t.csv") as writer:
            options = {"period_seconds": 0.05, "duration_seconds": 0.3, "stop": threading.Event()}
            record([source], writer, progress=progress, registry=tmp_path, **options)
        times = [s.reading.time_seconds for s in read_trace(tmp_path / "t.csv") if s.device.uuid == "GPU-0"]
        assert times == sorted(times)
        assert times[-1] - times[0] < 60

    def test_schedule_does_not_drift(self, gpu, tmp_path, monkeypatch):
        """Readings that take 30 ms do not lengthen a period of 100 ms, and a stall of 250 ms shifts no later one."""
        now, source, began = [1000.0], open_source(f"replay:{gpu}"), time.time() - 1000
        readable = source.read

        class Waiting(threading.Event):
            def wait(self, timeout=None):
                now[0] += timeout + 0.001  # nobody is woken in time
                return False

        def slow(device):
            now[0] += 0.265 if 1000.45 < now[0] < 1000.55 else 0.015
            return readable(device)

        monkeypatch.setattr(recorder, "time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: began + now[0]))
        monkeypatch.setattr(source, "read", slow)
        with TraceWriter(tmp_path / "t.csv") as writer:
            state = record([source], writer, period_seconds=0.1, duration_seconds=2, stop=Waiting(), registry=tmp_path)
        times = [s.reading.time_seconds - began for s in read_trace(tmp_path / "t.csv") if s.device.uuid == "GPU-0"]
        slots = [(t - times[0]) / 0.1 for t in times]
        assert [round(slot) for slot in slots] == [0, 1, 2, 3, 4, 6, *range(8, 21)]
        stalled = slots.pop(5)
        assert stalled == pytest.approx(5 + 2.65 / 2 - 0.075 + 0.01, abs=0.001)
        assert all(slot - round(slot) == pytest.approx(0.01 * (slot > 0), abs=0.001) for slot in slots)
        assert state.seconds == pytest.approx(2.031, abs=0.001)

    def test_broken_device_is_told_and_the_others_go_on(self, gpu, tmp_path, monkeypatch):
        source = open_source(f"replay:{gpu}")
        readable = source.read

        def read(device):
            if device.uuid == "GPU-0":
                raise SourceUnavailable("lost")
            return readable(device)

        monkeypatch.setattr(source, "read", read)
        with TraceWriter(tmp_path / "t.csv") as writer:
            state = record(
                [source], writer, period_seconds=0.05, duration_seconds=0.2, stop=threading.Event(), registry=tmp_path
            )
        assert state.failures["GPU-0"] >= 2
        assert state.reasons == {"GPU-0": "lost"}
        assert {sample.device.uuid for sample in read_trace(tmp_path / "t.csv")} == {"GPU-1"}

    def test_progress_goes_to_a_terminal_only(self, gpu, tmp_path, terminal):
        shown = terminal(
            "record",
            "--source",
            f"replay:{gpu}",
            "--output",
            tmp_path / "t.csv",
            "--duration",
            "1.5",
            "--period",
            "0.1",
        )
        assert shown.finish() == 0
        assert re.search(r"\rt\.csv: 0 h 00 min 0\d s, \d+ samples", shown.text)


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "problem"),
        [
            (["report", "absent.csv"], "absent.csv: cannot be read: No such file"),
            (["report", "absent.parquet"], "absent.parquet: cannot be read: "),
            (["report", "."], "cannot be read: Is a directory"),
            (["report", "garbage.csv"], "garbage.csv: "),
            (["report", "garbage.parquet"], "garbage.parquet: cannot be read"),
            (["report", "empty.csv"], "empty.csv: line 1 is ''"),
            (["report", "good.csv", "--grid-intensity", "-1"], "must be grams per kWh, 0 or more"),
            (["report", "good.csv", "--grid-intensity", "nan"], "must be grams per kWh"),
            (["record"], "--output"),
            (["record", "--output", "good.csv", "--source", "replay:good.csv"], "good.csv exists already"),
            (["record", "--output", "t.json", "--source", "replay:good.csv"], "t.json: a recording must be named"),
            (["record", "--output", "absent/t.csv", "--source", "replay:good.csv"], "No such file or directory"),
            (["record", "--output", "t.csv", "--period", "0.001"], "must be a number of seconds, 0.01 or more"),
            (["record", "--output", "t.csv", "--period", "inf"], "must be a number of seconds"),
            (["record", "--output", "t.csv", "--duration", "0"], "must be a number of seconds above 0"),
            (["record", "--output", "t.csv", "--source", "nvlm"], "Did you mean 'nvml'"),
            (["watch", "--source", "replay:garbage.csv"], "garbage.csv"),
            (["watch", "--period", "often"], "is 'often', but must be"),
            (["serve", "--names", "dcgm"], "invalid choice: 'dcgm'"),
            (["serve", "--source", "replay:good.csv", "--port", "0", "--allow", "everyone"], "everyone"),
            (["serve", "--source", "replay:good.csv", "--port", "0", "--token-file", "absent"], "absent"),
        ],
    )
    def test_is_one_line_and_exit_2(self, tmp_path, monkeypatch, capsys, arguments, problem):
        monkeypatch.chdir(tmp_path)
        for name in ("garbage.csv", "garbage.parquet"):
            (tmp_path / name).write_bytes(bytes(range(256)) * 40)
        (tmp_path / "empty.csv").write_bytes(b"")
        (tmp_path / "good.csv").write_text(f"{HEADER}\n0,g,1\n1,g,1\n")
        before = sorted(tmp_path.iterdir())
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        assert (code, captured.out) == (2, "")
        assert captured.err.startswith("wattier-telemetry")
        assert captured.err.count("\n") == 1
        assert problem in captured.err
        assert [path for path in sorted(tmp_path.iterdir()) if path.name != "registry"] == before

    def test_reader_that_goes_away_is_no_error(self, trace):
        path = trace(*(f"0,g{index},1" for index in range(5000)))
        with subprocess.Popen(
            [*COMMAND, "report", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            process.stdout.readline()
            process.stdout.close()
            assert process.wait(timeout=60) == 0
            assert process.stderr.read() == b""


class TestHelp:
    def commands(self):
        parser = make_parser()
        (actions,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        return actions.choices

    def test_every_command_teaches_by_an_example_that_parses(self):
        assert set(self.commands()) == {"doctor", "read", "watch", "record", "report", "serve", "power-caps"}
        for name, parser in self.commands().items():
            assert parser.epilog.startswith("example:")
            for line in parser.epilog.splitlines()[1:]:
                command = re.split(r" [|#>]", line)[0].split()
                assert command[0] == "wattier-telemetry"
                assert make_parser().parse_args(command[1:]).command in {name, "report"}

    @pytest.mark.parametrize("name", ["doctor", "read", "watch", "record", "report", "serve", "power-caps"])
    def test_help_can_be_printed(self, name, capsys):
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert "example:" in capsys.readouterr().out


class TestServe:
    def test_flags_reach_the_exporter(self, gpu, tmp_path):
        token = tmp_path / "token"
        token.write_text("secret-word-of-the-site\n")
        token.chmod(0o600)
        discovery = tmp_path / "sd" / "node.json"
        options = ["--port", "0", "--period", "0.05", "--token-file", token, "--discovery", discovery]
        options += ["--names", "omnistat", "--allow", "127.0.0.0/8", "--spool", tmp_path / "spool", "--flush", "1"]
        command = [*COMMAND, "serve", "--source", f"replay:{gpu}", *map(str, options)]
        with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
            url = server.stdout.readline().split()[-1]
            (target,) = json.loads(discovery.read_text())
            assert target["targets"][0] in url
            request = urllib.request.Request(url, headers={"Authorization": "Bearer secret-word-of-the-site"})
            with urllib.request.urlopen(request, timeout=20) as answer:
                text = answer.read().decode()
            with pytest.raises(urllib.error.HTTPError, match="401") as refused:
                urllib.request.urlopen(url, timeout=20)
            refused.value.close()
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=30) == 0
        assert "wattier_power_watts" in text
        assert "rocm_" in text
        assert not discovery.exists()


class TestDoctor:
    @pytest.fixture
    def beating_node(self, tmp_path, monkeypatch):
        """A Cray node whose controller counts 500 W and 100 W in steps of 100 ms, as long as the test lasts."""
        root, stop = tmp_path / "pm_counters", threading.Event()
        root.mkdir()

        def write(step):
            for name, watts in (("cpu", 100), ("accel0", 500)):
                # In one go, as the kernel does it: a file that is opened for writing is empty for a moment.
                for figure, value, unit in (("energy", 7000 + watts * step // 10, "J"), ("power", watts, "W")):
                    new = root / f".{name}_{figure}"
                    new.write_text(f"{value} {unit} {step} us\n")
                    new.replace(root / f"{name}_{figure}")

        def beat():
            began, step = time.monotonic(), 0
            while not stop.wait(max(0.0, began + 0.1 * (step + 1) - time.monotonic())):
                step += 1
                write(step)

        write(0)
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        monkeypatch.setattr(cray_module, "PM_COUNTERS", root)
        yield root
        stop.set()
        thread.join()

    def test_counter_is_timed_and_held_against_power(self, beating_node):
        began = time.monotonic()
        finding = next(finding for finding in diagnose() if finding.source == "cray")
        assert time.monotonic() - began < 10
        assert finding.works
        assert "accelerator module 0 [gpu]: energy (counter) and power" in finding.measures
        (refresh,) = [
            note for note in finding.notes if note.startswith("accelerator module 0: its counter is refreshed")
        ]
        assert float(re.search(r"every (\d+) ms", refresh)[1]) == pytest.approx(100, abs=40)
        (ratio,) = [note for note in finding.notes if note.startswith("accelerator module 0: the counter says")]
        assert float(re.search(r"says ([\d.]+) times", ratio)[1]) == pytest.approx(1, abs=0.2)

    def test_counter_that_stands_still_is_told(self, beating_node, monkeypatch, tmp_path):
        still = tmp_path / "still"
        still.mkdir()
        (still / "cpu_energy").write_text("5 J 1 us\n")
        monkeypatch.setattr(cray_module, "PM_COUNTERS", still)
        finding = next(finding for finding in diagnose(probe_seconds=0.2) if finding.source == "cray")
        assert "CPUs of the node: its counter moved 0 time(s) in 0.2 s" in finding.notes

    def test_every_source_is_examined_and_what_fails_comes_with_advice(self):
        findings = diagnose(probe_seconds=0)
        assert [finding.source for finding in findings] == ["nvml", "amd", "rapl", "cray", "estimated"]
        assert all(finding.works or finding.what_to_do for finding in findings)
        assert all("\n" not in finding.measures for finding in findings)

    def test_remarks_name_masks_virtual_machine_and_container(self, tmp_path, monkeypatch):
        assert remarks(tmp_path) == []
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/cpuinfo").write_text("flags : fpu vme hypervisor lahf_lm\n")
        (tmp_path / ".dockerenv").touch()
        monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1")
        monkeypatch.setenv("WATTIER_POWER_SOURCE", "estimated")
        found = remarks(tmp_path)
        for word in (
            "HIP_VISIBLE_DEVICES is '1'",
            "WATTIER_POWER_SOURCE is 'estimated'",
            "virtual machine",
            "container",
        ):
            assert sum(word in remark for remark in found) == 1

    def test_closed_powercap_names_the_cure(self, powercap, tmp_path, monkeypatch):
        (tmp_path / "sys/class").mkdir(parents=True)
        powercap.rename(tmp_path / "sys/class/powercap")
        monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, who may read all
        (remark,) = remarks(tmp_path)
        assert "intel-rapl:0/energy_uj may be read only by root: `sudo chmod a+r`" in remark
