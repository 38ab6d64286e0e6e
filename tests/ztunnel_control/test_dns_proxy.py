"""The DNS proxy on real sockets: answered, forwarded, retried, bounded."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import pytest

from ambient.settings import NodeSettings
from tests.support.control import until
from tests.support.shop import ips, pod
from tests.ztunnel_control.test_names import NAMES
from ztunnel.core.dns import (
    TYPE_A,
    TYPE_AAAA,
    Code,
    Question,
    answers_of,
    build_answer,
    build_query,
    parse_query,
    parse_response,
)
from ztunnel.core.names import Names
from ztunnel.io import dns
from ztunnel.io.dns import DnsProxy, upstreams

WEB = pod("web-1", "10.0.0.1")
CART = Question("cart.shop.svc.cluster.local", TYPE_A)
OUTSIDE = Question("www.example.org", TYPE_A)
FAMILIES = [socket.AF_INET, socket.AF_INET6]


class Count:
    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        self.value += amount

    def observe(self, amount: float) -> None:
        self.value += 1


def bound(kind: int, family: int = socket.AF_INET) -> socket.socket:
    sock = socket.socket(family, kind)
    sock.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
    if kind == socket.SOCK_STREAM:
        sock.listen()
    return sock


class Upstream:
    """A resolver; ``answer`` maps a query to the messages that go back (after what ``answer`` waits for)."""

    def __init__(self, answer: Callable[[bytes], Awaitable[list[bytes]]]) -> None:
        self.seen: list[bytes] = []
        self._answer = answer
        while True:  # a port that is free for both
            self._udp, self._tcp = bound(socket.SOCK_DGRAM), socket.socket()
            try:
                self._tcp.bind(self._udp.getsockname())
                break
            except OSError:
                self._udp.close()
                self._tcp.close()
        self._udp.setblocking(False)
        self._tcp.listen()
        self.address = "{}:{}".format(*self._udp.getsockname())
        self._tasks: list[Any] = []

    async def __aenter__(self) -> Upstream:
        self._tasks.append(asyncio.create_task(self._serve_udp()))
        self._server = await asyncio.start_server(self._serve_tcp, sock=self._tcp)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self._tasks:
            task.cancel()
        self._server.close()
        self._udp.close()

    async def _serve_udp(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            raw, client = await loop.sock_recvfrom(self._udp, 4096)
            self.seen.append(raw)
            self._tasks.append(asyncio.create_task(self._reply(raw, client)))

    async def _reply(self, raw: bytes, client: Any) -> None:
        for response in await self._answer(raw):
            await asyncio.get_running_loop().sock_sendto(self._udp, response, client)

    async def _serve_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            raw = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
            self.seen.append(raw)
            for response in await self._answer(raw):
                writer.write(struct.pack(">H", len(response)) + response)
        writer.close()


async def good(raw: bytes) -> list[bytes]:
    return [build_answer(parse_query(raw), ips("192.0.2.7"))]


async def silent(raw: bytes) -> list[bytes]:
    return []


class Pod:
    """A proxy with one pod's four kinds of listener."""

    def __init__(self, servers: tuple[str, ...] = (), names: Names = NAMES) -> None:
        self.requests, self.forwarded, self.failed, self.seconds = Count(), Count(), Count(), Count()
        settings = NodeSettings(node_name="n", dns_upstreams=servers or ("127.0.0.1:1",))
        self.proxy = DnsProxy(
            settings,
            lambda: names,
            requests=self.requests,
            upstream_requests=self.forwarded,
            upstream_failures=self.failed,
            upstream_seconds=self.seconds,
        )
        self.addresses: dict[str, Any] = {}

    async def __aenter__(self) -> Pod:
        fds: dict[str, int] = {}
        for family in FAMILIES:
            for name, kind in (("udp", socket.SOCK_DGRAM), ("tcp", socket.SOCK_STREAM)):
                sock = bound(kind, family)
                key = f"dns_{name}{'6' if family == socket.AF_INET6 else '4'}"
                self.addresses[key] = sock.getsockname()[:2]
                fds[key] = sock.detach()
        await self.proxy.put_pod(WEB, fds)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.proxy.close()

    async def udp(self, raw: bytes, family: int = socket.AF_INET) -> bytes:
        loop = asyncio.get_running_loop()
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect(self.addresses["dns_udp6" if family == socket.AF_INET6 else "dns_udp4"])
            await loop.sock_sendall(sock, raw)
            async with asyncio.timeout(10):
                return await loop.sock_recv(sock, 65535)

    @contextlib.asynccontextmanager
    async def tcp(self, family: int = socket.AF_INET) -> AsyncIterator[Callable[[bytes], Awaitable[bytes]]]:
        reader, writer = await asyncio.open_connection(
            *self.addresses["dns_tcp6" if family == socket.AF_INET6 else "dns_tcp4"]
        )

        async def ask(raw: bytes) -> bytes:
            writer.write(struct.pack(">H", len(raw)) + raw)
            async with asyncio.timeout(10):
                return await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))

        try:
            yield ask
        finally:
            writer.close()


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_known_name_is_answered_over_udp_and_tcp(family: int) -> None:
    async with Pod() as here:
        for raw in (await here.udp(build_query(5, CART), family),):
            assert answers_of(raw) == [(CART.name, TYPE_A, 30, b"\x0a\x60\0\x0a")]
        async with here.tcp(family) as ask:
            for number in (1, 2):  # two questions on one connection
                raw = await ask(build_query(number, CART))
                assert parse_response(raw).number == number and answers_of(raw)
        assert (here.requests.value, here.forwarded.value) == (3, 0)


async def test_a_family_the_name_has_not_is_no_data_and_not_no_name() -> None:
    async with Pod() as here:
        raw = await here.udp(build_query(5, Question("four.shop.svc.cluster.local", TYPE_AAAA)))
        assert (parse_response(raw).code, answers_of(raw)) == (Code.NOERROR, [])


async def test_an_unknown_name_is_forwarded_and_the_answer_comes_back_as_it_was() -> None:
    async def no_such_name(raw: bytes) -> list[bytes]:
        return [build_answer(parse_query(raw), code=Code.NXDOMAIN)]

    async with Upstream(no_such_name) as server, Pod((server.address,)) as here:
        raw = await here.udp(build_query(77, OUTSIDE))
        assert (parse_response(raw).number, parse_response(raw).code) == (77, Code.NXDOMAIN)
        async with here.tcp() as ask:
            assert parse_response(await ask(build_query(78, OUTSIDE))).code == Code.NXDOMAIN
        assert (here.forwarded.value, here.failed.value, here.seconds.value) == (2, 0, 2)


async def test_before_the_first_world_every_name_is_forwarded_at_once() -> None:
    async with Upstream(good) as server, Pod((server.address,), names=Names()) as here:
        assert answers_of(await here.udp(build_query(1, CART)))[0][3] == bytes([192, 0, 2, 7])


async def test_a_silent_resolver_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns, "TRY_S", 0.1)
    async with Upstream(silent) as mute, Upstream(good) as server, Pod((mute.address, server.address)) as here:
        assert answers_of(await here.udp(build_query(1, OUTSIDE)))
        assert (len(mute.seen), here.forwarded.value, here.failed.value) == (1, 2, 0)


async def test_when_no_resolver_answers_the_client_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns, "TRY_S", 0.05)
    async with Upstream(silent) as mute, Pod((mute.address,)) as here:
        raw = await here.udp(build_query(9, OUTSIDE))
        assert (parse_response(raw).number, parse_response(raw).code) == (9, Code.SERVFAIL)
        assert (here.failed.value, len(mute.seen)) == (1, dns.ATTEMPTS)


async def test_a_forged_answer_is_passed_over() -> None:
    async def forged(raw: bytes) -> list[bytes]:
        query = parse_query(raw)
        other = parse_query(build_query(query.number, CART))
        wrong_number = bytes([raw[0] ^ 1]) + build_answer(query, ips("203.0.113.1"))[1:]
        return [b"x", wrong_number, build_answer(other, ips("203.0.113.1")), build_answer(query, ips("192.0.2.7"))]

    async with Upstream(forged) as server, Pod((server.address,)) as here:
        assert answers_of(await here.udp(build_query(1, OUTSIDE)))[0][3] == bytes([192, 0, 2, 7])


async def test_the_number_a_client_chose_is_not_the_one_sent_upstream() -> None:
    async with Upstream(good) as server, Pod((server.address,)) as here:
        for _ in range(8):
            await here.udp(build_query(4242, OUTSIDE))
        assert {parse_query(raw).number for raw in server.seen} != {4242}


async def test_queries_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    release = asyncio.Event()

    async def late(raw: bytes) -> list[bytes]:
        await release.wait()
        return await good(raw)

    monkeypatch.setattr(dns, "INFLIGHT_MAX", 4)
    async with Upstream(late) as server, Pod((server.address,)) as here:
        waiting = [asyncio.create_task(here.proxy.answer(WEB, build_query(n, OUTSIDE), tcp=False)) for n in range(4)]
        await until(lambda: len(server.seen) == 4, "all are in flight")
        refused = await here.proxy.answer(WEB, build_query(9, OUTSIDE), tcp=False)
        assert refused is not None and parse_response(refused).code == Code.SERVFAIL
        known = await here.proxy.answer(WEB, build_query(9, CART), tcp=False)
        assert known is not None and answers_of(known), "what needs no resolver is still answered"
        release.set()
        assert all(answers_of(raw or b"") for raw in await asyncio.gather(*waiting))
        assert here.proxy.counters["dns_overload"] == 1


async def test_a_pod_whose_queries_hang_leaves_room_for_others() -> None:
    release = asyncio.Event()

    async def late(raw: bytes) -> list[bytes]:
        await release.wait()
        return await good(raw)

    other = msgspec.structs.replace(WEB, uid="another")
    async with Upstream(late) as server, Pod((server.address,)) as here:
        waiting = [
            asyncio.create_task(here.proxy.answer(WEB, build_query(n, OUTSIDE), tcp=False))
            for n in range(dns.INFLIGHT_OF_POD)
        ]
        await until(lambda: len(server.seen) == dns.INFLIGHT_OF_POD, "the pod's share is in flight")
        refused = await here.proxy.answer(WEB, build_query(9, OUTSIDE), tcp=False)
        assert refused is not None and parse_response(refused).code == Code.SERVFAIL
        served = asyncio.create_task(here.proxy.answer(other, build_query(9, OUTSIDE), tcp=False))
        await until(lambda: len(server.seen) > dns.INFLIGHT_OF_POD, "the other pod's query is on its way")
        release.set()
        assert all(answers_of(raw or b"") for raw in await asyncio.gather(*waiting, served))


async def test_an_answer_too_long_for_udp_is_truncated_and_whole_over_tcp() -> None:
    from ambient.model.world import World
    from tests.support.shop import serves, service, workload

    many = World.of([workload(f"db-{n}", f"10.1.0.{n}", services=serves("db")) for n in range(100)], [service("db")])
    question = Question("db.shop.svc.cluster.local", TYPE_A)
    async with Pod(names=Names.of(many)) as here:
        short = await here.udp(build_query(1, question))
        assert len(short) <= 512 and parse_response(short).truncated
        longer = await here.udp(build_query(1, question, udp_bytes_max=4096))
        assert not parse_response(longer).truncated and len(answers_of(longer)) == 100
        async with here.tcp() as ask:
            assert len(answers_of(await ask(build_query(1, question)))) == 100


async def test_what_is_no_query_gets_its_code_or_nothing() -> None:
    async with Pod() as here:
        update = bytearray(build_query(3, CART))
        update[2] |= 0x28
        assert parse_code(await here.udp(bytes(update))) == Code.NOTIMP
        assert parse_code(await here.udp(build_query(3, CART) + b"x")) == Code.FORMERR
        assert await here.proxy.answer(WEB, b"x", tcp=False) is None
        response = bytearray(build_query(3, CART))
        response[2] |= 0x80
        assert await here.proxy.answer(WEB, bytes(response), tcp=False) is None
        version = bytearray(build_query(3, CART, udp_bytes_max=1232))
        version[-5] = 1
        assert (await here.udp(bytes(version)))[-6] == 1, "BADVERS"
        # and after all that it still answers
        assert answers_of(await here.udp(build_query(4, CART)))


def parse_code(raw: bytes) -> int:
    return raw[3] & 0xF


async def test_a_removed_pod_is_answered_no_more() -> None:
    async with Pod() as here:
        await here.udp(build_query(1, CART))
        here.proxy.remove_pod(WEB.uid)
        await asyncio.sleep(0)  # the loop closes a transport's socket in its next turn
        with pytest.raises(ConnectionRefusedError):
            await here.udp(build_query(1, CART))
        with pytest.raises(OSError):
            await asyncio.open_connection(*here.addresses["dns_tcp4"])


async def test_a_descriptor_that_is_no_such_socket_is_refused_and_the_old_listeners_stay() -> None:
    async with Pod() as here:
        wrong = bound(socket.SOCK_STREAM)
        with pytest.raises(OSError):
            await here.proxy.put_pod(WEB, {"dns_udp4": wrong.detach()})
        assert answers_of(await here.udp(build_query(1, CART)))


def test_resolvers_come_from_the_settings_else_from_the_node() -> None:
    node = "# x\nnameserver 10.0.0.53\nsearch a b\nnameserver fe80::1\nnameserver bad\nnameserver 1.1.1.1\n"
    settings = NodeSettings(node_name="n")
    assert [str(u) for u in upstreams(settings, node)] == ["10.0.0.53:53", "[fe80::1]:53", "1.1.1.1:53"]
    ours = NodeSettings(node_name="n", dns_upstreams=("127.0.0.1:5353", "fd00::1"))
    assert [str(u) for u in upstreams(ours, node)] == ["127.0.0.1:5353", "[fd00::1]:53"]
    assert upstreams(settings, "") == ()
