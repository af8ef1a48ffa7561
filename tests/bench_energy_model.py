"""How well joules and seconds of a trial are told beforehand, on real trials of the quickstart space.

Random trials run one after the other in this process and are kept in a run directory, so that a second call only
evaluates. Some are held out; the model learns from the first 10, 30, 100 of the others, over several shuffles, beside
two naive ones: the mean of the logarithm, and joules linear in parameters x structures. Then it tells fidelities that
it has not seen: longer trials, and trials of two ranks. Nothing is gated on it.

usage: OMP_NUM_THREADS=1 python tests/bench_energy_model.py [RUN_DIR]
"""

from __future__ import annotations

import os
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

from wattier.config import RunConfig, load_config
from wattier.device_prior import RATED_WATTS_PER_CORE, DevicePrior, probe_device
from wattier.energy_model import EnergyModel, Projection
from wattier.launch import InlineLauncher, Stage
from wattier.prepare import prepare_data
from wattier.records import Fidelity, Proposal, TrialResult
from wattier.rundir import RunDir
from wattier.search import FixedPolicy, distributions, run_stage
from wattier.trial import run_trial
from wattier.workload import workload_of
from wattier_gnn.store import Store

SEED, SHUFFLES, HELD_OUT = 0, 20, 20
LEARNED = (0, 1, 3, 10, 30, 100)
STAGES: list[dict[str, Any]] = [
    {"name": "scout", "trials": 120, "structures": 200, "epochs": 2, "ranks": 1},
    {"name": "longer", "trials": 12, "structures": 1000, "epochs": 4, "ranks": 1},
    {"name": "wider", "trials": 12, "structures": 400, "epochs": 3, "ranks": 2},
]
Predict = Callable[[TrialResult], tuple[float, float]]  # joules, seconds


class Quiet:
    """Hears of progress and says nothing."""

    def phase(self, name: str) -> None: ...
    def say(self, text: str) -> None: ...
    def progress(self, done: object) -> None: ...
    def trial(self, result: TrialResult, done: int, total: int) -> None: ...


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/bench_energy_model").absolute()
    os.environ.setdefault("WATTIER_REGISTRY", str(folder.with_name("registry")))
    run, config = measured(folder)
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[1]:.1f}, seed {SEED}, {SHUFFLES} shuffles"
    )
    prior = probe_device("this CPU", watts=RATED_WATTS_PER_CORE)
    print(
        f"{prior.name}: {prior.flops_per_second / 1e9:.0f} GFLOP/s, {prior.bytes_per_second / 1e9:.0f} GB/s, "
        f"{1e6 * prior.seconds_per_operation:.1f} us an operator, {prior.watts:g} W"
    )
    scout, longer, wider = ([t for t in run.trials(s["name"]) if t.status == "complete"] for s in STAGES)
    for name, trials in zip(("scout", "longer", "wider"), (scout, longer, wider), strict=True):
        joules = [t.energy_joules for t in trials]
        methods = {t.energy.method for t in trials}
        print(f"{name}: {len(trials)} trials, {min(joules):.1f} to {max(joules):.1f} J ({', '.join(methods)})")
    make = partial(EnergyModel, workload_of(config, Store(run.store_path)), config.search.space)
    held_out(scout, make, config, prior)
    other_fidelities(scout, longer, wider, make, prior)
    speed(make(prior), scout)


def measured(folder: Path) -> tuple[RunDir, RunConfig]:
    """The run with all its trials; those that are missing are run."""
    values = load_config(Path("configs/quickstart.yaml")).model_dump()
    values |= {"run_dir": str(folder), "launcher": "inline"}
    values["telemetry"]["source"] = "estimated"
    values["search"]["stages"] = [stage | {"reduction_factor": None} for stage in STAGES]
    config = RunConfig.model_validate(values)
    run, launcher = RunDir.create(config), InlineLauncher()
    prepare_data(run, config, Quiet())
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=SEED))
    space = distributions(config.search.space)
    for section in config.search.stages:
        name = section.name
        proposals = [Proposal(f"{name}-{k:03d}", dict(study.ask(space).params)) for k in range(section.trials)]
        done = {t.trial_id for t in run.trials(name)}
        policy = FixedPolicy([p for p in proposals if p.trial_id not in done])
        stage = Stage(run, config, Fidelity(name, section.structures, section.epochs, section.ranks), section.trials)
        started = time.monotonic()
        run_stage(stage, lambda policy=policy: policy, launcher, run_trial, lambda _: None)
        if len(done) < section.trials:
            print(f"{name}: {section.trials - len(done)} trials run in {time.monotonic() - started:.0f} s")
    launcher.close()
    return run, config


def held_out(
    scout: Sequence[TrialResult], make: Callable[[DevicePrior], EnergyModel], config: RunConfig, prior: DevicePrior
) -> None:
    """Trials of the fidelity that is learned from."""
    print(f"\nheld-out trials of the same fidelity ({HELD_OUT} in each shuffle): MdAPE of joules, of seconds")
    print(
        "trials   physics + process         within 68 %   hyper-parameters alone   mean of log     params x structures"
    )
    for n in LEARNED:
        rows = []
        for shuffle in range(SHUFFLES):
            order = random.Random(shuffle).sample(list(scout), len(scout))
            test, seen = order[:HELD_OUT], order[HELD_OUT:][:n]
            model = taught(make(prior), seen)
            projections = [model.project(t.params, t.fidelity) for t in test]
            row = [*error([(p.joules, p.seconds) for p in projections], test), inside(projections, test)]
            if n:
                alone = taught(EnergyModel(None, config.search.space), seen)
                others = [told(alone), mean_of_log(seen), linear(seen)]
                row += [part for predict in others for part in error([predict(t) for t in test], test)]
            rows.append(row)
        middle, mean = np.median(rows, axis=0), np.mean(rows, axis=0)
        low, high = np.quantile(np.array(rows)[:, 0], [0.1, 0.9])
        cells = [f"{100 * a:5.1f} %, {100 * b:5.1f} %" for a, b in zip(middle[3::2], middle[4::2], strict=True)]
        ours = f"{100 * middle[0]:5.1f} % ({100 * low:.1f} to {100 * high:.1f}), {100 * middle[1]:5.1f} %"
        print(f"{n:6d}   {ours}   {100 * mean[2]:3.0f} %   " + "      ".join(cells))


def other_fidelities(
    scout: Sequence[TrialResult], longer: Sequence[TrialResult], wider: Sequence[TrialResult],
    make: Callable[[DevicePrior], EnergyModel], prior: DevicePrior,
) -> None:  # fmt: skip
    """What was learned at the scout's fidelity, told of others, before and after three trials there."""
    print("\nother fidelities, taught by 100 scouts and by so many trials there: MdAPE of joules, of seconds")
    for name, trials in (("longer, 10 times the training", longer), ("wider, 2 ranks", wider)):
        for n_there in (0, 1, 3):
            rows = []
            for shuffle in range(SHUFFLES):
                rng = random.Random(shuffle)
                order = rng.sample(list(trials), len(trials))
                model = taught(make(prior), [*rng.sample(list(scout), 100), *order[:n_there]])
                test = order[3:]
                projections = [model.project(t.params, t.fidelity) for t in test]
                factor = float(np.median([p.joules_high / p.joules for p in projections]))
                pairs = [(p.joules, p.seconds) for p in projections]
                rows.append([*error(pairs, test), inside(projections, test), factor])
            a, b, _, factor = np.median(rows, axis=0)
            within = np.mean(rows, axis=0)[2]
            print(
                f"{name}, {n_there} there: {100 * a:5.1f} %, {100 * b:5.1f} %; {100 * within:.0f} % within the "
                f"interval, a factor of {factor:.2f}"
            )


def speed(model: EnergyModel, scout: Sequence[TrialResult]) -> None:
    """CPU time of a thousand joules at once, and of an observation with a projection after 5,000."""
    rng = random.Random(SEED)
    taught(model, [rng.choice(scout) for _ in range(5000)])
    fidelity, params = scout[0].fidelity, [{**rng.choice(scout).params, "n": k} for k in range(1000)]
    model.joules(params, fidelity)
    started = time.process_time()
    model.joules(params, fidelity)
    at_once = time.process_time() - started
    started = time.process_time()
    taught(model, scout[:1]).project(scout[0].params, fidelity)
    print(
        f"\nafter 5,000 trials: 1,000 predictions {1e3 * at_once:.0f} ms; a trial more and a projection "
        f"{1e3 * (time.process_time() - started):.0f} ms (CPU time)"
    )


def taught(model: EnergyModel, trials: Sequence[TrialResult]) -> EnergyModel:
    for t in trials:
        model.observe(t.params, t.fidelity, joules=t.energy_joules, seconds=t.wall_seconds, method=t.energy.method)
    return model


def told(model: EnergyModel) -> Predict:
    def predict(t: TrialResult) -> tuple[float, float]:
        projection = model.project(t.params, t.fidelity)
        return projection.joules, projection.seconds

    return predict


def mean_of_log(seen: Sequence[TrialResult]) -> Predict:
    joules, seconds = (float(np.exp(np.mean(np.log(values)))) for values in costs(seen))
    return lambda _: (joules, seconds)


def linear(seen: Sequence[TrialResult]) -> Predict:
    """y = a + b x parameters x structures, by least squares of relative errors."""

    def row(t: TrialResult) -> list[float]:
        return [1.0, 1e-6 * float(t.n_parameters or 0) * t.structures_seen]

    found = []
    for values in costs(seen):
        a, y = np.array([row(t) for t in seen]), np.array(values)
        found.append(np.linalg.lstsq(a / y[:, None], np.ones(len(y)), rcond=None)[0])
    return lambda t: (float(np.dot(row(t), found[0])), float(np.dot(row(t), found[1])))


def costs(trials: Sequence[TrialResult]) -> tuple[list[float], list[float]]:
    return [float(t.energy_joules or 0) for t in trials], [t.wall_seconds for t in trials]


def error(told_of: Sequence[tuple[float, float]], trials: Sequence[TrialResult]) -> tuple[float, float]:
    """Median absolute relative error of joules and of seconds."""
    a, b = (
        np.median(np.abs(np.array(p) / np.array(y) - 1))
        for p, y in zip(zip(*told_of, strict=True), costs(trials), strict=True)
    )
    return float(a), float(b)


def inside(projections: Sequence[Projection], trials: Sequence[TrialResult]) -> float:
    """Share of trials whose joules lie within the interval of 68 %."""
    return float(
        np.mean([p.joules_low <= y <= p.joules_high for p, y in zip(projections, costs(trials)[0], strict=True)])
    )


if __name__ == "__main__":
    main()
