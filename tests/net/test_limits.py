"""Every map filled to its limit by what really fills it: what finds no room goes to ztunnel, or is refused and counted,
and never goes past the mesh; others go on; and room that is made is used.

The node's programs differ from the product's in the maps' limits alone, which are so small that a few pods fill them.
Shares of a workload are in test_capture.py and test_same_node.py, the ring buffer is in test_same_node_flows.py.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
from pathlib import Path

import pytest

from ambient.datapath.entries import LocalPod
from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import Admission
from ambient.io import netns
from ambient.io.bpf_sys import BpfFault
from ambient.manifest.acceleration import Acceleration
from ambient.model.address import parse_ip
from ambient.model.identity import Identity
from ambient.model.policy import Action, Group, Match, MatchKind, Policy, Rule, Scope, StringMatch
from ambient.model.workload import Port, Service, TunnelProtocol, Workload
from ambient.model.world import World
from ambient.node.kernel import Kernel
from ambient.node.records import Names
from ambient.settings import NodeSettings
from tests.support import changed
from tests.support.netlab import Node, Pod, Puppet, until
from tests.support.redirect import CAN, Held, enrol

pytestmark = [pytest.mark.net, pytest.mark.bpf]

LIMITS = {
    "FLOWS_MAX": 6,
    "AUTHORIZED_MAX": 5,
    "ORIGINS_MAX": 4,
    "REDIRECTS_MAX": 4,
    "SOCKETS_MAX": 4,
    "ENROLLED_MAX": 5,
    "WORKLOADS_MAX": 12,
    "SERVICES_MAX": 4,
    "ENDPOINTS_MAX": 3,
    "VERDICTS_MAX": 4,
    "LISTENERS_MAX": 14,
}
ANY = {
    "flags": LAYOUT["ENROLLED_DIRECT"],
    "workload_flags": LAYOUT["WORKLOAD_DIRECT"] | LAYOUT["WORKLOAD_ALLOW_ANY"],
}
VIP, OUTSIDE = "10.96.0.7", "198.51.100.1"


@pytest.fixture(scope="module")
def loaded_node(netlab) -> Node:
    return netlab.node("small", *(changed.limit(name, entries) for name, entries in LIMITS.items()))


class Server:
    """An application of a pod that listens on port 80."""

    def __init__(self, pod: Pod) -> None:
        self.pod = pod
        self.app = pod.puppet()
        self.listening = self.app.listen(pod.ip4, 80)

    def accepts(self, client: Puppet, slot: int) -> int:
        """The connection is the application's, and bytes go both ways; the accepted slot."""
        accepted, peer = self.app.accept(self.listening)
        assert peer == client.name(slot)
        client.call("send", slot, "there")
        assert self.app.call("recv", accepted)[2] == "there"
        self.app.call("send", accepted, "back")
        assert client.call("recv", slot)[2] == "back"
        return accepted


def captured(pod: Pod) -> tuple[str, int] | None:
    """What ztunnel was given: where the application wanted to go; None if there is no record, and so it closes."""
    sock, cookie = pod.ztunnel_accept()
    with sock:
        record = pod.node.maps.take_redirect(cookie)
    return (record.original, record.original_port) if record else None


def steered(pod: Pod, client: Puppet, slot: int) -> bool:
    """The connection arrived at ztunnel's plaintext listener and not at the application."""
    sock, peer = pod.listeners["plaintext4"].accept()
    sock.close()
    return bool(peer == client.name(slot))


@pytest.fixture
def pods(make_pod) -> list[Pod]:
    """Three that anybody may reach directly."""
    found = [make_pod(families=(4,)) for _ in range(3)]
    for pod in found:
        pod.enrol(**ANY)
    return found


class TestFlows:
    def test_a_connection_that_finds_no_room_is_steered_and_those_that_stand_go_on(self, node, pods):
        greedy, other, target = pods
        server, app, counted = Server(target), greedy.puppet(), node.counted()
        ends = []
        for _ in range(LIMITS["FLOWS_MAX"]):
            slot = app.connect(target.ip4, 80)
            ends.append((slot, server.accepts(app, slot)))
        assert (len(node.maps.flows), counted("flows_full")) == (LIMITS["FLOWS_MAX"], 0)
        late = other.puppet()
        slot = late.connect(target.ip4, 80)
        assert steered(target, late, slot)
        assert (counted("flows_full"), counted("steered")) == (1, 1)
        assert node.maps.enrolled[other.cookie].flows == 0, "it takes nothing of its share"
        assert not node.maps.authorized.items()
        for slot, accepted in ends:
            app.call("send", slot, "still")
            assert server.app.call("recv", accepted)[2] == "still"
        late.connect("10.96.0.9", 80)
        assert captured(other) == ("10.96.0.9", 80), "what ztunnel carries needs no flow"
        app.close(ends[0][0])
        server.app.close(ends[0][1])
        until(lambda: len(node.maps.flows) < LIMITS["FLOWS_MAX"], "the flow ends", 5)
        slot = late.connect(target.ip4, 80)
        server.accepts(late, slot)


class TestAuthorized:
    @pytest.fixture
    def full(self, node, pods):
        """Deliveries of ztunnel that are authorized and not yet connected."""
        keys = [(pods[2].ip4, 81, pods[2].ip4, 40000 + n) for n in range(LIMITS["AUTHORIZED_MAX"])]
        for key in keys:
            node.maps.authorize_delivery(Admission(*key, workload=pods[2].workload))
        yield keys
        for key in keys:
            node.maps.withdraw_delivery(Admission(*key))

    def test_a_connection_within_the_node_is_steered_and_leaves_no_flow(self, node, pods, full):
        server, app, counted = Server(pods[1]), pods[0].puppet(), node.counted()
        slot = app.connect(pods[1].ip4, 80)
        assert steered(pods[1], app, slot)
        assert (counted("authorized_full"), counted("steered")) == (1, 1)
        assert not node.maps.flows.items()
        assert node.maps.enrolled[pods[0].cookie].flows == 0
        node.maps.withdraw_delivery(Admission(*full[0]))
        slot = app.connect(pods[1].ip4, 80)
        server.accepts(app, slot)

    def test_ztunnel_is_told_that_it_cannot_deliver(self, node, pods, full):
        key = (pods[1].ip4, 80, pods[1].ip4, 40000)
        with pytest.raises(BpfFault, match=rf"map authorized \(full\): write, limit {LIMITS['AUTHORIZED_MAX']}"):
            node.maps.authorize_delivery(Admission(*key, workload=pods[1].workload, client="10.7.7.7", client_port=1))
        assert not node.maps.origins.items(), "both entries or none"
        node.maps.withdraw_delivery(Admission(*full[0]))
        node.maps.authorize_delivery(Admission(*key, workload=pods[1].workload, client="10.7.7.7", client_port=1))
        node.maps.withdraw_delivery(Admission(*key))

    def test_what_stands_and_what_ztunnel_takes_is_not_touched(self, node, pods, full):
        node.maps.withdraw_delivery(Admission(*full[0]))
        server, app = Server(pods[1]), pods[0].puppet()
        slot = app.connect(pods[1].ip4, 80)
        accepted = server.accepts(app, slot)
        node.maps.authorize_delivery(Admission(*full[0], workload=pods[2].workload))
        app.call("send", slot, "still")
        assert server.app.call("recv", accepted)[2] == "still"
        app.connect("10.96.0.9", 80)
        assert captured(pods[0]) == ("10.96.0.9", 80)


class TestOrigins:
    def test_ztunnel_is_told_that_it_cannot_deliver_and_others_go_on(self, node, pods):
        target = pods[1]
        server, delivered = Server(target), []

        def deliver(port: int) -> None:
            sock = target.ztunnel_socket()
            key = (target.ip4, 80, *sock.getsockname())
            try:
                node.maps.authorize_delivery(
                    Admission(*key, workload=target.workload, client="10.7.7.7", client_port=port, netns=target.cookie)
                )
            except BaseException:
                sock.close()
                raise
            sock.connect((target.ip4, 80))
            delivered.append((sock, server.app.accept(server.listening)[0]))

        for port in range(1, 1 + LIMITS["ORIGINS_MAX"]):
            deliver(port)
        with pytest.raises(BpfFault, match=rf"map origins \(full\): write, limit {LIMITS['ORIGINS_MAX']}") as caught:
            deliver(99)
        assert caught.value.errno in (errno.E2BIG, errno.ENOMEM)
        assert not node.maps.authorized.items(), "and nobody is let in without a name"
        app = pods[0].puppet()
        slot = app.connect(target.ip4, 80)
        server.accepts(app, slot)
        assert [server.app.peer(accepted)[0] for _, accepted in delivered] == ["10.7.7.7"] * LIMITS["ORIGINS_MAX"]
        sock, accepted = delivered.pop()
        sock.close()
        server.app.close(accepted)
        deliver(99)
        for sock, accepted in delivered:
            sock.close()
            server.app.close(accepted)


class TestRedirects:
    def test_a_connection_without_a_record_is_ztunnels_to_close_and_others_go_on(self, node, pods):
        greedy, other, target = pods
        server, app, counted = Server(target), greedy.puppet(), node.counted()
        slots = [app.connect("10.96.0.9", 80) for _ in range(LIMITS["REDIRECTS_MAX"])]
        late = other.puppet()
        late.connect("10.96.0.9", 80)
        assert captured(other) is None
        assert counted("redirects_full") == 1
        assert node.maps.enrolled[other.cookie].flows == 0, "it takes nothing of its share"
        slot = late.connect(target.ip4, 80)
        server.accepts(late, slot)
        taken = [greedy.ztunnel_accept() for _ in slots]
        assert all(node.maps.redirect_of(cookie) for _, cookie in taken)
        taken[0][0].close()
        until(lambda: len(node.maps.redirects) < LIMITS["REDIRECTS_MAX"], "the record goes with its socket")
        late.connect("10.96.0.9", 80)
        assert captured(other) == ("10.96.0.9", 80)
        for sock, _ in taken[1:]:
            sock.close()


class TestPending:
    def test_a_socket_without_room_for_its_record_is_refused(self, node, pods):
        """Socket storage is charged to the socket, whose limit the pod's own namespace sets."""
        server, app, counted = Server(pods[1]), pods[0].puppet(), node.counted()
        with netns.in_netns(pods[0].fd):
            limit = Path("/proc/sys/net/core/optmem_max")
            before = limit.read_text()
            limit.write_text("64")
        for target in (pods[1].ip4, "10.96.0.9"):
            with pytest.raises(PermissionError):
                app.connect(target, 80)
        assert counted("no_pending") == 2
        assert not node.leftovers()
        neighbour = pods[2].puppet()
        slot = neighbour.connect(pods[1].ip4, 80)
        server.accepts(neighbour, slot)
        with netns.in_netns(pods[0].fd):
            limit.write_text(before)
        slot = app.connect(pods[1].ip4, 80)
        server.accepts(app, slot)


class TestSockets:
    def test_a_flow_that_finds_no_room_stays_native_and_comes_in_when_there_is_some(self, node, make_pod):
        node.reset(acceleration=CAN)
        pods = [enrol(make_pod(families=(4,))) for _ in range(2)]
        held = [Held(node, *pods, port=6000 + number) for number in range(3)]
        for one in held[:2]:
            one.warm()
        assert len(node.maps.sockets.keys()) == LIMITS["SOCKETS_MAX"]
        for _ in range(20):
            held[2].ping()
        assert not held[2].inserted()
        assert [end.redirect_messages for end in held[2].ends()] == [0, 0]
        for one in held[:2]:
            before = one.ends()[0].redirect_messages
            one.ping()
            assert one.ends()[0].redirect_messages > before, "others go on"
        held[0].close()
        held[2].warm()
        for one in held[1:]:
            one.close()


class Mesh:
    """The agent's one writer of the maps, on the real maps, for pods that it has numbered."""

    ACCOUNTS = ("a", "b", "c")

    def __init__(self, node: Node, make_pod, directory: Path) -> None:
        self.node = node
        self.names = Names(directory / "names.json")
        self.pods: list[Pod] = []
        self.locals: list[LocalPod] = []
        self.kernel = Kernel(
            NodeSettings(
                node_name="n1",
                bpffs_dir=str(node.bpffs_dir),
                node_cgroup=str(node.cgroup),
                pods_cgroup=str(node.cgroup / "kubepods"),
                ztunnel_cgroup=str(node.cgroup / "ztunnel"),
                agent_cgroup=str(node.cgroup / "agent"),
                cluster_ranges=("10.96.0.0/12",),
            ),
            self.names,
            node.maps,
        )
        for account in self.ACCOUNTS:
            identity = Identity("cluster.local", "shop", account)
            pod = make_pod(families=(4,))
            pod.workload = self.names.workloads.of(self.uid(account))
            pod.enrol(flags=LAYOUT["ENROLLED_DIRECT"], identity=self.kernel.same_node.identity(identity))
            self.pods.append(pod)
            local = LocalPod(
                self.uid(account), (pod.ip4,), 1, True, identity=identity, acceleration=Acceleration.DIRECT
            )
            self.locals.append(local)
        self.kernel.same_node.netns_of = {pod.cookie: pod.fd for pod in self.pods}.get

    @staticmethod
    def uid(account: str) -> str:
        return f"c//Pod/shop/{account}"

    def put(
        self, *, policies: tuple[Policy, ...] = (), elsewhere: int = 0, services: dict[str, int] | None = None
    ) -> None:
        """Write a World: policies at b, workloads of another node, and b's services by name and number of ports."""
        found = [
            Service(
                name, "shop", name, (parse_ip(f"10.96.0.{7 + index}"),), tuple(Port(8080 + p, 80) for p in range(ports))
            )
            for index, (name, ports) in enumerate((services or {}).items())
        ]
        workloads = [
            Workload(
                local.workload_uid,
                account,
                "shop",
                (parse_ip(pod.ip4),),
                node="n1",
                service_account=account,
                protocol=TunnelProtocol.HBONE,
                policies=tuple(p.key for p in policies) if account == "b" else (),
                services=tuple((s.key, s.ports) for s in found) if account == "b" else (),
            )
            for account, pod, local in zip(self.ACCOUNTS, self.pods, self.locals, strict=True)
        ]
        workloads += [
            Workload(f"far{n}", f"far{n}", "shop", (parse_ip(f"10.9.0.{n}"),), node="n2")
            for n in range(1, 1 + elsewhere)
        ]
        self.kernel.put_world(World.of(workloads, found, policies=policies), self.locals)
        self.kernel.beat()


@pytest.fixture
def mesh(node, make_pod, tmp_path):
    found = Mesh(node, make_pod, tmp_path)
    yield found
    maps = node.maps
    for table in (maps.verdicts, maps.endpoints, maps.services, maps.workloads):
        table.clear()


def denying(*ports: int) -> Policy:
    """Nobody may use these ports; all others are free."""
    match = Match(principals=(StringMatch(MatchKind.PREFIX, ""),), destination_ports=ports)
    return Policy("deny", "shop", Scope.WORKLOAD_SELECTOR, Action.DENY, (Group((Rule((match,)),)),))


class TestWhatTheAgentWrites:
    def test_verdicts_that_find_no_room_are_ztunnels_to_give(self, node, mesh):
        b = mesh.pods[1]
        server, counted = Server(b), node.counted()
        mesh.put(policies=(denying(81),))
        refused = mesh.kernel.same_node.counters["verdicts_refused"]
        known = {key.identity for key in node.maps.verdicts if key.port == 0}
        assert refused > 0 and 0 < len(known) < 3, "three identities, two entries each, four in all"
        assert "map verdicts" in mesh.kernel.same_node.problem
        for pod in mesh.pods:
            number = node.maps.enrolled[pod.cookie].identity
            puppet = pod.puppet()
            slot = puppet.connect(b.ip4, 80)
            if number in known:
                server.accepts(puppet, slot)
            else:
                assert captured(pod) == (b.ip4, 80)
        assert counted("no_verdict") == 3 - len(known)
        # Another port is denied and finds no room for that: what stood for all ports may not stand for it.
        mesh.put(policies=(denying(81, 82),))
        assert sum(key.port == 82 for key in node.maps.verdicts) < len(known)
        for pod in mesh.pods:
            for port in (81, 82):
                pod.puppet().connect(b.ip4, port)
                assert captured(pod) == (b.ip4, port), "what is denied is never the kernel's"
        mesh.put()
        assert mesh.kernel.same_node.problem == ""
        for pod in mesh.pods:
            puppet = pod.puppet()
            slot = puppet.connect(b.ip4, 80)
            server.accepts(puppet, slot)

    def test_a_service_whose_endpoints_find_no_room_is_ztunnels_to_balance(self, node, mesh):
        a, b, _ = mesh.pods
        server, app = Server(b), a.puppet()
        mesh.put(services={"one": 1, "two": 3})
        assert len(node.maps.endpoints) == LIMITS["ENDPOINTS_MAX"]
        values = {(key.vip, key.port): value.endpoints for key, value in node.maps.services.items()}
        assert sorted(values.values()) == [0, 1, 1, 1]
        for (vip, port), endpoints in values.items():
            slot = app.connect(vip, port)
            if endpoints:
                server.accepts(app, slot)
            else:
                assert captured(a) == (vip, port)
        mesh.put(services={"one": 1, "two": 2})
        for port in (8080, 8081):
            slot = app.connect("10.96.0.8", port)
            server.accepts(app, slot)

    @pytest.mark.parametrize("what", ["workloads", "services"])
    def test_an_incomplete_world_leaves_nothing_alone_and_is_complete_again_when_it_fits(self, node, mesh, what):
        a, b, c = mesh.pods
        server, app, counted = Server(b), a.puppet(), node.counted()
        mesh.put()
        assert mesh.kernel.complete
        slot = app.connect(b.ip4, 80)
        server.accepts(app, slot)
        mesh.put(**({"elsewhere": 30} if what == "workloads" else {"services": {"many": 9}}))
        assert not mesh.kernel.complete
        assert f"map {what}" in mesh.kernel.problem
        assert mesh.kernel.refused > 0
        for pod, target in ((a, OUTSIDE), (a, b.ip4), (c, b.ip4), (a, "10.9.0.30")):
            puppet = pod.puppet()
            puppet.connect(target, 80)
            assert captured(pod) == (target, 80)
        assert counted("not_mesh") == 0
        app.call("send", slot, "still")
        mesh.put()
        assert mesh.kernel.complete
        assert mesh.kernel.problem == ""
        slot = app.connect(b.ip4, 80)
        server.app.accept(server.listening)
        with contextlib.suppress(BlockingIOError):  # on its way: nobody is there
            app.call("nonblocking_connect", app.tcp(), OUTSIDE, 80)
        assert counted("not_mesh") == 1, "what is known not to be in the mesh is left alone"

    def test_a_pod_that_finds_no_room_is_refused_by_name_and_comes_in_when_there_is_some(self, node, mesh):
        numbers = itertools.count(1 << 40)
        made = []
        pod = LocalPod("c//Pod/shop/late", ("10.1.9.9",), 1, True, acceleration=Acceleration.DIRECT)
        entry = mesh.kernel.enrolled_value(pod)
        with pytest.raises(BpfFault, match=rf"map enrolled \(full\): write, limit {LIMITS['ENROLLED_MAX']}"):
            for number in numbers:
                node.maps.put_enrolled(number, entry)
                made.append(number)
        assert len(node.maps.enrolled) == LIMITS["ENROLLED_MAX"]
        late = next(numbers)
        with pytest.raises(BpfFault):
            mesh.kernel.put_enrolled(late, pod)
        a, b, _ = mesh.pods
        mesh.put()
        server, app = Server(b), a.puppet()
        slot = app.connect(b.ip4, 80)
        server.accepts(app, slot)
        mesh.kernel.remove_enrolled(made.pop())
        mesh.kernel.put_enrolled(late, pod)
        assert late in node.maps.enrolled
        for number in (late, *made):
            mesh.kernel.remove_enrolled(number)

    def test_listeners_that_find_no_room_are_refused_and_come_in_when_there_is_some(self, node, mesh):
        a = mesh.pods[0]
        fds = {f"{name}4": a.listeners[f"{name}4"].fileno() for name in ("outbound", "plaintext", "hbone")}
        taken = []
        with pytest.raises(BpfFault, match="map listeners") as caught:
            for number in range(1, 99):
                taken.append(f"10.1.9.{number}")
                mesh.kernel.put_listeners(taken[-1:], fds)
        assert caught.value.errno in (errno.E2BIG, errno.ENOMEM)
        assert len(node.maps.listeners) == LIMITS["LISTENERS_MAX"]
        mesh.kernel.remove_listeners(taken)
        mesh.kernel.put_listeners(taken[:1], fds)
        mesh.kernel.remove_listeners(taken[:1])
        assert node.maps.listeners.get(a.ip4, LAYOUT["LISTENER_HBONE"]), "a pod that is there keeps its own"
