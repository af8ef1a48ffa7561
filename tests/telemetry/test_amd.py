"""AMD GPUs: the real amdsmi binding against a simulated libamd_smi.so (drivers/amd_smi.c)."""

import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from contract import PowerSourceContract
from scenario import SimulatedDevice, write_scenario
from scripted import OneDevice

from wattier_telemetry import EnergyMeter, SourceUnavailable, open_source
from wattier_telemetry.sources.amd import AmdSource
from wattier_telemetry.sources.amd_throttle import Throttling, reasons_of_bits

MI250X = {"name": "AMD_Instinct_MI250X", "gfx": "90a", "current": "na", "refresh": 0}
MI300X = {"name": "AMD_Instinct_MI300X", "gfx": "942", "average": "na", "refresh": 0, "vram_total": 196592}
SENSORS = {"edge": 41, "hotspot": 55, "vram": 62}


pytestmark = pytest.mark.usefixtures("fresh_binding")


def die(watts=400.0, **extra):
    return SimulatedDevice(high=watts, extra={**MI250X, **extra})


def package(watts=400.0, **extra):
    """Both dies of an MI250X, the reporting one first."""
    return die(watts, **extra), die(watts, silent=1, **extra)


def mi300x(watts=700.0, **extra):
    return SimulatedDevice(high=watts, extra={**MI300X, **extra})


@pytest.fixture
def play(monkeypatch, rocm, tmp_path):
    """Return a function that opens the source on a scenario; `play.start` is when the scenario began."""
    opened = []

    def open_on(*devices, start=None, **options):
        monkeypatch.setenv("ROCM_PATH", str(rocm))
        monkeypatch.setenv("WATTIER_SCENARIO", str(tmp_path / "scenario"))
        open_on.start = write_scenario(tmp_path / "scenario", *devices, start=start)
        opened.append(AmdSource(**options))
        return opened[-1]

    yield open_on
    for source in opened:
        source.close()


class TestMi250xContract(PowerSourceContract):
    name = "amd"

    @pytest.fixture
    def source(self, play):
        return play(*package(500, refresh=0.1, bits=0, **SENSORS), *package(300, pids="4711:40"))


class TestMi300xContract(PowerSourceContract):
    name = "amd"

    @pytest.fixture
    def source(self, play):
        return play(mi300x(rate=1000, ppt=0.3), mi300x(energy="none"))


# --- packages of two dies ---


def test_every_die_is_a_device_and_knows_its_package(play):
    source = play(*package(), *package(), *package(), *package())
    devices = source.devices()
    assert [device.index for device in devices] == list(range(8))
    assert len({device.uuid for device in devices}) == 8
    reporting = [device.uuid for device in devices[::2]]
    assert [device.package_uuid for device in devices] == [uuid for uuid in reporting for _ in range(2)]


def test_each_die_gets_half_of_the_counter_of_which_a_tick_is_two_to_the_minus_16_joules(play):
    source = play(*package(0, offset=3e6), *package(0, offset=5e6))
    joules = [source.read(device).energy_joules for device in source.devices()]
    assert joules == [1.5e6, 1.5e6, 2.5e6, 2.5e6]  # 15.3 uJ a tick would be 0.27 % more


def test_dies_of_four_packages_add_up_to_the_true_energy(play):
    loads = [(560.0, 120.0, 5.0), (430.0, 430.0, 0.0), (300.0, 90.0, 20.0), (90.0, 90.0, 0.0)]
    devices = []
    for high, low, hz in loads:
        devices += [SimulatedDevice(high, low, hz, {**MI250X, "silent": silent}) for silent in (0, 1)]
    source = play(*devices)

    def look():
        begin = time.monotonic() - play.start
        joules = [source.read_energy(device).energy_joules for device in source.devices()]
        return begin, joules, time.monotonic() - play.start

    before, first, between = look()
    time.sleep(0.4)
    later, last, after = look()
    for number in range(4):
        truth = devices[2 * number]
        parts = [last[i] - first[i] for i in (2 * number, 2 * number + 1)]
        tick = 2 * 2.0**-16
        assert truth.joules(between, later) - tick <= sum(parts) <= truth.joules(before, after) + tick
        for part in parts:  # a trial on one die owes half of the package
            assert truth.joules(between, later) / 2 - tick <= part <= truth.joules(before, after) / 2 + tick


def test_power_and_its_caps_are_halved_too(play):
    source = play(*package(480, limit=500, limit_max=560))
    for device in source.devices():
        reading = source.read(device)
        assert (reading.power_watts, reading.power_limit_watts, reading.power_limit_max_watts) == (240, 250, 280)


def test_everything_else_is_the_dies_own(play):
    source = play(die(gfx_busy=90, vram_used=100, hotspot=70), die(silent=1, gfx_busy=10, vram_used=300, hotspot=50))
    readings = [source.read(device) for device in source.devices()]
    assert [reading.utilization_ratio for reading in readings] == [0.9, 0.1]
    assert [reading.memory_used_bytes for reading in readings] == [100 * 2**20, 300 * 2**20]
    assert [reading.temperature_celsius for reading in readings] == [70, 50]


@pytest.mark.parametrize("pattern", ["RSRS", "SRSR", "RSSR", "SRRS"])
def test_either_die_may_be_the_one_that_reports(play, pattern):
    source = play(*[die(silent=int(letter == "S")) for letter in pattern])
    devices = source.devices()
    for first in (0, 2):
        pair = devices[first : first + 2]
        reporting = pair[0] if pattern[first] == "R" else pair[1]
        assert [device.package_uuid for device in pair] == [reporting.uuid] * 2
        assert [source.read(device).power_watts for device in pair] == [200, 200]


@pytest.mark.parametrize(
    "dies",
    [
        [die(), die()],
        [die(name="AMD_Instinct_MI210"), die(name="AMD_Instinct_MI210", silent=1)],
        [mi300x(), mi300x(silent=1)],
        [die(), mi300x(silent=1)],
        [die(silent=1), die(silent=1)],
    ],
    ids=["both report", "MI210", "MI300X", "unlike", "both silent"],
)
def test_neighbours_that_are_no_package_stand_alone(play, dies):
    source = play(*dies)
    assert [device.package_uuid for device in source.devices()] == [None, None]
    # A counter that says 0 is no counter: its joules would be 0, and that would be believed.
    silent = [bool(simulated.extra.get("silent")) for simulated in dies]
    assert [device.method == "integrated" for device in source.devices()] == silent
    assert [source.read(device).energy_joules is None for device in source.devices()] == silent


def test_hidden_half_of_a_package_is_not_billed(play, monkeypatch):
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "1")
    source = play(*package(0, offset=2e6))
    (device,) = source.devices()
    assert device.index == 1
    assert device.package_uuid not in (None, device.uuid)
    assert source.read(device).energy_joules == 1e6


# --- what a die tells of itself ---


def test_reading_holds_every_figure_in_base_units(play):
    figures = {"gfx_clock": 2100, "mem_clock": 1300, "gfx_busy": 88, "umc_busy": 33, "vram_used": 2048, "limit": 750}
    more = {"limit_max": 800, "ecc_corrected": 3, "ecc_uncorrected": 1}
    source = play(mi300x(650, offset=7e6, stuck=0, **SENSORS, **figures, **more))
    (device,) = source.devices()
    reading = source.read(device)
    assert (reading.power_watts, reading.energy_joules) == (650, 7e6)
    assert (reading.clock_hertz, reading.memory_clock_hertz) == (2.1e9, 1.3e9)
    assert (reading.utilization_ratio, reading.memory_utilization_ratio) == pytest.approx((0.88, 0.33))
    assert (reading.memory_used_bytes, reading.memory_total_bytes) == (2**31, 196592 * 2**20)
    assert (reading.temperature_celsius, reading.memory_temperature_celsius) == (55, 62)
    assert (reading.power_limit_watts, reading.power_limit_max_watts) == (750, 800)
    assert (reading.ecc_corrected, reading.ecc_uncorrected) == (3, 1)


def test_device_says_what_and_where_it_is(play):
    (device,) = play(mi300x(bus=0x2A)).devices()
    assert (device.name, device.domain, device.method) == ("AMD Instinct MI300X", "gpu", "counter")
    assert device.pci_bus_id == "0000:2a:00.0"
    assert device.driver_version == "6.12.12"
    assert device.vbios_version == "022.040.003.043"
    assert device.serial == "692231000123"


@pytest.mark.parametrize(
    ("extra", "watts", "averaged"),
    [
        ({"average": "na"}, 500, False),
        ({"current": "na", "average": 1}, 500, True),
        ({"current": "na", "average": "na"}, None, True),
        ({"current": "na", "average": 1, "wide": 1}, 500, True),
        ({"current": "na", "average": "na", "wide": 1}, None, True),
    ],
)
def test_power_is_the_field_that_is_there(play, extra, watts, averaged):
    source = play(mi300x(500, **extra))
    (device,) = source.devices()
    assert source.read(device).power_watts == watts
    assert (device.power_average_seconds > 0) == averaged


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("gfx_clock", "clock_hertz"),
        ("mem_clock", "memory_clock_hertz"),
        ("gfx_busy", "utilization_ratio"),
        ("umc_busy", "memory_utilization_ratio"),
        ("vram_used", "memory_used_bytes"),
        ("vram_total", "memory_total_bytes"),
        ("hotspot", "temperature_celsius"),
        ("vram", "memory_temperature_celsius"),
        ("limit", "power_limit_watts"),
        ("limit_max", "power_limit_max_watts"),
        ("ecc_corrected", "ecc_corrected"),
        ("ecc_uncorrected", "ecc_uncorrected"),
    ],
)
def test_sentinel_is_unknown_and_not_a_number(play, key, field):
    source = play(mi300x(**{"hotspot": 50, "vram": 60, key: "na"}))
    reading = source.read(source.devices()[0])
    assert getattr(reading, field) is None
    assert reading.power_watts == 700


@pytest.mark.parametrize("energy", ["na", "none"])
def test_without_a_counter_the_joules_are_integrated(play, energy):
    source = play(mi300x(energy=energy))
    (device,) = source.devices()
    assert device.method == "integrated"
    assert source.read(device).energy_joules is None


def test_temperatures_of_a_die_without_the_usual_sensors(play):
    source = play(mi300x(edge=47, hbm0=51, hbm2=58, hbm3=0))
    reading = source.read(source.devices()[0])
    assert (reading.temperature_celsius, reading.memory_temperature_celsius) == (47, 58)


def test_equal_uuids_are_told_apart_by_their_place(play):
    source = play(mi300x(serial="0000000000000000"), mi300x(serial="0000000000000000"))
    assert len({device.uuid for device in source.devices()}) == 2


def test_processes_share_the_compute_units(play):
    source = play(mi300x(pids="4711:40,4712:25,4713:na"), mi300x())
    assert [source.busy_by_pid(device) for device in source.devices()] == [{4711: 0.4, 4712: 0.25}, {}]


def test_counter_that_falls_or_stands_still_is_passed_on_raw(play):
    start = time.monotonic() - 100
    source = play(mi300x(0, offset=1e6, backward=50, by=300), mi300x(500, offset=1e6, stuck=20), start=start)
    joules = [source.read_energy(device).energy_joules for device in source.devices()]
    assert joules == [1e6 - 300, 1e6 + 500 * 20]


# --- HIP's order and the masks ---

REVERSED = [mi300x(0, offset=1000 * (place + 1), hip=3 - place) for place in range(4)]  # HIP 0 is AMD SMI's last


def offsets(source):
    return [round(source.read(device).energy_joules / 1000) for device in source.devices()]


def test_devices_are_in_hips_order(play):
    source = play(*REVERSED)
    assert offsets(source) == [4, 3, 2, 1]
    assert [device.index for device in source.devices()] == [0, 1, 2, 3]


def test_older_rocm_orders_by_kernel_node(play):
    source = play(*[mi300x(0, offset=1000 * (i + 1), hip="none", node=node) for i, node in enumerate((9, 4, 7))])
    assert offsets(source) == [2, 3, 1]


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ({"HIP_VISIBLE_DEVICES": "0"}, [4]),
        ({"HIP_VISIBLE_DEVICES": "2,0"}, [2, 4]),
        ({"ROCR_VISIBLE_DEVICES": "1,2,3", "HIP_VISIBLE_DEVICES": "0,2"}, [3, 1]),
        ({"CUDA_VISIBLE_DEVICES": "3"}, [1]),
        ({"ROCR_VISIBLE_DEVICES": "3,1", "CUDA_VISIBLE_DEVICES": "1"}, [3]),
        ({"HIP_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "3"}, [3]),
        ({"HIP_VISIBLE_DEVICES": "1,-1,2"}, [3]),
        ({"ROCR_VISIBLE_DEVICES": "0,0,2", "HIP_VISIBLE_DEVICES": "1"}, [2]),
    ],
)
def test_masks_count_as_hip_does(play, monkeypatch, masks, expected):
    for name, mask in masks.items():
        monkeypatch.setenv(name, mask)
    source = play(*REVERSED)
    assert offsets(source) == expected
    assert [device.index for device in source.devices()] == [4 - offset for offset in expected]


@pytest.mark.parametrize("hip", [{"asic": "none"}, {"hip": "none"}], ids=["ROCm 6.4", "older"])
@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("GPU-18f3a2b1c0d9e8f7", [2]),
        ("GPU-18F3A2B1C0D9E8F7,GPU-0af3a2b1c0d9e8f7", [2, 1]),
        ("GPU-18f3", [2]),
        ("1,GPU-0a", [2, 1]),
    ],
)
def test_uuids_in_a_mask_are_rocrs(play, monkeypatch, hip, mask, expected):
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", mask)
    serials = ("0af3a2b1c0d9e8f7", "18f3a2b1c0d9e8f7")
    source = play(*[mi300x(0, offset=1000 * (i + 1), serial=serial, **hip) for i, serial in enumerate(serials)])
    assert offsets(source) == expected


@pytest.mark.parametrize("mask", ["4", "x", "GPU-", "GPU-ffff", "GPU-0000", "", "-1"])
def test_mask_that_names_no_die_is_refused_in_one_line(play, monkeypatch, mask):
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", mask)
    with pytest.raises(SourceUnavailable, match=f"^HIP_VISIBLE_DEVICES='{mask}'[^\n]*AMD GPU[^\n]*$"):
        play(*REVERSED)


def test_whole_node_looks_past_the_masks(play, monkeypatch):
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "")
    assert offsets(play(*REVERSED, whole_node=True)) == [4, 3, 2, 1]


# --- throttling ---


def test_time_under_each_limit_is_the_firmwares_share_of_it(play):
    source = play(mi300x(rate=1000, ppt=0.5, hbm=1, socket="na"))
    (device,) = source.devices()

    def look():
        begin = time.monotonic()
        reading = source.read_energy(device)
        return begin, reading, time.monotonic()

    before, reading, between = look()
    first = dict(reading.throttle_seconds)
    time.sleep(0.3)
    later, reading, after = look()
    last = reading.throttle_seconds
    assert reading.throttle_reasons == ("power_cap", "memory_thermal")
    assert set(last) == {"power_cap", "memory_thermal", "regulator_thermal", "prochot"}
    for reason, share in {"power_cap": 0.5, "memory_thermal": 1, "regulator_thermal": 0}.items():
        grown = last[reason] - first[reason]
        assert share * (later - between) - 0.02 <= grown <= share * (after - before) + 0.02


def test_gpu_that_runs_freely_says_so(play):
    source = play(mi300x(rate=1000))
    (device,) = source.devices()
    source.read_energy(device)
    time.sleep(0.05)
    reading = source.read_energy(device)
    assert reading.throttle_reasons == ()
    assert set(reading.throttle_seconds.values()) == {0.0}


def test_throttling_costs_no_sleep(play):
    """AMD's own call for it would sleep for 100 ms, which no sampler with a period of 10 ms can afford."""
    source = play(mi300x(rate=1000, ppt=1))
    (device,) = source.devices()
    costs = []
    for _ in range(5):
        begin = time.monotonic()
        source.read_energy(device)
        costs.append(time.monotonic() - begin)
    assert min(costs) < 0.05


def test_counters_that_begin_again_add_nothing():
    def table(ticks, held):
        limits = ("ppt", "socket_thm", "vr_thm", "hbm_thm", "prochot")
        return SimpleNamespace(
            accumulation_counter=ticks, **{f"{limit}_residency_acc": held if limit == "ppt" else 0 for limit in limits}
        )

    throttling = Throttling()
    throttling.look(table(1000, 1000))
    time.sleep(0.02)
    _, seconds = throttling.look(table(1020, 1020))
    assert seconds["power_cap"] > 0.01
    assert throttling.look(table(5, 5))[1] == seconds
    time.sleep(0.02)
    assert throttling.look(table(25, 25))[1]["power_cap"] > seconds["power_cap"] + 0.01


@pytest.mark.parametrize(
    ("bits", "reasons"),
    [
        (0, ()),
        (1 << 0, ("power_cap",)),  # PPT0
        (1 << 1 | 1 << 34, ("power_cap", "memory_thermal")),  # PPT1, TEMP_MEM
        (1 << 16 | 1 << 23, ("current_limit",)),  # TDC_GFX, APCC
        (1 << 32 | 1 << 38 | 1 << 47, ("socket_thermal", "regulator_thermal", "prochot")),
        (1 << 57, ("other",)),
    ],
)
def test_older_gpus_tell_reasons_by_bits(play, bits, reasons):
    source = play(*package(bits=bits))
    for device in source.devices():
        reading = source.read_energy(device)
        assert reading.throttle_reasons == reasons
        assert reading.throttle_seconds is None


def test_every_bit_has_a_reason():
    assert all(len(reasons_of_bits(1 << bit)) == 1 for bit in range(64))


def test_gpu_without_either_cannot_say(play):
    source = play(mi300x())
    reading = source.read(source.devices()[0])
    assert (reading.throttle_reasons, reading.throttle_seconds) == (None, None)


# --- what goes wrong ---


def test_lost_die_is_unavailable_for_it_alone(play):
    source = play(mi300x(lost=2.0), mi300x())
    lost, other = source.devices()
    source.read(lost)
    time.sleep(max(0.0, play.start + 2.01 - time.monotonic()))
    for read in (source.read, source.read_energy):
        with pytest.raises(SourceUnavailable, match=f"^AMD Instinct MI300X {lost.uuid} does not answer$"):
            read(lost)
        assert read(other).energy_joules is not None


def test_die_whose_package_lost_its_meter_does_not_know_its_energy(play):
    start = time.monotonic()
    source = play(die(lost=2.0), die(silent=1), start=start)
    lost, other = source.devices()
    time.sleep(max(0.0, start + 2.01 - time.monotonic()))
    reading = source.read(other)
    assert (reading.energy_joules, reading.power_watts) == (None, None)
    assert reading.utilization_ratio == 0.75
    with pytest.raises(SourceUnavailable):
        source.read(lost)


def test_die_without_a_uuid_is_left_out_and_the_others_keep_their_index(play, caplog):
    source = play(mi300x(), mi300x(uuid="none"), mi300x())
    assert [device.index for device in source.devices()] == [0, 2]
    assert "AMD GPU 1 is left out" in caplog.text


def test_source_closed_beside_another_leaves_it_open(play):
    first, second = play(mi300x()), play(mi300x())
    first.close()
    assert second.read(second.devices()[0]).power_watts == 700
    with pytest.raises(SourceUnavailable, match="closed"):
        first.read(first.devices()[0])


def test_machine_without_the_driver_or_without_gpus(play, monkeypatch, rocm):
    monkeypatch.setenv("ROCM_PATH", str(rocm))
    with pytest.raises(SourceUnavailable, match=r"^AMD SMI does not start: .*34.*$"):
        AmdSource()
    with pytest.raises(SourceUnavailable, match=r"^AMD SMI works, but there is no GPU on this machine$"):
        play()


def refusal(capsys):
    """Return why the source is not available, after making sure that it said so in one line and nowhere else."""
    with pytest.raises(SourceUnavailable) as caught:
        open_source("amd")
    assert capsys.readouterr() == ("", "")
    assert not [name for name in sys.modules if name.split(".")[0] == "amdsmi" and sys.modules[name] is not None]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_library_is_one_line_and_can_be_found_later(play, capsys):
    assert "finds no libamd_smi.so" in refusal(capsys)
    assert play(mi300x()).devices()


def test_library_older_than_the_binding_is_one_line(build_amd, monkeypatch, tmp_path, capsys, play):
    folder = build_amd.build(tmp_path / "old", without=("amdsmi_get_gpu_enumeration_info",))
    monkeypatch.setenv("ROCM_PATH", str(folder))
    reason = refusal(capsys)
    assert "newer than the libamd_smi.so" in reason
    assert "amdsmi_get_gpu_enumeration_info" in reason
    assert play(mi300x()).devices()


def test_broken_library_is_one_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "broken" / "lib").mkdir(parents=True)
    (tmp_path / "broken" / "lib" / "libamd_smi.so").write_text("not a library")
    monkeypatch.setenv("ROCM_PATH", str(tmp_path / "broken"))
    assert f"now: {tmp_path / 'broken'}" in refusal(capsys)


def test_missing_binding_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "amdsmi", None)
    assert "there is no amdsmi binding; install ROCm" in refusal(capsys)


@pytest.mark.parametrize("variable", ["ROCM_PATH", "ROCM_HOME"])
def test_binding_of_rocm_itself_comes_first(build_amd, rocm, monkeypatch, tmp_path, variable):
    own = tmp_path / "own"
    shutil.copytree(build_amd.binding_folder(), own / "share" / "amd_smi" / "amdsmi")
    shutil.copytree(rocm / "lib", own / "lib")
    write_scenario(tmp_path / "scenario", mi300x())
    monkeypatch.setenv("WATTIER_SCENARIO", str(tmp_path / "scenario"))
    monkeypatch.setenv(variable, str(own))
    source = open_source("amd")
    assert Path(sys.modules["amdsmi"].__file__).is_relative_to(own)
    assert source.devices()
    assert os.fspath(own / "share" / "amd_smi") not in sys.path
    source.close()


class TestEngines:
    def test_every_part_is_read_in_base_units(self, play):
        source = play(mi300x(ras=3, vcn=40, xgmi_read=1000, xgmi_write=250, units=304, pids="4711:25,4712:50"))
        reading = source.read(source.devices()[0])
        assert reading.decoder_utilization_ratio == 0.4
        assert (reading.link_read_bytes, reading.link_written_bytes) == (2 * 1000 * 1024, 2 * 250 * 1024)
        assert (reading.compute_units, reading.compute_units_busy) == (304, 228)
        assert reading.errors_by_block["umc"] == (3, 30, 300)
        assert reading.errors_by_block["xgmi_wafl"] == (10, 100, 1000)  # the eighth block, so seven more
        assert len(reading.errors_by_block) == 8

    def test_a_decoder_before_mi300(self, play):
        source = play(*package(mm=12))
        assert source.read(source.devices()[0]).decoder_utilization_ratio == 0.12

    def test_what_a_die_does_not_tell_is_unknown(self, play):
        source = play(mi300x())
        reading = source.read(source.devices()[0])
        assert reading.decoder_utilization_ratio is None
        assert (reading.link_read_bytes, reading.compute_units, reading.compute_units_busy) == (None, None, None)
        assert reading.errors_by_block is None


def test_meters_of_two_trials_on_the_dies_of_a_package_add_up_to_it(play):
    """Square waves, a counter refreshed every 100 ms, ticks of 2**-16 J: each die owes half, together all of it."""
    wave = {**MI250X, "refresh": 0.1}
    dies = [SimulatedDevice(500, 150, 5.0, {**wave, **extra}) for extra in ({}, {"silent": 1})]
    source = play(*dies)
    meters = [EnergyMeter(OneDevice(source, i)) for i in range(2)]
    for meter in meters:
        meter.__enter__()
    time.sleep(20.0)
    for meter in meters:
        meter.close()
    for meter in meters:
        (share,) = meter.report.shares
        begin = meter._opened_at - play.start
        truth = dies[0].joules(begin, begin + meter.report.seconds) / 2
        assert share.joules == pytest.approx(truth, rel=0.005)
        assert share.joules_low <= truth <= share.joules_high
        assert (share.fraction, share.attribution, share.method) == (1, "whole", "counter")
