"""The exporter: one sampler of a node, shown to whoever scrapes, and pushed where asked."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from wattier_telemetry.exporter.metrics import Metric, Point, Sink, expose, push_metrics
from wattier_telemetry.exporter.omnistat import OmnistatView
from wattier_telemetry.exporter.sampler import Sampler
from wattier_telemetry.exporter.series import View, WattierView
from wattier_telemetry.exporter.state import SamplerState
from wattier_telemetry.registration import default_folder
from wattier_telemetry.source import PowerSource, open_node_sources

if TYPE_CHECKING:
    from wattier_telemetry.exporter.server import MetricsServer

DEFAULT_PORT = 9500
FRESH_SECONDS = 0.05
_EVERYWHERE = ("0.0.0.0", "::", "")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeOptions:
    """What `run` is asked to do.

    Attributes:
        sources: ``auto``, or names of sources separated by commas; or open sources, which stay open.
        address: Where to listen.
        port: 0 = any that is free.
        registry: Folder where trials register. None = the default folder of this user.
        period_seconds: Time between two samples, from 0.01 s.
        allow: Networks (CIDR) that may ask; none = this machine alone.
        token_file: File with a bearer token that whoever asks must know.
        tls_certificate: PEM file; with it, HTTPS is spoken.
        tls_key: PEM file.
        names: ``omnistat`` shows Omnistat's names beside Wattier's.
        push: URL of a server that takes samples.
        push_format: How it takes them.
        spool: Folder for what waits to be pushed, and for the joules. None = a folder beside the registry.
        flush_seconds: How often both are written, s.
        discovery: File for Prometheus' file service discovery; written at the start, removed at the end.
    """

    sources: str | tuple[PowerSource, ...] = "auto"
    address: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    registry: Path | None = None
    period_seconds: float = 1.0
    allow: tuple[str, ...] = ()
    token_file: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    names: Literal["wattier", "omnistat"] = "wattier"
    push: str | None = None
    push_format: Literal["remote-write", "victoriametrics"] = "remote-write"
    spool: Path | None = None
    flush_seconds: float = 5.0
    discovery: Path | None = None


class Renderer:
    """Turns the sampler's knowledge into the text that a scrape gets; many scrapes at once cost one rendering.

    Args:
        sampler: What to ask; a reading is taken if the last one is older than 50 ms.
        views: The names to use.
        sinks: Their own figures are shown, too.
    """

    def __init__(self, sampler: Sampler, views: Sequence[View], sinks: Sequence[Sink] = ()) -> None:
        self._sampler, self._views, self._sinks = sampler, views, sinks
        self._metrics: list[Metric] = [metric for view in views for metric in view.metrics]
        self._metrics += push_metrics() if sinks else ()
        self._lock = threading.Lock()
        self._text, self._of, self._at = b"", -1, float("-inf")
        self._shown_ended = 0
        self.renderings = 0

    def render(self) -> bytes:
        """Return the exposition in Prometheus' text format."""
        generation = self._sampler.fresh(FRESH_SECONDS)
        with self._lock:
            if generation == self._of or (generation and time.monotonic() - self._at < FRESH_SECONDS / 2):
                return self._text
            with self._sampler.locked:
                self._of = self._sampler.generation
                node, self._shown_ended = self._sampler.look(ended_after=self._shown_ended)
                points: list[Point] = []
                for view in self._views:
                    points += view.devices(node.watched, node)
                    points += view.common(node)
            points += [point for sink in self._sinks for point in sink.points()]
            self._text, self._at = expose(points, self._metrics), time.monotonic()
            self.renderings += 1
            return self._text


class RunningExporter:
    """An exporter at work in threads of this process.

    Attributes:
        address: Where it listens.
        port: The port it got, which matters if 0 was asked for.
        url: What to scrape.
        sampler: The sampler behind it.
    """

    def __init__(self, stack: ExitStack, address: str, port: int, sampler: Sampler, *, tls: bool = False) -> None:
        self._stack = stack
        self.address, self.port, self.sampler = address, port, sampler
        host = f"[{address}]" if ":" in address else address
        self.url = f"http{'s' if tls else ''}://{host}:{port}/metrics"

    def close(self) -> None:
        """Stop: the server first, the joules and the samples are kept last. Closing twice is harmless."""
        self._stack.close()


def run(options: ServeOptions, stop: threading.Event) -> None:
    """Serve until told to stop.

    Raises:
        SourceUnavailable: If a source that was named does not work here.
        ValueError: If an option cannot be.
        OSError: If the address cannot be had or a file cannot be used.
    """
    running = start(options)
    try:
        stop.wait()
    finally:
        running.close()


def start(options: ServeOptions) -> RunningExporter:
    """Start what the options ask for, and return at once; raises what `run` raises."""
    with ExitStack() as stack:
        sources = _open(options.sources, stack)
        views: list[View] = [WattierView()]
        if options.names == "omnistat":
            views.append(OmnistatView())
        folder = _state_folder(options)
        state = _state(folder, options, stack)
        sinks = _sinks(folder, options, stack)
        sampler = Sampler(
            sources,
            registry=options.registry,
            period_seconds=options.period_seconds,
            views=views,
            sinks=sinks,
            state=state,
        )
        renderer = Renderer(sampler, views, sinks)
        server = _serve(renderer.render, options)
        stack.callback(sampler.close)
        stack.callback(server.close)
        if options.discovery is not None:
            _discover(options.discovery, server.address, server.port, stack)
        sampler.start()
        tls = options.tls_certificate is not None
        running = RunningExporter(stack.pop_all(), server.address, server.port, sampler, tls=tls)
    _log.info("serving %s on %s", ", ".join(source.name for source in sources), running.url)
    return running


def serve(
    source: PowerSource, address: str = "127.0.0.1", port: int = DEFAULT_PORT, registry_folder: Path | None = None
) -> RunningExporter:
    """Serve one open source, to this machine alone unless told otherwise; it stays open, for it is the caller's.

    Raises:
        OSError: If the address cannot be had, for example because the port is taken.
    """
    sampler = Sampler([source], registry=registry_folder)
    renderer = Renderer(sampler, [WattierView()])
    with ExitStack() as stack:
        server = _serve(renderer.render, ServeOptions(address=address, port=port))
        stack.callback(sampler.close)
        stack.callback(server.close)
        sampler.start()
        return RunningExporter(stack.pop_all(), server.address, server.port, sampler)


def _open(sources: str | tuple[PowerSource, ...], stack: ExitStack) -> Sequence[PowerSource]:
    if not isinstance(sources, str):
        return sources
    opened = open_node_sources(sources)
    for source in opened:
        stack.callback(source.close)
    return opened


def _serve(render: Callable[[], bytes], options: ServeOptions) -> MetricsServer:
    from wattier_telemetry.exporter.server import MetricsServer, read_token

    return MetricsServer(
        render,
        address=options.address,
        port=options.port,
        allow=options.allow,
        token=None if options.token_file is None else read_token(options.token_file),
        certificate=options.tls_certificate,
        key=options.tls_key,
    )


def _state_folder(options: ServeOptions) -> Path:
    if options.spool is not None:
        return options.spool
    registry = default_folder() if options.registry is None else options.registry
    return registry / "exporter"


def _state(folder: Path, options: ServeOptions, stack: ExitStack) -> SamplerState | None:
    """Open the file of joules; where that is impossible the exporter still works, and says what it cannot do."""
    try:
        state = SamplerState(folder, flush_seconds=options.flush_seconds)
    except OSError as error:
        _log.warning("joules do not survive a restart: %s", error)
        return None
    stack.callback(state.close)
    return state


def _sinks(folder: Path, options: ServeOptions, stack: ExitStack) -> list[Sink]:
    if options.push is None:
        return []
    from wattier_telemetry.push import PushSink

    sink = PushSink(
        options.push,
        format=options.push_format,
        spool=folder / "push",
        flush_seconds=options.flush_seconds,
        period_seconds=options.period_seconds,
    )
    stack.callback(sink.close)
    return [sink]


def _discover(path: Path, address: str, port: int, stack: ExitStack) -> None:
    """Tell Prometheus where to scrape; it watches such files, and needs no restart."""
    host = socket.getfqdn() if address in _EVERYWHERE else address
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    labels = {"job": "wattier", "node": socket.gethostname()}
    with temporary.open("w", encoding="utf-8") as file:
        json.dump([{"targets": [target], "labels": labels}], file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    stack.callback(_remove, path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
