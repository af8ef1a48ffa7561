"""What a release says of itself to people: the model card in the Hugging Face format, an example, how to cite it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from wattier.citation import citation_file
from wattier.records import PhaseEnergy
from wattier.units import JOULES_PER_KWH, UNKNOWN, format_joules, format_loss, format_ratio
from wattier_gnn.datasets import SYMBOLS
from wattier_gnn.ensemble import Ensemble
from wattier_gnn.model import count_parameters

FAMILY_NAMES = {"egnn": "EGNN", "schnet": "SchNet", "pna": "PNA"}
TAGS = ("atomistic", "graph-neural-network", "interatomic-potential", "ensemble", "energy-measured")
# What the head of a card says of each source: metric of the manifest, its type and name.
INDEXED = (
    ("energy_mae_ev", "mae", "energy MAE (eV)"),
    ("energy_mae_ev_per_atom", "mae", "energy MAE (eV/atom)"),
    ("energy_rmse_ev", "rmse", "energy RMSE (eV)"),
    ("force_mae_ev_per_angstrom", "mae", "force MAE (eV/Å)"),
    ("force_rmse_ev_per_angstrom", "rmse", "force RMSE (eV/Å)"),
)
SPLIT_UNKNOWN = {"train": None, "val": None, "test": None}


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from; what is None or empty is unknown and said to be.

    name: of the release. member_names: one a member of `ensemble`.
    member_facts: one dict a member with val_loss and energy_joules.
    evaluation: `evaluation.json`, or those of its keys that are known: sources, calibration, intervals.
    phases, total: the bill.
    data: by source: licence, citation, method, structures {train, val, test}, elements [Z], is_sample.
    license: SPDX identifier of the weights.
    parent: name of the release that this one was made from.
    groups_apart: no group of the held-out structures was trained on.
    """

    name: str
    wattier_version: str
    ensemble: Ensemble
    member_names: Sequence[str]
    member_facts: Sequence[Mapping[str, Any]] = ()
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    phases: Sequence[PhaseEnergy] = ()
    total: PhaseEnergy | None = None
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    license: str | None = None
    parent: str | None = None
    groups_apart: bool = True


class Example(NamedTuple):
    """A structure in ASE's words that a source can predict."""

    imports: str
    atoms: str


EXAMPLES = (
    (frozenset({1, 6, 8}), Example("from ase.build import molecule", 'molecule("CH3OH")')),
    (frozenset({1, 8}), Example("from ase.build import molecule", 'molecule("H2O")')),
    (frozenset({1, 6}), Example("from ase.build import molecule", 'molecule("CH4")')),
    (frozenset({11, 17}), Example("from ase.build import bulk", 'bulk("NaCl", "rocksalt", a=5.64)')),
    (frozenset({29}), Example("from ase.build import bulk", 'bulk("Cu")')),
    (frozenset({14}), Example("from ase.build import bulk", 'bulk("Si")')),
)


def release_texts(facts: CardFacts) -> dict[str, str]:
    """README.md, example.py, CITATION.cff, and LICENSE where it is known."""
    # Markdown and Python, not HTML: escaping would spoil them.
    templates = Environment(
        loader=PackageLoader("wattier"), undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True
    )
    templates.filters |= {
        "line": _line,
        "cell": _cell,
        "known": _known,
        "shell": shlex.quote,
        "kwh": _kwh,
        "within": _within,
        "number": _number,
    }
    templates.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    license_text = _license_text(facts.license)
    values = _values(facts) | {"has_license_file": license_text is not None}
    texts = {
        "README.md": templates.get_template("model_card.md").render(values),
        "example.py": templates.get_template("example.py.txt").render(values),
        "CITATION.cff": citation_file(facts.name, facts.wattier_version, _citations(facts)),
    }
    return texts | ({"LICENSE": license_text} if license_text else {})


def _values(facts: CardFacts) -> dict[str, Any]:
    members, data = _members(facts), {name: _data(facts, name) for name in facts.ensemble.sources}
    promises = frozenset.intersection(*(model.properties for model in facts.ensemble.members))
    first = facts.ensemble.sources[0]
    return {
        "name": facts.name,
        "parent": facts.parent,
        "wattier_version": facts.wattier_version,
        "front_matter": front_matter(facts),
        "families": sorted({member["family"] for member in members}),
        "members": members,
        "promises": promises,
        "sources": facts.ensemble.sources,
        "first_source": first,
        "example": example_of(_known_elements(facts.ensemble, first)),
        "has_std": facts.ensemble.knows_energy_std,
        "held_out": _held_out(facts),
        "groups_apart": facts.groups_apart,
        "metrics": facts.evaluation.get("sources") or {},
        "sureness": _sureness(facts),
        "data": data,
        "any_sample": any(about["is_sample"] for about in data.values()),
        "phases": [*facts.phases, *([facts.total] if facts.total else [])],
        "limits": _limits(promises),
        "license": facts.license,
        "citations": _citations(facts),
        "format_joules": format_joules,
        "format_loss": format_loss,
    }


def front_matter(facts: CardFacts) -> str:
    """The head that Hugging Face reads: licence, tags, and errors by source as a model index."""
    head: dict[str, Any] = {"library_name": "wattier", "pipeline_tag": "graph-ml", "tags": list(TAGS)}
    if facts.license:
        head["license"] = facts.license.lower()
    results = []
    for source, metrics in (facts.evaluation.get("sources") or {}).items():
        known = [
            {"type": kind, "name": name, "value": metrics[key]}
            for key, kind, name in INDEXED
            if metrics.get(key) is not None
        ]
        sample = " (sample of Wattier)" if _data(facts, source)["is_sample"] else ""
        if known:
            results.append(
                {
                    "task": {"type": "graph-ml", "name": "energies and forces of atomistic structures"},
                    "dataset": {
                        "type": source,
                        "name": f"{source}{sample}, held-out {_held_out(facts)}",
                        "split": "test",
                    },
                    "metrics": known,
                }
            )
    if results:
        head["model-index"] = [{"name": facts.name, "results": results}]
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=120)


def _held_out(facts: CardFacts) -> str:
    return "groups" if facts.groups_apart else "frames"


def example_of(elements: frozenset[int]) -> Example:
    """A structure that holds only elements of a source; where none of ours does, a pair of one of its elements."""
    for needed, example in EXAMPLES:
        if needed <= elements:
            return example
    symbol = SYMBOLS[min(elements, default=1)]
    return Example("from ase import Atoms", f'Atoms("{symbol}2", positions=[[0, 0, 0], [0, 0, 2.5]])')


def _known_elements(ensemble: Ensemble, source: str) -> frozenset[int]:
    row = ensemble.references_ev[list(ensemble.sources).index(source)]
    return frozenset(number for number, energy in enumerate(row) if energy != 0)


def _members(facts: CardFacts) -> list[dict[str, Any]]:
    found = []
    told = facts.member_facts or [{}] * len(facts.member_names)
    for name, model, about in zip(facts.member_names, facts.ensemble.members, told, strict=True):
        config = model.config
        found.append(
            {
                "name": name,
                "family": FAMILY_NAMES[config.family],
                "n_layers": config.n_layers,
                "hidden_dim": config.hidden_dim,
                "cutoff_angstrom": config.cutoff_angstrom,
                "forces": "gradient of the energy" if "conservative" in model.properties else "predicted",
                "n_parameters": f"{count_parameters(model):,}",
                "val_loss": about.get("val_loss"),
                "energy_joules": about.get("energy_joules"),
            }
        )
    return found


def _data(facts: CardFacts, source: str) -> dict[str, Any]:
    """A source's facts with None for those nobody told."""
    told = facts.data.get(source, {})
    elements = told.get("elements") or sorted(_known_elements(facts.ensemble, source))
    return {
        "is_sample": bool(told.get("is_sample")),
        "licence": told.get("licence"),
        "citation": told.get("citation"),
        "method": "the sample's own" if told.get("is_sample") else told.get("method"),
        "structures": {**SPLIT_UNKNOWN, **(told.get("structures") or {})},
        "symbols": " ".join(SYMBOLS[number] for number in elements),
    }


def _citations(facts: CardFacts) -> dict[str, str]:
    """What to cite for each source; a sample is no part of the dataset whose layout it has."""
    told = {source: _data(facts, source) for source in facts.ensemble.sources}
    return {s: about["citation"] for s, about in told.items() if about["citation"] and not about["is_sample"]}


def _sureness(facts: CardFacts) -> list[str]:
    energy = (facts.evaluation.get("calibration") or {}).get("energy") or {}
    covered_68, covered_95 = energy.get("coverage_68"), energy.get("coverage_95")
    sentences = []
    n = f"{energy['n']} " if energy.get("n") else ""  # not told by the first versions
    it = "The spread of the members" if facts.ensemble.knows_forces_std else "What a head expects the energy to err by"
    if not facts.ensemble.knows_energy_std:
        sentences.append("One member cannot say how sure it is: this release has no uncertainty of a spread.")
    elif covered_68 is None or covered_95 is None:
        sentences.append(f"{it} was not held against errors: take it as an order, not as a size.")
    else:
        sentences.append(
            f"{it}, scaled on validation data, is the standard deviation of the answer. Central 68 % intervals of the "
            f"energy cover {100 * covered_68:.0f} % of the {n}held-out errors, 95 % intervals "
            f"{100 * covered_95:.0f} %."
        )
    intervals = facts.evaluation.get("intervals") or {}
    pooled = (intervals.get("energy") or {}).get("pooled") or {}
    if intervals.get("target") is not None and pooled.get("observed") is not None:
        sentences.append(
            f"Energy intervals that should cover {100 * intervals['target']:.0f} % of all errors cover "
            f"{100 * pooled['observed']:.1f} % of those of {pooled['n']} held-out structures."
        )
    sentences.append("That holds for structures like those of the training data, and says nothing of others.")
    if facts.ensemble.domain is not None:
        sentences.append(
            "`wattier predict` flags those with distances or densities that the training data did not have."
        )
    return sentences


def _limits(promises: frozenset[str]) -> list[str]:
    sentences = [
        "Elements that a source's training data did not hold are refused; far from those data an answer is a guess."
    ]
    if "conservative" in promises:
        sentences.append("Forces are the gradient of the energy.")
    else:
        sentences.append(
            "Forces are predicted directly, by some members at least: they are not the gradient of the energy, so long "
            "molecular dynamics will drift and relaxations may not end. `conservative=True` (`--conservative`) takes "
            "the gradient instead, which is less near to the labels than those forces."
        )
    if "equivariant_forces" not in promises:
        sentences.append("Forces do not turn with the structure.")
    if "smooth_cutoff" not in promises:
        sentences.append("The energy of some members jumps where a neighbour crosses the cutoff.")
    return [*sentences, "There is no interaction beyond the cutoff, no charge and no spin."]


def _license_text(license_id: str | None) -> str | None:
    """The text of the licence that Wattier itself has, where it is the same and was installed."""
    try:
        package = distribution("wattier")
    except PackageNotFoundError:
        return None
    if license_id is None or package.metadata["License-Expression"] != license_id:
        return None
    return package.read_text("licenses/LICENSE")


def _line(text: Any) -> str:
    """A text that somebody else wrote, on one line."""
    return " ".join(str(text).split())


def _cell(text: Any) -> str:
    return _line(text).replace("|", "\\|")


def _known(value: Any) -> str:
    return UNKNOWN if value is None else str(value)


def _number(value: float | None, decimals: int) -> str:
    return UNKNOWN if value is None else f"{value:.{decimals}f}"


def _within(phase: PhaseEnergy) -> str:
    """How far off the joules may be; of an estimate nobody knows."""
    if phase.uncertainty_ratio is None:
        return "not stated"
    return f"± {format_ratio(phase.uncertainty_ratio)}"


def _kwh(joules: float | None) -> str:
    return UNKNOWN if joules is None else f"{joules / JOULES_PER_KWH:.3g}"
