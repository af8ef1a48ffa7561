"""A power cap for the length of a piece of work, put back whatever happens; Linux alone.

    with PowerCap(device.uuid, ratio=0.7) as cap:
        train()
    cap.restoration.outcome

The limit is set and put back by a process of its own (`cap_keeper`), which outlives this one's death. What is to be
put back lies on the disk (`cap_note`) before anything is changed: if both die, the next cap on the node,
``wattier-telemetry doctor`` or ``wattier-telemetry power-caps --restore`` finds it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from wattier_telemetry.cap_note import Process, locked, noted, notes_folder, read_note
from wattier_telemetry.cap_restore import Restoration, is_held, put_back, restore_stale
from wattier_telemetry.power_limit import Limits, PowerCapError, cap_of, is_same, open_limiter
from wattier_telemetry.records import Device

ANSWER_SECONDS = 60.0  # a driver that takes longer hangs
_MOST_BYTES = 2**16  # of an answer


class PowerCap:
    """A cap on one GPU, which must be this process's alone.

    Args:
        uuid: The GPU.
        ratio: The cap as a part of the GPU's default limit. A limit that is lower already is left as it is.
        wait_seconds: How long to wait for a GPU that somebody else has capped, such as an orphan about to end.

    Attributes:
        watts: The limit in force, W.
        before_watts: The limit before, W.
        restoration: How it ended, once it has.
        remark: Why the cap did not last to the end, in one sentence; empty where it did.
    """

    def __init__(self, uuid: str, ratio: float, *, wait_seconds: float = 30.0) -> None:
        self.uuid, self.ratio, self.wait_seconds = uuid, ratio, wait_seconds
        self.watts = self.before_watts = 0.0
        self.restoration: Restoration | None = None
        self.remark = ""
        self._keeper: subprocess.Popen[bytes] | None = None
        self._said = b""

    def __enter__(self) -> Self:
        """Set the cap.

        Raises:
            PowerCapError: If it cannot be set; the limit is then as it was.
        """
        me = Process.this()
        request = {"uuid": self.uuid, "ratio": self.ratio, "wait_seconds": self.wait_seconds, **me._asdict()}
        self._keeper = _start_keeper()
        try:
            self._send(json.dumps(request).encode() + b"\n")
            answer = self._answer(self.wait_seconds + ANSWER_SECONDS)
        except BaseException:
            self._hang_up()
            raise
        self._keeper.wait()  # the process that was started; the keeper is its child and goes on
        if answer is None or "capped" not in answer:
            self._hang_up()
            raise PowerCapError((answer or {}).get("error") or f"{self.uuid}: the keeper of its power cap died at once")
        self.watts, self.before_watts = answer["capped"]["watts"], answer["capped"]["before_watts"]
        return self

    def release(self) -> Restoration | None:
        """Put the limit back now; a second call does nothing more.

        Raises:
            PowerCapError: If it is not back.
        """
        if self._keeper is None:
            return self.restoration
        try:
            self._send(b"release\n")
            answer = self._answer(ANSWER_SECONDS)
        finally:
            self._hang_up()
        reason = "released"
        if answer is None:  # the keeper was killed: its note tells what to put back, and its lock is free
            self.restoration = self._put_back_here()
        elif "restoration" in answer:
            self.restoration, reason = Restoration(*answer["restoration"]), answer["reason"]
        else:
            raise PowerCapError(answer.get("error") or f"{self.uuid}: its power limit may not be back")
        expected = "already back" if is_same(self.watts, self.before_watts) else "restored"
        if reason != "released":
            self.remark = f"{self.uuid}: the power cap was taken off before the work was done, since {reason}"
        elif self.restoration is not None and self.restoration.outcome != expected:
            self.remark = f"the power cap of {self.watts:g} W did not last: {self.restoration.text}"
        return self.restoration

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the limit back; where that fails while an error is under way, the error carries it as a note."""
        try:
            self.release()
        except PowerCapError as problem:
            if error is None:
                raise
            error.add_note(str(problem))

    def _put_back_here(self) -> Restoration | None:
        folder = notes_folder(make=True)
        with closing(open_limiter(whole_node=True)) as limiter, locked(folder, self.uuid) as user:
            note = read_note(folder, self.uuid)
            if user is not None or note is None or note.holder != Process.this():
                return None  # nothing was changed, or somebody else has put it back
            device = next(device for device in limiter.devices() if device.uuid == self.uuid)
            return put_back(limiter, device, note, folder)

    def _send(self, line: bytes) -> None:
        assert self._keeper is not None and self._keeper.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._keeper.stdin.write(line)
            self._keeper.stdin.flush()

    def _answer(self, patience_seconds: float) -> dict[str, Any] | None:
        """Return the keeper's next line; None if it died."""
        assert self._keeper is not None and self._keeper.stdout is not None
        descriptor, deadline = self._keeper.stdout.fileno(), time.monotonic() + patience_seconds
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while b"\n" not in self._said:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise PowerCapError(f"{self.uuid}: its driver has not answered for {patience_seconds:g} s")
            part = os.read(descriptor, _MOST_BYTES)
            if not part:
                return None
            self._said += part
        line, _, self._said = self._said.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _hang_up(self) -> None:
        if self._keeper is not None:
            keeper, self._keeper = self._keeper, None
            for pipe in (keeper.stdin, keeper.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            keeper.wait()


def _start_keeper() -> subprocess.Popen[bytes]:
    # The folder of this package: a relative entry of PYTHONPATH may mean another one by now.
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "wattier_telemetry.cap_keeper"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,
    )


def check_caps(ratios: Sequence[float]) -> tuple[Device, ...]:
    """See whether this process may cap each of its GPUs so; what the dead left behind is put back on the way.

    Each limit is set to what it is, since only setting it tells whether one may. GPUs in use are passed over.

    Returns:
        The GPUs.

    Raises:
        PowerCapError: If it may not, a cap is out of range, or what was left behind cannot be put back.
    """
    folder = notes_folder(make=True)
    with closing(open_limiter()) as limiter:
        problems = [done.text for done in restore_stale(limiter, folder) if done.outcome == "problem"]
        if problems:
            raise PowerCapError(problems[0])
        devices = limiter.devices()
        for device in devices:
            with locked(folder, device.uuid) as user:
                limits = limiter.limits(device)
                for ratio in ratios:
                    cap_of(device, limits, ratio)
                if user is None and read_note(folder, device.uuid) is None:
                    limiter.set_limit(device, limits.limit_watts)
    return devices


class CapState(NamedTuple):
    """The power limit of one GPU of the node, and who has capped it.

    Attributes:
        device: The GPU.
        limits: Its limits; None if it has none.
        remark: What else is to be said: who holds a cap, what was left behind, why there are no limits.
    """

    device: Device
    limits: Limits | None
    remark: str


def cap_states() -> list[CapState]:
    """Return the power limits of all GPUs of the node; nothing is changed.

    Raises:
        PowerCapError: If there is no GPU here.
    """
    folder = notes_folder(make=False)
    states = []
    with closing(open_limiter(whole_node=True)) as limiter:
        for device in limiter.devices():
            try:
                limits = limiter.limits(device)
            except PowerCapError as error:
                states.append(CapState(device, None, str(error)))
                continue
            try:
                note = read_note(folder, device.uuid)
            except PowerCapError as error:
                states.append(CapState(device, limits, str(error)))
                continue
            if note is None:
                states.append(CapState(device, limits, ""))
                continue
            change = f"from {note.original_watts:g} W to {note.cap_watts:g} W"
            who = "capped by" if is_held(note) else "left behind by a dead"
            states.append(CapState(device, limits, f"{who} process {note.holder.pid}, {change}"))
    return states


def restore_caps() -> list[Restoration]:
    """Put back what the dead left behind on this node; nothing is asked of a driver where nothing was left.

    Raises:
        PowerCapError: If the notes cannot be read, or no GPU answers.
    """
    folder = notes_folder(make=False)
    if not noted(folder):
        return []
    with closing(open_limiter(whole_node=True)) as limiter:
        return restore_stale(limiter, folder)
