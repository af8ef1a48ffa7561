"""A run's ensemble as a release: a folder that stands alone, with a card that says what it is and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

import torch

from wattier.config import RunConfig
from wattier.errors import UserError
from wattier.evaluate import released_ensemble
from wattier.ledger import LedgerInfo, ledger_info
from wattier.model_card import CardFacts, release_texts
from wattier.records import PhaseEnergy, TrialResult
from wattier.rundir import FULL_STAGE, RunDir
from wattier_gnn.release_writer import write_release
from wattier_gnn.store import Store

LICENSE_OF_SAMPLE = "BSD-3-Clause"
SAMPLE_PARTS = ("wattier_gnn", "sample", "data")  # where the sample lies in any installation


def export_release(run: RunDir, config: RunConfig, output: Path | None = None) -> Path:
    """Write a run's release anew, whole or not at all; it is loaded back before it takes the place of an older one.

    Args:
        run: an evaluated run.
        config: that it was made with.
        output: a new folder, or an older release; None = ``release/`` in the run, which is ours whatever it holds.

    Raises:
        UserError: the run is not evaluated yet, or a member of the evaluation is no longer in the run.
        DataError: the folder holds something that is no release.
    """
    evaluation = run.evaluation()
    if evaluation is None:
        raise UserError(f"{run.path}: is not evaluated yet. Run `wattier evaluate` first.")
    members = _members(run, evaluation)
    store = Store(run.store_path)
    ensemble = released_ensemble(run, members, store, evaluation, torch.device("cpu"))
    ledger, data = ledger_info(run), data_facts(store.meta["by_source"], config.data.sources)
    facts = [member_facts(member) for member in members]
    names = [member.trial_id for member in members]
    card = CardFacts(
        name=config.name,
        wattier_version=version("wattier"),
        ensemble=ensemble,
        member_names=names,
        member_facts=facts,
        evaluation=evaluation,
        phases=ledger.phases,
        total=ledger.total,
        data=data,
        license=LICENSE_OF_SAMPLE if all(about["is_sample"] for about in data.values()) else None,
    )
    return write_release(
        output or run.release_path,
        ensemble,
        names,
        name=config.name,
        wattier_version=card.wattier_version,
        facts=facts,
        about={
            "metrics": evaluation["sources"],
            "energy_by_phase": energy_by_phase(ledger),
            "energy_total": _phase(ledger.total),  # not always the sum: what two phases claim counts once
            "data": data,
            "license": card.license,
        },
        texts=release_texts(card),
        replace_any=output is None,
    )


def _members(run: RunDir, evaluation: Mapping[str, Any]) -> list[TrialResult]:
    results = {result.trial_id: result for result in run.trials(FULL_STAGE)}
    names = [member["trial_id"] for member in evaluation["members"]]
    if missing := [name for name in names if name not in results]:
        raise UserError(
            f"{run.evaluation_path}: evaluates {missing[0]}, which {run.trials_path} does not hold as fully trained. "
            "Run `wattier evaluate` again."
        )
    return [results[name] for name in names]


def member_facts(member: TrialResult) -> dict[str, Any]:
    """What a manifest says of a member beside its config."""
    return {
        "params": member.params,
        "val_loss": member.val_loss,
        "epochs_done": member.epochs_done,
        "n_parameters": member.n_parameters,
        "energy_joules": member.energy_joules,
        "energy_method": member.energy.method,
        "devices": list(member.devices),
    }


def data_facts(by_source: Mapping[str, Any], sources: Mapping[Any, str]) -> dict[str, dict[str, Any]]:
    """What is known of each source of a store: where it is from, its licence, how much of it there is.

    Args:
        by_source: of a store's manifest.
        sources: paths of a config's data section.
    """
    found = {}
    for name, about in by_source.items():
        paths = [str(file.get("path", "")) for file in about.get("files") or ()]
        is_sample = sources.get(name) == "sample" or (bool(paths) and all(map(_is_of_sample, paths)))
        found[name] = {
            "licence": LICENSE_OF_SAMPLE if is_sample else about.get("licence"),
            "citation": about.get("citation"),
            "method": about.get("method"),
            "labels": about.get("labels"),
            "structures": about.get("structures"),
            "elements": about.get("elements"),
            "is_sample": is_sample,
        }
    return found


def _is_of_sample(path: str) -> bool:
    parts, n = PurePath(path).parts, len(SAMPLE_PARTS)
    return any(parts[k : k + n] == SAMPLE_PARTS for k in range(len(parts)))


def energy_by_phase(ledger: LedgerInfo) -> list[dict[str, Any]]:
    """The bill as a manifest has it."""
    return [_phase(phase) for phase in ledger.phases]


def _phase(phase: PhaseEnergy) -> dict[str, Any]:
    return {
        "phase": phase.phase,
        "joules": phase.joules,
        "joules_low": phase.joules_low,
        "joules_high": phase.joules_high,
        "method": phase.method,
        "coverage_ratio": phase.coverage_ratio,
        "trials": phase.trials,
    }
