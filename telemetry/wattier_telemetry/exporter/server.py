"""The exporter's door: who may ask, how often the machine is really read, and what noise on the wire costs (little)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import logging
import ssl
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import h11

from wattier_telemetry.exporter.access import LOOPBACK, Gate, parse_address, read_token
from wattier_telemetry.exporter.connection import CONTENT_TYPE, Answer, Connection
from wattier_telemetry.exporter.listener import BACKLOG, Listener, resolve

__all__ = ["CONTENT_TYPE", "MetricsServer", "read_token"]

_STOPPING = Answer(503, b"The exporter is stopping.\n")
_PAGES = {b"/": b"Wattier telemetry: the metrics are at /metrics\n", b"/-/healthy": b"Healthy.\n"}
_QUIET_SECONDS = 12.0  # longest wait for a request to be whole; no usual scrape interval, which would race it
_RENDER_SECONDS = 10.0  # a scraper gives up sooner; without it, a hung driver would collect connections for ever
_GRACE_SECONDS = 0.5  # what answers under way may still take when the server stops
_GZIP_BYTES = 1000

_log = logging.getLogger(__name__)


class _Renderer:
    """Calls `render` in a thread of its own, once at a time: whoever asks meanwhile gets the same answer."""

    def __init__(self, render: Callable[[], bytes], gate: Gate) -> None:
        self._render = render
        self._gate = gate
        self._pending: asyncio.Future[Answer] | None = None
        self._packed = (b"", b"")

    async def answer(self) -> Answer:
        if self._pending is None:
            loop = asyncio.get_running_loop()
            self._pending = loop.create_future()
            # Not a pool: its threads would keep the process from ending when a driver hangs.
            threading.Thread(target=self._work, args=(loop,), name="wattier-render", daemon=True).start()
        try:
            async with asyncio.timeout(_RENDER_SECONDS):
                return await asyncio.shield(self._pending)
        except TimeoutError:
            self._gate.say("hung", "the devices have not answered a scrape for %g s", _RENDER_SECONDS)
            return Answer(503, b"The devices do not answer.\n")

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        answer = Answer(500, b"The metrics could not be read; the exporter's log says why.\n")
        try:
            answer = Answer(200, self._render())
        except Exception as error:  # noqa: BLE001  (whatever it is, the next scrape may work)
            self._gate.say("render", "the metrics could not be read: %s: %s", type(error).__name__, error, error=error)
        finally:
            with contextlib.suppress(RuntimeError):  # the server has stopped meanwhile
                loop.call_soon_threadsafe(self.finish, answer)

    def finish(self, answer: Answer = _STOPPING) -> None:
        """Give everyone who waits this answer."""
        if self._pending is not None and not self._pending.done():
            self._pending.set_result(answer)
        self._pending = None

    def pack(self, body: bytes) -> bytes:
        """Compress a body, once for all who get the same one."""
        if self._packed[0] is not body:
            self._packed = (body, gzip.compress(body, compresslevel=1))
        return self._packed[1]


class _Pages:
    """What is served, and to whom: who asks comes before what is asked."""

    def __init__(self, gate: Gate, renderer: _Renderer) -> None:
        self._gate = gate
        self._renderer = renderer

    async def __call__(self, client: str, request: h11.Request) -> Answer:
        if refusal := self._refusal(client, request):
            return refusal
        path = request.target.partition(b"?")[0]
        if path == b"/metrics":
            return self._packed(client, request, await self._renderer.answer())
        if path not in _PAGES:
            return Answer(404, b"No such page; the metrics are at /metrics\n")
        return Answer(200, _PAGES[path])

    def _refusal(self, client: str, request: h11.Request) -> Answer | None:
        if not self._gate.admits(client):
            self._gate.refuse("outside", client, "it is outside the allow-list")
            return Answer(403, b"Your address is not allowed here.\n")
        if not request.http_version.startswith(b"1."):
            self._gate.refuse("malformed", client, "it does not speak HTTP/1")
            return Answer(505, b"Only HTTP/1 is spoken here.\n")
        if not self._gate.trusts(request.headers):
            self._gate.refuse("token", client, "wrong or missing bearer token")
            return Answer(401, b"A bearer token is needed here.\n", [(b"www-authenticate", b'Bearer realm="wattier"')])
        if request.method != b"GET":
            return Answer(405, b"Only GET works here.\n", [(b"allow", b"GET")])
        return None

    def _packed(self, client: str, request: h11.Request, answer: Answer) -> Answer:
        """Compress what other machines take compressed; bytes cost nothing within one."""
        if len(answer.body) < _GZIP_BYTES or self._gate.owns(client) or not _takes_gzip(request.headers):
            return answer
        return Answer(answer.status, self._renderer.pack(answer.body), [(b"content-encoding", b"gzip")])


def _takes_gzip(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    given = b",".join(value for name, value in headers if name == b"accept-encoding")
    words = [[part.strip() for part in word.lower().split(b";")] for word in given.split(b",")]
    return any(word[0] == b"gzip" and not {b"q=0", b"q=0.0", b"q=0.00", b"q=0.000"} & {*word} for word in words)


class MetricsServer:
    """Serves ``/metrics`` from a background thread until closed.

    This machine itself may always ask; further clients are those in `allow`, or, without it, all who know the token.

    Args:
        render: Returns the exposition. Called in a thread, never twice at a time.
        address: What to listen on.
        port: Where; 0 = any free one, see `port`.
        allow: Networks or addresses that may ask.
        token: Bearer token that every request must carry, also from this machine.
        certificate: PEM file with the certificate chain, for TLS.
        key: PEM file with its private key.

    Attributes:
        address: What it listens on.
        port: Where it listens.
        refused: How many requests and connections were refused, by reason.

    Raises:
        ValueError: If somebody unknown could read everything, or a network, the token or a TLS file is wrong.
        OSError: If the address cannot be had, for example because the port is taken.
    """

    def __init__(  # noqa: PLR0913  (a server has that many sides)
        self,
        render: Callable[[], bytes],
        *,
        address: str = "127.0.0.1",
        port: int = 9500,
        allow: Sequence[str] = (),
        token: str | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
        _own: Sequence[str] = LOOPBACK,
    ) -> None:
        if token is not None and not token.strip():
            raise ValueError("token: is empty; give a secret of 16 characters or more, or none at all")
        gate = Gate(allow, token, _own)
        where = resolve(address, port)
        if not (parse_address(where[1][0]).is_loopback or allow or token):
            raise ValueError(
                f"address {address}: all who reach it could read the metrics; give the networks that may, such as "
                "10.0.0.0/24 (0.0.0.0/0 = all), or a token, or listen on 127.0.0.1"
            )
        self.address = address
        self.refused = gate.refused
        self._gate = gate
        self._renderer = _Renderer(render, gate)
        tls = _tls(certificate, key)
        self._listener = Listener(where, gate)
        self.port: int = self._listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=(tls,), name="wattier-http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop within about a second, whatever clients and devices do. Closing twice is harmless."""
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=5)

    def _run(self, tls: ssl.SSLContext | None) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve(tls))
        except Exception:  # noqa: BLE001  (nobody else would hear of it)
            _log.exception("the metrics server on port %d has died", self.port)
        finally:
            self._listener.close()

    async def _serve(self, tls: ssl.SSLContext | None) -> None:
        self._loop.set_exception_handler(self._note)
        pages = _Pages(self._gate, self._renderer)
        clients: set[Connection] = set()
        quiet = _QUIET_SECONDS
        server = await self._loop.create_server(
            lambda: Connection(pages, self._gate, clients, quiet),
            sock=self._listener,
            ssl=tls,
            backlog=BACKLOG,
            ssl_handshake_timeout=quiet if tls else None,
            ssl_shutdown_timeout=_GRACE_SECONDS if tls else None,
        )
        await self._stop.wait()
        self._listener.stopping = True
        await asyncio.sleep(0.01)
        server.close()
        for client in list(clients):
            client.finish()
        await self._until_gone(clients)
        self._renderer.finish()
        await asyncio.sleep(0.05)  # those who waited for it write their answers
        for client in list(clients):
            client.abort()
        await self._until_gone(clients)

    async def _until_gone(self, clients: set[Connection]) -> None:
        end = self._loop.time() + _GRACE_SECONDS
        while clients and self._loop.time() < end:
            await asyncio.sleep(0.01)

    def _note(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Keep the loop's complaints, nearly all of them about clients that vanish, off the terminal."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}:
            self._gate.say("files", "no connection can be taken: %s", error)
        else:
            _log.debug("%s", context.get("message"), exc_info=error)


def _tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ValueError(f"TLS: the {'key' if key is None else 'certificate'} is missing; give both files or neither")
    for name, path in (("certificate", certificate), ("key", key)):
        try:
            path.open("rb").close()
        except OSError as error:
            raise ValueError(f"{name} {path}: cannot be read ({error.strerror})") from error
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key, password="")  # None would ask for a passphrase on the terminal
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ValueError(
            f"certificate {certificate}, key {key}: must be a PEM pair that belongs together, the key without a "
            f"passphrase ({reason})"
        ) from error
    return context
