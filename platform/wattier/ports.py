"""TCP ports for processes that are told theirs before they listen."""

from __future__ import annotations

import contextlib
import secrets
import socket

from wattier.errors import UserError

UNSOLICITED = range(20_000, 32_000)  # by default Linux hands out 32768 and up, and Ray gives its workers 10002 to 19999


def free_port() -> int:
    """A TCP port that was free a moment ago, and that no usual system hands out to others who ask for any port.

    Raises:
        UserError: a hundred of them are taken.
    """
    for _ in range(100):
        port = secrets.choice(UNSOLICITED)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))  # on any address: a rank listens on its node's
            return port
    raise UserError("no free TCP port among a hundred of 20000 to 31999. Close some of the programs that listen there.")
