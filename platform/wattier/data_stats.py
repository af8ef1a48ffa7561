"""What a store holds, as numbers: `wattier data stats` prints them, and `data_plots` draws them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wattier.config import load_config
from wattier.errors import UserError
from wattier.rundir import RunDir
from wattier_gnn.cleaning import CleaningReport
from wattier_gnn.ingest import read_cleaning
from wattier_gnn.stats import SourceStats, Spread, Stats
from wattier_gnn.store import Store

CHUNK_STRUCTURES = 4096


class StatsInfo(NamedTuple):
    """A store in figures.

    Attributes:
        folder: where it is.
        cutoff_angstrom: of its edges.
        sources: figures of what was kept.
        cleaning: what was read and removed.
    """

    folder: Path
    cutoff_angstrom: float
    sources: list[SourceStats]
    cleaning: CleaningReport


def find_store(target: Path) -> Path:
    """The store of a run directory or of a config, the shared one where a run has not begun; or the folder itself.

    Raises:
        UserError: there is nothing, or the run has not come so far.
    """
    if target.is_dir() and not (target / "config.yaml").is_file():
        return target
    config = load_config(target / "config.yaml" if target.is_dir() else target)
    run = RunDir(target if target.is_dir() else Path(config.run_dir).expanduser())
    if not run.store_manifest_path.exists() and config.data.store is not None:
        return Path(config.data.store).expanduser()
    if not run.store_path.exists():
        raise UserError(
            f"{target}: has no store yet ({run.store_path} does not exist), but must have one to look at. "
            f"Make it with: wattier run {target}"
        )
    return run.store_path


def stats_info(folder: Path) -> StatsInfo:
    """The figures of a store, in one pass over it.

    Raises:
        DataError: the folder is no store.
    """
    store = Store(folder)
    stats = Stats(store.sources)
    for start in range(0, len(store), CHUNK_STRUCTURES):
        indices = np.arange(start, min(start + CHUNK_STRUCTURES, len(store)))
        stats.add({**store.gather(indices, edges=False), "references": store.references})
    return StatsInfo(folder, float(store.meta["cutoff_angstrom"]), stats.of_sources(), read_cleaning(store))


def stats_dict(info: StatsInfo) -> dict[str, Any]:
    """Plain values, fit for JSON; what is not known is null. Units are in the names."""
    return {
        "store": str(info.folder),
        "cutoff_angstrom": info.cutoff_angstrom,
        "sources": {source.source: _source_dict(source, info.cleaning) for source in info.sources},
    }


def removed_from(cleaning: CleaningReport, source: str) -> dict[str, int]:
    """Reason -> structures removed."""
    return dict(cleaning.removed.get(source, {}))


def _source_dict(source: SourceStats, cleaning: CleaningReport) -> dict[str, Any]:
    return {
        "structures": source.structures,
        "read": cleaning.read[source.source],
        "removed": removed_from(cleaning, source.source),
        "unreadable_files": cleaning.bad_shards.get(source.source, []),
        "atoms": source.atoms,
        "elements": {str(z): n for z, n in source.elements.items()},
        "atoms_per_structure": _spread_dict(source.atoms_per_structure),
        "edges_per_structure": _spread_dict(source.edges_per_structure),
        "aligned_energy_ev_per_atom": _spread_dict(source.energy_ev_per_atom),
        "force_norm_ev_per_angstrom": _spread_dict(source.force_ev_per_angstrom),
        "force_norm_quantiles_ev_per_angstrom": {
            str(share): _known(norm) for share, norm in source.force_quantiles_ev_per_angstrom.items()
        },
    }


def _spread_dict(spread: Spread | None) -> dict[str, float | None] | None:
    return None if spread is None else {name: _known(value) for name, value in spread._asdict().items()}


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
