"""Ports that nobody else is given."""

import socket
from pathlib import Path

import pytest

from wattier import ports
from wattier.errors import UserError
from wattier.ports import free_port


def test_it_is_free_and_outside_of_what_the_system_hands_out():
    low, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    for _ in range(50):
        port = free_port()
        assert port < low
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_one_that_is_taken_is_not_given(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(ports, "UNSOLICITED", range(port, port + 1))
        with pytest.raises(UserError, match="no free TCP port"):
            free_port()
    assert free_port() == port
