"""Simulated machines: an NVML library in C, an amdsmi module, a powercap tree, replayed traces."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MASKS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "WATTIER_POWER_SOURCE")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch, tmp_path):
    """Leave no mask and no registry of the real machine in sight."""
    for name in MASKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WATTIER_REGISTRY", str(tmp_path / "registry"))


@pytest.fixture(scope="session")
def fake_nvml_folder(tmp_path_factory):
    """Compile the simulated library once and return its folder, for LD_LIBRARY_PATH."""
    folder = tmp_path_factory.mktemp("nvml")
    library = folder / "libnvidia-ml.so.1"
    command = ["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-Wl,-soname,libnvidia-ml.so.1"]
    subprocess.run([*command, "-o", str(library), str(HERE / "fake_nvml.c")], check=True)
    return folder


@pytest.fixture
def fake_nvml(fake_nvml_folder, monkeypatch):
    """Let the real pynvml talk to the simulated library, in this process and without touching the loader path."""
    import ctypes

    import pynvml

    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(fake_nvml_folder / "libnvidia-ml.so.1")))
    pynvml._nvmlGetFunctionPointer_cache.clear()
    yield
    pynvml._nvmlGetFunctionPointer_cache.clear()


@pytest.fixture
def no_nvml(monkeypatch):
    """Make a machine without an NVIDIA driver, also where there is one."""
    import pynvml

    def missing(*_):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)


@pytest.fixture
def fake_amd(monkeypatch):
    """Put the simulated amdsmi module where `import amdsmi` finds it."""
    spec = importlib.util.spec_from_file_location("amdsmi", HERE / "fake_amdsmi.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "amdsmi", module)
    return module


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
