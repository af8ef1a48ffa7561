"""The counters of an HPE Cray node, from a tree of files as its controller writes them."""

import socket
import threading

import pytest
from contract import PowerSourceContract

from wattier_telemetry import SourceUnavailable, open_source
from wattier_telemetry.sources import cray as cray_module
from wattier_telemetry.sources.cray import CraySource

# A node with one processor and four accelerator modules, as /sys/cray/pm_counters shows it. The node's total holds the
# others, and what no file names: 1034 - 143 - 87 - 4 accelerators = 45 W of network and board.
TREE = {
    "accel0_energy": "36243871 J 1719328765124013 us",
    "accel0_power": "189 W 1719328765124013 us",
    "accel0_power_cap": "0 W 1719328765124013 us",
    "accel1_energy": "35977232 J 1719328765124013 us",
    "accel1_power": "191 W 1719328765124013 us",
    "accel1_power_cap": "0 W 1719328765124013 us",
    "accel2_energy": "36391164 J 1719328765124013 us",
    "accel2_power": "190 W 1719328765124013 us",
    "accel2_power_cap": "0 W 1719328765124013 us",
    "accel10_energy": "36008559 J 1719328765124013 us",
    "accel10_power": "189 W 1719328765124013 us",
    "accel10_power_cap": "0 W 1719328765124013 us",
    "cpu0_temp": "46 C 1719328765124013 us",
    "cpu_energy": "28106042 J 1719328765124013 us",
    "cpu_power": "143 W 1719328765124013 us",
    "energy": "195621349 J 1719328765124013 us",
    "freshness": "13021873",
    "generation": "7",
    "memory_energy": "15824410 J 1719328765124013 us",
    "memory_power": "87 W 1719328765124013 us",
    "power": "1034 W 1719328765124013 us",
    "power_cap": "0 W 1719328765124013 us",
    "raw_scan_hz": "10",
    "startup": "1718897153187540 us",
    "version": "2",
}


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "pm_counters"
    root.mkdir()
    for name, text in TREE.items():
        (root / name).write_text(f"{text}\n")
    return root


class TestCrayContract(PowerSourceContract):
    name = "cray"

    @pytest.fixture
    def source(self, tree):
        return CraySource(tree, whole_node=True)


def test_parts_are_listed_and_the_total_that_holds_them_is_not(tree):
    found = [(device.name, device.domain) for device in CraySource(tree).devices()]
    assert found == [
        ("CPUs of the node", "cpu"),
        ("memory of the node", "dram"),
        *((f"accelerator module {number}", "gpu") for number in (0, 1, 2, 10)),
    ]


def test_whole_node_adds_the_total_and_changes_no_other_device(tree):
    parts, whole = CraySource(tree).devices(), CraySource(tree, whole_node=True).devices()
    assert whole[:-1] == parts
    assert (whole[-1].domain, whole[-1].name) == ("node", "node total")


def test_figures_are_joules_and_watts(tree):
    source = CraySource(tree, whole_node=True)
    seen = {device.uuid.partition(":")[2]: source.read(device) for device in source.devices()}
    assert {name: (r.energy_joules, r.power_watts) for name, r in seen.items()} == {
        "cray-cpu": (28106042, 143),
        "cray-memory": (15824410, 87),
        "cray-accel0": (36243871, 189),
        "cray-accel1": (35977232, 191),
        "cray-accel2": (36391164, 190),
        "cray-accel10": (36008559, 189),
        "cray-node": (195621349, 1034),
    }


def test_uuids_name_the_host_and_the_refresh_is_10_hz(tree):
    for device in CraySource(tree).devices():
        assert device.uuid.startswith(f"{socket.gethostname()}:cray-")
        assert (device.method, device.counter_refresh_seconds) == ("counter", 0.1)


def test_torn_update_is_read_again(tree, monkeypatch):
    source = CraySource(tree)
    cpu = source.devices()[0]
    readable, calls = cray_module._figure, []

    def figure(file, unit):
        value = readable(file, unit)
        calls.append(file.name)
        if len(calls) == 1:  # the controller writes just after the energy was read
            (tree / "cpu_energy").write_text("28106072 J 1719328765224013 us\n")
            (tree / "cpu_power").write_text("300 W 1719328765224013 us\n")
            (tree / "freshness").write_text("13021874\n")
        return value

    monkeypatch.setattr(cray_module, "_figure", figure)
    reading = source.read(cpu)
    assert (reading.energy_joules, reading.power_watts) == (28106072, 300)  # never the old joules with the new watts
    assert calls == ["cpu_energy", "cpu_power"] * 2


def test_endless_updates_are_an_error_and_no_endless_loop(tree, monkeypatch):
    source = CraySource(tree)
    numbers = iter(range(1000))
    monkeypatch.setattr(source, "_update", lambda: str(next(numbers)))
    with pytest.raises(SourceUnavailable, match="freshness changed during each of 5 readings"):
        source.read(source.devices()[0])


def test_readers_in_threads_agree(tree):
    source = CraySource(tree)
    cpu, seen = source.devices()[0], []
    threads = [
        threading.Thread(target=lambda: seen.append(source.read(cpu).energy_joules), daemon=True) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [28106042] * 8


def test_missing_files_mean_fewer_devices(tree):
    for name in ("memory_energy", "accel1_energy", "freshness", "cpu_power"):
        (tree / name).unlink()
    source = CraySource(tree)
    assert [d.uuid.rpartition("-")[2] for d in source.devices()] == ["cpu", "accel0", "accel2", "accel10"]
    assert (source.read(source.devices()[0]).energy_joules, source.read(source.devices()[0]).power_watts) == (
        28106042,
        None,
    )


def test_one_unnumbered_accelerator_is_a_device_and_a_sum_of_numbered_ones_is_not(tmp_path, tree):
    (tree / "accel_energy").write_text("144620826 J 1 us\n")
    assert "cray-accel" not in {device.uuid.partition(":")[2] for device in CraySource(tree).devices()}
    for path in tree.glob("accel[0-9]*"):
        path.unlink()
    source = CraySource(tree)
    accelerator = source.devices()[-1]
    assert (accelerator.name, source.read(accelerator).energy_joules) == ("accelerator module 0", 144620826)


@pytest.mark.parametrize("text", ["", "143", "143 W", "many J 1 us", "-4 J 1 us", "\xff\xfe"])
def test_nonsense_in_a_file_names_it(tree, text):
    (tree / "cpu_energy").write_bytes(text.encode("latin-1"))
    with pytest.raises(SourceUnavailable, match="cpu_energy") as caught:
        CraySource(tree)
    assert "\n" not in str(caught.value)


def test_other_machines_are_told_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(SourceUnavailable, match="does not exist: this is no HPE Cray node"):
        CraySource(tmp_path / "absent")
    with pytest.raises(SourceUnavailable, match="holds no energy counter"):
        CraySource(tmp_path)
    monkeypatch.setattr(cray_module, "PM_COUNTERS", tmp_path / "absent")
    with pytest.raises(SourceUnavailable, match="no HPE Cray node"):
        open_source("cray")
