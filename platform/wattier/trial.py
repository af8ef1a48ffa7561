"""One trial: the one place where gnn and telemetry meet.

``run_trial(context)`` is what a user replaces to tune a model of their own: it reads the context, reports epochs,
leaves its files in the trial's folder, and returns a TrialResult on rank 0.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from wattier.config import ModelSection, RunConfig, TrainingSection
from wattier.config_space import ChoiceParameter
from wattier.departure import MARGIN_SECONDS, LeaveNote, note_of
from wattier.metering import metered
from wattier.peak_memory import peak_memory_bytes, reset_peak_memory
from wattier.power_cap import bill_with_remarks, cap_ratio, power_capped
from wattier.records import EpochRecord, Params, Status, TrialResult, finite_or_none
from wattier.rundir import (
    START_UP_PHASE,
    RunDir,
    append_json_line,
    read_json_lines,
    write_json,
)
from wattier.trial_context import TrialContext, ended_result, own_folder, registered
from wattier_gnn import checkpoint
from wattier_gnn.distributed import barrier, largest, process_group
from wattier_gnn.model import FoundationModel, ModelConfig, build_model, count_parameters
from wattier_gnn.sampling import choose_subset
from wattier_gnn.sharding import optimizer_state
from wattier_gnn.splits import TRAIN, VAL
from wattier_gnn.spread import SpreadStore
from wattier_gnn.store import Store
from wattier_gnn.structure import DataError
from wattier_gnn.train import EpochReport, TrainConfig, Trainer, TrainState
from wattier_telemetry import EnergyMeter, EnergyReport, TrialRegistration, bill


def run_trial(context: TrialContext) -> TrialResult | None:
    """Train one set of hyper-parameters at one fidelity, under an energy meter; resumes from its own last checkpoint.

    Returns:
        The result on rank 0 (also written to ``result.json``), None on other ranks.
    """
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    rank = context.world.rank
    with ExitStack() as stack:
        warm_up(context)
        ratio = cap_ratio(context.config, context.spec.proposal.params)
        uncap = stack.enter_context(power_capped(context.folder, rank, context.gpus, ratio))
        meter, source = stack.enter_context(
            metered(
                context.folder,
                f"rank{rank}",
                context.config.telemetry,
                on_gpu=context.gpus > 0,
                fraction=context.device_fraction,
                counted_by_parent=context.counted_by_parent,
                traced=True,
            )
        )
        if rank == 0:
            stack.enter_context(own_folder(context.folder))
        device = _device(context)
        reset_peak_memory(device)
        stack.enter_context(process_group(context.world, device, exclusive_device=context.gpus >= 1))
        registration = stack.enter_context(registered(context, source))
        leave = note_of(context.spec.run_dir)
        trainer = _trainer(context, device, lambda: _bill_so_far(context, meter), leave)
        stopped_by: BaseException | None = None
        try:
            state = trainer.run(lambda report: _on_epoch(context, report, registration, _bill_so_far(context, meter)))
        except SystemExit as stop:  # how Ray Tune tells a function that its scheduler stopped it
            state, stopped_by = trainer.state, stop
            state.ended = state.ended or "stopped"
        memory_bytes = int(largest(peak_memory_bytes(device) or 0, device)) or None
        meter.close()
        uncap()
        barrier()  # all ranks' bills are final from here on
        if rank != 0:
            return None
        result = _result(context, trainer, state, started_at, memory_bytes, leave.due(math.inf))
        if not result.goes_on:
            write_json(context.folder / "result.json", result.to_dict())
        if stopped_by is not None:
            raise stopped_by
        return result


_WARM: set[str] = set()  # devices on which this process has trained


def warm_up(context: TrialContext) -> None:
    """Take one step with a tiny network, once a process and device, under a meter of the phase ``start-up``.

    The first step of a process pays for lazily loaded kernels; billed to the trial that happens to come first, it
    would make trials look dear by their place in the queue.
    """
    device = _device(context)
    if str(device) in _WARM:
        return
    _WARM.add(str(device))
    run = RunDir(Path(context.spec.run_dir))
    name = f"{socket.gethostname()}-{os.getpid()}"
    with metered(
        run.phase_folder(START_UP_PHASE),
        name,
        context.config.telemetry,
        on_gpu=context.gpus > 0,
        fraction=context.device_fraction,
        counted_by_parent=context.counted_by_parent,
    ):
        torch.set_num_threads(context.config.resources.cpus_per_rank)
        store = Store(run.store_path)
        for family in _families(context.config):  # torch_geometric takes seconds to import
            build_model(model_config(store, ModelSection(family=family, hidden_dim=8, n_layers=1, head_dim=8)), 0)
        model = build_model(model_config(store, ModelSection(hidden_dim=8, n_layers=2, head_dim=8)), 0).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        prediction = model.train()(store.batch(store.indices(TRAIN)[:2]).to(device))
        (prediction.energy.sum() + prediction.forces.square().sum()).backward()
        optimizer.step()
        optimizer_state(model, optimizer)  # what a checkpoint needs is loaded late too


def settings_of(config: RunConfig, params: Params) -> tuple[ModelSection, TrainingSection]:
    """The config's model and training sections with a trial's hyper-parameters put in."""
    model = {k: v for k, v in params.items() if k in ModelSection.model_fields}
    training = {k: v for k, v in params.items() if k in TrainingSection.model_fields}
    return (
        ModelSection.model_validate({**config.model.model_dump(), **model}),
        TrainingSection.model_validate({**config.training.model_dump(), **training}),
    )


def _families(config: RunConfig) -> list[Any]:
    """Families that a trial of this run may be of."""
    searched = config.search.space.get("family")
    return list(searched.choices) if isinstance(searched, ChoiceParameter) else [config.model.family]


def model_config(store: Store, section: ModelSection) -> ModelConfig:
    """A network's config for the data of a store, of which it may take a smaller cutoff."""
    cutoff = section.cutoff_angstrom
    return ModelConfig(
        sources=store.sources,
        energy_scale_ev=tuple(store.meta["energy_scale_ev"]),
        mean_neighbors=store.meta["mean_neighbors"] * (1.0 if cutoff is None else store.edge_share(cutoff)),
        cutoff_angstrom=store.meta["cutoff_angstrom"] if cutoff is None else cutoff,
        **section.model_dump(exclude={"cutoff_angstrom"}),
    )


def load_member(path: Path) -> FoundationModel:
    """The model of a ``best.pt``.

    Raises:
        DataError: the file is damaged.
    """
    saved = checkpoint.load(path)
    try:
        model = FoundationModel(ModelConfig.from_dict(saved["config"]))
        model.load_state_dict(saved["model"])
    except (KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path}: holds another network than this version builds ({reason}). Remove the trial's folder."
        ) from error
    return model.eval()


def _bill_so_far(context: TrialContext, meter: EnergyMeter) -> EnergyReport:
    """The trial's energy over all ranks and attempts; this rank's is read anew, the others' are as of a moment ago."""
    meter.so_far()
    return bill(context.folder)


def _trainer(
    context: TrialContext, device: torch.device, bill_so_far: Callable[[], EnergyReport], leave: LeaveNote
) -> Trainer:
    """The trainer of this rank: same data, same initial weights on every rank."""
    spec, config = context.spec, context.config
    torch.set_num_threads(config.resources.cpus_per_rank)
    path, world = RunDir(Path(spec.run_dir)).store_path, context.world
    spread = config.data.placement == "spread" and world.size > 1
    model_section, training = settings_of(config, spec.proposal.params)
    cutoff = model_section.cutoff_angstrom
    store = SpreadStore(path, world, cutoff) if spread else Store(path, cutoff)
    model = build_model(model_config(store, model_section), spec.seed)
    if spec.warm_start_from is not None:
        earlier = RunDir(Path(spec.run_dir)).trial_folder(spec.warm_start_from, spec.proposal.trial_id) / "best.pt"
        model.load_state_dict(load_member(earlier).state_dict())
    return Trainer(
        model,
        store,
        TrainConfig(
            epochs=spec.fidelity.epochs,
            early_stop_patience=spec.early_stop_patience or spec.fidelity.epochs,
            seed=spec.seed,
            val_energy_weight=config.training.energy_weight,
            val_force_weight=config.training.force_weight,
            **training.for_trainer(),
        ),
        train_indices=choose_subset(store.indices(TRAIN), store.source_index, spec.fidelity.structures, config.seed),
        val_indices=store.indices(VAL),
        folder=context.folder,
        device=device,
        world=context.world,
        before_save=lambda state: state.extra.update(energy_joules=bill_so_far().joules),
        leaves=lambda seconds: leave.due(seconds + MARGIN_SECONDS) is not None,
    )


def _on_epoch(context: TrialContext, report: EpochReport, registration: dict[str, Any], energy: EnergyReport) -> bool:
    """Rank 0: one line of ``epochs.jsonl`` with joules so far, a word to the node's exporter, then ask to go on."""
    record = EpochRecord(**report.to_dict(), energy_joules=energy.joules, time_seconds=time.time())
    append_json_line(context.folder / "epochs.jsonl", record.to_dict())
    registration |= {
        "epoch": record.epoch,
        "val_loss": record.val_loss,
        "structures_per_second": report.structures_seen / report.epoch / max(report.seconds, 1e-9),
        "energy_joules": energy.joules,
        "method": energy.method,
    }
    TrialRegistration(**registration).write()
    return context.report(record)


def _device(context: TrialContext) -> torch.device:
    """This rank's GPU, if it was given one: its own when the launcher narrowed the view, else by rank."""
    if not context.gpus or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", context.world.rank % torch.cuda.device_count())


def _result(  # noqa: PLR0913, PLR0917
    context: TrialContext,
    trainer: Trainer,
    state: TrainState,
    started_at: str,
    memory_bytes: int | None,
    told_to_leave: str | None,
) -> TrialResult:
    """The record of a training that ended by itself, was stopped, or was told to leave."""
    status: Status = "pruned" if state.ended in ("stopped", "diverged") else "complete"
    if state.ended == "left":
        status = "interrupted"
    diverged = state.ended == "diverged"
    epochs = {record["epoch"]: record for record in read_json_lines(context.folder / "epochs.jsonl")}
    best = epochs.get(state.best_epoch, {})
    return ended_result(
        context,
        bill_with_remarks(context.folder),
        status=status,
        val_loss=None if diverged else finite_or_none(state.best_val_loss),
        val_by_source=best.get("val_by_source", {}),
        epochs_done=state.epoch,
        structures_seen=state.structures_seen,
        n_parameters=count_parameters(trainer.model),
        checkpoint=str(trainer.best_path.relative_to(context.spec.run_dir)) if trainer.best_path.exists() else None,
        started_at=started_at,
        diverged=diverged,
        peak_memory_bytes=memory_bytes,
        ended=(told_to_leave or "walltime") if state.ended == "left" else state.ended,
    )
