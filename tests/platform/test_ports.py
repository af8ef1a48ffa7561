"""Ports that nobody else is given."""

import socket

import pytest

from wattier import ports
from wattier.errors import UserError
from wattier.ports import free_port


def test_it_is_free_and_outside_of_what_systems_hand_out():
    for _ in range(50):
        port = free_port()
        assert 20_000 <= port < 32_000
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_one_that_is_taken_is_not_given(monkeypatch):
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        monkeypatch.setattr(ports, "UNSOLICITED", range(port, port + 1))
        with pytest.raises(UserError, match="no free TCP port"):
            free_port()
    assert free_port() == port
