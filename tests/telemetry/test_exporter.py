"""The exporter scraped over HTTP and parsed as Prometheus does; registrations; the command line."""

import math
import os
import signal
import subprocess
import sys
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from wattier_telemetry import SourceUnavailable, TrialRegistration, open_source, read_registrations, serve
from wattier_telemetry.cli import main
from wattier_telemetry.registration import default_folder


def scrape(port):
    """Return {(name, labels): value} of one scrape."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def pick(samples, name, **labels):
    """Return the values of all samples of a name that carry these labels."""
    return [value for (n, have), value in samples.items() if n == name and labels.items() <= dict(have).items()]


@pytest.fixture
def exporter(tmp_path):
    running = []

    def start(source):
        running.append((serve(source, port=0, registry_folder=tmp_path / "trials"), source))
        return running[-1][0]

    yield start
    for server, source in running:
        server.close()
        source.close()


def trial(**changes):
    return TrialRegistration(
        **{"run": "r", "stage": "s1", "trial": "t7", "rank": 0, "pid": os.getpid(), "device_uuids": ("u",), **changes}
    )


class TestExporter:
    def test_devices(self, exporter, fake_nvml):
        samples = scrape(exporter(open_source("nvml")).port)
        labels = {"uuid": "GPU-aaaa-0000", "device": "Simulated H200", "domain": "gpu", "source": "nvml"}
        expected = {
            "wattier_power_watts": 300,
            "wattier_utilization_ratio": 0.75,
            "wattier_memory_used_bytes": 10 * 2**30,
            "wattier_memory_total_bytes": 150 * 2**30,
            "wattier_temperature_celsius": 61,
            "wattier_clock_hertz": 1.98e9,
            "wattier_memory_clock_hertz": 3.201e9,
        }
        assert {name: pick(samples, name, **labels) for name in expected} == {n: [v] for n, v in expected.items()}
        assert pick(samples, "wattier_energy_joules_total", **labels)[0] > 0
        assert pick(samples, "wattier_throttled", reason="power_cap", **labels) == [1]

    def test_unknown_fields_are_absent(self, exporter, trace):
        samples = scrape(exporter(open_source(f"replay:{trace('0,g,100')}")).port)
        assert pick(samples, "wattier_power_watts") == [100]
        assert not pick(samples, "wattier_temperature_celsius")
        assert not pick(samples, "wattier_throttled")

    def test_failing_device_does_not_take_the_other_along(self, exporter, fake_nvml, monkeypatch):
        port = exporter(open_source("nvml")).port
        monkeypatch.setenv("FAKE_NVML_LOST", "1")
        scrape(port)
        samples = scrape(port)
        assert pick(samples, "wattier_power_watts") == [300]
        assert pick(samples, "wattier_read_errors_total", uuid="GPU-bbbb-0000") == [2]
        assert pick(samples, "wattier_read_errors_total", uuid="GPU-aaaa-0000") == [0]

    def test_power_from_a_bare_counter(self, exporter, powercap):
        from wattier_telemetry.rapl import RaplSource

        port = exporter(RaplSource(powercap)).port
        assert not pick(scrape(port), "wattier_power_watts")
        (powercap / "intel-rapl:0/energy_uj").write_text("2000000")
        assert max(pick(scrape(port), "wattier_power_watts", domain="cpu")) > 0

    def test_trials(self, exporter, trace, tmp_path):
        port = exporter(open_source(f"replay:{trace('0,g,100')}")).port
        assert not pick(scrape(port), "wattier_trial_info")
        registration = trial(epoch=3, val_loss=0.25, structures_per_second=120.5, energy_joules=77.0, method="counter")
        registration.write(tmp_path / "trials")
        samples, labels = scrape(port), {"run": "r", "stage": "s1", "trial": "t7", "rank": "0"}
        assert pick(samples, "wattier_trial_info", uuid="u", method="counter", **labels) == [1]
        assert pick(samples, "wattier_trial_energy_joules_total", **labels) == [77]
        assert pick(samples, "wattier_trial_epoch", **labels) == [3]
        assert pick(samples, "wattier_trial_val_loss", **labels) == [0.25]
        assert pick(samples, "wattier_trial_structures_per_second", **labels) == [120.5]
        registration.withdraw(tmp_path / "trials")
        assert not pick(scrape(port), "wattier_trial_info")

    def test_binds_loopback(self, exporter, trace):
        server = exporter(open_source(f"replay:{trace('0,g,100')}"))
        assert server.address == "127.0.0.1"


class TestRegistration:
    def test_round_trip_and_rewriting(self, tmp_path):
        trial(epoch=1).write(tmp_path)
        path = trial(epoch=2, epochs=10).write(tmp_path)
        assert path.name == "r.s1.t7.0.json"
        assert read_registrations(tmp_path) == [trial(epoch=2, epochs=10)]
        assert list(tmp_path.iterdir()) == [path]

    def test_awkward_names_stay_inside_and_apart(self, tmp_path):
        names = ["../../x", "a.b", "a_b", "", "ö" * 300]
        paths = {trial(trial=name).write(tmp_path) for name in names}
        assert len(paths) == len(names)
        assert {path.parent for path in paths} == {tmp_path}
        assert sorted(found.trial for found in read_registrations(tmp_path)) == sorted(names)

    def test_diverged_loss_is_unknown(self, tmp_path):
        trial(val_loss=math.nan).write(tmp_path)
        assert read_registrations(tmp_path)[0].val_loss is None

    def test_torn_and_foreign_files_are_passed_over(self, tmp_path):
        for i, text in enumerate(["", "{", "[]", "{}", '{"run": 1, "stage": 2, "trial": 3, "rank": 4, "pid": 5}']):
            (tmp_path / f"{i}.json").write_text(text)
        trial().write(tmp_path)
        assert read_registrations(tmp_path) == [trial()]

    def test_dead_process_is_removed_here_but_not_elsewhere(self, tmp_path):
        child = subprocess.Popen([sys.executable, "-c", ""])
        child.wait()
        dead = trial(pid=child.pid).write(tmp_path)
        away = trial(trial="t8", pid=child.pid, host="another-node")
        away.write(tmp_path)
        assert read_registrations(tmp_path) == [away]
        assert not dead.exists()

    def test_inherited_pid_is_dead(self, tmp_path):
        path = trial().write(tmp_path)
        os.utime(path, (1000, 1000))  # written long before this process began
        assert read_registrations(tmp_path) == []

    def test_default_folder_is_private(self, monkeypatch, tmp_path):
        assert default_folder() == tmp_path / "registry"
        monkeypatch.delenv("WATTIER_REGISTRY")
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        assert default_folder() == tmp_path / "wattier"
        assert (tmp_path / "wattier").stat().st_mode & 0o777 == 0o700
        monkeypatch.delenv("XDG_RUNTIME_DIR")
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        assert default_folder() == tmp_path / f"wattier-{os.getuid()}"


class TestCli:
    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["measure"],
            ["read", "--source", "nvlm"],
            ["read", "--source", "replay:/absent.csv"],
            ["serve", "--port", "many"],
            ["serve", "--port", "70000"],
            ["serve", "--source", "estimated", "--address", "256.0.0.1"],
        ],
    )
    def test_bad_input_is_one_line_and_code_2(self, arguments, capsys):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        assert code == 2
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("wattier-telemetry")

    def test_doctor(self, capsys):
        assert main(["doctor"]) == 0
        printed = capsys.readouterr().out
        assert all(name in printed for name in ("nvml", "amd", "rapl", "ok  estimated"))

    def test_serve_until_sigterm(self, trace):
        command = [sys.executable, "-m", "wattier_telemetry.cli", "serve", "--port", "0", "--source"]
        with subprocess.Popen(
            [*command, f"replay:{trace('0,g,100')}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as server:
            address = server.stdout.readline().split()[-1]
            port = int(address.removesuffix("/metrics").rpartition(":")[2])
            assert pick(scrape(port), "wattier_power_watts") == [100]
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=10) == 0
            assert server.stderr.read() == ""


def test_closed_source_says_so(fake_nvml):
    source = open_source("nvml")
    source.close()
    with pytest.raises(SourceUnavailable, match="closed"):
        source.read(source.devices()[0])
