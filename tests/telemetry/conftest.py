"""Simulated machines: an NVML library in C, a powercap tree, replayed traces."""

import ctypes
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pynvml
import pytest
from cap_holder import GPU, Driver, Holder
from scenario import SimulatedDevice, build_nvml, write_scenario

HERE = Path(__file__).parent
MASKS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "WATTIER_POWER_SOURCE")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch, tmp_path):
    """Leave no mask and no registry of the real machine in sight."""
    for name in MASKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WATTIER_REGISTRY", str(tmp_path / "registry"))
    monkeypatch.setenv("WATTIER_POWER_CAPS", str(tmp_path / "caps"))


@pytest.fixture(scope="session")
def nvml_folder(tmp_path_factory):
    """Compile the simulated NVML once and return its folder, for LD_LIBRARY_PATH."""
    return build_nvml(tmp_path_factory.mktemp("nvml"))


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


def forget_binding():
    for name in [name for name in sys.modules if name.split(".")[0] == "amdsmi"]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def build_amd():
    path = HERE / "drivers" / "build_amd.py"
    spec = importlib.util.spec_from_file_location("build_amd", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def rocm(build_amd, tmp_path_factory):
    """A ROCm folder that holds the simulated library and nothing else."""
    return build_amd.build(tmp_path_factory.mktemp("amd") / "rocm")


@pytest.fixture
def fresh_binding(monkeypatch, tmp_path):
    """No binding is loaded, and the machine's own ROCm is out of sight."""
    monkeypatch.delenv("ROCM_HOME", raising=False)
    monkeypatch.delenv("WATTIER_SCENARIO", raising=False)
    monkeypatch.setenv("ROCM_PATH", str(tmp_path / "no-rocm"))
    forget_binding()
    yield
    forget_binding()


@pytest.fixture
def caps(tmp_path):
    """The folder of notes."""
    folder = tmp_path / "caps"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def driver(simulated_nvml, nvml_folder, caps, tmp_path, monkeypatch):
    """Two simulated H200, which draw 600 W where they may, and remember their limits."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(nvml_folder))
    monkeypatch.setenv("WATTIER_LIMITS", str(tmp_path / "limits"))
    simulated_nvml(SimulatedDevice(600), SimulatedDevice(600))
    return Driver(tmp_path / "limits")


@pytest.fixture(scope="session")
def nursery(nvml_folder):
    """The process that forks holders."""
    command = [sys.executable, str(Path(__file__).with_name("cap_holder.py"))]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(nvml_folder)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    yield process
    process.stdin.close()
    process.wait()
    process.stdout.close()


@pytest.fixture
def start(nursery, driver, tmp_path):
    """Return a function that starts a holder; all are killed at the end."""
    started = []

    def start_(uuid=GPU, ratio=0.5, wait_seconds=10.0, **request):
        started.append(
            Holder(nursery, tmp_path, len(started), uuid=uuid, ratio=ratio, wait_seconds=wait_seconds, **request)
        )
        return started[-1]

    yield start_
    for holder in started:
        try:
            holder.kill(group=True)
        except ProcessLookupError:
            continue
