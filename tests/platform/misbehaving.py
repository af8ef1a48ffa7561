"""Trials that do what no trial should; ``params["do"]`` says what. None of them needs data or a network."""

import ctypes
import json
import os
import signal
import sys
import threading
import time

import tabular
import torch

from wattier.records import EpochRecord
from wattier.rundir import append_json_line
from wattier_gnn.distributed import all_sum, from_rank_zero, process_group

SHOUTED_BYTES = 1 << 30


class Unpicklable(Exception):
    def __init__(self):
        super().__init__("it holds a lock")
        self.lock = threading.Lock()

    def __reduce__(self):
        raise TypeError("no")


def run(context):
    """The function that launchers are given."""
    return globals()[context.spec.proposal.params["do"]](context)


def behaves(context):
    return tabular.run_raising(_with_rate(context))


def raises(context):
    raise ValueError("the 3rd layer is missing")


def raises_a_novel(context):
    raise ValueError("la " * 30_000_000)


def raises_unpicklable(context):
    raise Unpicklable


def lacks_memory(context):
    raise MemoryError


def exits(context):
    sys.exit(5)


def returns_nonsense(context):
    return {"loss": 1}


def reports_nonsense(context):
    context.report({"epoch": 1})


def only_returns(context):
    """Allowed: a result that is returned and not written."""
    result = behaves(context)
    (context.folder / "result.json").unlink()
    return result


def leaves_half_a_result(context):
    result = behaves(context)
    path = context.folder / "result.json"
    path.write_text(path.read_text()[:200])
    return result


def leaves_a_list(context):
    (context.folder / "result.json").write_text("[1, 2]")


def leaves_depth(context):
    (context.folder / "result.json").write_text("[" * 100_000)


def leaves_anothers(context):
    _rewritten(context, trial_id="somebody-else")


def leaves_a_wrong_status(context):
    _rewritten(context, status="splendid")


def leaves_a_word(context):
    _rewritten(context, val_loss="low")


def leaves_nan(context):
    _rewritten(context, val_loss=float("nan"))


def leaves_infinity(context):
    _rewritten(context, val_loss=float("inf"))


def spoils_its_epochs(context):
    append_json_line(context.folder / "epochs.jsonl", {"epoch": 1})
    with (context.folder / "epochs.jsonl").open("a") as file:
        file.write("epoch two was fine\nso was three\n")
    raise RuntimeError("and then it failed")


def kills_itself(context):
    os.kill(os.getpid(), signal.SIGKILL)


def crashes(context):
    ctypes.string_at(0)


def leaves_slowly(context):
    """When it is stopped it takes longer to leave than Tune waits for a process to be free again."""
    try:
        behaves(context)
    finally:
        time.sleep(6)


def hangs(context):
    time.sleep(1000)


def hangs_in_native_code(context):
    """With the interpreter's lock held, so that no thread of this process can do anything."""
    ctypes.PyDLL(None).sleep(1000)


def hangs_on_one_rank(context):
    (context.folder / f"pid{context.world.rank}.txt").write_text(str(os.getpid()))
    if context.world.rank == 1:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    time.sleep(1000)


def is_slow_but_alive(context):
    """It reports one epoch only, and saves checkpoints meanwhile."""
    for step in range(20):
        time.sleep(0.5)
        (context.folder / "last.pt").write_text(f"step {step}")
    return behaves(context)


def shouts(context):
    """A gigabyte by a library, and some by Python itself."""
    print("first words", flush=True)
    line = b"la " * 21845 + b"\n"
    for _ in range(SHOUTED_BYTES // len(line)):
        os.write(1, line)
    print("last words", file=sys.stderr)
    return behaves(context)


def reduces(context):
    """Two ranks that need each other in every epoch, as a real training does; the answer to a report reaches both."""
    cpu = torch.device("cpu")
    with process_group(context.world, cpu):
        for epoch in range(1, context.spec.fidelity.epochs + 1):
            assert all_sum(torch.ones(1)).item() == context.world.size
            if context.world.rank == 1 and context.spec.proposal.params.get("rank_1_fails"):
                raise ValueError("the other rank will wait for me")
            answer = -1.0
            try:
                if context.world.rank == 0:
                    answer = float(context.report(EpochRecord(epoch, 1.0, 1.0, {}, epoch, 1.0, 1e-3)))
            finally:
                answer = from_rank_zero(answer, cpu)
            if answer < 0:
                return None
    if context.world.rank != 0:
        return None
    return tabular._result(context, EpochRecord(epoch, 1.0, 1.0, {}, epoch, 1.0, 1e-3), "complete", 1)


def _with_rate(context):
    context.spec.proposal.params.setdefault("learning_rate", 0.01)
    return context


def _rewritten(context, **values):
    behaves(context)
    path = context.folder / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
