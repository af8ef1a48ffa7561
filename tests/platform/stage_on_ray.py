"""A process with a Ray cluster of its own: ``stage_on_ray.py WARM_UP_RUN RUN REGISTRY``.

It runs both stages, the second with a registry of which the cluster's nodes know nothing, says so, and leaves the
cluster when its standard input ends. Ray holds one token a process, so a second cluster needs a second process.
"""

import os
import sys
from pathlib import Path

import tabular

from wattier.funnel import run_stage
from wattier.launch import Stage
from wattier.policy import SearchPolicy
from wattier.records import Fidelity
from wattier.rundir import RunDir


def run_only(run, launcher, run_trial, proposals):
    """The one stage of a run, with given trials."""
    config = run.config()
    section = config.search.stages[0]
    stage = Stage(run, config, Fidelity(section.name, None, section.epochs, 1), len(proposals))
    promoted = [{"learning_rate": 0.01, **params} for params in proposals]

    def make_policy():
        return SearchPolicy(config, section, run=run, promoted=promoted)

    run_stage(stage, make_policy, launcher, run_trial, lambda _: None)
    return run.trials("only")


def main():
    from wattier.ray_backend import RayLauncher

    warm_up, run = (RunDir.open(Path(path)) for path in sys.argv[1:3])
    launcher = RayLauncher()
    run_only(warm_up, launcher, tabular.run_raising, [{"n_layers": 1}])
    os.environ["WATTIER_REGISTRY"] = sys.argv[3]
    run_only(run, launcher, tabular.run_registered, [{"n_layers": tabular.DIES}, {"n_layers": 1}])
    print("done", flush=True)
    sys.stdin.read()
    launcher.close()


if __name__ == "__main__":
    main()
