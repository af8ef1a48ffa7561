"""The truth of a simulated driver's scenario (drivers/scenario.h), by a closed form of its own."""

import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class SimulatedDevice:
    """One `device` line: `extra` holds the keys that are not about power."""

    high: float = 300.0
    low: float | None = None
    hz: float = 0.0
    extra: dict = field(default_factory=dict)

    def line(self) -> str:
        numbers = {"high": self.high, "low": self.high if self.low is None else self.low, "hz": self.hz, **self.extra}
        return "device " + " ".join(f"{key}={value}" for key, value in numbers.items())

    def joules(self, begin: float, end: float) -> float:
        """True energy between two times after the scenario's start, J."""
        return self._until(end) - self._until(begin)

    def _until(self, t: float) -> float:
        if not self.hz or self.low is None:
            return self.high * t
        half = 0.5 / self.hz
        halves, rest = divmod(t, half)
        bursts, odd = divmod(int(halves), 2)
        high_seconds = (bursts + odd) * half + (0.0 if odd else rest)
        return self.high * high_seconds + self.low * (t - high_seconds)


def write_scenario(path: Path, *devices: SimulatedDevice, start: float | None = None) -> float:
    """Write the file that WATTIER_SCENARIO names; returns its start, a reading of time.monotonic()."""
    start = time.monotonic() if start is None else start
    path.write_text(f"start {start!r}\n" + "".join(device.line() + "\n" for device in devices))
    return start


def build_nvml(folder: Path) -> Path:
    """Compile the simulated NVML and return its folder, for LD_LIBRARY_PATH."""
    library, code = folder / "libnvidia-ml.so.1", Path(__file__).parent / "drivers/nvml.c"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-Wl,-soname,libnvidia-ml.so.1"]
    subprocess.run([*command, "-o", str(library), str(code), "-lm"], check=True)
    return folder
