"""What a hook decided for a socket counts only for exactly that connection: every way a socket can outlive, escape or
repeat a decision.

The record written at connect is compared with the actual remote when the port exists, and goes with the socket. After
each test the node fixture reads redirects, authorized and origins again: nothing may be left.
"""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import WorkloadValue
from ambient.io import netns
from tests.support.foreign import attached, port_rewriter
from tests.support.netlab import run_ip, until

pytestmark = [pytest.mark.net, pytest.mark.bpf]

TCP_FASTOPEN_CONNECT = 30
VIP = "10.96.0.1"


def refused(call, *words) -> int:
    with pytest.raises(OSError) as caught:
        call(*words)
    return caught.value.errno or 0


def flows(node, pod) -> int:
    return node.maps.enrolled[pod.cookie].flows


def accept(node, pod, listener="outbound4"):
    """(accepted socket, original destination or None)."""
    sock, cookie = pod.ztunnel_accept(listener)
    record = node.maps.take_redirect(cookie)
    return sock, record and (record.original, record.original_port)


@pytest.fixture
def plain_server(node, make_pod):
    """A pod outside the mesh, known as such, with a puppet that listens on port 80 of both families."""
    pod = make_pod()
    for address in pod.addresses:
        node.maps.workloads[address] = WorkloadValue(pod.workload, LAYOUT["WORKLOAD_LOCAL"], 1)
    puppet = pod.puppet()
    pod.listening = {address: puppet.listen(address, 80) for address in pod.addresses}
    pod.server = puppet
    return pod


def test_reconnecting_after_a_refused_connect_makes_a_new_record(node, a):
    listener = a.listeners.pop("outbound4")
    listener.close()
    app = a.puppet()
    slot = app.tcp()
    for _ in range(3):
        assert refused(app.call, "connect", slot, VIP, 80) == errno.ECONNREFUSED
        assert not node.leftovers()
        assert flows(node, a) == 0
    a.listeners["outbound4"] = a.listener("127.0.0.1", 15001)
    app.call("connect", slot, "10.96.0.2", 81)
    sock, original = accept(node, a)
    assert original == ("10.96.0.2", 81)
    assert app.peer(slot) == ("10.96.0.2", 81)
    sock.close()


def test_a_socket_reconnected_outside_the_mesh_keeps_nothing_of_its_capture(node, a, plain_server):
    counted = node.counted()
    app = a.puppet()
    slot = app.connect(VIP, 80)
    sock, original = accept(node, a)
    assert original == (VIP, 80)
    app.call("unspec", slot)
    sock.close()
    until(lambda: flows(node, a) == 0, "disconnecting gives the share back")
    assert refused(app.peer, slot) == errno.ENOTCONN
    # It is still bound to the pod's address, as the kernel keeps what was bound.
    app.call("connect", slot, plain_server.ip4, 80)
    plain_server.server.accept(plain_server.listening[plain_server.ip4])
    assert app.peer(slot) == (plain_server.ip4, 80)
    assert not node.leftovers()
    assert counted("tuple_mismatch") == 0, "connect forgot the old record, so there was nothing to compare"


def test_a_socket_disconnected_and_reconnected_within_the_mesh_gets_a_new_record(node, a):
    app = a.puppet()
    slot = app.tcp()
    for port in (80, 81, 82):
        app.call("connect", slot, VIP, port)
        sock, original = accept(node, a)
        assert original == (VIP, port)
        assert flows(node, a) == 1
        app.call("unspec", slot)
        sock.close()
    assert flows(node, a) == 0


def test_a_disconnected_socket_that_listens_shows_its_clients_and_not_what_it_once_dialled(node, a):
    app = a.puppet()
    slot = app.connect(VIP, 80)
    accept(node, a)[0].close()
    app.call("unspec", slot)
    app.call("listen", slot, 8)
    # Bound to the pod's own address by the hook: a plaintext client is steered to ztunnel's listener instead.
    assert app.name(slot)[0] == a.ip4


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_fast_open_connect_is_captured_when_the_first_byte_goes_out(node, a, b, family):
    with netns.in_netns(a.fd):
        Path("/proc/sys/net/ipv4/tcp_fastopen").write_text(str(0x1 | 0x4))
    app = a.puppet()
    slot = app.tcp(family)
    target = b.ip4 if family == socket.AF_INET else b.ip6
    app.call("option", slot, socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
    app.call("connect", slot, target, 80)
    assert not node.leftovers(), "deferred: there is no connection yet"
    app.call("send", slot, "early")
    sock, original = accept(node, a, "outbound4" if family == socket.AF_INET else "outbound6")
    assert original == (target, 80)
    assert sock.recv(10) == b"early"
    assert app.peer(slot) == (target, 80)
    sock.close()


def test_a_deferred_connection_that_is_never_made_leaves_nothing(node, a):
    with netns.in_netns(a.fd):
        Path("/proc/sys/net/ipv4/tcp_fastopen").write_text(str(0x1 | 0x4))
    app = a.puppet()
    slot = app.tcp()
    app.call("option", slot, socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
    app.call("connect", slot, VIP, 80)
    app.close(slot)
    assert not node.leftovers()
    assert flows(node, a) == 0


@pytest.mark.parametrize("sysctl", [0x1, 0x1 | 0x4])
def test_sendto_with_fast_open_is_captured(node, a, b, sysctl):
    with netns.in_netns(a.fd):
        Path("/proc/sys/net/ipv4/tcp_fastopen").write_text(str(sysctl))
    app = a.puppet()
    slot = app.tcp()
    app.call("fastopen", slot, b.ip4, 80, "early")
    sock, original = accept(node, a)
    assert original == (b.ip4, 80)
    assert sock.recv(10) == b"early"
    assert app.peer(slot) == (b.ip4, 80)
    assert app.name(slot)[0] == a.ip4
    sock.close()


def test_fast_open_to_a_mesh_port_is_refused(node, a, b):
    app = a.puppet()
    slot = app.tcp()
    assert refused(app.call, "fastopen", slot, b.ip4, 15008, "x") == errno.EPERM


def test_without_a_route_nothing_is_left_and_the_socket_works_again(node, a, plain_server):
    app = a.puppet()
    node.maps.workloads["203.0.113.9"] = WorkloadValue(77, 0, 1)
    run_ip(a.fd, "route del default")
    slot = app.tcp()
    assert refused(app.call, "connect", slot, "203.0.113.9", 80) == errno.ENETUNREACH
    assert not node.leftovers()
    # A captured destination needs no route: ztunnel has to reach it, not the pod.
    app.call("connect", slot, VIP, 80)
    sock, original = accept(node, a)
    assert original == (VIP, 80)
    sock.close()
    node.maps.workloads.delete("203.0.113.9")


def test_with_loopback_down_the_connect_fails_and_nothing_is_left(node, a):
    run_ip(a.fd, "link set lo down")
    app = a.puppet()
    slot = app.tcp()
    why = refused(app.call, "nonblocking_connect", slot, VIP, 80)
    assert why in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINPROGRESS)
    app.close(slot)
    assert not node.leftovers()
    assert flows(node, a) == 0


def test_a_destination_somebody_else_rewrote_afterwards_gets_no_record(node, a):
    """The record names 127.0.0.1:15001; the connection goes elsewhere, so nothing is written on its behalf."""
    counted = node.counted()
    app = a.puppet()
    stranger = app.listen("127.0.0.1", 15099)
    with attached(port_rewriter(15099), node.cgroup):
        slot = app.connect(VIP, 80)
    app.accept(stranger)
    assert counted("tuple_mismatch") == 1
    assert not node.leftovers()
    assert flows(node, a) == 0
    assert app.peer(slot) == ("127.0.0.1", 15099), "and the application is shown where it really is"


def test_a_probe_somebody_else_rewrote_afterwards_is_not_authorized(node, b):
    counted = node.counted()
    app = b.puppet()
    app.listen(b.ip4, 8080)
    with attached(port_rewriter(8080), node.cgroup):
        node.process("kubelet").connect(b.ip4, 80)
    b.listeners["plaintext4"].accept()[0].close()
    assert counted("tuple_mismatch") == 1
    assert not node.maps.authorized.items()


def test_connecting_twice_changes_nothing(node, a):
    app = a.puppet()
    slot = app.connect(VIP, 80)
    assert refused(app.call, "connect", slot, "10.96.0.2", 81) == errno.EISCONN
    sock, original = accept(node, a)
    assert original == (VIP, 80)
    assert app.peer(slot) == (VIP, 80)
    sock.close()


def test_two_sockets_of_one_port_have_their_own_records(node, a):
    app = a.puppet()
    first, second = app.tcp(), app.tcp()
    for slot in (first, second):
        app.call("option", slot, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    app.call("bind", first, a.ip4, 7000)
    app.call("connect", first, VIP, 80)
    sock, original = accept(node, a)
    # The second has the same four numbers after rewriting: the kernel refuses it, and the first keeps its own.
    app.call("bind", second, a.ip4, 7000)
    assert refused(app.call, "connect", second, "10.96.0.2", 81) == errno.EADDRNOTAVAIL
    assert original == (VIP, 80)
    assert app.peer(first) == (VIP, 80)
    assert refused(app.peer, second) == errno.ENOTCONN
    sock.close()
    assert flows(node, a) == 1


def test_a_source_port_used_again_gets_the_new_record(node, a):
    app = a.puppet()
    for port in (80, 81, 82):
        slot = app.tcp()
        app.call("option", slot, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        app.call("bind", slot, a.ip4, 7001)
        app.call("connect", slot, VIP, port)
        sock, original = accept(node, a)
        assert original == (VIP, port)
        app.call("reset", slot)
        sock.close()
        until(lambda: not node.leftovers() and flows(node, a) == 0, "the record goes with its socket")


def test_half_closed_connections_keep_their_share_until_they_end(node, a):
    app = a.puppet()
    slot = app.connect(VIP, 80)
    sock, _ = accept(node, a)
    app.call("shutdown", slot, socket.SHUT_WR)
    assert sock.recv(1) == b""
    assert flows(node, a) == 1
    sock.sendall(b"late")
    assert app.call("recv", slot)[2] == "late"
    assert app.peer(slot) == (VIP, 80)
    sock.close()
    app.close(slot)
    until(lambda: flows(node, a) == 0, "the share is given back")


def test_an_application_cannot_reach_ztunnels_listener_by_itself(node, a):
    """Not by its name (the guard), not by a socket older than the enrolment: it would have no record."""
    app = a.puppet()
    assert refused(app.connect, "127.0.0.1", 15001) == errno.EPERM
    entry = node.maps.enrolled[a.cookie]
    node.maps.enrolled.delete(a.cookie)
    app.connect("127.0.0.1", 15001)
    node.maps.enrolled[a.cookie] = entry
    sock, original = accept(node, a)
    assert original is None
    sock.close()


def test_a_socket_connected_before_enrolment_is_left_alone(node, make_pod, plain_server):
    pod = make_pod()
    app = pod.puppet()
    slot = app.connect(plain_server.ip4, 80)
    accepted, _ = plain_server.server.accept(plain_server.listening[plain_server.ip4])
    pod.enrol()
    app.call("send", slot, "same")
    assert plain_server.server.call("recv", accepted)[2] == "same"
    assert app.peer(slot) == (plain_server.ip4, 80)
    assert not node.leftovers()


def test_a_socket_inherited_by_a_moved_process_is_still_the_pods(node, a):
    """Hooks run by the socket's cgroup and namespace, not by the caller's."""
    with node.member("kubepods/" + a.name):
        sock = netns.create_socket(a.fd, socket.AF_INET, socket.SOCK_STREAM)
    sock.settimeout(5)
    sock.connect((VIP, 80))
    assert sock.getpeername() == (VIP, 80)
    accepted, original = accept(node, a)
    assert original == (VIP, 80)
    accepted.close()
    sock.close()
