"""A run as a job of a Ray cluster: its code and its config go there, its log and its exit code come back."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from wattier import broken_amdsmi
from wattier.config import RunConfig, load_config
from wattier.errors import UserError

PACKAGES = ("wattier", "wattier_gnn", "wattier_telemetry")
# Never uploaded: what is large, what is another machine's, and what is nobody's business. As in a .gitignore: a name
# matches in any folder, with a slash before it in the working directory alone (our sample's data must go along).
EXCLUDES = (
    ".git", ".venv", "/venv", "/runs", "/data", "/dist", "/build", "/*.h5", "*.pt", "*.safetensors", "__pycache__",
    ".env", ".netrc", ".pgpass", ".ssh", ".aws", ".ray-token*", "*.pem", "*.key",
)  # fmt: skip
PASSWORD_IN_URL = re.compile(r"\w+://[^/\s:@'\"]*:[^/\s@'\"]+@")
POLL_SECONDS = 2.0
EXIT_FAILURE = 1
START_SECONDS = 30.0  # in which a new cluster may not take jobs yet
LOST_SECONDS = 60.0  # of a cluster that answers no more


class Submitted:
    """A job that was handed over."""

    def __init__(self, client: Any, job: str, address: str) -> None:
        self._client, self.job, self.address = client, job, address

    def how_to(self) -> str:
        """Commands that follow it and stop it."""
        return (
            f"Follow it: ray job logs --follow --address {self.address} {self.job}   "
            f"Stop it: ray job stop --address {self.address} {self.job}"
        )

    def follow(self, write: Callable[[str], None]) -> None:
        """Write its log as it comes, until it ends or the connection does."""

        async def tail() -> None:
            async for lines in self._client.tail_job_logs(self.job):
                write(lines)

        try:
            asyncio.run(tail())
        except (RuntimeError, OSError) as error:
            write(f"The log is followed no more ({_one_line(error)}).\n")

    def wait(self) -> int:
        """Wait for its end.

        Returns:
            The exit code of `wattier run` there; 1 for a job that was stopped, or that Ray could not start.

        Raises:
            UserError: the cluster answers no more.
        """
        last_answer = time.monotonic()
        while True:
            try:
                details = self._client.get_job_info(self.job)
                last_answer = time.monotonic()
                if details.status.is_terminal():
                    break
            except Exception as error:
                if time.monotonic() - last_answer > LOST_SECONDS:
                    raise UserError(
                        f"{self.address}: answers no more ({_one_line(error)}). What the run has done is in its "
                        "run_dir; submit it again to go on."
                    ) from error
            time.sleep(POLL_SECONDS)
        if details.driver_exit_code is not None:
            return int(details.driver_exit_code) if 0 <= details.driver_exit_code < 256 else EXIT_FAILURE
        return 0 if details.status.value == "SUCCEEDED" else EXIT_FAILURE

    def message(self) -> str:
        """What Ray says of its end, in one line."""
        return _one_line(self._client.get_job_info(self.job).message or "")


def submit(config_path: Path, address: str, working_dir: Path) -> Submitted:
    """Hand a run over to the cluster whose dashboard is at an address; returns when it is accepted.

    The packages that are imported here go along, so the nodes need Wattier's dependencies only.

    Raises:
        UserError: the run could not work there, nobody answers, or the cluster refuses us; one line.
    """
    root = working_dir.resolve()
    config = load_config(config_path)
    inside = _refuse(config_path, config, root)
    if not re.match(r"https?://", address):
        raise UserError(f"--address: is {address!r}, but must be the dashboard's, such as http://head:8265.")
    entrypoint = f"python -m wattier run {shlex.quote(inside)}"
    with tempfile.TemporaryDirectory() as folder, broken_amdsmi.hidden(Path(folder) / "hidden"):
        client = _client(address)
        try:
            job = _handed_over(
                client,
                entrypoint=entrypoint,
                runtime_env={"working_dir": str(root), "py_modules": packages(), "excludes": list(EXCLUDES)},
                metadata={"wattier_run": config.name},
            )
        except Exception as error:
            raise UserError(f"{address}: the cluster does not take the job: {_one_line(error)}") from error
        return Submitted(client, job, address)


def _handed_over(client: Any, **job: Any) -> str:
    """The id of a job that was accepted; a cluster that has only just started is asked again."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(POLL_SECONDS)


def packages() -> list[str]:
    """Folders of Wattier's packages, as they are imported here; found without importing torch."""
    found = [importlib.util.find_spec(name) for name in PACKAGES]
    return [str(Path(spec.origin).parent) for spec in found if spec is not None and spec.origin is not None]


def _refuse(config_path: Path, config: RunConfig, root: Path) -> str:
    """Refuse what could not work on another machine; returns the config's path within the working directory."""
    if not config_path.resolve().is_relative_to(root):
        raise UserError(
            f"{config_path}: lies outside of the working directory {root}, which is all that the job sees. "
            "Move it there, or set --working-dir."
        )
    inside = config_path.resolve().relative_to(root)
    pattern = next(filter(lambda text: _is_excluded(inside, text), EXCLUDES), None)
    if pattern is not None:
        raise UserError(f"{config_path}: is not uploaded, as nothing that matches {pattern!r} is. Move it.")
    if PASSWORD_IN_URL.search(config_path.read_text(encoding="utf-8")):
        raise UserError(
            f"{config_path}: holds a URL with a password, which whoever reaches the cluster could read. "
            "Leave the password to PGPASSFILE or its like on the nodes."
        )
    if config.resources.address is not None:
        raise UserError(
            f"{config_path}: resources.address is {config.resources.address!r}, but must be left out: the job runs on "
            "the cluster that it is submitted to."
        )
    paths = {"run_dir": config.run_dir, "data.store": config.data.store}
    paths |= {f"data.sources.{name}": path for name, path in config.data.sources.items() if path != "sample"}
    for name, path in paths.items():
        if path is not None and not Path(path).expanduser().is_absolute():
            raise UserError(
                f"{config_path}: {name} is {path!r}, but must be an absolute path, shared by all nodes: a job runs in "
                "a copy of the working directory that is thrown away."
            )
    return str(inside)


def _is_excluded(inside: Path, pattern: str) -> bool:
    parts = inside.parts[:1] if pattern.startswith("/") else inside.parts
    return any(fnmatch(part, pattern.removeprefix("/")) for part in parts)


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except Exception as error:
        text = _one_line(error)
        if "401" in text or "403" in text or "authentication" in text.lower():
            given = os.environ.get("RAY_AUTH_TOKEN_PATH", "no token")
            raise UserError(
                f"{address}: the cluster asks for another token (given: {given}). Set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN_PATH to a file with the cluster's."
            ) from error
        raise UserError(
            f"{address}: no Ray cluster answers here ({text}). Give the address of its dashboard, such as "
            "http://head:8265."
        ) from error


def _one_line(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} [...]"
