"""Routes, verdicts and their changes, drains and restarts, as one pod's peer sees them."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest

from tests.support.require import require
from tests.ztunnel.harness import Mesh, allow_all, mesh, spiffe, verdict_for, wait_until
from tests.ztunnel.hbone_client import HboneClient, client_context
from ztunnel.core import messages as m

pytestmark = pytest.mark.net


@pytest.fixture
def path() -> Iterator[Mesh]:
    require("net")
    with mesh() as it:
        yield it


def opened(path: Mesh) -> tuple[socket.socket, socket.socket, socket.socket]:
    """A connection through both workers, and the application's listener."""
    listener = path.b.listen(path.ip, path.port)
    near = path.connect()
    near.sendall(b"?")
    far, _ = listener.accept()
    far.settimeout(10)
    assert far.recv(1) == b"?"
    return near, far, listener


def alive(near: socket.socket, far: socket.socket) -> bool:
    near.sendall(b"ping")
    return far.recv(4) == b"ping"


def refused(path: Mesh) -> m.ConnectionEvent:
    """A new connection of pod a is reset; the last event of pod a's worker."""
    count = len(path.client.control.events)
    with pytest.raises(ConnectionResetError):
        path.connect().recv(10)
    wait_until(lambda: len(path.client.control.events) > count, "an event")
    return path.client.control.events[-1]


def client_of(path: Mesh) -> HboneClient:
    context = client_context(path.authority.certificate(spiffe("a")), path.authority.root_pem)
    return HboneClient(path.a.connect(path.ip, 15008), context)


def test_a_denied_identity_gets_401_and_the_client_a_reset_with_the_policy_logged(path: Mesh):
    path.b.listen(path.ip, path.port)
    path.server.control.verdict = lambda question: verdict_for(
        question, allow=False, policy="shop/only-c", reason="policy"
    )
    event = refused(path)
    assert (event.event, event.flags, event.error) == ("failed", "DENY", "http status: 401")
    denied = wait_until(lambda: path.server.control.events, "an event of the destination")[-1]
    assert (denied.event, denied.policy, denied.flags) == ("denied", "shop/only-c", "DENY")
    assert denied.source_identity == spiffe("a")
    question = path.server.control.asked[-1]
    assert isinstance(question, m.AskVerdict)
    assert (question.destination, question.port, question.identity) == ("uid-b", path.port, spiffe("a"))
    assert question.source_ip == path.a.ip4


def test_a_revoked_verdict_resets_open_connections_and_others_stay(path: Mesh):
    near, far, listener = opened(path)
    other = client_of(path)
    stream = other.connect(f"{path.ip}:{path.port}")
    assert other.status(stream) == 200
    question = next(q for q in path.server.control.asked if isinstance(q, m.AskVerdict))
    unrelated = msgspec.structs.replace(question, port=9)
    path.server.control.send(verdict_for(unrelated, allow=False, generation=2))
    path.server.control.send(verdict_for(question, allow=True, generation=3))
    assert alive(near, far)
    path.server.control.send(verdict_for(question, allow=False, generation=2))  # older than what holds
    assert alive(near, far)
    path.server.control.send(verdict_for(question, allow=False, generation=4, policy="shop/closed"))
    for sock in (near, far):
        with pytest.raises(ConnectionResetError):
            sock.recv(10)
    while stream not in other.resets:
        assert other.read()
    events = wait_until(
        lambda: [e for e in path.server.control.events if e.error == "connection closed due to policy change"],
        "the reason is logged",
    )
    assert {event.policy for event in events} == {"shop/closed"}
    listener.close()


def test_a_verdict_that_comes_to_depend_on_the_address_is_asked_again_for_open_connections(path: Mesh):
    near, far, _ = opened(path)
    question = next(q for q in path.server.control.asked if isinstance(q, m.AskVerdict))
    path.server.control.verdict = lambda q: verdict_for(q, allow=False, generation=6, by_ip=True)
    elsewhere = msgspec.structs.replace(question, source_ip="10.1.2.3")
    path.server.control.send(verdict_for(elsewhere, allow=True, generation=5, by_ip=True))
    with pytest.raises(ConnectionResetError):
        near.recv(10)
    with pytest.raises(ConnectionResetError):
        far.recv(10)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "refused", "reason": "unknown_destination", "hops": ()}, "unknown_destination"),
        ({"hops": ()}, "no_endpoint"),
        ({"identity": ""}, "no_endpoint"),
    ],
)
def test_a_connection_without_a_way_is_reset_and_says_why(path: Mesh, changes: dict[str, object], words: str):
    path.set_route(**changes)
    event = refused(path)
    assert event.event == "failed" and words in event.error and event.reporter == "source"


def test_a_hop_without_identities_is_never_used(path: Mesh):
    hop = path.route().hops[0]
    path.set_route(hops=(msgspec.structs.replace(hop, identities=()),))
    assert refused(path).error == "no_endpoint"
    path.client.control.send(path.route(generation=2, hops=(msgspec.structs.replace(hop, authority=""),)))
    path.client.control.send(m.AskConnections(number=1))
    wait_until(lambda: path.client.control.connections, "the worker has read the new route")
    assert refused(path).error == "no_endpoint"


@pytest.mark.parametrize("kind", ["tcp", "hbone"])
def test_an_endpoint_outside_the_mesh_is_reached_by_plain_tcp(path: Mesh, kind: str):
    listener = path.b.listen(path.ip, 9090)
    hop = m.Hop(ip=path.ip, port=9090)
    path.set_route(kind=kind, hops=(hop,))
    near = path.connect()
    far, address = listener.accept()
    assert address[0] == path.a.ip4
    far.settimeout(10)
    near.sendall(b"x" * 1_000_000)
    near.shutdown(socket.SHUT_WR)
    got = 0
    while data := far.recv(1 << 16):
        got += len(data)
    assert got == 1_000_000
    far.sendall(b"end")
    far.close()
    assert near.recv(10) == b"end" and near.recv(10) == b""
    events = wait_until(
        lambda: [e for e in path.client.control.events if e.event == "closed"] and path.client.control.events, "closed"
    )
    assert {event.protocol for event in events} == {"tcp"}
    assert (sum(e.sent for e in events), sum(e.received for e in events)) == (1_000_000, 3)


def test_a_connection_waits_for_its_first_route_and_certificate(path: Mesh):
    path.client.control.routes.clear()
    path.server.control.verdict = lambda question: None
    listener = path.b.listen(path.ip, path.port)
    near = path.connect()
    near.sendall(b"held")
    question = wait_until(
        lambda: [q for q in path.client.control.asked if isinstance(q, m.AskRoute)], "the route is asked for"
    )[0]
    assert (question.source, question.ip, question.port) == ("uid-a", *path.vip)
    path.client.control.send(path.route())
    asked = wait_until(
        lambda: [q for q in path.server.control.asked if isinstance(q, m.AskVerdict)], "the verdict is asked for"
    )[0]
    path.server.control.send(verdict_for(asked, allow=True))
    far, _ = listener.accept()
    assert far.recv(10) == b"held"


@pytest.fixture(scope="module")
def shared() -> Iterator[Mesh]:
    require("net")
    with mesh() as it:
        it.b.listen(it.ip, 8080)
        it.b.listen(it.ip, 1)
        yield it


@pytest.mark.parametrize(
    ("authority", "method", "status"),
    [
        ("{ip}:8080", "CONNECT", 200),
        ("{ip}:8080", "GET", 400),
        ("10.9.9.9:8080", "CONNECT", 400),
        ("b.shop.svc:8080", "CONNECT", 400),
        ("{ip}", "CONNECT", 400),
        ("{ip}:0", "CONNECT", 400),
        ("{ip}:99999", "CONNECT", 400),
        ("{ip}:15008", "CONNECT", 400),
        ("{ip}:15006", "CONNECT", 400),
        ("{ip}:15001", "CONNECT", 400),
        ("127.0.0.1:8080", "CONNECT", 400),
        ("{ip}:4", "CONNECT", 503),
        ("{ip}:1", "CONNECT", 503),
    ],
)
def test_the_answer_is_istio_s(shared: Mesh, authority: str, method: str, status: int):
    client = client_of(shared)
    assert client.status(client.connect(authority.format(ip=shared.ip), method=method)) == status
    assert client.status(client.connect(f"{shared.ip}:8080")) == 200  # the tunnel goes on
    client.close()


def test_the_port_of_the_forwarded_client_counts_only_with_the_tunnel_s_own_address(path: Mesh):
    path.b.listen(path.ip, 8080)
    client = client_of(path)
    for claimed in (f'for="{path.a.ip4}:4242"', 'for="10.6.6.6:4343"', "for=unknown", "garbage"):
        assert client.status(client.connect(f"{path.ip}:8080", ("forwarded", claimed))) == 200
    events = wait_until(lambda: len(path.server.control.events) >= 4 and path.server.control.events, "events")
    port = client.tls.getsockname()[1]
    assert [e.source_address for e in events[:4]] == [f"{path.a.ip4}:4242"] + [f"{path.a.ip4}:{port}"] * 3


def test_a_certificate_that_could_not_be_loaded_is_asked_for_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORKER_CONSTANTS", '{"ztunnel.io.link.REFUSED_S": 0.1}')
    require("net")
    with mesh() as it:
        control, other = it.client.control, spiffe("other")
        control.certificates[other] = m.Certificate(identity=other, generation=1, chain_pem=b"none", roots_pem=b"none")
        it.set_route(identity=other)
        listener = it.b.listen(it.ip, it.port)
        near = it.connect()
        near.sendall(b"x")
        wait_until(lambda: control.counters.get("certificates_refused"), "the refusal")
        del control.certificates[other]
        listener.settimeout(5)
        far, _ = listener.accept()
        assert far.recv(1) == b"x"


def test_captured_plaintext_is_judged_without_identity_and_delivered(path: Mesh):
    # Without eBPF: the listener stands where sk_lookup would send from, and gives way to the application's.
    steered = path.b.listen(path.ip, 7070)
    held: list[m.AskVerdict] = []
    path.server.control.verdict = held.append  # type: ignore[assignment]
    path.server.put(msgspec.structs.replace(path.pod_b, uid="uid-plain"), path.b, {"plaintext4": steered})
    near = path.a.connect(path.ip, 7070)
    near.sendall(b"clear")
    question = wait_until(lambda: held, "the question")[0]
    assert (question.identity, question.source_ip, question.port) == ("", path.a.ip4, 7070)
    steered.shutdown(socket.SHUT_RDWR)
    steered.close()
    wait_until(lambda: path.server.control.counters.get("listeners_lost") == 1, "the listener is gone")
    application = path.b.listen(path.ip, 7070)
    path.server.control.send(verdict_for(question, allow=True))
    far, _ = application.accept()
    far.settimeout(10)
    assert far.recv(10) == b"clear"
    far.sendall(b"answer")
    assert near.recv(10) == b"answer"
    path.server.control.send(verdict_for(question, allow=False, generation=9, policy="shop/strict"))
    for sock in (near, far):
        with pytest.raises(ConnectionResetError):
            sock.recv(10)


def test_captured_plaintext_that_is_denied_is_reset_and_logged(path: Mesh):
    path.server.control.verdict = lambda question: verdict_for(question, allow=False, reason="strict")
    steered = path.b.listen(path.ip, 7070)
    path.server.put(msgspec.structs.replace(path.pod_b, uid="uid-plain"), path.b, {"plaintext4": steered})
    with pytest.raises(ConnectionResetError):
        path.a.connect(path.ip, 7070).recv(1)
    denied = wait_until(lambda: [e for e in path.server.control.events if e.event == "denied"], "the denial is logged")
    assert denied[0].source_identity == "" and denied[0].error == "strict"


def test_a_delivery_that_comes_back_is_a_loop_and_ends(path: Mesh):
    steered = path.b.listen(path.ip, 7070)  # nothing else listens there, and no eBPF lets the delivery pass
    path.server.put(msgspec.structs.replace(path.pod_b, uid="uid-plain"), path.b, {"plaintext4": steered})
    with pytest.raises(ConnectionResetError):
        path.a.connect(path.ip, 7070).recv(1)
    wait_until(lambda: path.server.control.counters.get("plaintext_loop") == 1, "it is counted")


def test_who_dials_the_capture_listeners_themselves_is_closed(path: Mesh):
    recursion = path.b.listen(path.ip, 15006)
    other = msgspec.structs.replace(path.pod_b, uid="uid-plain")
    path.server.put(other, path.b, {"plaintext4": recursion})
    with pytest.raises(ConnectionResetError):
        path.a.connect(path.ip, 15006).recv(1)
    wait_until(lambda: path.server.control.counters.get("plaintext_recursion") == 1, "it is counted")


def test_a_restarted_control_process_is_asked_for_everything_again_and_cached_answers_serve_meanwhile(path: Mesh):
    near, far, listener = opened(path)
    for worker in (path.client, path.server):
        worker.control.die()
    assert alive(near, far)
    second = path.connect()
    second.sendall(b"cached")
    cached, _ = listener.accept()
    assert cached.recv(10) == b"cached"
    for worker in (path.client, path.server):
        worker.control.asked.clear()
        worker.new_control()
    wait_until(lambda: {type(q) for q in path.client.control.asked} >= {m.AskRoute, m.AskCertificate}, "asked again")
    wait_until(lambda: {type(q) for q in path.server.control.asked} >= {m.AskVerdict, m.AskCertificate}, "asked again")
    assert alive(near, far)
    question = next(q for q in path.server.control.asked if isinstance(q, m.AskVerdict))
    path.server.control.send(verdict_for(question, allow=False, generation=2))
    with pytest.raises(ConnectionResetError):
        near.recv(10)


def test_open_connections_and_tunnels_are_listed_on_request(path: Mesh):
    ends = opened(path)
    path.server.control.send(m.AskConnections(number=7))
    listed = wait_until(lambda: path.server.control.connections, "the list")
    assert listed.number == 7
    assert [(row.reporter, row.source_identity, row.sent) for row in listed.rows] == [("destination", spiffe("a"), 1)]
    assert len(ends) == 3 and listed.tunnels[0]["peer"] == spiffe("a") and listed.tunnels[0]["streams"] == 1


def test_a_pod_that_leaves_drains_its_connections_and_takes_no_new_ones(path: Mesh):
    near, far, _ = opened(path)
    path.server.remove("uid-b", 30)
    path.hbone.close()
    assert alive(near, far)
    assert refused(path).flags in ("CONNECT", "-")
    near.shutdown(socket.SHUT_WR)
    assert far.recv(1) == b""
    far.sendall(b"last")
    far.close()
    assert near.recv(10) == b"last" and near.recv(1) == b""


def test_a_pod_that_is_gone_is_closed_at_once(path: Mesh):
    near, far, _ = opened(path)
    path.server.remove("uid-b", 0)
    for sock in (near, far):
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_a_pod_that_comes_again_keeps_its_connections_and_takes_new_ones(path: Mesh):
    near, far, listener = opened(path)
    path.server.remove("uid-b", 30)
    again = path.b.socket()
    again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    path.hbone.close()
    wait_until(lambda: bound(again), "15008 is free again")
    again.listen(100)
    assert not path.server.put(path.pod_b, path.b, {"hbone4": again}).error
    assert alive(near, far)

    def another() -> bool:
        sock = path.connect()
        sock.sendall(b"new")
        listener.settimeout(1)
        try:
            peer, _ = listener.accept()
        except TimeoutError:
            return False
        return peer.recv(3) == b"new"

    assert another() and alive(near, far)


def test_a_pod_in_another_sandbox_gets_nothing_of_the_earlier_one(path: Mesh):
    near, _, listener = opened(path)
    moved = msgspec.structs.replace(path.pod_a, netns_cookie=2, addresses=(path.b.ip4, path.b.ip6))
    assert not path.client.put(moved, path.b, {"outbound4": path.b.listen(*path.entrance)}).error
    with pytest.raises(ConnectionResetError):
        near.recv(1)
    later = path.b.connect(*path.entrance)
    later.sendall(b"x")
    far, _ = listener.accept()
    assert far.recv(1) == b"x"
    path.server.control.send(m.AskConnections(number=1))
    told = wait_until(lambda: path.server.control.connections, "what is open")
    assert [row.source_address.rpartition(":")[0] for row in told.rows] == [path.b.ip4]
    later.close()


def bound(sock: socket.socket) -> bool:
    try:
        sock.bind(("0.0.0.0", 15008))
    except OSError:
        return False
    return True


def test_sigterm_drains_and_ends(path: Mesh):
    near, far, _ = opened(path)
    os.kill(path.server.process.pid, signal.SIGTERM)
    assert alive(near, far)
    near.close()
    assert far.recv(1) == b""
    far.close()
    assert path.server.process.wait(10) == 0


def test_a_listener_that_was_shut_down_is_dropped_and_the_worker_goes_on(path: Mesh):
    near, far, _ = opened(path)
    path.hbone.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: path.server.control.counters.get("listeners_lost") == 1, "the listener is dropped")
    assert alive(near, far)
    cpu = path.server.cpu_s()
    threading.Event().wait(0.5)
    assert path.server.cpu_s() - cpu < 0.3


def test_a_worker_without_descriptors_refuses_and_recovers(path: Mesh):
    near, far, listener = opened(path)
    import resource

    pid = path.client.process.pid
    in_use = len(os.listdir(f"/proc/{pid}/fd"))
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (in_use + 3, hard))
    crowd = [path.connect() for _ in range(20)]
    wait_until(lambda: path.client.control.counters.get("accept_no_room", 0) > 0, "it is counted")
    assert alive(near, far)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    for sock in crowd:
        sock.sendall(b"!")
    for _ in crowd:
        peer, _ = listener.accept()
        peer.settimeout(10)
        assert peer.recv(1) == b"!"
        peer.close()


@pytest.mark.parametrize("attack", ["reset flood", "garbage", "continuation flood", "ping flood"])
def test_a_hostile_tunnel_is_ended_with_goaway_and_other_tunnels_do_not_notice(path: Mesh, attack: str):
    from ztunnel.core import frames
    from ztunnel.core.headers import encode

    near, far, _ = opened(path)
    rss = path.server.rss_mb()
    path.server.control.verdict = allow_all if attack != "reset flood" else lambda question: None
    hostile = client_of(path)
    block = encode([(b":method", b"CONNECT"), (b":authority", f"{path.ip}:81".encode())])
    match attack:
        case "reset flood":
            data = b"".join(
                frames.frame(frames.HEADERS, 4, stream, block) + frames.rst_stream(stream, 8)
                for stream in range(1, 20001, 2)
            )
        case "garbage":
            data = b"\xff" + os.urandom(100_000)  # a frame of more than 16 MB
        case "continuation flood":
            data = frames.frame(frames.HEADERS, 0, 1, block) + frames.frame(frames.CONTINUATION, 0, 1, b"") * 10_000
        case _:
            data = frames.ping(b"x" * 8, ack=False) * 10_000
    try:
        hostile.tls.sendall(data)
    except OSError:
        pass
    hostile.until_end()
    assert hostile.eof
    if attack != "garbage":
        assert hostile.goaway in (frames.Code.ENHANCE_YOUR_CALM, None)
        wait_until(lambda: path.server.control.counters.get("http2_enhance_your_calm") == 1, "it is counted")
    assert alive(near, far)
    assert path.server.rss_mb() < rss + 8
