"""The folder ``platform/`` never hides the standard library's module of that name, not even in a Ray job."""

import contextlib
import ipaddress
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import yaml

from wattier.ports import free_port

REPOSITORY = Path(__file__).parents[2]
PROBE = "import uuid, platform; print('system is', platform.system())"
JOB = f"{PROBE}; import wattier; print('wattier is', wattier.__file__)"
START_SECONDS = 60


def test_the_folder_is_no_package():
    assert not (REPOSITORY / "platform/__init__.py").exists()


def test_the_standard_library_wins_in_the_root_folder():
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout == f"system is {platform.system()}\n"


def test_the_standard_library_wins_under_pytest():
    assert platform.system()
    assert not Path(platform.__file__).is_relative_to(REPOSITORY / "platform")


@pytest.fixture
def cluster():
    """A Ray head of this test alone, on loopback, behind a token; the environment and the address to reach it by."""
    folder = Path(tempfile.mkdtemp(prefix="wj-", dir="/tmp"))  # short: Unix sockets lie in it
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    hidden = folder / "hidden"  # Ray 2.60 dies wherever amdsmi is installed and finds no library of AMD's
    hidden.mkdir()
    (hidden / "amdsmi.py").write_text("raise ImportError")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "HOME": str(folder),
        "PYTHONPATH": str(hidden),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    ports = {"port": free_port(), "dashboard-port": free_port(), "dashboard-agent-listen-port": free_port(),
             "ray-client-server-port": free_port()}  # fmt: skip
    options = [f"--{name}={port}" for name, port in ports.items()]
    head = subprocess.Popen(
        [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
         "--dashboard-host=127.0.0.1", "--include-dashboard=true", "--num-cpus=1", f"--temp-dir={folder}",
         "--object-store-memory=100000000", *options],
        env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(ports["dashboard-port"], head)
        yield environment, f"http://127.0.0.1:{ports['dashboard-port']}", head
    finally:
        end(head)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(port, head):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert head.poll() is None, "the Ray head ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError("the Ray head did not start")


def end(head):
    """End the head and its children, by their ids."""
    family = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
    for process in reversed(family):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(family, timeout=10)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)
    head.wait(timeout=5)


@pytest.mark.timeout(240)
def test_the_standard_library_wins_in_a_ray_job(cluster, tmp_path):
    environment, address, head = cluster
    runtime = yaml.safe_load((REPOSITORY / "configs/ray/runtime_env.yaml").read_text())
    runtime["env_vars"]["PYTHONPATH"] += f":{environment['PYTHONPATH']}"
    (tmp_path / "runtime_env.yaml").write_text(yaml.safe_dump(runtime))
    done = subprocess.run(
        [Path(sys.executable).with_name("ray"), "job", "submit", f"--address={address}", "--working-dir=.",
         f"--runtime-env={tmp_path / 'runtime_env.yaml'}", "--", sys.executable, "-c", JOB],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"system is {platform.system()}" in done.stdout
    used = re.search(r"wattier is (\S+)", done.stdout)
    assert used, done.stdout
    assert not Path(used[1]).is_relative_to(REPOSITORY), "the job must use the copy that was submitted with it"
    listening = [
        c for p in psutil.Process(head.pid).children(recursive=True) for c in sockets_of(p)
        if c.status == psutil.CONN_LISTEN
    ]  # fmt: skip
    assert listening
    assert all(is_loopback(c.laddr.ip) for c in listening)


def is_loopback(text):
    address = ipaddress.ip_address(text)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def sockets_of(process):
    try:
        return process.net_connections(kind="inet")
    except psutil.Error:
        return []
