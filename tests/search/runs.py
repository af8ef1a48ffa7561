"""Runs many methods on many problems with many seeds, in processes, and keeps their results between benches."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from search.account import Account
from search.baselines import BASELINES, Method, run_method
from search.compare import Run, as_dict, from_dict
from search.functions import BUILT_IN, random_function
from search.nas_graph import DATASETS, nas_graph
from search.ours import OURS
from search.problems import Problem
from search.space import draw

from wattier.errors import UserError, did_you_mean

LIBRARIES = ("moocore", "numpy", "optuna", "ray", "scipy", "syne-tune")
METHODS: dict[str, Method] = {**BASELINES, **OURS}
TABLES: dict[str, Problem] = {}  # by name; read before the processes are forked


def version_of(library: str) -> str:
    """Its version, or that it is absent: the tests run without what is only benched."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "absent"


@dataclass(frozen=True)
class Task:
    """One run to make; the budget is in trainings of median cost at the highest fidelity."""

    problem: str
    method: str
    seed: int
    trainings: float


@cache
def problem_named(name: str) -> Problem:
    """A table that was read, a built-in problem, or a random function of any number."""
    if name in TABLES:
        return TABLES[name]
    if name in BUILT_IN:
        return BUILT_IN[name]()
    if name.startswith("nas-") and name[4:] in DATASETS:
        _needs("nas_bench_graph", name)
        return nas_graph(name[4:])
    if name.startswith("gp") and name[2:].isdecimal() and len(name) < 10:
        return random_function(int(name[2:]))
    known = ", ".join([*BUILT_IN, "gp<number>", *(f"nas-{dataset}" for dataset in DATASETS)])
    raise UserError(f"--problems: unknown problem {name!r}, known are {known}.{did_you_mean(name, BUILT_IN)}")


def method_named(name: str) -> Method:
    """One of METHODS."""
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise UserError(f"--methods: unknown method {name!r}, known are {known}.{did_you_mean(name, METHODS)}")
    if name.startswith("mo-asha"):
        _needs("syne_tune", name)
    return METHODS[name]


def _needs(module: str, name: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{name} needs {module}, which is not installed. Install the extra [bench]: make setup-bench.")


def make_run(task: Task) -> Run:
    """One search, in this process."""
    problem = problem_named(task.problem)
    budget_joules = task.trainings * problem.median_joules
    account = Account(problem, budget_joules, task.seed, strict=task.method in BASELINES)
    started = time.perf_counter()
    run_method(method_named(task.method), account, task.seed)
    seconds = time.perf_counter() - started
    steps = {str(epoch): n for epoch, n in sorted(account.steps.items())}
    return Run(
        task.problem, task.method, task.seed, account.budget_joules, account.spent_joules, seconds,
        account.finished, steps,
    )  # fmt: skip


def make_runs(tasks: Sequence[Task], jobs: int, cache_folder: Path | None, say: Callable[[str], None]) -> list[Run]:
    """All runs, in the order of the tasks; a run that the cache holds is not made again."""
    runs: dict[Task, Run] = {}
    for task in tasks:
        if (found := _kept(task, cache_folder)) is not None:
            runs[task] = found
    left = [task for task in tasks if task not in runs]
    if runs:
        say(f"{len(runs)} runs from {cache_folder}")
    for number, (task, run) in enumerate(_made(left, jobs), start=1):
        runs[task] = run
        _keep(task, run, cache_folder)
        say(f"{number}/{len(left)} {task.problem} {task.method} seed {task.seed}: {run.wall_seconds:.1f} s")
    return [runs[task] for task in tasks]


def _made(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, Run]]:
    if jobs == 1:
        for task in tasks:
            yield task, make_run(task)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        waiting = {pool.submit(make_run, task): task for task in tasks}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _kept(task: Task, folder: Path | None) -> Run | None:
    path = _kept_path(task, folder)
    return from_dict(json.loads(path.read_text())) if path is not None and path.exists() else None


def _keep(task: Task, run: Run, folder: Path | None) -> None:
    path = _kept_path(task, folder)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(as_dict(run)))


def _kept_path(task: Task, folder: Path | None) -> Path | None:
    """Where a run is kept: it is another one once the problem, the bench, the libraries or, of ours, Wattier are."""
    if folder is None:
        return None
    ours = "" if task.method in BASELINES else _product()
    key = hashlib.sha256(f"{task} {_code()} {_behaviour(task.problem)}{ours}".encode()).hexdigest()[:16]
    return folder / f"{task.problem}-{task.method}-{task.seed}-{key}.json"


def _product() -> str:
    """Of all of Wattier, and of how the bench calls it."""
    import wattier

    paths = sorted(Path(str(wattier.__file__)).parent.glob("*.py"))
    return " ".join(_meaning(path) for path in [Path(__file__).parent / "ours.py", *paths])


@cache
def _code() -> str:
    """Of the simulator and the baselines, and the libraries' versions."""
    trees = [_meaning(Path(__file__).parent / name) for name in ("account.py", "baselines.py", "space.py")]
    return " ".join([*trees, *(f"{name} {version_of(name)}" for name in LIBRARIES)])


@cache
def _meaning(path: Path) -> str:
    """A file's code without comments and docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return ast.dump(tree)


@cache
def _behaviour(name: str) -> str:
    """What a problem answers at some points."""
    problem, rng = problem_named(name), np.random.default_rng(0)
    points = [problem.snap(draw(problem.space, rng)) for _ in range(20)]
    answers = [
        (
            params,
            problem.truth(params),
            [(problem.loss(params, e, 0), problem.joules(params, e)) for e in problem.epochs],
        )
        for params in points
    ]
    return repr((problem.space, problem.epochs, problem.median_joules, answers))
