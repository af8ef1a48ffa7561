"""The installed sample: five small sources in their released layouts, with labels by real physics and planted defects.

``data/SOURCE.md`` says how each was made. It shows a workflow end to end; it is no benchmark and trains no real model.
"""

from __future__ import annotations

from pathlib import Path

from wattier_gnn.structure import DataError

SAMPLE_SOURCES: tuple[str, ...] = ("ani1x", "qm7x", "oc20", "oc22", "mptrj")
SAMPLE_FOLDER = Path(__file__).parent / "data"


def sample_path(source: str) -> Path:
    """The folder of one source, to be read by ``datasets.READERS[source]``.

    Raises:
        DataError: there is no such source, or the installation lacks the files.
    """
    if source not in SAMPLE_SOURCES:
        raise DataError(f"sample: has no source {source!r}, but must be asked for one of {', '.join(SAMPLE_SOURCES)}")
    folder = SAMPLE_FOLDER / source
    if not folder.is_dir():
        raise DataError(f"{folder}: does not exist, but must hold the sample. Install the package again")
    return folder
