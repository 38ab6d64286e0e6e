"""Half-close, resets, backpressure, and a thousand connections at once, through two worker processes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import random
import selectors
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from tests.support.require import require
from tests.ztunnel.harness import Mesh, WorkerProcess, mesh, pod, wait_until
from ztunnel.core import messages as m
from ztunnel.io.inbound import PORTS_TRIED_MAX

pytestmark = pytest.mark.net
RESET = struct.pack("ii", 1, 0)


@pytest.fixture(scope="module")
def path() -> Iterator[Mesh]:
    require("net")
    with mesh() as it:
        yield it


@pytest.fixture
def listener(path: Mesh) -> Iterator[socket.socket]:
    sock = path.b.listen(path.ip, path.port)
    yield sock
    sock.close()


def connected(path: Mesh, listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    near = path.connect()
    near.sendall(b"?")
    far, _ = listener.accept()
    far.settimeout(20)
    assert far.recv(1) == b"?"
    return near, far


def test_each_side_may_end_first_and_the_other_goes_on(path: Mesh, listener: socket.socket):
    for first in (0, 1):
        ends = connected(path, listener)
        early, late = ends[first], ends[1 - first]
        early.shutdown(socket.SHUT_WR)
        assert late.recv(10) == b""
        for _ in range(3):
            late.sendall(b"x" * 100_000)
            got = 0
            while got < 100_000:
                got += len(early.recv(1 << 16))
        late.close()
        assert early.recv(10) == b""
        early.close()


def packets(path: Mesh) -> tuple[int, int]:
    """What b got from a's node, and sent there, so far."""
    out = path.b.run("ip", "-s", "-j", "link", "show", "eth0", capture_output=True, check=True).stdout
    counts = json.loads(out)[0]["stats64"]
    return counts["rx"]["packets"], counts["tx"]["packets"]


def test_a_small_message_is_one_packet_between_the_nodes(path: Mesh, listener: socket.socket):
    """No credit, acknowledgement or PING of its own: each would be another packet, record and wake-up of the peer."""
    near, far = connected(path, listener)
    turns, few = 500, 50  # few: neighbours' discovery, acknowledgements where the machine was busy for 40 ms
    before = packets(path)
    for _ in range(turns):
        near.sendall(b"x" * 41)
        assert len(far.recv(1000)) == 41
        far.sendall(b"y" * 158)
        assert len(near.recv(1000)) == 158
    for earlier, later in zip(before, packets(path), strict=True):
        assert turns <= later - earlier < turns + few
    near.close()
    far.close()


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_reset_arrives_as_a_reset(path: Mesh, listener: socket.socket, who: str):
    near, far = connected(path, listener)
    resetting, told = (near, far) if who == "client" else (far, near)
    resetting.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    resetting.close()
    with pytest.raises(ConnectionResetError):
        told.recv(10)
    told.close()


@pytest.mark.parametrize("kind", ["hbone", "tcp"])
@pytest.mark.parametrize("who", ["client", "server"])
def test_a_worker_that_is_killed_resets_what_it_carried(who: str, kind: str):
    """An end instead would tell the application that what it got is all."""
    require("net")
    with mesh() as it:
        if kind == "tcp":
            it.set_route(kind="tcp", hops=(m.Hop(ip=it.ip, port=it.port, endpoint=f"{it.ip}:{it.port}"),))
        near, far = connected(it, it.b.listen(it.ip, it.port))
        near.sendall(b"half of a file")
        assert far.recv(100) == b"half of a file"
        far.sendall(b"half of an answer")
        assert near.recv(100) == b"half of an answer"
        (it.client if who == "client" or kind == "tcp" else it.server).process.kill()
        for end in (near, far):
            with pytest.raises(ConnectionResetError):
                end.recv(10)


@pytest.mark.parametrize("kind", ["hbone", "tcp"])
@pytest.mark.parametrize("who", ["client", "server"])
def test_a_reset_arrives_though_nobody_reads_what_was_sent_before(who: str, kind: str):
    require("net")
    with mesh() as it:
        if kind == "tcp":
            it.set_route(kind="tcp", hops=(m.Hop(ip=it.ip, port=it.port, endpoint=f"{it.ip}:{it.port}"),))
        near, far = connected(it, it.b.listen(it.ip, it.port))
        resetting, told = (near, far) if who == "client" else (far, near)
        fill(resetting)
        resetting.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        resetting.close()
        wait_until(lambda: told.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET, "the reset")


def receive(sock: socket.socket, count: int) -> bytes:
    """So many bytes, or those before the end."""
    got = b""
    while len(got) < count and (data := sock.recv(count - len(got))):
        got += data
    return got


@pytest.mark.parametrize("kind", ["hbone", "tcp"])
def test_urgent_data_arrives_in_its_place(kind: str):
    require("net")
    with mesh() as it:
        if kind == "tcp":
            it.set_route(kind="tcp", hops=(m.Hop(ip=it.ip, port=it.port, endpoint=f"{it.ip}:{it.port}"),))
        near, far = connected(it, it.b.listen(it.ip, it.port))
        for sender, reader in ((near, far), (far, near)):
            sender.sendall(b"abc")
            sender.send(b"!", socket.MSG_OOB)
            sender.sendall(b"def")
            sender.shutdown(socket.SHUT_WR)
            assert receive(reader, 100) == b"abc!def"


def test_a_plain_close_is_no_reset(path: Mesh, listener: socket.socket):
    near, far = connected(path, listener)
    near.close()
    assert far.recv(10) == b""
    far.close()


def fill(sock: socket.socket) -> int:
    """Send until nothing more is taken for a while."""
    sock.settimeout(1.0)
    sent = 0
    try:
        while sent < 256 * 1024 * 1024:
            sent += sock.send(b"z" * 65536)
    except TimeoutError:
        pass
    return sent


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_reader_that_stops_stops_its_sender_and_no_neighbour(path: Mesh, listener: socket.socket, who: str):
    near, far = connected(path, listener)
    sender, slow = (near, far) if who == "client" else (far, near)
    rss = path.client.rss_mb() + path.server.rss_mb()
    sent = fill(sender)
    assert 0 < sent < 64 * 1024 * 1024
    assert path.client.rss_mb() + path.server.rss_mb() < rss + 32
    for _ in range(3):
        other_near, other_far = connected(path, listener)
        other_near.sendall(b"n" * 300_000)
        got = 0
        while got < 300_000:
            got += len(other_far.recv(1 << 16))
        other_far.sendall(b"back")
        assert other_near.recv(10) == b"back"
        other_near.close()
        other_far.close()
    sender.shutdown(socket.SHUT_WR)
    got = 0
    while data := slow.recv(1 << 20):
        got += len(data)
    assert got == sent
    near.close()
    far.close()


@pytest.mark.parametrize("who", ["client", "server"])
def test_many_readers_that_stop_stop_no_neighbour(path: Mesh, listener: socket.socket, who: str):
    with contextlib.ExitStack() as open_ones:
        for _ in range(12):
            near, far = map(open_ones.enter_context, connected(path, listener))
            sender = near if who == "client" else far
            sender.settimeout(0.3)
            with contextlib.suppress(TimeoutError):
                sender.sendall(bytes(64 * 1024 * 1024))
        near, far = map(open_ones.enter_context, connected(path, listener))
        sender, reader = (near, far) if who == "client" else (far, near)
        reader.settimeout(10)
        for _ in range(20):
            sender.sendall(bytes(50_000))
            assert len(receive(reader, 50_000)) == 50_000


def test_a_connection_to_a_closed_port_is_reset_and_logged_with_its_status(path: Mesh):
    path.client.control.events.clear()
    with pytest.raises(ConnectionResetError):
        path.connect().recv(10)
    [event] = wait_until(lambda: [e for e in path.client.control.events if e.event == "failed"], "an event")
    assert (event.flags, event.error) == ("CONNECT", "http status: 503")


def serve_digests(listener: socket.socket, stop: threading.Event) -> None:
    """For each connection: read to the end, answer digest and length, and echo the number of bytes asked for."""
    selector = selectors.DefaultSelector()
    listener.setblocking(False)
    selector.register(listener, selectors.EVENT_READ, None)
    while not stop.is_set():
        for key, _ in selector.select(0.1):
            if key.data is None:
                try:
                    sock, _ = listener.accept()
                except BlockingIOError:
                    continue
                sock.setblocking(False)
                selector.register(sock, selectors.EVENT_READ, [hashlib.sha256(), 0, b""])
                continue
            sock, state = key.fileobj, key.data
            assert isinstance(sock, socket.socket)
            data = sock.recv(1 << 18)
            if data:
                state[0].update(data)
                state[1] += len(data)
                state[2] = (state[2] + data)[:8]
                continue
            selector.unregister(sock)
            sock.settimeout(30)
            (want,) = struct.unpack(">Q", state[2])
            body = random.Random(want).randbytes(want)
            sock.sendall(state[0].digest() + struct.pack(">Q", state[1]) + body)
            sock.close()
    listener.close()


def test_a_thousand_connections_at_once_with_random_sizes_and_half_closes_are_byte_exact(path: Mesh):
    listener = path.b.listen(path.ip, path.port)
    stop = threading.Event()
    server = threading.Thread(target=serve_digests, args=(listener, stop))
    server.start()
    choose = random.Random(7)
    try:
        socks = []
        for _ in range(1000):
            sock = path.connect()
            sock.setblocking(False)
            size = int(2 ** choose.uniform(0, 17))
            want = int(2 ** choose.uniform(0, 16))
            body = struct.pack(">Q", want) + choose.randbytes(size)
            socks.append([sock, body, 0, want, bytearray()])
        wait_until(lambda: path.server.control.event_count > 0, "first events")
        selector = selectors.DefaultSelector()
        for state in socks:
            selector.register(state[0], selectors.EVENT_READ | selectors.EVENT_WRITE, state)
        open_count = 1000
        while open_count:
            ready = selector.select(20)
            assert ready, f"{open_count} connections are stuck"
            for key, mask in ready:
                sock, body, at, want, got = state = key.data
                if mask & selectors.EVENT_WRITE:
                    step = choose.randrange(1, 20_000)
                    state[2] += sock.send(body[at : at + step])
                    if state[2] == len(body):
                        sock.shutdown(socket.SHUT_WR)
                        selector.modify(sock, selectors.EVENT_READ, state)
                if mask & selectors.EVENT_READ:
                    data = sock.recv(1 << 16)
                    got += data
                    if not data:
                        selector.unregister(sock)
                        sock.close()
                        open_count -= 1
                        assert got[:32] == hashlib.sha256(body).digest()
                        assert got[32:40] == struct.pack(">Q", len(body))
                        assert bytes(got[40:]) == random.Random(want).randbytes(want)
    finally:
        stop.set()
        server.join()
    assert path.client.rss_mb() < 60 and path.server.rss_mb() < 60


def test_a_delivery_takes_another_port_where_the_application_still_has_a_connection_with_the_first():
    require("net")
    with mesh(port=3) as it:
        listening = it.b.listen(it.ip, it.port)
        near = it.connect()
        near.sendall(b"x")
        far, _ = listening.accept()
        assert far.recv(1) == b"x"
        wait_until(lambda: it.server.control.counters.get("delivery_port_taken") == 3, "the ports that were taken")
        assert not it.server.control.counters.get("delivery_refused")
        near.close()
        far.close()


def test_a_delivery_without_a_free_port_is_refused_after_a_bounded_search():
    require("net")
    with mesh(port=2) as it:
        it.b.listen(it.ip, it.port)
        near = it.connect()
        with pytest.raises(ConnectionResetError):
            near.recv(1)
        wait_until(lambda: it.server.control.counters.get("delivery_refused") == 1, "the refusal")
        assert it.server.control.counters["delivery_port_taken"] == PORTS_TRIED_MAX - 1


def test_an_application_that_binds_other_addresses_gets_no_further_tunnels():
    """127.0.0.0/8 is free to all: an address of its own for each connection must not be a tunnel of its own."""
    require("net")
    with mesh() as it, contextlib.ExitStack() as open_ones:
        it.client.close()
        it.client = WorkerProcess(it.authority, original=it.vip, client="each")
        it.set_route()
        assert not it.client.put(it.pod_a, it.a, {"outbound4": it.a.listen("127.0.0.1", 15011)}).error
        listening = it.b.listen(it.ip, it.port)
        for _ in range(8):
            near = open_ones.enter_context(it.a.connect("127.0.0.1", 15011))
            near.sendall(b"x")
            far, _ = listening.accept()
            open_ones.enter_context(far)
            assert far.recv(1) == b"x"
        it.client.control.send(m.AskConnections(number=1))
        told = wait_until(lambda: it.client.control.connections, "what is open")
        assert len(told.rows) == 8 and len(told.tunnels) == 1


def test_a_pod_with_very_many_connections_leaves_descriptors_for_others(monkeypatch: pytest.MonkeyPatch):
    require("net")
    monkeypatch.setenv("WORKER_FILES", "400")
    with mesh() as it, contextlib.ExitStack() as open_ones:
        it.server.control.verdict = lambda question: None  # they stay as they are
        for space, number in ((it.a, 80), (it.b, 81)):
            # The address a steered connection has is the pod's own, as if sk_lookup had assigned it.
            steered = space.listen(space.ip4, number)
            assert not it.server.put(pod(f"plain{number}", space), space, {"plaintext4": steered}).error
        for _ in range(110):
            with contextlib.suppress(ConnectionResetError):  # the reset may be quicker than we notice the connection
                open_ones.enter_context(it.a.connect(it.b.ip4, 81))
        counters = it.server.control.counters
        wait_until(lambda: counters.get("pod_share_exceeded", 0) >= 10, "those beyond the share")
        it.a.connect(it.a.ip4, 80).close()
        asked = it.server.control.asked
        wait_until(lambda: "uid-plain80" in [getattr(q, "destination", "") for q in asked], "the other pod's question")
        assert not counters.get("accept_no_room")


def test_a_peer_that_does_not_answer_holds_a_connection_for_a_limited_time(monkeypatch: pytest.MonkeyPatch):
    require("net")
    monkeypatch.setenv("WORKER_CONSTANTS", '{"ztunnel.io.outbound.ANSWER_S": 0.1}')
    with mesh() as it:
        it.server.control.verdict = lambda question: None
        near = it.connect()
        with pytest.raises(ConnectionResetError):
            near.recv(1)
        (event,) = wait_until(lambda: it.client.control.events, "the failure is logged")
        assert (event.event, event.error) == ("failed", "the peer did not answer in time")


def test_a_tunnel_that_has_used_up_its_streams_is_followed_by_another(monkeypatch: pytest.MonkeyPatch):
    require("net")
    monkeypatch.setenv("WORKER_CONSTANTS", '{"ztunnel.core.frames.STREAM_ID_MAX": 5}')
    with mesh() as it, contextlib.ExitStack() as open_ones:
        listening = it.b.listen(it.ip, it.port)
        for _ in range(8):
            near = open_ones.enter_context(it.connect())
            near.sendall(b"x")
            far, _ = listening.accept()
            assert far.recv(1) == b"x"
            open_ones.enter_context(far)
        it.client.control.send(m.AskConnections(number=1))
        told = wait_until(lambda: it.client.control.connections, "what is open")
        assert [tunnel["streams"] for tunnel in told.tunnels].count(3) == 2 and len(told.rows) == 8
        assert not it.client.control.counters.get("faults")
