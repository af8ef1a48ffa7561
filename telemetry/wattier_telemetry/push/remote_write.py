"""What goes over the wire: Prometheus remote write 1.0, or the text that VictoriaMetrics imports.

References: https://prometheus.io/docs/specs/prw/remote_write_spec/ (messages, headers, order of labels) and
https://prometheus.io/docs/instrumenting/exposition_formats/ (escapes, values, milliseconds).
"""

from __future__ import annotations

import base64
import gzip
import http.client
import math
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, get_args
from urllib.parse import SplitResult, unquote, urlsplit

from wattier_telemetry.push.segment import Series

Format = Literal["remote-write", "victoriametrics"]
FORMATS: tuple[str, ...] = get_args(Format)
TOKEN_VARIABLE = "WATTIER_PUSH_TOKEN"
_PATHS = {"remote-write": "/api/v1/write", "victoriametrics": "/api/v1/import/prometheus"}
_HEADERS = {
    "remote-write": {
        "Content-Encoding": "snappy",
        "Content-Type": "application/x-protobuf",
        "X-Prometheus-Remote-Write-Version": "0.1.0",
    },
    "victoriametrics": {"Content-Encoding": "gzip", "Content-Type": "text/plain; charset=utf-8"},
}


class Target:
    """A server that takes samples. Redirects are not followed and proxy variables not read: samples go to this host.

    Args:
        url: ``http://`` or ``https://``; without a path the usual one of the format is added.
        format: ``remote-write`` or ``victoriametrics``.
        token: Sent as a bearer token, if given; else the user and password of the URL, if any.

    Attributes:
        shown: The URL without its secrets, for messages.
        hold_seconds: How long the server may keep what it has taken in memory only, s. The connection stays open
            meanwhile, so that a server that was killed and started again does not go unnoticed.

    Raises:
        ValueError: If the URL, the format or the token cannot be used.
        ImportError: If the library that compresses remote writes is not installed.
    """

    def __init__(self, url: str, *, format: Format, token: str | None = None) -> None:  # noqa: A002
        if format not in FORMATS:
            raise ValueError(f"push format is {format!r}, but must be one of {', '.join(FORMATS)}")
        parts = _parse(url)
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname or "", parts.port
        path = parts.path if parts.path not in {"", "/"} else _PATHS[format]
        self._path = path + (f"?{parts.query}" if parts.query else "")
        self.shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}"
        self._headers = {"User-Agent": "wattier-telemetry", **_HEADERS[format], **_authorization(parts, token)}
        self._compress = _snappy() if format == "remote-write" else _gzip
        self._encode = write_request if format == "remote-write" else import_lines
        # Prometheus answers after its write-ahead log has it; VictoriaMetrics 1.79 writes to disk within 5 s or so.
        self.hold_seconds = 15.0 if format == "victoriametrics" else 0.0
        self._connection = self._connect()

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return kind(self._host, self._port)

    def post(self, batch: Sequence[Series], timeout_seconds: float) -> tuple[int, str]:
        """Send a batch and return the status with the first words of the answer.

        Raises:
            OSError: If the server cannot be reached or does not answer in time.
            http.client.HTTPException: If what answers does not speak HTTP.
        """
        body = self._compress(self._encode(batch))
        connection = self._connection
        connection.timeout = timeout_seconds
        if connection.sock is not None:
            connection.sock.settimeout(timeout_seconds)
        keep = False
        try:
            connection.request("POST", self._path, body, self._headers)
            with connection.getresponse() as answer:
                text = answer.read(300).decode("utf-8", "replace")
                keep = self.hold_seconds > 0 and answer.isclosed()  # all of it was read
                return answer.status, " ".join(text.split())
        finally:
            if not keep:
                connection.close()

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def abort(self) -> None:
        """Break off a `post` that another thread waits for."""
        sock = self._connection.sock
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:  # it has just ended by itself
                return


def write_request(batch: Iterable[Series]) -> bytes:
    """Return the protobuf message ``WriteRequest { repeated TimeSeries timeseries = 1 }``.

    ``TimeSeries { repeated Label labels = 1; repeated Sample samples = 2 }``, ``Label { string name = 1; value = 2 }``,
    ``Sample { double value = 1; int64 timestamp = 2 }``, timestamps in ms. Labels are sorted by name, none is empty.
    """
    return b"".join(_field(1, b"".join(_time_series(series))) for series in batch)


def import_lines(batch: Iterable[Series]) -> bytes:
    """Return one line a sample: name, labels, value, and time in ms."""
    lines = []
    for series in batch:
        labels = ",".join(f'{name}="{_escape(value)}"' for name, value in _shown_labels(series.labels))
        lines += [
            f"{series.name}{{{labels}}} {_number(value)} {time_ms}\n"
            for time_ms, value in zip(series.times_ms, series.values, strict=True)
        ]
    return "".join(lines).encode("utf-8", "replace")


def _time_series(series: Series) -> Iterator[bytes]:
    for name, value in sorted([("__name__", series.name), *_shown_labels(series.labels)]):
        yield _field(1, _field(1, name.encode("utf-8", "replace")) + _field(2, value.encode("utf-8", "replace")))
    for time_ms, number in zip(series.times_ms, series.values, strict=True):
        yield _field(2, b"\x09" + struct.pack("<d", number) + b"\x10" + _varint(time_ms))


def _field(number: int, content: bytes) -> bytes:
    """Return a field of wire type 2: its key, its length, its bytes."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    number &= 0xFFFF_FFFF_FFFF_FFFF  # an int64 below zero takes ten bytes of two's complement
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _shown_labels(labels: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Leave out empty values: to Prometheus they are labels that are not there, and remote write forbids them."""
    return [(name, value) for name, value in labels if value]


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else f"{'+' if value > 0 else '-'}Inf"


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, 1)


def _snappy() -> Callable[[bytes], bytes]:
    try:
        from cramjam import snappy
    except ImportError as error:
        raise ImportError("push format remote-write needs cramjam: pip install cramjam") from error

    return lambda data: bytes(snappy.compress_raw(data))


def _parse(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        good = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # such as a port that is no number
        good = False
    if not good or not url.isascii() or not url.isprintable() or " " in url:
        shown = url.rpartition("@")[2].partition("?")[0]
        raise ValueError(
            f"push URL is {shown!r}, but must be http://host:port or https://host:port, with or without a path"
        )
    return parts


def _authorization(parts: SplitResult, token: str | None) -> dict[str, str]:
    if token:
        if not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError(f"{TOKEN_VARIABLE} must be one word of printable ASCII")
        return {"Authorization": f"Bearer {token}"}
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
