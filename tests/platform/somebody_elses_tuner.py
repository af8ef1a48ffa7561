"""A plain Ray Tune script that knows nothing of Wattier but its scheduler: ``somebody_elses_tuner.py FOLDER``.

Its trials have known losses and joules. It prints one JSON line: what each trial reported last, and what the judge was
asked.
"""

import json
import os
import sys
from pathlib import Path

import ray
from ray import tune

from wattier.ray_schedulers import EnergyAwareHalving

EPOCHS = 6
RUNG = 2
TRIALS = [  # loss in the end, joules an epoch
    {"loss": 0.10, "joules": 10.0},  # on the front
    {"loss": 0.50, "joules": 20.0},  # worse in both than the first
    {"loss": 0.05, "joules": 30.0},  # on the front: better and dearer
    {"loss": 0.20, "joules": 5.0},  # on the front: worse and cheaper
    {"loss": 0.30, "joules": 40.0},  # worse in both
    {"loss": 0.01, "joules": 9.0, "nan_at": 4},  # not finite after the rung
    {"loss": 0.02, "joules": 8.0, "dies_at": 3},  # retried: goes on from epoch 2, and Tune counts from 1 again
]


class Dominated:
    """Gives a trial up at the rung if another one there is better in both."""

    def __init__(self):
        self.asked, self.at_rung = [], {}

    def go_on(self, trial_id, record):
        self.asked.append((trial_id, record.epoch, record.val_loss, record.energy_joules))
        if record.val_loss is None:
            return False
        if record.epoch == RUNG:
            self.at_rung[trial_id] = (record.val_loss, record.energy_joules)
        mine = self.at_rung.get(trial_id)
        if mine is None or record.epoch > RUNG:
            return True
        return not any(a < mine[0] and b < mine[1] for a, b in self.at_rung.values())


def trainable(config):
    marker = Path(config["folder"]) / f"died-{config['index']}"
    trial = TRIALS[config["index"]]
    first = 1
    if marker.exists():
        first = RUNG + 1  # from its own checkpoint
    for epoch in range(first, EPOCHS + 1):
        if epoch == trial.get("dies_at") and not marker.exists():
            marker.touch()
            os._exit(1)
        loss = float("nan") if epoch == trial.get("nan_at") else trial["loss"] + 1 / epoch
        tune.report({"epoch": epoch, "mae": loss, "joules": epoch * trial["joules"]})


def main():
    folder = Path(sys.argv[1])
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20,
        _temp_dir=sys.argv[2],
    )  # fmt: skip
    judge = Dominated()
    scheduler = EnergyAwareHalving(judge, loss="mae", energy="joules")
    results = tune.Tuner(
        trainable,
        param_space={"folder": str(folder), "index": tune.grid_search(list(range(len(TRIALS))))},
        tune_config=tune.TuneConfig(scheduler=scheduler, reuse_actors=True, metric="mae", mode="min"),
        run_config=tune.RunConfig(
            name="theirs", storage_path=str(folder / "tune"), verbose=0,
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    ).fit()  # fmt: skip
    index_of = {result.metrics["trial_id"]: result.config["index"] for result in results}
    last = {result.config["index"]: result.metrics["epoch"] for result in results}
    iterations = {result.config["index"]: result.metrics["training_iteration"] for result in results}
    asked = [(index_of[trial_id], *rest) for trial_id, *rest in judge.asked]
    stopped = {index_of[trial_id]: why for trial_id, why in scheduler.stopped.items()}
    print(json.dumps({"last": last, "iterations": iterations, "asked": asked, "stopped": stopped}))
    ray.shutdown()


if __name__ == "__main__":
    main()
