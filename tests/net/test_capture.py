"""An enrolled pod's connections reach ztunnel's listener with their record; the application notices nothing."""

from __future__ import annotations

import errno
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import EnrolledValue, RedirectKey, RedirectValue, ServiceKey, ServiceValue, WorkloadValue
from ambient.io import cgroup, netns
from tests.support.netlab import until

pytestmark = [pytest.mark.net, pytest.mark.bpf]

INET, INET6 = socket.AF_INET, socket.AF_INET6


def refused(call, *words) -> int:
    with pytest.raises(OSError) as caught:
        call(*words)
    assert caught.value.errno is not None
    return caught.value.errno


def take(node, pod, listener="outbound4") -> RedirectValue:
    """Accept as ztunnel and take the record; the accepted socket is closed."""
    accepted, cookie = pod.ztunnel_accept(listener)
    with accepted:
        record = node.maps.take_redirect(cookie)
    assert record is not None
    return record


def test_a_captured_connection_reaches_ztunnel_with_its_record(node, a, b):
    app = a.puppet()
    slot = app.connect(b.ip4, 80)
    accepted, cookie = a.ztunnel_accept()
    record = node.maps.take_redirect(cookie)
    assert record is not None
    assert (record.original, record.original_port) == (b.ip4, 80)
    assert (record.client, record.client_port) == app.name(slot)
    assert (record.source, record.netns) == (a.workload, a.cookie)
    assert (record.endpoint, record.endpoint_port) == ("", 0)
    assert node.maps.take_redirect(cookie) is None
    assert app.name(slot)[0] == a.ip4
    assert app.peer(slot) == (b.ip4, 80)
    app.call("send", slot, "hello")
    assert accepted.recv(10) == b"hello"
    accepted.sendall(b"back")
    assert app.call("recv", slot)[2] == "back"
    accepted.close()


def test_so_does_ipv6(node, a, b):
    app = a.puppet()
    slot = app.connect(b.ip6, 80)
    record = take(node, a, "outbound6")
    assert (record.original, record.original_port) == (b.ip6, 80)
    assert (record.client, record.client_port) == app.name(slot)
    assert app.name(slot)[0] == a.ip6
    assert app.peer(slot) == (b.ip6, 80)


def test_a_mapped_address_on_an_ipv6_socket_is_ipv4(node, a, b):
    app = a.puppet()
    slot = app.tcp(INET6)
    app.call("connect", slot, f"::ffff:{b.ip4}", 80)
    record = take(node, a, "outbound4")
    assert (record.original, record.original_port, record.client) == (b.ip4, 80, a.ip4)
    assert app.name(slot) == (f"::ffff:{a.ip4}", record.client_port)
    assert app.peer(slot) == (f"::ffff:{b.ip4}", 80)


def test_an_ipv4_only_pod_dialling_ipv6_gets_no_ipv4_address(node, make_pod, b):
    pod = make_pod(families=(4,))
    pod.enrol()
    app = pod.puppet()
    slot = app.tcp(INET6)
    assert refused(app.call, "connect", slot, b.ip6, 80) == errno.ECONNREFUSED
    assert app.connect(b.ip4, 80) is not None


@pytest.mark.parametrize("port", [0, 5555])
def test_a_socket_bound_to_the_pods_address_keeps_it(node, a, b, port):
    app = a.puppet()
    slot = app.tcp()
    app.call("bind", slot, a.ip4, port)
    bound = app.name(slot)
    app.call("connect", slot, b.ip4, 80)
    record = take(node, a)
    assert (record.client, record.client_port) == bound == app.name(slot)
    assert record.original == b.ip4


def test_a_socket_bound_to_a_port_only_keeps_the_port(node, a, b):
    app = a.puppet()
    for family, target in ((INET, b.ip4), (INET6, b.ip6), (INET6, f"::ffff:{b.ip4}")):
        slot = app.tcp(family)
        app.call("bind", slot, "0.0.0.0" if family == INET else "::", 5556)
        app.call("connect", slot, target, 80)
        record = take(node, a, "outbound6" if target == b.ip6 else "outbound4")
        assert record.client_port == 5556
        assert record.original in (b.ip4, b.ip6)
        app.call("reset", slot)


def test_an_address_that_cannot_be_bound_is_refused(node, a, b):
    counted = node.counted()
    node.maps.enrolled[a.cookie] = EnrolledValue("10.9.9.9", "fd09::9", a.workload)
    app = a.puppet()
    assert refused(app.connect, b.ip4, 80) == errno.EPERM
    assert refused(app.connect, b.ip6, 80) == errno.EPERM
    assert counted("bind_failed") == 2


def test_a_nonblocking_connect_is_captured_too(node, a, b):
    app = a.puppet()
    slot = app.tcp()
    app.call("option", slot, socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    app.begin("nonblocking_connect", slot, b.ip4, 80)
    with InProgress():
        app.answer()
    app.call("poll", slot, 4)
    assert app.call("error", slot) == ["0"]
    assert take(node, a).original == b.ip4
    assert app.peer(slot) == (b.ip4, 80)


class InProgress:
    """EINPROGRESS or success: both are right for a non-blocking connect."""

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        return kind is not None and issubclass(kind, OSError) and value.errno == errno.EINPROGRESS


class TestWhatIsCaptured:
    def test_an_unknown_address_in_a_cluster_range(self, node, a):
        app = a.puppet()
        app.connect("10.96.0.10", 80)
        assert take(node, a).original == "10.96.0.10"
        app.connect("fd00:96::10", 80)
        assert take(node, a, "outbound6").original == "fd00:96::10"

    def test_a_known_service_wherever_its_address_is(self, node, a):
        key = ServiceKey("192.0.2.7", 8080)
        node.maps.services[key] = ServiceValue(7, 0)
        a.puppet().connect("192.0.2.7", 8080)
        assert take(node, a).original_port == 8080
        node.maps.services.delete(key)

    def test_a_workload_behind_a_waypoint(self, node, a):
        node.maps.workloads["192.0.2.8"] = WorkloadValue(99, LAYOUT["WORKLOAD_WAYPOINT"], 1)
        a.puppet().connect("192.0.2.8", 80)
        assert take(node, a).original == "192.0.2.8"
        node.maps.workloads.delete("192.0.2.8")

    def test_everything_while_the_maps_are_not_complete(self, node, a):
        counted = node.counted()
        node.reset(complete=0)
        node.maps.workloads["192.0.2.9"] = WorkloadValue(98, 0, 1)
        app = a.puppet()
        for address in ("192.0.2.9", "198.51.100.1"):
            app.connect(address, 80)
            assert take(node, a).original == address
        assert counted("not_synced") == 2
        node.maps.workloads.delete("192.0.2.9")

    def test_everything_while_there_are_no_settings(self, node, a):
        node.maps._settings.delete(0)
        a.puppet().connect("198.51.100.1", 80)
        assert take(node, a).original == "198.51.100.1"

    def test_a_connection_of_the_pod_to_itself_by_its_address(self, node, a):
        a.puppet().connect(a.ip4, 80)
        assert take(node, a).original == a.ip4

    def test_connecting_to_any_from_a_bound_socket_means_the_bound_address(self, node, a):
        app = a.puppet()
        slot = app.tcp()
        app.call("bind", slot, a.ip4, 0)
        app.call("connect", slot, "0.0.0.0", 80)
        assert take(node, a).original == a.ip4
        assert app.peer(slot) == (a.ip4, 80)

    def test_mptcp(self, node, a, b):
        app = a.puppet()
        slot = next(app._slots)
        try:
            app.call("mptcp", slot, int(INET))
        except OSError as error:
            assert error.errno in (errno.EPROTONOSUPPORT, errno.ENOPROTOOPT), error
            assert not Path("/proc/sys/net/mptcp/enabled").exists()
            return
        app.call("connect", slot, b.ip4, 80)
        assert take(node, a).original == b.ip4


class TestWhatIsLeftAlone:
    """Each reaches the real destination: ztunnel's listener sees nothing."""

    def assert_nothing_captured(self, pod):
        listener = pod.listeners["outbound4"]
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()
        listener.settimeout(5)

    def test_a_destination_outside_the_cluster(self, node, a):
        counted = node.counted()
        server = node.process(".")
        listening = server.listen(node.ip4, 8081)
        app = a.puppet()
        slot = app.connect(node.ip4, 8081)
        assert server.accept(listening)[1][0] == a.ip4
        assert app.peer(slot) == (node.ip4, 8081)
        self.assert_nothing_captured(a)
        assert counted("not_mesh") == 1

    def test_a_workload_that_is_not_enrolled(self, node, a, make_pod):
        plain = make_pod()
        for address in plain.addresses:
            node.maps.workloads[address] = WorkloadValue(plain.workload, LAYOUT["WORKLOAD_LOCAL"], 1)
        server = plain.puppet()
        app = a.puppet()
        for address in plain.addresses:
            listening = server.listen(address, 80)
            slot = app.connect(address, 80)
            assert server.accept(listening)[1] == app.name(slot)
            assert app.peer(slot) == (address, 80)
        self.assert_nothing_captured(a)

    def test_loopback(self, node, a):
        counted = node.counted()
        app = a.puppet()
        for bound, target in (("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("127.0.0.1", "0.0.0.0")):
            listening = app.listen(bound, 8080)
            slot = app.connect(target, 8080)
            accepted, peer = app.accept(listening)
            assert app.name(slot) == peer
            for one in (accepted, slot, listening):
                app.call("reset", one)
        assert counted("loopback") == 3

    def test_a_pod_that_is_not_enrolled(self, node, b, make_pod):
        plain = make_pod()
        app = plain.puppet()
        slot = app.connect(b.ip4, 80)
        assert app.peer(slot) == (b.ip4, 80)
        accepted, _ = b.listeners["plaintext4"].accept()
        accepted.close()

    def test_the_sockets_of_ztunnel_and_of_cgroups_below_its_own(self, node, a, b):
        counted = node.counted()
        group = cgroup.create(node.cgroup / "kubepods" / "ztunnel-pod" / "container")
        node.reset(exempt_cgroups=(cgroup.cgroup_id(group.parent),))
        app = node.puppet(a.fd, group, a.puppets)
        app.connect(b.ip4, 80)
        b.listeners["plaintext4"].accept()[0].close()
        self.assert_nothing_captured(a)
        assert counted("exempt") == 1
        app.kill()
        until(lambda: cgroup.remove(group.parent), "the container's cgroup is empty")

    def test_the_whole_node_in_bypass(self, node, a, b):
        counted = node.counted()
        node.reset(mode=LAYOUT["MODE_BYPASS"])
        server = b.puppet()
        listening = server.listen(b.ip4, 80)
        app = a.puppet()
        slot = app.connect(b.ip4, 80)
        assert server.accept(listening)[1] == app.name(slot)
        assert counted("bypass") == 2  # on both sides

    def test_one_pod_in_bypass(self, node, a, b):
        node.maps.put_enrolled(a.cookie, EnrolledValue(a.ip4, a.ip6, a.workload, flags=LAYOUT["ENROLLED_BYPASS"]))
        a.puppet().connect(b.ip4, 80)
        b.listeners["plaintext4"].accept()[0].close()  # still enrolled: steered
        flags = LAYOUT["WORKLOAD_LOCAL"] | LAYOUT["WORKLOAD_ENROLLED"] | LAYOUT["WORKLOAD_BYPASS"]
        node.maps.workloads[b.ip4] = WorkloadValue(b.workload, flags, 1)
        server = b.puppet()
        listening = server.listen(b.ip4, 80)
        a.puppet().connect(b.ip4, 80)
        server.accept(listening)

    def test_a_pod_open_on_failure_once_the_heartbeat_stopped(self, node, a, b):
        long_ago = time.monotonic_ns() - 60 * 10**9
        node.maps.put_enrolled(a.cookie, EnrolledValue(a.ip4, a.ip6, a.workload, flags=LAYOUT["ENROLLED_OPEN"]))
        node.reset(heartbeat_timeout_s=30)
        a.puppet().connect(b.ip4, 80)
        assert take(node, a).original == b.ip4
        node.reset(heartbeat_timeout_s=30, heartbeat_ns=long_ago)
        a.puppet().connect(b.ip4, 80)
        b.listeners["plaintext4"].accept()[0].close()
        self.assert_nothing_captured(a)
        # Closed on failure is the default, and no timeout means never.
        node.reset(heartbeat_timeout_s=0, heartbeat_ns=long_ago)
        a.puppet().connect(b.ip4, 80)
        assert take(node, a).original == b.ip4

    def test_a_pod_closed_on_failure_stays_captured(self, node, a, b):
        node.reset(heartbeat_timeout_s=30, heartbeat_ns=time.monotonic_ns() - 60 * 10**9)
        a.puppet().connect(b.ip4, 80)
        assert take(node, a).original == b.ip4


class TestRecursionGuard:
    @pytest.mark.parametrize("port", [15001, 15006, 15008])
    def test_a_mesh_port_is_refused_on_loopback_and_on_enrolled_pods(self, node, a, b, port):
        counted = node.counted()
        app = a.puppet()
        for target in ("127.0.0.1", "127.9.9.9", "::1", b.ip4, b.ip6, a.ip4):
            assert refused(app.connect, target, port) == errno.EPERM
        slot = app.tcp(INET6)
        assert refused(app.call, "connect", slot, "::ffff:127.0.0.1", port) == errno.EPERM
        assert refused(app.call, "connect", slot, "::", port) == errno.EPERM
        assert counted("recursion") == 8

    def test_the_same_port_of_a_stranger_is_not(self, node, a):
        server = node.process(".")
        server.listen(node.ip4, 15008)
        a.puppet().connect(node.ip4, 15008)


class TestLimits:
    def test_beyond_its_share_a_workload_gets_eperm_and_others_are_not_touched(self, node, make_pod, b):
        pod = make_pod()
        pod.enrol(flows_max=3)
        counted = node.counted()
        app, other = pod.puppet(), b.puppet()
        slots = [app.connect("10.96.0.1", 80) for _ in range(3)]
        assert node.maps.enrolled[pod.cookie].flows == 3
        assert refused(app.connect, "10.96.0.1", 80) == errno.EPERM
        assert refused(app.connect, "fd00:96::1", 80) == errno.EPERM
        assert node.maps.enrolled[pod.cookie].refused == 2
        assert counted("share_exceeded") == 2
        other.connect("10.96.0.1", 80)
        assert node.maps.enrolled[b.cookie].refused == 0
        app.call("reset", slots[0])
        assert node.maps.enrolled[pod.cookie].flows == 2
        app.connect("10.96.0.1", 80)
        app.kill()
        until(lambda: node.maps.enrolled[pod.cookie].flows == 0, "closed sockets give their share back")

    def test_a_count_below_zero_refuses_nobody(self, node, a):
        """Two sockets of before the pod's entry was written anew that close at once may have taken it there."""
        app = a.puppet()
        node.maps.enrolled[a.cookie] = replace(node.maps.enrolled[a.cookie], flows=2**32 - 2)
        slots = [app.connect("10.96.0.1", 80) for _ in range(3)]
        assert node.maps.enrolled[a.cookie].flows == 1
        for slot in slots:
            app.call("reset", slot)
        assert node.maps.enrolled[a.cookie].flows == 0

    def test_deferred_fast_opens_do_not_slip_past_the_share(self, node, make_pod):
        pod = make_pod()
        pod.enrol(flows_max=1)
        with netns.in_netns(pod.fd):
            Path("/proc/sys/net/ipv4/tcp_fastopen").write_text(str(0x1 | 0x4))  # client; send data without a cookie
        app = pod.puppet()
        slots = [app.tcp() for _ in range(3)]
        for slot in slots:
            app.call("option", slot, socket.IPPROTO_TCP, 30, 1)
            app.call("connect", slot, "10.96.0.1", 80)
        for slot in slots:
            app.call("send", slot, "x")
        assert len(node.maps.redirects) == node.maps.enrolled[pod.cookie].flows == 1
        assert node.maps.enrolled[pod.cookie].refused == 2

    def test_writing_an_enrolled_entry_again_keeps_its_counts(self, node, a):
        a.puppet().connect("10.96.0.1", 80)
        node.maps.put_enrolled(a.cookie, EnrolledValue(a.ip4, a.ip6, a.workload, flows_max=7))
        entry = node.maps.enrolled[a.cookie]
        assert (entry.flows, entry.flows_max) == (1, 7)

    def test_with_redirects_full_the_connection_has_no_record_and_it_is_counted(self, node, a, fill_redirects):
        counted = node.counted()
        slot = a.puppet().connect("10.96.0.1", 80)
        assert slot is not None
        accepted, cookie = a.ztunnel_accept()
        assert node.maps.take_redirect(cookie) is None
        accepted.close()
        assert counted("redirects_full") == 1
        assert node.maps.enrolled[a.cookie].flows == 0


@pytest.fixture
def fill_redirects(node):
    """Redirects is full for the duration of a test."""
    key, table = RedirectKey(0).encode(), node.maps.redirects.table
    value = RedirectValue("10.0.0.1", "", "10.0.0.2", 1, 1, 1, 1, 0, 1).encode()
    table.update_many([(key[:32] + index.to_bytes(8, "big"), value) for index in range(1, 1 + table.info.max_entries)])
    yield
    node.maps.redirects.clear()


class TestEntriesDieWithTheirSockets:
    """The node fixture reads the maps again after each test: nothing may be left."""

    def test_the_record_is_filed_under_the_accepted_socket_before_accept_returns(self, node, a):
        app = a.puppet()
        slot = app.connect("10.96.0.1", 80)
        ((key, _),) = node.maps.redirects.items()
        assert key.cookie and not key.netns
        accepted, cookie = a.ztunnel_accept()
        assert key.cookie == cookie
        accepted.close()
        app.close(slot)
        until(lambda: not node.leftovers(), "the record goes with the accepted socket")

    def test_a_client_that_resets_before_ztunnel_accepts(self, node, a):
        app = a.puppet()
        app.call("reset", app.connect("10.96.0.1", 80))
        until(lambda: not node.leftovers(), "the record goes with the connection")
        accepted, cookie = a.ztunnel_accept()
        assert node.maps.take_redirect(cookie) is None
        accepted.close()

    def test_a_client_that_is_killed(self, node, a):
        app = a.puppet()
        for _ in range(5):
            app.connect("10.96.0.1", 80)
        app.kill()
        for _ in range(5):
            a.ztunnel_accept()[0].close()
        until(lambda: not node.leftovers(), "the records go with the connections")
        until(lambda: node.maps.enrolled[a.cookie].flows == 0, "so does the share")

    def test_a_listener_that_is_closed_with_connections_waiting(self, node, a):
        app = a.puppet()
        app.connect("10.96.0.1", 80)
        a.listeners["outbound4"].close()
        until(lambda: not node.leftovers(), "the record goes with the connection")

    def test_a_connection_refused_because_nobody_listens(self, node, a):
        a.listeners["outbound4"].close()
        app = a.puppet()
        assert refused(app.connect, "10.96.0.1", 80) == errno.ECONNREFUSED
        assert not node.leftovers()
        assert node.maps.enrolled[a.cookie].flows == 0

    def test_a_pod_un_enrolled_with_connections_open(self, node, a):
        app = a.puppet()
        slot = app.connect("10.96.0.1", 80)
        accepted, cookie = a.ztunnel_accept()
        assert node.maps.take_redirect(cookie)
        a.leave()
        app.call("send", slot, "still")
        assert accepted.recv(10) == b"still"
        assert app.peer(slot) == ("10.96.0.1", 80)
        accepted.close()
