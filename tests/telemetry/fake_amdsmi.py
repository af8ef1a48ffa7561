"""A simulated `amdsmi` module: MI250X, two packages of two dies, 400 W and 420 W, zeros on the odd dies."""

import time
from types import SimpleNamespace

print("noise that the real binding prints at import")

WATTS = {0: 400.0, 2: 420.0}
HANDLES = [SimpleNamespace(die=die) for die in range(4)]
AmdSmiTemperatureType = SimpleNamespace(EDGE=0, HOTSPOT=1)
AmdSmiTemperatureMetric = SimpleNamespace(CURRENT=0)
AmdSmiClkType = SimpleNamespace(GFX=0, MEM=4)


class AmdSmiLibraryException(Exception):
    """What the real one raises when a call is not supported."""


def amdsmi_init():
    return None


def amdsmi_shut_down():
    return None


def amdsmi_get_processor_handles():
    return list(HANDLES)


def amdsmi_get_gpu_device_uuid(handle):
    return f"amd-uuid-{handle.die}"


def amdsmi_get_gpu_asic_info(handle):
    return {"market_name": "AMD Instinct MI250X"}


def amdsmi_get_power_info(handle):
    return {"current_socket_power": "N/A", "average_socket_power": WATTS.get(handle.die, 0)}


def amdsmi_get_energy_count(handle):
    ticks = int(time.monotonic() * WATTS.get(handle.die, 0) * 2**16)
    return {"energy_accumulator": ticks, "counter_resolution": 15.3, "timestamp": time.monotonic_ns()}


def amdsmi_get_gpu_activity(handle):
    return {"gfx_activity": 50 if handle.die % 2 else 100, "umc_activity": "N/A"}


def amdsmi_get_gpu_vram_usage(handle):
    return {"vram_total": 65520, "vram_used": 1000}


def amdsmi_get_temp_metric(handle, sensor, metric):
    if sensor == AmdSmiTemperatureType.EDGE:
        raise AmdSmiLibraryException(2)
    return 55 + handle.die


def amdsmi_get_clock_info(handle, kind):
    return {"clk": 1700 if kind == 0 else 1600}


def amdsmi_get_violation_status(handle):
    raise AmdSmiLibraryException(2)
