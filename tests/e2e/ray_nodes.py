"""A Ray cluster of several emulated nodes on this machine, on loopback and behind a token, and the death of its nodes.

Each node has a raylet, workers and agents of its own, as on a machine of its own; they share its address. The nodes are
started by a child process (this file as a script), since Ray holds one token a process and reads it at import.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

REPOSITORY = Path(__file__).parents[2]
START_SECONDS = 120
OBJECT_STORE_BYTES = 80 * 1024 * 1024
QUICK_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}


class RayNodes:
    """The cluster for the length of a block: ``with RayNodes(cpus=(2, 2)) as nodes``; node 0 is the head."""

    def __init__(self, cpus: tuple[int, ...] = (2, 2), pythonpath: tuple[Path, ...] = (), **environment: str) -> None:
        self.cpus, self._extra = cpus, environment
        self.folder = Path(tempfile.mkdtemp(prefix="wn-", dir="/tmp"))  # short: Unix sockets lie in it
        self.token = self.folder / "token"
        self.hidden = self.folder / "hidden"  # Ray 2.60 dies wherever amdsmi is installed and finds no library of AMD's
        self.pythonpath = os.pathsep.join(map(str, (self.hidden, *pythonpath)))
        self._lost: set[int] = set()

    def __enter__(self) -> RayNodes:
        self.token.touch(mode=0o600)
        self.token.write_text(secrets.token_hex(32))
        self.hidden.mkdir()
        (self.folder / "ray").mkdir()  # where Ray notes the cluster's address, for this cluster's clients alone
        (self.hidden / "amdsmi.py").write_text("raise ImportError")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "WATTIER_"))} | {
            "HOME": str(self.folder),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": self.pythonpath,
            "OMP_NUM_THREADS": "1",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_TMPDIR": str(self.folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            "WATTIER_REGISTRY": str(self.folder / "registry"),
            **self._extra,
        }
        self._log = (self.folder / "log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self.folder), *map(str, self.cpus)], env=self.environment, cwd=self.folder,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            started = self._answer()
        except BaseException:
            self._end()
            raise
        self.address, self.dashboard, self.raylets = started["address"], started["dashboard"], started["raylets"]
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def client_environment(self, **more: str) -> dict[str, str]:
        """For a command that talks to the cluster, from outside of it."""
        return {**self.environment, "RAY_ADDRESS": self.dashboard, **more}

    def kill_node(self, index: int) -> None:
        """SIGKILL every process of a node at once, as a machine that loses its power."""
        self._lost.add(index)
        raylet = psutil.Process(self.raylets[index])
        family = [raylet, *raylet.children(recursive=True)]
        for process in family:  # first all stop, so that none can react to the death of another
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)

    def others(self) -> list[int]:
        """Nodes that live, the head aside."""
        return [index for index in range(1, len(self.raylets)) if index not in self._lost]

    def add_node(self, cpus: int) -> None:
        """Let another node join."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"add {cpus}\n")
        self._process.stdin.flush()
        self.raylets = self._answer()["raylets"]

    def workers(self, index: int) -> list[psutil.Process]:
        """Worker processes of a node that run something of ours, idle ones aside."""
        found = []
        for process in psutil.Process(self.raylets[index]).children(recursive=True):
            line = _command(process)
            if "ImplicitFunc" in line or "ray::Rank" in line:
                found.append(process)
        return found

    def submit(
        self, *command: str, working_dir: Path = REPOSITORY, env: dict[str, str] | None = None
    ) -> subprocess.Popen:
        """`ray job submit` of a command, as README and configs/ray/runtime_env.yaml tell it."""
        runtime = yaml.safe_load((REPOSITORY / "configs/ray/runtime_env.yaml").read_text())
        runtime["env_vars"] |= env or {}
        runtime["env_vars"]["PYTHONPATH"] += f"{os.pathsep}{self.pythonpath}"
        path = self.folder / f"runtime{time.monotonic_ns()}.yaml"
        path.write_text(yaml.safe_dump(runtime))
        ray = Path(sys.executable).with_name("ray")
        return subprocess.Popen(
            [ray, "job", "submit", f"--address={self.dashboard}", f"--working-dir={working_dir}",
             f"--runtime-env={path}", "--", *command],
            env=self.client_environment(), cwd=working_dir, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def listening(self) -> list[Any]:
        """Sockets that processes of the cluster listen on."""
        found = []
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                found += [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        return found

    def _processes(self) -> list[psutil.Process]:
        """Every process of the cluster, also one whose parent is gone: all name our folder, or descend from one."""
        found = [process for process in psutil.process_iter() if str(self.folder) in _command(process)]
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(self._process.pid))
        for process in list(found):
            with contextlib.suppress(psutil.NoSuchProcess):
                found += process.children(recursive=True)
        return list({process.pid: process for process in found if process.pid != os.getpid()}.values())

    def _answer(self) -> dict[str, Any]:
        import selectors

        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            assert selector.select(START_SECONDS), f"the cluster did not answer: {(self.folder / 'log').read_text()}"
        line = self._process.stdout.readline()
        assert line, f"the cluster ended: {(self.folder / 'log').read_text()[-3000:]}"
        return json.loads(line)

    def _end(self) -> None:
        family = {process.pid: process for process in self._processes()}
        for process in family.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(list(family.values()), timeout=10)
        self._process.wait(timeout=10)
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def serve(folder: Path, cpus: list[int]) -> None:
    """The child process: start the nodes, say where they are, add nodes on request, until it is killed."""
    import socket

    said = os.dup(1)
    os.dup2(2, 1)  # what Ray prints is no answer
    from ray._private.utils import write_ray_address
    from ray.cluster_utils import Cluster

    from wattier.ports import free_port

    port, agent_port = free_port(), free_port()
    common = {"node_ip_address": "127.0.0.1", "object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(shutdown_at_exit=False)
    raylets = []

    def add(count: int, **more: Any) -> None:
        # A folder each: on machines of their own, nodes do not clear away each other's copies of a working directory.
        temp_dir = str(folder / f"r{len(raylets)}")
        node = cluster.add_node(num_cpus=count, temp_dir=temp_dir, **common, **more)
        # As `ray start` does: where nothing is noted, Ray tells a job to join any cluster that it finds on the machine.
        write_ray_address(cluster.address, temp_dir)
        raylets.append(node.all_processes["raylet"][0].process.pid)

    add(
        cpus[0], include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port=port,
        dashboard_agent_listen_port=agent_port, _system_config=QUICK_HEALTH_CHECKS,
    )  # fmt: skip
    for count in cpus[1:]:
        add(count)
    for _ in range(START_SECONDS * 10):  # jobs are handed to the head's agent, which comes up last
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", agent_port)) == 0:
                break
        time.sleep(0.1)
    while True:
        answer = {"address": cluster.address, "dashboard": f"http://127.0.0.1:{port}", "raylets": raylets}
        os.write(said, (json.dumps(answer) + "\n").encode())
        request = sys.stdin.readline().split()
        if not request:
            return
        add(int(request[1]))


if __name__ == "__main__":
    serve(Path(sys.argv[1]), [int(text) for text in sys.argv[2:]])
