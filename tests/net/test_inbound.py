"""What reaches an enrolled pod without ztunnel's word: tunnels arrive at ztunnel, the kubelet's probes at the
application, all else is steered to the plaintext listener or dropped. What ztunnel lets in is in test_delivery.py."""

from __future__ import annotations

import errno
import socket

import pytest

from ambient.datapath.layout import LAYOUT
from ambient.io import bpf_links, cgroup, netns
from tests.net.test_delivery import deliver
from tests.support.netlab import until

pytestmark = [pytest.mark.net, pytest.mark.bpf]

INET, INET6 = socket.AF_INET, socket.AF_INET6


class TestSteering:
    @pytest.mark.parametrize("family", [INET, INET6])
    def test_plaintext_goes_to_ztunnel_with_the_original_destination(self, node, b, outside, family):
        app = b.puppet()
        app.listen(b.ip4 if family == INET else b.ip6)
        client = outside.puppet()
        address = b.ip4 if family == INET else b.ip6
        slot = client.connect(address, 80)
        listener = b.listeners["plaintext4" if family == INET else "plaintext6"]
        sock, peer = listener.accept()
        assert sock.getsockname()[:2] == (address, 80)
        assert peer[:2] == client.name(slot)
        sock.close()

    def test_also_to_ports_nobody_listens_on(self, node, b, outside):
        outside.puppet().connect(b.ip4, 9999)
        sock, _ = b.listeners["plaintext4"].accept()
        assert sock.getsockname() == (b.ip4, 9999)
        sock.close()

    def test_mapped_addresses_are_ipv4(self, node, b, outside):
        client = outside.puppet()
        slot = client.tcp(INET6)
        client.call("connect", slot, f"::ffff:{b.ip4}", 80)
        b.listeners["plaintext4"].accept()[0].close()

    def test_a_dual_stack_application_is_not_reached_around_it(self, node, b, outside):
        app = b.puppet()
        app.listen("::")
        outside.puppet().connect(b.ip4, 80)
        b.listeners["plaintext4"].accept()[0].close()
        outside.puppet().connect(b.ip6, 80)
        b.listeners["plaintext6"].accept()[0].close()

    def test_one_dual_stack_listener_serves_both_families(self, node, b, outside):
        with node.member("agent"):
            both = netns.create_socket(b.fd, INET6, socket.SOCK_STREAM)
        both.settimeout(5)
        both.bind(("::", 16006))
        both.listen(8)
        for address in b.addresses:
            node.maps.listeners.put(address, LAYOUT["LISTENER_INBOUND_PLAINTEXT"], both.fileno())
            client = outside.puppet()
            client.connect(address, 80)
            sock, _ = both.accept()
            assert sock.getsockname()[1] == 80
            sock.close()
        both.close()

    def test_a_listener_of_the_wrong_family_drops_and_counts(self, node, b, outside):
        counted = node.counted()
        kind = LAYOUT["LISTENER_INBOUND_PLAINTEXT"]
        node.maps.listeners.put(b.ip6, kind, b.listeners["plaintext4"].fileno())
        with pytest.raises(ConnectionRefusedError):
            outside.puppet().connect(b.ip6, 80)
        assert counted("listener_mismatch") == 1

    @pytest.mark.parametrize("port, name", [(80, "plaintext4"), (15008, "hbone4")])
    def test_without_its_listener_it_drops_and_counts(self, node, b, outside, port, name):
        counted = node.counted()
        app = b.puppet()
        b.listeners[name].close()
        app.listen("0.0.0.0", port)  # an application in the listener's place gets nothing
        with pytest.raises(ConnectionRefusedError):
            outside.puppet().connect(b.ip4, port)
        assert counted("no_listener") == 1
        kind = LAYOUT["LISTENER_HBONE" if name == "hbone4" else "LISTENER_INBOUND_PLAINTEXT"]
        assert node.maps.listeners.get(b.ip4, kind) is None, "the kernel forgets a closed listener"

    def test_an_application_joining_the_port_group_gets_nothing(self, node, b, outside):
        """ztunnel's listener never sets SO_REUSEPORT, so nobody can join it; steering ignores groups anyway."""
        app = b.puppet()
        slot = app.tcp()
        app.call("option", slot, socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with pytest.raises(OSError) as caught:
            app.call("bind", slot, "127.0.0.1", 15006)
        assert caught.value.errno == errno.EADDRINUSE

    @pytest.mark.parametrize("family", [INET, INET6])
    def test_tunnels_go_to_ztunnels_own_listener(self, node, b, outside, family):
        counted = node.counted()
        outside.puppet().connect(b.ip4 if family == INET else b.ip6, 15008)
        b.listeners["hbone4" if family == INET else "hbone6"].accept()[0].close()
        assert counted("hbone") == 1

    def test_an_entry_does_not_open_the_tunnels_port_to_anybody_else(self, node, b):
        sock = deliver(node, b, port=15008)
        b.listeners["hbone4"].accept()[0].close()
        sock.close()
        until(lambda: not node.leftovers(), "the unused entry goes with the socket")

    def test_loopback_within_the_pod_is_left_alone(self, node, b):
        app = b.puppet()
        for address in ("127.0.0.1", "::1"):
            listening = app.listen(address, 80)
            slot = app.connect(address, 80)
            assert app.accept(listening)[1] == app.name(slot)

    def test_a_connection_from_the_pod_to_its_own_address_is_steered_too(self, node, b):
        app = b.puppet()
        app.listen(b.ip4)
        node.maps.enrolled.delete(b.cookie)  # so that connect does not capture it first
        app.connect(b.ip4, 80)
        b.listeners["plaintext4"].accept()[0].close()

    def test_datagrams_are_left_alone(self, node, b, outside):
        app, client = b.puppet(), outside.puppet()
        here, there = app.udp(), client.udp()
        app.call("bind", here, b.ip4, 5000)
        client.call("sendto", there, b.ip4, 5000, "ping")
        assert app.call("recvfrom", here)[2] == "ping"

    def test_after_leaving_the_mesh_the_application_is_reached_directly(self, node, b, outside):
        app = b.puppet()
        listening = app.listen(b.ip4)
        b.leave()
        client = outside.puppet()
        slot = client.connect(b.ip4, 80)
        assert app.accept(listening)[1] == client.name(slot)

    def test_attaching_twice_is_once_and_detaching_twice_is_fine(self, node, b):
        assert bpf_links.attached_pods(node.bpffs_dir)[b.name] == netns.inode(b.fd)
        assert bpf_links.attach_sk_lookup(node.bpffs_dir, b.fd, b.name) is False
        assert bpf_links.detach_sk_lookup(node.bpffs_dir, b.name) is True
        assert bpf_links.detach_sk_lookup(node.bpffs_dir, b.name) is False
        assert b.name not in bpf_links.attached_pods(node.bpffs_dir)

    def test_a_pin_of_an_earlier_namespace_is_replaced(self, node, b, outside):
        assert bpf_links.attach_sk_lookup(node.bpffs_dir, outside.fd, b.name) is True
        assert bpf_links.attached_pods(node.bpffs_dir)[b.name] == netns.inode(outside.fd)


class TestProbes:
    @pytest.mark.parametrize("family", [INET, INET6])
    def test_the_kubelet_reaches_the_application(self, node, b, family):
        counted = node.counted()
        address = b.ip4 if family == INET else b.ip6
        app = b.puppet()
        listening = app.listen(address)
        kubelet = node.process("kubelet")
        slot = kubelet.connect(address, 80)
        assert app.accept(listening)[1] == kubelet.name(slot)
        assert counted("probe") == 1
        assert not node.leftovers()

    def test_so_does_a_process_in_a_cgroup_below_the_kubelets(self, node, b):
        group = cgroup.create(node.cgroup / "kubelet" / "helper")
        app = b.puppet()
        listening = app.listen(b.ip4)
        helper = node.puppet(node.fd, group, node.puppets)
        helper.connect(b.ip4, 80)
        app.accept(listening)
        helper.kill()
        until(lambda: cgroup.remove(group), "the helper's cgroup is empty")

    def test_a_kubelet_with_a_dual_stack_socket_does_too(self, node, b):
        app = b.puppet()
        listening = app.listen(b.ip4)
        kubelet = node.process("kubelet")
        slot = kubelet.tcp(INET6)
        kubelet.call("connect", slot, f"::ffff:{b.ip4}", 80)
        app.accept(listening)

    def test_any_other_process_at_the_same_address_is_steered(self, node, b):
        """Masqueraded NodePort traffic has the node's address as well."""
        app = b.puppet()
        app.listen(b.ip4)
        stranger = node.process(".")
        slot = stranger.connect(b.ip4, 80)
        sock, peer = b.listeners["plaintext4"].accept()
        assert peer == stranger.name(slot)
        assert peer[0] == node.ip4
        sock.close()

    def test_a_socket_the_kubelet_once_used_is_no_pass_for_others(self, node, b):
        """Marked for one connect by one process: the next connect starts from nothing."""
        app = b.puppet()
        app.listen(b.ip4)
        kubelet = node.process("kubelet")
        slot = kubelet.tcp()
        kubelet.call("connect", slot, b.ip4, 80)
        kubelet.call("unspec", slot)
        cgroup.move(kubelet.process.pid, node.cgroup)
        kubelet.call("connect", slot, b.ip4, 80)
        b.listeners["plaintext4"].accept()[0].close()

    def test_a_probe_nobody_answers_leaves_no_entry(self, node, b):
        kubelet = node.process("kubelet")
        with pytest.raises(ConnectionRefusedError):
            kubelet.connect(b.ip4, 80)
        assert not node.leftovers()

    def test_the_kubelet_is_not_marked_towards_pods_outside_the_mesh(self, node, b, outside):
        counted = node.counted()
        app = outside.puppet()
        listening = app.listen(outside.ip4)
        node.process("kubelet").connect(outside.ip4, 80)
        app.accept(listening)
        assert counted("probe") == 0
        assert not node.leftovers()

    def test_a_pods_own_socket_is_never_a_probe(self, node, a, b):
        node.reset(kubelet_cgroups=(cgroup.cgroup_id(node.cgroup / "kubepods"),))
        app = b.puppet()
        app.listen(b.ip4)
        a.puppet().connect(b.ip4, 80)
        sock, cookie = a.ztunnel_accept()
        assert node.maps.take_redirect(cookie) is not None
        sock.close()
        assert not node.maps.authorized.items()

    def test_with_authorized_full_the_probe_is_steered_and_counted(self, node, b, fill_authorized):
        counted = node.counted()
        app = b.puppet()
        app.listen(b.ip4)
        node.process("kubelet").connect(b.ip4, 80)
        b.listeners["plaintext4"].accept()[0].close()
        assert counted("authorized_full") == 1
