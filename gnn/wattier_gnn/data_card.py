"""The README of a data release: what it holds, where that is from, how it was cleaned and aligned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wattier_gnn.splits import SPLIT_NAMES

NORMS = {"per_atom": "the force on any atom", "frobenius": "the norm of the forces over all atoms together"}
USES = {
    "store": """Open it with Wattier, whose readers map it into memory:

```python
from pathlib import Path
from wattier_gnn.store import Store

store = Store(Path("{name}"))
batch = store.batch(store.indices(0)[:32])  # 0 train, 1 val, 2 test
```""",
    "extxyz": """Read it with ASE or any tool that knows extended XYZ. Of each frame, `energy` is the total energy and
`aligned_energy` the energy less its composition reference [eV]; `source`, `group`, `split` and `key` say where it is
from:

```python
from ase.io import iread

for atoms in iread("{name}/frames-00000.extxyz", index=":"):
    print(atoms.info["source"], atoms.info["aligned_energy"], atoms.get_forces().shape)
```""",
}


def data_card(manifest: Mapping[str, Any], name: str, form: str) -> str:
    """The card in Markdown, with the head that Hugging Face reads."""
    by_source, settings = manifest["by_source"], manifest["settings"]
    total = sum(sum(about["structures"].values()) for about in by_source.values())
    parts = [
        f"---\nlicense: {_licence(by_source)}\ntags: [atomistic, machine-learning-potentials]\n---\n\n# {name}\n",
        f"{total} atomic structures with energies [eV] and forces [eV/Å] from {len(by_source)} sources, cleaned, split "
        "by group and aligned by Wattier "
        f"{manifest['wattier_version']}. `manifest.json` holds every figure and the sha256 of every file; "
        "`wattier data verify` checks them.\n",
        "## Sources\n",
        _table(
            ["source", *SPLIT_NAMES, "atoms", "elements", "energy and forces", "licence"],
            [
                [source, *(about["structures"][split] for split in SPLIT_NAMES), about["atoms"], len(about["elements"]),
                 about["labels"], about["licence"]]
                for source, about in by_source.items()
            ],
        ),
        *(f"{source}: {about['citation']}\n" for source, about in by_source.items() if about["citation"]),
        "## What was removed\n",
        _removed(manifest["cleaning"]),
        _rule(settings),
        "## Alignment\n",
        "Each source has its own energy zero. From every energy a composition reference is subtracted, a sum of one "
        "energy for each atom by its element, fitted by least squares in float64 to the training structures of the "
        "source (`reference_energies_ev` in the manifest). What is left of training energies spreads by:\n",
        _table(
            ["source", "eV", "eV/atom", "root mean square force, eV/Å"],
            [
                [source, *(_short(about[k]) for k in
                           ("residual_std_ev", "residual_std_ev_per_atom", "force_rms_ev_per_angstrom"))]
                for source, about in by_source.items()
            ],
        ),
        "## Splits\n",
        "Groups (molecules, materials, systems, formulas) are never torn apart. A group that holds an element not yet "
        "in training went to training.\n",
        "## Use\n",
        USES[form].format(name=name),
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _licence(by_source: Mapping[str, Any]) -> str:
    """One licence where all sources have it; the table says more."""
    found = {about["licence"] for about in by_source.values()}
    one = found.pop() if len(found) == 1 else None
    return one.lower() if one else "other"


def _removed(cleaning: Mapping[str, Any]) -> str:
    reasons = list(dict.fromkeys(reason for counts in cleaning["removed"].values() for reason in counts))
    rows = [
        [source, read, cleaning["kept"].get(source, 0),
         *(cleaning["removed"].get(source, {}).get(reason, 0) for reason in reasons),
         len(cleaning["bad_shards"].get(source, ()))]
        for source, read in cleaning["read"].items()
    ]  # fmt: skip
    return _table(["source", "read", "kept", *reasons, "files not read to their end"], rows)


def _rule(settings: Mapping[str, Any]) -> str:
    if "max_force_ev_per_angstrom" not in settings:
        return ""
    return (
        f"A force is above the threshold where {NORMS[settings['force_norm']]} is "
        f"{settings['max_force_ev_per_angstrom']:g} eV/Å or more.\n"
    )


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = [["unknown" if cell is None else str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)
