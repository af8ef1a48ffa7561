"""From released files to one store: read, clean, split by group, align, find neighbours.

Files are converted to parts, by several processes, then the parts are joined. Memory is that of a part a process; every
step may be killed, and the same call goes on and ends with the same bytes. A store may be added to: more files, more
sources; what is in it stays where it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wattier_gnn.cleaning import CleaningReport, ForceNorm
from wattier_gnn.datasets import READERS
from wattier_gnn.datasets.shard import COMPRESSIONS
from wattier_gnn.files import locked, make_folder, write_text
from wattier_gnn.manifest import MANIFEST, describe
from wattier_gnn.merge import INPUTS, STATE, MergePlan, begin, merge
from wattier_gnn.parts import DONE, Neighbors, OnBad, Recipe, Shard
from wattier_gnn.pool import Progress, convert_all
from wattier_gnn.store import Store
from wattier_gnn.structure import DataError

STAGING = ".ingest"


def ingest(  # noqa: PLR0913  (the whole recipe of a store)
    paths: Mapping[str, Path],
    folder: Path,
    *,
    cutoff_angstrom: float,
    max_force_ev_per_angstrom: float,
    on_bad: OnBad,
    split: Mapping[str, float],
    seed: int,
    say: Callable[[str], None],
    force_norm: ForceNorm = "per_atom",
    neighbors: Neighbors = "precomputed",
    workers: int | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    may_be_empty: bool = False,
) -> Store:
    """Bring every file of every source under `paths` into the store `folder`; files that are in it are left alone.

    Args:
        paths: source, a key of `datasets.READERS`, -> a file or a folder of files.
        folder: of the store; made, gone on with, or added to.
        cutoff_angstrom: of neighbours.
        max_force_ev_per_angstrom: structures with a larger force norm are removed.
        on_bad: refuse stops at the first record or file that cannot be read, skip counts it and goes on.
        split: shares of train, val and test.
        seed: of the split.
        say: hears lines of text.
        force_norm: see `cleaning.removal_reason`.
        neighbors: whether edges are kept, or found again in each batch.
        workers: processes; None = as many as there are cores, where there is work for them.
        progress: hears how far the reading is.
        may_be_empty: a source may lack a split; otherwise that is refused.

    Raises:
        DataError: a path holds nothing, a source has nothing left after cleaning or no group for a split, a record or
            file is unreadable and `on_bad` is refuse, or the store was made with other settings.
    """
    recipe = Recipe(cutoff_angstrom, max_force_ev_per_angstrom, force_norm, neighbors)
    settings = {**asdict(recipe), "split": dict(split), "seed": seed}
    found = [Shard.of(source, path) for source, where in paths.items() for path in READERS[source].shards(where)]
    make_folder(folder)
    with locked(folder):
        before = _what_is_there(folder, settings)
        shards = _new_ones(found, _files_of(before), folder)
        _refuse_two_layouts(found, _files_of(before), folder)
        staging = folder / STAGING
        if shards:
            _clear_way(staging, recipe)
            begin(staging, _inputs(before, shards, paths, settings))
            convert_all(shards, recipe=recipe, on_bad=on_bad, staging=staging, workers=workers, progress=progress)
            _join(folder, paths, before, shards, settings, say, may_be_empty)
        else:
            say(f"store: nothing to do, all {len(found)} files are in {folder}")
        _clean_up(staging, found, say)
    return Store(folder)


def read_cleaning(store: Store) -> CleaningReport:
    """What was removed on the way into a store."""
    return CleaningReport.from_dict(store.meta["cleaning"])


def _what_is_there(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of the store that is to be added to; {} where one is to be made."""
    inside = {path.name for path in folder.iterdir()} - {".lock"}
    if not inside or (STAGING in inside and MANIFEST not in inside):
        return {}
    manifest = Store(folder).meta
    for path in folder.glob("*.bin"):
        if path.is_symlink():
            raise DataError(
                f"{folder}: {path.name} is a link to {path.readlink()}, but a store that is added to must hold its own "
                "files. Add to the store that it links to."
            )
    for name, value in settings.items():
        if (there := manifest["settings"].get(name)) != value:
            raise DataError(
                f"{folder}: was made with {name} {there}, but must be added to with the same, "
                f"and {value} was given. Change the setting, or name another folder."
            )
    return manifest


def _files_of(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every file that a store was made from, with its source."""
    by_source = manifest.get("by_source", {})
    return [{"source": name, **file} for name, about in by_source.items() for file in about["files"]]


def _new_ones(found: Sequence[Shard], files: Sequence[Mapping[str, Any]], folder: Path) -> list[Shard]:
    """The files of which nothing is in a store yet; raises DataError where another one has changed since."""
    known = {(file["source"], file.get("path")): file for file in files}
    new = []
    for shard in found:
        file = known.get((shard.source, str(shard.path)))
        if file is not None and shard.is_still(file):
            continue
        if file is not None and file["read"]:
            raise DataError(
                f"{shard.path}: has changed since it was brought into {folder}, but what is in a store stays there. "
                "Make a new store, or put the file back as it was."
            )
        new.append(shard)
    return new


def _refuse_two_layouts(found: Sequence[Shard], files: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Raises DataError where a source came in another layout before: the same frames have other groups in it."""
    paths = [*((s.source, s.path) for s in found), *((file["source"], Path(file["name"])) for file in files)]
    for source in {source for source, _ in paths if source in READERS and READERS[source].one_layout}:
        names = [path.with_suffix("") if path.suffix in COMPRESSIONS else path for of, path in paths if of == source]
        if len(layouts := sorted({name.suffix for name in names})) > 1:
            raise DataError(
                f"{folder}: would hold {source} of {' and '.join(f'*{layout}' for layout in layouts)}, but must hold "
                "one layout of it: the same frames would be read twice. Give files of the layout that is there, or "
                "name another folder."
            )


def _clear_way(staging: Path, recipe: Recipe) -> None:
    """Take away what an interrupted ingestion made by another recipe."""
    due, path = json.dumps(asdict(recipe)), staging / "recipe.json"
    if staging.exists() and (not path.exists() or path.read_text() != due):
        path.unlink(missing_ok=True)  # first: it must not vouch for what is left of a removal that is killed
        shutil.rmtree(staging)
    staging.mkdir(exist_ok=True)
    write_text(path, due)


def _inputs(
    before: Mapping[str, Any], shards: Sequence[Shard], paths: Mapping[str, Path], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """All that decides what a merge makes of the parts of some files."""
    return {
        "rows": before.get("rows"),
        "files": [shard.id for shard in shards],
        "sources": list(paths),
        "settings": dict(settings),
    }


def _clean_up(staging: Path, found: Sequence[Shard], say: Callable[[str], None]) -> None:
    """Remove what the store no longer needs; what an interrupted ingestion of other files left stays for it."""
    if staging.exists():
        for shard in found:
            shutil.rmtree(staging / shard.id, ignore_errors=True)
        for name in (STATE, INPUTS):  # in this order: see `begin`
            (staging / name).unlink(missing_ok=True)
        others = sum(path.is_dir() for path in staging.iterdir())
        if others:
            say(f"store: {others} more files were begun by an interrupted ingestion and wait in {staging}")
        else:
            shutil.rmtree(staging)


def _join(  # noqa: PLR0913, PLR0917
    folder: Path,
    paths: Mapping[str, Path],
    before: Mapping[str, Any],
    shards: Sequence[Shard],
    settings: Mapping[str, Any],
    say: Callable[[str], None],
    may_be_empty: bool,
) -> None:
    """Join the parts of all files to the store, and write its manifest, which makes them part of it."""
    report = CleaningReport.from_dict(before["cleaning"]) if before else CleaningReport()
    files, plan = _take_stock(folder / STAGING, shards, _without(shards, _files_of(before), report), report)
    sources = [*before.get("sources", ()), *(s for s in paths if s not in before.get("sources", ()))]
    for source in paths:
        if not report.kept[source]:
            raise DataError(
                f"{paths[source]}: holds no usable {source} structure ({report.read[source]} read), but must hold "
                "some. Give another path for this source, or remove it from data.sources."
            )
    index = {source: k for k, source in enumerate(sources)}
    for source in paths:
        say(_summary(source, report))
    rows, table, groups = merge(
        folder,
        folder / STAGING,
        MergePlan(
            [(shard.id, index[shard.source]) for shard in plan],
            before.get("rows", {}),
            before.get("groups", ""),
            settings["split"],
            settings["seed"],
            may_be_empty,
        ),
        sources,
    )
    if rows["energy"] != report.kept.total():
        raise DataError(
            f"{folder}: {rows['energy']} structures were joined, but must be the {report.kept.total()} that were kept. "
            f"Remove {folder / STAGING} and run the same command again."
        )
    manifest = describe(folder, rows, sources=sources, settings=settings, groups=groups, files=files, report=report)
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False) + "\n")
    for warning in table.warnings(sources):
        say(f"warning: {warning}")
    for source in paths:
        spread = manifest["by_source"][source]["residual_std_ev_per_atom"]
        say(f"{source}: aligned energies spread by {spread * 1000:.1f} meV/atom" if spread is not None else source)
    say(f"store: {rows['energy']} structures, {rows['atoms']} atoms, {_edges(manifest)} edges in {folder}")


def _without(shards: Sequence[Shard], files: Sequence[dict[str, Any]], report: CleaningReport) -> list[dict[str, Any]]:
    """Files of a store but for those that are taken again; `report` no longer says that they cannot be read."""
    again = {(shard.source, str(shard.path)) for shard in shards}
    left = []
    for file in files:
        source = file["source"]
        if (source, file.get("path")) not in again:
            left.append(file)
        elif source in report.bad_shards:
            places = tuple(str(DataError(f"{about['path']}:")) for about in (file, *file.get("beside", ())))
            report.bad_shards[source] = [m for m in report.bad_shards[source] if not m.startswith(places)]
    return left


def _take_stock(
    staging: Path, shards: Sequence[Shard], files: list[dict[str, Any]], report: CleaningReport
) -> tuple[list[dict[str, Any]], list[Shard]]:
    """All files for the manifest, and those to merge: a file that is there twice is taken once. Adds to `report`."""
    first = {_content(file): file for file in files if file["read"]}
    plan = []
    for shard in shards:
        record = json.loads((staging / shard.id / DONE).read_text())
        file = shard.about(record)
        twin = first.setdefault(_content(file), file)
        if twin is file:
            counts = CleaningReport.from_dict(record["report"])
            report.add(counts)
            file |= {"read": counts.read[shard.source], "kept": counts.kept[shard.source]}
            plan.append(shard)
        else:
            file |= {"read": 0, "kept": 0, "duplicate_of": twin["name"]}
        files.append(file)
    return files, plan


def _content(file: Mapping[str, Any]) -> tuple[str, ...]:
    """The same for files that give the same structures."""
    return (file["source"], file["sha256"], *(beside["sha256"] for beside in file.get("beside", ())))


def _edges(manifest: Mapping[str, Any]) -> int:
    return sum(about["edges"] for about in manifest["by_source"].values())


def _summary(source: str, report: CleaningReport) -> str:
    removed = ", ".join(f"{n} {reason}" for reason, n in report.removed.get(source, {}).items()) or "none"
    bad = len(report.bad_shards.get(source, ()))
    return f"{source}: {report.read[source]} read, {report.kept[source]} kept, removed: {removed}" + (
        f", {bad} unreadable file skipped" if bad == 1 else f", {bad} unreadable files skipped" if bad else ""
    )
