"""However a client makes its connection to a pod of its node, it is judged like any other."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import pytest

from ambient.datapath.values import VerdictKey
from ambient.io import netns
from tests.support.netlab import until
from tests.support.same_node import ME, allow, captured

pytestmark = [pytest.mark.net, pytest.mark.bpf]


def test_fast_open_and_fast_open_connect_are_authorized_like_any_other(node, client, server):
    allow(node, server)
    for fd in (client.fd, server.fd):
        with netns.in_netns(fd):
            Path("/proc/sys/net/ipv4/tcp_fastopen").write_text(str(0x1 | 0x2 | 0x4))
    app = client.puppet()
    slot = app.tcp()
    app.call("fastopen", slot, server.ip4, 80, "early")
    accepted, _ = server.app.accept(server.listening[server.ip4])
    assert server.app.call("recv", accepted)[2] == "early"
    assert len(node.maps.flows) == 1
    node.maps.verdicts.delete(VerdictKey(ME, server.workload, 0))
    slot = app.tcp()
    app.call("fastopen", slot, server.ip4, 80, "early")
    assert captured(node, client)[0] == (server.ip4, 80)


def test_a_reconnected_socket_is_judged_anew(node, client, server):
    allow(node, server)
    app = client.puppet()
    slot = app.connect(server.ip4, 80)
    assert len(node.maps.flows) == 1
    app.call("unspec", slot)
    until(lambda: node.maps.enrolled[client.cookie].flows == 0, "disconnecting gives the share back")
    allow(node, server, 0, allow=0)
    app.call("connect", slot, server.ip4, 80)
    assert captured(node, client)[0] == (server.ip4, 80)


def test_a_mapped_address_is_the_same_connection(node, client, server):
    allow(node, server)
    app = client.puppet()
    slot = app.tcp(socket.AF_INET6)
    app.call("connect", slot, f"::ffff:{server.ip4}", 80)
    server.app.accept(server.listening[server.ip4])
    ((key, _),) = node.maps.flows.items()
    assert (key.local, key.remote) == (server.ip4, client.ip4)
    allow(node, server, 0, allow=0)
    slot = app.tcp(socket.AF_INET6)
    app.call("connect", slot, f"::ffff:{server.ip4}", 80)
    assert captured(node, client)[0] == (server.ip4, 80)


def test_a_bound_socket_keeps_its_port_and_is_judged_like_any_other(node, client, server):
    app = client.puppet()
    for allowed in (1, 0):
        allow(node, server, 0, allow=allowed)
        slot = app.tcp()
        app.call("option", slot, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        app.call("bind", slot, client.ip4, 7000 + allowed)
        app.call("connect", slot, server.ip4, 80)
        assert app.name(slot) == (client.ip4, 7000 + allowed)
    assert captured(node, client)[0] == (server.ip4, 80)
    assert [key.remote_port for key in node.maps.flows] == [7001]


def test_a_socket_bound_to_loopback_is_ztunnels(node, client, server):
    allow(node, server)
    app = client.puppet()
    slot = app.tcp()
    app.call("bind", slot, "127.0.0.1", 0)
    app.call("connect", slot, server.ip4, 80)
    assert not node.maps.flows.items()


def test_mptcp_is_judged_like_any_other(node, client, server):
    app = client.puppet()
    for allowed in (1, 0):
        allow(node, server, 0, allow=allowed)
        app.call("mptcp", 50 + allowed, int(socket.AF_INET))
        app.call("connect", 50 + allowed, server.ip4, 80)
    assert captured(node, client)[0] == (server.ip4, 80)
    assert len(node.maps.flows) == 1


def test_a_raw_syn_is_steered_even_while_others_are_allowed(node, client, server):
    """A process with CAP_NET_RAW makes its own packet: no connect hook, so no authorization."""
    allow(node, server)
    app = client.puppet()
    app.connect(server.ip4, 80)
    counted = node.counted()
    header = struct.pack(">HHIIBBHHH", 4444, 80, 1, 0, 5 << 4, 2, 1024, 0, 0)
    pseudo = socket.inet_aton(client.ip4) + socket.inet_aton(server.ip4) + struct.pack(">BBH", 0, 6, 20)
    total = sum(struct.unpack(">16H", pseudo + header))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    packet = header[:16] + struct.pack(">H", ~total & 0xFFFF) + header[18:]
    with node.member("kubepods/" + client.name):
        raw = netns.create_socket(client.fd, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
    with raw:
        raw.sendto(packet, (server.ip4, 0))
        until(lambda: counted("steered") >= 1, "the SYN is steered to ztunnel's plaintext listener")


def test_a_pod_reaches_itself(node, client):
    allow(node, client)
    app = client.puppet()
    listener = app.listen(client.ip4, 80)
    app.connect(client.ip4, 80)
    assert app.accept(listener)[1][0] == client.ip4
