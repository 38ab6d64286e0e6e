"""Connections between two enrolled pods of one node: authorized at connect by a verdict written ahead.

Pods here accept `direct` and are selected by policies, so that a verdict decides. After each test the node fixture
reads every per-flow map again: nothing may be left.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from pathlib import Path

import pytest

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import (
    EndpointKey,
    EndpointValue,
    FlowEvent,
    ServiceKey,
    ServiceValue,
    VerdictKey,
    VerdictValue,
    WorkloadValue,
)
from ambient.io import netns, sock_diag
from ambient.io.flow_reader import FlowReader, bytes_received, bytes_sent
from tests.support.flows import closed, swept
from tests.support.netlab import until

pytestmark = [pytest.mark.net, pytest.mark.bpf]

DIRECT = {"flags": LAYOUT["ENROLLED_DIRECT"], "workload_flags": LAYOUT["WORKLOAD_DIRECT"]}
ME = 501
"""Number of the client's identity."""
VIP = "10.96.0.7"
TCP_FASTOPEN_CONNECT = 30


@pytest.fixture
def client(node, make_pod):
    pod = make_pod()
    pod.enrol(identity=ME, **DIRECT)
    return pod


@pytest.fixture
def server(node, make_pod):
    """Listens on port 80 of both families."""
    pod = make_pod()
    pod.enrol(identity=502, **DIRECT)
    pod.app = pod.puppet()
    pod.listening = {address: pod.app.listen(address, 80) for address in pod.addresses}
    yield pod
    for key in node.maps.verdicts:
        node.maps.verdicts.delete(key)


@pytest.fixture
def events(node):
    """Call it for the flows that closed since the last call."""
    reader = FlowReader(node.maps)
    closed(reader)

    def read(count: int = 1) -> list[FlowEvent]:
        found: list[FlowEvent] = []

        def enough() -> bool:
            found.extend(closed(reader))
            return len(found) >= count

        until(enough, f"{count} flows are reported")
        return found

    yield read
    reader.close()


def allow(node, pod, port: int = 0, *, allow: int = 1, generation: int = 1, policy: int = 9) -> None:
    node.maps.verdicts[VerdictKey(ME, pod.workload, port)] = VerdictValue(generation, allow, policy)


def serve(node, pod, slots: list, service: int = 77) -> None:
    """A Service at VIP:8080 with these endpoints ((address4, address6), workload, port)."""
    for index, ((address4, address6), workload, port) in enumerate(slots):
        node.maps.endpoints[EndpointKey(service, 8080, index)] = EndpointValue(address4, address6, workload, port)
    for vip in (VIP, "fd00:96::7"):
        node.maps.services[ServiceKey(vip, 8080)] = ServiceValue(service, 0, len(slots))


@pytest.fixture
def service(node, server):
    serve(node, server, [((server.ip4, server.ip6), server.workload, 80)])
    yield VIP
    for key in node.maps.services:
        node.maps.services.delete(key)
    for slot in node.maps.endpoints:
        node.maps.endpoints.delete(slot)


def captured(node, pod, listener: str = "outbound4"):
    """What ztunnel was given: (original, endpoint)."""
    sock, cookie = pod.ztunnel_accept(listener)
    record = node.maps.take_redirect(cookie)
    sock.close()
    assert record is not None
    return (record.original, record.original_port), (record.endpoint, record.endpoint_port)


@pytest.mark.parametrize("family", [4, 6])
def test_an_allowed_connection_goes_straight_to_the_pod(node, client, server, events, family):
    allow(node, server)
    counted = node.counted()
    target, own = (server.ip4, client.ip4) if family == 4 else (server.ip6, client.ip6)
    app = client.puppet()
    slot = app.connect(target, 80)
    accepted, peer = server.app.accept(server.listening[target])
    assert peer == app.name(slot)
    assert peer[0] == own, "the application sees its true client"
    assert app.peer(slot) == (target, 80)
    assert (counted("kernel"), counted("captured"), counted("steered")) == (2, 0, 0)
    ((key, flow),) = node.maps.flows.items()
    assert (key.local, key.local_port, key.remote, key.remote_port) == (target, 80, *peer)
    assert (flow.source, flow.destination, flow.identity, flow.policy) == (client.workload, server.workload, ME, 9)
    assert (flow.netns_client, flow.netns_server) == (client.cookie, server.cookie)
    assert flow.acceleration == LAYOUT["ACCELERATION_DIRECT"]
    assert flow.client.sock
    assert flow.server.sock
    assert not node.maps.authorized.items(), "used up"
    assert node.maps.enrolled[client.cookie].flows == 1
    app.call("send", slot, "ping!")
    assert server.app.call("recv", accepted)[2] == "ping!"
    server.app.call("send", accepted, "pongpong")
    assert app.call("recv", slot)[2] == "pongpong"
    app.close(slot)
    server.app.close(accepted)
    (event,) = events()
    assert event.key == key
    assert (bytes_sent(event.value), bytes_received(event.value)) == (5, 8)
    assert node.maps.enrolled[client.cookie].flows == 0


@pytest.mark.parametrize("first", ["client", "server"])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_bytes_are_exact_whoever_closes_first_and_however(node, client, server, events, first, how):
    allow(node, server)
    app = client.puppet()
    slot = app.connect(server.ip4, 80)
    accepted, _ = server.app.accept(server.listening[server.ip4])
    app.call("send", slot, "abc")
    assert server.app.call("recv", accepted)[2] == "abc"
    server.app.call("send", accepted, "defgh")
    assert app.call("recv", slot)[2] == "defgh"
    ends = [(app, slot), (server.app, accepted)]
    for puppet, which in ends if first == "client" else reversed(ends):
        puppet.call(how, which)
    (event,) = events()
    assert (bytes_sent(event.value), bytes_received(event.value)) == (3, 5)


def test_a_flow_that_is_never_answered_is_reported_with_nothing(node, client, server, events):
    """Nobody listens on that port: the server's kernel resets."""
    allow(node, server)
    app = client.puppet()
    with pytest.raises(ConnectionRefusedError):
        app.connect(server.ip4, 81)
    (event,) = events()
    assert (bytes_sent(event.value), bytes_received(event.value), event.value.server.cookie) == (0, 0, 0)


def test_a_service_is_resolved_in_the_kernel_and_the_application_sees_what_it_dialled(node, client, server, service):
    allow(node, server)
    app = client.puppet()
    slot = app.connect(VIP, 8080)
    _, peer = server.app.accept(server.listening[server.ip4])
    assert peer == app.name(slot)
    assert app.peer(slot) == (VIP, 8080)
    ((_, flow),) = node.maps.flows.items()
    assert (flow.original, flow.original_port) == (VIP, 8080)
    slot = app.connect("fd00:96::7", 8080)
    assert server.app.accept(server.listening[server.ip6])[1][0] == client.ip6
    assert app.peer(slot) == ("fd00:96::7", 8080)


def test_endpoints_are_chosen_at_random(node, client, server, make_pod, service):
    other = make_pod()
    other.enrol(identity=503, **DIRECT)
    puppet = other.puppet()
    puppet.listen(other.ip4, 80)
    slots = [((p.ip4, p.ip6), p.workload, 80) for p in (server, other)]
    serve(node, server, slots)
    for pod in (server, other):
        allow(node, pod)
    app = client.puppet()
    for _ in range(24):
        app.connect(VIP, 8080)
    chosen = {key.local for key in node.maps.flows}
    assert chosen == {server.ip4, other.ip4}


@pytest.mark.parametrize(
    ("why", "reason"),
    [("none", "no_verdict"), ("other_port", "no_verdict"), ("deny", "verdict_denies"), ("old", "stale_verdict")],
)
def test_without_a_current_allow_the_connection_goes_to_ztunnel(node, client, server, why, reason):
    match why:
        case "other_port":
            allow(node, server, 81)
        case "deny":
            allow(node, server)
            allow(node, server, 80, allow=0)
        case "old":
            allow(node, server, 0, generation=9)
    counted = node.counted()
    client.puppet().connect(server.ip4, 80)
    assert captured(node, client) == ((server.ip4, 80), ("", 0))
    assert (counted(reason), counted("captured"), counted("kernel")) == (1, 1, 0)
    assert not node.maps.flows.items()


def test_a_verdict_of_the_port_comes_before_that_of_all_ports(node, client, server):
    allow(node, server, 0, allow=0)
    allow(node, server, 80)
    client.puppet().connect(server.ip4, 80)
    server.app.accept(server.listening[server.ip4])
    assert len(node.maps.flows) == 1


def test_a_stale_verdict_of_the_port_does_not_fall_back_on_that_of_all_ports(node, client, server):
    allow(node, server, 0)
    allow(node, server, 80, generation=9)
    client.puppet().connect(server.ip4, 80)
    assert captured(node, client)[0] == (server.ip4, 80)


def change(node, pod, flags: int = 0, generation: int = 1, without: int = 0) -> None:
    for address in pod.addresses:
        entry = node.maps.workloads[address]
        node.maps.workloads[address] = WorkloadValue(entry.workload, (entry.flags | flags) & ~without, generation)


def test_no_policy_needs_no_verdict(node, client, server):
    change(node, server, LAYOUT["WORKLOAD_ALLOW_ANY"])
    client.puppet().connect(server.ip4, 80)
    server.app.accept(server.listening[server.ip4])


@pytest.mark.parametrize(
    "what", ["remote", "waypoint", "off", "unset", "not enrolled", "client off", "not complete", "silent", "unclosable"]
)
def test_what_the_kernel_may_not_decide_goes_to_ztunnel_with_the_endpoint(node, client, server, service, what):
    allow(node, server)
    match what:
        case "remote":
            change(node, server, without=LAYOUT["WORKLOAD_LOCAL"])
        case "waypoint":
            change(node, server, LAYOUT["WORKLOAD_WAYPOINT"])
        case "off":
            change(node, server, LAYOUT["WORKLOAD_OFF"])
        case "unset":
            change(node, server, without=LAYOUT["WORKLOAD_DIRECT"])
        case "not enrolled":
            change(node, server, without=LAYOUT["WORKLOAD_ENROLLED"])
        case "client off":
            client.enrolled_flags = LAYOUT["ENROLLED_OFF"]
            entry = node.maps.enrolled[client.cookie]
            node.maps.enrolled[client.cookie] = type(entry)(
                entry.address4, entry.address6, entry.workload, flags=LAYOUT["ENROLLED_OFF"], identity=ME
            )
        case "silent":
            node.reset(heartbeat_ns=time.monotonic_ns() - 16 * 10**9)
        case "not complete":
            node.reset(complete=0)
        case "unclosable":
            node.reset(acceleration=LAYOUT["CAN_REDIRECT"] | LAYOUT["NO_DESTROY"])
    app = client.puppet()
    slot = app.connect(VIP, 8080)
    assert captured(node, client) == ((VIP, 8080), (server.ip4, 80))
    assert app.peer(slot) == (VIP, 8080)
    assert not node.maps.flows.items()


def test_a_service_with_a_waypoint_or_without_slots_is_left_to_ztunnel_altogether(node, client, server, service):
    allow(node, server)
    for value in (ServiceValue(77, LAYOUT["WORKLOAD_WAYPOINT"], 1), ServiceValue(77, 0, 0)):
        node.maps.services[ServiceKey(VIP, 8080)] = value
        client.puppet().connect(VIP, 8080)
        assert captured(node, client) == ((VIP, 8080), ("", 0))


def test_a_missing_slot_is_ztunnels_to_choose(node, client, server, service):
    allow(node, server)
    counted = node.counted()
    node.maps.endpoints.delete(EndpointKey(77, 8080, 0))
    client.puppet().connect(VIP, 8080)
    assert captured(node, client) == ((VIP, 8080), ("", 0))
    assert counted("no_endpoint_slot") == 1


def test_an_address_that_changed_hands_is_not_the_endpoint_any_more(node, client, server, service):
    allow(node, server)
    for address in server.addresses:
        node.maps.workloads[address] = WorkloadValue(99, node.maps.workloads[address].flags, 1)
    client.puppet().connect(VIP, 8080)
    assert captured(node, client)[0] == (VIP, 8080)


def test_a_new_generation_kills_what_was_authorized_and_is_on_its_way(node, client, server, events):
    """A connect that the hook allowed and whose SYN leaves later: with deferred fast open, at the first byte."""
    allow(node, server)
    with netns.in_netns(client.fd):
        Path("/proc/sys/net/ipv4/tcp_fastopen").write_text(str(0x1 | 0x4))
    app = client.puppet()
    slot = app.tcp()
    app.call("option", slot, socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
    counted = node.counted()
    app.call("connect", slot, server.ip4, 80)
    change(node, server, generation=2)
    app.call("send", slot, "late")
    steered, _ = server.listeners["plaintext4"].accept()
    assert (counted("stale_authorized"), counted("steered")) == (1, 1)
    assert not node.maps.authorized.items()
    ((_, flow),) = node.maps.flows.items()
    assert flow.server.cookie == 0, "ztunnel's socket is not the application's"
    steered.close()


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


def test_a_pod_that_left_or_is_beyond_its_share_gets_no_authorization(node, client, server):
    allow(node, server)
    entry = node.maps.enrolled[client.cookie]
    node.maps.enrolled[client.cookie] = type(entry)(
        entry.address4, entry.address6, entry.workload, 2, 0, entry.flags, 0, entry.identity
    )
    app = client.puppet()
    for _ in range(2):
        app.connect(server.ip4, 80)
    with pytest.raises(PermissionError) as caught:
        app.connect(server.ip4, 80)
    assert caught.value.errno == errno.EPERM
    assert node.maps.enrolled[client.cookie].refused == 1
    assert len(node.maps.flows) == 2


def test_a_pod_reaches_itself(node, client):
    allow(node, client)
    app = client.puppet()
    listener = app.listen(client.ip4, 80)
    app.connect(client.ip4, 80)
    assert app.accept(listener)[1][0] == client.ip4


def test_a_full_ring_buffer_loses_no_flow(node, client, server):
    """More closes than fit without anybody reading: the rest wait in `flows` and the sweep takes each once."""
    allow(node, server)
    reader = FlowReader(node.maps)
    closed(reader)
    counted = node.counted()
    room = LAYOUT["EVENTS_BYTES"] // (8 + FlowEvent.size())
    many = room + 40
    with node.member("kubepods/" + client.name):
        sockets = netns.run_in_netns(client.fd, lambda: _open_and_reset(server.ip4, many))
    assert sockets == many
    until(lambda: counted("flow_unreported") >= 40, "the ring buffer is full")
    until(lambda: node.maps.enrolled[client.cookie].flows == 0, "all are closed")
    reported = [event.key for event in closed(reader)]
    late = [event.key for event in swept(reader)]
    assert len(reported) + len(late) == many
    assert not swept(reader)
    reader.close()


def _open_and_reset(address: str, count: int) -> int:
    for _ in range(count):
        with socket.socket() as sock:
            sock.settimeout(5)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            try:
                sock.connect((address, 81))  # nobody listens there
            except ConnectionRefusedError:
                continue
            raise AssertionError("somebody listens")
    return count


@pytest.mark.parametrize("family", [4, 6])
def test_a_living_flow_shows_its_bytes_and_can_be_closed(node, client, server, events, family):
    allow(node, server)
    target = server.ip4 if family == 4 else server.ip6
    app = client.puppet()
    slot = app.connect(target, 80)
    accepted, _ = server.app.accept(server.listening[target])
    app.call("send", slot, "hello")
    assert server.app.call("recv", accepted)[2] == "hello"
    reader = FlowReader(node.maps)
    until(
        lambda: [(f.sent, f.received) for f in reader.live({client.cookie: client.fd}.get)] == [(5, 0)],
        "the bytes of the living flow",
    )
    ((key, flow),) = node.maps.flows.items()
    with sock_diag.open_diag(client.fd) as diag:
        wrong = sock_diag.destroy(diag, key.remote, key.remote_port, key.local, key.local_port, flow.client.cookie + 1)
        assert not wrong
        assert sock_diag.destroy(diag, key.remote, key.remote_port, key.local, key.local_port, flow.client.cookie)
    with pytest.raises(OSError):
        server.app.call("recv", accepted)
    (event,) = events()
    assert (bytes_sent(event.value), bytes_received(event.value)) == (5, 0)
