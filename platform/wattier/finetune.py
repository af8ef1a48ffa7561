"""Fine-tuning: the members of a release trained on data of your own, under the meter, into a release of their own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wattier.config import DataSection, TelemetrySection
from wattier.departure import MARGIN_SECONDS, LeaveNote, NotFinishedError, trials_run
from wattier.errors import UserError
from wattier.evaluate import calibrated, predict_split, training_domain
from wattier.evaluation_figures import figures_of
from wattier.ledger import LedgerInfo, add_up, phase_of
from wattier.metering import metered
from wattier.model_card import CardFacts, release_texts
from wattier.records import EpochRecord, PhaseEnergy, finite_or_none
from wattier.release import data_facts, energy_by_phase
from wattier.rundir import RunDir, append_json_line, read_json, write_json
from wattier.trial import load_member
from wattier.units import format_joules, format_loss
from wattier_gnn.datasets import SYMBOLS
from wattier_gnn.ensemble import Ensemble
from wattier_gnn.files import sha256_of
from wattier_gnn.finetune import (
    LIMITS,
    Alignment,
    TunedStore,
    adapted,
    align,
    has_forces,
    unadapted_errors,
    unseen_elements,
)
from wattier_gnn.ingest import ingest
from wattier_gnn.model import count_parameters
from wattier_gnn.release import MANIFEST, load_release, read_release_manifest
from wattier_gnn.release_writer import write_release
from wattier_gnn.splits import TEST, TRAIN, VAL
from wattier_gnn.structure import DataError
from wattier_gnn.train import EpochReport, TrainConfig, Trainer
from wattier_telemetry import bill

COVERAGE = 0.9
LEARNING_RATE_FREE, LEARNING_RATE_FROZEN = 3e-4, 1e-3  # a free backbone is to move a little, new heads a lot
SECONDS_BETWEEN_LINES = 10.0
TELEMETRY = TelemetrySection()
Say = Callable[[str], None]


@dataclass(frozen=True)
class FineTuning:
    """What to do. learning_rate None = as suits a free or a frozen backbone."""

    release: Path
    file: Path
    output: Path
    source: str
    freeze: bool = False
    epochs: int = 200
    early_stop_patience: int = 10
    learning_rate: float | None = None
    batch_structures: int = 8
    seed: int = 0

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.learning_rate or (LEARNING_RATE_FROZEN if self.freeze else LEARNING_RATE_FREE)

    @property
    def work(self) -> RunDir:
        """Where it works until the release is there; another command goes on from what lies in it."""
        return RunDir(self.output.with_name(f"{self.output.name}.work"))


def fine_tune(task: FineTuning, say: Say) -> Path:
    """Fine-tune all members of a release and write a new one; the caller holds the lock of `task.work`.

    Raises:
        DataError: the release or the file cannot be used.
        UserError: work of another fine-tuning lies there.
        NotFinishedError: it was told to leave; the same command goes on.
    """
    release, manifest = load_release(task.release), read_release_manifest(task.release)
    _refuse_other_work(task)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    for member in release.members:
        member.to(device)
    store, alignment = _aligned(task, release, say)
    note, names = LeaveNote(task.work), list(manifest["members"])
    with trials_run():
        for k, name in enumerate(names):
            _train(task, release, k, name, alignment, note, say)
    with metered(task.work.phase_folder("evaluation"), "driver", TELEMETRY, on_gpu=device.type == "cuda"):
        members = tuple(load_member(task.work.trial_folder("full", name) / "best.pt").to(device) for name in names)
        bare = Ensemble(members, store.references, domain=training_domain(store))
        ensemble = calibrated(bare, predict_split(bare, store, VAL, LIMITS), None, COVERAGE)
        figures = figures_of(
            ensemble, predict_split(ensemble, store, TEST, LIMITS), np.array([len(store.indices(TRAIN))])
        )
        before = unadapted_errors(release, store, alignment.origin, TEST)
        start, _ = unadapted_errors(release, store, alignment.origin, TEST, alignment.references_ev)
    return _write(task, release, manifest, store, alignment, ensemble, finite_or_none(figures), before, start, say)


def _refuse_other_work(task: FineTuning) -> None:
    """What lies there must be of this very task: a checkpoint of another one would be gone on with."""
    if not task.file.is_file():
        raise DataError(f"{task.file}: is no file, but must be an extended XYZ file with energies. Give its path.")
    path = task.work.path / "task.json"
    due = {name: str(value) for name, value in asdict(task).items() if name not in ("release", "file", "output")}
    due |= {"release": sha256_of(task.release / MANIFEST), "file": sha256_of(task.file)}
    if not path.exists():
        write_json(path, due)
    elif (there := read_json(path)) != due:
        changed = ", ".join(name for name in due if there.get(name) != due[name])
        raise UserError(
            f"{task.work.path}: holds an unfinished fine-tuning with another {changed}. Run that command again to "
            "finish it, or remove the folder."
        )


def _aligned(task: FineTuning, release: Ensemble, say: Say) -> tuple[TunedStore, Alignment]:
    """The user's structures as one source, and how their energies stand to the release's."""
    work, data = task.work, DataSection()
    with metered(work.phase_folder("data"), "driver", TELEMETRY, on_gpu=False):
        if not work.store_manifest_path.exists():
            ingest(
                {"extxyz": task.file}, work.store_path, cutoff_angstrom=release.cutoff_angstrom,
                max_force_ev_per_angstrom=data.max_force_ev_per_angstrom, on_bad="refuse",
                split=data.split.model_dump(), seed=task.seed, say=say, may_be_empty=True,
            )  # fmt: skip
        store = TunedStore(work.store_path, None, task.source, task.seed)
        if unseen := unseen_elements(release, store):
            names = ", ".join(SYMBOLS[z] for z in unseen)
            if task.freeze:
                raise DataError(
                    f"{task.file}: holds {names}, which the release never saw, so that a frozen backbone knows nothing "
                    "of it. Leave out --freeze."
                )
            say(f"warning: the release never saw {names}: what it knows of it comes from your data alone")
        alignment = align(release, store, task.source)
    if store.torn_groups:
        say(
            "warning: too few groups to keep apart, so frames are dealt one by one: validation and test are of frames "
            "like those of training"
        )
    if not (task.freeze or release.is_conservative or has_forces(store)):
        say(
            "warning: your data have no forces, so force heads learn nothing while what they read changes: of what is "
            "made take the gradient, by conservative=True or --conservative; or give --freeze"
        )
    store.align(alignment)
    say(
        f"energies: nearest to source {release.sources[alignment.origin]}; {alignment.unaligned_ev_per_atom:.3g} "
        f"eV/atom apart, {alignment.residual_ev_per_atom:.3g} once aligned"
    )
    return store, alignment


def _train(  # noqa: PLR0913, PLR0917  (what is trained, on what, and who hears of it)
    task: FineTuning, release: Ensemble, k: int, name: str, alignment: Alignment, note: LeaveNote, say: Say
) -> None:
    """Train one member from its last checkpoint, unless it is trained."""
    folder = task.work.trial_folder("full", name)
    if (folder / "result.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    parent = release.members[k]
    device = parent.energy_scale_ev.device
    model = adapted(parent, alignment.origin, task.source, freeze=task.freeze)
    store = TunedStore(task.work.store_path, parent.config.cutoff_angstrom, task.source, task.seed)
    store.align(alignment)

    told = time.monotonic()

    def heard(report: EpochReport) -> bool:
        nonlocal told
        meter.so_far()
        record = EpochRecord(**report.to_dict(), energy_joules=bill(folder).joules)
        append_json_line(folder / "epochs.jsonl", record.to_dict())
        if time.monotonic() - told >= SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            say(
                f"{name}: epoch {report.epoch} of at most {task.epochs}, validation loss {format_loss(report.val_loss)}"
            )
        return True

    with metered(folder, "rank0", TELEMETRY, on_gpu=device.type == "cuda") as (meter, _):
        trainer = Trainer(
            model, store,
            TrainConfig(
                epochs=task.epochs, early_stop_patience=task.early_stop_patience, learning_rate=task.rate,
                batch_structures=task.batch_structures, weight_decay=0.0, seed=task.seed + k,
            ),
            train_indices=store.indices(TRAIN), val_indices=store.indices(VAL), folder=folder, device=device,
            leaves=lambda seconds: note.due(seconds + MARGIN_SECONDS) is not None,
        )  # fmt: skip
        state = trainer.run(heard)
    if state.ended == "left":
        raise NotFinishedError(note.due() or "walltime")
    if state.best_epoch == 0:
        raise DataError(f"{task.file}: training {name} on it diverged. Lower --learning-rate, and remove {folder}.")
    result = {"val_loss": state.best_val_loss, "epochs_done": state.epoch, "ended": state.ended}
    write_json(folder / "result.json", result | {"n_parameters": count_parameters(model)})
    joules = format_joules(bill(folder).joules)
    say(f"{name}: {state.epoch} epochs ({state.ended}), validation loss {format_loss(state.best_val_loss)}, {joules}")


def _write(  # noqa: PLR0913, PLR0917  (what a release is made of)
    task: FineTuning,
    release: Ensemble,
    manifest: dict[str, Any],
    store: TunedStore,
    alignment: Alignment,
    ensemble: Ensemble,
    figures: dict[str, Any],
    before: tuple[float, float | None],
    start: float,
    say: Say,
) -> Path:
    names, ledger = list(manifest["members"]), _ledger(task.work)
    after = figures["sources"][task.source]
    about = {
        "freeze": task.freeze, "origin": release.sources[alignment.origin], "learning_rate": task.rate,
        "epochs": task.epochs, "file": {"name": task.file.name, "sha256": sha256_of(task.file)},
        "split": "frames one by one" if store.torn_groups else "whole groups",
        "energy_mae_ev_per_atom_before": before[0], "energy_mae_ev_per_atom": after["energy_mae_ev_per_atom"],
        "force_mae_ev_per_angstrom_before": before[1], "force_mae_ev_per_angstrom": after["force_mae_ev_per_angstrom"],
    }  # fmt: skip
    data = data_facts(store.meta["by_source"], {})
    card = CardFacts(
        name=task.output.name, wattier_version=version("wattier"), ensemble=ensemble, member_names=names,
        member_facts=[_facts(task, name) for name in names], evaluation=figures, phases=ledger.phases,
        total=ledger.total, data=data, parent=str(manifest["name"]), groups_apart=not store.torn_groups,
    )  # fmt: skip
    made = write_release(
        task.output, ensemble, names, name=card.name, wattier_version=card.wattier_version, facts=card.member_facts,
        about={
            "metrics": figures["sources"], "energy_by_phase": energy_by_phase(ledger), "data": data, "license": None,
            "fine_tuning": about,
        },
        texts=release_texts(card), parent=task.release,
    )  # fmt: skip
    force = "" if before[1] is None else f", forces {before[1]:.3g} -> {after['force_mae_ev_per_angstrom']:.3g} eV/Å"
    say(
        f"test errors: energy {before[0]:.3g} -> {after['energy_mae_ev_per_atom']:.3g} eV/atom{force}, for "
        f"{format_joules(ledger.total.joules)} ({ledger.total.method})"
    )
    if after["energy_mae_ev_per_atom"] > start:
        say(
            f"warning: aligned, the release had {start:.3g} eV/atom before any training, which made it worse. Give "
            "more structures, a lower --learning-rate, or --freeze"
        )
    return made


def _facts(task: FineTuning, name: str) -> dict[str, Any]:
    folder = task.work.trial_folder("full", name)
    result, energy = read_json(folder / "result.json"), bill(folder)
    return {
        "params": {"learning_rate": task.rate, "batch_structures": task.batch_structures, "freeze": task.freeze},
        **{key: result[key] for key in ("val_loss", "epochs_done", "n_parameters")},
        "energy_joules": energy.joules,
        "energy_method": energy.method,
        "devices": sorted({share.device_uuid for share in energy.shares}),
    }


def _ledger(work: RunDir) -> LedgerInfo:
    """What it cost by phase; each phase's attempts are all in."""
    members = [bill(path) for path in sorted((work.path / "trials" / "full").glob("*"))]
    reports = {name: bill(work.phase_folder(name)) for name in ("data", "evaluation")}
    total = add_up([*members, *reports.values()])
    phases: tuple[PhaseEnergy, ...] = (
        phase_of("data", reports["data"], 0),
        phase_of("fine-tuning", add_up(members), len(members)),
        phase_of("evaluation", reports["evaluation"], 0),
    )
    return LedgerInfo(phases, phase_of("total", total, len(members)), {}, {}, ())
