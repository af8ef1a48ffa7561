"""How AMD's Python binding is found and asked: ROCm's own first, with nothing printed and nothing half-loaded."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from wattier_telemetry.source import SourceUnavailable

# What the library answers where it has no figure, by the width of the figure; the binding turns only some into 'N/A'.
NO_UINT16, NO_UINT32, NO_UINT64 = 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


def import_binding() -> ModuleType:
    """Import amdsmi: the one beside the library, which always fits it, or else the installed one.

    Without the library the import prints to stdout and raises KeyError; with an older one, AttributeError. What it
    leaves behind then is removed, so that a later try, perhaps with another ROCM_PATH, begins anew.

    Raises:
        SourceUnavailable: If there is no binding, or it finds no library that fits it.
    """
    if (loaded := sys.modules.get("amdsmi")) is not None:
        return loaded
    # The binding itself looks for the library in this order.
    root = os.environ.get("ROCM_HOME") or os.environ.get("ROCM_PATH") or "/opt/rocm"
    folder = str(Path(root) / "share" / "amd_smi")
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module("amdsmi")
    except Exception as error:
        for name in [name for name in sys.modules if name.startswith("amdsmi.")]:
            del sys.modules[name]
        raise SourceUnavailable(_advice(error, root)) from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _advice(error: Exception, root: str) -> str:
    if isinstance(error, ModuleNotFoundError):
        return "there is no amdsmi binding; install ROCm 6.1 or newer and point ROCM_PATH at it, or the extra 'amd'"
    if isinstance(error, AttributeError):
        return (
            f"the amdsmi binding is newer than the libamd_smi.so it finds ({one_line(error)}); "
            f"point ROCM_PATH at the ROCm whose share/amd_smi holds its own binding (now: {root})"
        )
    return (
        f"the amdsmi binding finds no libamd_smi.so that it can use ({one_line(error)}); "
        f"install ROCm 6.1 or newer, or point ROCM_PATH at it (now: {root})"
    )


def one_line(error: Exception) -> str:
    """Return an error's kind and text on one line; AMD's own texts have several."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def ask(function: Callable[..., Any] | None, *arguments: Any) -> Any:
    """Call AMD SMI; None where it refuses or is too old. Every release raises exceptions of its own."""
    if function is None:
        return None
    try:
        return function(*arguments)
    except Exception:  # noqa: BLE001
        return None


def number(value: Any, *, below: float = NO_UINT64) -> float | None:
    """Return a figure that is a finite number from 0 up to, but not including, what means "no figure"."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value) if 0 <= value < below else None


def word(value: Any) -> str | None:
    """Return a text that says something."""
    text = value.strip() if isinstance(value, str) else ""
    return None if text in ("", "N/A") else text


def entries(answer: Any) -> dict[str, Any]:
    """Return an answer that should be a dictionary, empty where it is not one."""
    return answer if isinstance(answer, dict) else {}


def raw_metrics(smi: ModuleType, handle: Any) -> Any:
    """Return the driver's table of metrics as the C structure that fits the binding, or None.

    The binding's own function makes a yes or no of the throttle bits, and builds a thousand Python values a call.
    """
    wrapper = getattr(getattr(smi, "amdsmi_interface", None), "amdsmi_wrapper", None)
    kind, function = (
        getattr(wrapper, "amdsmi_gpu_metrics_t", None),
        getattr(wrapper, "amdsmi_get_gpu_metrics_info", None),
    )
    if kind is None or function is None:
        return None
    metrics = kind()
    return metrics if ask(function, handle, ctypes.byref(metrics)) == 0 else None
