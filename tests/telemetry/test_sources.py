"""Opening a source, and the sources that need no vendor's library: each passes the contract, then what is its own.

RAPL reads a powercap tree written by the test.
"""

import subprocess
import sys
import time

import psutil
import pytest
from contract import PowerSourceContract

from wattier_telemetry import SourceUnavailable, diagnose, open_source
from wattier_telemetry.sources import rapl as rapl_module
from wattier_telemetry.sources.estimated import EstimatedSource
from wattier_telemetry.sources.rapl import RaplSource
from wattier_telemetry.sources.replay import ReplaySource


@pytest.fixture
def rapl(powercap):
    return RaplSource(powercap)


class TestRaplContract(PowerSourceContract):
    name = "rapl"

    @pytest.fixture
    def source(self, rapl):
        return rapl


class TestEstimatedContract(PowerSourceContract):
    name = "estimated"

    @pytest.fixture
    def source(self):
        return open_source("estimated", rated_watts=20)


class TestReplayContract(PowerSourceContract):
    name = "replay"

    @pytest.fixture
    def source(self, trace):
        return open_source(f"replay:{trace('0,gpu-0,100', '0,gpu-1,50')}")


class TestOpenSource:
    def test_unknown_name_suggests_one(self):
        with pytest.raises(SourceUnavailable, match=r"'nvlm'.*Did you mean 'nvml'") as caught:
            open_source("nvlm")
        assert "\n" not in str(caught.value)

    def test_auto_takes_the_gpu_first(self, two_gpus):
        source = open_source()
        assert source.name == "nvml"
        source.close()

    def test_auto_falls_back_to_an_estimate(self, no_nvml, monkeypatch, tmp_path):
        monkeypatch.setattr(RaplSource.__init__, "__defaults__", (tmp_path,))
        assert open_source().name == "estimated"

    def test_environment_overrides_auto_only(self, monkeypatch, trace):
        monkeypatch.setenv("WATTIER_POWER_SOURCE", f"replay:{trace('0,gpu-0,100')}")
        assert open_source().name == "replay"
        assert open_source("estimated").name == "estimated"

    @pytest.mark.parametrize("name", ["replay", "replay:", "nvml:0", "AUTO"])
    def test_refuses_nonsense(self, name):
        with pytest.raises(SourceUnavailable):
            open_source(name)


class TestRapl:
    def test_only_packages_and_memory(self, rapl):
        labels = [(device.name.split()[0], device.domain) for device in rapl.devices()]
        assert labels == [("package-0", "cpu"), ("dram", "dram"), ("package-1", "cpu")]

    def test_wrap_around(self, rapl, powercap):
        device = rapl.devices()[0]
        readings = []
        for microjoules in (9_000_000, 500_000, 600_000, 100_000):
            (powercap / "intel-rapl:0/energy_uj").write_text(str(microjoules))
            readings.append(rapl.read(device).energy_joules)
        assert readings == pytest.approx([9.0, 10.5, 10.6, 20.1])

    def test_unreadable_names_file_and_cure(self, powercap, monkeypatch):
        def forbidden(self, *_, **__):
            raise PermissionError(13, "Permission denied")

        readable = rapl_module.Path.read_text
        monkeypatch.setattr(
            rapl_module.Path, "read_text", lambda p, *a: (forbidden if p.name == "energy_uj" else readable)(p, *a)
        )
        with pytest.raises(SourceUnavailable, match=r"intel-rapl:0/energy_uj.*chmod"):
            RaplSource(powercap)

    def test_virtual_machine(self, tmp_path):
        with pytest.raises(SourceUnavailable, match="holds no RAPL"):
            RaplSource(tmp_path)


class TestEstimated:
    def test_counts_cpu_seconds_times_watts(self):
        source = EstimatedSource(rated_watts=20)
        device = source.devices()[0]
        before = time.process_time()
        while time.process_time() - before < 0.2:
            pass
        burnt = time.process_time() - before
        assert source.read(device).energy_joules == pytest.approx(20 * burnt, abs=20 * 0.05)

    def test_children_count_once_also_after_they_ended(self):
        source = EstimatedSource(rated_watts=10)
        device = source.devices()[0]
        code = "import time\nwhile time.process_time() < 0.4: pass"
        child = subprocess.Popen([sys.executable, "-c", code])
        seen = []
        while child.poll() is None:
            seen.append(source.read(device).energy_joules)
            time.sleep(0.02)
        seen.append(source.read(device).energy_joules)
        assert seen == sorted(seen)
        own = psutil.Process().cpu_times()
        assert seen[-1] >= 10 * 0.38
        assert seen[-1] < 10 * (0.4 + own.user + own.system)
        assert source.read(device).energy_joules - seen[-1] < 10 * 0.1

    @pytest.mark.parametrize("watts", [0, -1, float("nan"), float("inf")])
    def test_refuses_impossible_watts(self, watts):
        with pytest.raises(SourceUnavailable, match="rated_watts"):
            open_source("estimated", rated_watts=watts)


class TestReplay:
    def at(self, path, now):
        source = ReplaySource(path, clock=lambda: now)
        return source.read(source.devices()[0])

    def test_ramp_is_integrated_exactly(self, trace):
        path = trace("10,g,0", "20,g,100", "30,g,100")
        cases = {5: (0, 0), 10: (0, 0), 15: (50, 125), 20: (100, 500), 25: (100, 1000), 40: (100, 2500)}
        for now, expected in cases.items():
            reading = self.at(path, now)
            assert (reading.power_watts, reading.energy_joules) == pytest.approx(expected)

    def test_recorded_counter_wins_over_power(self, trace):
        path = trace("0,g,100,7", "10,g,100,27", header="time_seconds,device,power_watts,energy_joules")
        assert self.at(path, 5).energy_joules == 17
        methods = [ReplaySource(file).devices()[0].method for file in (path, trace("0,g,1", name="power.csv"))]
        assert methods == ["counter", "integrated"]

    @pytest.mark.parametrize(
        ("lines", "problem"),
        [
            ((), "line 2: the trace is empty"),
            (("0,g,100", "1,g"), "line 3 has 2 cells"),
            (("0,g,warm",), "line 2: power_watts is 'warm'"),
            (("0,g,nan",), "line 2: power_watts is 'nan'"),
            (("0,g,-1",), "line 2: power_watts is -1"),
            (("0,,1",), "line 2: device is empty"),
            (("1,g,1", "1,g,2"), "line 3: time_seconds of g must grow"),
        ],
    )
    def test_malformed_line_is_named(self, trace, lines, problem):
        with pytest.raises(SourceUnavailable, match=problem):
            ReplaySource(trace(*lines))

    def test_malformed_header_and_missing_file(self, trace, tmp_path):
        with pytest.raises(SourceUnavailable, match="line 1 is 'time,watts'"):
            ReplaySource(trace(header="time,watts"))
        with pytest.raises(SourceUnavailable, match="cannot be read"):
            ReplaySource(tmp_path / "absent.csv")


def test_doctor_on_a_bare_machine(no_nvml, monkeypatch, tmp_path):
    monkeypatch.setattr(RaplSource.__init__, "__defaults__", (tmp_path,))
    monkeypatch.setenv("ROCM_PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "amdsmi", None)
    findings = {finding.source: finding for finding in diagnose()}
    assert [name for name, finding in findings.items() if finding.works] == ["estimated"]
    assert all(finding.measures and finding.what_to_do for finding in findings.values())


def test_doctor_with_gpus(two_gpus):
    finding = diagnose()[0]
    assert (finding.source, finding.works, finding.what_to_do) == ("nvml", True, "")
    assert "energy (counter) and power" in finding.measures
