"""The DNS proxy: a pod's queries, answered from the World or forwarded to the node's resolvers.

It listens on descriptors opened inside the pods' namespaces; upstream sockets are the node's own. Every query in
flight counts against one limit and against its pod's share of it; beyond either the answer is SERVFAIL at once.
Until the first World has come every name is unknown, so everything is forwarded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import socket
import struct
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Final, Protocol

import asyncio_dgram

from ambient.model.address import SocketAddress, parse_ip
from ambient.node.messages import Pod
from ambient.settings import NodeSettings
from ztunnel.core import dns
from ztunnel.core.floods import Shares
from ztunnel.core.names import Names, Outcome

INFLIGHT_MAX: Final = 512
INFLIGHT_OF_POD: Final = 128
TRY_S: Final = 2.0
"""Patience with one upstream."""
TOTAL_S: Final = 5.0
ATTEMPTS: Final = 2
TCP_IDLE_S: Final = 10.0
TCP_CONNECTIONS_MAX: Final = 256
TCP_CONNECTIONS_OF_POD: Final = 64
TCP_QUERIES_MAX: Final = 1000
UPSTREAMS_MAX: Final = 3
DNS_PORT: Final = 53
_RESOLV_CONF = Path("/etc/resolv.conf")
_LENGTH = struct.Struct(">H")
_log = logging.getLogger("ztunnel.dns")


class Counts(Protocol):
    """What the proxy counts; prometheus-client counters fit."""

    def inc(self, amount: float = 1) -> None: ...


class Observes(Protocol):
    def observe(self, amount: float) -> None: ...


class Uncounted:
    def inc(self, amount: float = 1) -> None:
        pass

    def observe(self, amount: float) -> None:
        pass


def upstreams(settings: NodeSettings, resolv_conf: str) -> tuple[SocketAddress, ...]:
    """The configured resolvers, else the node's; what is no address is skipped with a word in the log."""
    texts: Sequence[str] = settings.dns_upstreams
    if not texts:
        words = (line.split() for line in resolv_conf.splitlines())
        texts = [w[1] for w in words if len(w) >= 2 and w[0] == "nameserver"]
    found: list[SocketAddress] = []
    for text in texts:
        try:
            found.append(SocketAddress(parse_ip(text), DNS_PORT))
        except ValueError:
            try:
                found.append(SocketAddress.parse(text))
            except ValueError as error:
                _log.error("resolver %s: %s", text, error)
    return tuple(found[:UPSTREAMS_MAX])


def node_resolv_conf() -> str:
    try:
        return _RESOLV_CONF.read_text()
    except OSError:
        return ""


class DnsProxy:
    """One for the node; `put_pod` gives it a pod's listeners. ``names`` returns the names as of now."""

    def __init__(
        self,
        settings: NodeSettings,
        names: Callable[[], Names],
        *,
        requests: Counts | None = None,
        upstream_requests: Counts | None = None,
        upstream_failures: Counts | None = None,
        upstream_seconds: Observes | None = None,
    ) -> None:
        self._settings = settings
        self._names = names
        self._requests = requests or Uncounted()
        self._upstream_requests = upstream_requests or Uncounted()
        self._upstream_failures = upstream_failures or Uncounted()
        self._upstream_seconds = upstream_seconds or Uncounted()
        self._inflight = Shares(INFLIGHT_MAX, INFLIGHT_OF_POD)
        self._tcp_connections = Shares(TCP_CONNECTIONS_MAX, TCP_CONNECTIONS_OF_POD)
        self._pods: dict[str, _PodListeners] = {}
        self.counters: dict[str, int] = {}

    async def put_pod(self, pod: Pod, fds: dict[str, int]) -> None:
        """Serve on the ``dns_*`` descriptors, which are taken over. Replaces what the pod had.

        Raises OSError if one is no such socket; then none is kept.
        """
        listeners = _PodListeners(self, pod)
        try:
            await listeners.open(fds)
        except BaseException:
            listeners.close()
            raise
        self.remove_pod(pod.uid)
        self._pods[pod.uid] = listeners

    def remove_pod(self, uid: str) -> None:
        listeners = self._pods.pop(uid, None)
        if listeners is not None:
            listeners.close()

    def close(self) -> None:
        for uid in list(self._pods):
            self.remove_pod(uid)

    def count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1

    async def answer(self, pod: Pod, raw: bytes, *, tcp: bool) -> bytes | None:
        """The answer to one message of a pod; None if none is due. Never raises for what the message is."""
        self._requests.inc()
        try:
            query = dns.parse_query(raw)
        except dns.DnsFault as fault:
            self.count("dns_malformed")
            _log.debug("pod %s/%s: %s", pod.namespace, pod.name, fault)
            return None if fault.code is None else dns.build_refusal(raw, fault.code)
        limit = dns.MESSAGE_BYTES_MAX if tcp else query.udp_bytes_max
        if query.edns_version:
            return dns.build_answer(query, code=dns.Code.BADVERS, bytes_max=limit)
        found = self._names().resolve(query.question, pod.namespace, self._settings.cluster_domain)
        if found.outcome is not Outcome.FORWARD:
            self.count("dns_answered")
            addresses = list(found.addresses)
            random.shuffle(addresses)
            return dns.build_answer(query, addresses, alias=found.alias, bytes_max=limit)
        if not self._inflight.enter(pod.uid):
            self.count("dns_overload")
            return dns.build_answer(query, code=dns.Code.SERVFAIL, bytes_max=limit)
        try:
            response = await self._forward(query, raw, tcp=tcp)
        finally:
            self._inflight.leave(pod.uid)
        if response is None:
            self._upstream_failures.inc()
            return dns.build_answer(query, code=dns.Code.SERVFAIL, bytes_max=limit)
        return dns.with_number(response, query.number)

    async def _forward(self, query: dns.Query, raw: bytes, *, tcp: bool) -> bytes | None:
        """An upstream's answer, by the transport the client used; None if none came in time."""
        servers = upstreams(self._settings, node_resolv_conf())
        if not servers:
            self.count("dns_no_upstream")
            return None
        exchange = _ask_tcp if tcp else _ask_udp
        started = time.monotonic()
        try:
            async with asyncio.timeout(TOTAL_S):
                for _ in range(ATTEMPTS):
                    for server in servers:
                        self._upstream_requests.inc()
                        try:
                            async with asyncio.timeout(TRY_S):
                                response = await exchange(server, raw, query.question)
                        except (TimeoutError, OSError, EOFError, asyncio_dgram.TransportClosed) as error:
                            self.count("dns_upstream_try_failed")
                            _log.debug("resolver %s: %s: %s", server, type(error).__name__, error)
                            continue
                        self._upstream_seconds.observe(time.monotonic() - started)
                        return response
        except TimeoutError:
            pass
        return None

    # --- TCP connections, counted over all pods

    def enter_tcp(self, pod: Pod) -> bool:
        if self._tcp_connections.enter(pod.uid):
            return True
        self.count("dns_tcp_overload")
        return False

    def leave_tcp(self, pod: Pod) -> None:
        self._tcp_connections.leave(pod.uid)


class _PodListeners:
    """The sockets of one pod and the tasks that serve them."""

    def __init__(self, proxy: DnsProxy, pod: Pod) -> None:
        self._proxy = proxy
        self._pod = pod
        self._streams: list[asyncio_dgram.DatagramServer] = []
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self, fds: dict[str, int]) -> None:
        socks = {name: socket.socket(fileno=fd) for name, fd in fds.items()}
        try:
            for name, sock in socks.items():
                sock.setblocking(False)
                if name.startswith("dns_udp"):
                    stream = await asyncio_dgram.from_socket(sock)
                    self._streams.append(stream)
                    self._spawn(self._serve_udp(stream))
                else:
                    self._servers.append(await asyncio.start_server(self._serve_tcp, sock=sock, backlog=1024))
        except TypeError as error:  # asyncio_dgram's word for a socket of another kind
            raise OSError(str(error)) from None
        except BaseException:
            for sock in socks.values():
                sock.close()
            raise

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for stream in self._streams:
            stream.close()
        for server in self._servers:
            server.close()
        for writer in self._writers:
            writer.close()

    def _spawn(self, coroutine: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve_udp(self, stream: asyncio_dgram.DatagramServer) -> None:
        while True:
            try:
                raw, client = await stream.recv()
            except asyncio_dgram.TransportClosed:
                return
            except OSError:
                continue  # an ICMP error of an earlier answer
            if len(self._tasks) > INFLIGHT_MAX:
                self._proxy.count("dns_dropped")
                continue
            self._spawn(self._answer_udp(stream, raw, client))

    async def _answer_udp(self, stream: asyncio_dgram.DatagramServer, raw: bytes, client: tuple[str, int]) -> None:
        response = await self._proxy.answer(self._pod, raw, tcp=False)
        if response is not None:
            with contextlib.suppress(OSError, asyncio_dgram.TransportClosed):
                await stream.send(response, client)

    async def _serve_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._proxy.enter_tcp(self._pod):
            writer.close()
            return
        self._writers.add(writer)
        try:
            for _ in range(TCP_QUERIES_MAX):
                async with asyncio.timeout(TCP_IDLE_S):
                    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                    raw = await reader.readexactly(length)
                response = await self._proxy.answer(self._pod, raw, tcp=True)
                if response is None:
                    break
                writer.write(_LENGTH.pack(len(response)) + response)
                async with asyncio.timeout(TCP_IDLE_S):
                    await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self._writers.discard(writer)
            self._proxy.leave_tcp(self._pod)
            writer.close()


def _matches(raw: bytes, number: int, question: dns.Question) -> bool:
    try:
        response = dns.parse_response(raw)
    except dns.DnsFault:
        return False
    return response.number == number and response.question == question


async def _ask_udp(server: SocketAddress, raw: bytes, question: dns.Question) -> bytes:
    """Our own query number and a fresh port, and only an answer to this very question counts."""
    number = secrets.randbelow(65536)
    stream = await asyncio_dgram.connect((str(server.ip), server.port))
    try:
        await stream.send(dns.with_number(raw, number))
        while True:
            response, _ = await stream.recv()
            if _matches(response, number, question):
                return bytes(response)
    finally:
        stream.close()


async def _ask_tcp(server: SocketAddress, raw: bytes, question: dns.Question) -> bytes:
    number = secrets.randbelow(65536)
    reader, writer = await asyncio.open_connection(str(server.ip), server.port)
    try:
        writer.write(_LENGTH.pack(len(raw)) + dns.with_number(raw, number))
        await writer.drain()
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        response = await reader.readexactly(length)
    finally:
        writer.close()
    if not _matches(response, number, question):
        raise OSError("an answer to another question")
    return response
