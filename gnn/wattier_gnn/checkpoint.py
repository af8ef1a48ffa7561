"""Training state on disk: written whole or not at all, read without running code from the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from wattier_gnn.structure import DataError


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write to a temporary file, flush it to the disk, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Tensors, numbers and strings only: a pickle that wants anything else is refused.

    Raises:
        DataError: the file is truncated, is no checkpoint, or holds objects.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises RuntimeError, EOFError, UnpicklingError, OSError ... by content
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a readable checkpoint ({reason}). Remove the file to start over.") from error
    if not isinstance(state, dict):
        raise DataError(f"{path}: holds a {type(state).__name__}, but must hold a dict of tensors. Remove the file.")
    return state
