"""Pushing samples to a server that may be away: memory, then the spool on disk, then the server; nothing is skipped.

    add() ──> ring in memory ──(every flush interval)──> a segment in the spool ──(oldest first)──> POST, 2xx, delete

A flush thread and a sender thread do the work, so that neither a full disk nor a hung server holds up the sampler.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from wattier_telemetry.exporter.metrics import Point
from wattier_telemetry.push.remote_write import TOKEN_VARIABLE, Format, Target
from wattier_telemetry.push.segment import Series
from wattier_telemetry.push.sender import FAILURES, Sender
from wattier_telemetry.push.spool import DEFAULT_CAP_BYTES, LOSSES, Spool

_FAILURES = (*FAILURES, "corrupt")
PUSH_METRICS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("wattier_push_batches_total", "counter", "Batches that the server has taken.", ()),
    (
        "wattier_push_failures_total",
        "counter",
        f"Attempts to push that failed, by reason: {', '.join(_FAILURES)}. Only the last two are not tried again.",
        ("reason",),
    ),
    ("wattier_push_seconds", "gauge", "How long the last attempt to push took, s.", ()),
    ("wattier_spool_bytes", "gauge", "Size of the batches on disk that wait to be pushed, B.", ()),
    ("wattier_spool_batches", "gauge", "Batches on disk that wait to be pushed.", ()),
    ("wattier_samples_pushed_total", "counter", "Samples that the server has taken.", ()),
    (
        "wattier_samples_lost_total",
        "counter",
        f"Samples that will never arrive, by reason: {', '.join(LOSSES)}. After a kill it is an upper bound.",
        ("reason",),
    ),
)

RING_SAMPLES = 1_000_000  # about 120 MB when full, which only a full disk makes it
SEGMENT_SAMPLES = 50_000  # a few MB of text: below what servers and proxies accept in one request

_log = logging.getLogger(__name__)


class _Sample(NamedTuple):
    time_ms: int
    points: tuple[Point, ...]
    starts_segment: bool  # Prometheus takes or refuses a request as a whole: old times must not drag new ones along


class PushSink:
    """Takes samples and gets them to a server, however long it is away.

    A SIGKILL costs at most the samples of one flush interval, which the next process on the same spool counts.
    Prometheus refuses what is older than what it has (after a clock was set back; batches more than an hour late while
    others go on pushing) unless its ``out_of_order_time_window`` allows it: such batches are kept in ``rejected``.

    Args:
        url: Of the server, see `Target`. The environment variable WATTIER_PUSH_TOKEN may hold a bearer token.
        format: ``remote-write`` or ``victoriametrics``.
        spool: Folder for what waits; one process at a time.
        flush_seconds: How often memory goes to disk, s.
        period_seconds: How often `add` will be called, s: it bounds what a SIGKILL costs.
        ring_samples: Most samples in memory.
        spool_bytes: Most bytes on disk.

    Raises:
        ValueError: If an argument cannot be used.
        ImportError: If a library is missing.
        SpoolUnavailable: If the spool is another's or cannot be written.
    """

    def __init__(  # noqa: PLR0913
        self,
        url: str,
        *,
        format: Format = "remote-write",  # noqa: A002
        spool: Path,
        flush_seconds: float = 5.0,
        period_seconds: float = 1.0,
        ring_samples: int = RING_SAMPLES,
        spool_bytes: int = DEFAULT_CAP_BYTES,
    ) -> None:
        for name, seconds in (("flush_seconds", flush_seconds), ("period_seconds", period_seconds)):
            if not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"{name} is {seconds}, but must be a positive number of seconds")
        target = Target(url, format=format, token=os.environ.get(TOKEN_VARIABLE))
        self._spool = Spool(spool, cap_bytes=spool_bytes)
        self._flush_seconds, self._most = flush_seconds, ring_samples
        self._adds_per_flush = math.ceil(flush_seconds / period_seconds) + 1
        self._constant = (("instance", socket.gethostname()), ("job", "wattier"))
        self._lock = threading.Lock()
        self._ring: deque[_Sample] = deque()
        self._held = self._widest = self._largest_flush = 0
        self._clock_ms = self._last_ms = self._highest_ms = -(2**62)
        self._step_back_ms = 0
        self._lost: Counter[str] = Counter({"disk_full": 0, "corrupt": 0})
        self._disk_ails = False
        self._closed = False
        self._flush_now = threading.Event()
        self._spool.note(0)
        self._sender = Sender(target, self._spool)
        self._flusher = threading.Thread(target=self._flush_loop, name="wattier-flush", daemon=True)
        self._flusher.start()

    def add(self, time_seconds: float, points: Sequence[Point]) -> None:
        """Take one sample into memory. Of two in one millisecond the second is filed one later."""
        if not points or not math.isfinite(time_seconds):
            return
        time_ms = round(time_seconds * 1000)
        with self._lock:
            if self._closed:
                return
            back, self._clock_ms = self._clock_ms - time_ms, time_ms
            if back > 0:
                self._step_back_ms = back
            elif time_ms <= self._last_ms:
                time_ms = self._last_ms + 1
            first, starts = not self._widest, back > 0 or self._last_ms < self._highest_ms < time_ms
            self._ring.append(_Sample(time_ms, tuple(points), starts))
            self._last_ms, self._highest_ms = time_ms, max(self._highest_ms, time_ms)
            self._held += len(points)
            self._widest = max(self._widest, len(points))
            self._trim()
            crowded = self._held > self._most // 2 and not self._disk_ails
        if first or crowded:  # the first flush tells the state file what a kill would cost
            self._flush_now.set()

    def points(self) -> list[Point]:
        """Return the figures of `PUSH_METRICS`."""
        sender, spool = self._sender, self._spool
        lost, failures = self._lost + spool.lost, sender.failures | {"corrupt": spool.corrupt}
        return [
            Point("wattier_push_batches_total", (), float(sender.batches)),
            *(Point("wattier_push_failures_total", (("reason", why),), float(failures[why])) for why in _FAILURES),
            Point("wattier_push_seconds", (), sender.push_seconds),
            Point("wattier_spool_bytes", (), float(spool.size_bytes)),
            Point("wattier_spool_batches", (), float(len(spool))),
            Point("wattier_samples_pushed_total", (), float(sender.samples)),
            *(Point("wattier_samples_lost_total", (("reason", why),), float(lost[why])) for why in LOSSES),
        ]

    def close(self) -> None:
        """Write what is in memory, try for 2 s to send it, and leave the rest in the spool for the next process."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._flush_now.set()
        self._flusher.join()
        self._sender.close()
        if self._held:
            _log.error("%d samples are lost: the spool could not be written", self._held)
        if len(self._spool):
            _log.warning("%d batches stay in the spool: the next process sends them", len(self._spool))
        self._spool.note(self._held, clean=not self._held, reason="disk_full")
        self._spool.close()

    def _trim(self) -> None:
        """Drop the oldest samples while memory holds too many; the caller has the lock."""
        while self._held > self._most and len(self._ring) > 1:
            dropped = len(self._ring.popleft().points)
            self._held -= dropped
            self._lost["disk_full"] += dropped

    def _flush_loop(self) -> None:
        closing = False
        while not closing:
            self._flush_now.wait(self._flush_seconds)
            self._flush_now.clear()
            closing = self._closed  # read before the flush, so that the last flush sees the last sample
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            batch, self._ring = self._ring, deque()
            step_back_ms, self._step_back_ms = self._step_back_ms, 0
        if step_back_ms:
            _log.warning("the clock went back by %.3f s: a server may refuse such samples", step_back_ms / 1000)
        if batch and not self._disk_ails:
            self._largest_flush = max(self._largest_flush, _width(batch))
        try:
            self._write(batch)
        except OSError as error:
            self._put_back(batch, error)
        except Exception:  # noqa: BLE001  (a point that is none must not stop the thread)
            _log.exception("samples that cannot be written are dropped")
            with self._lock:
                self._held -= _width(batch)
                self._lost["corrupt"] += _width(batch)
        bound = max(self._largest_flush, self._widest * self._adds_per_flush)
        self._spool.note(bound + (self._held if self._disk_ails else 0))

    def _write(self, batch: deque[_Sample]) -> None:
        """Write segments until the batch is empty."""
        while batch:
            count = _segment_length(batch)
            self._spool.append(self._series(islice(batch, count)))
            if self._disk_ails:
                _log.warning("the spool can be written again")
            self._disk_ails = False
            written = _width(batch.popleft() for _ in range(count))
            with self._lock:
                self._held -= written
            self._sender.wake()

    def _put_back(self, batch: deque[_Sample], error: OSError) -> None:
        with self._lock:
            batch.extend(self._ring)
            self._ring = batch
            self._trim()
        if not self._disk_ails:
            text = "the spool cannot be written (%s): samples stay in memory, up to %d of them"
            _log.error(text, error.strerror or error, self._most)
        self._disk_ails = True

    def _series(self, samples: Iterable[_Sample]) -> list[Series]:
        """Turn samples into series, each with the labels that a scrape would have given it."""
        table: dict[tuple[str, tuple[tuple[str, str], ...]], Series] = {}
        for time_ms, points, _ in samples:
            for name, labels, value in points:
                series = table.get((name, labels))
                if series is None:
                    have = {key for key, _ in labels}
                    all_labels = labels + tuple(pair for pair in self._constant if pair[0] not in have)
                    series = table[name, labels] = Series(name, all_labels, [], [])
                if not series.times_ms or series.times_ms[-1] != time_ms:
                    series.times_ms.append(time_ms)
                    series.values.append(float(value))
        return list(table.values())


def _segment_length(batch: deque[_Sample]) -> int:
    """Return how many samples make the next segment."""
    count = points = 0
    for sample in batch:
        if count and (sample.starts_segment or points + len(sample.points) > SEGMENT_SAMPLES):
            break
        count, points = count + 1, points + len(sample.points)
    return count


def _width(samples: Iterable[_Sample]) -> int:
    return sum(len(sample.points) for sample in samples)
