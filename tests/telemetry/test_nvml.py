"""The NVML source, through the real pynvml binding against a simulated driver in C."""

import ctypes
import json
import logging
import os
import subprocess
import sys
import threading
import time

import pynvml
import pytest
from contract import PowerSourceContract
from scenario import SimulatedDevice

from wattier_telemetry import Reading, SourceUnavailable, open_source
from wattier_telemetry.sources import nvml

READ_POWER = """
import json
from wattier_telemetry import open_source
source = open_source("nvml")
print(json.dumps([source.read(device).power_watts for device in source.devices()]))
"""
EVERY_REASON = 0x4 | 0x10 | 0x20 | 0x40 | 0x80  # power cap, sync boost, software and hardware thermal, power brake


@pytest.fixture
def opened(simulated_nvml):
    """Return a function that opens a source on simulated devices given by their keys; all are closed at the end."""
    sources = []

    def open_(*devices, whole_node=False, start=None, **keys):
        simulated_nvml(*(devices or (SimulatedDevice(extra=keys),)), start=start)
        sources.append(open_source("nvml", whole_node=whole_node))
        return sources[-1]

    yield open_
    for source in sources:
        source.close()


@pytest.fixture
def change(simulated_nvml):
    """Return a function that changes the scenario under the sources that are open."""

    def change_(*devices, start=None):
        simulated_nvml(*devices, start=start)
        pynvml.nvmlInit()  # reads the scenario anew
        pynvml.nvmlShutdown()

    return change_


def read_one(source):
    return source.read(source.devices()[0])


class TestContract(PowerSourceContract):
    name = "nvml"

    @pytest.fixture
    def source(self, simulated_nvml):
        pid = {"pid1": 4711, "busy1": 0.6, "pid2": 4712, "busy2": 0.3, "garbage": 1}
        simulated_nvml(SimulatedDevice(300, 100, 5, {"reasons": EVERY_REASON, **pid}), SimulatedDevice(400, extra=pid))
        return open_source("nvml")


class TestContractWithoutACounter(PowerSourceContract):
    name = "nvml"

    @pytest.fixture
    def source(self, simulated_nvml):
        simulated_nvml(SimulatedDevice(300, extra={"bare": 1}))
        return open_source("nvml")


class TestUnits:
    @pytest.fixture
    def reading(self, opened):
        keys = {"temperature": 61, "memory_temperature": 74, "sm_mhz": 1980, "mem_mhz": 3201, "busy": 0.75}
        keys |= {"memory_busy": 0.2, "memory_used_mb": 1000, "memory_total_mb": 143_771, "limit": 650, "limit_max": 700}
        return read_one(opened(**keys, ecc_corrected=12, ecc_uncorrected=1))

    def test_base_units(self, reading):
        assert (reading.clock_hertz, reading.memory_clock_hertz) == (1.98e9, 3.201e9)
        assert (reading.temperature_celsius, reading.memory_temperature_celsius) == (61, 74)
        assert (reading.utilization_ratio, reading.memory_utilization_ratio) == (0.75, 0.2)
        assert (reading.memory_used_bytes, reading.memory_total_bytes) == (1000 * 2**20, 143_771 * 2**20)
        assert (reading.power_limit_watts, reading.power_limit_max_watts) == (650, 700)
        assert reading.power_watts == 300

    def test_errors_are_those_since_the_driver_loaded(self, reading):
        assert (reading.ecc_corrected, reading.ecc_uncorrected) == (12, 1)

    def test_used_memory_of_an_old_driver_includes_what_is_reserved(self, opened):
        assert read_one(opened(memory_used_mb=1000, memory_v2="na")).memory_used_bytes == 1600 * 2**20

    def test_identity(self, opened):
        first, second = opened(SimulatedDevice(), SimulatedDevice(extra={"name": "NVIDIA_L4"})).devices()
        assert (first.uuid, second.uuid) == ("GPU-aaaa-0000", "GPU-bbbb-0000")
        assert (first.name, second.name, second.index, second.domain) == ("Simulated H200", "NVIDIA L4", 1, "gpu")
        assert (second.pci_bus_id, second.serial) == ("00000000:19:00.0", "1650523001")
        assert (second.vbios_version, second.driver_version) == ("96.00.99.00.01", "580.65.06")


class TestEnergy:
    @pytest.mark.parametrize("field", [1, "na"])
    def test_counter_is_joules(self, opened, field):
        start = time.monotonic() - 1000
        source = opened(start=start, counter_field=field, offset=5)
        device = source.devices()[0]
        assert (device.method, device.counter_refresh_seconds) == ("counter", 0.1)
        earliest = time.monotonic() - start
        joules = source.read_energy(device).energy_joules
        latest = time.monotonic() - start
        assert 5 + 300 * (earliest - 0.1) <= joules <= 5 + 300 * latest  # it may stand still for 0.1 s

    def test_without_a_counter_power_must_be_integrated(self, opened):
        source = opened(counter="na")
        device = source.devices()[0]
        assert (device.method, device.counter_refresh_seconds) == ("integrated", 0)
        assert source.read_energy(device).energy_joules is None

    @pytest.mark.parametrize(("fault", "fall"), [({"reset": 60}, 18_000), ({"backward": 60, "by": 500}, 500)])
    def test_falling_counter_is_passed_on_as_it_is(self, opened, change, fault, fall):
        """Whoever adds up must know that it fell, so nothing is mended here."""
        gpu = SimulatedDevice(300, extra={"offset": 0, **fault})
        start = time.monotonic() - 30
        source = opened(gpu, start=start)
        device = source.devices()[0]
        before, now = source.read_energy(device).energy_joules, time.monotonic()
        change(gpu, start=start - 40)
        after, later = source.read_energy(device).energy_joules, time.monotonic()
        assert before == pytest.approx(300 * 30, abs=300 * (now - start - 30 + 0.1))
        assert after - before == pytest.approx(300 * 40 - fall, abs=300 * (later - start - 30 + 0.1))


class TestPower:
    def test_instantaneous_field_first(self, opened):
        source = opened(SimulatedDevice(400, 100, hz=0.05), start=time.monotonic() - 10.3)
        assert source.devices()[0].power_average_seconds == 0
        assert read_one(source).power_watts == 100  # the power fell at 10 s; the averaged call still says 310 W

    def test_averaged_power_last_and_said_so(self, opened):
        start = time.monotonic() - 10.3
        source = opened(SimulatedDevice(400, 100, hz=0.05, extra={"instant": "na"}), start=start)
        assert source.devices()[0].power_average_seconds == 1
        earliest = time.monotonic() - start
        watts = read_one(source).power_watts
        latest = time.monotonic() - start
        lowest, highest = (max(100, 400 - 300 * (now - 10)) for now in (latest, earliest))
        assert lowest - 0.001 <= watts <= highest + 0.001

    @pytest.mark.parametrize(
        ("keys", "seconds"),
        [
            ({"arch": 6, "name": "Tesla_T4"}, 0),
            ({"arch": 7, "name": "NVIDIA_A100-SXM4-80GB"}, 0),
            ({"arch": 7, "name": "NVIDIA_A30"}, 0),
            ({"arch": 7, "name": "NVIDIA_RTX_A3000"}, 1),
            ({"arch": 9}, 1),
            ({"arch": "na"}, 1),
        ],
    )
    def test_the_plain_call_averages_on_ampere_and_newer_but_not_on_ga100(self, opened, keys, seconds):
        assert opened(instant="na", **keys).devices()[0].power_average_seconds == seconds

    def test_momentary_silence_is_not_filled_with_the_average(self, opened, change):
        source = opened()
        change(SimulatedDevice(extra={"instant": "na"}))
        assert read_one(source).power_watts is None

    def test_missing_power_beside_a_counter_is_unknown(self, opened):
        reading = read_one(opened(power="na", instant="na"))
        assert reading.power_watts is None
        assert reading.energy_joules > 0

    def test_a_device_that_tells_neither_is_refused(self, opened):
        with pytest.raises(SourceUnavailable, match=r"neither energy nor power.*'estimated'") as caught:
            opened(power="na", instant="na", counter="na")
        assert "\n" not in str(caught.value)

    def test_cap_is_asked_for_every_few_seconds_only(self, opened, monkeypatch):
        source = opened(limit=650)
        device, asked = source.devices()[0], []
        real = pynvml.nvmlDeviceGetEnforcedPowerLimit
        monkeypatch.setattr(pynvml, "nvmlDeviceGetEnforcedPowerLimit", lambda h: asked.append(h) or real(h))
        assert {source.read_energy(device).power_limit_watts for _ in range(10)} == {650}
        assert len(asked) == 1
        monkeypatch.setattr(nvml, "_SLOW_KEPT_SECONDS", -1)
        source.read_energy(device)
        assert len(asked) == 2


class TestUnknown:
    def test_bare_device_knows_its_power_and_nothing_else(self, opened):
        reading = read_one(opened(bare=1))
        assert reading == Reading(reading.time_seconds, power_watts=300)

    @pytest.mark.parametrize(
        ("key", "name"),
        [
            ("memory_temperature", "memory_temperature_celsius"),
            ("temperature", "temperature_celsius"),
            ("busy", "utilization_ratio"),
            ("sm_mhz", "clock_hertz"),
            ("mem_mhz", "memory_clock_hertz"),
            ("memory_used_mb", "memory_used_bytes"),
            ("limit", "power_limit_watts"),
            ("limit_max", "power_limit_max_watts"),
            ("ecc_corrected", "ecc_corrected"),
            ("ecc_uncorrected", "ecc_uncorrected"),
            ("reasons", "throttle_reasons"),
            ("throttled_before", "throttle_seconds"),
        ],
    )
    def test_what_the_device_does_not_have_is_none_and_never_zero(self, opened, key, name):
        reading = read_one(opened(**{key: "na"}))
        assert getattr(reading, name) is None
        assert reading.power_watts == 300

    def test_absent_memory_sensor_that_answers_zero(self, opened):
        assert read_one(opened(memory_temperature=0)).memory_temperature_celsius is None


class TestThrottling:
    @pytest.mark.parametrize("mask", [1, "na"])
    def test_reasons_are_words_and_idle_is_none_of_them(self, opened, mask):
        reading = read_one(opened(reasons=0x1 | 0x4 | 0x20, mask=mask))
        assert reading.throttle_reasons == ("power_cap", "software_thermal")

    def test_nothing_holds_it_down(self, opened):
        reading = read_one(opened(reasons=0))
        assert reading.throttle_reasons == ()
        assert set(reading.throttle_seconds.values()) == {0}

    @pytest.mark.parametrize("moved_fields", [269, 251])
    def test_seconds_of_each_reason(self, opened, moved_fields):
        """Over after 7 s of its minute, on top of 2.5 s of earlier times, wherever the driver keeps the counters."""
        window = {"throttle_from": 10, "throttle_to": 17, "throttled_before": 2.5}
        start = time.monotonic() - 60
        reading = read_one(opened(start=start, reasons=0x4 | 0x40, moved_fields=moved_fields, board_limit=1, **window))
        assert reading.throttle_reasons == ()
        assert reading.throttle_seconds == pytest.approx(
            {
                "power_cap": 9.5,
                "hardware_thermal": 9.5,
                "board_limit": 9.5,
                "software_thermal": 2.5,
                "sync_boost": 2.5,
                "power_brake": 2.5,
            }
        )

    def test_seconds_grow_while_it_lasts_as_time_does(self, opened):
        source = opened(reasons=0x80)
        device = source.devices()[0]
        before = time.monotonic()
        first = source.read_energy(device)
        began = time.monotonic()
        time.sleep(0.3)
        ended = time.monotonic()
        second = source.read_energy(device)
        after = time.monotonic()
        assert second.throttle_reasons == ("power_brake",)
        grown = {word: second.throttle_seconds[word] - first.throttle_seconds[word] for word in second.throttle_seconds}
        assert ended - began <= grown.pop("power_brake") <= after - before
        assert set(grown.values()) == {0}

    def test_words_of_mask_and_seconds_agree(self, opened):
        reading = read_one(opened(reasons=EVERY_REASON))
        growing = {word for word, seconds in reading.throttle_seconds.items() if seconds > 0}
        assert growing == set(reading.throttle_reasons)


class TestProcesses:
    def test_share_of_each_process(self, opened):
        source = opened(pid1=4711, busy1=0.6, pid2=4712, busy2=0.25)
        assert source.busy_by_pid(source.devices()[0]) == pytest.approx({4711: 0.6, 4712: 0.25})

    def test_samples_since_the_last_look_are_averaged(self, opened):
        source = opened(pid1=4711, busy1=0.8, odd1=0.2)
        device = source.devices()[0]
        source.busy_by_pid(device)
        time.sleep(0.9)  # at least four samples, alternating
        assert source.busy_by_pid(device)[4711] == pytest.approx(0.5, abs=0.11)

    def test_no_new_sample_repeats_the_answer_for_a_moment_only(self, opened, monkeypatch):
        source = opened(pid1=4711, busy1=0.6)
        device = source.devices()[0]
        first = source.busy_by_pid(device)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetProcessUtilization", lambda *_: [])
        assert source.busy_by_pid(device) == first
        monkeypatch.setattr(nvml, "_BUSY_KEPT_SECONDS", 0)
        assert source.busy_by_pid(device) == {}

    def test_rubbish_is_passed_over(self, opened):
        source = opened(pid1=4711, busy1=0.6, garbage=1)
        assert source.busy_by_pid(source.devices()[0]) == pytest.approx({4711: 0.6})

    def test_first_look_goes_back_one_second(self, opened):
        start = time.monotonic() - 10
        source = opened(start=start, pid1=4711, busy1=0.6, gone1=8.3, pid2=4712, busy2=0.3)
        assert source.busy_by_pid(source.devices()[0]) == pytest.approx({4712: 0.3})

    def test_no_sample_counts_twice(self, opened, change):
        """A process that ended before the last look is not in this one."""
        start = time.monotonic() - 10
        source = opened(start=start, pid1=4711, busy1=0.6)
        device = source.devices()[0]
        ended = time.monotonic() - start - 0.2  # a sample's stamp is up to 0.2 s old
        assert set(source.busy_by_pid(device)) == {4711}
        time.sleep(0.5)
        change(SimulatedDevice(extra={"pid1": 4711, "busy1": 0.6, "gone1": ended, "pid2": 4712}), start=start)
        assert set(source.busy_by_pid(device)) == {4712}

    @pytest.mark.parametrize("keys", [{}, {"processes": "na"}])
    def test_nothing_to_tell(self, opened, keys):
        source = opened(**keys)
        assert source.busy_by_pid(source.devices()[0]) == {}


class TestLostGpu:
    @pytest.mark.parametrize("ask", ["read", "read_energy", "busy_by_pid"])
    def test_the_other_still_answers(self, opened, change, ask):
        source = opened(SimulatedDevice(), SimulatedDevice())
        first, second = source.devices()
        assert source.read(second).power_watts == 300
        change(SimulatedDevice(), SimulatedDevice(extra={"lost": 0}))
        with pytest.raises(SourceUnavailable, match=r"GPU-bbbb.*lost") as caught:
            getattr(source, ask)(second)
        assert "\n" not in str(caught.value)
        assert source.read(first).power_watts == 300

    def test_lost_before_it_was_opened_is_listed(self, opened, caplog):
        source = opened(SimulatedDevice(extra={"lost": 0}), SimulatedDevice())
        lost, other = source.devices()
        assert (lost.uuid, lost.method) == ("GPU-aaaa-0000", "counter")
        assert "GPU-aaaa-0000, does not answer: GPU is lost" in caplog.text
        assert source.read(other).power_watts == 300
        with pytest.raises(SourceUnavailable):
            source.read(lost)

    def test_nameless_one_is_left_out_and_the_others_keep_their_index(self, opened, caplog, monkeypatch):
        devices = SimulatedDevice(extra={"lost": 0, "unlisted": 1}), SimulatedDevice()
        with caplog.at_level(logging.WARNING):
            assert [(device.uuid, device.index) for device in opened(*devices).devices()] == [("GPU-bbbb-0000", 1)]
        assert "GPU 0 is left out" in caplog.text
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        assert [device.uuid for device in opened(*devices).devices()] == ["GPU-bbbb-0000"]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        with pytest.raises(SourceUnavailable, match="CUDA_VISIBLE_DEVICES='0'"):
            opened(*devices)

    def test_none_left(self, opened):
        with pytest.raises(SourceUnavailable, match="no GPU on this machine that answers"):
            opened(lost=0, unlisted=1)

    def test_a_hanging_device_does_not_hold_up_the_other(self, opened, change):
        source = opened(SimulatedDevice(), SimulatedDevice())
        hanging, other = source.devices()
        done = threading.Event()
        change(SimulatedDevice(extra={"hang": 0, "hang_for": 2}), SimulatedDevice())
        thread = threading.Thread(target=lambda: (source.read(hanging), done.set()), daemon=True)
        thread.start()
        assert source.read(other).power_watts == 300
        assert not done.is_set()
        thread.join()
        assert done.is_set()


class TestMasksAndMig:
    @pytest.mark.parametrize(
        ("mask", "indices"), [("1", [1]), ("1,0", [1, 0]), ("GPU-bbbb", [1]), ("0,-1,1", [0]), (" 0 , 0", [0])]
    )
    def test_mask(self, opened, monkeypatch, mask, indices):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
        assert [device.index for device in opened(SimulatedDevice(), SimulatedDevice()).devices()] == indices

    @pytest.mark.parametrize("mask", ["", "-1", "7", "GPU-", "MIG-1234"])
    def test_mask_that_leaves_nothing(self, opened, monkeypatch, mask):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
        with pytest.raises(SourceUnavailable, match="CUDA_VISIBLE_DEVICES"):
            opened(SimulatedDevice(), SimulatedDevice())
        assert len(opened(SimulatedDevice(), SimulatedDevice(), whole_node=True).devices()) == 2

    def test_mig_is_refused_in_one_line(self, opened):
        with pytest.raises(SourceUnavailable, match=r"Simulated H200 GPU-aaaa-0000 is split by MIG") as caught:
            opened(mig=1)
        assert "\n" not in str(caught.value)

    def test_mig_of_a_masked_gpu_does_not_matter(self, opened, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        assert len(opened(SimulatedDevice(extra={"mig": 1}), SimulatedDevice()).devices()) == 1

    def test_whole_node_reads_a_split_gpu_as_one_and_says_so(self, opened):
        source = opened(SimulatedDevice(250, extra={"mig": 1}), SimulatedDevice(), whole_node=True)
        assert [device.name for device in source.devices()] == ["Simulated H200 (MIG)", "Simulated H200"]
        assert read_one(source).power_watts == 250


class TestDriver:
    def test_closed_source_says_so(self, opened):
        source = opened()
        source.close()
        with pytest.raises(SourceUnavailable, match="closed"):
            read_one(source)

    def test_no_driver(self, simulated_nvml):
        with pytest.raises(SourceUnavailable, match=r"NVML does not start \(Driver Not Loaded\)"):
            open_source("nvml")

    def test_fresh_process_finds_the_library_by_its_soname(self, nvml_folder, simulated_nvml):
        simulated_nvml(SimulatedDevice(250), SimulatedDevice(260))
        environment = {**os.environ, "LD_LIBRARY_PATH": str(nvml_folder)}
        command = [sys.executable, "-c", READ_POWER]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == [250, 260]

    @pytest.mark.parametrize(
        ("symbol", "structure"),
        [
            ("layout_field", pynvml.c_nvmlFieldValue_t),
            ("layout_rates", pynvml.c_nvmlUtilization_t),
            ("layout_memory", pynvml.c_nvmlMemory_t),
            ("layout_memory2", pynvml.c_nvmlMemory_v2_t),
            ("layout_pci", pynvml.nvmlPciInfo_t),
            ("layout_process", pynvml.c_nvmlProcessUtilizationSample_t),
        ],
    )
    def test_simulated_structures_are_laid_out_as_the_binding_s(self, nvml_folder, symbol, structure):
        names = [name for name, _ in structure._fields_]
        library = ctypes.CDLL(str(nvml_folder / "libnvidia-ml.so.1"))
        layout = list((ctypes.c_size_t * (len(names) + 1)).in_dll(library, symbol))
        assert layout == [*(getattr(structure, name).offset for name in names), ctypes.sizeof(structure)]
