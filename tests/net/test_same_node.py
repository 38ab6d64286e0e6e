"""Connections between two enrolled pods of one node: authorized at connect by a verdict written ahead.

Pods here accept `direct` and are selected by policies, so that a verdict decides. After each test the node fixture
reads every per-flow map again: nothing may be left.
"""

from __future__ import annotations

import errno
import socket
import time
from pathlib import Path

import pytest

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import (
    EndpointKey,
    EndpointValue,
    ServiceKey,
    ServiceValue,
    WorkloadValue,
)
from ambient.io import netns
from ambient.io.flow_reader import bytes_received, bytes_sent
from tests.support.same_node import DIRECT, ME, allow, captured, change

pytestmark = [pytest.mark.net, pytest.mark.bpf]

VIP = "10.96.0.7"
TCP_FASTOPEN_CONNECT = 30


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
