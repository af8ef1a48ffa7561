"""A Ray cluster: a private one on this machine, or a running one by its address, and what its nodes could hold."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
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
from wattier.launch import Stage, gpus_per_rank, usable_cpus

log = logging.getLogger(__name__)
OBJECT_STORE_BYTES = 100 * 1024 * 1024  # trials read the store from disk and pass only small records
TOO_SLOW = "timed out during startup"  # Ray's word after 30 s
KILL_SECONDS = 10.0
LONGEST_ROOT = 12  # characters; a Unix socket's path has at most 107, of which our folder takes 31 and Ray's names 64

Bundle = dict[str, float]


@cache
def _token() -> str:
    """The token of this process's private clusters: Ray reads one once, whatever file is named later."""
    return secrets.token_hex(32)


@contextmanager
def cluster(resources: ResourcesSection) -> Iterator[str | None]:
    """Connect to Ray for the length of the block; a private cluster ends with it. Yields the URL of Ray's dashboard.

    Raises:
        UserError: no cluster answers at the address.
    """
    private = resources.address is None and "RAY_ADDRESS" not in os.environ
    if private:
        # Everything on loopback, for this user alone.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["RAY_AUTH_MODE"] = "token"
    with contextlib.ExitStack() as stack:
        folder = scratch_folder("wattier-ray")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.enter_context(broken_amdsmi.hidden(folder / "hidden"))
        options: dict[str, Any] = {"address": resources.address or os.environ.get("RAY_ADDRESS")}
        if private:
            token = folder / "token"
            token.touch(mode=0o600)
            token.write_text(_token())
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
            context = _started(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **options)
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
        address = getattr(context, "dashboard_url", None)
        yield f"http://{address}" if address else None


def _started(**options: Any) -> Any:
    """`ray.init`; a machine that is so busy that Ray gives up its own start is given a second chance."""
    import ray

    before = set(psutil.Process().children(recursive=True))
    try:
        return ray.init(**options)
    except Exception as error:
        if TOO_SLOW not in str(error):
            raise
        log.warning("Ray took too long to start on this machine; once more")
        half_started = set(psutil.Process().children(recursive=True)) - before  # Ray leaves them alone
        for process in half_started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(list(half_started), timeout=KILL_SECONDS)
        return ray.init(**options | {"_temp_dir": f"{options['_temp_dir']}2"})


def scratch_folder(name: str) -> Path:
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


def bundle_of(resources: ResourcesSection, ranks: int) -> Bundle:
    """What one of a trial's ranks is given."""
    import ray

    gpus = gpus_per_rank(resources.gpus_per_rank, ranks, ray.cluster_resources().get("GPU", 0.0))
    bundle = {"CPU": float(resources.cpus_per_rank)}
    return bundle | ({"GPU": gpus} if gpus else {})


def own_node_lives() -> bool:
    """Whether the node that this process is connected by is still part of the cluster."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == own and node["Alive"] for node in ray.nodes())


def what_is_missing(bundle: Bundle, ranks: int) -> str | None:
    """Why the nodes that are alive could not hold a trial even if all were idle; None = they could."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return missing_of(bundle, ranks, nodes)


def missing_of(bundle: Bundle, ranks: int, nodes: Sequence[Bundle]) -> str | None:
    """The same, for given nodes. A rank lies on one node; the ranks of a trial may lie on several."""
    for name, each in bundle.items():
        have = sum(node.get(name, 0.0) for node in nodes)
        if each * ranks > have + 1e-6:
            return (
                f"asks for {ranks} ranks of {each:g} {name} each, but the Ray cluster has {have:g} {name} "
                f"on {len(nodes)} nodes"
            )
    places = sum(min(int(node.get(name, 0.0) / each + 1e-6) for name, each in bundle.items()) for node in nodes)
    if places < ranks:
        wanted = " and ".join(f"{each:g} {name}" for name, each in bundle.items())
        return f"asks for {ranks} ranks of {wanted} each, each on one node, but the Ray cluster has room for {places}"
    return None


def check_cluster_resources(stage: Stage) -> None:
    """Refuse a stage that would wait for ever.

    Raises:
        UserError: the cluster could not hold one trial.
    """
    bundle = bundle_of(stage.config.resources, stage.fidelity.ranks)
    missing = what_is_missing(bundle, stage.fidelity.ranks)
    if missing:
        raise UserError(f"stage {stage.fidelity.stage!r}: {missing}. Lower ranks or resources, or add nodes.")
