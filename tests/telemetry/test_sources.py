"""Every power source passes one contract; then what is particular to each.

NVML runs the real pynvml binding against a simulated C library. AMD runs, for now, against a simulated `amdsmi`
Python module and not against a simulated `libamd_smi.so`. RAPL reads a powercap tree written by the test.
"""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from wattier_telemetry import Device, PowerSource, Reading, SourceUnavailable, diagnose, open_source
from wattier_telemetry import rapl as rapl_module
from wattier_telemetry.estimated import EstimatedSource
from wattier_telemetry.rapl import RaplSource
from wattier_telemetry.replay import ReplaySource


@pytest.fixture
def nvml(fake_nvml):
    return open_source("nvml")


@pytest.fixture
def amd(fake_amd):
    return open_source("amd")


@pytest.fixture
def rapl(powercap):
    return RaplSource(powercap)


@pytest.fixture
def estimated():
    return open_source("estimated", rated_watts=20)


@pytest.fixture
def replay(trace):
    return open_source(f"replay:{trace('0,gpu-0,100', '0,gpu-1,50')}")


@pytest.mark.parametrize("source_name", ["nvml", "amd", "rapl", "estimated", "replay"])
class TestContract:
    """What any source promises; a new one is added to the list above."""

    @pytest.fixture
    def source(self, source_name, request):
        source: PowerSource = request.getfixturevalue(source_name)
        yield source
        source.close()

    def test_says_who_it_is(self, source, source_name):
        assert source.name == source_name
        assert source.method in ("counter", "integrated", "estimated")

    def test_devices_are_stable_and_told_apart(self, source):
        devices = source.devices()
        assert devices
        assert devices == source.devices()
        assert all(isinstance(device, Device) and device.uuid and device.name for device in devices)
        assert len({device.uuid for device in devices}) == len(devices)
        assert {device.domain for device in devices} <= {"gpu", "cpu", "dram"}

    def test_reading_is_plausible(self, source):
        for device in source.devices():
            reading = source.read(device)
            assert isinstance(reading, Reading)
            assert abs(reading.time_seconds - time.time()) < 5
            assert reading.energy_joules is not None or reading.power_watts is not None
            assert reading.utilization_ratio is None or 0 <= reading.utilization_ratio <= 1
            assert reading.temperature_celsius is None or 0 < reading.temperature_celsius < 150
            assert reading.clock_hertz is None or reading.clock_hertz > 1e8
            assert reading.power_watts is None or 0 < reading.power_watts < 5000

    def test_counter_never_falls(self, source):
        for device in source.devices():
            joules = [source.read(device).energy_joules for _ in range(20)]
            assert joules == sorted(joules)

    def test_closes_twice(self, source):
        source.close()
        source.close()


class TestOpenSource:
    def test_unknown_name_suggests_one(self):
        with pytest.raises(SourceUnavailable, match=r"'nvlm'.*Did you mean 'nvml'") as caught:
            open_source("nvlm")
        assert "\n" not in str(caught.value)

    def test_auto_takes_the_gpu_first(self, fake_nvml):
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


class TestNvml:
    def test_units(self, nvml):
        reading = nvml.read(nvml.devices()[0])
        assert reading.power_watts == 300  # the instantaneous field, and not the 307 W of the averaged call
        assert reading.energy_joules == pytest.approx(time.monotonic() * 300, rel=1e-3)
        assert (reading.clock_hertz, reading.memory_clock_hertz) == (1.98e9, 3.201e9)
        assert (reading.memory_used_bytes, reading.memory_total_bytes) == (10 * 2**30, 150 * 2**30)
        assert (reading.utilization_ratio, reading.temperature_celsius) == (0.75, 61)
        assert reading.throttle_reasons == ("power_cap", "software_thermal")

    def test_unsupported_is_unknown(self, nvml, monkeypatch):
        monkeypatch.setenv("FAKE_NVML_BARE", "1")
        reading = nvml.read(nvml.devices()[0])
        assert reading == Reading(reading.time_seconds, power_watts=307)

    def test_lost_gpu_leaves_the_other(self, nvml, monkeypatch):
        monkeypatch.setenv("FAKE_NVML_LOST", "1")
        first, second = nvml.devices()
        assert nvml.read(first).power_watts == 300
        with pytest.raises(SourceUnavailable, match=r"GPU-bbbb.*lost"):
            nvml.read(second)

    @pytest.mark.parametrize(
        ("mask", "indices"), [("1", [1]), ("1,0", [1, 0]), ("GPU-bbbb", [1]), ("0,-1,1", [0]), (" 0 , 0", [0])]
    )
    def test_mask(self, fake_nvml, monkeypatch, mask, indices):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
        source = open_source("nvml")
        assert [device.index for device in source.devices()] == indices
        source.close()

    @pytest.mark.parametrize("mask", ["", "-1", "7", "GPU-", "MIG-1234"])
    def test_mask_that_leaves_nothing(self, fake_nvml, monkeypatch, mask):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
        with pytest.raises(SourceUnavailable, match="CUDA_VISIBLE_DEVICES"):
            open_source("nvml")

    def test_mig_is_refused(self, fake_nvml, monkeypatch):
        monkeypatch.setenv("FAKE_NVML_MIG", "1")
        with pytest.raises(SourceUnavailable, match="MIG"):
            open_source("nvml")

    def test_fresh_process_finds_the_library_by_its_soname(self, fake_nvml_folder):
        environment = {**os.environ, "LD_LIBRARY_PATH": str(fake_nvml_folder), "FAKE_NVML_WATTS": "250"}
        command = [sys.executable, "-m", "wattier_telemetry.cli", "read", "--source", "nvml"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        devices = json.loads(done.stdout)["devices"]
        assert [device["reading"]["power_watts"] for device in devices] == [250, 250]


class TestAmd:
    def test_package_is_one_device_billed_once(self, amd):
        assert [device.uuid for device in amd.devices()] == ["amd-uuid-0", "amd-uuid-2"]
        assert [amd.read(device).power_watts for device in amd.devices()] == [400, 420]

    def test_tick_is_two_to_the_minus_16_joules(self, amd):
        joules = amd.read(amd.devices()[0]).energy_joules
        assert joules == pytest.approx(400 * time.monotonic(), rel=1e-4)  # 15.3 uJ would be 2.7e-3 too high

    def test_dies_are_joined(self, amd):
        reading = amd.read(amd.devices()[0])
        assert reading.utilization_ratio == 0.75
        assert reading.memory_total_bytes == 2 * 65520 * 2**20
        assert (reading.temperature_celsius, reading.clock_hertz, reading.throttle_reasons) == (56, 1.7e9, None)

    def test_odd_die_alone_is_billed_its_package_and_not_zero(self, fake_amd, monkeypatch):
        monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "3,1")
        monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0")
        source = open_source("amd")
        assert [device.uuid for device in source.devices()] == ["amd-uuid-2"]
        assert source.read(source.devices()[0]).power_watts == 420

    def test_equal_speaking_dies_are_separate_devices(self, fake_amd, monkeypatch):
        monkeypatch.setattr(fake_amd, "WATTS", {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0})
        assert len(open_source("amd").devices()) == 4

    def test_broken_binding_is_silent_and_clear(self, monkeypatch, tmp_path, capsys):
        (tmp_path / "share/amd_smi").mkdir(parents=True)
        (tmp_path / "share/amd_smi/amdsmi.py").write_text("print('noise')\nraise KeyError('libamd_smi.so')\n")
        monkeypatch.setenv("ROCM_PATH", str(tmp_path))
        monkeypatch.delitem(sys.modules, "amdsmi", raising=False)
        with pytest.raises(SourceUnavailable, match="libamd_smi"):
            open_source("amd")
        assert capsys.readouterr().out == ""


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
        assert ReplaySource(path).method == "counter"
        assert ReplaySource(trace("0,g,1")).method == "integrated"

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


def test_doctor_with_gpus(fake_nvml):
    finding = diagnose()[0]
    assert (finding.source, finding.works, finding.what_to_do) == ("nvml", True, "")
    assert "energy (counter) and power" in finding.measures
