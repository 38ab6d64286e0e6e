"""What ztunnel lets into an enrolled pod arrives at the application, which sees its true client; each entry serves one
connection of this pod."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import Admission, AuthorizedValue, OriginValue, TupleKey, WorkloadValue
from ambient.io import netns
from ambient.io.bpf_sys import BpfFault
from tests.support.netlab import run_ip, until

pytestmark = [pytest.mark.net, pytest.mark.bpf]

INET, INET6 = socket.AF_INET, socket.AF_INET6
TCP_DEFER_ACCEPT = 9


def deliver(node, pod, *, family=INET, client="10.7.7.7", client_port=4242, port=80, **changes) -> socket.socket:
    """Connect into the pod as ztunnel does; the socket is connected."""
    sock = pod.ztunnel_socket(family)
    local = pod.ip4 if family == INET else pod.ip6
    remote = sock.getsockname()[:2]
    arguments = {"workload": pod.workload, "generation": 1, "client": client, "client_port": client_port}
    arguments |= {"netns": pod.cookie} | changes
    node.maps.authorize_delivery(Admission(local, port, *remote, **arguments))
    sock.connect((local, port))
    return sock


class TestDelivery:
    @pytest.mark.parametrize("family", [INET, INET6])
    def test_the_application_sees_the_true_client(self, node, b, family):
        app = b.puppet()
        address = b.ip4 if family == INET else b.ip6
        client = "10.7.7.7" if family == INET else "fd07::7"
        listening = app.listen(address)
        sock = deliver(node, b, family=family, client=client)
        accepted, peer = app.accept(listening)
        assert peer == app.peer(accepted) == (client, 4242)
        assert app.name(accepted) == (address, 80)
        sock.sendall(b"request")
        assert app.call("recv", accepted)[2] == "request"
        assert not node.maps.authorized.items(), "gone once the connection is made"
        sock.close()
        assert app.peer(accepted) == (client, 4242), "still, after ztunnel closed its end"
        app.close(accepted)

    def test_a_dual_stack_listener_sees_an_ipv4_client_in_its_mapped_form(self, node, b):
        app = b.puppet()
        listening = app.listen("::")
        sock = deliver(node, b)
        accepted, peer = app.accept(listening)
        assert peer == app.peer(accepted) == ("::ffff:10.7.7.7", 4242)
        sock.close()
        app.close(accepted)

    def test_an_ipv6_client_of_an_ipv4_connection_is_not_shown_to_an_ipv4_socket(self, node, b):
        """There is no way to write it down there: the application sees ztunnel's address."""
        app = b.puppet()
        listening = app.listen(b.ip4)
        sock = deliver(node, b, client="fd07::7")
        accepted, peer = app.accept(listening)
        assert peer == app.peer(accepted) == sock.getsockname()
        sock.close()
        app.close(accepted)

    def test_without_an_entry_ztunnels_own_connection_is_steered(self, node, b):
        counted = node.counted()
        app = b.puppet()
        app.listen(b.ip4)
        sock = b.ztunnel_socket()
        sock.connect((b.ip4, 80))
        b.listeners["plaintext4"].accept()[0].close()
        assert counted("steered") == 1
        assert counted("ztunnel") == 0
        sock.close()

    @pytest.mark.parametrize("changes", [{"workload": 4711}, {"generation": 2}])
    def test_an_entry_of_another_workload_or_generation_lets_nobody_in(self, node, b, changes):
        counted = node.counted()
        app = b.puppet()
        app.listen(b.ip4)
        sock = deliver(node, b, **changes)
        b.listeners["plaintext4"].accept()[0].close()
        assert counted("stale_authorized") == 1
        sock.close()

    def test_generation_0_is_not_compared(self, node, b):
        app = b.puppet()
        listening = app.listen(b.ip4)
        sock = deliver(node, b, generation=0)
        app.accept(listening)
        sock.close()

    def test_an_address_given_to_another_workload_lets_no_old_entry_in(self, node, b):
        app = b.puppet()
        app.listen(b.ip4)
        sock = b.ztunnel_socket()
        key = (b.ip4, 80, *sock.getsockname())
        node.maps.authorize_delivery(
            Admission(*key, workload=b.workload, generation=1, client="10.7.7.7", client_port=1)
        )
        flags = node.maps.workloads[b.ip4].flags
        node.maps.workloads[b.ip4] = WorkloadValue(4711, flags, 2)
        sock.connect((b.ip4, 80))
        b.listeners["plaintext4"].accept()[0].close()
        node.maps.workloads[b.ip4] = WorkloadValue(b.workload, flags, 1)
        sock.close()

    def test_entries_go_when_nobody_listens(self, node, b):
        sock = b.ztunnel_socket()
        node.maps.authorize_delivery(
            Admission(b.ip4, 80, *sock.getsockname(), workload=b.workload, client="10.7.7.7", client_port=1)
        )
        assert len(node.maps.authorized) == len(node.maps.origins) == 1
        with pytest.raises(ConnectionRefusedError):
            sock.connect((b.ip4, 80))
        assert not node.leftovers(), "removed by the failed connect itself"
        sock.close()

    def test_entries_can_be_withdrawn_and_withdrawn_again(self, node, b):
        key = (b.ip4, 80, b.ip4, 40000)
        node.maps.authorize_delivery(Admission(*key, workload=b.workload, client="10.7.7.7", client_port=1))
        for _ in range(2):
            node.maps.withdraw_delivery(Admission(*key))
            assert not node.leftovers()

    def test_both_entries_are_written_or_none(self, node, b, fill_authorized):
        key = TupleKey(b.ip4, b.ip4, 80, 40000)
        with pytest.raises(BpfFault, match=r"map authorized \(full\): write, limit 65536") as caught:
            node.maps.authorize_delivery(
                Admission(b.ip4, 80, b.ip4, 40000, workload=1, client="10.7.7.7", client_port=1)
            )
        assert caught.value.errno in (errno.E2BIG, errno.ENOMEM)
        assert node.maps.origins.get(key) is None

    def test_ports_the_application_still_uses_are_refused_and_its_client_keeps_its_name(self, node, b):
        app = b.puppet()
        listening = app.listen(b.ip4)
        sock = deliver(node, b)
        accepted, _ = app.accept(listening)
        key = (b.ip4, 80, *sock.getsockname())
        with pytest.raises(BpfFault) as caught:
            node.maps.authorize_delivery(Admission(*key, workload=b.workload, client="10.8.8.8", client_port=2))
        assert caught.value.errno == errno.EEXIST
        assert app.peer(accepted) == ("10.7.7.7", 4242)
        assert not node.maps.authorized.items()
        sock.close()
        app.close(accepted)

    def test_a_port_used_again_keeps_the_new_clients_name(self, node, b):
        app = b.puppet()
        listening = app.listen(b.ip4)
        first = deliver(node, b, client_port=1)
        old, _ = app.accept(listening)
        local = first.getsockname()
        first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        first.close()  # reset: the application's socket is dead, but not closed
        with node.member("ztunnel"):
            second = netns.create_socket(b.fd, INET, socket.SOCK_STREAM)
        second.settimeout(5)
        second.bind(local)
        node.maps.authorize_delivery(
            Admission(b.ip4, 80, *local, workload=b.workload, client="10.8.8.8", client_port=2)
        )
        second.connect((b.ip4, 80))
        new, peer = app.accept(listening)
        app.close(old)
        assert peer == app.peer(new) == ("10.8.8.8", 2)
        second.close()
        app.close(new)

    def test_a_stranger_with_the_same_addresses_and_ports_takes_nothing_away(self, node, b, outside):
        """Who has a namespace of its own, which takes no privilege, can give itself any address there."""
        app = b.puppet()
        listening = app.listen(b.ip4)
        sock = deliver(node, b)
        accepted, _ = app.accept(listening)
        waiting = b.ztunnel_socket()
        key = (b.ip4, 80, *waiting.getsockname())
        netns_cookie = {"netns": b.cookie}
        node.maps.authorize_delivery(
            Admission(*key, workload=b.workload, client="10.8.8.8", client_port=2, **netns_cookie)
        )
        run_ip(outside.fd, f"addr add {b.ip4}/32 dev lo")
        stranger = outside.puppet()
        fake = stranger.listen(b.ip4)
        for port in (sock.getsockname()[1], waiting.getsockname()[1]):
            slot = stranger.tcp()
            stranger.call("bind", slot, b.ip4, port)
            stranger.call("connect", slot, b.ip4, 80)
            got, peer = stranger.accept(fake)
            assert peer == (b.ip4, port), "and learns of nobody's client"
            stranger.close(got)
            stranger.close(slot)
        assert app.peer(accepted) == ("10.7.7.7", 4242)
        waiting.connect((b.ip4, 80))
        second, peer = app.accept(listening)
        assert peer == app.peer(second) == ("10.8.8.8", 2)
        for closing in (sock, waiting):
            closing.close()
        for closing in (accepted, second):
            app.close(closing)
        stranger.close(fake)

    def test_an_entry_lives_until_the_handshake_ends_also_with_syn_cookies(self, node, b):
        with netns.in_netns(b.fd):
            Path("/proc/sys/net/ipv4/tcp_syncookies").write_text("2")  # always
        app = b.puppet()
        listening = app.listen(b.ip4)
        sock = deliver(node, b)
        accepted, peer = app.accept(listening)
        assert peer == ("10.7.7.7", 4242)
        assert not node.maps.authorized.items()
        sock.close()
        app.close(accepted)

    def test_an_application_that_defers_accept_sees_the_client_too(self, node, b):
        app = b.puppet()
        listening = app.listen(b.ip4)
        app.call("option", listening, socket.IPPROTO_TCP, TCP_DEFER_ACCEPT, 5)
        sock = deliver(node, b)
        sock.sendall(b"data")
        accepted, peer = app.accept(listening)
        assert peer == ("10.7.7.7", 4242)
        sock.close()
        app.close(accepted)

    def test_an_application_with_an_mptcp_listener_sees_the_client_too(self, node, b):
        """What programs in Go listen with by default."""
        app = b.puppet()
        slot = next(app._slots)
        if not Path("/proc/sys/net/mptcp/enabled").exists():
            return  # a kernel without MPTCP: such programs fall back to TCP themselves
        app.call("mptcp", slot, int(INET))
        app.call("bind", slot, b.ip4, 80)
        app.call("listen", slot, 8)
        sock = deliver(node, b)
        accepted, peer = app.accept(slot)
        assert peer == app.peer(accepted) == ("10.7.7.7", 4242)
        sock.close()
        app.close(accepted)

    def test_entries_go_when_ztunnel_dies_with_the_connection_waiting(self, node, b):
        app = b.puppet()
        listening = app.listen(b.ip4)
        sock = deliver(node, b)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()
        app.close(listening)
        until(lambda: not node.leftovers(), "nobody is left")

    def test_entries_nobody_used_are_swept_later_and_others_are_not(self, node, b):
        app = b.puppet()
        listening = app.listen(b.ip4)
        sock = deliver(node, b)
        accepted, _ = app.accept(listening)
        node.maps.authorize_delivery(Admission(b.ip4, 80, b.ip4, 40001, workload=1, client="10.7.7.7", client_port=1))
        assert node.maps.sweep() == 0, "too young"
        assert node.maps.sweep(older_than_s=0) == 2
        (left,) = node.maps.origins.keys()
        assert left.remote_port == sock.getsockname()[1]
        sock.close()
        app.close(accepted)


def test_an_entry_of_an_unknown_reason_lets_nobody_in(node, b):
    app = b.puppet()
    app.listen(b.ip4)
    sock = b.ztunnel_socket()
    key = TupleKey(b.ip4, b.ip4, 80, sock.getsockname()[1])
    node.maps.authorized[key] = AuthorizedValue(1, 0, b.workload, LAYOUT["REASON_CAPTURED"])
    node.maps.origins[key] = OriginValue("10.7.7.7", 0, 0, 1)
    sock.connect((b.ip4, 80))
    b.listeners["plaintext4"].accept()[0].close()
    sock.close()
    node.maps.withdraw_delivery(Admission(b.ip4, 80, b.ip4, key.remote_port))
