"""Settings that are right alone and wrong together, also where one of them is searched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wattier.config import RunConfig


def refuse_wrong_combinations(config: RunConfig) -> None:
    """Check what no section can see by itself.

    Raises:
        ValueError: the first problem, with its place.
    """
    if config.trial is not None:
        _nothing_of_our_models(config)
        return
    _something_to_read(config)
    _joules_are_measured(config)
    _a_structure_for_each_rank(config)
    _weights_of_all_sources(config)
    _one_warm_up(config)
    _neighbours_within_the_data(config)
    _whole_weights_for_gradients(config)
    _whole_gpus_for_shards(config)
    _checkpoints_before_a_stall(config)
    _power_caps_where_allowed(config)


def _something_to_read(config: RunConfig) -> None:
    if not config.data.sources and config.data.store is None:
        raise ValueError(
            "data: sources is {} and store is null, but one must be given. Name at least one source, or, for a model "
            "of your own, its training function: trial"
        )


def _joules_are_measured(config: RunConfig) -> None:
    if config.telemetry.source == "stated":
        raise ValueError(
            "telemetry.source is stated, but only a trial of your own can state its joules. Set source to auto"
        )


def _nothing_of_our_models(config: RunConfig) -> None:
    if "projected_joules" in config.search.objectives:
        raise ValueError(
            "search.objectives names projected_joules, to train to convergence, which is not known of a trial of your "
            "own. Name energy_joules"
        )
    for name in ("data", "model", "training", "full_training", "ensemble"):
        if (section := getattr(config, name)) != type(section)():
            raise ValueError(
                f"{name} is given, which is for Wattier's own models, but trial names a function of yours, which sees "
                "nothing of it. Remove it"
            )


def reached(config: RunConfig, name: str) -> list[Any]:
    """Values that a model or training setting takes: its own, or those of the search space (ends of a range)."""
    searched: Any = config.search.space.get(name)
    if searched is None:
        section = config.model if name in type(config.model).model_fields else config.training
        return [getattr(section, name)]
    return list(searched.choices) if hasattr(searched, "choices") else [searched.low, searched.high]


def _a_structure_for_each_rank(config: RunConfig) -> None:
    smallest = min(int(value) for value in reached(config, "batch_structures"))
    ranks = max([config.full_training.ranks, *(stage.ranks for stage in config.search.stages)])
    if smallest < ranks:
        raise ValueError(
            f"batch_structures is {smallest} at the least and ranks is {ranks} at the most, but a step must have a "
            "structure for each rank. It counts structures of a step over all ranks; raise it, or lower ranks"
        )


def _weights_of_all_sources(config: RunConfig) -> None:
    weights = config.training.source_weights
    if "weights" not in reached(config, "mixture"):
        if weights is not None:
            raise ValueError(
                "training.source_weights is given, but training.mixture is not weights, which alone reads it. Set "
                "mixture to weights, or remove source_weights"
            )
        return
    named, read = set(weights or {}), set(config.data.sources)
    if config.data.store is not None and not read:
        return  # the store says which there are
    if named != read:
        raise ValueError(
            f"training.source_weights names {', '.join(sorted(named)) or 'no source'}, but mixture weights needs one "
            f"for each of data.sources: {', '.join(sorted(read))}"
        )


def _one_warm_up(config: RunConfig) -> None:
    if max(reached(config, "warmup_steps")) and max(reached(config, "warmup_epochs")):
        raise ValueError(
            "training.warmup_steps and training.warmup_epochs are both above 0, but only one can be. Remove one"
        )


def _neighbours_within_the_data(config: RunConfig) -> None:
    cutoffs = (float(value) for value in reached(config, "cutoff_angstrom") if value is not None)
    if (largest := max(cutoffs, default=0.0)) > config.data.cutoff_angstrom:
        raise ValueError(
            f"model.cutoff_angstrom reaches {largest:g} and data.cutoff_angstrom is {config.data.cutoff_angstrom:g}, "
            "but neighbours are known within the latter alone. Raise data.cutoff_angstrom, or lower the model's"
        )


def _whole_weights_for_gradients(config: RunConfig) -> None:
    if "fsdp" in reached(config, "sharding") and "conservative" in reached(config, "forces"):
        raise ValueError(
            "training.sharding is fsdp and model.forces is conservative, but forces by gradient need whole weights on "
            "every rank. Set sharding to none, or forces to vector"
        )


def _whole_gpus_for_shards(config: RunConfig) -> None:
    gpus = config.resources.gpus_per_rank
    if "fsdp" in reached(config, "sharding") and gpus is not None and 0 < gpus < 1:
        raise ValueError(
            f"training.sharding is fsdp and resources.gpus_per_rank is {gpus}, but ranks that hold parts of a "
            "model must each have a whole GPU. Set gpus_per_rank to 1, or sharding to none"
        )


def _checkpoints_before_a_stall(config: RunConfig) -> None:
    stall, checkpoint = config.resources.stall_seconds, config.training.checkpoint_seconds
    if stall is not None and stall <= checkpoint:
        raise ValueError(
            f"resources.stall_seconds is {stall:g} and training.checkpoint_seconds is {checkpoint:g}, but a trial must "
            "have the time to save a checkpoint. Raise the one, or lower the other"
        )


def _power_caps_where_allowed(config: RunConfig) -> None:
    if all(ratio is None for ratio in reached(config, "power_cap_ratio")):
        return
    if not config.resources.allow_power_cap:
        raise ValueError(
            "power_cap_ratio is given, which sets power limits, but resources.allow_power_cap is false. Set it to true "
            "if you may set those of the GPUs, or remove power_cap_ratio"
        )
    gpus = config.resources.gpus_per_rank
    if gpus is not None and gpus < 1:
        raise ValueError(
            f"power_cap_ratio is given and resources.gpus_per_rank is {gpus:g}, but a power limit acts on all who "
            "share a GPU. Set gpus_per_rank to 1, or remove power_cap_ratio"
        )
