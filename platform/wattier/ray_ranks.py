"""A trial's processes on Ray: rank 0 is a Tune function, the other ranks are actors in the group's other bundles."""

from __future__ import annotations

import json
import traceback
from dataclasses import dataclass
from typing import Any

from wattier.launch import never_stop, run_rank_zero, too_late
from wattier.node_exporters import use_registry
from wattier.outcome import ERROR_NAME, TrialFailedError, checked_record, reason_of, reason_of_death, write_error
from wattier.ports import free_port
from wattier.ray_cluster import Bundle
from wattier.records import EpochRecord
from wattier.trial_context import RunTrial, TrialContext, TrialSpec
from wattier.trial_output import kept_output, output_name
from wattier_gnn.distributed import World

OTHERS_SECONDS = 5.0  # a rank that left first has said why by then


@dataclass(frozen=True)
class Trainable:
    """What Tune pickles and sends to its actors."""

    run_trial: RunTrial
    config_yaml: str
    registry: str | None
    bundle: Bundle  # of each rank, as reserved: asked again, a cluster that has lost or won nodes might say another

    def as_function(self) -> Any:
        """A plain function of Tune's config, as Tune wants it."""
        me = self

        def trial(config: dict[str, Any]) -> None:
            me.rank_zero(config["spec"])

        return trial

    def rank_zero(self, spec: TrialSpec) -> None:
        """The Tune function: rank 0 of the trial, with the other ranks in the placement group's other bundles."""
        import ray
        from ray import tune

        if too_late(spec):
            return
        use_registry(self.registry)
        config = _parse(self.config_yaml)
        size = spec.fidelity.ranks
        gpus = self.bundle.get("GPU", 0.0)
        address, port = ray.util.get_node_ip_address(), free_port()
        stopped: list[SystemExit] = []

        def report(record: EpochRecord) -> bool:
            # As text: Tune flattens nested results, and stumbles over a loss that is None or NaN.
            values = {"record_json": json.dumps(checked_record(record).to_dict()), "epoch": record.epoch}
            try:
                tune.report(values)
            except SystemExit as stop:  # how Tune says that its scheduler stopped the trial
                stopped.append(stop)
                raise
            return True

        context = TrialContext(spec, config, World(0, size, address, port), gpus, report)
        (context.folder / ERROR_NAME).unlink(missing_ok=True)  # an earlier attempt's
        running: list[Any] = []
        with kept_output(context.folder / output_name(0)):
            try:
                ranks = _rank_actors(size, self.bundle) if size > 1 else []
                running += [
                    actor.run.remote(self, spec, World(rank, size, address, port), gpus)
                    for rank, actor in enumerate(ranks, start=1)
                ]
                run_rank_zero(self.run_trial, context)
                ray.get(running)
            except SystemExit as stop:
                if stopped:
                    raise
                _fail(context, stop, running)
            except Exception as failure:  # noqa: BLE001  (a trial may fail in any way)
                _fail(context, failure, running)


def _fail(context: TrialContext, failure: BaseException, running: list[Any]) -> None:
    reason = write_error(context.folder, failure)
    other = _failure_of_others(context, running)
    if other is not None:  # what rank 0 noticed is that another rank had left
        reason = other
        with (context.folder / ERROR_NAME).open("a", errors="replace") as file:
            file.write(f"{reason}\n")
    drop_rank_actors()
    raise TrialFailedError(reason) from None


def _failure_of_others(context: TrialContext, running: list[Any]) -> str | None:
    """Why the first of the other ranks failed, as far as one has by now."""
    import ray

    if not running:
        return None
    answered, _ = ray.wait(running, num_returns=len(running), timeout=OTHERS_SECONDS)
    for rank, answer in enumerate(running, start=1):
        if answer in answered:
            try:
                ray.get(answer)
            except ray.exceptions.RayTaskError as error:
                return str(error.cause) if isinstance(error.cause, TrialFailedError) else reason_of(error)
            except ray.exceptions.RayError as error:
                return f"rank {rank}: {reason_of_death(context.folder / output_name(rank), str(error))}"
    return None


def _parse(text: str) -> Any:
    import yaml

    from wattier.config import RunConfig

    return RunConfig.model_validate(yaml.safe_load(text))


_RANKS: dict[str, list[Any]] = {}  # placement group -> its rank actors, kept while Tune reuses this process


def _rank_actors(size: int, bundle: Bundle) -> list[Any]:
    """Actors for ranks 1 ... size-1 of this placement group, new or left from the trial before."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = ray.util.get_current_placement_group()
    if group is None:
        raise RuntimeError("a trial of several ranks runs outside of a placement group")
    key = group.id.hex()
    if key not in _RANKS:
        drop_rank_actors()
        _RANKS[key] = [
            ray.remote(Rank)
            .options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            )
            .remote()
            for index in range(1, size)
        ]
    return _RANKS[key]


def drop_rank_actors() -> None:
    """After a failure the other ranks may hang in a collective: end them, the next trial makes new ones."""
    import ray

    for actors in _RANKS.values():
        for actor in actors:
            ray.kill(actor)
    _RANKS.clear()


class Rank:
    """A process that plays one rank after another."""

    def run(self, trainable: Trainable, spec: TrialSpec, world: World, gpus: float) -> None:
        """Play one."""
        use_registry(trainable.registry)
        context = TrialContext(spec, _parse(trainable.config_yaml), world, gpus, never_stop)
        with kept_output(context.folder / output_name(world.rank)):
            try:
                trainable.run_trial(context)
            except (Exception, SystemExit) as failure:  # noqa: BLE001  (a trial may fail in any way)
                traceback.print_exc()
                raise TrialFailedError(f"rank {world.rank}: {reason_of(failure)}") from None
