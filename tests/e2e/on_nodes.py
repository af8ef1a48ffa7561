"""A driver on somebody else's Ray cluster, named by RAY_ADDRESS: ``on_nodes.py RUN RANKS TRIALS SECONDS``.

Each rank writes down on which node it is, and works for some seconds in ten epochs.
"""

import os
import sys
import time
from pathlib import Path

from wattier.errors import UserError
from wattier.launch import Stage
from wattier.policy import FixedPolicy
from wattier.records import EpochRecord, Fidelity, Proposal, TrialResult
from wattier.rundir import RunDir
from wattier_telemetry import EnergyReport

EPOCHS = 10


def run_trial(context):
    import ray

    seconds = context.spec.proposal.params["seconds"]
    node = context.folder / f"node-of-rank{context.world.rank}.txt"
    node.write_text(ray.get_runtime_context().get_node_id())
    for epoch in range(1, EPOCHS + 1):
        time.sleep(seconds / EPOCHS)
        if context.world.rank == 0:
            context.report(EpochRecord(epoch, 1.0, 1.0, {}, epoch, 1.0, 1e-3))
    if context.world.rank != 0:
        return None
    spec = context.spec
    return TrialResult(
        context.config.name, spec.proposal.trial_id, spec.proposal.params, spec.fidelity, "complete", 1.0, {}, EPOCHS,
        EPOCHS, 1.0, EnergyReport.empty(),
    )  # fmt: skip


def main():
    from on_nodes import run_trial as importable  # by name, so that other processes can import it

    from wattier.ray_backend import RayLauncher

    run, (ranks, trials) = RunDir.open(Path(sys.argv[1])), map(int, sys.argv[2:4])
    stage = Stage(run, run.config(), Fidelity("only", None, EPOCHS, ranks), trials)
    proposals = [Proposal(f"only-{i:03d}", {"seconds": float(sys.argv[4])}) for i in range(trials)]
    launcher = RayLauncher()
    try:
        launcher.run(stage, FixedPolicy(proposals), importable, lambda row: print(row.trial_id, row.status, flush=True))
    except UserError as error:
        print(error, flush=True)
        os._exit(2)  # the cluster may be half dead
    launcher.close()


if __name__ == "__main__":
    main()
