"""Ports of connections that ztunnel ended first come back before their minute is over."""

from __future__ import annotations

import socket
import subprocess

import pytest

from ambient.io import netns
from tests.support.require import require
from tests.ztunnel.harness import Space, mesh, two_spaces, wait_until
from ztunnel.io import sockets
from ztunnel.io.time_wait import BATCH, KEPT_MAX, Lingering

pytestmark = pytest.mark.net


def lingering_in(space: Space) -> int:
    done = space.run("ss", "-Htan", "state", "time-wait", stdout=subprocess.PIPE, check=True)
    return len(done.stdout.splitlines())


def end_first(space: Space, ip: str, listening: socket.socket) -> tuple[int, int]:
    """One connection from the address to itself; the local port and the cookie of the end that lingers."""
    sock = space.socket(listening.family)
    sock.bind((ip, 0))
    port, cookie = sock.getsockname()[1], sockets.cookie(sock)
    sock.connect((ip, 80))
    accepted, _ = listening.accept()
    sock.shutdown(socket.SHUT_WR)
    accepted.close()
    assert sock.recv(1) == b""
    sock.close()
    return port, cookie


@pytest.mark.parametrize("ipv6", [False, True])
def test_the_oldest_lingering_connections_are_ended_and_no_others(ipv6: bool):
    require("net")
    with two_spaces() as (space, _):
        ip = space.ip6 if ipv6 else space.ip4
        listening = space.listen(ip, 80)
        lingering = netns.run_in_netns(space.fd, Lingering)
        others = 20
        for _ in range(others):
            end_first(space, ip, listening)
        open_one = space.connect(ip, 80)
        accepted, _ = listening.accept()
        open_name = open_one.getsockname()
        for at in range(KEPT_MAX + BATCH - 1):
            # An open connection whose ports we believe to be those of an ended one: its cookie is another.
            port, cookie = (open_name[1], 4711) if at == 0 else end_first(space, ip, listening)
            lingering.ended(ip, port, 80, cookie, 0.0)
        assert lingering_in(space) == others + KEPT_MAX + BATCH - 2
        lingering.ended(ip, *(lambda found: (found[0], 80, found[1]))(end_first(space, ip, listening)), 0.0)
        assert lingering.unable == ""
        assert lingering_in(space) == others + KEPT_MAX
        open_one.sendall(b"still here")
        assert accepted.recv(100) == b"still here"
        for each in (accepted, open_one, lingering):
            each.close()


def test_a_pod_is_served_more_connections_than_it_has_ports(monkeypatch: pytest.MonkeyPatch):
    require("net")
    monkeypatch.setenv("WORKER_CONSTANTS", '{"ztunnel.io.time_wait.KEPT_MAX": 50, "ztunnel.io.time_wait.BATCH": 10}')
    with mesh() as it:
        it.b.run("sysctl", "-qw", "net.ipv4.ip_local_port_range=40000 40199", check=True)
        listening = it.b.listen(it.ip, it.port)
        for _ in range(500):
            near = it.connect()
            near.shutdown(socket.SHUT_WR)
            far, _ = listening.accept()
            assert far.recv(1) == b""
            far.close()
            assert near.recv(1) == b""
            near.close()
        wait_until(lambda: lingering_in(it.b) <= 61, "most are gone")
