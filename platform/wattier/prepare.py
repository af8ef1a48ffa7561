"""The data step of a run: its own store, made from released files, or one that several runs share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wattier.config import DataSection, RunConfig, SourceName
from wattier.errors import UserError
from wattier.metering import metered
from wattier.rundir import RunDir, write_text
from wattier_gnn.files import sha256_of
from wattier_gnn.ingest import ingest
from wattier_gnn.manifest import MANIFEST
from wattier_gnn.sample import sample_path
from wattier_gnn.store import Store

if TYPE_CHECKING:
    from wattier.run import Listener


def prepare_data(run: RunDir, config: RunConfig, listener: Listener) -> Store:
    """Read, clean, split and align the sources, unless that is done; or take the store that the config names."""
    if config.data.store is not None:
        path = Path(config.data.store).expanduser().absolute()
        store = Store(path)
        _refuse_another(store, config.data)
        _link(run, path)
        return store
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


def _link(run: RunDir, path: Path) -> None:
    """Let the run's own store be the shared one, as long as that is the one the run began with."""
    seen, manifest = run.store_path.with_name("store.sha256"), sha256_of(path / MANIFEST)
    if seen.exists() and seen.read_text() != manifest:
        raise UserError(
            f"{path}: was added to since {run.path} began, but a run must see one store from beginning to end. "
            "Set another run_dir, or give the store that it was."
        )
    link = run.store_path
    if link.is_symlink() and link.readlink() != path:
        link.unlink()
    if not link.is_symlink():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path, target_is_directory=True)
    write_text(seen, manifest)
