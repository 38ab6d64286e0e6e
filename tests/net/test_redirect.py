"""Messages moved from socket to socket: every byte in order, bounds kept, nothing left behind.

Two pods of a node, their flows authorized in the kernel, through the real programs. Redirection's own decisions are
asserted from the kernel's account of each flow: a test in which nothing was redirected fails.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import subprocess
import termios
import threading
import time

import pytest

from ambient.datapath.layout import LAYOUT
from ambient.io import bpf_drain, bpf_links, bpf_selftest_redirect, bpf_tc, netns
from ambient.io.bpf_maps import Maps
from ambient.io.flow_reader import FlowReader
from ambient.node.redirection import Redirection
from tests.support.flows import closed, swept
from tests.support.netlab import run_ip, until
from tests.support.redirect import CAN, REDIRECT, WANTS, Duplex, Held, enrol, fill, held_bytes, read

pytestmark = [pytest.mark.net, pytest.mark.bpf]

HIGH = 262144
"""2 x the receive buffer of a fresh socket, which is less than REDIRECT_HIGH_BYTES."""
HIGHS = [4096, 65536, 1 << 20]
at_several_bounds = pytest.mark.parametrize("high", HIGHS)


@pytest.fixture(autouse=True)
def account(node, record_property):
    """Tells each test's redirected and native bytes."""
    told: list[Duplex] = []
    reader = FlowReader(node.maps)
    closed(reader)
    yield told
    flows = [event.value for event in (*closed(reader), *swept(reader))]
    reader.close()
    ends = [end for flow in flows for end in (flow.client, flow.server)]
    for name in ("redirected", "native"):
        count = sum(getattr(one, name) for one in told)
        count += sum(end.redirect_bytes if name == "redirected" else end.native_bytes for end in ends)
        record_property(f"{name}_bytes", count)
        print(f"{name}: {count} bytes")


@pytest.fixture
def duplex(node, pods, duplex_binary, account):
    found = Duplex(node, pods[0], pods[1], duplex_binary)
    account.append(found)
    yield found
    found.close()
    until(lambda: not len(node.maps.tables["sockets"].list_keys()), "sockets leave with their connections")


class TestEveryByteInOrder:
    @at_several_bounds
    @pytest.mark.parametrize("family", [4, 6])
    def test_full_duplex_with_pauses_at_several_bounds(self, node, duplex, high, family):
        node.reset(acceleration=CAN, high_bytes=high)
        done = duplex.run(family=family, pause_us=1000, seed=high + family)
        assert done.redirected > 100_000
        assert done.switches > (16 if high < HIGHS[-1] else 8)
        assert done.redirected + done.native == done.client["sent"] + done.server["sent"] + 16 * 8
        assert done.client["enomem"] == done.server["enomem"] == 0

    @at_several_bounds
    def test_large_and_small_messages(self, node, duplex, high):
        node.reset(acceleration=CAN, high_bytes=high)
        small = duplex.run(flows=8, total=100_000, size=40)
        assert small.redirected > 10_000
        large = duplex.run(flows=4, total=8_000_000, size=262144)
        assert large.redirected > 100_000

    @at_several_bounds
    @pytest.mark.parametrize(("dial", "serve"), [("b", "b"), ("n", "b"), ("b", "n")])
    def test_blocking_applications_stay_native_and_never_see_eagain(self, node, duplex, dial, serve, high):
        node.reset(acceleration=CAN, high_bytes=high)
        counted = node.counted()
        done = duplex.run(dial=dial, serve=serve, pause_us=500)
        assert done.redirected == counted("redirect_inserted") == 0
        assert done.client["again_blocking"] == done.server["again_blocking"] == 0

    @at_several_bounds
    @pytest.mark.parametrize(("dial", "serve"), [("t", "n"), ("n", "t"), ("t", "t")])
    def test_an_application_that_turns_blocking_half_way(self, node, duplex, dial, serve, high):
        node.reset(acceleration=CAN, high_bytes=high)
        counted = node.counted()
        done = duplex.run(dial=dial, serve=serve, total=4_000_000, pause_us=1000)
        assert done.redirected > 0
        assert counted("redirect_blocking") >= 1

    @at_several_bounds
    @pytest.mark.parametrize(("dial", "serve"), [("s", "n"), ("n", "s"), ("s", "s")])
    def test_an_application_that_stops_blocking_half_way(self, node, duplex, dial, serve, high):
        """A descriptor that blocks enters no sockhash: its recv() sees no EAGAIN."""
        node.reset(acceleration=CAN, high_bytes=high)
        done = duplex.run(dial=dial, serve=serve, total=2_000_000, pause_us=4000)
        assert done.client["again_blocking"] == done.server["again_blocking"] == 0

    @at_several_bounds
    def test_applications_that_turn_blocking_and_back_and_again(self, node, duplex, high):
        node.reset(acceleration=CAN, high_bytes=high)
        counted = node.counted()
        done = duplex.run(dial="w", serve="w", total=4_000_000, pause_us=1000)
        assert done.redirected > 0
        assert counted("redirect_blocking") >= 1

    @pytest.mark.parametrize(("dial", "serve"), [("e", "e"), ("e", "n"), ("n", "e")])
    def test_edge_triggered_readers_that_take_a_short_read_for_empty_never_hang(self, node, duplex, dial, serve):
        """Native bytes behind redirected ones would come without an event, and FIONREAD might not count native ones:
        who waits for edges never enters the hash, and neither does the other end, for which it would only be dear."""
        node.reset(acceleration=CAN, high_bytes=8192)
        counted = node.counted()
        done = duplex.run(dial=dial, serve=serve, pause_us=1000, total=2_000_000)
        assert done.redirected == counted("redirect_inserted") == 0
        for event in done.flows:
            ends = ((dial, event.value.client), (serve, event.value.server))
            assert not any(end.sighting & LAYOUT["END_INSERTED"] for _, end in ends)
            found = [mode for mode, end in ends if end.sighting & LAYOUT["END_EDGE"]]
            assert found in (["e"], ["e", "e"])  # one suffices, and is looked for no longer
        assert counted("redirect_edge") >= len(done.flows)

    @at_several_bounds
    def test_writes_before_accept(self, node, duplex, high):
        node.reset(acceleration=CAN, high_bytes=high)
        assert duplex.run(accept_delay_ms=10, total=4_000_000).redirected > 0

    @at_several_bounds
    @pytest.mark.parametrize("end", ["r", "u"])
    def test_resets_and_closing_with_unread_bytes(self, node, duplex, end, high):
        """What arrives is right; how much arrives is up to who gives up."""
        node.reset(acceleration=CAN, high_bytes=high)
        done = duplex.run(end=end, total=4_000_000, pause_us=1000)
        assert done.redirected > 0

    @at_several_bounds
    def test_ten_thousand_short_connections(self, node, duplex, high):
        node.reset(acceleration=CAN, high_bytes=high)
        began = time.monotonic()
        flows = redirected = 0
        for batch in range(20):
            done = duplex.run(flows=500, total=24_000, size=1500, seed=batch)
            flows += len(done.flows)
            redirected += done.redirected
        assert flows == 10_000
        assert redirected > 0
        assert time.monotonic() - began < 60
        assert not node.leftovers()


class TestBounds:
    @pytest.mark.parametrize("message", [b"x", b"x" * 65536])
    def test_an_idle_receiver_holds_no_more_than_the_bound(self, held, message):
        held.warm()
        before = held.ends()[0]
        sent = fill(held.client, message)
        end = held.ends()[0]
        messages = end.redirect_messages - before.redirect_messages
        queued = end.redirect_bytes - before.redirect_bytes
        assert 0 < messages <= LAYOUT["REDIRECT_MESSAGES"] + 1
        assert queued <= HIGH + len(message)
        # The rest is TCP's: at most the receive buffer, twice because TCP counts what packets cost.
        rcvbuf = held.server.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        assert held_bytes(held.server) <= (HIGH + len(message) + 2 * rcvbuf) * 1.2
        assert end.state == LAYOUT["FLOW_NATIVE"]
        # And all of it comes, after which the direction redirects again.
        assert read(held.server, sent).count(b"x") == sent
        until(lambda: held_bytes(held.server) == 0, "the receiver holds nothing")
        held.warm()

    def test_a_native_message_goes_every_few_seconds(self, held):
        held.warm()
        seen = [held.ends()[0].last_native_ns]
        began = time.monotonic()
        while len(seen) < 3:
            assert time.monotonic() - began < 15
            held.ping()
            if held.ends()[0].last_native_ns - seen[-1] > 1e9:
                seen.append(held.ends()[0].last_native_ns)
        assert 2.9 < (seen[2] - seen[1]) / 1e9 < 6

    def test_a_path_that_drops_stops_the_flow_within_ten_seconds(self, node, pods, held):
        held.warm()
        run_ip(node.fd, f"link set v{pods[1].number} nomaster")
        began = time.monotonic()
        try:
            with pytest.raises(AssertionError, match="of 1 bytes within"):
                while time.monotonic() - began < 12:
                    assert held.client.send(b"x") == 1
                    read(held.server, 1, 0.5)
            assert time.monotonic() - began < 10.6
        finally:
            run_ip(node.fd, f"link set v{pods[1].number} master br0")
        read(held.server, 1, 10)


class TestABlockingApplication:
    def test_that_stops_blocking_is_redirected_from_then_on(self, held):
        for sock in (held.client, held.server):
            fcntl.fcntl(sock, fcntl.F_SETFL, fcntl.fcntl(sock, fcntl.F_GETFL) & ~os.O_NONBLOCK)
        for _ in range(20):
            held.ping()
        assert not any(end.sighting for end in held.ends())
        for sock in (held.client, held.server):
            sock.setblocking(False)
        held.warm()
        assert held.inserted()


class TestWhatIsNotRedirected:
    def test_a_receiver_that_turned_blocking_makes_both_directions_native(self, node, held):
        held.warm()
        counted = node.counted()
        flags = fcntl.fcntl(held.server, fcntl.F_GETFL)
        fcntl.fcntl(held.server, fcntl.F_SETFL, flags & ~os.O_NONBLOCK)
        held.ping()
        before = held.ends()
        for _ in range(5):
            held.ping()
        after = held.ends()
        assert counted("redirect_blocking") == 1
        assert [end.redirect_messages for end in after] == [end.redirect_messages for end in before]
        assert LAYOUT["FLOW_BLOCKING"] in {end.state for end in after}

    def test_kernel_tls_and_zerocopy_are_refused_on_a_redirected_socket_only(self, node, pods, held):
        held.warm()
        other = socket.socket()
        for sock, wanted in ((held.server, PermissionError), (other, OSError)):
            with pytest.raises(wanted) as refused:
                sock.setsockopt(socket.IPPROTO_TCP, 31, b"tls")
            assert isinstance(refused.value, PermissionError) == (sock is held.server)
        with pytest.raises(PermissionError):
            held.client.setsockopt(socket.SOL_SOCKET, 60, 1)
        held.client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        assert held.client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        other.close()

    def test_a_sender_with_zerocopy_stays_native_and_gets_its_completions(self, held):
        held.client.setsockopt(socket.SOL_SOCKET, 60, 1)
        for _ in range(20):
            held.client.send(b"y", 0x4000000)  # MSG_ZEROCOPY
            assert read(held.server, 1) == b"y"
            held.ping()
        client, server = held.ends()
        assert client.sighting & LAYOUT["END_ZEROCOPY"]
        assert client.redirect_messages == server.redirect_messages == 0
        assert held.client.recvmsg(1, 512, socket.MSG_ERRQUEUE)[1]

    def test_splice_finds_native_bytes_only(self, held):
        """So `redirect` is the owner's word that the application does not splice."""
        held.warm()
        held.client.send(b"bytes")
        assert held.ends()[0].state == REDIRECT
        out, into = os.pipe()
        try:
            with pytest.raises(BlockingIOError):
                os.splice(held.server.fileno(), into, 100, flags=2)
        finally:
            os.close(out)
            os.close(into)
        assert read(held.server, 5) == b"bytes"

    def test_fionread_counts_as_the_self_test_found(self, node, held):
        """Some kernels count redirected bytes only on such a socket, others native ones only."""

        def unread():
            assert select.select([held.server], [], [], 5)[0]
            count = struct.unpack("=i", fcntl.ioctl(held.server, termios.FIONREAD, bytes(4)))[0]
            read(held.server, 5)
            return count

        held.client.send(b"bytes")
        assert unread() == 5, "not in the hash yet"
        held.warm()
        held.client.send(b"bytes")
        redirected = unread()
        node.reset(acceleration=CAN | LAYOUT["DRAINING"])
        held.client.send(b"bytes")
        native = unread()
        assert {redirected, native} <= {0, 5}
        said = " ".join(bpf_selftest_redirect.run().said)
        assert ((redirected, native) != (5, 5)) is ("FIONREAD" in said)
        assert (redirected == 0) is ("FIONREAD counts 0" in said)

    @pytest.mark.parametrize("setting", ["DRAINING", None])
    def test_a_draining_layout_or_a_kernel_that_cannot_inserts_and_redirects_nothing(self, node, pods, held, setting):
        held.warm()
        node.reset(acceleration=CAN | LAYOUT["DRAINING"] if setting else 0)
        held.ping()
        before = held.ends()
        held.ping()
        assert [e.redirect_messages for e in held.ends()] == [e.redirect_messages for e in before]
        later = Held(node, *pods, port=6001)
        for _ in range(20):
            later.ping()
        assert not later.inserted()
        later.close()

    def test_a_flow_of_which_one_end_wants_direct(self, node, make_pod, pods):
        plain = make_pod()
        plain.enrol(flags=LAYOUT["ENROLLED_DIRECT"], workload_flags=LAYOUT["WORKLOAD_DIRECT"])
        assert bpf_tc.attach(node.bpffs_dir, plain.fd, plain.name) == 1
        one = Held(node, plain, pods[1])
        for _ in range(20):
            one.ping()
        assert one.flow().acceleration == LAYOUT["ACCELERATION_DIRECT"]
        assert not any(end.sighting for end in one.ends())
        one.close()


class TestTheTcProgram:
    @pytest.mark.parametrize("links", [True, False])
    def test_it_is_attached_once_and_goes(self, node, pods, links):
        """By links (TCX), and by filters as on a kernel without them."""
        uid, fd = pods[0].name, pods[0].fd
        bpf_tc.detach(node.bpffs_dir, fd, uid)
        assert bpf_tc.attach(node.bpffs_dir, fd, uid, links=links) == 1
        assert bpf_tc.attach(node.bpffs_dir, fd, uid, links=links) == 0
        assert uid in bpf_tc.attached(node.bpffs_dir)
        assert bpf_tc.detach(node.bpffs_dir, fd, uid) is True
        assert bpf_tc.detach(node.bpffs_dir, fd, uid) is False
        assert uid not in bpf_tc.attached(node.bpffs_dir)

    def test_a_filter_that_somebody_removed_comes_back(self, node, pods):
        uid, fd = pods[0].name, pods[0].fd
        bpf_tc.detach(node.bpffs_dir, fd, uid)
        assert bpf_tc.attach(node.bpffs_dir, fd, uid, links=False) == 1
        netns.run_in_netns(fd, lambda: subprocess.run(["tc", "qdisc", "del", "dev", "eth0", "clsact"], check=True))
        assert bpf_tc.attach(node.bpffs_dir, fd, uid, links=False) == 1

    def test_an_older_kernel_gets_filters(self, node, pods):
        """Without TCX: the same through clsact."""
        for pod in pods:
            bpf_tc.detach(node.bpffs_dir, pod.fd, pod.name)
            assert bpf_tc.attach(node.bpffs_dir, pod.fd, pod.name, links=False) == 1
        one = Held(node, *pods)
        one.warm()
        one.close()
        for pod in pods:
            bpf_tc.detach(node.bpffs_dir, pod.fd, pod.name)
        other = Held(node, *pods, port=6001)
        for _ in range(20):
            other.ping()
        assert not other.inserted()
        other.close()


class TestTwoProcessorsThatLookAtOnce:
    """The second finds the socket in the hash."""

    @pytest.fixture(scope="class")
    @classmethod
    def loaded_node(cls, netlab):
        insert = "error = sockets.insert(key, sk);"
        return netlab.node("twice", ("enrol.c", insert, f"sockets.insert(key, sk);\n\t\t{insert}"))

    def test_kernel_tls_is_refused_all_the_same(self, node, held):
        def one_is_in():
            held.ping()
            return len(node.maps.tables["sockets"].list_keys())

        until(one_is_in, "one end is in the hash")
        refused = 0
        for sock in (held.client, held.server):
            with pytest.raises(OSError) as caught:
                sock.setsockopt(socket.IPPROTO_TCP, 31, b"tls")
            refused += isinstance(caught.value, PermissionError)
        assert refused == len(node.maps.tables["sockets"].list_keys())


class TestTheAgentsPart:
    def test_a_socket_that_turned_blocking_comes_out_and_reads_as_any_other(self, node, pods, held):
        agent = Redirection(str(node.bpffs_dir), node.maps)
        spaces = {pod.cookie: pod.fd for pod in pods}
        held.warm()
        for _ in range(3):
            held.client.send(b"redirected")
        flags = fcntl.fcntl(held.server, fcntl.F_GETFL)
        fcntl.fcntl(held.server, fcntl.F_SETFL, flags & ~os.O_NONBLOCK)
        held.client.send(b"native")
        assert agent.take_out(spaces, 100.0) == 0, "not before senders have settled"
        assert agent.take_out(spaces, 110.0) == 1, "the client's end holds nothing; the server's has unread bytes"
        assert len(node.maps.sockets.keys()) == 1
        assert held.server.recv(100) == b"redirected" * 3
        assert held.server.recv(100) == b"native"
        assert agent.take_out(spaces, 111.0) == 1
        assert node.maps.sockets.keys() == []
        held.server.settimeout(None)
        held.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("=qq", 5, 0))
        sender = threading.Timer(0.05, held.client.send, (b"later",))
        sender.start()
        assert held.server.recv(100) == b"later", "a blocking recv waits"
        sender.join()
        assert agent.take_out(spaces, 120.0) == 0

    def test_it_looks_at_those_pods_that_want_it(self, node, make_pod):
        node.reset(acceleration=CAN)
        one, two = make_pod(), make_pod()
        for pod in (one, two):
            pod.enrol(**WANTS)
        agent = Redirection(str(node.bpffs_dir), node.maps)
        agent.follow({one.name: one.fd, two.name: two.fd})
        agent.follow({one.name: one.fd, two.name: two.fd})
        assert not agent.problems
        first = Held(node, one, two)
        first.warm()
        agent.follow({one.name: one.fd})
        assert not list(bpf_links.pod_dir(node.bpffs_dir, two.name).glob("enrol-*"))
        bpf_tc.detach(node.bpffs_dir, one.fd, one.name)
        agent.forget(one.name)
        agent.add(one.name, one.fd)
        assert bpf_tc.attached(node.bpffs_dir) >= {one.name}, "left and come back between two looks"
        agent.follow({one.name: one.fd, "gone": 9999})
        assert set(agent.problems) == {"gone"}
        first.close()

    def test_an_older_layout_drains_and_its_unread_bytes_are_read(self, netlab, duplex_binary):
        """The pins of a node are renamed into another version's: what is in its sockets survives until it is read."""
        node = netlab.node("drain")
        node.reset(acceleration=CAN)
        pods = [enrol(node.pod()) for _ in range(2)]
        one = Held(node, *pods)
        one.warm()
        one.client.send(b"a" * 50_000)
        assert one.ends()[0].state == REDIRECT
        old = "v2-00000000"
        (node.bpffs_dir / LAYOUT.version).rename(node.bpffs_dir / old)
        assert bpf_drain.drain_others(node.bpffs_dir) == [old]
        assert [path.name for path in (node.bpffs_dir / old).iterdir()] == ["maps"]
        node.maps.close()
        one.client.send(b"b" * 50_000)
        assert read(one.server, 100_000) == b"a" * 50_000 + b"b" * 50_000
        assert bpf_drain.drain_others(node.bpffs_dir) == [old], "while a socket is in it"
        one.close()
        until(lambda: bpf_drain.drain_others(node.bpffs_dir) == [], "the last socket has left")
        assert not (node.bpffs_dir / old).exists()
        node.load()
        node.maps = Maps.open(node.bpffs_dir)
        node.reset()
        for pod in pods:
            pod.close()
