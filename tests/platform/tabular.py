"""A trial without a network: its loss curve is a formula of its hyper-parameters, and some are made to go wrong.

n_layers: 7 = every attempt dies, 8 = the first attempt dies, 9 = the loss is not finite from the second epoch on.
"""

import math
import os
import signal
import time
from datetime import UTC, datetime

from wattier.metering import metered
from wattier.records import EpochRecord, TrialResult
from wattier.rundir import append_json_line, write_json
from wattier.trial_context import registered
from wattier_telemetry import bill

DIES, DIES_ONCE, DIVERGES = 7, 8, 9
EPOCH_SECONDS = 0.03


def val_loss(params, epoch):
    """Lowest at a learning rate of 0.01; finite, unless it diverges."""
    if params.get("n_layers") == DIVERGES and epoch > 1:
        return math.nan
    return abs(math.log10(params["learning_rate"]) + 2) + 1 / epoch


def run_raising(context):
    """A trial whose failures are exceptions."""
    return _run(context, die=_raise)


def run_killed(context):
    """A trial whose failures are SIGKILL of its own process."""
    return _run(context, die=lambda: os.kill(os.getpid(), signal.SIGKILL))


def run_registered(context):
    """A trial that the node's exporter sees; it notes when it began, and when it killed itself or ended."""
    n_layers = context.spec.proposal.params["n_layers"]
    with metered(context.folder, "rank0", context.config.telemetry, on_gpu=False, fraction=context.device_fraction) as (
        meter,
        source,
    ):
        with registered(context, source):
            began = time.time()
            time.sleep(context.spec.fidelity.epochs * EPOCH_SECONDS)
            write_json(context.folder / "witness.json", {"pid": os.getpid(), "began": began, "ended": time.time()})
            if n_layers == DIES:
                os.kill(os.getpid(), signal.SIGKILL)
        last = _record(context.folder, context.spec.proposal.params, 1)
        context.report(last)
        meter.close()
    result = _result(context, last, "complete", attempts=1)
    write_json(context.folder / "result.json", result.to_dict())
    return result


def _raise():
    raise RuntimeError("out of memory")


def _run(context, die):
    folder, rank, params = context.folder, context.world.rank, context.spec.proposal.params
    with metered(folder, f"rank{rank}", context.config.telemetry, on_gpu=False, fraction=context.device_fraction) as (
        meter,
        _,
    ):
        if rank != 0:
            time.sleep(context.spec.fidelity.epochs * EPOCH_SECONDS)
            return None
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        attempts = len(list(folder.glob("*rank0.energy.json")))
        stopped, last = None, None
        try:
            for epoch in range(1, context.spec.fidelity.epochs + 1):
                time.sleep(EPOCH_SECONDS)
                n_layers = params.get("n_layers")
                if epoch == 2 and (n_layers == DIES or (n_layers == DIES_ONCE and attempts == 1)):
                    die()
                last = _record(folder, params, epoch)
                if not context.report(last) or last.val_loss is None:
                    stopped = "stopped"
                    break
        except SystemExit as stop:
            stopped = stop
        meter.close()
    diverged = last.val_loss is None
    pruned = diverged or stopped is not None
    result = _result(context, last, "pruned" if pruned else "complete", attempts, started_at, diverged=diverged)
    write_json(folder / "result.json", result.to_dict())
    if isinstance(stopped, SystemExit):
        raise stopped
    return result


def _result(context, last, status, attempts, started_at=None, *, diverged=False):
    return TrialResult(
        run=context.config.name,
        trial_id=context.spec.proposal.trial_id,
        params=context.spec.proposal.params,
        fidelity=context.spec.fidelity,
        status=status,
        val_loss=last.val_loss,
        val_by_source={},
        epochs_done=last.epoch,
        structures_seen=last.structures_seen,
        wall_seconds=1.0,
        energy=bill(context.folder),
        started_at=started_at,
        attempts=attempts,
        diverged=diverged,
    )


def _record(folder, params, epoch):
    loss = val_loss(params, epoch)
    record = EpochRecord(epoch, loss, loss, {}, 10 * epoch, EPOCH_SECONDS, params["learning_rate"], bill(folder).joules)
    line = record.to_dict()
    append_json_line(folder / "epochs.jsonl", line)
    return EpochRecord.from_dict(line)
