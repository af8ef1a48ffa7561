"""The most memory that one trial held: on its GPU where it runs on one, else of its process."""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # man 5 proc: sets the peak resident size to what is resident now


def reset_peak_memory(device: torch.device) -> None:
    """Begin to look for the peak anew; where the system does not let us, the peak is the process's own."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what an earlier trial of this process took, and torch kept
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return


def peak_memory_bytes(device: torch.device) -> int | None:
    """The peak since `reset_peak_memory`, B; None = this system does not tell.

    On a GPU: what torch took of it. On a CPU: the resident process, libraries included (about 0.5 GB).
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return _status_bytes("VmHWM")


def held_memory_bytes(*, on_gpu: bool) -> int | None:
    """What this process holds now, B, of the kind that `peak_memory_bytes` tells the most of; None = nobody tells."""
    if not on_gpu:
        return _status_bytes("VmRSS")
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    return sum(int(torch.cuda.memory_reserved(index)) for index in range(torch.cuda.device_count()))


def _status_bytes(name: str) -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
        return 1024 * int(lines[name].split()[0])
    except (OSError, KeyError, ValueError):
        return None
