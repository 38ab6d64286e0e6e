"""Port 53 goes to the DNS proxy, and answers seem to come from the server that was asked."""

from __future__ import annotations

import errno
import socket

import pytest

from ambient.datapath.layout import LAYOUT
from ambient.io import cgroup
from tests.support.netlab import until

pytestmark = [pytest.mark.net, pytest.mark.bpf]

INET, INET6 = socket.AF_INET, socket.AF_INET6
SERVERS = [
    (INET, "10.96.0.10", "dns_udp4"),
    (INET6, "fd00:96::a", "dns_udp6"),
    (INET6, "::ffff:10.96.0.10", "dns_udp4"),
]


def serve(pod, listener: str, answer: bytes) -> bytes:
    """One question and its answer, as the proxy."""
    question, client = pod.listeners[listener].recvfrom(100)
    pod.listeners[listener].sendto(answer, client)
    return question


@pytest.mark.parametrize("family, server, listener", SERVERS)
def test_an_unconnected_socket_is_answered_by_the_server_it_asked(node, a, family, server, listener):
    counted = node.counted()
    app = a.puppet()
    slot = app.udp(family)
    app.call("sendto", slot, server, 53, "question")
    assert serve(a, listener, b"answer") == b"question"
    assert app.call("recvfrom", slot) == [server, "53", "answer"]
    assert counted("dns") == 1


@pytest.mark.parametrize("family, server, listener", SERVERS)
def test_a_connected_socket_is_too(node, a, family, server, listener):
    app = a.puppet()
    slot = app.udp(family)
    app.call("connect", slot, server, 53)
    assert app.peer(slot) == (server, 53)
    for number in range(2):
        app.call("send", slot, f"question{number}")
        assert serve(a, listener, b"answer%d" % number) == b"question%d" % number
        assert app.call("recvfrom", slot) == [server, "53", f"answer{number}"]


def test_a_socket_bound_to_the_pods_address_is_too(node, a):
    app = a.puppet()
    slot = app.udp()
    app.call("bind", slot, a.ip4, 0)
    app.call("sendto", slot, "10.96.0.10", 53, "question")
    serve(a, "dns_udp4", b"answer")
    assert app.call("recvfrom", slot) == ["10.96.0.10", "53", "answer"]


def test_a_socket_that_asks_two_servers_sees_the_last_one(node, a):
    app = a.puppet()
    slot = app.udp()
    for server in ("10.96.0.10", "10.96.0.11"):
        app.call("sendto", slot, server, 53, "question")
    serve(a, "dns_udp4", b"one")
    serve(a, "dns_udp4", b"two")
    assert app.call("recvfrom", slot) == ["10.96.0.11", "53", "one"]
    assert app.call("recvfrom", slot) == ["10.96.0.11", "53", "two"]


def test_other_datagrams_of_that_socket_keep_their_true_sender(node, a):
    app = a.puppet()
    slot, other = app.udp(), app.udp()
    app.call("bind", slot, "127.0.0.1", 5353)
    app.call("bind", other, "127.0.0.1", 5454)
    app.call("sendto", slot, "10.96.0.10", 53, "question")
    serve(a, "dns_udp4", b"answer")
    app.call("sendto", other, "127.0.0.1", 5353, "hello")
    assert app.call("recvfrom", slot) == ["10.96.0.10", "53", "answer"]
    assert app.call("recvfrom", slot) == ["127.0.0.1", "5454", "hello"]


@pytest.mark.parametrize("server", ["10.96.0.10", "fd00:96::a"])
def test_dns_over_tcp_goes_to_the_proxy_too(node, a, server):
    app = a.puppet()
    slot = app.connect(server, 53)
    sock, peer = a.listeners["dns_tcp6" if ":" in server else "dns_tcp4"].accept()
    assert peer[:2] == app.name(slot)
    assert app.name(slot)[0] in (a.ip4, a.ip6)
    assert app.peer(slot) == (server, 53)
    assert not node.leftovers(), "the proxy needs no record"
    sock.close()


def test_a_server_on_loopback_is_the_pods_own(node, a):
    app = a.puppet()
    server, client = app.udp(), app.udp()
    app.call("bind", server, "127.0.0.1", 53)
    app.call("sendto", client, "127.0.0.1", 53, "question")
    assert app.call("recvfrom", server)[2] == "question"


def test_other_ports_are_left_alone(node, a, make_pod):
    outside = make_pod()
    server, app = outside.puppet(), a.puppet()
    there, here = server.udp(), app.udp()
    server.call("bind", there, outside.ip4, 5300)
    app.call("sendto", here, outside.ip4, 5300, "hello")
    assert server.call("recvfrom", there)[2] == "hello"


@pytest.mark.parametrize("why", ["bypass", "exempt", "not enrolled"])
def test_who_is_not_captured_asks_its_server_itself(node, a, make_pod, why):
    outside = make_pod()
    server, app = outside.puppet(), a.puppet()
    there, here = server.udp(), app.udp()
    server.call("bind", there, outside.ip4, 53)
    if why == "bypass":
        node.reset(mode=LAYOUT["MODE_BYPASS"])
    elif why == "exempt":
        node.reset(exempt_cgroups=(cgroup.cgroup_id(a.cgroup),))
    else:
        a.leave()
    app.call("sendto", here, outside.ip4, 53, "question")
    assert server.call("recvfrom", there)[2] == "question"
    connected = app.udp()
    app.call("connect", connected, outside.ip4, 53)
    app.call("send", connected, "again")
    assert server.call("recvfrom", there)[2] == "again"


def test_without_the_proxy_a_connected_socket_is_refused(node, a):
    a.listeners["dns_udp4"].close()
    app = a.puppet()
    slot = app.udp()
    app.call("connect", slot, "10.96.0.10", 53)
    app.call("send", slot, "question")
    with pytest.raises(OSError) as caught:
        app.call("recv", slot)
    assert caught.value.errno == errno.ECONNREFUSED
    until(lambda: not node.leftovers(), "datagrams have no entries")
