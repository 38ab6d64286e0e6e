"""Two pods whose flows may be redirected, clients that check every byte, and sockets the test holds itself."""

from __future__ import annotations

import contextlib
import errno
import json
import select
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import FlowEnd, FlowEvent, FlowValue, TupleKey
from ambient.io import bpf_tc, cgroup, netns
from ambient.io.flow_reader import FlowReader
from tests.support.flows import closed, swept
from tests.support.netlab import Node, Pod, until

SO_MEMINFO = 55
CAN = LAYOUT["CAN_REDIRECT"]
NATIVE = LAYOUT["FLOW_NATIVE"]
REDIRECT = LAYOUT["FLOW_REDIRECT"]
WANTS = {
    "flags": LAYOUT["ENROLLED_REDIRECT"],
    "workload_flags": LAYOUT["WORKLOAD_REDIRECT"] | LAYOUT["WORKLOAD_ALLOW_ANY"],
}


def enrol(pod: Pod) -> Pod:
    """In the mesh, with `redirect`."""
    pod.enrol(**WANTS)
    assert bpf_tc.attach(pod.node.bpffs_dir, pod.fd, pod.name) == 1
    return pod


@dataclass(frozen=True)
class Done:
    """What both clients said, and the flows as the kernel reported them."""

    client: dict[str, float]
    server: dict[str, float]
    flows: list[FlowEvent]

    @property
    def redirected(self) -> int:
        return sum(e.value.client.redirect_bytes + e.value.server.redirect_bytes for e in self.flows)

    @property
    def native(self) -> int:
        return sum(e.value.client.native_bytes + e.value.server.native_bytes for e in self.flows)

    @property
    def switches(self) -> int:
        return sum(e.value.client.switches + e.value.server.switches for e in self.flows)


class Duplex:
    """The C client on both sides; see tests/net/clients/duplex.c."""

    def __init__(
        self, node: Node, client: Pod, server: Pod, binary: Path, server_enters: Callable[[], None] = lambda: None
    ) -> None:
        """``server_enters`` runs in the server's process before it begins."""
        self.node, self.client, self.server, self.binary = node, client, server, binary
        self.redirected = self.native = 0
        """Bytes of all runs so far."""
        self._port = 7000
        self._server_enters = server_enters
        self._reader = FlowReader(node.maps)
        closed(self._reader)

    def close(self) -> None:
        self._reader.close()

    def _start(self, pod: Pod, *words: object) -> subprocess.Popen[str]:
        def place() -> None:
            cgroup.move(0, pod.cgroup)
            netns._enter(pod.fd)
            if words[0] == "serve":
                self._server_enters()

        return subprocess.Popen(
            [self.binary, *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=place,
        )

    def run(
        self,
        *,
        flows: int = 16,
        dial: str = "n",
        serve: str = "n",
        total: int = 1_000_000,
        size: int = 65536,
        pause_us: int = 0,
        end: str = "f",
        accept_delay_ms: int = 0,
        seed: int = 1,
        family: int = 4,
        limit_s: float = 60.0,
    ) -> Done:
        """Exchange and check; an AssertionError if a byte was wrong or it did not end in time."""
        self._port += 1
        self.node.beat()
        address = self.server.ip6 if family == 6 else self.server.ip4
        words = (total, size, pause_us, end)
        server = self._start(self.server, "serve", address, self._port, flows, serve, *words, accept_delay_ms, seed)
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "listening\n"
            client = self._start(self.client, "dial", address, self._port, flows, dial, *words, 0, seed)
            try:
                client_said, client_wrong = client.communicate(timeout=limit_s)
                server_said, server_wrong = server.communicate(timeout=limit_s)
            finally:
                client.kill()
                client.wait()
        finally:
            server.kill()
            server.wait()
        assert (client.returncode, server.returncode) == (0, 0), client_wrong + server_wrong
        found: list[FlowEvent] = []

        def reported() -> bool:
            found.extend(closed(self._reader))
            found.extend(swept(self._reader))
            return len(found) >= flows

        until(reported, f"{flows} flows are reported", 20)
        done = Done(json.loads(client_said), json.loads(server_said), found)
        self.redirected += done.redirected
        self.native += done.native
        return done


class Held:
    """One connection whose two ends the test process holds; both non-blocking."""

    def __init__(self, node: Node, client: Pod, server: Pod, port: int = 6000, bound: int = 0) -> None:
        self.node = node
        with _made_in(server):
            listener = netns.create_socket(server.fd, socket.AF_INET, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((server.ip4, port))
            listener.listen(4)
        with _made_in(client):
            self.client = netns.create_socket(client.fd, socket.AF_INET, socket.SOCK_STREAM)
        self.client.settimeout(5)
        if bound:
            self.client.bind((client.ip4, bound))
        self.client.connect((server.ip4, port))
        listener.settimeout(5)
        self.server, peer = listener.accept()
        listener.close()
        self.key = TupleKey(server.ip4, peer[0], port, peer[1])
        self._waits = select.epoll()
        for sock in (self.client, self.server):
            self._waits.register(sock, select.EPOLLIN)
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        self._waits.close()
        self.client.close()
        self.server.close()

    def flow(self) -> FlowValue:
        return self.node.maps.flows[self.key]

    def ends(self) -> tuple[FlowEnd, FlowEnd]:
        flow = self.flow()
        return flow.client, flow.server

    def ping(self) -> None:
        """A byte there and a byte back."""
        for sender, receiver in ((self.client, self.server), (self.server, self.client)):
            assert sender.send(b"x") == 1
            assert read(receiver, 1) == b"x"

    def warm(self) -> None:
        """Until both directions redirect."""

        def redirecting() -> bool:
            self.ping()
            return all(end.state == REDIRECT for end in self.ends())

        until(redirecting, "both directions redirect")

    def inserted(self) -> bool:
        return all(end.sighting & LAYOUT["END_INSERTED"] for end in self.ends())


@contextlib.contextmanager
def _made_in(pod: Pod) -> Iterator[None]:
    """Sockets made now belong to the pod's cgroup."""
    with pod.node.member(f"kubepods/{pod.name}"):
        yield


def read(sock: socket.socket, count: int, limit_s: float = 5.0) -> bytes:
    """Exactly so many bytes of a non-blocking socket."""
    out = bytearray()
    while len(out) < count:
        ready = select.select([sock], [], [], limit_s)[0]
        assert ready, f"{len(out)} of {count} bytes within {limit_s} s"
        with contextlib.suppress(BlockingIOError):
            got = sock.recv(count - len(out))
            assert got, f"the connection ended after {len(out)} of {count} bytes"
            out += got
    return bytes(out)


def fill(sock: socket.socket, message: bytes, limit: int = 1 << 20) -> int:
    """Send until the socket takes no more; how many bytes went. Fails on anything but EAGAIN."""
    sent = 0
    for _ in range(limit):
        try:
            sent += sock.send(message)
        except BlockingIOError as error:
            assert error.errno == errno.EAGAIN
            return sent
    raise AssertionError(f"{sent} bytes went to a receiver that reads nothing")


def held_bytes(sock: socket.socket) -> int:
    """sk_rmem_alloc."""
    return int(struct.unpack_from("=I", sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36))[0])
