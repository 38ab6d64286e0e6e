"""Discovery, the CA and AwaitAcknowledged over real gRPC and TLS on loopback."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography import x509

from ambient.control.certificates import Caller, PodFacts
from ambient.errors import ConfigFault, PeerFault, PlatformFault
from ambient.io import authentication, ca, control_channel, xds_server
from ambient.io.authentication import Authenticator, Unauthenticated
from ambient.io.ca_client import await_acknowledged, create_certificate, make_csr, make_key, trust_bundle
from ambient.io.control_channel import bearer, open_channel
from ambient.io.quiet_grpc import grpc
from ambient.io.xds_client import METHOD, subscribe
from ambient.model.policy import Action, Group, Policy, Scope
from ambient.model.workload import TunnelProtocol, Workload
from ambient.model.world import Diff, World
from ambient.proto import discovery_pb2
from ambient.settings import NodeSettings
from ambient.xds.client import Backoff
from ambient.xds.resources import ADDRESS_TYPE
from ambient.xds.server import Response, Session
from tests.support.control import Background, ControlPlane, Now, until

WEB = "spiffe://cluster.local/ns/shop/sa/web"
QUICK = 0.02


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    async with ControlPlane(tmp_path, Now(time.time())) as running:
        yield running


def workload(name: str, ip: int = 1, *, hbone: bool = False, text: str = "") -> Workload:
    protocol = TunnelProtocol.HBONE if hbone else TunnelProtocol.NONE
    address = ipaddress.ip_address(f"10.0.{ip >> 8}.{ip & 255}")
    return Workload(f"c//Pod/ns/{name}", name, "ns", (address,), protocol=protocol, workload_name=text)


class Follower:
    """A subscribed process: what it was told, and a gate that holds it up."""

    def __init__(self, settings: NodeSettings, role: str = "ztunnel") -> None:
        self.settings = settings
        self.role = role
        self.world = World()
        self.diffs: list[Diff] = []
        self.states: list[tuple[bool, str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = False
        self.fail = 0

    async def on_change(self, world: World, diff: Diff) -> None:
        self.waiting = True
        await self.gate.wait()
        self.waiting = False
        if self.fail:
            self.fail -= 1
            raise RuntimeError("cannot write the maps")
        self.world = world
        self.diffs.append(diff)

    async def run(self) -> None:
        await subscribe(
            self.settings,
            self.role,
            self.on_change,
            on_state=lambda up, why: self.states.append((up, why)),
            backoff=Backoff(limit_s=QUICK),
        )

    @property
    def connected(self) -> bool:
        return bool(self.states) and self.states[-1][0]


async def refusal(settings: NodeSettings, timeout_s: float = 5.0) -> str:
    """The first reason for which a subscription fails."""
    async with Background() as background:
        follower = Follower(settings)
        background.start(follower.run())
        await until(lambda: bool(follower.states), timeout_s=timeout_s)
        assert not follower.diffs
        up, why = follower.states[0]
        assert not up
        return why


# ---- who may call ----


async def test_a_call_without_a_token_is_refused_with_the_reason(plane: ControlPlane) -> None:
    async with open_channel(plane.node()) as channel:
        for metadata in ((), (("authorization", "Basic x"),), (("authorization", "Bearer "),)):
            call = channel.stream_stream(METHOD)(metadata=metadata)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert "authorization" in (caught.value.details() or "")
    assert plane.reviewed == []


async def test_a_wrong_token_is_refused_for_every_service(plane: ControlPlane, tmp_path: Path) -> None:
    plane.discovery.set_world(World())
    (tmp_path / "wrong").write_text("not-a-token")
    settings = plane.node(token_file=str(tmp_path / "wrong"))
    assert "UNAUTHENTICATED" in await refusal(settings)
    with pytest.raises(PeerFault, match="UNAUTHENTICATED"):
        await create_certificate(settings, WEB, make_csr(make_key(), WEB), 60)
    assert not await await_acknowledged(settings, "x", False, 1.0)
    assert plane.server.counters["unauthenticated"] >= 3


async def test_an_account_that_is_no_node_account_may_not_see_the_world(plane: ControlPlane, tmp_path: Path) -> None:
    plane.callers["pod-token"] = Caller("shop", "web", "web-1", "1", "n1")
    (tmp_path / "pod-token").write_text("pod-token")
    settings = plane.node(token_file=str(tmp_path / "pod-token"))
    plane.discovery.set_world(World())
    assert "PERMISSION_DENIED" in await refusal(settings)
    assert not await await_acknowledged(settings, "x", False, 1.0)
    assert plane.discovery.connected() == ()


async def test_an_api_server_that_does_not_answer_makes_calls_unavailable_not_unauthenticated(
    plane: ControlPlane,
) -> None:
    plane.review_error = PlatformFault("no route to the API server")
    assert "UNAVAILABLE: token not reviewed: no route" in await refusal(plane.node())
    plane.review_error = None
    async with Background() as background:
        follower = Follower(plane.node())
        background.start(follower.run())
        plane.discovery.set_world(World())
        await until(lambda: len(follower.diffs) == 1)


async def test_a_control_plane_under_another_name_or_root_is_not_talked_to(plane: ControlPlane, tmp_path: Path) -> None:
    assert "UNAVAILABLE" in await refusal(plane.node(control_server_name="somebody.else"))
    other = ca.Authority.open(plane.settings.__class__(data_dir=str(tmp_path / "other")), time.time())
    (tmp_path / "other.pem").write_text(other.bundle_pem)
    assert "UNAVAILABLE" in await refusal(plane.node(ca_root_file=str(tmp_path / "other.pem")))
    assert plane.reviewed == [], "the token was not sent to a stranger"
    assert "cannot be read" in await refusal(plane.node(ca_root_file=str(tmp_path / "none")))
    (tmp_path / "two").write_text("two tokens")
    with pytest.raises(ConfigFault, match="one token"):
        bearer(plane.node(token_file=str(tmp_path / "two")))


# ---- discovery ----


async def test_worlds_arrive_and_only_changes_are_sent(plane: ControlPlane) -> None:
    policy = Policy("p", "ns", Scope.NAMESPACE, Action.DENY, (Group(),))
    worlds = [
        World(),
        World.of([workload("a"), workload("b", 2)]),
        World.of([workload("a"), workload("b", 3)], [], [policy]),
    ]
    async with Background() as background:
        follower = Follower(plane.node(), "agent")
        background.start(follower.run())
        await until(lambda: len(plane.discovery.connected()) == 1)
        for n, world in enumerate(worlds, 1):
            plane.discovery.set_world(world)
            await until(lambda n=n: len(follower.diffs) == n)
            assert follower.world == world
        assert follower.diffs[2] == Diff(workloads=(workload("b", 3),), policies=(policy,))
        (state,) = plane.discovery.connected()
        assert (state.node, state.role) == ("n1", "agent")
        assert plane.server.counters["resources"] == 4
    await until(lambda: plane.discovery.connected() == ())


async def test_a_client_that_returns_after_a_restart_of_the_server_is_sent_nothing_it_has(tmp_path: Path) -> None:
    world = World.of([workload(f"w{n}", n) for n in range(20)])
    clock = Now(time.time())
    async with Background() as background:
        first = ControlPlane(tmp_path, clock)
        first.discovery.set_world(world)
        async with first:
            follower = Follower(first.node())
            background.start(follower.run())
            await until(lambda: len(follower.diffs) == 1)
        await until(lambda: not follower.connected)
        second = ControlPlane(tmp_path, clock, port=first.port, callers=first.callers)
        second.discovery.set_world(world)
        async with second:
            await until(lambda: follower.connected)
            await until(lambda: second.discovery.connected()[0].generation_acknowledged == 1)
            assert second.server.counters["resources"] == 0
            assert len(follower.diffs) == 1
            second.discovery.set_world(World.of([workload("w1", 1)]))
            await until(lambda: len(follower.diffs) == 2)
            assert len(follower.diffs[1].removed_workloads) == 19


async def test_a_change_that_could_not_take_effect_is_not_acknowledged_and_comes_again(plane: ControlPlane) -> None:
    uid = workload("a").uid
    async with Background() as background:
        follower = Follower(plane.node())
        plane.discovery.set_world(World.of([workload("a")]))
        background.start(follower.run())
        await until(lambda: len(follower.diffs) == 1)
        follower.fail = 2
        plane.discovery.set_world(World.of([workload("a", hbone=True)]))
        await until(lambda: follower.fail == 1)
        assert plane.discovery.acknowledged(uid, True) != ()
        await until(lambda: len(follower.diffs) == 2)
        assert follower.diffs[1].workloads == (workload("a", hbone=True),)
        await until(lambda: plane.discovery.acknowledged(uid, True) == ())
        assert any("cannot write the maps" in why for _, why in follower.states)


async def test_a_slow_client_neither_blocks_others_nor_is_buffered_for(plane: ControlPlane) -> None:
    filler = "x" * 4000
    async with Background() as background:
        slow, quick = Follower(plane.node("n1")), Follower(plane.node("n2"))
        slow.gate.clear()
        for follower in (slow, quick):
            background.start(follower.run())
        plane.discovery.set_world(World())
        await until(lambda: slow.waiting and len(quick.diffs) == 1)
        for n in range(1, 60):
            plane.discovery.set_world(World.of([workload(f"w{i}", i, text=f"{n}{filler}") for i in range(40)]))
            await until(lambda n=n: len(quick.diffs) == n + 1)
        states = {state.node: state for state in plane.discovery.connected()}
        assert states["n1"].in_flight <= 8
        sent_to_both = plane.server.counters["responses"]
        assert sent_to_both < 60 + 20
        slow.gate.set()
        await until(lambda: slow.world == quick.world)
        assert len(slow.diffs) < 10


async def test_a_client_that_reads_nothing_at_all_does_not_stop_the_server(plane: ControlPlane) -> None:
    filler = "x" * 60_000
    settings = plane.node("n1")
    async with Background() as background, open_channel(settings) as channel:
        call = channel.stream_stream(METHOD, request_serializer=discovery_pb2.DeltaDiscoveryRequest.SerializeToString)(
            metadata=bearer(settings)
        )
        await call.write(discovery_pb2.DeltaDiscoveryRequest(type_url=ADDRESS_TYPE))
        quick = Follower(plane.node("n2"))
        background.start(quick.run())
        for n in range(1, 11):
            plane.discovery.set_world(World.of([workload(f"w{i}", i, text=f"{n}{filler}") for i in range(100)]))
            await until(lambda n=n: len(quick.diffs) == n)
        quiet = next(s for s in plane.discovery.connected() if s.node == "n1")
        assert quiet.generation_sent < 10
        assert quiet.in_flight <= 4 * 7
        call.cancel()


async def test_garbage_from_a_client_ends_its_stream_only(plane: ControlPlane) -> None:
    plane.discovery.set_world(World.of([workload("a")]))
    settings = plane.node()
    async with Background() as background, open_channel(settings) as channel:
        follower = Follower(plane.node("n2"))
        background.start(follower.run())
        await until(lambda: len(follower.diffs) == 1)
        call = channel.stream_stream(METHOD, request_serializer=lambda raw: raw)(metadata=bearer(settings))
        await call.write(b"\xff\xff\xff")
        assert await call.code() is not grpc.StatusCode.OK
        absurd = discovery_pb2.DeltaDiscoveryRequest(type_url=ADDRESS_TYPE, resource_names_subscribe=["x" * 5000])
        call = channel.stream_stream(METHOD, request_serializer=lambda raw: raw)(metadata=bearer(settings))
        await call.write(absurd.SerializeToString())
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "characters" in (await call.details() or "")
        plane.discovery.set_world(World())
        await until(lambda: len(follower.diffs) == 2)
        await until(lambda: len(plane.discovery.connected()) == 1)


async def test_garbage_from_the_control_plane_ends_the_connection_only(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, spoiled = Session.next, [b"\xff\xff\xff", b"", b"\x12\x02\x0a\x05"]

    def spoil(self: Session) -> Response | None:
        response = real(self)
        if response is None or not spoiled:
            return response
        return Response(response.nonce, response.type_url, spoiled.pop(0), 0, 0)

    monkeypatch.setattr(Session, "next", spoil)
    plane.discovery.set_world(World.of([workload("a")]))
    async with Background() as background:
        follower = Follower(plane.node())
        background.start(follower.run())
        await until(lambda: follower.world == plane.discovery.store.world)
        assert not spoiled
        assert sum(1 for up, _ in follower.states if not up) >= 2


async def test_an_ipv6_address_can_be_listened_on_and_a_taken_one_is_refused(tmp_path: Path) -> None:
    six = ControlPlane(tmp_path, Now(time.time()), more={"listen": ("127.0.0.1:0", "[::1]:0")})
    six.discovery.set_world(World())
    async with six, Background() as background:
        follower = Follower(six.node(control_address=f"[::1]:{six.server.ports[1]}"))
        background.start(follower.run())
        await until(lambda: len(follower.diffs) == 1)
        taken = ControlPlane(tmp_path, Now(time.time()), port=six.server.ports[0])
        with pytest.raises(PeerFault, match=f"listen: 127.0.0.1:{taken.port}"):
            async with taken:
                pass


async def test_a_quiet_stream_survives_its_own_keepalive(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The server takes as many pings as the client sends: else it would end every idle stream as a flood."""

    def faster(options: tuple[tuple[str, int], ...], name: str) -> tuple[tuple[str, int], ...]:
        assert name in dict(options)
        return tuple((key, value // 10 if key == name else value) for key, value in options)

    monkeypatch.setattr(control_channel, "_OPTIONS", faster(control_channel._OPTIONS, "grpc.keepalive_time_ms"))
    interval = "grpc.http2.min_ping_interval_without_data_ms"
    monkeypatch.setattr(xds_server, "_OPTIONS", faster(xds_server._OPTIONS, interval))
    fast = ControlPlane(tmp_path / "fast", Now(time.time()))
    fast.directory.mkdir()
    fast.discovery.set_world(World())
    async with fast, Background() as background:
        follower = Follower(fast.node())
        background.start(follower.run())
        await until(lambda: bool(follower.states))
        # a ping leaves each second (gRPC sends none faster), and the third that is too early ends the connection
        with pytest.raises(AssertionError, match="not within"):
            await until(lambda: len(follower.states) > 1, timeout_s=3.5)


# ---- acknowledgement ----


async def test_await_acknowledged_returns_once_every_client_has_acted(plane: ControlPlane) -> None:
    uid = workload("a").uid
    plane.discovery.set_world(World.of([workload("a")]))
    async with Background() as background:
        one, two = Follower(plane.node("n1")), Follower(plane.node("n2"), "agent")
        for follower in (one, two):
            background.start(follower.run())
        await until(lambda: len(one.diffs) == len(two.diffs) == 1)
        two.gate.clear()
        answer = asyncio.create_task(await_acknowledged(plane.node(), uid, True, 5.0))
        plane.discovery.set_world(World.of([workload("a", hbone=True)]))
        await until(lambda: two.waiting and len(one.diffs) == 2)
        assert not answer.done()
        assert plane.discovery.acknowledged(uid, True)[-1] == "n2"
        two.gate.set()
        assert await answer
        assert await await_acknowledged(plane.node(), uid, True, 5.0)


async def test_await_acknowledged_gives_up_in_time_and_says_so(plane: ControlPlane) -> None:
    plane.discovery.set_world(World.of([workload("a")]))
    async with Background() as background:
        follower = Follower(plane.node())
        background.start(follower.run())
        await until(lambda: len(follower.diffs) == 1)
        begin = time.monotonic()
        assert not await await_acknowledged(plane.node(), workload("a").uid, True, 0.2)
        assert 0.15 < time.monotonic() - begin < 3.0
        assert plane.server.counters["acknowledge_timeouts"] == 1
    plane.node()
    await plane.server.stop()
    assert not await await_acknowledged(plane.node(), "x", False, 0.5), "unreachable"


# ---- certificates ----


def enrol(plane: ControlPlane) -> None:
    plane.node("n1"), plane.node("n2")
    plane.pods["n1"].append(PodFacts("web-uid", "web-1", "shop", "web"))
    plane.pods["n2"].append(PodFacts("db-uid", "db-1", "shop", "db"))


async def test_a_node_gets_certificates_of_its_pods_and_of_no_others(plane: ControlPlane) -> None:
    enrol(plane)
    key = make_key()
    csr = make_csr(key, WEB)
    chain = await create_certificate(plane.node("n1"), WEB, csr, 3600)
    leaf = x509.load_pem_x509_certificate(chain[0].encode())
    assert leaf.public_key() == key.public_key()
    assert chain[-1] == plane.authority.bundle_pem
    with pytest.raises(PeerFault, match="no_pod_on_node"):
        await create_certificate(plane.node("n2"), WEB, csr, 3600)
    with pytest.raises(PeerFault, match="foreign_trust_domain"):
        await create_certificate(plane.node("n1"), WEB.replace("cluster.local", "evil.example"), csr, 3600)
    with pytest.raises(PeerFault, match="INVALID_ARGUMENT"):
        await create_certificate(plane.node("n1"), WEB, "garbage", 3600)
    plane.pods["n1"] = [pod for pod in plane.pods["n1"] if pod.uid != "uid-n1"]
    with pytest.raises(PeerFault, match="caller_pod_gone"):
        await create_certificate(plane.node("n1"), WEB, csr, 3600)
    counters = plane.server.counters
    assert (counters["certificates_issued"], counters["certificate_refused_no_pod_on_node"]) == (1, 1)


async def test_the_token_is_read_again_for_each_call(plane: ControlPlane) -> None:
    enrol(plane)
    settings = plane.node("n1")
    csr = make_csr(make_key(), WEB)
    await create_certificate(settings, WEB, csr, 60)
    Path(settings.token_file).write_text("renewed")
    with pytest.raises(PeerFault, match="UNAUTHENTICATED"):
        await create_certificate(settings, WEB, csr, 60)
    plane.callers["renewed-2"] = plane.callers["token-n1"]
    Path(settings.token_file).write_text("renewed-2")
    await create_certificate(settings, WEB, csr, 60)
    assert plane.reviewed == ["token-n1", "renewed", "renewed-2"]


def presented(port: int) -> x509.Certificate:
    """The certificate a new connection is shown."""
    return x509.load_pem_x509_certificate(ssl.get_server_certificate(("127.0.0.1", port)).encode())


async def test_the_server_certificate_is_renewed_at_half_life_without_a_restart(plane: ControlPlane) -> None:
    plane.discovery.set_world(World())
    async with Background() as background:
        follower = Follower(plane.node())
        background.start(follower.run())
        await until(lambda: len(follower.diffs) == 1)
        first = await asyncio.to_thread(presented, plane.port)
        plane.clock.at += ca.SERVER_LIFE_S * 0.4
        plane.server.tick()
        assert await asyncio.to_thread(presented, plane.port) == first
        plane.clock.at += ca.SERVER_LIFE_S * 0.2
        plane.server.tick()
        second = await asyncio.to_thread(presented, plane.port)
        assert second.serial_number != first.serial_number
        assert second.not_valid_after_utc > first.not_valid_after_utc
        plane.discovery.set_world(World.of([workload("a")]))
        await until(lambda: len(follower.diffs) == 2)
        assert [up for up, _ in follower.states] == [True], "the stream lived on"


async def test_a_root_rotation_reaches_clients_by_the_answer_and_by_the_root_file(
    plane: ControlPlane, tmp_path: Path
) -> None:
    plane.clock.at -= 100  # TLS goes by the real clock, so that of the CA must not get ahead of it
    enrol(plane)
    settings = plane.node("n1")
    csr = make_csr(make_key(), WEB)
    old = await create_certificate(settings, WEB, csr, 60)
    assert ca.main(["rotate", "--data-dir", str(tmp_path / "data"), "--distribute-s", "60", "--overlap-s", "60"]) == 0
    plane.server.tick()
    announced = await create_certificate(settings, WEB, csr, 60)
    assert announced[-1].count("BEGIN") == 2
    assert old[-1] in announced[-1]
    for _ in range(2):
        plane.clock.at += 35
        plane.server.tick()
    # the new root signs now, our own server certificate too: who has only the old root file is out
    assert await asyncio.to_thread(presented, plane.port)
    with pytest.raises(PeerFault, match="UNAVAILABLE"):
        await create_certificate(settings, WEB, csr, 60)
    Path(settings.ca_root_file).write_bytes((tmp_path / "data" / "root-bundle.pem").read_bytes())
    switched = await create_certificate(settings, WEB, csr, 60)
    leaf = x509.load_pem_x509_certificate(switched[0].encode())
    new_root = next(r for r in x509.load_pem_x509_certificates(switched[-1].encode()) if r.subject == leaf.issuer)
    leaf.verify_directly_issued_by(new_root)
    assert trust_bundle(settings, old).count(b"BEGIN") == 2, "a holder of the old answer trusts both by the file"
    for _ in range(2):
        plane.clock.at += 35
        plane.server.tick()
    assert (await create_certificate(settings, WEB, csr, 60))[-1].count("BEGIN") == 1


# ---- the memory of tokens ----


async def test_verdicts_on_tokens_are_remembered_for_a_short_time_and_in_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(authentication, "ENTRIES_MAX", 10)
    clock, asked = Now(0.0), list[str]()
    caller = Caller("a", "b")

    async def review(token: str) -> Caller | None:
        asked.append(token)
        await asyncio.sleep(0)
        return caller if token.startswith("good") else None

    authenticator = Authenticator(review, clock)

    def call(token: str) -> object:
        return authenticator.authenticate((("authorization", f"Bearer {token}"),))

    results = await asyncio.gather(*(call("good") for _ in range(50)))  # type: ignore[call-overload]
    assert results == [caller] * 50
    assert asked == ["good"], "one review for all that wait"
    clock.at = 59.0
    await call("good")  # type: ignore[misc]
    assert len(asked) == 1
    clock.at = 61.0
    await call("good")  # type: ignore[misc]
    assert len(asked) == 2
    for _ in range(2):
        with pytest.raises(Unauthenticated):
            await call("bad")  # type: ignore[misc]
    assert asked.count("bad") == 1
    clock.at = 72.0
    with pytest.raises(Unauthenticated):
        await call("bad")  # type: ignore[misc]
    assert asked.count("bad") == 2
    for n in range(30):
        await call(f"good{n}")  # type: ignore[misc]
    assert len(authenticator._known) == 10
    with pytest.raises(Unauthenticated, match="several"):
        await authenticator.authenticate((("authorization", "Bearer a"), ("authorization", "Bearer good")))
    with pytest.raises(Unauthenticated, match="too long"):
        await call("x" * 20_000)  # type: ignore[misc]
