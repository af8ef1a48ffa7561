"""The exporter's listening socket, which bounds its connections, also while TLS is still shaking hands."""

from __future__ import annotations

import contextlib
import resource
import socket
import weakref
from typing import Any

from wattier_telemetry.exporter.access import Gate

BACKLOG = 1024
_CONNECTIONS = 4000
_OUTSIDE_CONNECTIONS = 64  # strangers must not take the places of those who may ask
_OTHER_FILES = 128  # descriptors left to everything else

Where = tuple[int, tuple[Any, ...]]  # address family, and what bind takes


def resolve(address: str, port: int) -> Where:
    """Return the first socket address of a name; an empty one is every address of this machine.

    Raises:
        OSError: If the name is unknown.
    """
    found = socket.getaddrinfo(address or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return found[0][0], found[0][4]


class Listener(socket.socket):
    """A listening socket that bounds how many of its connections are open."""

    def __init__(self, where: Where, gate: Gate) -> None:
        super().__init__(where[0], socket.SOCK_STREAM)
        limit = room_for_connections()
        self._gate = gate
        self.stopping = False  # takes no more: asyncio leaks a connection that comes while its server closes
        self._limits = {True: limit, False: min(limit, _OUTSIDE_CONNECTIONS)}
        self._open: dict[bool, weakref.WeakSet[socket.socket]] = {b: weakref.WeakSet() for b in (True, False)}
        try:
            self._start(where[1])
        except BaseException:
            self.close()
            raise

    def _start(self, where: tuple[Any, ...]) -> None:
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self.family == socket.AF_INET6:
            self.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.bind(where)
        self.listen(BACKLOG)
        self.setblocking(False)

    def accept(self) -> tuple[socket.socket, Any]:
        """Take the next connection; one too many is closed, which the event loop takes for an aborted one."""
        if self.stopping:
            raise BlockingIOError
        connection, address = super().accept()
        admitted = self._gate.admits(address[0])
        have = self._open[admitted]
        if len(have) >= self._limits[admitted]:
            have = self._open[admitted] = weakref.WeakSet(c for c in have if c.fileno() >= 0)
        if len(have) >= self._limits[admitted]:
            connection.close()
            self._gate.refuse("connections", address[0], f"{len(have)} connections are open")
            raise ConnectionAbortedError
        have.add(connection)
        return connection, address


def room_for_connections() -> int:
    """Return how many connections to hold at most, after asking for as many file descriptors as that takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _CONNECTIONS + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _CONNECTIONS if soft == resource.RLIM_INFINITY else max(16, min(_CONNECTIONS, soft - _OTHER_FILES))
