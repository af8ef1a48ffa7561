"""The thread that takes the oldest batch from the spool to the server, and does not go on before it is there."""

from __future__ import annotations

import http.client
import logging
import math
import random
import re
import threading
import time
from collections.abc import Sequence

from wattier_telemetry.push.remote_write import Target
from wattier_telemetry.push.segment import Series
from wattier_telemetry.push.spool import Segment, Spool

FAILURES = ("unreachable", "timeout", "server_error", "throttled", "refused", "rejected")
TIMEOUT_SECONDS = 10.0
CLOSE_SECONDS = 2.0
BACKOFF_SECONDS, BACKOFF_MOST_SECONDS = 0.5, 30.0
# What a person may mend while the batches wait: a token, a path, a receiver that is not switched on.
_REFUSED = {401, 402, 403, 404, 405, 407, 421, 423, 426}
_STALE = re.compile(r"out.of.order|duplicate sample", re.IGNORECASE)

_log = logging.getLogger(__name__)


class Sender:
    """Sends what is in a spool, oldest first, in a thread of its own.

    Args:
        target: Where to.
        spool: Where from.

    Attributes:
        batches: Batches the server has taken.
        samples: Samples the server has taken.
        push_seconds: How long the last attempt took, s.
        failures: Failed attempts by reason.
    """

    def __init__(self, target: Target, spool: Spool) -> None:
        self._target, self._spool = target, spool
        self.batches = self.samples = 0
        self.push_seconds = 0.0
        self.failures = dict.fromkeys(FAILURES, 0)
        self._trouble: str | None = None
        self._wake = threading.Event()
        self._deadline = math.inf
        self._thread = threading.Thread(target=self._loop, name="wattier-push", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Say that there is something to send."""
        self._wake.set()

    def close(self) -> None:
        """Try for 2 s to send what is left, once, and stop."""
        self._deadline = time.monotonic() + CLOSE_SECONDS
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)
        self._target.abort()
        self._thread.join(1.0)
        if not self._thread.is_alive():
            self._target.close()

    def _loop(self) -> None:
        attempts = 0
        while time.monotonic() < self._deadline:
            segment = self._spool.oldest()
            if segment is None:
                if self._deadline < math.inf:
                    return
                self._wake.wait()
                self._wake.clear()
            elif self._send(segment, in_doubt=attempts > 0 or segment.replayed):
                attempts = 0
            elif self._deadline < math.inf:
                return
            else:
                self._back_off(min(BACKOFF_MOST_SECONDS, BACKOFF_SECONDS * 2.0 ** min(attempts, 10)))
                attempts += 1

    def _back_off(self, seconds: float) -> None:
        """Wait with jitter; a new batch does not shorten it, `close` does."""
        until = time.monotonic() + seconds * random.uniform(0.75, 1.25)
        while self._deadline == math.inf and (left := until - time.monotonic()) > 0:
            self._wake.wait(left)
            self._wake.clear()

    def _send(self, segment: Segment, *, in_doubt: bool) -> bool:
        """Try one batch once, and return whether the queue moves on."""
        try:
            batch = self._spool.read(segment)
        except (ValueError, FileNotFoundError) as error:
            _log.error("%s: %s: moved to rejected", segment.path, error)
            self._spool.reject(segment, corrupt=True)
            return True
        except OSError as error:
            self._complain(f"{segment.path}: {error.strerror}", "the spool")
            return False
        reason, why = self._post(batch)
        # A batch that was sent before, and whose answer was lost, is refused because it is already there. Then the
        # server takes its newest samples a second time; it would not, if what it has were newer.
        if reason == "rejected" and in_doubt and _STALE.search(why):
            reason, why = self._post(_newest(batch))
        if reason is None:
            self._deliver(segment)
            return True
        self.failures[reason] += 1
        if reason == "rejected":
            _log.error("%s: %s: %s is moved to rejected", self._target.shown, why, segment.path)
            self._spool.reject(segment)
            return True
        self._complain(f"{self._target.shown}: {why}", reason)
        if reason in {"unreachable", "timeout"} and (count := self._spool.recall()):
            _log.warning("%s: may have been killed: its %d latest batches are sent again", self._target.shown, count)
        return False

    def _complain(self, message: str, trouble: str) -> None:
        """Log a trouble when it begins, not at every attempt."""
        if trouble != self._trouble:
            _log.warning("%s; the batches wait in the spool", message)
        self._trouble = trouble

    def _deliver(self, segment: Segment) -> None:
        self._spool.done(segment, self._target.hold_seconds)
        self.batches += 1
        self.samples += segment.samples
        if self._trouble:
            _log.warning("%s: takes samples again; %d batches to go", self._target.shown, len(self._spool))
        self._trouble = None

    def _post(self, batch: Sequence[Series]) -> tuple[str | None, str]:
        """Send a batch and return the reason why it failed, or None, with a message."""
        start = time.monotonic()
        timeout_seconds = min(TIMEOUT_SECONDS, max(0.1, self._deadline - start))
        try:
            status, text = self._target.post(batch, timeout_seconds)
        except TimeoutError:
            return "timeout", f"does not answer within {timeout_seconds:.0f} s"
        except (OSError, http.client.HTTPException, ValueError) as error:
            return (
                "unreachable",
                f"cannot be reached: {getattr(error, 'strerror', None) or error or type(error).__name__}",
            )
        finally:
            self.push_seconds = time.monotonic() - start
        return _reason(status), f"answers {status} {text}"


def _reason(status: int) -> str | None:
    """Say why a status means failure; None = it does not."""
    if 200 <= status < 300:
        return None
    if status >= 500 or status < 200:
        return "server_error"
    if status in {408, 425, 429}:
        return "throttled"
    return "refused" if status < 400 or status in _REFUSED else "rejected"


def _newest(batch: Sequence[Series]) -> list[Series]:
    """Return the samples of the batch's last moment."""
    newest_ms = max((series.times_ms[-1] for series in batch if series.times_ms), default=0)
    return [
        Series(series.name, series.labels, series.times_ms[-1:], series.values[-1:])
        for series in batch
        if series.times_ms and series.times_ms[-1] == newest_ms
    ]
