"""One client of the exporter: HTTP/1 in, one answer at a time out, and a deadline on everything.

h11 reads the protocol; what is here is when to listen, when to write and when to hang up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from email.utils import formatdate
from http import HTTPStatus
from typing import NamedTuple, cast

import h11

from wattier_telemetry.exporter.access import Gate

_HEADER_BYTES = 16 * 1024
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Headers = Sequence[tuple[bytes, bytes]]


class Answer(NamedTuple):
    """What a client gets."""

    status: int
    body: bytes
    headers: Headers = ()


Pages = Callable[[str, h11.Request], Awaitable[Answer]]  # (address of the client, request)


class Connection(asyncio.Protocol):
    """A connection, which adds itself to those that are open and leaves them when it is lost.

    Args:
        pages: Answers a request.
        gate: Is told of clients that speak nonsense or nothing.
        open_connections: Those of the server.
        quiet_seconds: Longest time for a request to arrive whole, for an answer to be read, and between the two.
    """

    def __init__(self, pages: Pages, gate: Gate, open_connections: set[Connection], quiet_seconds: float) -> None:
        self._pages = pages
        self._gate = gate
        self._open = open_connections
        self._quiet_seconds = quiet_seconds
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEADER_BYTES)
        self._task: asyncio.Task[None] | None = None  # makes the answer; meanwhile nothing is read
        self._deadline: asyncio.TimerHandle | None = None
        self._unread = False  # the client is slower than what it asks for
        self._answered = False
        self._head = False  # the client wants no body
        self._last = False  # the connection ends with the answer that is being made or written

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self._client: str = peer[0] if peer else "0.0.0.0"
        self._open.add(self)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._open.discard(self)
        for handle in (self._deadline, self._task):
            if handle is not None:
                handle.cancel()

    def data_received(self, data: bytes) -> None:
        self._http.receive_data(data)
        if self._task is None and not self._last:
            self._read()

    def pause_writing(self) -> None:
        self._unread = True

    def resume_writing(self) -> None:
        self._unread = False
        if self._task is None and not self._last:
            self._next()

    def finish(self) -> None:
        """Hang up, after the answer that is being made, if there is one."""
        self._last = True
        if self._task is None:
            self._transport.close()

    def abort(self) -> None:
        """Hang up now."""
        self._transport.abort()

    def _expect(self) -> None:
        """Give the client its time, which a byte now and then does not prolong."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = asyncio.get_running_loop().call_later(self._quiet_seconds, self._give_up)

    def _give_up(self) -> None:
        if not self._answered:
            self._gate.refuse("slow", self._client, f"no request within {self._quiet_seconds:g} s")
        if self._answered and not self._transport.get_write_buffer_size():
            self._transport.close()
        else:
            self._transport.abort()

    def _read(self) -> None:
        try:
            event = self._http.next_event()
            if isinstance(event, h11.Request):
                # A body is not wanted: the connection ends with the answer, unless all that follows is "no body".
                self._last |= not isinstance(self._http.next_event(), h11.EndOfMessage)
        except h11.RemoteProtocolError as error:
            self._gate.refuse("malformed", self._client, "it does not speak HTTP")
            self._last = True
            self._write(Answer(error.error_status_hint, b"This is not HTTP.\n"))
            return
        if isinstance(event, h11.Request):
            self._head = event.method == b"HEAD"
            self._transport.pause_reading()
            if self._deadline is not None:
                self._deadline.cancel()
            self._task = asyncio.get_running_loop().create_task(self._answer(event))

    async def _answer(self, request: h11.Request) -> None:
        try:
            answer = await self._pages(self._client, request)
        except Exception as error:  # noqa: BLE001  (or the client would wait for ever)
            self._gate.say("error", "a request could not be answered: %s", error, error=error)
            answer = Answer(500, b"The exporter's log says what is wrong.\n")
        self._task = None
        self._last |= answer.status in {401, 403, 405, 505}
        self._write(answer)

    def _write(self, answer: Answer) -> None:
        headers = [
            (b"content-type", CONTENT_TYPE.encode()),
            (b"content-length", b"%d" % len(answer.body)),
            (b"date", formatdate(usegmt=True).encode()),
            *answer.headers,
        ]
        if self._last:
            headers.append((b"connection", b"close"))
        head = h11.Response(
            status_code=answer.status, headers=headers, reason=HTTPStatus(answer.status).phrase.encode()
        )
        events = [head, h11.Data(data=b"" if self._head else answer.body), h11.EndOfMessage()]
        self._transport.write(b"".join(self._http.send(event) or b"" for event in events))
        self._answered = True
        self._expect()
        self._last |= self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE
        if self._last:
            self._transport.close()  # the deadline still holds for a client that does not read
        elif not self._unread:
            self._next()

    def _next(self) -> None:
        self._http.start_next_cycle()
        self._transport.resume_reading()
        self._read()
