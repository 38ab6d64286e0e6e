"""Pods that mean harm: what one does in namespaces and with sockets of its own changes nothing for another, and nothing
it was allowed once outlives the right to it.

A hostile pod here has CAP_NET_ADMIN and CAP_NET_RAW inside its namespaces: it takes any address, binds to devices,
reuses sockets, makes no packets where packets are due.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import select
import socket
import struct
from dataclasses import replace

import pytest

from ambient.datapath.entries import LocalPod, rights
from ambient.datapath.layout import LAYOUT
from ambient.datapath.numbers import Numbers
from ambient.datapath.values import FlowValue, TupleKey
from ambient.io import bpf_links, netns, sock_diag
from ambient.io.flow_reader import FlowReader, bytes_received, bytes_sent
from ambient.model.address import parse_ip
from ambient.model.identity import Identity
from ambient.model.policy import Action, Group, Match, Policy, Rule, Scope
from ambient.model.workload import TunnelProtocol, Workload
from ambient.model.world import World
from ambient.node.crowd import FROM, Crowd
from ambient.node.records import Names
from ambient.node.redirection import Redirection
from ambient.node.same_node import SameNode
from tests.support.flows import closed, swept
from tests.support.netlab import run_ip, until
from tests.support.redirect import CAN, Held, enrol, read

pytestmark = [pytest.mark.net, pytest.mark.bpf]

IPPROTO_MPTCP = 262
SO_BINDTODEVICE = 25
SO_ZEROCOPY = 60
TCP_REPAIR = 19
TCP_ULP = 31
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def made_in(pod, protocol=0):
    """A TCP socket of the pod, closed at the end."""
    with pod.node.member("kubepods/" + pod.name):
        sock = netns.create_socket(pod.fd, socket.AF_INET, socket.SOCK_STREAM, protocol)
    sock.settimeout(5)
    with sock:
        yield sock


def cookie(sock: socket.socket) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, 57, 8), "little")


def unspec(sock: socket.socket) -> None:
    """Disconnect, as connect() with AF_UNSPEC does."""
    assert _libc.connect(sock.fileno(), struct.pack("=H14x", socket.AF_UNSPEC), 16) == 0


class TestAFlowBelongsToItsSockets:
    def test_a_second_socket_with_the_same_ports_does_not_take_the_flow(self, node, pods):
        """Bound to another device, a socket may have the 4-tuple of one that lives; a flow it took over would be out of
        the agent's sight, and stand when the right to it is gone."""
        client, server = pods
        run_ip(
            client.fd,
            "link add other0 type veth peer name other1",
            "link set other0 up",
            "link set other1 up",
            f"addr add {client.ip4}/32 dev other0",
        )
        run_ip(client.fd, f"route add {server.ip4}/32 dev other0 metric 9")
        listening = server.puppet()
        listener = listening.listen(server.ip4, 80)
        with made_in(client) as one, made_in(client) as two:
            for sock, device in ((one, b"eth0"), (two, b"other0")):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, device)
                sock.bind((client.ip4, 7100))
            one.connect((server.ip4, 80))
            listening.accept(listener)
            ((key, before),) = node.maps.flows.items()
            assert before.client.cookie == cookie(one)
            two.setblocking(False)
            assert two.connect_ex((server.ip4, 80)) == errno.EINPROGRESS
            assert cookie(two) != cookie(one)
            assert node.maps.flows[key].client.cookie == cookie(one)
            assert not node.maps.authorized.items()
            two.close()
            assert node.maps.flows[key].client.cookie == cookie(one)
            assert node.maps.flows[key].server.cookie == before.server.cookie

    def test_another_pods_address_gives_no_part_in_its_flows(self, node, pods, make_pod):
        victim, server = pods
        hostile = enrol(make_pod())
        run_ip(hostile.fd, f"addr add {victim.ip4}/32 dev lo")
        listening = server.puppet()
        listener = listening.listen(server.ip4, 80)
        with made_in(victim) as one, made_in(hostile) as two:
            for sock in (one, two):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((victim.ip4, 7100))
            one.connect((server.ip4, 80))
            listening.accept(listener)
            ((key, _),) = node.maps.flows.items()
            two.setblocking(False)
            two.connect_ex((server.ip4, 80))
            assert node.maps.flows[key].client.cookie == cookie(one)
            assert not node.maps.authorized.items(), "nobody is let in under another's address"
            assert hostile.ztunnel_accept()[0]

    def test_routes_do_not_give_a_pod_another_address(self, node, pods, make_pod):
        victim, server = pods
        hostile = enrol(make_pod())
        run_ip(
            hostile.fd,
            f"addr add {victim.ip4}/32 dev lo",
            f"route add {server.ip4}/32 dev eth0 src {victim.ip4}",
        )
        listening = server.puppet()
        listener = listening.listen(server.ip4, 80)
        app = hostile.puppet()
        app.connect(server.ip4, 80)
        assert listening.accept(listener)[1][0] == hostile.ip4


class TestRedirection:
    def test_after_its_own_end_a_sender_sends_nothing(self, held):
        held.warm()
        held.client.shutdown(socket.SHUT_WR)
        with pytest.raises(BrokenPipeError):
            held.client.send(b"late")
        until(lambda: held.server.recv(10) == b"", "the end and nothing else")

    def test_a_connection_that_was_aborted_at_one_end_redirects_no_more(self, node, pods):
        """The other end may not know of it: the reset was lost, or could not be sent."""
        one = Held(node, *pods, bound=7200)
        one.warm()
        run_ip(pods[0].fd, "link set eth0 down")
        key, end = one.key, one.ends()[0]
        with sock_diag.open_diag(pods[0].fd) as diag:
            assert sock_diag.destroy(diag, key.remote, key.remote_port, key.local, key.local_port, end.cookie)
        run_ip(pods[0].fd, "link set eth0 up")
        assert one.client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNABORTED
        for _ in range(3):
            with pytest.raises(BrokenPipeError):
                one.client.send(b"late")
        with pytest.raises(BlockingIOError):
            one.server.recv(10)
        one.close()

    def test_a_disconnected_socket_gets_no_tls_and_does_not_enter_again(self, node, pods, held):
        """The kernel leaves it in the sockhash, with what it never read."""
        held.warm()
        unspec(held.client)
        held.client.settimeout(5)
        server = pods[1]
        with made_in(server) as listening:
            listening.bind((server.ip4, 9001))
            listening.listen(1)
            held.client.connect((server.ip4, 9001))
            accepted, _ = listening.accept()
        for option in ((socket.IPPROTO_TCP, TCP_ULP, b"tls"), (socket.SOL_SOCKET, SO_ZEROCOPY, 1)):
            with pytest.raises(PermissionError):
                held.client.setsockopt(*option)
        with accepted, select.epoll() as waits:
            waits.register(accepted, select.EPOLLIN)
            for sock in (held.client, accepted):
                sock.setblocking(False)
            for _ in range(20):
                for sender, receiver in ((held.client, accepted), (accepted, held.client)):
                    sender.send(b"x")
                    read(receiver, 1)
            flow = next(flow for key, flow in node.maps.flows.items() if key.local_port == 9001)
            assert not flow.client.sighting & LAYOUT["END_INSERTED"]
            assert flow.server.sighting & LAYOUT["END_READY"], "whose first connection it is"

    def test_a_connection_that_follows_a_blocking_one_stays_in_the_sockhash(self, node, pods):
        """With the same ports: taken out, it would lose what is on its way into it."""
        agent = Redirection(str(node.bpffs_dir), node.maps)
        spaces = {pod.cookie: pod.fd for pod in pods}
        one = Held(node, *pods, bound=7300)
        one.warm()
        one.server.setblocking(True)
        one.client.send(b"x")
        assert LAYOUT["FLOW_BLOCKING"] in {end.state for end in one.ends()}
        assert agent.take_out(spaces, 100.0) == 0
        for sock in (one.client, one.server):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()
        two = Held(node, *pods, bound=7300)
        assert two.key == one.key
        two.warm()
        assert agent.take_out(spaces, 110.0) == 0
        assert len(node.maps.sockets.keys()) == 2
        two.close()

    def test_a_strangers_socket_with_the_same_addresses_leaves_the_flow_alone(self, node, pods, held, make_pod):
        """A pod that was in the mesh keeps a socket in the sockhash, and out of the mesh gives it the addresses of
        another pod's flow, both of them local to itself."""
        victim, server = pods
        hostile = enrol(make_pod())
        other = Held(node, hostile, server, port=6001)
        other.warm()
        unspec(other.client)
        node.maps.enrolled.delete(hostile.cookie)
        bpf_links.detach_sk_lookup(node.bpffs_dir, hostile.name)
        run_ip(hostile.fd, f"addr add {victim.ip4}/32 dev lo", f"addr add {server.ip4}/32 dev lo")
        held.warm()
        with made_in(hostile) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((server.ip4, held.key.local_port))
            listening.listen(1)
            other.client.settimeout(5)
            other.client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.client.bind((victim.ip4, held.key.remote_port))
            other.client.connect((server.ip4, held.key.local_port))
            accepted, _ = listening.accept()
        before = held.ends()
        for _ in range(5):
            other.client.send(b"x" * 10)
        assert read(accepted, 50) == b"x" * 50
        accepted.close()
        assert held.ends() == before
        with pytest.raises(BlockingIOError):
            held.server.recv(10)
        other.close()


def uid(pod) -> str:
    return f"c//Pod/shop/{pod.name}"


def local(pods) -> list[LocalPod]:
    return [
        LocalPod(uid(p), (p.ip4,), p.number, True, identity=Identity("cluster.local", "shop", p.name)) for p in pods
    ]


def deny(pod, port: int) -> Policy:
    """To that pod's port, for everybody."""
    group = Group((Rule((Match(destination_ports=(port,)),)),))
    return Policy(f"{pod.name}-{port}", "shop", Scope.WORKLOAD_SELECTOR, Action.DENY, (group,))


def world(pods, *policies: Policy) -> World:
    return World.of(
        (
            Workload(
                uid(p),
                p.name,
                "shop",
                (parse_ip(p.ip4),),
                service_account=p.name,
                protocol=TunnelProtocol.HBONE,
                policies=tuple(x.key for x in policies if x.name.rpartition("-")[0] == p.name),
            )
            for p in pods
        ),
        policies=policies,
    )


class TestRoom:
    """`flows` is everybody's: what one leaves in it must not keep others from theirs."""

    def test_a_flow_whose_client_is_gone_is_taken_though_its_server_never_closes(self, node, pods):
        one = Held(node, *pods)
        one.client.send(b"abc")
        assert read(one.server, 3) == b"abc"
        one.client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        one.client.close()  # in repair, TCP says nothing
        reader = FlowReader(node.maps)
        closed(reader)
        assert node.maps.flows[one.key].client.flags & LAYOUT["END_CLOSED"]
        assert not swept(reader), "the server may be about to close"
        (event,) = swept(reader)
        assert (event.key, bytes_sent(event.value), bytes_received(event.value)) == (one.key, 3, 0)
        assert not node.maps.flows.items()
        one.server.close()
        assert not closed(reader), "told of once"
        reader.close()

    @pytest.mark.parametrize("moment", ["items", "lookup"])
    def test_a_flow_that_has_the_place_of_one_that_ended_stays(self, node, monkeypatch, moment):
        """The addresses are used again while the sweep is under way."""
        key = TupleKey("192.0.2.1", "192.0.2.2", 80, 40000)
        ended = FlowValue.decode(bytes(FlowValue.size()))
        ended = replace(ended, client=replace(ended.client, cookie=1, flags=LAYOUT["END_CLOSED"]))
        lives = replace(ended, client=replace(ended.client, cookie=2, flags=0), created_ns=5)
        node.maps.flows[key] = ended
        table = node.maps.tables["flows"]
        look = getattr(table, moment)

        def and_then_another(*wanted: bytes) -> object:
            found = look(*wanted)
            node.maps.flows[key] = lives
            return found

        reader = FlowReader(node.maps)
        monkeypatch.setattr(table, moment, and_then_another)
        assert not swept(reader)
        monkeypatch.undo()
        assert node.maps.flows[key] == lives
        node.maps.flows[key] = ended
        assert [e.value for e in swept(reader)] == [ended] and key not in node.maps.flows

    def test_a_flow_whose_server_is_gone_stays_with_its_client(self, node, pods):
        one = Held(node, *pods)
        one.server.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        one.server.close()
        reader = FlowReader(node.maps)
        for _ in range(3):
            assert not swept(reader)
        assert one.key in node.maps.flows
        one.client.close()
        reader.close()

    def test_a_nearly_full_map_sends_what_is_new_to_ztunnel(self, node, pods):
        client, server = pods
        crowd = Crowd(node.maps)
        assert not crowd.look(0.0)
        size = FlowValue.size()
        template = FlowValue.decode(bytes(size))
        ends = (replace(template.client, cookie=1, flags=LAYOUT["END_CLOSED"]), replace(template.server, cookie=2))
        template = replace(template, client=ends[0], server=ends[1])
        for number in range(FROM):
            node.maps.flows[TupleKey("192.0.2.1", "192.0.2.2", 80 + number // 60_000, number % 60_000)] = template
        crowd = Crowd(node.maps)
        assert crowd.look(1.0)
        node.reset(acceleration=CAN | LAYOUT["CROWDED"])
        client.puppet().connect(server.ip4, 80)
        assert client.ztunnel_accept()[0]
        reader = FlowReader(node.maps)
        assert not swept(reader)
        assert len(swept(reader)) == FROM
        assert crowd.look(2.0), "not counted at every look"
        assert not crowd.look(9.0)
        node.reset(acceleration=CAN)
        reader.close()


class TestRevocation:
    """What the agent closes when a right is gone, by its own code on the real maps."""

    @pytest.fixture
    def agent(self, node, pods, tmp_path):
        names = Names(tmp_path / "names.json")
        names.workloads = Numbers({uid(pod): pod.workload for pod in pods})
        agent = SameNode("n1", names, node.maps)
        agent.netns_of = {pod.cookie: pod.fd for pod in pods}.get
        return agent

    def test_a_flow_that_ends_while_its_pod_does_is_told_of_once(self, node, held, agent, monkeypatch):
        ended = node.maps.flows.items()
        held.client.close()
        held.server.close()
        reader = FlowReader(node.maps)
        until(lambda: held.key not in node.maps.flows, "its end")
        closed(reader)
        monkeypatch.setattr(node.maps.flows, "items", lambda: ended)
        agent.remove([held.key.local])
        assert held.key not in node.maps.flows and not swept(reader)
        reader.close()

    def test_a_connection_in_no_flow_is_closed_with_its_right(self, node, pods, held, agent):
        """As one that was let in by an older layout, or whose client went on without its socket."""
        server = pods[1]
        server.puppet().listen(server.ip4, 6000)
        agent.grant(rights(world(pods), local(pods)))
        agent.revoke()
        node.maps.flows.delete(held.key)
        agent.grant(rights(world(pods, deny(server, 81)), local(pods)))
        assert agent.revoke() == 0, "another port's"
        held.client.send(b"x")
        assert read(held.server, 1) == b"x"
        agent.grant(rights(world(pods, deny(server, 6000)), local(pods)))
        assert agent.revoke() == 1
        with pytest.raises(ConnectionAbortedError):
            held.server.send(b"x")

    def test_what_never_had_a_right_or_is_in_a_flow_is_not_a_stray(self, node, pods, held, agent):
        server = pods[1]
        server.puppet().listen(server.ip4, 6000)
        agent.grant(rights(world(pods, deny(server, 6000)), local(pods)))
        flow = node.maps.flows[held.key]
        node.maps.flows.delete(held.key)
        agent.revoke()
        agent.grant(rights(world(pods, deny(server, 6000), deny(server, 81)), local(pods)))
        assert agent.revoke() == 0
        held.client.send(b"x")
        assert read(held.server, 1) == b"x"
        node.maps.flows[held.key] = flow

    def test_multipath_tcp_ends_with_its_right_as_well(self, node, pods, agent):
        client, server = pods
        agent.grant(rights(world(pods), local(pods)))
        agent.revoke()
        with made_in(server, protocol=IPPROTO_MPTCP) as listening, made_in(client, protocol=IPPROTO_MPTCP) as one:
            listening.bind((server.ip4, 80))
            listening.listen(1)
            one.connect((server.ip4, 80))
            accepted, _ = listening.accept()
            accepted.settimeout(5)
            one.send(b"x")
            assert accepted.recv(1) == b"x"
            assert len(node.maps.flows) == 1
            agent.grant(rights(world(pods, deny(server, 80)), local(pods)))
            assert agent.revoke() == 1
            until(lambda: not len(node.maps.flows), "both ends are closed")
            # MPTCP itself waits a while for another path; nothing comes over the one it had.
            accepted.settimeout(1)
            with contextlib.suppress(OSError):
                one.send(b"late")
            with contextlib.suppress(ConnectionError, TimeoutError):
                assert accepted.recv(4) == b""
            accepted.close()
