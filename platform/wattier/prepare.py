"""The data step of a run: its own store, made from released files, or one that several runs share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wattier.config import DataSection, RunConfig, SourceName
from wattier.errors import UserError
from wattier.metering import metered
from wattier.rundir import RunDir, write_text
from wattier_gnn.arrays import COLUMNS
from wattier_gnn.columns import column_path
from wattier_gnn.files import sha256_of
from wattier_gnn.ingest import ingest
from wattier_gnn.manifest import read_manifest
from wattier_gnn.sample import sample_path
from wattier_gnn.store import Store

if TYPE_CHECKING:
    from wattier.run import Listener


def prepare_data(run: RunDir, config: RunConfig, listener: Listener) -> Store:
    """Read, clean, split and align the sources, unless that is done; or take the store that the config names."""
    if config.data.store is not None:
        return _shared(run, config.data, Path(config.data.store).expanduser().absolute())
    if run.store_manifest_path.exists():
        return Store(run.store_path)
    listener.phase("data")
    with metered(run.phase_folder("data"), "driver", config.telemetry, on_gpu=False):
        return ingest(
            source_paths(config.data.sources),
            run.store_path,
            **recipe_of(config.data, config.seed),
            say=listener.say,
            progress=listener.progress,
        )


def source_paths(sources: Mapping[SourceName, str]) -> dict[str, Path]:
    """Where each source lies; `sample` stands for the corpus that ships with Wattier."""
    return {name: sample_path(name) if path == "sample" else Path(path).expanduser() for name, path in sources.items()}


def recipe_of(data: DataSection, seed: int) -> dict[str, Any]:
    """What a store is made by, as `ingest` takes it."""
    return {
        "cutoff_angstrom": data.cutoff_angstrom,
        "max_force_ev_per_angstrom": data.max_force_ev_per_angstrom,
        "force_norm": data.force_norm,
        "neighbors": data.neighbors,
        "on_bad": data.on_bad,
        "split": data.split.model_dump(),
        "seed": seed,
    }


def _refuse_another(store: Store, data: DataSection) -> None:
    """A shared store must hold what the config says, and enough of it to train and test on."""
    there = {**store.meta["settings"], "sources": sorted(store.sources)}
    recipe = recipe_of(data, 0)
    due = {name: recipe[name] for name in ("cutoff_angstrom", "max_force_ev_per_angstrom", "force_norm", "split")}
    if data.sources:
        due["sources"] = sorted(data.sources)
    for name, value in due.items():
        if there.get(name) != value:
            raise UserError(
                f"data.{name}: is {value}, but the store {store.folder} was made with {there.get(name)}, and they must "
                "agree. Change the config, or make another store with `wattier data ingest`."
            )
    for name, about in store.meta["by_source"].items():
        for part, n_structures in about["structures"].items():
            if n_structures == 0:
                raise UserError(
                    f"{store.folder}: the {part} split of {name} is empty, but a run needs all three. Make a store "
                    "with more groups of it, or with a larger share in data.split."
                )


def _shared(run: RunDir, data: DataSection, path: Path) -> Store:
    """The shared store as it was when the run began: columns only grow, and the run's own manifest says how far."""
    seen = run.store_path.with_name("store.sha256")
    if run.store_manifest_path.exists():
        groups = run.store_path / read_manifest(run.store_path)["groups"]
        if not groups.exists() or sha256_of(groups) != seen.read_text():
            raise UserError(
                f"{path}: is not the store that {run.path} began with, but a run must see one store from beginning to "
                "end. Set another run_dir, or bring that store back."
            )
    else:
        store = Store(path)
        _refuse_another(store, data)
        run.store_path.mkdir(parents=True, exist_ok=True)
        for name in (*(column_path(path, column).name for column in COLUMNS), store.meta["groups"]):
            link = run.store_path / name
            link.unlink(missing_ok=True)
            link.symlink_to(path / name)
        write_text(seen, sha256_of(path / store.meta["groups"]))
        manifest = {name: value for name, value in store.meta.items() if name != "release"}  # its files are elsewhere
        write_text(run.store_manifest_path, json.dumps(manifest, indent=1, allow_nan=False) + "\n")
    return Store(run.store_path)
