"""Discovery and AwaitAcknowledged over real gRPC and TLS on loopback. Who may call is in test_callers_grpc.py."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from ambient.errors import PeerFault
from ambient.io import control_channel, xds_server
from ambient.io.control_channel import bearer, open_channel
from ambient.io.mesh_client import await_acknowledged
from ambient.io.quiet_grpc import grpc
from ambient.io.xds_client import METHOD
from ambient.model.policy import Action, Group, Policy, Scope
from ambient.model.world import Diff, World
from ambient.proto import discovery_pb2
from ambient.xds.client import Backoff
from ambient.xds.resources import ADDRESS_TYPE
from ambient.xds.session import Response, Session
from tests.io.follower import QUICK, Follower, workload
from tests.support.control import Background, ControlPlane, Now, until

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


async def test_who_cannot_put_a_change_into_effect_asks_ever_more_slowly(plane: ControlPlane) -> None:
    waited: list[int] = []

    class Counted(Backoff):
        def next(self, random: float) -> float:
            waited.append(self._failures)
            return super().next(random)

    async with Background() as background:
        follower = Follower(plane.node())
        follower.waits = Counted(limit_s=QUICK)
        follower.fail = 3
        plane.discovery.set_world(World.of([workload("a")]))
        background.start(follower.run())
        await until(lambda: len(follower.diffs) == 1)
        await plane.server.stop()
        await until(lambda: len(waited) > 3)
    assert waited[:4] == [0, 1, 2, 0]


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
