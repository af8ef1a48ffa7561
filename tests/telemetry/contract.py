"""What any power source promises: a test class that the tests of every source inherit."""

import time
from abc import ABC, abstractmethod

import pytest

from wattier_telemetry import Device, Reading
from wattier_telemetry.records import DOMAINS, METHODS

SHARES = ("utilization_ratio", "memory_utilization_ratio")
COUNTS = ("energy_joules", "memory_used_bytes", "memory_total_bytes", "ecc_corrected", "ecc_uncorrected")
ENERGY = ("power_watts", "energy_joules", "throttle_reasons", "throttle_seconds")


class PowerSourceContract(ABC):
    """Inherit it as `class TestMineContract(PowerSourceContract)`, set `name` and give the fixture `source`.

    The fixture returns an open source of at least one device under load, whose counter neither falls nor resets; the
    contract closes it.
    """

    name: str

    @pytest.fixture
    @abstractmethod
    def source(self):
        """Return an open source."""

    @pytest.fixture(autouse=True)
    def closed_at_the_end(self, source):
        yield
        source.close()

    def test_says_who_it_is(self, source):
        assert source.name == self.name

    def test_devices_are_stable_and_told_apart(self, source):
        devices = source.devices()
        assert devices
        assert devices == source.devices()
        assert all(isinstance(device, Device) and device.uuid and device.name for device in devices)
        assert len({device.uuid for device in devices}) == len(devices)
        assert {device.domain for device in devices} <= set(DOMAINS)

    def test_devices_say_how_their_joules_are_known(self, source):
        for device in source.devices():
            assert device.method in METHODS
            assert 0 <= device.counter_refresh_seconds < 60
            assert 0 <= device.power_average_seconds < 60
            if device.method == "counter":
                assert source.read(device).energy_joules is not None

    @pytest.mark.parametrize("read", ["read", "read_energy"])
    def test_reading_is_plausible(self, source, read):
        for device in source.devices():
            reading = getattr(source, read)(device)
            assert isinstance(reading, Reading)
            assert abs(reading.time_seconds - time.time()) < 5
            assert reading.energy_joules is not None or reading.power_watts is not None
            assert reading.power_watts is None or 0 <= reading.power_watts < 50_000
            assert reading.power_limit_watts is None or 0 < reading.power_limit_watts < 50_000
            for name in SHARES:
                assert getattr(reading, name) is None or 0 <= getattr(reading, name) <= 1, name
            for name in COUNTS:
                assert getattr(reading, name) is None or getattr(reading, name) >= 0, name
            for celsius in (reading.temperature_celsius, reading.memory_temperature_celsius):
                assert celsius is None or 0 < celsius < 150
            for hertz in (reading.clock_hertz, reading.memory_clock_hertz):
                assert hertz is None or 1e7 < hertz < 1e10
            assert all(seconds >= 0 for seconds in (reading.throttle_seconds or {}).values())

    def test_read_energy_knows_what_read_knows_of_energy(self, source):
        for device in source.devices():
            full, lean = source.read(device), source.read_energy(device)
            for name in ENERGY:
                assert (getattr(full, name) is None) == (getattr(lean, name) is None), name
            if full.energy_joules is not None:
                assert lean.energy_joules >= full.energy_joules

    def test_counter_never_falls(self, source):
        for device in source.devices():
            joules = [source.read_energy(device).energy_joules for _ in range(20)]
            known = [value for value in joules if value is not None]
            assert len(known) in (0, len(joules))
            assert known == sorted(known)

    def test_busy_processes_are_shares_of_one_device(self, source):
        for device in source.devices():
            busy = source.busy_by_pid(device)
            assert all(pid > 0 and 0 <= share <= 1 for pid, share in busy.items())

    def test_closes_twice(self, source):
        source.close()
        source.close()
