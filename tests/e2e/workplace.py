"""The command as a user runs it: real processes, a fresh HOME, a run directory of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

REPOSITORY = Path(__file__).parents[2]
WITNESS = Path(__file__).with_name("observed.py")
TIMEOUT_SECONDS = 280
STARTED: list[subprocess.Popen[str]] = []


@dataclass
class Workplace:
    """A folder with a config, and the commands run in it."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def config_path(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def run_dir(self) -> Path:
        return Path(self.config["run_dir"])

    @property
    def witness_folder(self) -> Path:
        return self.folder / "witness"

    def write(self) -> None:
        self.config_path.write_text(yaml.safe_dump(self.config))

    def start(self, *arguments: str, witnessed: bool = False) -> subprocess.Popen[str]:
        """Start `wattier ARGUMENTS`, as the leader of a session of its own."""
        program = [sys.executable, str(WITNESS)] if witnessed else [sys.executable, "-m", "wattier"]
        self.witness_folder.mkdir(exist_ok=True)
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "HOME": str(home),
            "WITNESS_FOLDER": str(self.witness_folder),
            "PYTHONPATH": str(WITNESS.parent),
            "WATTIER_REGISTRY": str(self.folder / "registry"),
            **self.environment,
        }
        process = subprocess.Popen(
            [*program, *arguments], cwd=self.folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        STARTED.append(process)
        return process

    def wattier(self, *arguments: str, witnessed: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        process = self.start(*arguments, witnessed=witnessed)
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def kill_when(self, condition: Callable[[], bool], *arguments: str, witnessed: bool = False) -> None:
        """Start a command, and SIGKILL its driver as soon as a condition holds."""
        process = self.start(*arguments, witnessed=witnessed)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not condition():
            assert process.poll() is None, f"ended before the moment to kill it: {process.communicate()}"
            assert time.monotonic() < deadline, "the moment to kill never came"
            time.sleep(0.002)
        process.kill()
        process.communicate()

    def rows(self) -> list[dict[str, Any]]:
        path = self.run_dir / "trials.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def snapshot(self) -> dict[str, tuple[int, int]]:
        files = [path for path in self.run_dir.rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def end_all() -> None:
    """Kill the commands that still run, as after a time limit: with them ends their Ray, which would hold the cores."""
    for process in STARTED:
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=60)


def ray_processes() -> list[psutil.Process]:
    """Ray processes of the commands started here, told by the driver's pid in their folder's name."""
    folders = [f"wattier-ray-{process.pid}-" for process in STARTED]
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if any(folder in line for folder in folders):
            found.append(process)
    return found
