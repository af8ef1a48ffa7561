"""A power source in memory whose every answer a test decides."""

import threading
import time

from wattier_telemetry import Device, PowerSource, Reading


class ScriptedSource(PowerSource):
    """Devices of known watts, counted by an exact counter; what fails, hangs or is busy can be changed at any time."""

    name = "scripted"

    def __init__(self, name="scripted", gate=None, method="counter", **watts):
        self.name = name
        self.watts = watts
        self.method = method
        self.failing = set()
        self.extra = {}
        self.busy = {}
        self.counter = True
        self.offset_joules = 0.0
        self.reads = 0
        self.read_times = []
        self.gate = gate or threading.Event()
        self.gate.set()
        self.start = time.monotonic()
        self._lock = threading.Lock()

    def devices(self):
        return tuple(Device(u, f"GPU {u}", "gpu", i, method=self.method) for i, u in enumerate(self.watts))

    def read(self, device):
        self.gate.wait()
        now = time.monotonic()
        with self._lock:
            self.reads += 1
            self.read_times.append(now)
        if device.uuid in self.failing:
            raise OSError("fell off the bus")
        watts = self.watts[device.uuid]
        joules = watts * (now - self.start) + self.offset_joules if self.counter else None
        return Reading(time.time(), power_watts=watts, energy_joules=joules, **self.extra)

    def busy_by_pid(self, device):
        return self.busy

    def close(self):
        self.gate.set()


class OneDevice(PowerSource):
    """One device of a source, so that each has a meter of its own."""

    name = "one device"

    def __init__(self, source, index):
        self._source, self._device = source, source.devices()[index]

    def devices(self):
        return (self._device,)

    def read(self, device) -> Reading:
        return self._source.read(device)

    def read_energy(self, device) -> Reading:
        return self._source.read_energy(device)

    def busy_by_pid(self, device):
        return self._source.busy_by_pid(device)

    def close(self):
        pass
