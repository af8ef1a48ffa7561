"""The bench's figures as text: curves, the joules at which ours is as good as others in the end, and where it loses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import NamedTuple

from search.baselines import MULTI_FIDELITY, SINGLE_FIDELITY
from search.compare import CENSORED, FRACTIONS, Duel, Run, Trace, best, duel, quartiles, trace
from search.problems import Problem, reference_point, rungs
from search.space import is_ordered, is_whole

SINGLE_TARGET, MULTI_TARGET = 0.35, 1.0


def traces_by_method(runs: Sequence[Run], problem: Problem) -> dict[str, list[Trace]]:
    """Of one problem's runs."""
    found: dict[str, list[Trace]] = {}
    for run in runs:
        found.setdefault(run.method, []).append(trace(run, problem))
    return found


def curve_lines(problem: Problem, runs: Sequence[Run]) -> Iterator[str]:
    """The whole curve of every method: median [quartiles] at each fraction of the budget."""
    corner = reference_point(problem.front)
    budget, n_seeds = runs[0].budget_joules, len({run.seed for run in runs})
    epochs = list(map(str, problem.epochs))
    listed = ", ".join(epochs if len(epochs) <= 6 else [*epochs[:2], "...", epochs[-1]])
    yield f"\n{problem.name}: {len(problem.space)} hyper-parameters, fidelities {listed}"
    yield from space_lines(problem)
    yield (
        f"budget {budget:.4g} J = {budget / problem.median_joules:.4g} trainings of median cost, {n_seeds} seeds; "
        f"reference point: loss {corner[0]:.4g}, {corner[1]:.4g} J"
    )
    traces = traces_by_method(runs, problem)
    width = max(18, *(len(name) + 2 for name in traces))
    yield "joules".rjust(7) + "".join(name.rjust(width) for name in traces)
    curves = {name: quartiles(rows) for name, rows in traces.items()}
    for i, fraction in enumerate(FRACTIONS):
        cells = (f"{c['median'][i]:.3f} [{c['q25'][i]:.2f} {c['q75'][i]:.2f}]" for c in curves.values())
        yield f"{fraction:7.2f}" + "".join(cell.rjust(width) for cell in cells)
    for name in traces:
        mine = [run for run in runs if run.method == name]
        shown = problem.epochs if len(problem.epochs) <= 6 else [*rungs(problem), problem.epochs[-1]]
        steps = {epoch: round(median(run.steps.get(str(epoch), 0) for run in mine)) for epoch in shown}
        seconds = median(run.wall_seconds for run in mine)
        reached = ", ".join(f"{n} x {epoch}" for epoch, n in steps.items())
        yield f"  {name}: median trials x epochs reached {reached}; {seconds:.1f} s of the search's own time"


def space_lines(problem: Problem) -> Iterator[str]:
    """The space, as it is searched; of a table, what was inferred."""
    for name, entry in problem.space.items():
        if "choices" in entry:
            shown = ", ".join(map(str, entry["choices"][:12])) + (", ..." if len(entry["choices"]) > 12 else "")
            kind = "ordered" if is_ordered(entry) else "unordered"
            yield f"  {name}: {len(entry['choices'])} {kind} choices: {shown}"
        else:
            kind, scale = (
                "whole numbers" if is_whole(entry) else "numbers",
                " on a log scale" if entry.get("log") else "",
            )
            yield f"  {name}: {kind} {entry['low']:g} to {entry['high']:g}{scale}"


def duels(problem: Problem, runs: Sequence[Run]) -> list[Duel]:
    """Each of our methods against each baseline."""
    traces = traces_by_method(runs, problem)
    ours = [name for name in traces if name not in SINGLE_FIDELITY and name not in MULTI_FIDELITY]
    others = [name for name in traces if name not in ours]
    pairs = (duel(problem.name, mine, traces[mine], other, traces[other]) for mine in ours for other in others)
    return [found for found in pairs if found is not None]


def against(found: Sequence[Duel], group: Sequence[str]) -> list[Duel]:
    """The duels with the best of a group of baselines, one a problem and method of ours."""
    chosen = []
    for problem, ours in dict.fromkeys((d.problem, d.ours) for d in found):
        mine = [d for d in found if (d.problem, d.ours) == (problem, ours)]
        name = best({d.baseline: d.level for d in mine}, list(group))
        chosen += [d for d in mine if d.baseline == name]
    return chosen


def verdict_lines(found: Sequence[Duel]) -> Iterator[str]:
    """The fraction of the budget at which ours has what others have in the end; the verdict; where ours loses."""
    if not found:
        return
    yield "\nfraction of the budget at which ours reaches a baseline's final median: median over seeds [quartiles]"
    yield f"{'problem':20}{'ours':12}{'baseline':16}{'its final':>10}{'our final':>10}   at fraction"
    for d in found:
        yield (
            f"{d.problem:20}{d.ours:12}{d.baseline:16}{d.level:10.3f}{d.ours_final:10.3f}   "
            f"{_fraction(d.fraction)} [{_fraction(d.lower)} {_fraction(d.upper)}]"
        )
    for verdict in verdicts(found):
        yield (
            f"\n{verdict.ours} against the best {verdict.group} baseline of each problem: "
            f"median {_fraction(verdict.fraction)} of its joules (target {verdict.target}: "
            f"{'met' if verdict.is_met else 'NOT met'})"
        )
        yield from (f"  {d.problem}: {d.baseline}, {_fraction(d.fraction)}" for d in verdict.duels)
    lost = [d for d in found if d.fraction >= 1 or d.ours_final < d.level]
    yield "\nwhere ours loses: " + ("it does not" if not lost else "")
    for d in lost:
        yield f"  {d.problem}: {d.ours} to {d.baseline}, in the end {d.ours_final:.3f} against {d.level:.3f}"


class Verdict(NamedTuple):
    """Ours against the best of a group of baselines, over problems.

    Attributes:
        duels: with the best one of each problem.
        fraction: the median over problems.
        target: what it must be, in words.
    """

    ours: str
    group: str
    duels: list[Duel]
    fraction: float
    target: str
    is_met: bool


def verdicts(found: Sequence[Duel]) -> list[Verdict]:
    """Of each of our methods against the single-fidelity and the multi-fidelity baselines."""
    groups = (("single-fidelity", list(SINGLE_FIDELITY)), ("multi-fidelity", list(MULTI_FIDELITY)))
    made = []
    for ours in dict.fromkeys(d.ours for d in found):
        for label, group in groups:
            chosen = against([d for d in found if d.ours == ours], group)
            if chosen:
                overall = median(d.fraction for d in chosen)
                single = label == "single-fidelity"
                is_met = overall <= SINGLE_TARGET if single else overall < MULTI_TARGET
                target = f"<= {SINGLE_TARGET:g}" if single else f"< {MULTI_TARGET:g}"
                made.append(Verdict(ours, label, chosen, overall, target, is_met))
    return made


def _fraction(value: float) -> str:
    return "> 1" if value >= CENSORED else f"{value:.2f}"
