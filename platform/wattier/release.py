"""A self-contained folder with the ensemble: weights, references, hashes, a model card and an example."""

from __future__ import annotations

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from safetensors.torch import save_file

from wattier.config import RunConfig
from wattier.errors import UserError
from wattier.ledger import ledger_info
from wattier.records import TrialResult
from wattier.rundir import FULL_STAGE, RunDir
from wattier.trial import load_member, settings_of
from wattier.units import format_joules
from wattier_gnn.files import sha256_of
from wattier_gnn.properties import promised
from wattier_gnn.release import MANIFEST, SCHEMA_VERSION, load_release
from wattier_gnn.store import Store

LICENSE_OF_SAMPLE = "BSD-3-Clause"
FAMILY_NAMES = {"egnn": "EGNN", "schnet": "SchNet", "pna": "PNA"}


def export_release(run: RunDir, config: RunConfig) -> Path:
    """Write ``release/`` anew, whole or not at all, and load it back as a check.

    Raises:
        UserError: the run is not evaluated yet.
    """
    evaluation = run.evaluation()
    if evaluation is None:
        raise UserError(f"{run.path}: is not evaluated yet. Run `wattier evaluate` first.")
    results = {result.trial_id: result for result in run.trials(FULL_STAGE)}
    members = [results[member["trial_id"]] for member in evaluation["members"]]
    temporary = run.path / f".release.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for member in members:
            _write_member(temporary / member.trial_id, run, member)
        _write_texts(temporary, run, config, evaluation, members)
        manifest = _manifest(temporary, run, config, evaluation, members)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False))
        load_release(temporary)
        shutil.rmtree(run.release_path, ignore_errors=True)
        temporary.rename(run.release_path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return run.release_path


def _write_member(folder: Path, run: RunDir, member: TrialResult) -> None:
    model = load_member(run.path / str(member.checkpoint))
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2))


def _write_texts(
    folder: Path, run: RunDir, config: RunConfig, evaluation: dict[str, Any], members: list[TrialResult]
) -> None:
    """The model card in the Hugging Face format, and the example script."""
    # Markdown and Python, not HTML: escaping would spoil them.
    templates = Environment(loader=PackageLoader("wattier"), undefined=StrictUndefined, autoescape=False)
    models = [settings_of(config, m.params)[0] for m in members]
    values = {
        "config": config,
        "families": sorted({FAMILY_NAMES[m.family] for m in models}),
        "promises": frozenset.intersection(*(promised(m.family, m.forces) for m in models)),
        "evaluation": evaluation,
        "ledger": ledger_info(run),
        "format_joules": format_joules,
        "first_source": next(iter(evaluation["sources"])),
        "wattier_version": version("wattier"),
        "license": LICENSE_OF_SAMPLE if set(config.data.sources.values()) == {"sample"} else None,
    }
    for template, name in (("model_card.md", "README.md"), ("example.py.txt", "example.py")):
        (folder / name).write_text(templates.get_template(template).render(values))


def _manifest(
    folder: Path, run: RunDir, config: RunConfig, evaluation: dict[str, Any], members: list[TrialResult]
) -> dict[str, Any]:
    store = Store(run.store_path)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    calibration = evaluation["calibration"]
    return {
        "schema_version": SCHEMA_VERSION,
        "wattier_version": version("wattier"),
        "name": config.name,
        "sources": list(store.sources),
        "members": [member.trial_id for member in members],
        "references_ev": store.references.tolist(),
        "calibration": {
            "energy_std_scale": calibration["energy"]["scale"],
            "forces_std_scale": calibration["forces"]["scale"],
        },
        "uncertainty": evaluation.get("uncertainty"),
        "metrics": evaluation["sources"],
        "energy_by_phase": [
            {"phase": phase.phase, "joules": phase.joules, "method": phase.method} for phase in ledger_info(run).phases
        ],
        "files": {name: sha256_of(folder / name) for name in files},
    }
