"""The launcher that runs trials with Ray Tune.

A trial is one Tune function in a placement group with a bundle for each rank; the function is rank 0, the other ranks
are actors in the other bundles, kept from one trial to the next. Searching is left to the policy: Tune asks it through
a thin searcher and a thin scheduler. Tune's own experiment state is never restored.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from wattier.launch import OnResult, Policy, Stage, check_local_resources, runs_here
from wattier.node_exporters import (
    ExporterPlan,
    NodeExporter,
    NodeExporters,
    Outcome,
    registry_of_command,
)
from wattier.ray_cluster import bundle_of, check_cluster_resources, cluster, scratch_folder
from wattier.ray_driver import Driver, callback_of, scheduler_of, searcher_of
from wattier.ray_ranks import Trainable
from wattier.trial_context import RunTrial

EXPORTER_WAIT_SECONDS = 20  # a worker process starts in a second or two; a stage does not wait for ever for a picture


class RayLauncher:
    """Runs trials on Ray: a private cluster on this machine, or a running one by its address.

    The cluster starts with the first stage and lasts until `close`: a process can hold one token only.
    """

    def __init__(self) -> None:
        self._cluster = contextlib.ExitStack()
        self._exporters = NodeExporters(_RayNodes())
        self._started = False
        self.dashboard_url: str | None = None

    def run(self, stage: Stage, policy: Policy, run_trial: RunTrial, on_result: OnResult) -> None:
        """See `Launcher.run`."""
        if runs_here(stage.config):
            check_local_resources(stage)
        if not self._started:
            self.dashboard_url = self._cluster.enter_context(cluster(stage.config.resources))
            self._cluster.callback(self._exporters.close)
            self._started = True
        check_cluster_resources(stage)
        self._exporters.ensure(ExporterPlan.of(stage.run, stage.config.telemetry))
        _run_tune(stage, policy, run_trial, on_result)

    def close(self) -> None:
        """Leave the cluster; a private one ends, with every process in it."""
        self._cluster.close()


class _RayNodes:
    """The nodes of the cluster, and an actor on each: apart from the trials, without a core of theirs."""

    def alive(self) -> list[str]:
        import ray

        return [node["NodeID"] for node in ray.nodes() if node["Alive"]]

    def start(self, plan: ExporterPlan, node: str) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        where = NodeAffinitySchedulingStrategy(node, soft=False)
        return ray.remote(NodeExporter).options(num_cpus=0, scheduling_strategy=where).remote(plan)

    def ask(self, handles: Mapping[str, Any]) -> dict[str, Outcome]:
        import ray

        outcomes = {}
        asked = {actor.outcome.remote(): node for node, actor in handles.items()}
        for answer in _answered(list(asked), EXPORTER_WAIT_SECONDS):
            with contextlib.suppress(ray.exceptions.RayError):
                outcomes[asked[answer]] = ray.get(answer)
        return outcomes

    def stop(self, handles: Sequence[Any]) -> None:
        import ray

        _answered([actor.close.remote() for actor in handles], EXPORTER_WAIT_SECONDS)
        for actor in handles:
            ray.kill(actor)


def _answered(asked: list[Any], wait_seconds: float) -> list[Any]:
    """Those of some calls that came back in time, or failed."""
    import ray

    return list(ray.wait(asked, num_returns=len(asked), timeout=wait_seconds)[0]) if asked else []


def _run_tune(stage: Stage, policy: Policy, run_trial: RunTrial, on_result: OnResult) -> None:
    from ray import tune

    resources, ranks = stage.config.resources, stage.fidelity.ranks
    driver = Driver(stage, policy, on_result, bundle_of(resources, ranks))
    scratch = scratch_folder("wattier-tune")
    try:
        tune.Tuner(
            tune.with_resources(
                Trainable(run_trial, stage.config.to_yaml(), registry_of_command(), driver.bundle).as_function(),
                tune.PlacementGroupFactory([driver.bundle] * ranks, strategy="PACK"),
            ),
            tune_config=tune.TuneConfig(
                num_samples=-1,
                search_alg=searcher_of(driver),
                scheduler=scheduler_of(driver),
                reuse_actors=True,
                max_concurrent_trials=stage.config.search.max_concurrent,
            ),
            run_config=tune.RunConfig(
                name=stage.fidelity.stage,
                storage_path=str(scratch),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=resources.retries),
                callbacks=[callback_of(driver)],
            ),
        ).fit()
    except Exception:
        if driver.problem is not None:
            raise driver.problem from None
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    driver.collect(wait=True)
