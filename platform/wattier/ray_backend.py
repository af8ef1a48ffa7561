"""Trials as Ray Tune functions: the only file that imports Ray.

A trial is one Tune function in a placement group with a bundle for each rank; the function is rank 0, the other ranks
are actors in the other bundles, kept from one trial to the next. Searching is left to the policy: Tune asks it through
a thin searcher and a thin scheduler. Tune's own experiment state is never restored.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

# Ray binds to all interfaces unless told so before it is imported; it reads the others at import time too.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "60")  # a stopped trial unwinds before its actor is reused
os.environ.setdefault("TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S", "120")

from wattier import broken_amdsmi
from wattier.config import ResourcesSection
from wattier.errors import UserError
from wattier.launch import (
    NotNow,
    OnResult,
    Policy,
    Stage,
    check_local_resources,
    free_port,
    gpus_per_rank,
    never_stop,
    runs_here,
    usable_cpus,
    write_traceback,
)
from wattier.node_exporters import (
    ExporterPlan,
    NodeExporter,
    NodeExporters,
    Outcome,
    registry_of_command,
    use_registry,
)
from wattier.records import EpochRecord, Proposal
from wattier.trial import RunTrial, TrialContext, TrialSpec
from wattier_gnn.distributed import World

log = logging.getLogger(__name__)
OBJECT_STORE_BYTES = 100 * 1024 * 1024  # trials read the store from disk and pass only small records
RESULT_WAIT_SECONDS = 60
EXPORTER_WAIT_SECONDS = 20  # a worker process starts in a second or two; a stage does not wait for ever for a picture
LONGEST_ROOT = 12  # characters; a Unix socket's path has at most 107, of which our folder takes 31 and Ray's names 64


class RayLauncher:
    """Runs trials on Ray: a private cluster on this machine, or a running one by its address.

    The cluster starts with the first stage and lasts until `close`: a process can hold one token only.
    """

    def __init__(self) -> None:
        self._cluster = contextlib.ExitStack()
        self._exporters = NodeExporters(_RayNodes())
        self._started = False

    def run(self, stage: Stage, policy: Policy, run_trial: RunTrial, on_result: OnResult) -> None:
        """See `Launcher.run`."""
        if runs_here(stage.config):
            check_local_resources(stage)
        if not self._started:
            self._cluster.enter_context(_cluster(stage.config.resources))
            self._cluster.callback(self._exporters.close)
            self._started = True
        _check_cluster_resources(stage)
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


@contextmanager
def _cluster(resources: ResourcesSection) -> Iterator[None]:
    """Connect to Ray for the length of the block; a private cluster ends with it."""
    private = resources.address is None and "RAY_ADDRESS" not in os.environ
    if private:
        # Everything on loopback, for this user alone.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["RAY_AUTH_MODE"] = "token"
    with contextlib.ExitStack() as stack:
        folder = _scratch_folder("wattier-ray")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.enter_context(broken_amdsmi.hidden(folder / "hidden"))
        options: dict[str, Any] = {"address": resources.address or os.environ.get("RAY_ADDRESS")}
        if private:
            token = folder / "token"
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
            options = {
                "address": "local",
                "include_dashboard": False,
                "num_cpus": usable_cpus(),
                "object_store_memory": OBJECT_STORE_BYTES,
                "_temp_dir": str(folder / "r"),  # which Ray opens to all users; the folder around it stays ours
            }
        import ray

        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **options)
        except ConnectionError as error:
            raise UserError(
                f"resources.address: no Ray cluster answers at {options['address']!r} ({error}). "
                "Give the address of a running one, or leave it out for a private one."
            ) from error
        stack.callback(ray.shutdown)
        if not log.isEnabledFor(logging.INFO):
            for name in ("ray.tune", "ray._private.worker"):  # a failed trial's traceback is in its error.txt
                logging.getLogger(name).setLevel(logging.CRITICAL)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts in one that skips our clean-up
        yield


def _scratch_folder(name: str) -> Path:
    """A folder of this process alone; those that killed processes left behind are removed on the way.

    Ray puts Unix sockets in it, whose paths must be short: a long TMPDIR is not used.
    """
    root = Path(tempfile.gettempdir())
    root = root if len(str(root)) <= LONGEST_ROOT else Path("/tmp")
    for folder in root.glob(f"{name}-*-*"):
        owner = folder.name.removeprefix(f"{name}-").split("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{name}-{os.getpid()}-", dir=root))


def _check_cluster_resources(stage: Stage) -> None:
    """Refuse a stage that would wait for ever."""
    import ray

    have: Mapping[str, float] = ray.cluster_resources()
    for name, each in _bundle(stage.config.resources, stage.fidelity.ranks).items():
        wanted = each * stage.fidelity.ranks
        if wanted > have.get(name, 0):
            raise UserError(
                f"stage {stage.fidelity.stage!r}: asks for {stage.fidelity.ranks} ranks of {each:g} {name} each, "
                f"but the Ray cluster has {have.get(name, 0):g} {name}. Lower ranks or resources, or add nodes."
            )


def _bundle(resources: ResourcesSection, ranks: int) -> dict[str, float]:
    """What one of a trial's ranks is given."""
    import ray

    gpus = gpus_per_rank(resources.gpus_per_rank, ranks, ray.cluster_resources().get("GPU", 0.0))
    bundle = {"CPU": float(resources.cpus_per_rank)}
    return bundle | ({"GPU": gpus} if gpus else {})


def _run_tune(stage: Stage, policy: Policy, run_trial: RunTrial, on_result: OnResult) -> None:
    from ray import tune

    driver = _Driver(stage, policy, on_result)
    resources = stage.config.resources
    bundles = [_bundle(resources, stage.fidelity.ranks)] * stage.fidelity.ranks
    scratch = _scratch_folder("wattier-tune")
    try:
        tune.Tuner(
            tune.with_resources(
                _Trainable(run_trial, stage.config.to_yaml(), registry_of_command()).as_function(),
                tune.PlacementGroupFactory(bundles, strategy="PACK"),
            ),
            tune_config=tune.TuneConfig(
                num_samples=-1,
                search_alg=_searcher(driver),
                scheduler=_scheduler(driver),
                reuse_actors=True,
                max_concurrent_trials=stage.config.search.max_concurrent,
            ),
            run_config=tune.RunConfig(
                name=stage.fidelity.stage,
                storage_path=str(scratch),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=resources.retries),
            ),
        ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    driver.collect(wait_seconds=RESULT_WAIT_SECONDS)


class _Driver:
    """Turns Tune's endings into our results, once the trial's own processes have written their last word."""

    def __init__(self, stage: Stage, policy: Policy, on_result: OnResult) -> None:
        self.stage, self.policy, self.on_result = stage, policy, on_result
        self.started: dict[str, Proposal] = {}
        self.unwinding: dict[str, str | None] = {}

    def ended(self, tune_trial_id: str, error: str | None) -> None:
        """Tune is done with a trial; a stopped one may still be unwinding."""
        self.unwinding[tune_trial_id] = error
        self.collect()

    def collect(self, wait_seconds: float = 0.0) -> None:
        """Record every ended trial whose result is there, or whose result will not come."""
        deadline = time.monotonic() + wait_seconds
        while self.unwinding:
            for tune_id, error in list(self.unwinding.items()):
                proposal = self.started[tune_id]
                folder = self.stage.run.trial_folder(self.stage.fidelity.stage, proposal.trial_id)
                overdue = wait_seconds > 0 and time.monotonic() >= deadline
                if (folder / "result.json").exists() or error is not None or overdue:
                    del self.unwinding[tune_id]
                    result = self.stage.outcome(proposal, _last_line(folder / "error.txt") or error)
                    self.policy.on_result(result)
                    self.on_result(result)
            if time.monotonic() >= deadline:
                return
            time.sleep(0.05)


def _last_line(path: Path) -> str | None:
    return path.read_text().strip().splitlines()[-1] if path.exists() else None


def _searcher(driver: _Driver) -> Any:
    """What Tune asks for the next trial. What Tune pickles of it is empty, and its copies are itself."""
    from ray.tune.search import Searcher

    class PolicySearcher(Searcher):
        def suggest(self, trial_id: str) -> dict[str, Any] | Any:
            proposal = driver.policy.propose()
            if proposal is None:
                return Searcher.FINISHED
            if isinstance(proposal, NotNow):
                return None  # Tune asks again
            driver.started[trial_id] = proposal
            return {"spec": driver.stage.open_trial(proposal)}

        def on_trial_complete(
            self,
            trial_id: str,
            result: dict[str, Any] | None = None,  # noqa: ARG002
            error: bool = False,
        ) -> None:
            driver.ended(trial_id, "the trial's process died" if error else None)

        def save(self, checkpoint_path: str) -> None:
            """Nothing: the run directory is the state."""

        def restore(self, checkpoint_path: str) -> None:
            """Nothing: the run directory is the state."""

        def __reduce__(self) -> tuple[Any, ...]:
            return (Searcher, ())

        def __deepcopy__(self, memo: dict[int, Any]) -> PolicySearcher:
            return self

    return PolicySearcher()


def _scheduler(driver: _Driver) -> Any:
    """What Tune asks after each epoch whether a trial goes on; pickled and copied as the searcher is."""
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler

    class PolicyScheduler(FIFOScheduler):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ARG002
            driver.collect()
            if "record_json" not in result:
                return str(TrialScheduler.CONTINUE)
            record = EpochRecord.from_dict(json.loads(result["record_json"]))
            go_on = driver.policy.on_epoch(driver.started[trial.trial_id].trial_id, record)
            return str(TrialScheduler.CONTINUE if go_on else TrialScheduler.STOP)

        def __reduce__(self) -> tuple[Any, ...]:
            return (FIFOScheduler, ())

        def __deepcopy__(self, memo: dict[int, Any]) -> PolicyScheduler:
            return self

    return PolicyScheduler()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Trainable:
    """What Tune pickles and sends to its actors."""

    run_trial: RunTrial
    config_yaml: str
    registry: str | None

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

        use_registry(self.registry)
        config = _parse(self.config_yaml)
        size = spec.fidelity.ranks
        bundle = _bundle(config.resources, size)
        gpus = bundle.get("GPU", 0.0)
        address, port = ray.util.get_node_ip_address(), free_port()
        ranks = _rank_actors(size, bundle) if size > 1 else []
        running = [
            actor.run.remote(self, spec, World(rank, size, address, port), gpus)
            for rank, actor in enumerate(ranks, start=1)
        ]

        def report(record: EpochRecord) -> bool:
            # As text: Tune flattens nested results, and stumbles over a loss that is None or NaN.
            tune.report({"record_json": json.dumps(record.to_dict()), "epoch": record.epoch})
            return True  # a stop arrives as SystemExit inside tune.report

        stage = _bare_stage(spec, config)
        try:
            self.run_trial(TrialContext(spec, config, World(0, size, address, port), gpus, report))
            ray.get(running)
        except Exception:
            write_traceback(stage, spec)
            _drop_rank_actors()
            raise


def _parse(text: str) -> Any:
    import yaml

    from wattier.config import RunConfig

    return RunConfig.model_validate(yaml.safe_load(text))


def _bare_stage(spec: TrialSpec, config: Any) -> Stage:
    from wattier.rundir import RunDir

    return Stage(RunDir(Path(spec.run_dir)), config, spec.fidelity, n_trials=0)


_RANKS: dict[str, list[Any]] = {}  # placement group -> its rank actors, kept while Tune reuses this process


def _rank_actors(size: int, bundle: dict[str, float]) -> list[Any]:
    """Actors for ranks 1 ... size-1 of this placement group, new or left from the trial before."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = ray.util.get_current_placement_group()
    if group is None:
        raise RuntimeError("a trial of several ranks runs outside of a placement group")
    key = group.id.hex()
    if key not in _RANKS:
        _drop_rank_actors()
        _RANKS[key] = [
            ray.remote(_Rank)
            .options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            )
            .remote()
            for index in range(1, size)
        ]
    return _RANKS[key]


def _drop_rank_actors() -> None:
    """After a failure the other ranks may hang in a collective: end them, the next trial makes new ones."""
    import ray

    for actors in _RANKS.values():
        for actor in actors:
            ray.kill(actor)
    _RANKS.clear()


class _Rank:
    """A process that plays one rank after another."""

    def run(self, trainable: _Trainable, spec: TrialSpec, world: World, gpus: float) -> None:
        use_registry(trainable.registry)
        trainable.run_trial(TrialContext(spec, _parse(trainable.config_yaml), world, gpus, never_stop))
