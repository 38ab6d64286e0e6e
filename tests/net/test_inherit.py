"""Flows of an earlier layout, taken over: each is known with both its ends, once, and goes with its sockets."""

from __future__ import annotations

import socket

import pytest

from ambient.datapath.layout import LAYOUT
from ambient.io import bpf_drain, sock_diag
from ambient.io.bpf_maps import Maps
from ambient.io.flow_reader import FlowReader
from ambient.node.inherit import Inheritance
from tests.support.flows import closed
from tests.support.netlab import until
from tests.support.redirect import CAN, WANTS, Held, enrol

pytestmark = [pytest.mark.net, pytest.mark.bpf]

OLD = "v2-00000000"


@pytest.fixture
def upgraded(netlab):
    """A node with two pods; `upgrade` makes its layout an earlier one, and loads this one beside it."""
    node = netlab.node("inherit")
    node.reset(acceleration=CAN)
    node.upgrade_pods = [enrol(node.pod()) for _ in range(2)]
    yield node
    for pod in node.upgrade_pods:
        pod.close()
    until(lambda: not node.leftovers(), f"no entry stays: {node.leftovers()}")
    node.close()
    netlab.nodes.remove(node)


def upgrade(node) -> Inheritance:
    for pod in node.upgrade_pods:
        for sock in pod.listeners.values():
            sock.close()
        pod.listeners.clear()
    node.maps.close()
    (node.bpffs_dir / LAYOUT.version).rename(node.bpffs_dir / OLD)
    assert bpf_drain.drain_others(node.bpffs_dir, taken_over=False) == [OLD]
    node.load()
    node.maps = Maps.open(node.bpffs_dir)
    node.reset(acceleration=CAN)
    for pod in node.upgrade_pods:
        pod.enrol(**WANTS, identity=7)
    return Inheritance(str(node.bpffs_dir), node.maps)


def places(node) -> dict[str, tuple[int, int]]:
    return {address: (pod.cookie, pod.fd) for pod in node.upgrade_pods for address in pod.addresses}


def cookie(sock: socket.socket) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, 57, 8), "little")


def living(pod) -> set[int]:
    """Cookies of its whole sockets: those of TIME_WAIT and its like hold no memory."""
    with sock_diag.open_diag(pod.fd) as diag:
        return {found.cookie for found in sock_diag.dump(diag) if found.held >= 0}


def test_flows_are_taken_over_when_both_pods_are_back_and_end_with_their_sockets(upgraded):
    node, (a, b) = upgraded, upgraded.upgrade_pods
    first, second, third, over = (Held(node, a, b, port=6000 + n) for n in range(4))
    first.warm()
    inheritance = upgrade(node)
    over.close()
    assert not inheritance.done
    assert inheritance.step({}, False) == set()
    assert inheritance.step({b.ip4: (b.cookie, b.fd)}, False) == set()
    assert not inheritance.done, "the client's pod is awaited"
    assert inheritance.step(places(node), False) == {b.workload}
    assert inheritance.done
    held = [first, second, third]
    assert set(node.maps.flows.keys()) == {one.key for one in held}, "and not what ended meanwhile"
    for one in held:
        flow = one.flow()
        assert (flow.client.cookie, flow.server.cookie) == (cookie(one.client), cookie(one.server))
        assert (flow.netns_client, flow.netns_server) == (a.cookie, b.cookie)
        assert (flow.source, flow.destination, flow.identity) == (a.workload, b.workload, 7)
        assert (flow.reason, flow.acceleration) == (LAYOUT["REASON_KERNEL"], LAYOUT["ACCELERATION_DIRECT"])
        one.ping()
        assert not one.inserted()
    # taken over, the sockets of the earlier layout alone keep it
    assert bpf_drain.drain_others(node.bpffs_dir) == [OLD]
    assert Inheritance(str(node.bpffs_dir), node.maps).done
    reader = FlowReader(node.maps)
    assert closed(reader) == []
    first.client.close()
    first.server.close()
    second.server.close()
    second.client.close()
    # and one is closed by its cookie, as when its right is lost
    with sock_diag.open_diag(b.fd) as diag:
        flow, key = third.flow(), third.key
        ends = (key.local, key.local_port, key.remote, key.remote_port)
        assert sock_diag.destroy(diag, *ends, flow.server.cookie)
    third.close()
    told = []
    until(lambda: told.extend(closed(reader)) or len(told) == 3, "each is told of once")
    assert {event.key for event in told} == {one.key for one in held}
    reader.close()
    until(lambda: bpf_drain.drain_others(node.bpffs_dir) == [], "the earlier layout goes with its last socket")


def test_an_end_that_is_closed_already_is_not_waited_for_and_nobodys_flows_are_forgotten(upgraded):
    """Its FIN was acknowledged: something stands for it in the kernel's tables, but nothing will close any more."""
    node, (a, b) = upgraded, upgraded.upgrade_pods
    by_client, by_server = Held(node, a, b, port=6000), Held(node, a, b, port=6001)
    inheritance = upgrade(node)
    for pod, gone, left in ((a, by_client.client, by_client.server), (b, by_server.server, by_server.client)):
        number = cookie(gone)
        gone.close()
        left.settimeout(5)
        assert left.recv(1) == b""
        until(lambda pod=pod, number=number: number not in living(pod), "the FIN is acknowledged")
    forgetful = Inheritance(str(node.bpffs_dir), node.maps)
    assert forgetful.step({a.ip4: (a.cookie, a.fd)}, True) == set()
    assert forgetful.done and not len(node.maps.flows)
    assert inheritance.step(places(node), True) == {b.workload}
    assert [end.cookie for end in by_client.ends()] == [0, cookie(by_client.server)]
    assert [end.cookie for end in by_server.ends()] == [cookie(by_server.client), 0]
    by_client.server.close()
    by_server.client.close()
    until(lambda: not len(node.maps.flows), "the flows end with the ends that were left")
