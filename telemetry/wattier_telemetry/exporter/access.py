"""Who may ask the exporter: networks, the bearer token, and a count of who was sent away."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import os
import stat
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

LOOPBACK = ("127.0.0.0/8", "::1/128")
REASONS = ("outside", "token", "malformed", "slow", "connections")  # why a client is refused
_LOG_SECONDS = 60.0
_TOKEN_LENGTH = 16

_log = logging.getLogger(__name__)


def read_token(path: Path) -> str:
    """Return the bearer token that a private file holds, without the white space around it.

    Raises:
        ValueError: If the file cannot be read, is open to others, or holds no good token.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            token = file.read(4096).strip()
    except OSError as error:
        raise ValueError(f"token file {path}: cannot be read ({error.strerror})") from error
    if mode & 0o077:
        raise ValueError(f"token file {path}: others may read it (mode {stat.S_IMODE(mode):04o}); chmod 600 {path}")
    if not token:
        raise ValueError(f"token file {path}: is empty, but must hold {_TOKEN_LENGTH} characters or more")
    if len(token) < _TOKEN_LENGTH:
        raise ValueError(f"token file {path}: holds {len(token)} characters, but must hold {_TOKEN_LENGTH} or more")
    if not all(33 <= byte <= 126 for byte in token):
        raise ValueError(f"token file {path}: must hold one word of printable ASCII, which fits into an HTTP header")
    return token.decode("ascii")


def parse_networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Return the networks that some texts name, such as ``10.0.0.0/24``, ``10.0.0.42`` or ``fd00::/8``.

    Raises:
        ValueError: If one is no network; the message names it.
    """
    networks: list[Network] = []
    for text in texts:
        try:
            network: Network = ipaddress.ip_network(text.strip())
        except ValueError as error:
            raise ValueError(
                f"allow: {text!r} is not a network ({error}); give one such as 10.0.0.0/24, 10.0.0.42 or fd00::/8"
            ) from None
        if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= 96:
            mapped = network.network_address.ipv4_mapped
            if mapped is not None:
                network = ipaddress.IPv4Network((mapped, network.prefixlen - 96))
        networks.append(network)
    return tuple(networks)


def parse_address(text: str) -> Address:
    """Return an address; an IPv4 one that arrives inside IPv6 (``::ffff:10.0.0.1``) is the IPv4 one."""
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


class Gate:
    """Says who may ask, counts whom it refuses, and writes at most one line a minute about each reason."""

    def __init__(self, allow: Sequence[str], token: str | None, own: Sequence[str]) -> None:
        self._own = parse_networks(own)
        self._allow = parse_networks(allow)
        self._token = None if token is None else token.encode()
        self.refused = dict.fromkeys(REASONS, 0)
        self._logged: dict[str, float] = {}

    def owns(self, client: str) -> bool:
        """Say whether an address is this machine's own."""
        return any(parse_address(client) in network for network in self._own)

    def admits(self, client: str) -> bool:
        """Say whether an address may ask; without an allow-list the token alone decides."""
        address = parse_address(client)
        return self.owns(client) or not self._allow or any(address in network for network in self._allow)

    def trusts(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Say whether a request carries the token, if one is asked for."""
        if self._token is None:
            return True
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token)

    def refuse(self, reason: str, client: str, why: str) -> None:
        """Count one refusal."""
        self.refused[reason] += 1
        self.say(reason, "refused %s: %s; %d refused for this so far", client, why, self.refused[reason])

    def say(self, reason: str, message: str, *values: object, error: BaseException | None = None) -> None:
        """Log a line, unless there was one for the same reason within the last minute."""
        now = time.monotonic()
        if now - self._logged.get(reason, -_LOG_SECONDS) >= _LOG_SECONDS:
            self._logged[reason] = now
            _log.warning(message, *values, exc_info=error)
