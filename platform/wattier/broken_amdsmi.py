"""Ray beside an amdsmi that is installed, as the extra `amd` does, on a machine without AMD's library.

Ray 2.60 imports amdsmi whenever it is imported itself, and expects ImportError alone; the binding raises KeyError.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wattier_telemetry.source import SourceUnavailable
from wattier_telemetry.sources.amd_binding import import_binding

STAND_IN = 'raise ImportError("amdsmi is installed, but finds no libamd_smi.so that it can use")\n'


@contextmanager
def hidden(folder: Path) -> Iterator[None]:
    """Hide a binding that cannot be imported from this process and those it starts, for the length of the block.

    Args:
        folder: Will be made, to hold what is found in the binding's stead.
    """
    if not _is_broken():
        yield
        return
    folder.mkdir(parents=True)
    (folder / "amdsmi.py").write_text(STAND_IN)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), before)))
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _is_broken() -> bool:
    if "amdsmi" in sys.modules or importlib.util.find_spec("amdsmi") is None:
        return False
    try:
        import_binding()
    except SourceUnavailable:
        return True
    return False
