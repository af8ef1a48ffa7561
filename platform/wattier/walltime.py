"""How long this process may last: what the user says, or the batch system whose job it runs in."""

from __future__ import annotations

import math
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import NamedTuple

from wattier.errors import UserError

ASK_SECONDS = 10.0  # a batch system that is overloaded is not waited for longer
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2}(?:\.\d+)?)")


class Limit(NamedTuple):
    """The moment at which the job ends, s since the epoch (Unix), and who says so."""

    at_seconds: float
    source: str


def limit_of(walltime: str | None, configured_seconds: float | None, now: float | None = None) -> Limit | None:
    """The earliest of the limits that are known; None = nobody has set one.

    Args:
        walltime: of the command line, from now on.
        configured_seconds: of the config, from now on.
        now: s since the epoch.

    Raises:
        UserError: the command line's is no time.
    """
    now = time.time() if now is None else now
    limits = [job_limit(now=now)]
    if walltime is not None:
        limits.append(Limit(now + _given(walltime), "--walltime"))
    if configured_seconds is not None:
        limits.append(Limit(now + configured_seconds, "resources.walltime_seconds"))
    return min((limit for limit in limits if limit is not None), default=None)


def seconds_of(text: str) -> float:
    """Seconds of a time in the way of batch systems: S, M:S, H:M:S, and D- before it with H, H:M or H:M:S.

    Raises:
        ValueError: it is no such time, as UNLIMITED is none.
    """
    found = _TIME.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no time")
    parts = [float(part) for part in found["rest"].split(":")]
    if found["days"] is None:
        return math.fsum(value * 60**power for power, value in enumerate(reversed(parts)))
    hours, minutes, seconds = (*parts, 0.0, 0.0)[:3]
    return int(found["days"]) * 86400 + hours * 3600 + minutes * 60 + seconds


def job_limit(
    environment: Mapping[str, str] | None = None,
    ask: Callable[[list[str]], str | None] | None = None,
    now: float | None = None,
) -> Limit | None:
    """When the batch job ends that this process is part of; None = it is part of none, or the job has no limit.

    Slurm says it in the environment since 22.05, and to squeue before; PBS to qstat, Flux to flux.
    """
    environment = os.environ if environment is None else environment
    ask, now = ask or _ask, time.time() if now is None else now
    if (job := environment.get("SLURM_JOB_ID")) is not None:
        if environment.get("SLURM_JOB_END_TIME", "").isdigit():
            return Limit(float(environment["SLURM_JOB_END_TIME"]), "SLURM_JOB_END_TIME")
        return _after(ask(["squeue", "--noheader", "--jobs", job, "--format", "%L"]), now, "squeue")
    if (job := environment.get("PBS_JOBID")) is not None:
        return _of_pbs(ask(["qstat", "-f", job]) or "", now)
    if "FLUX_JOB_ID" in environment:
        return _after(ask(["flux", "job", "timeleft"]), now, "flux job timeleft")
    return None


def _given(walltime: str) -> float:
    try:
        seconds = seconds_of(walltime)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise UserError(
            f"--walltime: is {walltime!r}, but must be a time above 0: seconds, HH:MM:SS or D-HH:MM:SS, "
            "as Slurm's --time has it."
        )
    return seconds


def _after(answer: str | None, now: float, source: str) -> Limit | None:
    try:
        return None if answer is None else Limit(now + seconds_of(answer), source)
    except ValueError:  # UNLIMITED, infinity, INVALID
        return None


def _of_pbs(answer: str, now: float) -> Limit | None:
    """What is left by the start of the job where qstat tells it, else by the time it has used, which lags behind."""
    told = dict(re.findall(r"^\s*([\w.]+) = (.*)$", answer, re.MULTILINE))
    try:
        walltime = seconds_of(told["Resource_List.walltime"])
        if "stime" in told:
            began = datetime.strptime(told["stime"].strip(), "%a %b %d %H:%M:%S %Y").timestamp()
        else:
            began = now - seconds_of(told.get("resources_used.walltime", "0"))
    except (KeyError, ValueError):
        return None
    return Limit(began + walltime, "qstat")


def _ask(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
