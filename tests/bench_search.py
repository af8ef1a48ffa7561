"""Search quality, side by side: hypervolume against joules spent, of ours and of the searches people use instead.

Objectives are loss and joules at the highest fidelity, both minimised. Every joule counts: low fidelities, stopped
trials. Only configurations evaluated at the highest fidelity score, by their loss without noise; their hypervolume is
divided by the true front's (reference point: its worst corner and a tenth of its extent beyond). Trials run one at a
time; training that goes on to a higher epoch pays for the difference only. Nothing is gated on these figures.

    python tests/bench_search.py --problems branin_currin,gp3 --methods random,tpe --seeds 5
    python tests/bench_search.py --seeds 20 --jobs 2 --cache /tmp/bench-search --json search.json
    python tests/bench_search.py --table measured.csv

A table is a CSV of trainings: columns `fidelity` (or `epoch`, `epochs`), `loss` (or `val_loss`), `joules` (or
`energy_joules`, cumulative from the training's start), where there are repeats `seed` (or `repeat`), and one a
hyper-parameter, numbers or words; each training has a row at each fidelity. The space is inferred and printed: at most
12 different numbers are ordered choices, more are a range (on a log scale where positive and spread over more than a
factor 20), words are choices. A proposal becomes the nearest configuration of the table, for all methods alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import warnings
from pathlib import Path

from search import compare, runs, show
from search.baselines import MULTI_FIDELITY
from search.csv_table import read_table
from search.functions import BUILT_IN

from wattier.errors import UserError

DEFAULT_PROBLEMS = [*BUILT_IN, "nas-cora", "nas-arxiv"]
SLOW = ("gp", "ours-funnel")
DEFAULT_METHODS = ",".join(name for name in runs.METHODS if name not in SLOW)


def main() -> int:
    options = _options()
    warnings.simplefilter("ignore")  # of other libraries, about themselves
    try:
        _bench(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _bench(options: argparse.Namespace) -> None:
    for path in options.table:
        table = read_table(path)
        if table.name in runs.TABLES:
            raise UserError(f"--table: {path} is the second table named {table.name}. Rename one of them.")
        runs.TABLES[table.name] = table
    if options.problems is None:
        chosen = list(runs.TABLES) or DEFAULT_PROBLEMS
    else:
        chosen = [*_names(options.problems), *runs.TABLES]
    problems = [runs.problem_named(name) for name in chosen]
    methods = _names(options.methods)
    for name in methods:
        runs.method_named(name)
    tasks = [
        runs.Task(problem.name, method, seed, options.budget)
        for problem in problems for method in methods for seed in range(options.seeds)
        if len(problem.epochs) > 1 or method not in MULTI_FIDELITY  # else it is random search
    ]  # fmt: skip
    made = runs.make_runs(tasks, options.jobs, options.cache, lambda line: print(line, file=sys.stderr))
    facts = _facts(options)
    print(" ".join(f"{key} {value}" for key, value in facts.items()))
    found = []
    for problem in problems:
        mine = [run for run in made if run.problem == problem.name]
        print("\n".join(show.curve_lines(problem, mine)))
        found += show.duels(problem, mine)
    print("\n".join(show.verdict_lines(found)))
    if options.json is not None:
        curves = {}
        for problem in problems:
            traces = show.traces_by_method([run for run in made if run.problem == problem.name], problem)
            curves[problem.name] = {method: compare.quartiles(rows) for method, rows in traces.items()}
        report = {
            "facts": facts, "fractions": compare.FRACTIONS, "curves": curves,
            "duels": [d.__dict__ for d in found],
            "verdicts": [{**v._asdict(), "duels": [d.baseline for d in v.duels]} for v in show.verdicts(found)],
            "runs": [compare.as_dict(run) for run in made],
        }  # fmt: skip
        options.json.write_text(json.dumps(report))
    if options.figure is not None:
        from search.draw import figure

        figure(problems, made).write_html(options.figure, include_plotlyjs=True)


def _facts(options: argparse.Namespace) -> dict[str, str]:
    facts = {"python": platform.python_version(), **{name: runs.version_of(name) for name in runs.LIBRARIES}}
    return {**facts, "machine": f"{os.cpu_count()} cores ({_processor()})", "seeds": f"0..{options.seeds - 1}"}


def _processor() -> str:
    """Its name, where the system says it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def whole_number(text: str) -> int:
    """A whole number above 0."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"is {number}, but must be at least 1")
    return number


def number_of_trainings(text: str) -> float:
    """A budget: a finite number from 1."""
    number = float(text)
    if not 1 <= number < 1e6:
        raise argparse.ArgumentTypeError(f"is {text}, but must be from 1 to a million trainings")
    return number


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--problems", help=f"commas between; default: {','.join(DEFAULT_PROBLEMS)}; also gp<number> and nas-<dataset>"
    )
    parser.add_argument(
        "--table", type=Path, action="append", default=[], help="a CSV; searched alone, unless --problems is given"
    )
    parser.add_argument(
        "--methods", default=DEFAULT_METHODS, help=f"commas between; default: {DEFAULT_METHODS}; also {', '.join(SLOW)}"
    )
    parser.add_argument("--seeds", type=whole_number, default=20, help="repeats of everything; default 20")
    parser.add_argument(
        "--budget", type=number_of_trainings, default=60.0, help="in trainings of median cost; default 60"
    )
    parser.add_argument("--jobs", type=whole_number, default=os.cpu_count(), help="processes; default one a core")
    parser.add_argument(
        "--cache", type=Path, help="a folder that keeps runs for the next bench, as long as the code is the same"
    )
    parser.add_argument("--json", type=Path, help="write all figures and runs to this file")
    parser.add_argument("--figure", type=Path, help="draw the curves into this HTML file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
