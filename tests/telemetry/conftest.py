"""Simulated machines: an NVML library in C, a powercap tree, replayed traces."""

import ctypes
import subprocess
from pathlib import Path

import pynvml
import pytest
from scenario import SimulatedDevice, write_scenario

HERE = Path(__file__).parent
MASKS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "WATTIER_POWER_SOURCE")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch, tmp_path):
    """Leave no mask and no registry of the real machine in sight."""
    for name in MASKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WATTIER_REGISTRY", str(tmp_path / "registry"))


@pytest.fixture(scope="session")
def nvml_folder(tmp_path_factory):
    """Compile the simulated NVML once and return its folder, for LD_LIBRARY_PATH."""
    folder = tmp_path_factory.mktemp("nvml")
    library = folder / "libnvidia-ml.so.1"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-Wl,-soname,libnvidia-ml.so.1"]
    subprocess.run([*command, "-o", str(library), str(HERE / "drivers/nvml.c"), "-lm"], check=True)
    return folder


@pytest.fixture
def simulated_nvml(nvml_folder, monkeypatch, tmp_path):
    """Return a function that sets up simulated GPUs for the real pynvml, here and in processes started from here.

    It takes the devices, returns the scenario's start on time.monotonic(), and may be called again: the next NVML
    source that is opened plays the new scenario. A child needs ``nvml_folder`` in its LD_LIBRARY_PATH.
    """
    library = ctypes.CDLL(str(nvml_folder / "libnvidia-ml.so.1"))
    monkeypatch.setattr(pynvml, "nvmlLib", library)
    pynvml._nvmlGetFunctionPointer_cache.clear()

    def start(*devices, start=None):
        path = tmp_path / "nvml.scenario"
        monkeypatch.setenv("WATTIER_SCENARIO", str(path))
        return write_scenario(path, *devices, start=start)

    yield start
    pynvml._nvmlGetFunctionPointer_cache.clear()


@pytest.fixture
def two_gpus(simulated_nvml):
    """Two simulated H200 at 300 W."""
    return simulated_nvml(SimulatedDevice(300), SimulatedDevice(300))


@pytest.fixture
def no_nvml(monkeypatch):
    """Make a machine without an NVIDIA driver, also where there is one."""

    def missing(*_):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)


@pytest.fixture
def powercap(tmp_path):
    """Write a powercap tree: two packages, memory of the first, and zones that must not be billed."""
    root = tmp_path / "powercap"
    zones = {
        "intel-rapl:0": ("package-0", 1_000_000),
        "intel-rapl:0:0": ("core", 400_000),
        "intel-rapl:0:1": ("dram", 300_000),
        "intel-rapl:1": ("package-1", 2_000_000),
        "intel-rapl:2": ("psys", 9_000_000),
        "intel-rapl-mmio:0": ("package-0", 1_000_000),
    }
    for name, (label, microjoules) in zones.items():
        folder = root / name
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{label}\n")
        (folder / "energy_uj").write_text(f"{microjoules}\n")
        (folder / "max_energy_range_uj").write_text("10000000\n")
    return root


@pytest.fixture
def trace(tmp_path):
    """Return a function that writes a replay file."""

    def write(*lines, header="time_seconds,device,power_watts", name="trace.csv"):
        path = tmp_path / name
        path.write_text("\n".join([header, *lines]) + "\n")
        return path

    return write
