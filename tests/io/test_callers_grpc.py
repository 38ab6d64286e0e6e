"""Who may call the control plane, over real gRPC and TLS: tokens, their memory, and the certificates they are given."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable
from pathlib import Path

import pytest
from cryptography import x509

from ambient.control.certificates import Caller, PodFacts
from ambient.errors import ConfigFault, PeerFault, PlatformFault
from ambient.io import authentication, ca, xds_server
from ambient.io.authentication import Authenticator, Unauthenticated
from ambient.io.ca_client import CREATE_CERTIFICATE, create_certificate, make_csr, make_key, trust_bundle
from ambient.io.control_channel import bearer, open_channel
from ambient.io.mesh_client import await_acknowledged
from ambient.io.quiet_grpc import grpc
from ambient.io.xds_client import METHOD
from ambient.model.world import World
from ambient.settings import NodeSettings
from tests.io.follower import Follower, workload
from tests.support.control import Background, ControlPlane, Now, until

AWAIT_ACKNOWLEDGED = "/ambient.v1.Mesh/AwaitAcknowledged"
NODE = "spiffe://cluster.local/ns/ambient-system/sa/ambient-node"
WEB = "spiffe://cluster.local/ns/shop/sa/web"


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


@pytest.mark.parametrize("method", [CREATE_CERTIFICATE, AWAIT_ACKNOWLEDGED])
async def test_who_is_no_caller_is_refused_before_anything_of_its_request_is_taken_in(
    plane: ControlPlane, method: str
) -> None:
    async with open_channel(plane.node()) as channel:
        call = channel.stream_stream(method)(metadata=(), timeout=10)  # and sends no request at all
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (None, grpc.StatusCode.DEADLINE_EXCEEDED),
        (b"\xff", grpc.StatusCode.INVALID_ARGUMENT),
        (b"x" * (xds_server.RECEIVE_BYTES_MAX + 1), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_a_request_that_does_not_come_or_is_not_readable_ends_its_call(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, sent: bytes | None, code: grpc.StatusCode
) -> None:
    monkeypatch.setattr(xds_server, "REQUEST_TIMEOUT_S", 0.2 if sent is None else 5.0)
    settings = plane.node()
    async with open_channel(settings) as channel:
        call = channel.stream_stream(CREATE_CERTIFICATE)(metadata=bearer(settings), timeout=20)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            if sent is not None:
                await call.write(sent)
            await call.read()
        assert caught.value.code() is code
    await create_certificate(settings, NODE, make_csr(make_key(), NODE), 60)


async def test_one_caller_asks_for_few_certificates_at_once(plane: ControlPlane) -> None:
    settings = plane.node()
    async with open_channel(settings) as channel:
        begin = channel.stream_stream(CREATE_CERTIFICATE)
        held = [begin(metadata=bearer(settings)) for _ in range(xds_server.CERTIFICATES_OF_CALLER_MAX)]
        await until(lambda: sum(plane.server._asking.values()) == len(held))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await begin(metadata=bearer(settings)).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for call in held:
            call.cancel()
        await until(lambda: not plane.server._asking)
    await create_certificate(settings, NODE, make_csr(make_key(), NODE), 60)


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
    assert len(authenticator._accepted) == 10 and len(authenticator._refused) == 1
    with pytest.raises(Unauthenticated, match="several"):
        await authenticator.authenticate((("authorization", "Bearer a"), ("authorization", "Bearer good")))
    with pytest.raises(Unauthenticated, match="too long"):
        await call("x" * 20_000)  # type: ignore[misc]


async def test_tokens_of_one_address_neither_hold_up_nor_displace_those_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(authentication, "ENTRIES_MAX", 100)
    good, answer, asked = Caller("a", "b"), asyncio.Event(), list[str]()

    async def review(token: str) -> Caller | None:
        asked.append(token)
        if token.startswith("good"):
            return good
        await answer.wait()
        return None

    authenticator = Authenticator(review, Now(0.0))

    def call(token: str, peer: str) -> Awaitable[Caller]:
        return authenticator.authenticate((("authorization", f"Bearer {token}"),), peer)

    assert await call("good", "ipv4:10.0.0.1") is good
    storm = [asyncio.ensure_future(call(f"bad-{n}", "ipv4:10.0.0.9")) for n in range(50)]
    async with asyncio.timeout(5):
        assert await call("good-2", "ipv4:10.0.0.2") is good, "is not held up"
    answer.set()
    results = await asyncio.gather(*storm, return_exceptions=True)
    waited = [r for r in results if isinstance(r, Unauthenticated)]
    assert len(waited) == authentication.REVIEWS_OF_PEER_MAX
    assert all("10.0.0.9" in str(r) for r in results if isinstance(r, PlatformFault))
    for n in range(300):  # one after the other
        with pytest.raises(Unauthenticated):
            await call(f"worse-{n}", "ipv4:10.0.0.9")
    asked.clear()
    assert await call("good", "ipv4:10.0.0.1") is good and asked == [], "is still known"
