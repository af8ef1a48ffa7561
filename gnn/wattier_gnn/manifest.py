"""What a store says of itself: where its structures come from, what was removed, how its energies are aligned."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wattier_gnn.cleaning import CleaningReport
from wattier_gnn.columns import read_rows
from wattier_gnn.datasets import READERS
from wattier_gnn.reference import MAX_ATOMIC_NUMBER, StreamedReference, composition
from wattier_gnn.splits import SPLIT_NAMES, TRAIN
from wattier_gnn.structure import DataError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
CHUNK_STRUCTURES = 8192
SMALLEST_SCALE_EV = 1e-3
GROUPS_NAME = re.compile(r"groups-[0-9]+\.safetensors")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        DataError: there is none, or it is damaged, of another version, or names what it must not.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format_version"]
    except FileNotFoundError as error:
        if (folder / "meta.json").exists():
            raise _wrong_version(folder, 1) from error
        raise DataError(
            f"{folder}: not a readable store (it has no {MANIFEST}: there is none, or it is not finished). "
            "Run the command that makes it again."
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{folder}: not a readable store ({MANIFEST}: {error!r}). Remove the folder and prepare the data again."
        ) from error
    if found != FORMAT_VERSION:
        raise _wrong_version(folder, found)
    _refuse_odd_names(folder, manifest)
    return dict(manifest)


def describe(  # noqa: PLR0913  (most are keywords)
    folder: Path,
    rows: Mapping[str, int],
    *,
    sources: Sequence[str],
    settings: Mapping[str, Any],
    groups: str,
    files: Sequence[Mapping[str, Any]],
    report: CleaningReport,
) -> dict[str, Any]:
    """The manifest of columns that are all there: references are fitted and counts taken here, in one pass."""
    sums = _sums(folder, rows["energy"], len(sources))
    by_source = {}
    for name, total in zip(sources, sums, strict=True):
        reader = READERS.get(name)
        present = np.flatnonzero(total.atoms_by_element)
        by_source[name] = {
            "labels": reader.energy if reader else None,
            "method": getattr(reader, "method", None),
            "licence": getattr(reader, "licence", None),
            "citation": getattr(reader, "citation", None),
            "files": [{k: v for k, v in file.items() if k != "source"} for file in files if file["source"] == name],
            "structures": dict(zip(SPLIT_NAMES, total.structures.tolist(), strict=True)),
            "atoms": int(total.atoms_by_element.sum()),
            "edges": total.edges,
            "elements": present.tolist(),
            "reference_energies_ev": {str(z): float(total.coefficients[z]) for z in present},
            "residual_std_ev": total.residual_std_ev[0],
            "residual_std_ev_per_atom": total.residual_std_ev[1],
            "force_rms_ev_per_angstrom": total.force_rms,
        }
    return {
        "format_version": FORMAT_VERSION,
        "wattier_version": _wattier_version(),
        "sources": list(sources),
        "cutoff_angstrom": settings["cutoff_angstrom"],
        "energy_scale_ev": [max(s.force_rms, SMALLEST_SCALE_EV) if s.force_rms is not None else 1.0 for s in sums],
        "mean_neighbors": sum(s.edges for s in sums) / max(rows["atoms"], 1),
        "settings": dict(settings),
        "cleaning": report.to_dict(),
        "by_source": by_source,
        "references_ev": [s.coefficients.tolist() for s in sums],
        "groups": groups,
        "rows": dict(rows),
    }


class _Sums(NamedTuple):
    structures: Any  # int64 [3], by split
    atoms_by_element: Any  # int64 [119]
    edges: int
    coefficients: Any  # float64 [119] eV
    residual_std_ev: tuple[float | None, float | None]  # of training structures; and by atoms
    force_rms: float | None  # of the components on training atoms, eV/Angstrom; None where none is known


def _sums(folder: Path, n_structures: int, n_sources: int) -> list[_Sums]:
    """One pass over all structures, a run at a time."""
    fits = [StreamedReference() for _ in range(n_sources)]
    structures = np.zeros((n_sources, len(SPLIT_NAMES)), dtype=np.int64)
    elements = np.zeros((n_sources, MAX_ATOMIC_NUMBER + 1), dtype=np.int64)
    edges, forces = np.zeros(n_sources, dtype=np.int64), np.zeros((n_sources, 2))
    for first in range(0, n_structures, CHUNK_STRUCTURES):
        stop = min(first + CHUNK_STRUCTURES, n_structures)
        source_index, split, n_atoms, n_edges, energy = (
            read_rows(folder, name, first, stop) for name in ("source_index", "split", "n_atoms", "n_edges", "energy")
        )
        start, *_, end = read_rows(folder, "atom_offset", first, stop + 1).tolist()
        atoms = read_rows(folder, "atoms", start, end)
        counts = composition(atoms["numbers"], n_atoms)
        square = np.einsum("ax,ax->a", atoms["forces"], atoms["forces"])
        for source in np.unique(source_index):
            chosen = source_index == source
            structures[source] += np.bincount(split[chosen], minlength=len(SPLIT_NAMES))
            elements[source] += counts[chosen].sum(axis=0).astype(np.int64)
            edges[source] += n_edges[chosen].sum()
            training = chosen & (split == TRAIN)
            fits[source].add(counts[training], energy[training])
            known = np.repeat(training, n_atoms) & atoms["force_mask"]
            forces[source] += square[known].sum(), 3 * known.sum()
    found = []
    for s, fit in enumerate(fits):
        coefficients = fit.coefficients()
        spread = fit.residual_std_ev(coefficients)
        force_rms = float(np.sqrt(forces[s, 0] / forces[s, 1])) if forces[s, 1] else None
        found.append(_Sums(structures[s], elements[s], int(edges[s]), coefficients, spread, force_rms))
    return found


def _refuse_odd_names(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Manifests come from others too: what they name becomes paths, sizes, and text on a screen."""
    groups, sources, rows = (manifest.get(name) for name in ("groups", "sources", "rows"))
    if not isinstance(groups, str) or not GROUPS_NAME.fullmatch(groups):
        odd = f"groups is {groups!r}"
    elif not isinstance(sources, list) or not all(isinstance(s, str) and _is_name(s) for s in sources):
        odd = f"sources is {sources!r}"
    elif not isinstance(rows, dict) or not all(type(n) is int and n >= 0 for n in rows.values()):
        odd = f"rows is {rows!r}"
    elif not isinstance(by_source := manifest.get("by_source"), dict) or set(by_source) != set(sources):
        odd = "by_source has other names than sources"
    else:
        return
    raise DataError(f"{folder}: not a readable store ({MANIFEST}: {odd[:200]}). Do not use it, or make it again.")


def _is_name(source: str) -> bool:
    return source in READERS or source.isidentifier()


def _wattier_version() -> str | None:
    try:
        return version("wattier")
    except PackageNotFoundError:
        return None


def _wrong_version(folder: Path, found: object) -> DataError:
    return DataError(
        f"{folder}: store version is {found}, but must be {FORMAT_VERSION}. "
        "Remove the folder and prepare the data again."
    )
