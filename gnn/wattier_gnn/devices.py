"""The device that a user names."""

from __future__ import annotations

import torch


def chosen_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is a GPU where there is one.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name if name.partition(":")[0] in ("cpu", "cuda") else "")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device is {name!r}, but must be auto, cpu, or a GPU that is there, as cuda or cuda:1"
        ) from error
    return device
