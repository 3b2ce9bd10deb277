"""Ports where ranks meet: nobody else's, and never one that the kernel may give to a client meanwhile."""

import socket

import pytest

from engine.errors import EnvironmentProblem
from launcher import ports


def test_a_free_port_lies_below_those_of_clients_and_can_be_bound():
    found = [ports.free_port() for _ in range(50)]
    assert all(15000 <= port < 30000 for port in found)
    assert len(set(found)) > 40, "two launches at one time want two ports"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", found[0]))


def test_a_taken_port_is_passed_over(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        drawn = iter([taken.getsockname()[1] - ports.FIRST_PORT, 7])
        monkeypatch.setattr(ports.secrets, "randbelow", lambda number: next(drawn))
        assert ports.free_port() == ports.FIRST_PORT + 7


def test_a_node_without_a_free_port_says_so(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(ports.secrets, "randbelow", lambda number: taken.getsockname()[1] - ports.FIRST_PORT)
        with pytest.raises(EnvironmentProblem, match="are all taken"):
            ports.free_port()
